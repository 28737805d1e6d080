"""The embedded world: its pictures, its data sets, its exams. What is said is judged by the oracle in scene_oracle.py."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, product
from random import Random

import numpy as np
import pytest
from scene_oracle import (
    HELD_OUT_NAMES,
    NUMBER_WORDS,
    check_conversation,
    check_sample,
    check_science,
    check_talk,
    read,
    unmarked,
)

from nanovlm import recipes
from nanovlm.data.prompts import SHORT
from nanovlm.errors import UserError
from nanovlm.world import datasets as scenes_module
from nanovlm.world.ask import KINDS
from nanovlm.world.datasets import SETS, Scenes
from nanovlm.world.scene import (
    BACKGROUND,
    CELLS,
    COLOURS,
    DIGITS,
    HELD_OUT,
    NUMBERS,
    PAIRS,
    SEEN,
    SHAPES,
    SIZES,
    WORDS,
    Object,
    Scene,
    Sign,
    boxes,
    random_scene,
    render,
)
from nanovlm.world.sets import TALKS

PAGED = ("named pages", "web pages", "page pairs", "thing pairs", "clips")  # see test_pages.py and test_clips.py
SHOWN = [name for name in SETS if not SETS[name].texts and name not in PAGED]
UNNAMED = [name for name in SETS if name.startswith("unnamed")]  # pictures in colours without names
RECOLOURED = ["vague pairs", *UNNAMED]  # some or all of them
SILENT = [name for name in UNNAMED if name != "unnamed drills"]  # the captions that count as right tell no colour
PICTURES = {"science texts": 0, "statements": 2}  # of a sample; all others have one
ABOUT = [*TALKS, *(f"told/{name}" for name in (*TALKS, "repeat", "captions"))]  # talk about a scene, shown or told


def test_pixels_are_where_the_truth_says():
    rng = Random(8)
    for size, small_print in ((48, False), (96, False), (96, True)):
        for _ in range(300):
            scene = random_scene(rng, PAIRS, texts=DIGITS + WORDS + NUMBERS, small_print=small_print)
            pixels = np.array(render(scene, size))  # (height, width, 3)
            empty = np.ones((size, size), dtype=bool)
            for thing, (name, box) in zip(scene.things, boxes(scene), strict=True):
                x1, y1, x2, y2 = (round(edge * size) for edge in box)
                part = pixels[y1:y2, x1:x2].reshape(-1, 3)
                empty[y1:y2, x1:x2] = False
                if isinstance(thing, Sign):
                    assert name == f"the {thing.type} {thing.text}" and (part != BACKGROUND).any(1).mean() > 0.2
                    continue
                assert name == f"{thing.colour} {thing.shape}"
                assert tuple(pixels[(y1 + y2) // 2, (x1 + x2) // 2]) == COLOURS[thing.colour]
                assert (abs(y2 - y1 - SIZES[thing.size] * size / 48) <= 1) and x2 - x1 == y2 - y1
                row, column = (name in ("bottom", "right") for name in thing.cell.split())
                centre = (x1 + x2) / 2 - size * (0.25 + column / 2), (y1 + y2) / 2 - size * (0.25 + row / 2)
                assert max(map(abs, centre)) <= 2.5 * size / 48, "jitter is two pixels at most"
            assert (pixels[empty] == BACKGROUND).all(), "nothing is drawn outside the boxes"


def test_different_things_look_different():
    for cell, size in product(CELLS, SIZES):
        shapes = [np.array(render(Scene((Object("white", shape, size, cell),)))) for shape in SHAPES]
        for one, two in combinations(shapes, 2):
            assert (one != two).any(-1).sum() >= 0.15 * SIZES[size] ** 2
    signs = [np.array(render(Scene((), Sign(text, "top left")))) for text in DIGITS + WORDS + NUMBERS]
    for one, two in combinations(signs, 2):
        assert (abs(one.astype(int) - two).max(-1) > 100).sum() >= 8
    for one, two in combinations(COLOURS.values(), 2):
        assert sum(abs(a - b) for a, b in zip(one, two)) > 150


def test_different_scenes_are_different_pictures():
    rng, seen = Random(9), {}
    for _ in range(2000):
        scene = random_scene(rng, PAIRS)
        assert seen.setdefault(render(scene).tobytes(), scene) == scene


def words_of(sample) -> list[str]:
    return [sample.caption, *sample.references, *sample.negatives, *sample.told,
            *(text for turn in sample.turns for text in (turn.question, turn.answer))]


@pytest.mark.parametrize("name", SHOWN)
def test_no_held_out_pair_in_any_training_picture(monkeypatch, name):
    """1,500 samples of every data set that is not of texts: what is drawn, said, asked, and said wrongly."""
    drawn: list[Scene] = []
    monkeypatch.setattr(scenes_module, "render", lambda scene, size: drawn.append(scene) or "picture")
    for world in (Scenes(0), Scenes(7), Scenes(0, 96, small_print=True)):
        for index in range(500):
            sample = world.draw(name, Random(f"{world.seed}/{name}/{index}"))
            assert sample.images == ("picture",) * PICTURES.get(name, 1) and sample.told == ()
            assert not any(held_out in text for text in words_of(sample) for held_out in HELD_OUT_NAMES)
    assert len(drawn) == 1500 * PICTURES.get(name, 1)
    shown = {(thing.colour, thing.shape) for scene in drawn for thing in scene.objects}
    unnamed = {colour for colour, _ in shown} - set(COLOURS)
    if drawn and not name.startswith("unnamed"):
        assert {(colour, shape) for colour, shape in shown if colour in COLOURS} == set(PAIRS) - set(HELD_OUT)
    assert bool(unnamed) == (name in RECOLOURED)
    if unnamed:
        assert len(unnamed) > 100 and {shape for colour, shape in shown if colour in unnamed} == set(SHAPES)
    for colour in unnamed:
        rgb = [int(colour[at:at + 2], 16) for at in (1, 3, 5)]
        assert all(sum(abs(a - b) for a, b in zip(rgb, named)) > 100 for named in COLOURS.values())


def test_held_out_are_all_colours_and_all_shapes_and_no_text_draws_a_picture(monkeypatch):
    assert sorted(c for c, _ in HELD_OUT) == sorted(COLOURS) and sorted(s for _, s in HELD_OUT) == sorted(SHAPES)
    monkeypatch.setattr(scenes_module, "render", lambda scene, size: pytest.fail("a text has drawn a picture of any pair"))
    for name in set(SETS) - {*SHOWN, *PAGED}:
        assert all(Scenes().draw(name, Random(index)).images == () for index in range(100))


def test_what_learns_to_see_is_shown_seen_pairs_only():
    """Only a language model alone reads of all pairs, and LLaVA-1.5's in talk without a picture, two in a hundred (ShareGPT)."""
    for recipe in map(recipes.get, recipes.names()):
        for stage in recipe.stages if "/tiny" in recipe.name else ():
            named = {name for diet in (stage.data, *(lesson for _, lesson in stage.lessons)) for name in recipe.worldly(diet)}
            assert named <= set(SETS), f"{recipe.name}@{stage.name}"
            if stage.real != "texts":
                told = {"told/sentences"} if recipe.name.startswith("llava15") and stage.name != "align" else set()
                assert {name for name in named if SETS[name].texts} == told, f"{recipe.name}@{stage.name}"


