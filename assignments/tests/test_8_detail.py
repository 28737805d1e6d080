"""Assignment 8. Oracles: sentences written out, roots and frequencies, frame by frame, loops over pixels and tokens in whole fractions."""

import math
from collections import Counter
from fractions import Fraction
from itertools import product
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from assignments.draw import close
from nanovlm.bert import BertConfig
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.prompts import GROUNDING, SHORT, prompted
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.templates import filled, lettered, listed
from nanovlm.data.transforms import cut, pad_to_square
from nanovlm.decoder import llama
from nanovlm.errors import UserError
from nanovlm.papers.blip2 import BLIP2Config
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.qformer import QFormer, QFormerConfig
from nanovlm.recipes.instructblip import balanced
from nanovlm.recipes.stage import Stage
from nanovlm.tiling import Tiles, Tiling, hd_tiling, llava_next_tiling
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import drawn
from nanovlm.vit import clip_vit

# --- 8.1 how an answer should look ---

def test_8_1_behind_the_first_question(draw):
    turns = (Turn("<image>\nwhat is it?", "a star", "shape", ("a star", "a cross")), Turn("and where?", "top left"))
    got = prompted(turns, SHORT)
    assert got == (Turn("<image>\nwhat is it?\nAnswer the question using a single word or phrase.", "a star", "shape", ("a star", "a cross")),
                   Turn("and where?", "top left"))
    assert prompted(list(turns[:1]), "Say it in verse.") == (Turn("<image>\nwhat is it?\nSay it in verse.", "a star", "shape", ("a star", "a cross")),)
    assert turns[0].question == "<image>\nwhat is it?"


def test_8_1_once_is_enough(draw):
    """Where one of the published sentences stands in the first question already, nothing is added; in a later one it does not count."""
    for known in (SHORT, GROUNDING, "Answer with the option's letter from the given choices directly.",
                  "Provide a one-sentence caption for the provided image.", "Provide a short description for this region."):
        turns = (Turn(f"what is it?\n{known}", "star"), Turn("where?", "left"))
        assert prompted(turns, SHORT) == turns and prompted(turns, GROUNDING) == turns
        later = (Turn("what is it?", "star"), Turn(f"where?\n{known}", "left"))
        assert prompted(later, SHORT)[0].question == f"what is it?\n{SHORT}" and prompted(later, SHORT)[1] == later[1]


def test_8_1_no_sentence_no_change(draw):
    turns = [Turn("what is it?", "star"), Turn("where?", "left")]
    got = prompted(turns, "")
    assert isinstance(got, tuple) and got == tuple(turns)


# --- 8.2 a record in other words ---

def test_8_2_fields_in_their_places(draw):
    record = {"question": "what is it?", "answer": "a {star}", "options": "(a) red (b) blue", "ocr": "stop, 4th", "context": "In Rome.",
              "history": "q: who? a: he."}
    plain = {"question": "what is it?", "answer": "a star"}
    for template, fields, want in (
            ("Question: {question} Short answer:", plain, "Question: what is it? Short answer:"),
            ("{question}", plain, "what is it?"),
            ("Describe it.", {}, "Describe it."),
            ("{answer} answers what?", record, "Context: In Rome. Dialogue so far: q: who? a: he. OCR tokens: stop, 4th. a {star} answers what?"),
            ("{{question}} {question}", plain, "{question} what is it?"),
            ("{question} {question}", plain, "what is it? what is it?"),
            ("{question} {ocr}", {"question": "q?", "ocr": "a, b"}, "q? a, b"),
            ("{question}", {"question": "q?", "ocr": "a, b"}, "OCR tokens: a, b. q?"),
            ("{question}", {"question": "q?", "context": "c"}, "Context: c q?"),
            ("{context} So: {question}", {"question": "q?", "ocr": "a", "context": "c", "history": "h"}, "Dialogue so far: h OCR tokens: a. c So: q?"),
            ("{question}", {"question": "q?", "options": "(a) x (b) y"}, "q? Options: (a) x (b) y."),
            ("Ask: {question} Answer:", {"question": "q?", "options": "x, y"}, "Ask: q? Options: x, y. Answer:"),
            ("{question} {options} Which?", {"question": "q?", "options": "x, y"}, "q? x, y Which?"),
            ("Name {options}.", {"options": "x, y"}, "Name x, y."),
            ("What is asked?", {"options": "x, y"}, "What is asked?"),
            ("{question}", {"question": "what says {ocr}?", "ocr": "a"}, "OCR tokens: a. what says {ocr}?"),
            ("{question}", {"question": "q?", "ocr": "{answer} {{"}, "OCR tokens: {answer} {{. q?")):
        before = dict(fields)
        assert filled(template, fields) == want
        assert fields == before, "what came in stays as it was"


