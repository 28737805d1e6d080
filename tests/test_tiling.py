"""Tiles against transformers' LlavaNext: grids, pixels, logits, tokens; the paper's scheme against loops and a table."""

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import IMAGE_ID, hf_next, ours
from PIL import Image
from test_llava import padded
from tools import close, moved_by_breaking, randn, random_ids
from torch import nn
from transformers.models.llava_next import modeling_llava_next as theirs
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from nanovlm import recipes
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import CLIP_MEAN, CLIP_STD, Transform, cut
from nanovlm.errors import UserError
from nanovlm.hub import from_hf
from nanovlm.papers.llava import LLaVA
from nanovlm.runs.setting import world_of
from nanovlm.tiling import NEXT_GRIDS, SIX_TILES, Tiles, hd_tiling, llava_next_tiling
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import vitals
from nanovlm.training.batches import Mixture, make_collate
from nanovlm.training.weights import initial_model

SIDE, G = 20, 4  # of a view, in pixels and in tokens
FIVE = [(20, 20), (13, 41), (50, 22), (31, 37), (20, 59)]  # (height, width): each takes another grid but one
SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))


def pictures(seed: int) -> list[Image.Image]:
    """Noise, as no two pixels should be alike."""
    generator = torch.Generator().manual_seed(seed)
    return [Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
            for size in FIVE]


def example(seed: int) -> tuple[dict, list[torch.Tensor]]:
    """What our model takes for five pictures, and rows of ids: two pictures in one row, none in another."""
    transform = Transform(SIDE, tiling=llava_next_tiling(SIDE))
    images = torch.cat([transform.views(picture) for picture in pictures(seed)])
    rows = [row.masked_fill(torch.tensor([letter == "i" for letter in letters]), IMAGE_ID)
            for letters, row in zip(["wiwwiww", "wwwwwww", "iwwwwww", "wwwwwiw", "wwiwwww"], random_ids(5, 7, seed))]
    return {"images": images, "image_sizes": torch.tensor(FIVE)}, rows


def as_theirs(inputs: dict, rows: list[torch.Tensor], side: str) -> dict:
    """One id for each image token, and the views of a picture along an axis of their own, filled up with zeros."""
    tiling, sizes = llava_next_tiling(SIDE), iter(FIVE)
    long = [torch.cat([i.expand(tiling.tokens(next(sizes), G)) if i == IMAGE_ID else i[None] for i in row]) for row in rows]
    ids, mask = padded(long, side)
    views = inputs["images"].split([tiling.views(size) for size in FIVE])
    return {"input_ids": ids, "attention_mask": mask.long(), "image_sizes": inputs["image_sizes"],
            "pixel_values": nn.utils.rnn.pad_sequence(views, batch_first=True)}


# --- geometry ---

@given(SIZES, st.sampled_from([(14, NEXT_GRIDS), (14, SIX_TILES), (336, NEXT_GRIDS), (224, SIX_TILES)]))
def test_grids_are_theirs(size, scheme):
    side, grids = scheme
    tiling = llava_next_tiling(side, grids)
    best = theirs.select_best_resolution(size, [[rows * side, columns * side] for rows, columns in grids])
    assert tuple(n // side for n in best) == tiling.grid(size)


@given(SIZES, st.sampled_from([(14, 2, NEXT_GRIDS), (224, 16, SIX_TILES), (336, 24, NEXT_GRIDS)]))
def test_what_is_kept_is_theirs(size, scheme):
    side, g, grids = scheme
    tiling = llava_next_tiling(side, grids)
    rows, columns = (n * g for n in tiling.grid(size))
    places = torch.arange(rows * columns).view(1, rows, columns)
    want = theirs.unpad_image(places, size)[0]
    if want.numel() == 0:
        with pytest.raises(UserError, match=f"{size[1]} pixels wide and {size[0]} high"):
            tiling.kept(size, g)
        return
    assert torch.equal(places[0][tiling.kept(size, g)], want)
    assert tiling.tokens(size, g) == g * g + want.shape[0] * (want.shape[1] + 1)


@pytest.mark.parametrize("size, hd, nxt", [  # the fact sheet's table: tokens and views (spec/llava15.md §4.4)
    ((224, 224), (528, 2), (1176, 3)), ((300, 300), (1312, 5), (1176, 3)), ((480, 640), (1632, 7), (2340, 5)),
    ((640, 480), (1642, 7), (2352, 5)), ((448, 448), (1312, 5), (2928, 5)), ((1080, 1920), (1628, 7), (1948, 5)),
    ((1344, 224), (1888, 7), (1512, 4)), ((100, 1000), (904, 6), (1160, 4))])
def test_token_counts(size, hd, nxt):
    paper, released = hd_tiling(224), llava_next_tiling(336)
    assert (paper.tokens(size, 16), paper.views(size)) == hd
    assert (released.tokens(size, 24), released.views(size)) == nxt


def test_the_papers_grids():
    assert len(SIX_TILES) == 14 and {rows * columns for rows, columns in SIX_TILES} == {1, 2, 3, 4, 5, 6}
    assert hd_tiling(224).grid((100, 100)) == (1, 1), "no credit for enlarging"
    assert hd_tiling(224).grid((10, 3000)) == (1, 6)


def test_whole_numbers_where_floats_lose_a_row():
    """At 205 × 656 the released code keeps 14 rows: int(205 · (48 / 656)) is 14, where 15 is meant."""
    rows, columns = llava_next_tiling(336).kept((205, 656), 24)
    assert int(205 * (48 / 656)) == 14 and 205 * 48 // 656 == 15
    assert (rows.stop - rows.start, columns.stop) == (16, 48)


# --- pixels ---

@pytest.mark.parametrize("seed", [1, 2])
def test_views_are_theirs(seed):
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
                                           image_grid_pinpoints=hf_next(1).config.image_grid_pinpoints)
    transform = Transform(SIDE, tiling=llava_next_tiling(SIDE))
    for picture in pictures(seed):
        got, want = transform.views(picture), processor(picture, return_tensors="pt").pixel_values[0]
        assert not want[len(got):].any()  # what the slow processor fills up with
        close(got, want[:len(got)], 2e-6)


