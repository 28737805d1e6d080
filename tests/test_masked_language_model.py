"""Masked words: what is hidden and how often, what is learned of it, who sees whom, and an exam whose answers fill gaps."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from random import Random

import pytest
import torch
from oracles import hf_bert, ours
from tools import bite, close, pad_mask, random_ids
from torch import nn
from torch.nn import functional as F

from nanovlm import recipes
from nanovlm.bert import BertConfig
from nanovlm.data.masking import ALL_HIDDEN, BESIDE_ANSWERS, CHOSEN, hide, written
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.source import Exam
from nanovlm.evaluate import judges
from nanovlm.evaluate.pupil import Pupil
from nanovlm.lm_loss import IGNORE, Output
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.recipes.stage import Stage
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import MicroBatches, Mixture, make_collate
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.world.datasets import SETS, Scenes

B, T = 4, 9
LENGTHS = [9, 5, 3, 7]
WORLD = Scenes()
RECIPE = recipes.get("bert/tiny")
STAGE = RECIPE.stages[0]
TOKENIZER = Tokenizer.train(WORLD.texts()[:300], 500)
MASK = TOKENIZER.token_id("[MASK]")


def sharp(seed: int = 0) -> MaskedLanguageModel:
    return bite(MaskedLanguageModel(BertConfig(53, 30, 3, 5, 44, max_positions=23, dropout=0.0)), seed)


# --- the model ---

def test_loss_and_logits_are_those_of_transformers():
    """Of padded texts; theirs is a mean over the learned places."""
    hf = hf_bert(1)
    model, ids, mask = ours(hf), random_ids(B, T, 1), pad_mask(LENGTHS, "right", T)
    assert type(model) is MaskedLanguageModel
    labels = random_ids(B, T, 2).masked_fill(~mask | (random_ids(B, T, 3) > 20), IGNORE)
    want = hf(ids, attention_mask=mask.long(), labels=labels)
    got = model(ids, mask, labels)
    close(got.logits[mask], want.logits[mask])
    close(got.loss, want.loss)
    total, count = model.losses({"input_ids": ids, "attention_mask": mask, "labels": labels})["mlm"]
    assert count == (labels != IGNORE).sum() > 4
    close(total / count, want.loss)


def test_the_loss_is_of_the_learned_places_alone():
    """A slow loop over them; the first place counts, and the last."""
    model, ids, mask = sharp(), random_ids(B, T, 4), torch.ones(B, T, dtype=torch.bool)
    places = [(0, 0), (1, 3), (1, 8), (3, 5)]
    labels = torch.full((B, T), IGNORE)
    for row, place in places:
        labels[row, place] = 7 + row + place
    total, count = model.losses({"input_ids": ids, "attention_mask": mask, "labels": labels})["mlm"]
    logits = model(ids).logits
    slow = -sum(logits[row, place].log_softmax(dim=-1)[7 + row + place] for row, place in places)
    assert count == len(places)
    close(total, slow)
    total, count = model.losses({"input_ids": ids, "attention_mask": mask, "labels": torch.full((B, T), IGNORE)})["mlm"]
    total.backward()
    assert total == count == 0, "texts of which nothing is hidden are no error"


def test_every_word_sees_every_word_and_nobody_sees_padding():
    model, ids, mask = sharp(1), random_ids(B, T, 5), pad_mask(LENGTHS, "right", T)
    with torch.no_grad():
        before = model(ids, mask).logits
        for row, length in enumerate(LENGTHS):
            for place in (0, length // 2, length - 1):
                changed = ids.clone()
                changed[row, place] = 4 + (changed[row, place] - 3) % 40
                moved = (model(changed, mask).logits - before).abs().amax(dim=-1)  # (B, T)
                assert (moved[row, :length] > 1e-5).all(), "a later word shows in the earlier ones, too"
                assert not moved[[other for other in range(B) if other != row]].any()
        close(model(ids.masked_fill(~mask, 17), mask).logits[mask], before[mask])
        alone = model(ids[1:2, :LENGTHS[1]]).logits
        close(alone[0], before[1, :LENGTHS[1]])


class Sure(MaskedLanguageModel):
    """Says 10 · the place, and 1 more for each [MASK] (id 3) that it sees; it is the surer the later the place."""

    def forward(self, input_ids, attention_mask):
        self.seen.append(input_ids.tolist())
        places = torch.arange(input_ids.shape[1])
        said = 10 * places + (input_ids == 3).sum(dim=1, keepdim=True)
        return Output(F.one_hot(said, 100).float() * (1 + places[:, None]))


def test_gaps_are_filled_from_the_surest_on_and_each_is_seen_by_the_next():
    ids = torch.tensor([[1, 3, 4, 3, 3], [1, 4, 3, 2, 0]])
    batch = {"input_ids": ids, "attention_mask": ids != 0, "masked": ids == 3}
    model = Sure(BertConfig(53, 30, 3, 5, 44))
    model.seen = []
    said = model.generate(batch, 9, [2])
    assert said.tolist() == [[11, 32, 43], [21, 0, 0]] and said.dtype == torch.int64
    assert model.seen == [[[1, 3, 4, 3, 3], [1, 4, 3, 2, 0]], [[1, 3, 4, 3, 43], [1, 4, 21, 2, 0]],
                          [[1, 3, 4, 32, 43], [1, 4, 21, 2, 0]]]
    assert model.generate(batch, 2, [2]).tolist() == [[11, 32], [21, 0]]
    assert torch.equal(batch["masked"], ids == 3), "the batch is left as it was"


# --- what is hidden ---

def test_what_a_sample_says():
    """In parts, every second one an answer; put together they are the ids of the whole text."""
    told = Sample("", turns=(Turn("<image>\nwhat colour?", "red"), Turn("and where?", "top left")), told=("top left: red square.",))
    unasked = Sample("", turns=(Turn("<image>\n", "a red square."),), told=("top left: red square.",))
    pages = Sample("", turns=(Turn("<image>", "7"), Turn("<image> <image>", "two")), told=("a", "b", "c"))
    alone = Sample("", caption="a red square.")
    for sample, want in ((told, ["top left: red square.\nwhat colour?", " red", " and where?", " top left"]),
                         (unasked, ["top left: red square.", " a red square."]), (pages, ["a", " 7", " b c", " two"]), (alone, ["a red square."])):
        parts = written(sample, TOKENIZER)
        assert [TOKENIZER.decode(ids) for ids in parts] == want
        assert [*chain(*parts)] == TOKENIZER.encode("".join(want))


def within_five_sigma(hits: int, n: int, p: float) -> bool:
    return abs(hits - n * p) < 5 * (n * p * (1 - p)) ** 0.5  # one false alarm in two million


def fates_of(ids: list[int], read: list[int], labels: list[int]) -> Counter:
    """How many words were chosen and became [MASK], another word, or stayed; what is not chosen stays."""
    fates = Counter()
    for word, now, label in zip(ids, read, labels, strict=True):
        assert label == word or (label == IGNORE and now == word)
        fates["masked" if now == MASK else "kept" if now == word else "exchanged"] += label == word
        assert now == MASK or len(TOKENIZER.specials) <= now < len(TOKENIZER)
    return fates


@pytest.mark.parametrize("share", [CHOSEN, BESIDE_ANSWERS])
def test_how_often_words_are_chosen_and_what_becomes_of_them(share):
    """Of a caption, and of what is told and asked, before an answer and behind one."""
    words, half = list(range(300, 340)) * 7500, 150_000
    parts = [words] if share == CHOSEN else [words[:half], [], words[half:], []]
    read, labels = hide(parts, TOKENIZER, Random(0))
    fates = fates_of(words, read, labels)
    assert (CHOSEN, BESIDE_ANSWERS) == (0.15, 0.05) and within_five_sigma(fates.total(), len(words), share)
    assert within_five_sigma(fates_of(words[half:], read[half:], labels[half:]).total(), half, share)
    for fate, p in (("masked", 0.8), ("exchanged", 0.1), ("kept", 0.1)):  # an exchange may draw the same word: 1 in 492
        assert within_five_sigma(fates[fate], fates.total(), p), fates
    others = {now for word, now, label in zip(words, read, labels) if label != IGNORE and now not in (word, MASK)}
    assert len(others) > 0.85 * (len(TOKENIZER) - len(TOKENIZER.specials)), "other words are drawn from all"


def test_of_an_answer_a_share_is_hidden_from_none_of_it_to_all():
    """Each answer's own share, drawn anew; nothing of it is exchanged."""
    rng, answer, n, shares = Random(1), list(range(300, 350)), 3000, []
    for _ in range(n):
        read, labels = hide([[400], answer, [401], answer], TOKENIZER, rng)
        fates = [fates_of(answer, read[first:first + 50], labels[first:first + 50]) for first in (1, 52)]
        assert all(each.total() == each["masked"] for each in fates)
        shares.append([each.total() / 50 for each in fates])
    first, second = torch.tensor(shares).T
    assert ALL_HIDDEN == 1 / 3 and abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / n ** 0.5
    for share in (first, second):
        # a share below 1 hides all of 50 words now and then: (2/3) / 51
        assert within_five_sigma(int((share == 1).sum()), n, 1 / 3 + 2 / 3 / 51)
        assert within_five_sigma(int((share < 0.5).sum()), n, 2 / 3 * 25 / 51) and int((share == 0).sum()) > 10
    short = sum(hide([[400], [300]], TOKENIZER, rng)[1][1] == 300 for _ in range(n))
    assert within_five_sigma(short, n, 2 / 3), "a word that is an answer by itself"


