"""BLIP: what encoder and decoder share, who sees what, its three losses against slow loops, bad input, captions."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_blip_parity import DEC, ENC, LENGTHS, B, V, captions, with_first
from tools import bite, close, pad_mask, randn, random_ids
from torch.nn import functional as F

from nanovlm.bert import BertConfig
from nanovlm.errors import UserError
from nanovlm.momentum import MomentumConfig
from nanovlm.papers import blip
from nanovlm.papers.blip import BLIP, BLIPConfig, opened
from nanovlm.recipes.stage import Stage
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.vit import imagenet_vit

# transformers has no class with encoder and decoder, and none with momentum copies

ALL = ("vision", "text_encoder", "image_projection", "text_projection", "match_head", "temperature", "text_decoder", "word_head")
QUEUE, M = 13, 0.9
WHOLE = BLIPConfig(imagenet_vit(12, 4, 26, 2, 2), BertConfig(V, 30, 3, 5, 44, max_positions=23, dropout=0.0, image_width=26), 11, DEC, ENC,
                   momentum=MomentumConfig(QUEUE, M, ramp=5))


def whole(seed: int | None = None, **changes) -> BLIP:
    torch.manual_seed(0 if seed is None else seed)
    model = BLIP(replace(WHOLE, **changes))
    return model if seed is None else bite(model, seed)


def pairs(seed: int = 0) -> dict:
    _, ids, mask = captions(seed)
    return {"images": randn(B, 3, 12, 12, seed=seed), "input_ids": ids, "attention_mask": mask,
            "text_group": torch.tensor([0, 1, 2, 1]), "image_group": torch.arange(B)}


def state(model: BLIP) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def step(model: BLIP, batch: dict, lr: float = 0.01) -> None:
    """One through the package's loop."""
    freeze(model, ALL)
    stage = Stage("whole", ALL, {"pairs": 1}, steps=1, batch_size=B, lr=lr)
    list(train_stage(model, stage, [batch], make_optimiser(model, stage), torch.device("cpu")))


# --- what encoder and decoder have in common ---

STRATEGIES = {"all": {"self", "cross", "ffn", "embeddings"}, "all but self-attention": {"cross", "ffn", "embeddings"},
              "all but cross-attention": {"self", "ffn", "embeddings"}, "none": set()}  # §3.2, Table 3
every_strategy = pytest.mark.parametrize("shared", STRATEGIES)


def part_of(name: str) -> str:
    """Self-attention's own output and norm belong to it (the trap of the released code's names)."""
    return {"attention": "self", "residual1": "self", "cross_attention": "cross", "cross_residual": "cross", "feedforward": "ffn",
            "residual2": "ffn"}.get(name.split(".")[2], "") if name.startswith("layers.") else "embeddings"


def tied(model: BLIP) -> set[str]:
    """Which parts are the same parameters in both; one that is so in a layer only here and there is an error."""
    mine, theirs = (dict(side.named_parameters()) for side in (model.text_encoder, model.text_decoder))
    assert mine.keys() == theirs.keys() and len(mine) == 4 + 3 * (2 * 10 + 6)
    found = {part: {mine[name] is theirs[name] for name in mine if part_of(name) == part} for part in ("self", "cross", "ffn", "embeddings")}
    assert all(len(answers) == 1 for answers in found.values())
    return {part for part, answers in found.items() if answers == {True}}


@every_strategy
def test_what_is_shared_is_one_parameter_and_stays_one(shared):
    model = whole(1, shared=shared)
    assert tied(model) == STRATEGIES[shared]
    assert tied(copy.deepcopy(model)) == STRATEGIES[shared]
    other = whole(2, shared=shared)
    other.load_state_dict(state(model))
    assert tied(other) == STRATEGIES[shared]
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state(model).items())
    step(model, pairs())
    assert tied(model) == STRATEGIES[shared]


