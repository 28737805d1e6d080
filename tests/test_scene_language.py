"""Captions, questions and conversations of the embedded world, judged by the oracle in scene_oracle.py."""

import re
from collections import Counter
from random import Random

import pytest
from scene_oracle import HELD_OUT_NAMES, check_conversation, facts, read

from nanovlm.world.ask import KINDS, ask, conversation
from nanovlm.world.drills import census, places, sides
from nanovlm.world.say import SIDE_WORDS, captions, description, negatives, notes, say, vaguer, wordings
from nanovlm.world.scene import CELLS, COLOURS, PAIRS, SEEN, SHAPES, SIZES, Object, Scene, random_scene


def test_captions_state_the_whole_truth_and_only_it():
    rng, styles = Random(1), Counter()
    for _ in range(500):
        scene = random_scene(rng, PAIRS)
        every = captions(scene)
        assert 3 <= len(every) <= 8 and len(set(every)) == len(every)
        assert all(read(text) == facts(scene) for text in every)
        assert read(description(scene, rng)) == facts(scene)
        if len(facts(scene)) == 3:
            assert max(len(re.findall(r"\w+|[.,]", text)) for text in every) <= 28
        styles.update(wording.style for wording in wordings(scene))
    assert set(styles) == {"thing first", "cell first", "headline", "relation"}


@pytest.mark.parametrize(
    ("red", "blue", "of_red", "of_blue"),
    [
        ("top left", "top right", "left of", "right of"),
        ("bottom right", "bottom left", "right of", "left of"),
        ("bottom left", "top left", "below", "above"),
        ("top right", "bottom right", "above", "below"),
    ],
)
def test_relation_captions_name_the_right_side(red, blue, of_red, of_blue):
    scene = Scene((Object("red", "circle", "large", red), Object("blue", "square", "small", blue)))
    circle, square = f"a large red circle in the {red}", f"a small blue square in the {blue}"
    related = {say(scene, wording) for wording in wordings(scene) if wording[0] == "relation"}
    assert related == {f"{circle}, {of_red} {square}.", f"{square}, {of_blue} {circle}."}


def test_negatives_are_false_in_one_fact():
    rng, changes = Random(2), Counter()
    for _ in range(1500):
        scene = random_scene(rng, SEEN)
        wording = rng.choice(wordings(scene))
        false = negatives(scene, wording, rng, k=3, pairs=SEEN)
        assert len(set(false)) == 3 and not set(false) & set(captions(scene))
        for text in false:
            assert not any(name in text for name in HELD_OUT_NAMES)
            objects = [(thing["colour"], thing["shape"]) for thing in read(text).values() if "shape" in thing]
            assert len(set(objects)) == len(objects), "no scene has such twins: the look of it would give it away"
            changes[difference(facts(scene), read(text))] += 1
    assert set(changes) == {"colour", "shape", "size", "text", "cell", "swapped colour", "swapped cells"}
    assert min(changes.values()) > 0.02 * changes.total()


def test_a_vaguer_wording_leaves_facts_out_and_its_negatives_are_false_all_the_same():
    """What is left out is not told of any object; a negative differs in what is told, in one fact."""
    rng, left_out = Random(3), Counter()
    for _ in range(600):
        scene = random_scene(rng, SEEN)
        wording = vaguer(rng.choice(wordings(scene)), rng)
        true = say(scene, wording)
        left_out[wording.left_out] += 1
        for field, words in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
            assert any(re.search(rf"\b{word}\b", true) for word in words) == (field not in wording.left_out)
        false = negatives(scene, wording, rng, k=3, pairs=SEEN)
        assert len({true, *false}) == 4
        assert all(len(text.split()) == len(true.split()) for text in false if wording.style != "relation")
    # Of twenty; most often the colour. Bounds of five standard deviations: a false alarm once in a million seeds.
    often = {(): 6, ("colour",): 10, ("shape",): 1, ("size",): 1, ("colour", "size"): 2}
    assert set(left_out) == set(map(frozenset, often))
    assert all(abs(left_out[frozenset(what)] - 30 * n) < 5 * (30 * n * (1 - n / 20)) ** 0.5 for what, n in often.items())


def difference(truth: dict, told: dict) -> str:
    """Which one change leads from the truth to what is told; fails if it takes more than one."""
    assert truth != told
    if set(truth) != set(told):
        assert [truth[cell] for cell in truth if cell not in told] == [told[cell] for cell in told if cell not in truth]
        assert len(set(truth) - set(told)) == 1
        assert all(truth[cell] == told[cell] for cell in truth if cell in told)
        return "cell"
    changed = [cell for cell in truth if truth[cell] != told[cell]]
    if len(changed) == 1:
        old, new = truth[changed[0]], told[changed[0]]
        assert set(old) == set(new)
        (field,) = [field for field in old if old[field] != new[field]]
        return field
    one, two = changed
    if (truth[one], truth[two]) == (told[two], told[one]):
        return "swapped cells"
    for cell, other in ((one, two), (two, one)):
        assert {**truth[cell], "colour": truth[other]["colour"]} == told[cell]
    return "swapped colour"


def test_captions_of_different_scenes_differ():
    # All facts can be read back (above), so this could only fail where `read` and the grammar err together.
    rng, seen = Random(3), {}
    for _ in range(3000):
        scene = random_scene(rng, PAIRS)
        for text in captions(scene):
            assert seen.setdefault(text, facts(scene)) == facts(scene)


