"""InstructBLIP's tasks and Flamingo's pages, told: every answer follows from what is told, judged by the oracle in task_oracle.py."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from scene_oracle import check_conversation, check_sample, facts, in_short, judge, read
from task_oracle import bare, check_names, check_shots, check_task

from nanovlm import recipes
from nanovlm.data.conversation import encode
from nanovlm.data.prompts import SHORT
from nanovlm.data.sample import Sample, Turn
from nanovlm.evaluate import judges
from nanovlm.recipes.instructblip import TINY_SIZES
from nanovlm.world import pages, tasks
from nanovlm.world.ask import KINDS
from nanovlm.world.datasets import SETS, Scenes
from nanovlm.world.exams import TOLD
from nanovlm.world.mixture import KINDS as MIXED
from nanovlm.world.say import DESCRIPTIONS, captions, description
from nanovlm.world.scene import DIGITS, HELD_OUT, NUMBERS, PAIRS, SEEN, WORDS, random_scene

KIND = {"captions": "caption", "signs": "caption"}  # of a group's turn, where it is not the group's name


def told(scenes: tuple, turns: tuple[Turn, ...], rng: Random) -> Sample:
    text = " then ".join(description(scene, rng, DESCRIPTIONS[:1]) for scene in scenes)
    turns = (replace(turns[0], question=f"<image>\n{turns[0].question}"),)
    return Sample("", told=(text,), turns=turns, references=captions(scenes[0]))


@pytest.mark.parametrize("pairs", [SEEN, PAIRS], ids=["seen", "all"])
@pytest.mark.parametrize("group", tasks.NAMES)
def test_every_task_has_the_right_answer(group, pairs):
    """Or is a plain question, where the scene has no such task."""
    rng, kinds = Random(f"{group}/{len(pairs)}"), Counter()
    for _ in range(600):
        scene = random_scene(rng, pairs, texts=DIGITS + WORDS + NUMBERS)
        sample = told(*tasks.task(scene, rng, group, pairs), rng)
        kinds[check_task(sample)] += 1
        if pairs == SEEN:
            text = f"{sample.turns[0].question} {sample.turns[0].answer}"
            assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)
    assert set(kinds) <= {KIND.get(group, group), "questions"}
    assert kinds[KIND.get(group, group)] > 0.3 * 600


def test_told_tasks_are_of_all_groups():
    """Each as often as any other; further off than five standard deviations once in a million draws."""
    world, kinds, styles, n = Scenes(), Counter(), Counter(), 4400
    for i in range(n):
        sample = world.draw("told/tasks", Random(i))
        kinds["clips" if " then " in sample.told[0] else check_task(sample)] += 1  # of clips the test above knows more
        styles[sample.format] += 1
    assert set(kinds) == {KIND.get(group, group) for group in tasks.NAMES} and set(styles) == {"", "instructblip"}
    bound = 5 * (n / 11 * 10 / 11) ** 0.5
    for group in ("clips", "classes", "llava", "asking"):  # which every scene has
        assert abs(kinds[group] - n / 11) < bound, group
    assert abs(styles[""] - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize(("group", "answers"), [
    ("classes", ("yes", "no")), ("reasoning", ("yes", "no")), ("clips", ("left", "right", "up", "down"))])
def test_yes_and_no_and_every_way_are_as_frequent(group, answers):
    """What is guessed without reading is right no more often than it should be: bounds of five standard deviations."""
    rng, said = Random(3), Counter()
    for _ in range(3000):
        _, (turn,) = tasks.task(random_scene(rng, PAIRS), rng, group)
        said[turn.answer] += turn.kind == group and (group != "clips" or "which way" in turn.question)
    n, p = sum(said[answer] for answer in answers), 1 / len(answers)
    assert n > 300 and all(abs(said[answer] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 for answer in answers)


def test_every_wording_is_used():
    rng, asked = Random(4), set()
    for group in tasks.NAMES * 400:
        _, (turn,) = tasks.task(random_scene(rng, PAIRS), rng, group)
        asked.add(turn.question)
    for wordings in (tasks.CAPTION_WORDINGS, tasks.QUESTION_WORDINGS, tasks.ASKING_WORDINGS, tasks.TRUE, tasks.WRITTEN):
        for wording in wordings:
            before, _, behind = wording.partition("{}")
            assert any(before in text and text.endswith(behind) for text in asked), wording
    assert 10 <= len(tasks.QUESTION_WORDINGS) <= 15 and 10 <= len(tasks.CAPTION_WORDINGS) <= 15  # §2.1


def test_held_out_groups_are_whole_groups():
    """§2.2: visual reasoning, video, visual conversation and classification are never trained on in their form."""
    assert len(tasks.NAMES) == len(set(tasks.NAMES)) == 11
    assert set(tasks.HELD_OUT_GROUPS) == {"reasoning", "clips", "dialogue", "classes"}
    learned = {name.removeprefix("tasks/"): made.pool for name, made in SETS.items() if name.startswith("tasks/")}
    assert set(learned) == set(tasks.NAMES) - set(tasks.HELD_OUT_GROUPS)
    assert {f"tasks/{group}": size for group, size in learned.items()} == TINY_SIZES
    assert set(recipes.get("instructblip/tiny").stages[-1].data) == set(TINY_SIZES)


@pytest.mark.parametrize("group", sorted(set(tasks.NAMES) - set(tasks.HELD_OUT_GROUPS)))
def test_a_set_of_tasks_is_of_its_group(group):
    """A pool: the same picture and instruction for the same index; signs and what they say are always there; nothing held out is shown."""
    world, kinds = Scenes(3), Counter()
    for index in range(120):
        sample = world.pooled(f"tasks/{group}", index)
        (image,), (turn,) = sample.images, sample.turns
        assert image.size == (48, 48) and turn.question.startswith("<image>\n")
        kinds[turn.kind] += 1
        assert not any(f"{colour} {shape}" in f"{turn.question} {turn.answer}" for colour, shape in HELD_OUT)
    again = world.pooled(f"tasks/{group}", 119)
    assert again.turns == sample.turns and again.images[0].tobytes() == image.tobytes()
    assert set(kinds) == {KIND.get(group, group)}, "none of them fell back on a plain question"
    assert len({world.pooled(f"tasks/{group}", index).turns for index in range(40)}) > 20


# --- the exam ---

@pytest.fixture(scope="module")
def shown():
    return {exam.name: exam for exam in Scenes().exams(("tasks",), 60)}


def test_each_group_has_an_exam_of_held_out_scenes(shown):
    names = [f"held_{'out' if group in tasks.HELD_OUT_GROUPS else 'in'}/{group}" for group in tasks.NAMES]
    assert list(shown) == sorted(names, key=lambda name: name.startswith("held_out")), "what was learned from comes first"
    for name, exam in shown.items():
        assert exam.judges == ("task",) and exam.ranked and len(exam.samples) == 60
        for sample in exam.samples:
            (turn,), (image,) = sample.turns, sample.images
            assert turn.kind == KIND.get(name.split("/")[1], name.split("/")[1]) and turn.answer in sample.captions
            assert (type(image) is tuple and len(image) == 4) == (name == "held_out/clips")


def test_where_there_is_a_choice_the_options_are_all_and_hold_the_answer(shown):
    """Binary statements, lettered options, a field of an object, a direction: what is ranked has no other right answer."""
    for name, exam in shown.items():
        ranked = [sample.turns[-1] for sample in exam.samples if sample.turns[-1].options]
        assert all(turn.answer in turn.options and len(set(turn.options)) == len(turn.options) > 1 for turn in ranked)
        if name.startswith("held_out") and name != "held_out/reasoning":
            assert len(ranked) == 60
        elif name not in ("held_out/reasoning", "held_in/knowledge"):
            assert not ranked
        for turn in ranked:
            if "options:" in turn.question:
                assert turn.question.count("(") == len(turn.options) and all(f") {option}" in turn.question for option in turn.options)
    assert any("that is" in s.turns[-1].question and not s.turns[-1].options for s in shown["held_out/reasoning"].samples)


class Knowing:
    """Answers everything that does not depend on the picture's being the right one, wrongly; else as told."""

    def __init__(self, right):
        self.right = right

    def answer(self, samples, room, ranked):
        assert ranked
        return [sample.captions[-1] if self.right(sample) else "?" for sample in samples]