@every_strategy
def test_the_optimiser_sees_each_parameter_once(shared):
    model = whole(1, shared=shared)
    freeze(model, ALL)
    optimiser = make_optimiser(model, Stage("whole", ALL, {"pairs": 1}, steps=1, batch_size=B, lr=0.1))
    learns = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert len(learns) == len(set(learns)) == len({id(parameter) for parameter in model.parameters()})
    assert all(parameter.requires_grad for parameter in model.parameters())
    twice = sum(part_of(name) in STRATEGIES[shared] for name, _ in model.text_encoder.named_parameters())
    assert len(learns) == len(list(model.named_parameters(remove_duplicate=False))) - twice


def test_a_shared_part_learns_from_both_sides():
    """Trained as the decoder's alone it learns too: the name under which a stage asks for it does not matter."""
    model = whole(1)
    freeze(model, ("text_decoder",))
    assert model.text_encoder.layers[0].feedforward.up.weight.requires_grad
    assert not model.text_encoder.layers[0].attention.query.weight.requires_grad
    freeze(model, ALL)
    for names in (("itm", "itc"), ("lm",)):
        model.zero_grad()
        losses = model.losses(pairs())
        sum(losses[name][0] for name in names).backward()
        assert model.text_encoder.layers[0].feedforward.up.weight.grad.any()
        assert bool(names == ("lm",)) == (model.text_encoder.layers[0].attention.query.weight.grad is None)


def test_self_attention_goes_its_own_ways_after_one_step():
    model = whole(3)
    for mine, theirs in zip(model.text_encoder.layers, model.text_decoder.layers, strict=True):  # as both begin with BERT's
        theirs.attention.load_state_dict(mine.attention.state_dict())
        theirs.residual1.load_state_dict(mine.residual1.state_dict())
    step(model, pairs(3))
    for mine, theirs in zip(model.text_encoder.layers, model.text_decoder.layers, strict=True):
        for name in ("attention.query.weight", "attention.out.weight", "residual1.norm.weight"):
            assert not torch.equal(mine.get_parameter(name), theirs.get_parameter(name)), name


# --- the three modes ---

def test_the_text_encoder_sees_no_picture_and_the_others_do():
    """Whatever the cross-attention holds, the text's vector is the same to the bit."""
    model, batch = whole(4), pairs(4)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        tokens = model.encode_image(batch["images"])
        before = model.encode_text(ids, mask), model.match(tokens, ids, mask), model.write(tokens, ids, mask)
        exchanged = model.match(tokens.roll(1, 0), ids, mask), model.write(tokens.roll(1, 0), ids, mask)
        for layer in model.text_encoder.layers:
            layer.cross_attention.value.weight.mul_(2.0)
        after = model.encode_text(ids, mask), model.match(tokens, ids, mask), model.write(tokens, ids, mask)
    assert torch.equal(before[0], after[0])
    for other in (exchanged, after[1:]):
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(before[1:], other, strict=True))


def test_the_decoder_looks_back_only_and_the_encoder_both_ways():
    model, batch = whole(5), pairs(5)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        tokens = model.encode_image(batch["images"])
        states, match, text = model.write(tokens, ids, mask), model.match(tokens, ids, mask), model.encode_text(ids, mask)
        for place in (1, 3):
            other = ids.clone()
            other[:, place] = 4 + (other[:, place] - 3) % 40
            moved = (model.write(tokens, other, mask) - states).abs().amax(dim=-1)
            assert not moved[:, :place].any(), "to the bit"
            assert (moved[:, place:][mask[:, place:] & mask[:, place:place + 1]] > 1e-4).all()
            seen = mask[:, place]
            for a, b in ((model.match(tokens, other, mask), match), (model.encode_text(other, mask), text)):
                moved = (a - b).abs().amax(dim=-1)
                assert (moved[seen] > 1e-4).all() and not moved[~seen].any()