@pytest.mark.parametrize("pairs", [SEEN, PAIRS], ids=["seen", "all"])
def test_every_answer_is_right(pairs):
    rng, kinds, lengths = Random(4), Counter(), Counter()
    for _ in range(3000):
        scene = random_scene(rng, pairs)
        for kind in KINDS:
            if asked := ask(scene, rng, kind, pairs):
                assert asked.turn.kind == kind
                gives_away = rf"\b{asked.turn.answer}\b"
                assert kind in ("existence", "comparison") or not re.search(gives_away, asked.turn.question)
                check_conversation([asked.turn], facts(scene))
        lessons = [lesson for make in (census, places, sides) if (lesson := make(scene, rng, pairs))]
        check_conversation(lessons, facts(scene))
        talk = conversation(scene, rng, pairs)
        lengths[len(talk)] += 1
        kinds.update(turn.kind for turn in talk)
        check_conversation(talk, facts(scene))
        asked_once = [turn.question for turn in talk]
        assert len(asked_once) == len(set(asked_once))
        if pairs == SEEN:
            talk += (*lessons,)
            assert not any(name in turn.question for turn in talk for name in HELD_OUT_NAMES)
    assert set(kinds) == {*KINDS, "object", "caption"}, "drills are a data set of their own"
    assert {1, 2, 3} <= set(lengths) <= {1, 2, 3, 4}
    assert all(0.02 < kinds[kind] / kinds.total() < 0.2 for kind in KINDS), kinds


def test_notes_begin_with_any_fact():
    """Any order of things and of facts: what stands first tells nothing of what must follow."""
    rng, scene = Random(8), Scene((Object("red", "circle", "large", "top left"), Object("blue", "star", "small", "top right")))
    told = Counter(notes(scene, rng) for _ in range(20_000))
    assert all(read(text) == facts(scene) for text in told)
    assert len(told) == 2 * 24 * 24
    starts = Counter()
    for text, times in told.items():
        starts[re.match(r"top left|top right|\w+", text)[0]] += times
    # Eight starts, 2500 ± 47 each: further off than five standard deviations once in 200,000 seeds.
    assert len(starts) == 8 and all(abs(times - 2500) < 5 * 47 for times in starts.values())


def test_a_census_asks_for_what_is_there_and_what_is_not():
    rng, numbers = Random(9), Counter()
    for _ in range(1000):
        turn = census(random_scene(rng), rng, SEEN)
        looks = turn.question.removeprefix("count ").removesuffix(".").split(", ")
        assert len(looks) == len(set(looks)) == 5
        numbers.update(part.split()[-1] for part in turn.answer.removesuffix(".").split(", "))
    assert set(numbers) == {"none", "one", "two", "three", "four"}
    assert all(0.3 < numbers[word] / numbers.total() < 0.6 for word in ("none", "one"))


def test_places_and_sides_ask_for_every_answer():
    """Names and couples are asked once each; corners and sides are equally frequent, so none can be guessed."""
    rng, told = Random(10), {"find ": Counter(), "sides of ": Counter()}
    for _ in range(2000):
        scene = random_scene(rng, many=2 + rng.randrange(2))
        for make, opening in zip((places, sides), told):
            if turn := make(scene, rng):
                names = turn.question.removeprefix(opening).removesuffix(".").split(", ")
                parts = turn.answer.removesuffix(".").split(", ")
                assert len(set(names)) == len(names) <= 4
                told[opening].update(part.removeprefix(f"{name} ") for name, part in zip(names, parts, strict=True))
    assert set(told["find "]) == set(CELLS) and set(told["sides of "]) == set(SIDE_WORDS)
    assert all(0.2 < n / count.total() < 0.3 for count in told.values() for n in count.values())


def test_follow_ups_need_the_turn_before():
    rng, follow_ups = Random(5), 0
    for _ in range(4000):
        scene = random_scene(rng)
        talk = conversation(scene, rng)
        for index, turn in enumerate(talk):
            if turn.kind != "follow_up":
                antecedent = index
                continue
            follow_ups += 1
            before = " ".join(f"{t.question} {t.answer}" for t in talk[antecedent:index])
            assert turn.answer not in before, f"{turn} was told already: {before}"
            things = [list(thing.values()) + [cell] for cell, thing in facts(scene).items() if "shape" in thing]
            assert not all(turn.answer in thing for thing in things), "true of every object: no need to know which"
    assert follow_ups > 300


def test_training_answers_are_balanced():
    """Bounds of 4.9 standard deviations: a false alarm once in a million seeds for each of the nineteen numbers."""
    rng, answers = Random(6), {kind: Counter() for kind in KINDS}
    for _ in range(4000):
        scene = random_scene(rng)
        for kind in KINDS:
            if asked := ask(scene, rng, kind, SEEN):
                answers[kind][asked.turn.answer] += 1
    for kind, number in {"existence": 2, "size": 2, "position": 4, "relation": 4, "reading": 16}.items():
        total = answers[kind].total()
        share = 1 / number
        bound = 4.9 * (total * share * (1 - share)) ** 0.5
        assert len(answers[kind]) == number
        assert all(abs(count - total * share) < bound for count in answers[kind].values()), answers[kind]
    assert max(answers["count"].values()) < 0.65 * answers["count"].total()


def test_half_of_the_absent_pairs_are_near_misses():
    rng, near, absent = Random(7), 0, 0
    while absent < 1000:
        scene = random_scene(rng)
        asked = ask(scene, rng, "existence", SEEN)
        colour, shape = asked.turn.question.rstrip("?").split()[-2:]
        if asked.turn.answer == "no" and len(scene.objects) > 1 and {colour, shape} <= {*COLOURS, *SHAPES}:
            absent += 1
            words = {word for thing in facts(scene).values() for word in thing.values()}
            near += colour in words and shape in words
    assert near > 300