def test_8_2_what_a_record_does_not_have_is_an_error(draw):
    for template, fields in (("{question}", {}), ("{question} {ocr}", {"question": "q?"}), ("{question}", {"question": ""}),
                             ("{context}", {"question": "q?", "ocr": "a"})):
        with pytest.raises(UserError):
            filled(template, fields)


def test_8_2_lists_as_text(draw):
    assert lettered(["red"]) == "(a) red" and lettered(iter(["red", "dark blue", "7"])) == "(a) red (b) dark blue (c) 7"
    assert lettered(map(str, range(26))).endswith("(y) 24 (z) 25")
    assert listed(["stop", "4th"]) == "stop, 4th" and listed("stop 4th") == "stop 4th" and listed(iter([1, 2])) == "1, 2"
    words = [f"w{i}" for i in range(50)]
    assert listed(words) == ", ".join(words[:30]) and listed(words[:30]) == listed(words) != listed(words[:29])


# --- 8.3 small sets more often than by size ---

def test_8_3_roots_of_the_sizes(draw):
    """§2.4: p = √S / Σ √S; by hand, to 1e-12."""
    sizes = {"captions": 32_000, "signs": 2_000, "knowledge": 1_000, "reading": 8_000}
    for by, power in (("proportional", lambda s: s), ("sqrt", math.sqrt), ("uniform", lambda s: 1.0)):
        got, whole = balanced(sizes, by), math.fsum(power(size) for size in sizes.values())
        assert list(got) == list(sizes)
        for name, size in sizes.items():
            assert abs(got[name] - power(size) / whole) <= 1e-12, f"{by}, {name}: {got[name]:.4f}, wanted {power(size) / whole:.4f}"
    assert balanced(sizes) == balanced(sizes, "sqrt")


def test_8_3_factors_by_hand(draw):
    """On top of the root, before the sum is made 1; a set without one has 1."""
    sizes, factors = {"a": 400, "b": 100, "c": 900}, {"b": 3.0, "c": 0.5}
    for by, weights in (("sqrt", (20, 30, 15)), ("proportional", (400, 300, 450)), ("uniform", (1, 3, 0.5))):
        got = balanced(sizes, by, factors)
        for name, weight in zip(sizes, weights):
            assert abs(got[name] - weight / sum(weights)) <= 1e-12, f"{by}, {name}: {got[name]:.4f}, wanted {weight / sum(weights):.4f}"
        assert abs(sum(got.values()) - 1) <= 1e-12
    assert factors == {"b": 3.0, "c": 0.5} and sizes["a"] == 400


def test_8_3_only_proportions_count(draw):
    sizes = {name: draw.random.randint(1, 10_000) for name in "abcde"}
    small = balanced({name: size / 1000 for name, size in sizes.items()})
    for name, p in balanced(sizes).items():
        assert abs(p - small[name]) <= 1e-12
    assert balanced({"alone": 7}) == {"alone": 1.0}


# --- 8.4 what a step learns from ---

DIET = {"captions": 5.0, "signs": 1.0, "knowledge": 3.0, "reading": 0.5}


def stage(mixed="samples", name="tune", batch_size=8):
    return Stage(name, ("language",), DIET, mixed=mixed, real="instructions", steps=10, batch_size=batch_size, lr=1e-3)