def test_the_tasks_token_takes_the_place_of_the_first_in_a_copy():
    ids, mask = torch.tensor([[1, 5, 6, 0], [0, 0, 1, 7]]), torch.tensor([[True, True, True, False], [False, False, True, True]])
    kept = ids.clone()
    assert opened(ids, mask, ENC).tolist() == [[ENC, 5, 6, 0], [0, 0, ENC, 7]] and torch.equal(ids, kept)
    model, batch = whole(6), pairs(6)
    given = {name: tensor.clone() for name, tensor in batch.items()}
    model.losses(batch)
    assert all(torch.equal(tensor, given[name]) for name, tensor in batch.items())
    with torch.no_grad():  # [CLS] for ITC, and for the other two it does not matter what stands there
        tokens, other = model.encode_image(batch["images"]), with_first(batch["input_ids"], 7)
        for mode in (model.match, model.write):
            assert torch.equal(mode(tokens, batch["input_ids"], batch["attention_mask"]), mode(tokens, other, batch["attention_mask"]))
        assert not torch.equal(model.encode_text(batch["input_ids"], batch["attention_mask"]), model.encode_text(other, batch["attention_mask"]))


# --- the losses ---

def test_itc_of_the_second_step_is_a_loop():
    """Keys of copies that lag behind, the first step's keys in the queue, soft targets, and equal texts share the target."""
    model, first, second = whole(7), pairs(7), pairs(8)
    random = model.momentum.images.clone(), model.momentum.texts.clone()

    def vectors(m: BLIP, batch: dict) -> tuple[list, list]:
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)  # each text alone, without padding
        texts = [F.normalize(m.text_projection(m.text_encoder(ids[real][None])[0, 0]), dim=-1) for ids, real in rows]
        tokens = m.vision.norm(m.vision(batch["images"]))
        return [F.normalize(m.image_projection(row[0]), dim=-1) for row in tokens], texts

    with torch.no_grad():
        old_keys = vectors(model, first)
    model.losses(first)
    slow = copy.deepcopy(model)
    bite(model, 9)
    total, count = model.losses(second)["itc"]
    with torch.no_grad():
        for theirs, mine in zip(slow.parameters(), model.parameters(), strict=True):
            theirs.copy_(M * theirs + (1 - M) * mine)
        keys = vectors(slow, second)
        queries = vectors(model, second)
        banks = [[*keys[side], *old_keys[side], *random[side][B:]] for side in (0, 1)]
        groups = [0, 1, 2, 1, 0, 1, 2, 1] + [-1] * (QUEUE - B)
        alpha, tau, want = 0.4 * 2 / 5, model.temperature, 0.0
        for b in range(B):
            right = [groups[b] == g or (j % B == b and j < 2 * B) for j, g in enumerate(groups)]
            for side in (0, 1):
                log_p = torch.stack([queries[side][b] @ key / tau for key in banks[1 - side]]).log_softmax(dim=0)
                soft = torch.stack([keys[side][b] @ key / tau for key in banks[1 - side]]).softmax(dim=0)
                want = want - sum((alpha * soft[j] + (1 - alpha) * right[j] / sum(right)) * log_p[j] for j in range(B + QUEUE)) / 2
    close(total, want, 1e-4)
    assert count == B
    for bank, mine in zip((model.momentum.images, model.momentum.texts), banks, strict=True):
        close(bank[:2 * B], torch.stack([*mine[B:2 * B], *mine[:B]]))  # after the loss, behind the first step's
    assert model.momentum.place == 2 * B and model.momentum.texts_group.tolist() == groups[:QUEUE]


def test_itm_pairs(monkeypatch):
    """3 B pairs in a known order: mine, wrong pictures, wrong texts; drawn by what the queries find alike among the keys."""
    model, batch = whole(10), pairs(10)
    seen, drawn_by = {}, []
    inner, draw = model.match, blip.hard_negatives

    def match(images, ids, mask):
        seen.update(images=images, ids=ids, mask=mask)
        return inner(images, ids, mask)

    monkeypatch.setattr(model, "match", match)
    monkeypatch.setattr(blip, "hard_negatives", lambda *table: drawn_by.append(table[0]) or draw(*table))
    tokens = model.encode_image(batch["images"])
    torch.manual_seed(0)
    total, count = model.losses(batch)["itm"]
    belongs = torch.tensor([1] * B + [0] * 2 * B)
    close(total, F.cross_entropy(inner(seen["images"], seen["ids"], seen["mask"]), belongs, reduction="sum"))
    assert count == 3 * B
    images, texts = ([next(i for i in range(B) if torch.equal(row, other[i])) for row in rows]
                     for rows, other in ((seen["images"], tokens), (seen["ids"], batch["input_ids"])))
    own = list(range(B))
    assert images[:B] == texts[:B] == texts[B:2 * B] == images[2 * B:] == own
    assert torch.equal(seen["mask"], batch["attention_mask"][texts])
    cosine = model.score(batch["images"], batch["input_ids"], batch["attention_mask"]) / model.temperature
    close(drawn_by[0], cosine.T, 1e-4)  # a wrong image for each text
    close(drawn_by[1], cosine, 1e-4)  # a wrong text for each image
    groups = batch["text_group"].tolist()
    for other in (images[B:2 * B], texts[2 * B:]):
        assert all(groups[i] != groups[j] for i, j in enumerate(other)), "an equal text is no negative"


