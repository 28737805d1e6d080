"""BLIP fine-tuned: answers against transformers and against slow loops, the ranking of answers, statements about two pictures."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from oracles import hf_blip_answers, ours
from tools import bite, close, moved_by_breaking, pad_mask, randn, random_ids
from torch import nn
from torch.nn import functional as F

from nanovlm import recipes
from nanovlm.bert import BertConfig
from nanovlm.papers.blip import BLIP, BLIPConfig, look, opened
from nanovlm.papers.blip_downstream import BLIPAnswerer, BLIPReasoner
from nanovlm.recipes.stage import Stage
from nanovlm.training import weights
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.vit import ViTConfig

B, T, L, V = 4, 9, 5, 53
QUESTIONS, ANSWERS = [9, 5, 2, 7], [3, 5, 1, 2]  # lengths
CLS, STOP, DEC, ENC = 1, 2, 51, 52
VISION = ViTConfig(image_size=20, patch=5, width=24, layers=2, heads=3, ffn=40, activation="gelu", pre_norm=False, patch_bias=True, eps=1e-5)
TEXT = BertConfig(V, width=30, layers=3, heads=5, ffn=44, max_positions=23, image_width=24, dropout=0.0)
CONFIG = BLIPConfig(VISION, TEXT, embedding=9, decode_id=DEC, encode_id=ENC, momentum=None)


def asked(seed: int = 1) -> dict[str, torch.Tensor]:
    """Pictures and questions "[CLS] words [SEP]", padded on the right."""
    mask, ids = pad_mask(QUESTIONS, "right", T), random_ids(B, T, seed)
    ids[:, 0] = CLS
    ids.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, STOP)
    return {"images": randn(B, 3, 20, 20, seed=seed), "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}


def told(seed: int = 1) -> dict[str, torch.Tensor]:
    """The same with answers "words [SEP]", −100 behind them."""
    mask, labels = pad_mask(ANSWERS, "right", L), random_ids(B, L, seed + 100)
    labels.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, STOP)
    return asked(seed) | {"labels": labels.masked_fill(~mask, -100)}


def row(batch: dict, b: int) -> dict[str, torch.Tensor]:
    """One row without its padding."""
    n = QUESTIONS[b]
    return {name: tensor[b:b + 1, :n] if name in ("input_ids", "attention_mask") else tensor[b:b + 1] for name, tensor in batch.items()}


@pytest.fixture(scope="module")
def answerer() -> BLIPAnswerer:
    return bite(BLIPAnswerer(CONFIG), 3)


@pytest.fixture(scope="module")
def reasoner() -> BLIPReasoner:
    return bite(BLIPReasoner(CONFIG), 4)


# --- the answerer and that of transformers ---

def theirs_and_ours(seed: int, smoothing: float = 0.0) -> tuple[nn.Module, BLIPAnswerer]:
    hf = hf_blip_answers(seed, {"label_smoothing": smoothing})
    model = ours(hf)
    assert type(model) is BLIPAnswerer and model.config.smoothing == smoothing
    return hf, model


def with_enc(ids: torch.Tensor) -> torch.Tensor:
    """transformers takes ids as they are: [ENC] must stand there already."""
    return torch.cat([torch.full_like(ids[:, :1], ENC), ids[:, 1:]], dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_states_and_loss_of_a_padded_batch_are_those_of_transformers_for_each_alone(smoothing):
    """Alone, for their decoder looks at a question's padding: the mask is lost on its way into the cross-attention (5.23).

    They read "[DEC] answer" where their labels stand too, and shift them themselves.
    """
    hf, model = theirs_and_ours(1, smoothing)
    batch, total, words = told(), 0.0, model.text_decoder.embeddings.words.weight
    with torch.no_grad():
        states, _ = model(**batch)
        for b in range(B):
            one, answer = row(batch, b), F.pad(batch["labels"][b:b + 1, :ANSWERS[b]], (1, 0), value=DEC)
            question = hf.text_encoder(with_enc(one["input_ids"]), encoder_hidden_states=hf.vision_model(one["images"])[0])[0]
            close(model.read(batch["images"], batch["input_ids"], batch["attention_mask"])[b, :QUESTIONS[b]], question[0])
            want = hf.text_decoder(input_ids=answer, encoder_hidden_states=question, labels=answer)
            assert want.logits.std() > 0.1
            close(F.linear(states[b, :ANSWERS[b] + 1], words, model.word_head.bias), want.logits[0])
            total += want.loss * ANSWERS[b]
        got, count = model.losses(batch)["lm"]
    close(got / count, total / sum(ANSWERS))
    assert count == sum(ANSWERS), "every word of an answer and its end are learned, [DEC] is given"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_answers_of_a_padded_batch_are_those_of_transformers_for_each_alone(beams, seed):
    hf, model = theirs_and_ours(seed)
    batch = asked(seed)
    got = model.generate(batch, 7, [STOP], beams=beams).tolist()
    for b in range(B):
        want = hf.generate(with_enc(row(batch, b)["input_ids"]), batch["images"][b:b + 1], max_new_tokens=7, do_sample=False, num_beams=beams)[0, 1:].tolist()
        assert got[b][:len(want)] == want and not any(got[b][len(want):])
    assert len(set(map(tuple, got))) > 1


def test_the_weights_of_the_answerers_test_bite():
    _, model = theirs_and_ours(1)
    moved = moved_by_breaking(model, lambda model: F.linear(model(**told())[0], model.text_decoder.embeddings.words.weight, model.word_head.bias))
    assert min(moved.values()) > 1e-3, moved


# --- who sees what ---

def test_padding_of_a_question_is_never_looked_at(answerer):
    batch = told()
    noise = batch | {"input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 17)}
    with torch.no_grad():
        assert torch.equal(answerer(**batch)[0], answerer(**noise)[0])
        assert torch.equal(answerer.prefill(batch)[0], answerer.prefill(noise)[0])
        heard = batch | {"attention_mask": torch.ones(B, T, dtype=torch.bool)}
        moved = (answerer(**heard)[0] - answerer(**batch)[0]).abs().amax(dim=(1, 2))
    assert moved[0] == 0 and moved[1:].min() > 1e-3, "the first question has no padding"
    for beams in (1, 3):
        assert torch.equal(answerer.generate(batch, 6, [STOP], beams=beams), answerer.generate(noise, 6, [STOP], beams=beams))


def test_a_word_of_the_answer_is_seen_by_those_behind_it_alone(answerer):
    batch = told()
    batch["labels"] = random_ids(B, L, 5)
    with torch.no_grad():
        before, answer = answerer(**batch)
        assert answer[:, 0].tolist() == [DEC] * B and torch.equal(answer[:, 1:], batch["labels"])
        for place in range(L):
            changed = batch["labels"].clone()
            changed[:, place] = 19 + (changed[:, place] == 19).long()
            after, _ = answerer(**batch | {"labels": changed})
            assert torch.equal(after[:, :place + 1], before[:, :place + 1]), "place 0 is [DEC]"
            assert (after[:, place + 1:] - before[:, place + 1:]).abs().amax(dim=2).min() > 1e-3


def test_question_and_picture_are_heard(answerer):
    batch = told()
    with torch.no_grad():
        before = answerer(**batch)[0]
        for name in ("images", "input_ids"):
            moved = (answerer(**batch | {name: told(7)[name]})[0] - before).abs().amax(dim=(1, 2))
            assert [bool(m > 1e-2) for m in moved] == [name == "images" or n > 2 for n in QUESTIONS], "one question has no words"
        first = batch | {"input_ids": torch.cat([torch.full((B, 1), 33), batch["input_ids"][:, 1:]], dim=1)}
        assert torch.equal(answerer(**first)[0], before), "whatever stands first is made [ENC]"


def test_a_batch_answers_as_each_row_alone(answerer):
    batch = told()
    with torch.no_grad():
        together = answerer(**batch)[0]
        losses = [answerer.losses(row(batch, b))["lm"] for b in range(B)]
        for b in range(B):
            close(together[b:b + 1, :ANSWERS[b]], answerer(**row(batch, b))[0][:, :ANSWERS[b]])
        total, count = answerer.losses(batch)["lm"]
    close(total, sum(one for one, _ in losses), 1e-4)
    assert count == sum(n for _, n in losses)


def test_what_is_written_step_by_step_is_what_is_read_at_once(answerer):
    batch = told()
    batch["labels"] = random_ids(B, L, 5)
    with torch.no_grad():
        want = F.linear(answerer(**batch)[0], answerer.text_decoder.embeddings.words.weight, answerer.word_head.bias)
        logits, cache = answerer.prefill(batch)
        close(logits, want[:, 0])
        rest, cache = answerer.step(batch["labels"][:, :2], cache)
        close(rest, want[:, 1:3])
        close(answerer.step(batch["labels"][:, 2:3], cache.reorder(torch.arange(B)))[0], want[:, 3:4])


def test_encoder_and_decoder_share_nothing():
    model = BLIPAnswerer(CONFIG)
    assert len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    together = BLIP(replace(CONFIG, tasks=("itc", "itm", "lm")))
    assert len(list(together.parameters())) < len(list(together.named_parameters(remove_duplicate=False)))


# --- ranking ---

CANDIDATES = [[7, STOP], [7, 8, STOP], [9, STOP], [STOP], [10, 11, 12, STOP], [13, 4, STOP], [9, 9, STOP]]


def likelihoods(model: BLIPAnswerer, batch: dict) -> torch.Tensor:
    """log p of each candidate, each read from the beginning, and of their first tokens: two (B, 7)."""
    columns, firsts = [], []
    for candidate in CANDIDATES:
        labels = torch.tensor([candidate]).expand(B, -1)
        states, _ = model(batch["images"], batch["input_ids"], batch["attention_mask"], labels)
        log_p = F.linear(states, model.text_decoder.embeddings.words.weight, model.word_head.bias).log_softmax(dim=-1)
        columns.append(sum(log_p[:, place, word] for place, word in enumerate(candidate)))
        firsts.append(log_p[:, 0, candidate[0]])
    return torch.stack(columns, dim=1), torch.stack(firsts, dim=1)


@pytest.mark.parametrize("seed", range(4))
def test_a_shortlist_of_all_ranks_as_all(answerer, seed):
    batch = asked(seed)
    with torch.no_grad():
        want, _ = likelihoods(answerer, batch)
    for shortlist in (0, 7, 128):
        assert answerer.rank(batch, CANDIDATES, shortlist).tolist() == want.argmax(dim=1).tolist()


@pytest.mark.parametrize("shortlist", [1, 2, 4])
def test_only_those_that_begin_most_likely_are_ranked(answerer, shortlist):
    differs = 0
    for seed in range(6):
        batch = asked(seed)
        with torch.no_grad():
            full, first = likelihoods(answerer, batch)
        got = answerer.rank(batch, CANDIDATES, shortlist).tolist()
        for b in range(B):
            bound = first[b].sort(descending=True).values[shortlist - 1]
            listed = [c for c in range(7) if first[b, c] > bound + 1e-5]  # surely
            maybe = [c for c in range(7) if first[b, c] > bound - 1e-5]  # candidates with equal first tokens: either may be on it
            assert got[b] in maybe
            assert full[b, got[b]] >= max((full[b, c] for c in listed), default=float("-inf")) - 1e-5
            differs += got[b] != int(full[b].argmax())
    assert differs > 0 or shortlist == 4, "a shortlist can miss the best"


# --- the reasoner ---

def stated(seed: int = 1) -> dict[str, torch.Tensor]:
    return asked(seed) | {"images": randn(B, 2, 3, 20, 20, seed=seed), "truth": torch.tensor([0, 1, 1, 0])}


def judged(model: BLIPReasoner, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.judge(batch["images"], batch["input_ids"], batch["attention_mask"])


def test_layers_see_both_pictures_and_merge_them(reasoner):
    """Each layer and each row by itself; the first of three layers averages, as the first six of twelve do."""
    batch, bert = stated(), reasoner.text_encoder
    assert len(reasoner.second) == 3 and len(reasoner.merge) == 2
    with torch.no_grad():
        for b in range(B):
            one = row(batch, b)
            x = bert.norm(bert.embeddings(opened(one["input_ids"], one["attention_mask"], ENC)))
            left, right = (look(reasoner.vision, one["images"][:, side]) for side in (0, 1))
            for i, layer in enumerate(bert.layers):
                x = layer.residual1.norm(x + layer.attention(x))
                seen = [layer.cross_attention(x, left), reasoner.second[i](x, right)]
                if i == 0:
                    both = 0.5 * seen[0] + 0.5 * seen[1]
                else:  # W [left ; right] = W₁ left + W₂ right
                    merge, D = reasoner.merge[i - 1], TEXT.width
                    both = seen[0] @ merge.weight[:, :D].T + seen[1] @ merge.weight[:, D:].T + merge.bias
                x = layer.cross_residual.norm(x + both)
                x = layer.residual2.norm(x + layer.feedforward(x))
            hidden = reasoner.truth_head[0](x[:, 0]).clamp(min=0)
            close(reasoner.truth_head[2](hidden)[0], judged(reasoner, batch)[b])


def test_which_picture_stands_where_matters(reasoner):
    batch = stated()
    before = judged(reasoner, batch)
    assert (judged(reasoner, batch | {"images": batch["images"].flip(1)}) - before).abs().amax(dim=1).min() > 1e-3
    for side in (0, 1):
        images = batch["images"].clone()
        images[:, side] = images[:, side].roll(1, dims=0)
        assert (judged(reasoner, batch | {"images": images}) - before).abs().amax(dim=1).min() > 1e-3, side


def test_a_statements_padding_is_not_read_and_each_row_is_judged_by_itself(reasoner):
    batch = stated()
    noise = batch | {"input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 17)}
    assert torch.equal(judged(reasoner, noise), judged(reasoner, batch))
    for b in range(B):
        close(judged(reasoner, row(batch, b)), judged(reasoner, batch)[b:b + 1])


def test_the_answer_is_the_batchs_own_word(reasoner):
    choices = torch.tensor([[7, 8, 9], [10, 11, 0]])
    batch = stated() | {"choices": choices}
    reasoner = deepcopy(reasoner)
    with torch.no_grad():
        reasoner.truth_head[2].bias -= judged(reasoner, batch).mean(dim=0)  # so that it does not say the same of all
    logits = judged(reasoner, batch)
    want = [choices[int(logit[1] > logit[0])].tolist() for logit in logits]
    assert reasoner.generate(batch, 5, [STOP]).tolist() == want and len(set(map(tuple, want))) == 2
    assert reasoner.generate(batch, 2, [STOP]).tolist() == [ids[:2] for ids in want]
    total, count = reasoner.losses(batch)["truth"]
    close(total, sum(-logit.log_softmax(dim=0)[true] for logit, true in zip(logits, batch["truth"])))
    assert count == B


def test_the_second_look_begins_as_a_copy_of_the_first():
    model = BLIPReasoner(CONFIG)
    for layer, second in zip(model.text_encoder.layers, model.second, strict=True):
        own, copy = layer.cross_attention.state_dict(), second.state_dict()
        assert own.keys() == copy.keys() and all(torch.equal(own[name], copy[name]) for name in own)
        assert not {id(p) for p in layer.cross_attention.parameters()} & {id(p) for p in second.parameters()}


# --- learning, and the recipes ---

@pytest.mark.parametrize("kind", [BLIPAnswerer, BLIPReasoner])
def test_thirty_steps_learn_four_samples(kind):
    torch.manual_seed(0)
    model = kind(CONFIG)
    batch = told() if kind is BLIPAnswerer else stated()
    trains = tuple(name for name, _ in model.named_children())
    stage = Stage("learn", trains, {}, steps=30, batch_size=B, lr=3e-3)
    freeze(model, trains)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reports = list(train_stage(model, stage, [batch] * 30, make_optimiser(model, stage), torch.device("cpu")))
    first, last = (sum(report.losses.values()) for report in (reports[0], reports[-1]))
    assert last < first / 2 if kind is BLIPReasoner else last < first - 1
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if not name.endswith("key.bias")], "all of it is heard"


START = {"vqa": ("vision", "text_encoder", "text_decoder", "word_head"), "nlvr2": ("vision", "text_encoder"),
         "caption": ("vision", "text_decoder", "word_head"),
         "retrieval": ("vision", "text_encoder", "image_projection", "text_projection", "match_head", "temperature", "momentum")}


@pytest.mark.parametrize("task", START)
def test_a_task_begins_with_what_was_pretrained(task):
    recipe = recipes.get(f"blip/tiny-{task}")
    [stage] = recipe.stages
    pretrained = bite(recipes.build("blip/tiny", "cpu", "pretrain"), 5).state_dict()
    begun = weights.initial_model(recipe, stage, 0, {"pretrain": pretrained}).state_dict()
    for name, tensor in begun.items():
        if name.startswith(START[task]):
            assert torch.equal(tensor, pretrained[name]), name
        elif name.startswith("second."):
            assert torch.equal(tensor, pretrained[f"text_encoder.layers.{name[7]}.cross_attention.{name[9:]}"]), name
        else:
            assert task == "nlvr2" and name.startswith(("merge.", "truth_head.")), name
    assert (sum(name.startswith("second.") for name in begun) == 4 * 8) == (task == "nlvr2")
    trained = {name for name in begun if name.split(".")[0] in stage.trains}
    assert {name for name in begun if name not in trained} == {name for name in begun if name.startswith("momentum.")}
    assert stage.steps <= 1000


def test_the_published_stages_are_those_of_the_appendix():
    """name: pixels, epochs of how many samples, rate; a batch of 256."""
    want = {"vit-b-retrieval": (384, 6, 566_747, 1e-5), "vit-l-retrieval": (384, 6, 566_747, 5e-6), "vit-b-caption": (384, 5, 566_747, 1e-5),
            "vit-l-caption": (384, 5, 566_747, 2e-6), "vit-b-vqa": (480, 10, 658_111, 2e-5), "vit-b-nlvr2": (384, 15, 86_373, 3e-5),
            "vit-l-nlvr2": (384, 15, 86_373, 3e-5)}
    for name, (pixels, epochs, samples, lr) in want.items():
        recipe = recipes.get(f"blip/{name}")
        [stage] = recipe.stages
        assert (recipe.image_size, stage.lr, stage.batch_size, stage.weight_decay) == (pixels, lr, 256, 0.05)
        assert stage.steps == round(epochs * samples / 256)
        assert stage.format == {"vqa": "blip-vqa", "caption": "blip-caption"}.get(stage.name, stage.format)
        assert all(origin.startswith(f"{name}@retrain".replace(name, f"blip/{name.rpartition('-')[0]}")) for _, origin in stage.init)
    assert {name for name in recipes.names() if re.fullmatch(r"blip/vit-.-\w+", name)} == {f"blip/{name}" for name in want}