def often(names, weights, n):
    """Counts against weights, 5 standard deviations: once in 1.7 million cells."""
    counts, whole = Counter(names), sum(weights.values())
    for name, weight in weights.items():
        p = weight / whole
        assert abs(counts[name] - n * p) <= 5 * math.sqrt(n * p * (1 - p)), f"{name}: {counts[name] / n:.3f}, wanted {p:.3f}"
    assert set(counts) <= set(weights)


def test_8_4_sets_come_by_their_weights(draw):
    """20,000 places, 4 sets: a false alarm in 400,000 runs."""
    seed, n = draw.random.getrandbits(20), 20_000
    often((drawn(stage(), seed, place, DIET)[0] for place in range(n)), DIET, n)
    often((drawn(stage("batches"), seed, 8 * step, DIET)[0] for step in range(n // 4)), DIET, n // 4)


def test_8_4_a_function_of_seed_stage_and_place(draw):
    """In any order, however often, whatever else was drawn meanwhile; another seed, stage or place is another draw."""
    places = list(range(60))
    first = [(name, rng.random()) for name, rng in (drawn(stage(), 3, place, DIET) for place in places)]
    Random().shuffle(places)
    torch.manual_seed(0)
    for place in places:
        torch.rand(1)
        name, rng = drawn(stage(), 3, place, DIET)
        assert (name, rng.random()) == first[place]
    assert len({value for _, value in first}) == 60, "each place has numbers of its own"
    for other in ((stage(), 4), (stage(name="align"), 3)):
        again = [(name, rng.random()) for name, rng in (drawn(*other, place, DIET) for place in range(60))]
        assert [name for name, _ in again] != [name for name, _ in first]
        assert not {value for _, value in again} & {value for _, value in first}


def test_8_4_a_batch_may_be_of_one_set(draw):
    """Where batches are mixed all places of a step have one set, and each its own numbers; else a batch mixes sets."""
    for size in (8, 5):
        found = [[drawn(stage("batches", batch_size=size), 7, step * size + i, DIET) for i in range(size)] for step in range(30)]
        assert all(len({name for name, _ in step}) == 1 for step in found)
        assert len({step[0][0] for step in found}) > 1
        assert len({rng.random() for step in found for _, rng in step}) == 30 * size
    mixed = [{drawn(stage(), 7, step * 8 + i, DIET)[0] for i in range(8)} for step in range(30)]
    assert sum(len(step) > 1 for step in mixed) > 20


# --- 8.5 queries that know what will be asked ---

V, D, D_V, Q = 41, 12, 10, 3
TEXT = BertConfig(V, D, 3, 2, 20, max_positions=16, dropout=0.0)


def bridge(draw, reads=True):
    return draw.bite(QFormer(QFormerConfig(TEXT, Q, D_V, reads=reads)), 0.4)


def told_by_hand(model, tokens, ids, length):
    """One picture, one question without its padding: everybody sees everybody, and the queries' rows are the first."""
    with torch.no_grad():
        return model(tokens[None], ids[None, :length])[0, :Q]


def test_8_5_each_question_by_itself(draw):
    model, B, T, N = bridge(draw), 4, 6, 5
    tokens, ids, real = draw.randn(B, N, D_V), draw.ids(B, T, high=V), draw.padding(B, T)
    got = model.bring_back(tokens, ids, real)
    assert got.shape == (B, Q, D), f"{got.shape[1]} rows for each picture, wanted {Q}: the words' own rows are not given on"
    close(got, torch.stack([told_by_hand(model, tokens[b], ids[b], int(real[b].sum())) for b in range(B)]), 3e-5)
    other = model.bring_back(tokens, ids.flip(0), real.flip(0))
    assert (other - got).abs().max() > 1e-2, "another question brings back something else"


def test_8_5_without_a_question(draw):
    model, tokens = bridge(draw, reads=False), draw.randn(3, 5, D_V)
    with torch.no_grad():
        close(model.bring_back(tokens), model(tokens))


def test_8_5_weights_are_noted_down(draw):
    model, maps, looks = bridge(draw), [], []
    model.bring_back(draw.randn(2, 5, D_V), draw.ids(2, 4, high=V), draw.padding(2, 4), maps, looks)
    assert [m.shape for m in maps] == [(2, 2, Q + 4, Q + 4)] * 3 and [m.shape for m in looks] == [(2, 2, Q, 5)] * 2


def test_8_5_what_does_not_fit_is_refused(draw):
    """A question for a bridge that reads none, none for one that does, half of one, and pictures and questions of different number."""
    reads, blind, tokens, ids, real = bridge(draw), bridge(draw, False), draw.randn(2, 5, D_V), draw.ids(2, 4, high=V), draw.padding(2, 4)
    for model, given in ((reads, ()), (reads, (ids,)), (reads, (None, real)), (blind, (ids, real)), (blind, (ids,)), (blind, (None, real)),
                         (reads, (ids[:1], real[:1])), (reads, (ids.repeat(2, 1), real.repeat(2, 1)))):
        with pytest.raises(UserError):
            model.bring_back(tokens, *given)


# --- 8.6 the question that the bridge reads ---

def collate(words, question):
    return Collate(words, "plain", None, Reads(question=question))


QUESTIONS = [("<image>\nwhat is it? ", "and where?"), ("who?",), (" is there\na red star in the top left <image> of it?<image>", " yes or no? ", "sure?")]


def samples():
    return [Sample(f"{i}", turns=tuple(Turn(question, "no") for question in questions)) for i, questions in enumerate(QUESTIONS)]


TEXTS = ["what is it? and where?", "who?", "is there\na red star in the top left  of it? yes or no? sure?"]


def test_8_6_between_s_and_s_the_last_tokens(draw):
    """The questions one after the other, without marks of pictures; of too many tokens the last ones: what is asked stands at the end."""
    words = Tokenizer([])
    for room in (200, 70, 23, 9, 3):
        got = collate(words, room).questions(samples())
        assert set(got) == {"qformer_input_ids", "qformer_attention_mask"}
        rows = []
        for text in TEXTS:
            ids = words.encode(text)
            rows.append([words.bos_id, *ids[max(0, len(ids) - (room - 2)):], words.eos_id])
        longest = max(map(len, rows))
        assert longest <= room
        assert got["qformer_input_ids"].tolist() == [row + [words.pad_id] * (longest - len(row)) for row in rows]
        assert got["qformer_attention_mask"].tolist() == [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
        assert got["qformer_attention_mask"].dtype == torch.bool


def test_8_6_who_reads_nothing_gets_nothing(draw):
    assert collate(Tokenizer([]), 0).questions(samples()) == {}


class TwoTongues(Tokenizer):
    """A language model's words, and another tokenizer for its bridge."""

    @property
    def bridge(self):
        return Tokenizer([], ("[PAD]", "x", "<s>", "</s>", "<pad>"))


def test_8_6_in_the_bridges_own_words(draw):
    own, got = TwoTongues([]).bridge, collate(TwoTongues([]), 12).questions(samples()[1:2])
    assert got["qformer_input_ids"].tolist() == [[own.bos_id, *own.encode("who?"), own.eos_id]]
    assert collate(TwoTongues([]), 12).questions(samples())["qformer_input_ids"][1, -1] == own.pad_id == 4


# --- 8.7 pictures and clips ---

def instructed(draw, asks=True):
    config = BLIP2Config(clip_vit(12, 4, D_V, 1, 2), QFormerConfig(TEXT, Q, D_V), llama(V, 14, 1, 2, 16, 64), asks=asks)
    return draw.bite(InstructBLIP(config), 0.4)


def frame_by_frame(model, clips, ids, real):
    """Each frame for itself, with the clip's question; then one behind the other."""
    rows = []
    with torch.no_grad():
        for b, clip in enumerate(clips):
            found = []
            for frame in clip:
                tokens = model.vision_norm(model.vision(frame[None]))
                asked = () if ids is None else (ids[b:b + 1], real[b:b + 1])
                found.append(model.qformer.bring_back(tokens, *asked)[0])
            rows.append(torch.cat(found))
    return torch.stack(rows)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("frames", [0, 1, 4])
def test_8_7_frame_by_frame(draw, asks, frames):
    model, B = instructed(draw, asks), 3
    images = draw.randn(B, frames, 3, 12, 12) if frames else draw.randn(B, 3, 12, 12)
    asked = (draw.ids(B, 5, high=V), draw.padding(B, 5)) if asks else ()
    want = frame_by_frame(model, images if frames else images[:, None], *(asked or (None, None)))
    close(model.queries(images, *asked), want, 3e-5)
    w = dict(model.projection.named_parameters())
    close(model.image_prefix(images, *asked), want.double() @ w["weight"].detach().double().T + w["bias"].detach().double(), 3e-5)


def test_8_7_weights_are_noted_down(draw):
    model, maps, looks = instructed(draw), [], []
    model.queries(draw.randn(2, 3, 3, 12, 12), draw.ids(2, 5, high=V), draw.padding(2, 5), maps, looks)
    assert [m.shape for m in maps] == [(6, 2, Q + 5, Q + 5)] * 3 and [m.shape for m in looks] == [(6, 2, Q, 10)] * 2


def test_8_7_which_places_are_there(draw):
    model, frames = instructed(draw), torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    got = model.there(frames)
    assert got.dtype == torch.bool and got.tolist() == [[frame for frame in row for _ in range(Q)] for row in frames.tolist()]
    assert model.there(None) is None


# --- 8.8 which grid ---

S = 12
TILINGS = {"hd": hd_tiling(S), "next": llava_next_tiling(S), "no whole": Tiling(S, whole="none"), "odd": Tiling(7, ((2, 3), (1, 4), (3, 1), (1, 1)))}


def grid_by_hand(tiling, size, number):
    """Scale, fit inside, cut to whole pixels; keep most pixels of the picture, then waste least; of equals the first."""
    best, found = None, None
    for rows, columns in tiling.grids:
        height, width = rows * tiling.side, columns * tiling.side
        scale = min(number(width, size[1]), number(height, size[0]))
        kept = math.floor(size[1] * scale) * math.floor(size[0] * scale)
        kept = min(kept, size[0] * size[1])
        wasted = height * width - kept
        if best is None or kept > best[0] or kept == best[0] and wasted < best[1]:
            best, found = (kept, wasted), (rows, columns)
    return found


@pytest.mark.parametrize("name", list(TILINGS))
def test_8_8_every_size_up_to_40(draw, name):
    """In fractions; where the released code's floats come to another grid, in one size of hundreds, either is right."""
    tiling, unclear = TILINGS[name], 0
    for size in product(range(1, 41), range(1, 41)):
        want, in_floats = grid_by_hand(tiling, size, Fraction), grid_by_hand(tiling, size, lambda a, b: a / b)
        got = tiling.grid(size)
        unclear += want != in_floats
        assert got in (want, in_floats), f"{size[0]} high, {size[1]} wide: {got}, wanted {want}"
    assert unclear < 16


@pytest.mark.parametrize("name", list(TILINGS))
def test_8_8_fitted_touches_two_sides(draw, name):
    """As large as the grid allows, in the picture's proportions; what is no whole pixel is rounded up."""
    tiling = TILINGS[name]
    for size in product(range(1, 41), range(1, 41)):
        height, width = (n * tiling.side for n in tiling.grid(size))
        scale = min(Fraction(width, size[1]), Fraction(height, size[0]))
        want = (min(math.ceil(size[0] * scale), height), min(math.ceil(size[1] * scale), width))
        assert tuple(tiling.fitted(size)) == want, f"{size[0]} high, {size[1]} wide: {tiling.fitted(size)}, wanted {want}"


def test_8_8_height_first(draw):
    assert hd_tiling(S).grid((10, 60)) == (1, 5) and hd_tiling(S).grid((60, 10)) == (5, 1)
    assert hd_tiling(S).fitted((10, 60)) == (10, 60) and hd_tiling(S).fitted((60, 10)) == (60, 10)
    assert hd_tiling(S).grid((30, 80)) == (1, 3) or hd_tiling(S).grid((30, 80)) == (2, 3)
    assert hd_tiling(224).grid((448, 672)) == (2, 3), "the largest of LLaVA-1.5-HD"
    assert hd_tiling(224).grid((100, 100)) == (1, 1), "a small picture gets a small grid"


# --- 8.9 which tokens show the picture ---

def shown(rows, high, wide, columns):
    """Of `rows` tokens of a map `columns` wide: strip one above and one below while what the picture takes, rounded down, stays."""
    picture, cut = math.floor(Fraction(high * columns, wide)), 0
    while rows - 2 * (cut + 1) >= picture:
        cut += 1
    return cut, rows - cut


def kept_by_hand(tiling, size, g):
    rows, columns = (n * g for n in tiling.grid(size))
    if Fraction(size[1], size[0]) > Fraction(columns, rows):
        return shown(rows, size[0], size[1], columns), (0, columns)
    return (0, rows), shown(columns, size[1], size[0], rows)


def both(slices):
    return tuple((part.start, part.stop) for part in slices)


@pytest.mark.parametrize("name", list(TILINGS))
@pytest.mark.parametrize("g", [2, 3])
def test_8_9_every_size_up_to_40(draw, name, g):
    tiling = TILINGS[name]
    for size in product(range(1, 41), range(1, 41)):
        rows, columns = kept_by_hand(tiling, size, g)
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            with pytest.raises(UserError):
                tiling.kept(size, g)
            continue
        got = both(tiling.kept(size, g))
        assert got == (rows, columns), f"{size[0]} high, {size[1]} wide: {got}, wanted {(rows, columns)}"
        want = (tiling.whole != "none") * g * g + (rows[1] - rows[0]) * (columns[1] - columns[0] + 1)
        assert tiling.tokens(size, g) == want, f"{size[0]} high, {size[1]} wide: {tiling.tokens(size, g)} tokens, wanted {want}"


def test_8_9_whole_numbers(draw):
    """55 · 48 / 176 is 14.999… in floats."""
    tiling = Tiling(336, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    for size in ((205, 656), (656, 205), (55, 176), (480, 640), (1000, 3)):
        try:
            got = both(tiling.kept(size, 24))
        except UserError:
            got = None
        rows, columns = kept_by_hand(tiling, size, 24)
        assert got == (None if rows[0] >= rows[1] or columns[0] >= columns[1] else (rows, columns))


def test_8_9_what_is_kept_holds_the_picture(draw):
    """By pixels: at least all tokens that are full of picture, and none on one side more than on the other."""
    tiling, g = hd_tiling(24), 4
    for size in ((24, 60), (60, 24), (30, 31), (11, 70), (70, 11), (50, 50)):
        (top, bottom), (left, right) = both(tiling.kept(size, g))
        rows, columns = (n * g for n in tiling.grid(size))
        assert top == rows - bottom and left == columns - right
        assert tiling.tokens(size, g) == g * g + (bottom - top) * (right - left + 1)


# --- 8.10 tiles become one map ---

def joined_by_hand(tiles, views, size):
    """Token by token, line by line over all tiles; the row-end token behind each line."""
    tiling, g = tiles.tiling, math.isqrt(views.shape[1])
    _, C = tiling.grid(size)
    (top, bottom), (left, right) = kept_by_hand(tiling, size, g)
    first, rows = int(tiling.whole != "none"), []
    for r in range(top, bottom):
        for c in range(left, right):
            rows.append(views[first + (r // g) * C + c // g, (r % g) * g + c % g])
        rows.append(tiles.row_end.detach())
    whole = [views[0, n] for n in range(g * g)] if first else []
    return torch.stack([*whole, *rows] if tiling.whole_first else [*rows, *whole])


@pytest.mark.parametrize("name", list(TILINGS))
@pytest.mark.parametrize("size", [(10, 30), (40, 12), (20, 20), (12, 12), (9, 40), (33, 21)])
def test_8_10_token_by_token(draw, name, size):
    tiles, g = draw.bite(Tiles(TILINGS[name], 5)), 3
    views = draw.randn(tiles.tiling.views(size), g * g, 5)
    got = tiles.join(views, size)
    assert len(got) == tiles.tiling.tokens(size, g), f"{len(got)} tokens, wanted {tiles.tiling.tokens(size, g)}"
    close(got, joined_by_hand(tiles, views, size), 0)


def test_8_10_half_precision_stays(draw):
    tiles = draw.bite(Tiles(hd_tiling(S), 5))
    got = tiles.join(draw.randn(tiles.tiling.views((10, 30)), 9, 5).bfloat16(), (10, 30))
    assert got.dtype == torch.bfloat16


def test_8_10_all_that_is_kept_learns(draw):
    """Each token of the map once, the row-end token once for each line."""
    tiles, size = draw.bite(Tiles(hd_tiling(S), 5)), (12, 24)
    views = draw.randn(tiles.tiling.views(size), 9, 5).requires_grad_()
    got = tiles.join(views, size)
    of_views, of_end = torch.autograd.grad(got.sum(), [views, tiles.row_end])
    close(of_views, torch.ones_like(views))
    close(of_end, torch.full((5,), 3.0))


# --- 8.11 pictures that are cut ---

def picture(draw, height, width):
    return Image.fromarray(draw.ids(height, width, 3, low=0, high=256).to(torch.uint8).numpy())


MEAN = (0.48, 0.2, 0.9)
COLOUR = (122, 51, 229)


def on_ground(inner, height, width, colour):
    """In the middle of a ground of one colour, of odd rests the smaller half above and on the left."""
    ground = np.empty((height, width, 3), np.uint8)
    ground[:] = colour
    top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    ground[top:top + inner.shape[0], left:left + inner.shape[1]] = inner
    return ground


def same(got, want):
    got = np.asarray(got)
    assert got.shape == want.shape, f"{got.shape}, wanted {want.shape}"
    wrong = (got != want).any(axis=2)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} pixels are wrong, the first at row and column {tuple(np.argwhere(wrong)[0].tolist())}"


@pytest.mark.parametrize(("height", "width"), [(5, 12), (12, 5), (7, 7), (1, 4), (10, 9)])
def test_8_11_in_the_middle_of_a_square(draw, height, width):
    image, side = picture(draw, height, width), max(height, width)
    before = np.asarray(image).copy()
    same(pad_to_square(image, MEAN), on_ground(before, side, side, COLOUR))
    same(image, before)


@pytest.mark.parametrize("name", list(TILINGS))
@pytest.mark.parametrize(("height", "width"), [(10, 31), (40, 13), (20, 20), (11, 12), (9, 40)])
def test_8_11_the_whole_and_its_tiles(draw, name, height, width):
    tiling, image = TILINGS[name], picture(draw, height, width)
    side, (rows, columns) = tiling.side, tiling.grid((height, width))
    high, wide = tiling.fitted((height, width))
    inner = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC) if (high, wide) != (height, width) else image)
    canvas = on_ground(inner, rows * side, columns * side, COLOUR if tiling.fill == "mean" else (0, 0, 0))
    want = [canvas[r * side:(r + 1) * side, c * side:(c + 1) * side] for r in range(rows) for c in range(columns)]
    if tiling.whole != "none":
        longest = max(height, width)
        whole = Image.fromarray(on_ground(np.asarray(image), longest, longest, COLOUR)) if tiling.whole == "pad" else image
        want.insert(0, np.asarray(whole if whole.size == (side, side) else whole.resize((side, side), Image.Resampling.BICUBIC)))
    got = cut(image, tiling, MEAN)
    assert len(got) == len(want) == tiling.views((height, width)), f"{len(got)} views, wanted {len(want)}"
    for a, b in zip(got, want):
        same(a, b)