def test_untrained_it_knows_nothing():
    """LM ln V; ITM between the prior's 0.6365 and a little more than a coin's ln 2, for its head is not zero."""
    losses = {name: (total / count).item() for name, (total, count) in whole().losses(pairs()).items()}
    assert list(losses) == ["itc", "itm", "lm"]
    assert losses["lm"] == pytest.approx(math.log(V), abs=0.15)
    assert 0.45 < losses["itm"] < 1.0


@pytest.mark.parametrize(("tasks", "names"), [(("lm",), ["lm"]), (("itc", "itm"), ["itc", "itm"]), (("itc", "itm", "lm"), ["itc", "itm", "lm"])])
def test_a_model_has_the_parts_of_its_tasks(tasks, names):
    model = whole(11, tasks=tasks)
    assert list(model.losses(pairs())) == names
    assert (model.reads.kind, model.whole_batch, model.reads.matches) == (("pairs", True, True) if "itc" in tasks else ("conversations", False, False))
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {part for part in ALL if "lm" in tasks or part not in ("text_decoder", "word_head")} - (
        set(ALL) - {"vision", "text_decoder", "word_head"} if tasks == ("lm",) else set())


def test_each_loss_reaches_what_it_should():
    model, reached = whole(12).train(), {}
    for name in ("itc", "itm", "lm"):
        model.zero_grad()
        torch.manual_seed(0)
        model.losses(pairs(12))[name][0].backward()
        parameters = model.named_parameters(remove_duplicate=False)
        reached[name] = {n.split(".")[0] + (".self" if ".attention." in n else "") for n, p in parameters if p.grad is not None and p.grad.any()
                         if not n.startswith("vision.blocks")}
    both = {"vision", "text_encoder", "text_decoder"}  # by what they share
    assert reached == {"itc": both | {"text_encoder.self", "image_projection", "text_projection", "temperature"},
                       "itm": both | {"text_encoder.self", "match_head"}, "lm": both | {"text_decoder.self", "word_head"}}


def test_who_only_asks_for_the_loss_changes_nothing():
    model, batch = whole(13), pairs(13)
    model.losses(batch)  # a queue and copies that are no longer new
    bite(model, 14)
    before = state(model)
    with torch.no_grad():
        asked = model.losses(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(asked) == {"itc", "itm", "lm"}
    model.losses(batch)
    changed = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"momentum"}


@pytest.mark.parametrize(("before", "after"), [(0.7, 0.5), (1e-5, 1e-3), (0.2, 0.2)])
def test_the_temperature_stays_within_bounds(before, after):
    model = whole(15)
    model.temperature.data.fill_(before)
    model.losses(pairs(15))
    assert model.temperature.item() == pytest.approx(after)


# --- bad input ---

@pytest.mark.parametrize(("rows", "changes", "message"), [
    ([0], {}, "no wrong partner in it"), ([0, 0, 0], {}, "no wrong partner in it"), ([1, 3], {}, "no wrong partner in it"),
    ([0, 1, 2], {"momentum": MomentumConfig(queue=2)}, "The queue holds 2 keys, but the batch has 3 pairs: make `queue`")])