def test_groups_have_figures_of_their_own_and_a_mean(shown):
    """A caption and a question are right in any of their forms; held in and held out are apart."""
    class Source:
        def exams(self, names):
            return list(shown.values())

    class Stage:
        evaluate = ("tasks",)

    pupil = Knowing(lambda sample: "/captions/" in sample.id or "/asking/" in sample.id or "/clips/" in sample.id)
    pupil.stage = Stage
    figures = judges.evaluate(pupil, Source())
    assert figures["vqa_accuracy/held_in/captions"]["value"] == figures["vqa_accuracy/held_in/asking"]["value"] == 1
    assert figures["vqa_accuracy/held_in/questions"]["value"] == 0
    assert figures["vqa_accuracy/held_in"]["value"] == pytest.approx(2 / 7) and figures["vqa_accuracy/held_in"]["n"] == 7 * 60
    assert figures["vqa_accuracy/held_out"]["value"] == pytest.approx(1 / 4) and "vqa_accuracy" not in figures


def test_all_questions_that_count_as_right_have_that_answer():
    rng, several = Random(5), 0
    for _ in range(60):
        scene = random_scene(rng, PAIRS)
        _, (turn,) = tasks.task(scene, rng, "asking")
        answer = judge(turn.answer, facts(scene), None)[0]
        right = tasks.right_questions(scene, turn)
        assert right[0] == turn.answer and len(set(right)) == len(right)
        assert all(judge(question, facts(scene), None)[0] == answer for question in right)
        several += len(right) > 3
    assert several > 40


