"""What is shown of a model while it learns: a held-out question, the truth, its answer, whatever kind of model it is."""

import pytest
import torch

from nanovlm import recipes
from nanovlm.data.conversation import answer_ids, template_texts
from nanovlm.data.scenes import Scenes
from nanovlm.evaluate import examples
from nanovlm.tokenizer import Tokenizer

SOURCE = Scenes()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SOURCE.texts()[:300] + template_texts(), 600)


def test_a_contrastive_model_chooses_among_captions(tokenizer, monkeypatch):
    recipe = recipes.get("clip/tiny")
    model = recipes.build("clip/tiny", "cpu")
    samples = [SOURCE.sample("pairs", "val", i) for i in range(5)]
    seen = []

    def score(images, input_ids, attention_mask):
        seen.append([tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(input_ids, attention_mask)])
        assert images.shape == (5, 3, 48, 48)
        return torch.tensor([[float(text == s.caption) for text in seen[0]] for s in samples])

    monkeypatch.setattr(model, "score", score)
    rows = examples(model, recipe, recipe.stages[0], SOURCE, tokenizer, "cpu", n=5)
    assert seen[0] == list(dict.fromkeys(text for s in samples for text in (s.caption, *s.negatives)))
    assert [(row[0].tobytes(), *row[1:]) for row in rows] == [
        (s.images[0].tobytes(), f"which of {len(seen[0])} captions?", s.caption, s.caption) for s in samples]


@pytest.mark.parametrize("name", ["lm/tiny", "llava/tiny"])
def test_a_model_that_speaks_is_asked_and_its_answer_is_cut_at_the_stop(tokenizer, monkeypatch, name):
    recipe = recipes.get(name)
    stage, model, asked = recipe.stages[-1], recipes.build(name, "cpu"), []

    def generate(*inputs_and_limits):
        *inputs, _, stop = inputs_and_limits
        asked.append(inputs)
        answer = answer_ids("top left", tokenizer, stage.format)
        return torch.tensor([answer + [tokenizer.pad_id] * 3] * len(inputs[-1]))

    monkeypatch.setattr(model, "generate", generate)
    rows = examples(model, recipe, stage, SOURCE, tokenizer, "cpu", n=6)
    *images, ids, mask = asked[0]
    assert len(rows) == len(ids) == 6 and {prediction for *_, prediction in rows} == {"top left"}
    assert [tuple(image.shape) for image in images] == ([] if name == "lm/tiny" else [(6, 3, 48, 48)])
    assert [row[0] is None for row in rows] == [name == "lm/tiny"] * 6
    for (_, question, truth, _), row, real in zip(rows, ids, mask):
        assert question.split("\n")[-1].split(". ")[-1] in tokenizer.decode(row[real].tolist()) and truth
