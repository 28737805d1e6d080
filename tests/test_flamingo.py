"""Flamingo's own promises (fact sheet §9.2): it starts as the bare language model, a word sees its image and no other, clips of any
length, tags without images, a cache that knows where it is, and a loss that is a weighted sum over data sets.
"""

from dataclasses import replace
from random import Random

import pytest
import torch
from tools import bite, close, pad_mask, randn, random_ids
from torch import Tensor

from nanovlm import decoder, generation, masks
from nanovlm.data.collate import window
from nanovlm.decoder import llama
from nanovlm.errors import UserError
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.perceiver_resampler import PerceiverResampler, ResamplerConfig, stretched
from nanovlm.recipes import flamingo as recipes
from nanovlm.recipes.stage import Stage
from nanovlm.training.loop import Losses, _backward, freeze
from nanovlm.training.optim import make_optimiser

V, IMAGE, CLOSE, D_V = 29, 3, 4, 16
VISION = NFNetConfig(12, (1, 1), widths=(8, D_V), strides=(1, 2), stem=((8, 2),), group_width=4, final=0)
CONFIG = FlamingoConfig(VISION, ResamplerConfig(D_V, 2, 2, latents=3, frames=4), llama(V, 24, 3, 4, 32), IMAGE, CLOSE)


def build(seed: int = 0, **changes) -> Flamingo:
    return bite(Flamingo(replace(CONFIG, **changes)), seed)