def test_every_judged_picture_has_a_held_out_pair():
    source = Scenes()
    samples = [source.held_out(name, index) for name in SHOWN if name not in SILENT for index in range(100)]
    samples += source.exam(12) + source.exam(12, view="mixture") + source.exam(12, view="science")
    for sample in samples:
        truth = read(sample.references[0])
        assert any((thing.get("colour"), thing.get("shape")) in HELD_OUT for thing in truth.values())


@pytest.mark.parametrize("name", ABOUT)
def test_every_answer_is_right_and_in_the_form_that_is_asked_for(monkeypatch, name):
    """Of all talk, shown and told, in training and held out; what is told is the truth, and tells of all pairs."""
    monkeypatch.setattr(scenes_module, "render", lambda *_: "picture")
    source, kinds = Scenes(), Counter()
    drawn = [source.draw(name, Random(index)) for index in range(700)]
    for sample in [*drawn, *(source.held_out(name, index) for index in range(100))]:
        check_sample(name, sample)
        assert bool(sample.images) != bool(sample.told) == name.startswith("told/")
        kinds.update(turn.kind for turn in sample.turns)
    truths = [[thing for thing in read(sample.references[0]).values() if "shape" in thing] for sample in drawn]
    pairs = {(thing["colour"], thing["shape"]) for truth in truths for thing in truth}
    assert pairs == set(PAIRS if name.startswith("told/") else SEEN)
    many = set(map(len, truths))
    assert many == ({2, 3} if "drills" in name or name == "told/repeat" else {1, 2, 3, 4})
    bare = name.removeprefix("told/")
    asked = {"talk": {*KINDS, "object", "caption"}, "short": {*KINDS, "object"}, "sentences": {*KINDS, "object"}, "signs": {*KINDS, "object"},
             "drills": {"notes", "census", "places", "sides"}, "box drills": {"boxes"}, "captions on demand": {"caption"},
             "captions": {"caption"}, "repeat": {"repeat"}, "regions": {"region"}, "grounding": {"grounding"}, "letters": {"option"},
             "science": {"science"}}
    if bare in asked:
        assert set(kinds) == asked[bare]
    else:
        assert bare == "letter drills" and kinds["letters"] > 0.85 * kinds.total()