def collate():
    return make_collate(RECIPE, STAGE, TOKENIZER, MaskedLanguageModel.reads)


def test_a_batch_is_a_text_with_frame_and_its_hidden_words():
    samples = [WORLD.draw(name, Random(name)) for name in STAGE.data]
    batch = collate()(samples, Random(0))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    hidden = 0
    for sample, ids, mask, labels in zip(samples, *batch.values(), strict=True):
        real, learned = ids[mask], labels[mask] != IGNORE
        assert real[0] == TOKENIZER.bos_id and real[-1] == TOKENIZER.eos_id and not learned[0] and not learned[-1]
        assert not ids[~mask].any() and (labels[~mask] == IGNORE).all()
        whole = torch.where(learned, labels[mask], real)[1:-1].tolist()
        assert whole == [*chain(*written(sample, TOKENIZER))]
        hidden += int(learned.sum())
    assert hidden > 20
    cut = replace(collate(), max_length=9)(samples, Random(0))
    assert cut["input_ids"].shape == (len(samples), 9) and (cut["input_ids"][:, -1] == TOKENIZER.eos_id).all()
    assert all(collate().problem(sample) is None for sample in samples)


def test_the_same_words_are_hidden_at_the_same_step():
    def batches(seed: int) -> MicroBatches:
        return MicroBatches(Mixture(WORLD, STAGE, seed), STAGE, seed, collate())

    one, again, other = batches(0)[9], batches(0)[9], batches(1)[9]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["labels"], other["labels"]) and not torch.equal(one["labels"], batches(0)[10]["labels"])
    samples = [WORLD.draw("caption texts", Random(i)) for i in range(8)]
    first, second = (collate()(samples, Random(seed))["labels"] for seed in (0, 1))
    assert not torch.equal(first, second), "whenever a text is met, other words are hidden"