# --- exams of what is told ---

@pytest.fixture(scope="module")
def exams():
    return {exam.name: exam for exam in Scenes().exams(("told", "pages"), 12)}


def test_there_is_an_exam_for_all_that_a_reader_is_taught(exams):
    assert set(exams) == {*TOLD["told"], *TOLD["pages"]}
    assert {name.removeprefix("task/") for name in exams if name.startswith("task/")} == set(tasks.NAMES)
    assert {f"short/{kind}" for kind in KINDS} | {f"blip2/{kind}" for kind in KINDS} | {*KINDS, *MIXED} <= set(exams)
    judged = {"grounding": "box", "science_text": "letter", **dict.fromkeys(("caption", "task/captions", "task/signs", "task/asking"), "exact")}
    for name, exam in exams.items():
        assert exam.judges == (judged.get(name, "answer"),) and len(exam.samples) == 12, name
        assert not any(sample.images for sample in exam.samples)
    [same] = [exam for exam in Scenes(seed=5).exams(("told",), 12) if exam.name == "task/dialogue"]
    assert same.samples == exams["task/dialogue"].samples, "all are asked the same"


@pytest.mark.parametrize("name", TOLD["told"])
def test_what_is_asked_of_what_is_told_has_its_answer(exams, name):
    """In the format of who will ask so, and about held-out pairs."""
    group, _, kind = name.rpartition("/")
    for sample in exams[name].samples:
        assert sample.format == {"blip2": "blip2", "task": "instructblip"}.get(group, "blip2" if name == "caption" else "")
        *before, last = sample.turns
        if group == "task":
            assert check_task(sample) == KIND.get(kind, kind)
            if kind == "asking":
                assert last.answer in sample.references
                truth, right = read(sample.told[0]), judge(last.answer, read(sample.told[0]), None)[0]
                assert all(judge(question, truth, None)[0] == right for question in sample.references)
            continue
        truth = read(sample.references[0])
        assert any((thing.get("colour"), thing.get("shape")) in HELD_OUT for thing in truth.values())
        if name == "science_text":
            assert not sample.told and "<image>" not in last.question
            continue
        talk = {"short": "short", "blip2": "talk"}.get(group) or {
            "caption": "captions", "option": "letters", "region": "regions", "grounding": "grounding", "chat": "sentences on demand"}.get(kind, "talk")
        check_sample(f"told/{talk}", sample)
        assert last.kind == kind and len(before) == (kind == "follow_up") and (SHORT in sample.turns[0].question) == (talk == "short")