def test_told_talk_is_long_and_written_in_two_formats():
    """To read a scene costs as much as ten questions. 0.3 of BLIP-2's format; ± five standard deviations, once in a million seeds."""
    n, bound = 1500, 5 * (1500 * 0.3 * 0.7) ** 0.5
    for name, of_blip2 in (("told/talk", 0.3), ("told/drills", 0.3), ("told/repeat", 0.3), ("told/captions", 1), ("told/short", 0), ("talk", 0)):
        drawn = [Scenes().draw(name, Random(index)) for index in range(n)]
        styles = Counter(sample.format for sample in drawn)
        assert set(styles) <= {"", "blip2"} and abs(styles["blip2"] - n * of_blip2) <= (bound if of_blip2 == 0.3 else 0), name
        if name.endswith("talk"):
            turns = sum(len(sample.turns) for sample in drawn) / n
            assert (4 < turns < 8) if name == "told/talk" else (1 < turns < 3)


def test_science_texts_tell_what_a_picture_would_show():
    for index in range(300):
        sample = Scenes().draw("science texts", Random(index))
        (turn,) = sample.turns
        assert not sample.images and not sample.told and "N/A" not in turn.question
        check_science(turn, read(sample.references[0]))


def test_pairs_and_captions_have_the_shape_that_training_expects():
    """A pair has a caption, in training perhaps vague, and two false ones; captions are complete."""
    source = Scenes(seed=3, size=40)
    for name, index in product(("pairs", "vague pairs", "captions"), range(100)):
        for sample in (source.draw(name, Random(index)), source.held_out(name, index)):
            assert sample.images[0].size == (40, 40)
            assert name == "vague pairs" or sample.caption in sample.references
            if name == "captions":
                assert [(turn.question, turn.answer) for turn in sample.turns] == [("<image>", sample.caption)] and sample.negatives == ()
            else:
                assert len(sample.negatives) == 2 and sample.turns == ()
    vague = [source.draw("vague pairs", Random(index)) for index in range(1000)]
    complete = sum(sample.caption in sample.references for sample in vague)
    assert abs(complete - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5, "nothing left out six times of twenty"


@pytest.mark.parametrize("kind", [*KINDS, "caption"])
def test_exam(kind):
    samples = Scenes().exam(48, [kind])
    for sample in samples:
        *before, last = sample.turns
        assert last.kind == kind and len(before) == (kind == "follow_up")
        turns = [type(turn)(turn.question.removeprefix("<image>\n"), turn.answer, turn.kind) for turn in sample.turns]
        assert sample.turns[0].question.startswith("<image>\n")
        truth = read(sample.references[0])
        assert kind != "caption" or last.answer in sample.references
        about = check_conversation(turns, truth)
        if kind in ("colour", "shape", "size", "follow_up") or about:
            assert (truth[about]["colour"], truth[about]["shape"]) in HELD_OUT
    answers = Counter(sample.turns[-1].answer for sample in samples)
    expected = {
        "colour": 6,
        "shape": 6,
        "size": 2,
        "position": 4,
        "count": 4,
        "relation": 4,
        "existence": 2,
        "reading": 16,
    }
    if kind in expected:
        assert set(answers.values()) == {48 // expected[kind]}
    if kind == "comparison":
        assert sum(s.turns[-1].question.endswith(f"{s.turns[-1].answer}?") for s in samples) == 24
    if kind == "existence":
        asked = [(s.turns[-1].question.rstrip("?").split()[-2:], s.turns[-1].answer, s.references[0]) for s in samples]
        pairs = [(" ".join(words), answer, truth) for words, answer, truth in asked if {*words} <= {*COLOURS, *SHAPES}]
        assert Counter(answer for _, answer, _ in pairs) == {"yes": 8, "no": 8}
        assert {name for name, _, _ in pairs} <= set(HELD_OUT_NAMES), "yes and no alike"
        near = [name for name, answer, truth in pairs if answer == "no" and all(word in truth for word in name.split())]
        assert len(near) >= 4


def test_a_stage_is_judged_by_the_exams_that_it_names():
    """An exam for each kind of question; captions are judged in two ways; a name that has no questions here is passed over."""
    source = Scenes()
    found = source.exams(("answers", "captions", "classes", "retrieval"), 3)
    assert [exam.name for exam in found] == [*KINDS, ""]
    assert [exam.judges for exam in found] == [("answer",)] * len(KINDS) + [("exact", "cider")]
    for kind, exam in zip((*KINDS, "caption"), found):
        assert exam.samples == source.exam(3, [kind]) and not exam.ranked
    [two] = source.exams(("two",), 3)
    assert (two.name, two.judges, two.samples) == ("", ("exact", "cider"), source.exam(3, ["caption of two"]))
    assert [exam.samples[0].turns[0].question.endswith(SHORT) for exam in source.exams(("mixture",), 1)[:3]] == [True] * 3
    assert source.exams(()) == [] and source.notes({}) == []


def test_small_print_is_half_as_large_and_in_a_quarter_of_its_cell():
    """What a tile of 48 pixels shows is as large as a number in a picture of 48."""
    for text, cell, corner in product(("10", "47"), CELLS, CELLS):
        (_, large), = boxes(Scene((), Sign(text, cell)))
        (_, small), = boxes(Scene((), Sign(text, cell, corner=corner)))
        sides = [[edges[2] - edges[0], edges[3] - edges[1]] for edges in (large, small)]
        assert sides[0] == pytest.approx([2 * side for side in sides[1]])
        middle = [(small[0] + small[2]) / 2, (small[1] + small[3]) / 2]
        for at, words in zip(middle, ((cell.split()[1], corner.split()[1]), (cell.split()[0], corner.split()[0]))):
            outer, inner = (word in ("right", "bottom") for word in words)
            assert abs(at - (0.125 + 0.5 * outer + 0.25 * inner)) < 0.02


def test_the_world_of_small_print():
    """Same facts to ask for, but signs of two digits, which all come in turn; the vocabulary is that of the plain world."""
    source = Scenes(0, 96, small_print=True)
    samples = source.exam(90, ["reading"])
    assert Counter(sample.turns[-1].answer for sample in samples) == dict.fromkeys(NUMBERS, 1)
    assert samples[0].images[0].size == (96, 96) and source.texts() == Scenes().texts()
    said = [source.draw("captions", Random(index)).caption for index in range(300)]
    assert 200 < sum("number" in text for text in said) and not any("digit" in text or "word" in text for text in said)
    pairs = [source.draw("pairs", Random(index)) for index in range(300)]
    numbers = [[re.findall(r"\d+", text) for text in (pair.caption, *pair.negatives)] for pair in pairs]
    wrong = [(right[0], other[0]) for right, *others in numbers for other in others if other and other != right]
    assert len(wrong) > 20 and all(sum(a == b for a, b in zip(*two)) == 1 for two in wrong), "one digit wrong, one right"


def test_an_exam_of_two_objects():
    samples = Scenes().exam(30, ["caption of two"])
    for sample in samples:
        (turn,) = sample.turns
        things = read(turn.answer).values()
        assert turn.kind == "caption" and turn.answer in sample.references
        assert len(things) == 2 and all(set(thing) == {"size", "colour", "shape"} for thing in things)
        assert any((thing["colour"], thing["shape"]) in HELD_OUT for thing in things)
    assert len({sample.references for sample in samples}) > 20


def test_samples_depend_on_nothing_but_their_numbers():
    one, two = Scenes(seed=1), Scenes(seed=2)
    for name in SETS:
        assert one.draw(name, Random(5)) == Scenes(seed=1).draw(name, Random(5)) != one.draw(name, Random(6))
        assert (one.draw(name, Random(5)) == two.draw(name, Random(5))) == (one.pool(name) == 0), "a seed has pools of its own"
        assert all(one.held_out(name, index) == two.held_out(name, index) for index in range(0, 600, 20))
        told = [re.sub(f"({'|'.join(COLOURS)}) ", "", text) if name in SILENT else text for text in one.held_out("pairs", 5).references]
        assert name in (*PAGED, "page texts") or list(one.held_out(name, 5).references) == told, "scene 5 is the same in every data set"
        assert one.held_out(name, 5).id == "scenes/val/5"
    diet = {"talk": 1, "captions": 3, "drills": 2}
    assert one.look(diet, "conversations", 3) == [one.held_out("captions", index) for index in range(3)]
    assert one.exam(3) == two.exam(3)
    # Another process hashes strings in another order, which must not show.
    made = "[s.draw('pairs', Random(f'x{i}')).negatives for i in range(40)], [x.turns for x in s.exam(6, ['existence'])]"
    code = f"from random import Random; from nanovlm.world.datasets import Scenes; s = Scenes(seed=1); print(({made}))"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    assert there.stdout == f"{eval(made, {'s': one, 'Random': Random})}\n"


def test_texts_hold_every_word():
    texts = Scenes().texts()
    assert 3900 < len(texts) <= 4000 and not any("<image>" in text for text in texts)
    assert texts == Scenes(0, 96, small_print=True).texts() != Scenes(1).texts()
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    every = [
        *COLOURS,
        *SHAPES,
        *SIZES,
        *DIGITS,
        *WORDS,
        *NUMBER_WORDS.values(),
        "top",
        "bottom",
        "left",
        "right",
        "above",
    ]
    every += ["below", "yes", "no", "describe", "corner", "written", "larger", "smaller", "crosses", "stars"]
    assert all(words[word] >= 5 for word in every), [word for word in every if words[word] < 5]


def test_unknown_names_are_answered_with_the_known_ones():
    for ask in (lambda: Scenes().draw("picture", Random(0)), lambda: Scenes().held_out("picture", 0)):
        with pytest.raises(UserError, match="no data set 'picture', only pairs.*captions.*talk.*told/talk"):
            ask()
    with pytest.raises(UserError, match="color.*colour, shape"):
        Scenes().exam(1, ["color"])


def test_speed_is_printed_not_judged(capsys):
    scenes = [random_scene(Random(index)) for index in range(1000)]
    start = time.process_time()
    for scene in scenes:
        render(scene)
    per_picture = (time.process_time() - start) / len(scenes)
    source, lines = Scenes(), [f"render {per_picture * 1e6:.0f} µs"]
    for name in SETS:
        start = time.process_time()
        for index in range(200):
            source.draw(name, Random(index))
        lines.append(f"{name} {(time.process_time() - start) / 200 * 1e6:.0f} µs")
    with capsys.disabled():
        print("\nscenes:", ", ".join(lines))


@pytest.mark.parametrize("name", ["unnamed drills", "unnamed captions"])
def test_some_pictures_have_colours_without_names(name):
    """Shapes in any colour, so that a shape in a new colour is no new thing; what is said of them is silent on colour."""
    for index in range(300):
        sample = Scenes().draw(name, Random(index))
        assert not {tuple(pixel) for pixel in np.array(sample.images[0]).reshape(-1, 3)} & set(COLOURS.values())
        assert not set(re.findall(r"\w+", sample.turns[0].answer)) & set(COLOURS)
        if name == "unnamed drills":
            check_talk(name, unmarked(sample), read(sample.references[0]))
        else:
            whole = {re.sub(f"({'|'.join(COLOURS)}) ", "", text) for text in sample.references}
            assert sample.turns[0].question == "<image>" and sample.turns[0].answer == sample.caption in whole
    named = [Scenes().draw(name.replace("unnamed ", ""), Random(index)) for index in range(100)]
    assert all({tuple(pixel) for pixel in np.array(s.images[0]).reshape(-1, 3)} & set(COLOURS.values()) for s in named)


def test_a_data_set_of_signs_asks_for_the_sign_where_there_is_one():
    """And is else short talk. In small print nine scenes of ten have a sign, but for those of four objects."""
    for world in (Scenes(), Scenes(0, 96, True)):
        asked = [world.draw("signs", Random(index)) for index in range(600)]
        signs = ["text" in str(read(sample.references[0]).values()) for sample in asked]
        assert [len(s.turns) == 1 and s.turns[0].kind == "reading" for s in asked] == pytest.approx(signs, abs=0)
        assert abs(sum(signs) - 600 * 0.9 * (0.9 if world.small_print else 0.4)) < 5 * (600 * 0.25) ** 0.5