def test_captions_alone_are_no_part_of_the_corpus():
    """Or a new tokenizer would make all shipped models useless."""
    assert SETS["caption texts"].texts and not SETS["caption texts"].corpus
    later = {"long names", "plain names", "page texts", "named pages", "web pages", "page pairs", "thing pairs", "clips"}  # Flamingo's
    assert {name for name in SETS if not SETS[name].corpus} == {"caption texts", *later}
    sample = WORLD.draw("caption texts", Random(3))
    assert sample.caption in sample.references and not sample.turns and not sample.images
    names = [name for name in SETS if SETS[name].texts and SETS[name].corpus]
    each = 4000 // len(names)
    texts = WORLD.texts()
    assert len(texts) == each * len(names) and all(texts)


# --- learning, and exams ---

def train(model: nn.Module, batches: list[dict], accumulate: int = 1, lr: float = 3e-3) -> list[float]:
    freeze(model, STAGE.trains)
    stage = Stage("heart", STAGE.trains, {}, steps=len(batches) // accumulate, batch_size=12, lr=lr, accumulate=accumulate)
    return [report.losses["mlm"] for report in train_stage(model, stage, batches, make_optimiser(model, stage), torch.device("cpu"))]


def test_micro_batches_make_the_step_of_one_batch():
    samples = [WORLD.draw("told/talk", Random(i)) for i in range(4)]
    whole = collate()(samples, Random(1))
    parts = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 1), slice(1, 4))]
    losses, weights = [], []
    for batches, accumulate in (([whole] * 2, 1), (parts * 2, 2)):
        model = bite(MaskedLanguageModel(BertConfig(len(TOKENIZER), 30, 2, 5, 44, dropout=0.0)), 2, 0.1)
        losses.append(train(model, batches, accumulate, lr=1e-3))
        weights.append(model.word_head.transform.weight.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    close(weights[0], weights[1], 1e-5)


def asked(kind: str, n: int) -> list[Sample]:
    [exam] = [exam for exam in WORLD.exams(("told",), n) if exam.name == kind]
    return list(exam.samples)


@pytest.fixture(scope="module")
def pupil() -> Pupil:
    """Has learned eight questions by heart: of each text other words are hidden each time, and at last the answers."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(BertConfig(RECIPE.vocab, 64, 2, 4, 96, max_positions=256, dropout=0.0))
    samples = [*asked("colour", 4), *asked("position", 4)]
    losses = train(model, [collate()(samples, Random(i)) for i in range(400)])
    assert sum(losses[-20:]) / 20 < 0.3 < losses[0]
    return Pupil(model, RECIPE, STAGE, TOKENIZER, "cpu")


def test_in_an_exam_the_last_answer_is_hidden_all_of_it_and_nothing_else():
    samples = [*asked("follow_up", 3), *asked("caption", 2), *asked("chat", 1)]
    batch = collate().ask(samples)
    assert batch.keys() == {"input_ids", "attention_mask", "masked"}
    for sample, ids, mask, masked in zip(samples, *batch.values(), strict=True):
        *before, answer = written(sample, TOKENIZER)
        assert ids[mask].tolist() == [TOKENIZER.bos_id, *chain(*before), *[MASK] * len(answer), TOKENIZER.eos_id]
        assert torch.equal(masked, ids == MASK)
        assert sample.turns[-1].answer in TOKENIZER.decode(answer)


def test_an_exam_is_passed_by_heart_and_not_with_exchanged_scenes(pupil):
    for kind in ("colour", "position"):
        samples = asked(kind, 4)
        assert pupil.answer(samples) == [sample.turns[-1].answer for sample in samples]
        figures = judges.measure(pupil, Exam(kind, samples))[f"vqa_accuracy/{kind}"]
        assert figures["value"] == 1.0 and figures["shuffled"] < 1.0 and figures["n"] == 4


def test_the_exams_of_its_stage_are_judged_and_shown(pupil):
    figures = judges.evaluate(pupil, type("Few", (), {"exams": lambda _, names: WORLD.exams(names, 1)})())
    assert len(figures) >= 30 and all(0 <= figure["value"] <= 10 for figure in figures.values())
    rows = pupil.examples(WORLD, 5)
    assert len(rows) == 5 and all(truth and isinstance(answer, str) for _, _, truth, answer in rows)


def test_the_recipe_is_as_wide_as_what_starts_from_it():
    bert, language = RECIPE.config, recipes.get("lm/tiny").config
    assert (bert.vocab, bert.max_positions, bert.segments, bert.image_width) == (RECIPE.vocab, STAGE.max_length, 0, 0)
    assert bert.vocab == language.vocab and set(STAGE.data) <= set(SETS) and set(STAGE.trains) == {"bert", "word_head"}