def test_the_papers_views():
    """The whole padded to a square, tiles padded with the mean colour; side by side they are the fitted picture."""
    picture = Image.new("RGB", (70, 20), (200, 10, 10))
    whole, *tiles = cut(picture, hd_tiling(SIDE), CLIP_MEAN)
    mean = (122, 116, 104)
    assert hd_tiling(SIDE).grid((20, 70)) == (1, 4) and len(tiles) == 4
    assert all(view.size == (SIDE, SIDE) for view in (whole, *tiles))
    assert whole.getpixel((10, 1)) == mean and whole.getpixel((10, 10)) == (200, 10, 10)
    row = [tile.getpixel((x, 10)) for tile in tiles for x in range(SIDE)]
    assert row == [mean] * 5 + [(200, 10, 10)] * 70 + [mean] * 5
    tall = cut(Image.new("RGB", (30, 41), (200, 10, 10)), hd_tiling(SIDE), CLIP_MEAN)
    assert len(tall) == 7 and tall[1].getpixel((0, 0)) == mean, "3 × 2, with padding left and right"
    close(Transform(SIDE, tiling=hd_tiling(SIDE)).views(picture)[0, :, 0, 0],
          (torch.tensor(mean) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


def test_the_whole_can_be_left_out():
    """§4.2's ablation: the same tiles, nothing before or behind them."""
    picture, tiles_only = pictures(4)[3], replace(hd_tiling(SIDE), whole="none")
    assert cut(picture, tiles_only, CLIP_MEAN) == cut(picture, hd_tiling(SIDE), CLIP_MEAN)[1:]
    assert tiles_only.views((31, 37)) == 4 and tiles_only.tokens((31, 37), G) == hd_tiling(SIDE).tokens((31, 37), G) - G * G


# --- tokens ---

@pytest.mark.parametrize("tiling", [llava_next_tiling(SIDE), hd_tiling(SIDE), replace(hd_tiling(SIDE), whole="none")])
def test_joined_tokens_are_a_loop(tiling):
    tiles = Tiles(tiling, 5)
    views = randn(sum(map(tiling.views, FIVE)), G * G, 5, seed=3)
    first = 0
    for size, got in zip(FIVE, tiles(views, FIVE), strict=True):
        (R, C), (rows, columns) = tiling.grid(size), tiling.kept(size, G)
        want = []
        for r in range(rows.start, rows.stop):
            for c in range(columns.start, columns.stop):
                tile = first + tiling.wholes + (r // G) * C + c // G
                want.append(views[tile, (r % G) * G + c % G])
            want.append(tiles.row_end)
        whole = list(views[first]) if tiling.wholes else []
        close(got, torch.stack(whole + want if tiling.whole_first else want + whole), 0)
        assert len(got) == tiling.tokens(size, G)
        first += tiling.wholes + R * C


def test_a_wrong_number_of_views_is_an_error():
    with pytest.raises(ValueError, match="have 3 views, but there are 4"):
        Tiles(llava_next_tiling(SIDE), 5)(randn(4, 16, 5), [(20, 20)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_theirs(side):
    hf = hf_next(4)
    model = ours(hf)
    assert type(model) is LLaVA and model.reads.tiling == llava_next_tiling(SIDE)
    inputs, rows = example(4)
    ids, mask = padded(rows, "right")
    theirs_in = as_theirs(inputs, rows, side)
    real = theirs_in["attention_mask"].bool()
    with torch.no_grad():
        want = hf(**theirs_in).logits
        got = model(**inputs, input_ids=ids, attention_mask=mask, pad=side).logits
    assert want[real].std() > 0.1
    close(got[real], want[real], 2e-5)


def test_the_weights_bite():
    model = ours(hf_next(4))
    inputs, rows = example(4)
    ids, mask = padded(rows, "right")
    moved = moved_by_breaking(model, lambda m: m(**inputs, input_ids=ids, attention_mask=mask).logits)
    assert moved["tiles.row_end"] > 1e-3
    idle = {name for name, far in moved.items() if far == 0}
    assert idle == {name for name in moved if name.startswith(("vision.blocks.3.", "vision.norm."))}


@pytest.mark.parametrize("seed", [5, 6])
def test_generated_tokens_are_theirs(seed):
    hf = hf_next(seed)
    inputs, rows = example(seed)
    theirs_in = as_theirs(inputs, rows, "left")
    want = hf.generate(**theirs_in, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids, mask = padded(rows, "right")
    got = ours(hf).generate({**inputs, "input_ids": ids, "attention_mask": mask}, 6, [])
    assert got.tolist() == want[:, theirs_in["input_ids"].shape[1]:].tolist()


def test_a_batch_of_tiled_pictures():
    """Sizes and views travel together, max_length counts the places that each picture takes, and a gradient flows even
    where there is no picture."""
    model = ours(hf_next(7))
    collate = Collate(Tokenizer([]), "tiny", Transform(SIDE, tiling=model.reads.tiling), model.reads)
    one, two, *_ = pictures(7)
    samples = [Sample("a", (one, two), turns=(Turn("<image> or <image>?", "the first"),)),
               Sample("b", turns=(Turn("hi", "ho"),))]
    batch = collate(samples, Random(0))
    assert batch["image_sizes"].tolist() == [[20, 20], [13, 41]]
    assert len(batch["images"]) == sum(map(model.reads.tiling.views, FIVE[:2]))
    places = sum(model.reads.tiling.tokens(size, G) for size in FIVE[:2])
    with pytest.raises(UserError, match=f"a: cutting it to {places} tokens would cut image tokens"):
        replace(collate, max_length=places)(samples, Random(0))
    alone = collate(samples[1:], Random(0))
    assert alone["image_sizes"].shape == (0, 2)
    alone |= {name: alone[name].clamp(max=50) for name in ("input_ids", "labels")}
    model.losses(alone)["lm"][0].backward()
    assert all(model.get_parameter(name).grad is not None for name in ("tiles.row_end", "projector.first.weight"))


@pytest.mark.parametrize("pinpoints", [[[20, 30]], [[20]], "20x40", [[0, 20]]])
def test_pinpoints_that_are_no_multiples(pinpoints):
    hf = hf_next(8)
    config = {**hf.config.to_dict(), "image_grid_pinpoints": pinpoints}
    with pytest.raises(UserError, match="image_grid_pinpoints is .* a list"):
        from_hf(config, hf.state_dict())


def test_exchanged_pictures_keep_their_views():
    """The vital sign puts each picture in the place of the next: all of its views, and its size."""
    model = ours(hf_next(9))
    inputs, rows = example(9)
    ids, mask = padded(rows, "right")
    batch = {**inputs, "input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask | (ids == IMAGE_ID), -100)}
    views = inputs["images"].split([model.reads.tiling.views(size) for size in FIVE])
    moved = {**batch, "images": torch.cat([views[4], *views[:4]]), "image_sizes": torch.tensor([FIVE[4], *FIVE[:4]])}
    right, exchanged = vitals.image_use(model, batch)
    with torch.no_grad():
        for got, want in ((right, batch), (exchanged, moved)):
            total, count = model.losses(want)["lm"]
            assert got == pytest.approx((total / count).item(), abs=1e-6)
    assert abs(right - exchanged) > 1e-3
    alone = {**batch, "image_sizes": batch["image_sizes"][:1]}
    assert not vitals.can_exchange(alone), "with one picture there is nothing to exchange"


def test_sizes_are_asked_for_where_pictures_are_tiled():
    model = ours(hf_next(9))
    inputs, rows = example(9)
    ids, mask = padded(rows, "right")
    with pytest.raises(UserError, match="are tiled: give image_sizes"):
        model(inputs["images"], ids, mask)
    plain = LLaVA(replace(model.config, tiling=None))
    with pytest.raises(UserError, match="are not tiled: leave out image_sizes"):
        plain(**inputs, input_ids=ids, attention_mask=mask)


def test_a_persons_pictures_are_kept_as_large_as_tiles_can_show():
    """Else they would be shrunk to one tile's size before they are cut into six."""
    assert [recipes.shorter_side(name) for name in ("llava/7b", "llava15/7b", "llava15/7b-hd")] == [224, 336, 448]


def test_a_picture_too_thin_for_tiles_is_named():
    tiling, thin = hd_tiling(SIDE), Sample("photo 7", (Image.new("RGB", (400, 2)),), turns=(Turn("<image>?", "x"),))
    with pytest.raises(UserError, match="photo 7: A picture 400 pixels wide and 2 high is thinner than one of"):
        Collate(Tokenizer([]), "tiny", Transform(SIDE, tiling=tiling), Reads(image_tokens=16, tiling=tiling))([thin], Random(0))


def test_a_tiled_row_alone_is_the_row_in_its_batch():
    model = ours(hf_next(11))
    inputs, rows = example(11)
    ids, mask = padded(rows, "right")
    together = model(inputs["images"], ids, mask, image_sizes=inputs["image_sizes"]).logits
    views, sizes = inputs["images"].split([model.reads.tiling.views(size) for size in FIVE]), inputs["image_sizes"]
    first = 0
    for i, row in enumerate(rows):
        count = int((row == IMAGE_ID).sum())
        own = torch.cat([inputs["images"][:0], *views[first:first + count]])
        alone = model(own, row[None], torch.ones(1, len(row), dtype=torch.bool), image_sizes=sizes[first:first + count]).logits
        close(together[i, :alone.shape[1]], alone[0], 1e-5)
        first += count


def test_the_tiny_recipe_sees_small_print():
    """Five views and 88 tokens of each picture, where the model that it goes on from looks at one view, of 16."""
    tiny, hd = recipes.get("llava15/tiny"), recipes.get("llava15/tiny-hd")
    world, tokenizer = world_of(hd, 0), Tokenizer([])
    assert world.exam(1, ["reading"])[0].turns[-1].answer == "10"
    sample = next(s for s in (world.draw("captions", Random(i)) for i in range(99)) if "number" in s.caption)
    for recipe, views, tokens in ((tiny, 1, 16), (hd, 5, 88)):
        stage = recipe.stages[-1]
        with torch.device("meta"):
            reads = recipe.build(stage).reads
        collate = make_collate(recipe, stage, tokenizer, reads)
        batch = collate([sample], Random(0))
        assert batch["images"].shape == (views, 3, 48, 48) and ("image_sizes" in batch) == (views == 5)
        assert (reads.image_tokens if reads.tiling is None else reads.tiling.tokens((96, 96), 4)) == tokens
    assert {"tiles"} == set(hd.stages[-1].trains) - set(tiny.stages[-1].trains)


def test_hd_goes_on_from_the_tuned_model():
    """All of it but the row-end token, which is new."""
    tiny, hd = recipes.get("llava15/tiny"), recipes.get("llava15/tiny-hd")
    torch.manual_seed(0)
    tuned = tiny.build(tiny.stage("tune")).state_dict()
    start = initial_model(hd, hd.stages[0], 0, {"tune": tuned}).state_dict()
    assert start.keys() - tuned.keys() == {name for name in start if name.startswith("tiles.")} and len(start) == len(tuned) + 1
    assert all(torch.equal(start[name], tuned[name]) for name in tuned)


def test_hd_meets_other_samples_than_the_tuned_model():
    """And no lessons: what they taught is known."""
    tuned, hd = recipes.get("llava15/tiny").stages[-1], recipes.get("llava15/tiny-hd").stages[-1]
    assert tuned.lessons and not hd.lessons
    world = world_of(recipes.get("llava15/tiny-hd"), 0)
    one, two = ({image.tobytes() for place in range(200) for image in Mixture(world, replace(stage, data=hd.data, lessons=()), 0)[place].images}
                for stage in (tuned, hd))
    assert min(len(one), len(two)) > 170 and not one & two  # a few talks have no picture