def test_a_batch_that_cannot_be_learned_from_is_refused_before_anything_changes(rows, changes, message):
    """A batch of one; of one pair three times; of two that share their text; one that the queue has no room for."""
    model = whole(16, **changes)
    model.temperature.data.fill_(0.7)  # which a step would clamp
    before, batch = state(model), {name: tensor[rows] for name, tensor in pairs(16).items()}
    with pytest.raises(UserError, match=message):
        model.losses(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- to use ---

@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_padded_on_the_left_is_continued_as_alone(beams):
    model, images, ids = whole(17), randn(B, 3, 12, 12, seed=17), random_ids(B, 5, 17)
    mask = pad_mask([5, 2, 1, 4], "left", 5)
    together = model.generate({"images": images, "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}, 6, [], beams=beams)
    for b in range(B):
        own = ids[b][mask[b]][None]
        alone = model.generate({"images": images[b:b + 1], "input_ids": own, "attention_mask": own > 0}, 6, [], beams=beams)
        assert together[b].tolist() == alone[0].tolist()
        if beams == 1:
            with torch.no_grad():
                read = own
                for _ in range(6):  # without a cache
                    states = model.write(model.encode_image(images[b:b + 1]), read, read > 0)
                    word = model.word_head.logits(states[:, -1], model.text_decoder.embeddings.words).argmax(dim=-1, keepdim=True)
                    read = torch.cat([read, word], dim=1)
            assert read[0, own.shape[1]:].tolist() == alone[0].tolist()
    assert len(set(map(tuple, together.tolist()))) > 1


def test_padding_on_the_right_changes_nothing():
    model, batch = whole(18), pairs(18)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        tokens = model.encode_image(batch["images"])
        for mode in (lambda t, i, m: model.encode_text(i, m), model.match, lambda t, i, m: model.write(t, i, m)[:, :2]):
            together = mode(tokens, ids.masked_fill(~mask, 17), mask)
            for b in range(B):
                own = ids[b][mask[b]][None]
                close(together[b:b + 1], mode(tokens[b:b + 1], own, own > -1))
    assert mask.sum(dim=1).tolist() == LENGTHS


def test_learns_ten_pairs_by_heart():
    """Each pair is found, matched and told. ITC's floor is ln 5: every pair stands in the queue four times too, and all five are right."""
    torch.manual_seed(0)
    text = BertConfig(V, 48, 2, 4, 96, max_positions=23, dropout=0.0, image_width=32)
    model = BLIP(replace(WHOLE, vision=imagenet_vit(12, 4, 32, 2, 2), text=text, smoothing=0.0, momentum=MomentumConfig(40, M, ramp=400)))
    lengths, ids, own = torch.tensor([4, 5, 6, 7, 4, 5, 6, 7, 5, 6]), random_ids(10, 7, 1), torch.arange(10)
    mask = torch.arange(7) < lengths[:, None]
    ids[:, 0] = 1
    ids = ids.scatter(1, lengths[:, None] - 1, 2).masked_fill(~mask, 0)
    batch = {"images": randn(10, 3, 12, 12, seed=1), "input_ids": ids, "attention_mask": mask, "text_group": own, "image_group": own}
    freeze(model, ALL)
    stage = Stage("heart", ALL, {"pairs": 1}, steps=110, batch_size=10, lr=3e-3)
    *_, last = train_stage(model, stage, [batch] * 110, make_optimiser(model, stage), torch.device("cpu"))
    assert last.losses["itc"] == pytest.approx(math.log(5), abs=0.02) and last.losses["itm"] < 0.02 and last.losses["lm"] < 0.1
    model.eval()
    scores = model.score(batch["images"], ids, mask)
    assert scores.argmax(dim=0).equal(own) and scores.argmax(dim=1).equal(own)
    with torch.no_grad():
        tokens, wrong = model.encode_image(batch["images"]), scores.fill_diagonal_(-1.0).argmax(dim=1)
        assert (model.match(tokens, ids, mask).argmax(dim=1) == 1).all()
        assert (model.match(tokens, ids[wrong], mask[wrong]).argmax(dim=1) == 0).all(), "what looks most alike"
    start = torch.ones(10, 1, dtype=torch.long)
    said = model.generate({"images": batch["images"], "input_ids": start, "attention_mask": start > 0}, 8, [2])
    assert said.tolist() == ids[:, 1:].tolist()