def page(*rows: str, frames: int = 1, M: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch: "i" is a tag, "e" an <EOC>, "w" a word, "." padding; every image that a row has is there."""
    words = random_ids(len(rows), len(rows[0]), seed, low=5, high=V)
    kinds = {"i": IMAGE, "e": CLOSE, ".": 0}
    ids = torch.tensor([[kinds.get(kind, int(word)) for kind, word in zip(row, line)] for row, line in zip(rows, words)])
    counts = torch.tensor([[frames * (m < row.count("i")) for m in range(M)] for row in rows])
    return {"images": randn(len(rows), M, frames, 3, 12, 12, seed=seed), "frames": counts, "input_ids": ids,
            "attention_mask": torch.tensor([[kind != "." for kind in row] for row in rows])}


def said(model: Flamingo, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


# ---- the start

def test_with_closed_gates_it_is_the_language_model_bit_for_bit():
    model = build()
    for block in model.gated_xattn.values():
        torch.nn.init.zeros_(block.attention_gate)
        torch.nn.init.zeros_(block.dense_gate)
    batch = page("wiwewiw", "wwwwwww", "iiiwwww")
    with torch.no_grad():
        bare = model.language(inputs_embeds=model.embed(batch["input_ids"]), attention_mask=batch["attention_mask"])
        assert torch.equal(said(model, batch), model.language.logits(bare))
        assert not torch.equal(said(build(), batch), model.language.logits(bare))


def test_it_is_made_with_closed_gates_and_silent_tags():
    torch.manual_seed(0)
    model, batch = Flamingo(CONFIG), page("wiwewiw")
    with torch.no_grad():
        assert torch.equal(said(model, batch), model.language.logits(model.language(batch["input_ids"])))


def test_at_first_only_the_gates_feel_the_loss():
    model = Flamingo(CONFIG)
    trained = freeze(model, recipes.NEW)
    total, count = model.losses({**page("wiwewiw"), "labels": random_ids(1, 7, 1, high=V)})["lm"]
    (total / count).backward()
    for name in trained:
        gradient = model.get_parameter(name).grad
        assert bool(gradient is not None and gradient.any()) == ("gate" in name.split(".")[-1] or name == "tags"), name


def test_the_language_model_stays_as_it_is():
    model = build()
    before = {name: p.clone() for name, p in model.language.named_parameters()}
    freeze(model, recipes.NEW)
    optimiser = make_optimiser(model, recipes.TINY.stages[0])
    for seed in range(3):
        total, count = model.losses({**page("wiwewiw", seed=seed), "labels": random_ids(1, 7, seed, high=V)})["lm"]
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    assert all(torch.equal(p, before[name]) for name, p in model.language.named_parameters())
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert not held & {id(p) for part in (model.language, model.vision) for p in part.parameters()}
    decays = {name: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]
              for name, q in model.named_parameters() if p is q and p.ndim >= 2}
    assert {name for name, decay in decays.items() if decay == 0} == {n for n in decays if n.startswith("resampler")}


# ---- who sees what

def alone_in_the_middle(**changes) -> Flamingo:
    """One gated layer, before the last LM layer's attention can carry anything further: dense gate shut, no later layers."""
    model = build(language=llama(V, 24, 1, 4, 32), **changes)
    torch.nn.init.zeros_(model.language.blocks[0].attention.out.weight)
    return model


@pytest.mark.parametrize("all_previous", [False, True])
def test_a_word_sees_the_image_before_it(all_previous):
    model, batch = alone_in_the_middle(all_previous=all_previous), page("wiwwiwiw")
    phi = masks.last_image(batch["input_ids"] == IMAGE)[0]
    assert phi.tolist() == [0, 1, 1, 1, 2, 2, 3, 3]
    before = said(model, batch)[0]
    for number in (1, 2, 3):
        other = {**batch, "images": batch["images"].clone()}
        other["images"][0, number - 1] += 1
        changed = (said(model, other)[0] != before).any(dim=-1)
        assert torch.equal(changed, phi >= number if all_previous else phi == number)


def test_backwards_a_word_sees_the_image_behind_it():
    model, batch = alone_in_the_middle(), page("wwiwiww", M=2) | {"backwards": torch.tensor([True])}
    seen = masks.next_image(batch["input_ids"] == IMAGE)[0]
    assert seen.tolist() == [1, 1, 2, 2, 0, 0, 0]
    before = said(model, batch)[0]
    for number in (1, 2):
        other = {**batch, "images": batch["images"].clone()}
        other["images"][0, number - 1] += 1
        assert torch.equal((said(model, other)[0] != before).any(dim=-1), seen == number)


def test_words_before_any_image_get_exactly_nothing():
    block = next(iter(build().gated_xattn.values()))
    y, media = randn(1, 4, 24), randn(1, 6, D_V, seed=1)
    phi = torch.tensor([[0, 1, 2, 3]])  # nothing, the first, the second, one that is not there
    with torch.no_grad():
        got = block.attention(block.norm1(y), media, masks.image_causal(phi, torch.ones(1, 2, dtype=torch.bool), 3))
    assert not got[0, [0, 3]].any() and got[0, [1, 2]].all()


def test_more_tags_than_images_do_no_harm():
    """What stands behind a tag without an image looks at nothing, as if no images were there at all."""
    model, batch = alone_in_the_middle(), page("wiwwiw", M=2)
    batch["frames"][0, 1] = 0
    none = batch | {"frames": torch.zeros_like(batch["frames"])}
    full, blind = said(model, batch)[0], said(model, none)[0]
    assert torch.equal(full[[0, 4, 5]], blind[[0, 4, 5]]) and (full[1:4] != blind[1:4]).all()


def test_an_earlier_image_is_heard_of_through_words():
    """The picture two tags back reaches a later word through what the language model's own attention carries."""
    model, batch = build(), page("iwweiww", M=2)
    other = {**batch, "images": batch["images"].clone()}
    other["images"][0, 0] += 1
    assert (said(model, other)[0, -1] != said(model, batch)[0, -1]).any()


def test_the_size_of_a_batch_changes_nothing():
    model, batch = build(), page("wiwiwew", "wwwwiw.", "www....")
    together = said(model, batch)
    for b, row in enumerate(batch["attention_mask"]):
        single = {name: tensor[b:b + 1] for name, tensor in batch.items()}
        images = max(1, int((batch["frames"][b] > 0).sum()))
        single |= {"images": single["images"][:, :images], "frames": single["frames"][:, :images]}
        close(said(model, single)[0, row], together[b, row])


# ---- clips

@pytest.mark.parametrize("frames", [1, 3, 4, 9, 30])
@pytest.mark.parametrize("cells", [4, 9, 25])
def test_any_clip_becomes_as_many_latents(frames, cells):
    resampler = bite(PerceiverResampler(CONFIG.resampler), 0)
    features = randn(2, frames, cells, D_V)
    with torch.no_grad():
        got = resampler(features)
        assert got.shape == (2, 3, D_V)
        close(resampler(features[:, :, torch.randperm(cells)]), got)  # no places
        if frames > 1:
            assert (resampler(features.flip(1)) - got).abs().max() > 1e-3  # but times


def test_without_time_embeddings_order_is_lost():
    resampler = bite(PerceiverResampler(replace(CONFIG.resampler, frames=0)), 0)
    features = randn(2, 4, 9, D_V)
    with torch.no_grad():
        close(resampler(features.flip(1)), resampler(features))


def test_times_lie_between_the_learned_ones():
    times = torch.tensor([[0.0, 3.0], [2.0, 5.0], [6.0, 1.0]])
    assert torch.equal(stretched(times, 1), times[:1]) and torch.equal(stretched(times, 3), times)
    close(stretched(times, 5), torch.tensor([[0.0, 3], [1, 4], [2, 5], [4, 3], [6, 1]]))


def test_clips_of_different_lengths_in_one_batch():
    """A picture beside a clip of four frames is what it is alone: its padding is never looked at."""
    model, batch = build(), page("wiwiwe", frames=4, M=2)
    batch["frames"] = torch.tensor([[4, 1]])
    media = model.look(batch["images"], batch["frames"])
    close(media[0, 0], model.encode_image(batch["images"][0, :1])[0])
    close(media[0, 1], model.encode_image(batch["images"][0, 1:, :1])[0])


def test_without_images_every_part_still_has_a_gradient():
    model = build()
    freeze(model, recipes.NEW)
    model.losses({**page("wwww"), "labels": random_ids(1, 4, 0, high=V)})["lm"][0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- answers

@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_on_where_the_prompt_was_read(beams):
    """With a cache and without: the same words, for rows that have arrived at different images."""
    model, batch = build(), page("..wiwiw", "wwwwiww", ".wwwwww")
    got = model.generate(batch, 6, [CLOSE], beams=beams)

    def whole(ids: Tensor) -> Tensor:
        grown = batch | {"input_ids": torch.cat([batch["input_ids"], ids], 1),
                         "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(ids, dtype=torch.bool)], 1)}
        return said(model, grown)[:, -1]

    if beams == 1:
        ids = got[:, :0]
        for _ in range(got.shape[1]):
            ids = torch.cat([ids, whole(ids).argmax(dim=-1, keepdim=True)], dim=1)
        done = (ids == CLOSE).cumsum(1) - (ids == CLOSE).long() > 0
        assert torch.equal(got, ids.masked_fill(done, 0))
    else:
        singles = [generation.generate(lambda one=one: model.prefill(one), model.step, 6, [CLOSE], beams=beams)
                   for one in ({name: tensor[b:b + 1] for name, tensor in batch.items()} for b in range(3))]
        for b, single in enumerate(singles):
            assert torch.equal(got[b, :single.shape[1]], single[0])


def test_steps_see_images_that_prompts_bring_and_tags_that_come():
    model, batch = build(), page("wiwiwww", M=2)
    start = {name: tensor[:, :3] if tensor.ndim == 2 and name != "frames" else tensor for name, tensor in batch.items()}
    with torch.no_grad():
        logits, cache = model.prefill(start)
        rest, cache = model.step(batch["input_ids"][:, 3:5], cache)
        last, _ = model.step(batch["input_ids"][:, 5:], cache)
    want = said(model, batch)
    close(torch.cat([logits[:, None], rest, last], dim=1), want[:, 2:])


def test_tags_behind_the_vocabulary_can_be_read_and_said():
    model = build(image_id=V, close_id=V + 1)
    batch = page("wiwewiw")
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != IMAGE, V).where(batch["input_ids"] != CLOSE, V + 1)
    logits = said(model, batch)
    assert logits.shape[-1] == V + 2
    close(model.embed(torch.tensor([[V, V + 1]]))[0], model.tags)


@pytest.mark.parametrize("ids", [(V, CLOSE), (IMAGE, V), (V + 1, V), (V + 3, V + 4)])
def test_tags_are_both_words_or_both_behind_them(ids):
    with pytest.raises(ValueError, match=f"{ids[0]} and {ids[1]}; either both are among the {V} words, or they are {V} and {V + 1}"):
        build(image_id=ids[0], close_id=ids[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    """Weights in bf16 under pictures in fp32, or fp32 weights under autocast: close to fp32, in training and in generation."""
    model, batch = build(), page("wiwewiw", "iwwiwww", frames=2)
    exact, labels = said(model, batch), random_ids(2, 7, 1, high=V)
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = said(model, batch)
        model.losses({**batch, "labels": labels})["lm"][0].backward()
        assert len(model.generate(batch, 3, [CLOSE], beams=3)) == 2
    assert (got.float() - exact).abs().mean() < 0.1 * exact.std()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name.startswith(recipes.NEW))


def test_the_frozen_language_model_is_checkpointed(monkeypatch):
    """It is in eval(), but gradients go through it: each of its three blocks runs twice, and the gradients are the same."""
    gradients, runs, forward = [], [], decoder.Block.forward
    monkeypatch.setattr(decoder.Block, "forward", lambda block, *given: runs.append(block) or forward(block, *given))
    for checkpointing in (False, True):
        model = build()
        freeze(model, recipes.NEW)
        model.language.checkpointing = checkpointing
        model.losses({**page("wiwewiw"), "labels": random_ids(1, 7, 1, high=V)})["lm"][0].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        close(again, plain)
    assert len(runs) == 3 + 2 * 3
    assert model.generate(page("wiw"), 2, [CLOSE]).shape[1] <= 2 and len(runs) <= 9 + 2 * 3, "nothing is kept for a gradient that nobody wants"


def test_candidates_are_scored_as_in_a_whole_page():
    """A candidate may even bring a tag: what stands behind it has no image, and sees none."""
    model, batch, candidates = build(), page(".wiwiw", "wwwiww", M=2), [[7, 9, CLOSE], [8, CLOSE], [IMAGE, 9, 6]]
    got = generation.score_candidates(lambda: model.prefill(batch), model.step, candidates)
    for j, candidate in enumerate(candidates):
        ids = torch.tensor(candidate).expand(2, -1)
        whole = batch | {"input_ids": torch.cat([batch["input_ids"], ids], 1),
                         "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(ids, dtype=torch.bool)], 1)}
        log_p = said(model, whole).log_softmax(dim=-1)[:, 5:-1].gather(-1, ids[..., None])
        close(got[:, j], log_p.sum(dim=(1, 2)), 1e-4)


# ---- one step, several data sets

def mixed(**changes) -> Stage:
    return replace(Stage("pages", recipes.NEW, {"pages": 1.0, "pairs": 0.2}, mixed="losses", steps=4, batch_size=4, lr=1e-3,
                         accumulate=2), **changes)


def test_one_step_is_the_weighted_sum_of_the_losses():
    model = build()
    freeze(model, recipes.NEW)
    micro = [{**page("wiwewiw", "wwwiwww", seed=1), "labels": random_ids(2, 7, 1, high=V)}, {**page("iww", "iww"), "labels": random_ids(2, 3, 2, high=V)}]
    for batch in micro:
        batch["labels"][:, 0] = -100
    micro[1]["labels"][0] = -100
    losses = [total / count for total, count in (model.losses(batch)["lm"] for batch in micro)]
    (losses[0] + 0.2 * losses[1]).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    reported = _backward(Losses(model), micro, torch.device("cpu"), mixed(), 0)
    for name, gradient in want.items():
        close(model.get_parameter(name).grad, gradient)
    assert reported == pytest.approx({"lm/pages": losses[0].item(), "lm/pairs": losses[1].item()})


@pytest.mark.parametrize("mix, sets", [("losses", [["pages", "pairs"]] * 3), ("turns", [["pages"] * 2, ["pairs"] * 2, ["pages"] * 2])])
def test_which_set_a_micro_batch_is_of(mix, sets):
    stage = mixed(mixed=mix)
    for step, names in enumerate(sets):
        places = range(step * 4, step * 4 + 4)
        assert [next(iter(stage.diet(place))) for place in places] == [names[0], names[0], names[1], names[1]]
        assert [name for name, _ in stage.parts(step)] == names


def test_losses_of_three_sets_need_three_micro_batches():
    with pytest.raises(UserError, match="mixes the losses of 2 data sets but has 3 micro-batches"):
        mixed(accumulate=3).parts(0)
    with pytest.raises(UserError, match="portions must name the data sets in their order, one micro-batch each"):
        mixed(portions={"pages": 2, "pairs": 2}, accumulate=4).parts(0)
    with pytest.raises(ValueError, match="group would sort samples"):
        mixed(group=True)


# ---- windows of pages

def test_a_window_has_its_own_images_and_ends_before_too_many():
    ids = [1, IMAGE, 7, 8, IMAGE, 9, IMAGE, 10, IMAGE, 11]
    images = ["a", "b", "c", "d"]
    for seed in range(50):
        got, labels, kept = window(ids, list(range(10)), images, IMAGE, 6, 2, Random(seed))
        start = labels[1] - 1
        assert got == ids[start:start + len(got)] and labels == [-100, *range(start + 1, start + len(got))]
        assert got.count(IMAGE) == len(kept) <= 2
        assert list(kept) == images[ids[:start].count(IMAGE):][:len(kept)]
        assert len(got) == 6 or (len(kept) == 2 and ids[start + len(got)] == IMAGE)
    assert window(ids, ids, images, IMAGE, 0, 0, Random(0)) == (ids, [-100, *ids[1:]], images)
    assert window(ids, ids, images, IMAGE, 6, 2, None) == (ids[:6], [-100, *ids[1:6]], images[:2])
    assert window([1, 7], [1, 7], [], IMAGE, 6, 2, Random(0)) == ([1, 7], [-100, 7], [])


def test_pad_sides_do_not_matter():
    model, batch = build(), page("wiwewiw", M=2)
    padded = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (3, 0)), "attention_mask": pad_mask([7], "left", 10)}
    close(said(model, padded)[:, 3:], said(model, batch))