@pytest.mark.parametrize("name", TOLD["pages"])
def test_pages_are_asked_for_what_stands_on_them(exams, name):
    form, shots = name.split("/")
    for sample in exams[name].samples:
        assert sample.format == "flamingo" and len(sample.turns) == len(sample.told) == int(shots) + 1
        if form == "names":
            check_names(sample)
            assert shots == "0" or sample.told[-1] in sample.told[:-1], "what was never shown cannot be known"
        else:
            check_shots(sample)


# --- pages ---

def test_names_mean_one_thing_on_a_page_and_another_on_the_next():
    """Of the 32 names any may stand for any class: the same one twice is chance, once in 32 pages; ± five standard deviations."""
    met, same, again, known = {}, 0, 0, 0
    for i in range(3000):
        page = Scenes().draw("names", Random(i))
        here = check_names(page)
        assert 3 <= len(page.turns) <= pages.MOST_SHOTS + 2 and len(here) <= pages.KNOWN and page.format == "flamingo"
        assert set(here.values()) <= set(pages.NAMES) and {tuple(thing.split()) for thing in here} <= set(PAIRS)
        known += page.told[-1] in page.told[:-1]
        for thing, name in here.items():
            if thing in met:
                again += 1
                same += met[thing] == name
            met[thing] = name
    assert len(met) == len(PAIRS) and abs(same - again / 32) < 5 * (again * 31) ** 0.5 / 32
    assert 0.5 < known / 3000 < 0.95, "most of what is asked was shown; the rest teaches what a name is"


def test_a_page_that_asks_for_what_it_has_shown():
    rng = Random(6)
    for shots in range(pages.MOST_SHOTS + 1):
        for _ in range(100):
            turns, told = pages.names(rng, shots, asked_known=True)
            assert len(turns) == len(told) == shots + 1 and (not shots or told[-1] in told[:-1])
    fresh = [told for _, told in (pages.names(rng, 2) for _ in range(300))]
    assert any(told[-1] not in told[:-1] for told in fresh)


def test_shots_ask_the_same_kind_of_one_scene_after_another():
    """As in-context examples: where a scene has no such question it is asked for a colour."""
    lengths, kinds = Counter(), Counter()
    for i in range(2000):
        page = Scenes().draw("shots", Random(i))
        kinds[check_shots(page)] += 1
        lengths[len(page.turns)] += 1
        assert page.format == "flamingo" and len({turn.kind for turn in page.turns} - {"colour"}) <= 1
    assert set(lengths) == {1, 2, 3} and {*KINDS[:-1], "caption"} == set(kinds)


def test_a_name_is_said_where_its_picture_will_stand(world_tokenizer):
    """What is behind a told thing is token for token what is behind a picture."""
    for name in ("names", "shots", "told/tasks", "told/talk", "told/captions"):
        for i in range(200):
            sample = Scenes().draw(name, Random(i))
            style = sample.format or "tiny"
            ids, labels = encode(sample.turns, world_tokenizer, style, told=sample.told)
            shown, of_shown = encode(sample.turns, world_tokenizer, style)
            if style == "flamingo":
                for text in sample.told:
                    at = shown.index(world_tokenizer.image_id)
                    shown[at:at + 1] = world_tokenizer.encode(text)
                assert ids == shown
            else:
                behind = shown[shown.index(world_tokenizer.image_id) + 1:] if style == "tiny" else shown
                assert ids[-len(behind):] == behind and len(behind) > 4
            assert [i for i in labels if i >= 0] == [i for i in of_shown if i >= 0]


def test_a_wording_can_be_taken_off():
    """The oracle's own part: it would be no use if it let a wrong wording pass."""
    for wording in tasks.QUESTION_WORDINGS:
        assert bare(wording.format("what colour is the square?")) == "what colour is the square?"
    with pytest.raises(AssertionError, match="no person would understand"):
        judge("what color is the square?", {"top left": {"size": "large", "colour": "red", "shape": "square"}}, None)
    with pytest.raises(AssertionError):
        check_conversation([Turn("what colour is the square?", "blue")], {"top left": {"size": "large", "colour": "red", "shape": "square"}})
    assert in_short("It is a large red square in the top left.") == "large red square, top left"
