"""The noisy web and its pools: labels tell the truth about the texts, and an index is one sample."""

import json
import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from scene_oracle import HELD_OUT_NAMES, facts, read
from source import ROOT

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import Mixture
from nanovlm.world import datasets
from nanovlm.world.datasets import SETS, Scenes
from nanovlm.world.noise import VAGUE
from nanovlm.world.scene import CELLS, COLOURS, DIGITS, SHAPES, SIZES, WORDS

SIZE = {"web pairs": 8000, "clean web pairs": 8000, "human pairs": 1200,
        "unnamed web pairs": 2600, "unnamed clean web pairs": 2600, "unnamed human pairs": 400}
KINDS = {"swapped", "wrong fact", "vague", "cut"}
FACTS = {*COLOURS, *SHAPES, *SIZES, *WORDS, *" ".join(CELLS).split(), "object", "digit", "word", "above", "below", "of"}
N = 2000


@pytest.fixture(params=["", "unnamed "])
def web(request, monkeypatch):
    """(sample, what its picture shows) of N pictures of a noisy pool; of colours without names nothing is told."""
    drawn = []
    monkeypatch.setattr(datasets, "render", lambda scene, size: drawn.append(scene) or "picture")
    samples, told = [Scenes().pooled(f"{request.param}web pairs", index) for index in range(N)], {"size", "shape"}
    truths = [facts(scene) for scene in drawn]
    if request.param:
        truths = [{cell: {fact: thing[fact] for fact in thing if fact != "colour"} for cell, thing in truth.items()} for truth in truths]
    return list(zip(samples, truths, strict=True)), frozenset(told if request.param else told | {"colour"})


def test_four_in_ten_are_noisy_and_all_kinds_as_often(web):
    """Five standard deviations: a false alarm in a million."""
    found = Counter(sample.label for sample, _ in web[0])
    for kind, rate in {"": 0.6, **dict.fromkeys(KINDS, 0.1)}.items():
        assert abs(found.pop(kind) - N * rate) < 5 * (N * rate * (1 - rate)) ** 0.5, kind
    assert not found


def test_a_label_says_what_is_wrong_with_the_text(web):
    """The references tell what is shown; no text names an unseen pair, or a colour where colours have no names."""
    pairs, told = web
    wrong, cuts = Counter(), Counter()
    for sample, truth in pairs:
        text, right = sample.caption, sample.references
        assert all(read(reference, told) == truth for reference in right)
        assert (text in right) == (sample.label == "") and text == text.strip() and len(sample.images) == 1
        assert not any(name in text for name in HELD_OUT_NAMES) and ("colour" in told or not set(text.split()) & set(COLOURS))
        if sample.label in ("swapped", "wrong fact"):
            said = read(text, told)
            wrong[sample.label, sum(truth.get(cell) != said.get(cell) for cell in CELLS)] += 1
        elif sample.label == "cut":
            begun = [reference for reference in right if reference.startswith(f"{text} ")]
            longer = [reference for reference in right if text.startswith(f"{reference} ")]
            assert bool(begun) != bool(longer) and not text.endswith(".")
            assert set(re.findall(r"\w+", text)) <= FACTS | {*DIGITS, "a", "the", "in", "and"}
            assert not begun or 0.1 < len(text.split()) / len(begun[0].split()) <= 0.75
            cuts["longer" if longer else "begun"] += 1
        elif sample.label == "vague":
            assert not set(re.findall(r"[^\W\d_]+", text)) & FACTS and text == text.lower()
    assert {cells for kind, cells in wrong if kind == "wrong fact"} == {1, 2}, "a fact of one thing, or two things that changed places"
    assert wrong["swapped", 0] == 0 and wrong["swapped", 4] > wrong["swapped", 3] > wrong["swapped", 1]
    assert abs(cuts["longer"] - cuts["begun"]) < 5 * cuts.total() ** 0.5


@pytest.mark.parametrize("name", SIZE)
def test_an_index_of_a_pool_is_one_sample(name):
    """Of this seed; a draw gives one of them, from the first to the last; a stage keeps its id."""
    world = Scenes(seed=3)
    assert world.pool(name) == SIZE[name] == Scenes(seed=4).pool(name)
    numbers = []
    for draw in range(200):
        sample = world.draw(name, Random(draw))
        numbers.append(int(sample.id.removeprefix(f"scenes/{name}/")))
        assert sample == Scenes(seed=3).pooled(name, numbers[-1])
    assert 0 <= min(numbers) < 0.1 * SIZE[name] and 0.9 * SIZE[name] < max(numbers) < SIZE[name]
    assert len({world.pooled(name, index).images[0].tobytes() for index in range(50)}) == 50
    assert not any(world.pooled(name, index) == Scenes(seed=4).pooled(name, index) for index in range(50))
    stage = replace(recipes.get("llava/tiny").stages[0], data={name: 1})
    assert Mixture(world, stage, 0)[7].id.startswith(f"scenes/{name}/")


def test_only_pools_have_indices():
    assert {name for name in SETS if Scenes().pool(name) and not name.startswith("tasks/")} == set(SIZE)
    for name, index in (("captions", 0), ("human pairs", 1200), ("human pairs", -1)):
        with pytest.raises(UserError, match=f"'{name}' is a pool of {SIZE.get(name, 0)} pictures and has no picture {index}"):
            Scenes().pooled(name, index)


@pytest.mark.parametrize("unnamed", ["", "unnamed "])
def test_twins_have_the_same_pictures(unnamed):
    """The clean web is the noisy one without its noise; what people captioned are other pictures."""
    world = Scenes()
    for index in range(300):
        web, clean, people = (world.pooled(f"{unnamed}{name}", index) for name in ("web pairs", "clean web pairs", "human pairs"))
        assert web.images == clean.images and web.references == clean.references
        assert clean.label == people.label == "" and (web.caption == clean.caption) == (web.label == "")
        assert clean.caption in clean.references and people.caption in people.references
        assert all([(turn.question, turn.answer) for turn in one.turns] == [("<image>", one.caption)] for one in (web, clean, people))
        assert web.images != people.images


@pytest.mark.parametrize("name", ["web pairs", "unnamed web pairs"])
def test_held_out_pairs_of_the_web_are_noisy_too(name):
    samples = [Scenes().held_out(name, index) for index in range(100)]
    assert {sample.label for sample in samples} == {*KINDS, ""}
    assert all((sample.caption in sample.references) == (sample.label == "") for sample in samples)


def test_vague_texts_are_a_dozen_and_the_shipped_tokenizer_knows_their_words():
    tokenizer = Tokenizer.from_dict(json.loads((ROOT / "weights" / "tokenizer.json").read_text(encoding="utf-8")))
    said = {re.sub(r"\d+", "417", sample.caption) for index in range(N)
            if (sample := Scenes().pooled("web pairs", index)).label == "vague"}
    assert len(said) == len(VAGUE) == 12
    for text in said:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) <= 12
