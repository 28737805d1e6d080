"""Mixtures of a person's sets: how a record is asked, what is learned from, how often, and what is said of what cannot be used."""

import json
import re
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from random import Random

import pytest
import torch
from data_files import draw, write

from nanovlm import recipes
from nanovlm.data.check import main
from nanovlm.data.formats import read
from nanovlm.data.mixture import SAMPLING, Mixed
from nanovlm.data.sample import Sample, Task, Turn
from nanovlm.data.templates import ASKING, BRIEF, CAPTIONING, FIELDS, LLAVA, TEMPLATES, filled, instruction, names
from nanovlm.errors import UserError
from nanovlm.recipes.instructblip import SAMPLING as POWERS
from nanovlm.recipes.instructblip import balanced
from nanovlm.recipes.stage import resolve
from nanovlm.runs.setting import Job, Setting, leave_out_unfit, make_tokenizer, shares
from nanovlm.training.batches import Balanced, Epochs, MicroBatches, Mixture, make_collate

RECIPE = resolve(recipes.get("instructblip/tiny"), real=True)
KINDS = ("animals", "food", "tools")
QUESTION = {"question": "Which kind is it?", "answer": "kind"}


def things(folder, name, count, prefix="thing"):
    """Pictures with a caption, a label, a kind and keywords; every tenth is held out."""
    draw(folder, *(f"{name}/{i}.png" for i in range(count)))
    rows = [{"image": f"{i}.png", "caption": f"{prefix} {i}", "label": f"class {i % 4}", "kind": KINDS[i % 3], "words": [f"{prefix}s", f"word {i}"],
             "split": "val" if i % 10 == 0 else "train"} for i in range(count)]
    write(folder / name / "captions.jsonl", "\n".join(map(json.dumps, rows)))


def mixture(folder, more=None, **sets):
    return write(folder / "mix.json", {"mixture": sets, **(more or {})})


@pytest.fixture
def mix(tmp_path):
    """Sets of 90, 40 and 10 training records; "classes" is asked only."""
    for name, count in (("large", 100), ("middle", 44), ("small", 11), ("other", 40)):
        things(tmp_path, name, count, name)
    return mixture(tmp_path, captions={"data": "large", "group": "captioning"}, kinds={"data": "middle/captions.jsonl", "group": "image QA", **QUESTION},
                   asking={"data": "small", "group": ASKING, **QUESTION}, classes={"data": "other", "group": "classification", "held_out": True})


# ---- templates


def test_every_group_has_ten_to_fifteen_templates():
    for group, templates in TEMPLATES.items():
        assert 10 <= len(set(templates)) == len(templates) <= 15
        wanted = [] if group in CAPTIONING else ["answer"] if group == ASKING else ["question"]
        assert all(names(template) == wanted for template in templates), group
        assert group == ASKING or 2 <= sum(bool(BRIEF.search(one)) for one in templates) < len(templates), "some say that it is to be short"
    assert LLAVA not in TEMPLATES


PLAIN = Task()


def asked(task=PLAIN, n=300, **record):
    """All that one record is turned into: {question: answers}."""
    met = {}
    for i in range(n):
        (turn,), _ = instruction(Sample("a", ("a.png",), "hat", task=task, **record), Random(i))
        met.setdefault(turn.question, set()).add(turn.answer)
    return met


QUESTIONS = (Turn("<image>\nWhat says the sign?", "stop"),)


def test_a_record_is_asked_in_all_wordings_of_its_group():
    fields = (("ocr", "stop, 4th"),)
    met = asked(Task("QA with reading", fields=fields, answers=("stop", "STOP")), turns=QUESTIONS, form="short")
    assert set(met) == {f"<image>\nOCR tokens: stop, 4th. {one.format(question='What says the sign?')}" for one in TEMPLATES["QA with reading"]}
    assert set.union(*met.values()) == {"stop", "STOP"}
    met = asked(Task(ASKING), turns=QUESTIONS, form="short")
    assert set(met) == {f"<image>\n{one.format(answer='stop')}" for one in TEMPLATES[ASKING]} and set.union(*met.values()) == {"What says the sign?"}
    assert asked(references=("hat", "red hat")) == {f"<image>\n{one}": {"hat", "red hat"} for one in TEMPLATES["captioning"]}


def test_a_record_of_no_group_is_asked_by_what_it_is():
    """Captions for captioning, short answers for questions about pictures; whatever else is written stays."""
    assert all(question.removeprefix("<image>\n") in TEMPLATES["captioning"] for question in asked())
    assert len(asked(turns=QUESTIONS, form="short")) == 10 and list(asked(turns=QUESTIONS)) == ["<image>\nWhat says the sign?"]


def test_who_may_answer_at_length_is_not_told_to_be_brief():
    long = asked(Task("image QA"), turns=QUESTIONS, form="")
    assert 4 <= len(long) < 10 and not any(BRIEF.search(question) for question in long)


def test_where_all_templates_are_brief_they_stay():
    assert set(asked(Task("image QA", ("{question} Be brief.", "{question} Briefly:")), turns=QUESTIONS, form="")) == {
        "<image>\nWhat says the sign? Be brief.", "<image>\nWhat says the sign? Briefly:"}


def test_context_history_and_options_stand_where_they_belong():
    fields = {"context": "A map.", "history": "sunny? yes.", "options": "(a) red (b) blue", "question": "Which?"}
    assert filled("Q: {question} A:", fields) == "Context: A map. Dialogue so far: sunny? yes. Q: Which? Options: (a) red (b) blue. A:"
    assert filled("{history} {question} {options}", {**fields, "context": ""} | {"context": "B"}) == "Context: B sunny? yes. Which? (a) red (b) blue"


@pytest.mark.parametrize("template", ["{colour}?", "{question.upper}", "{question!r}", "{0}", "{}", "{question"])
def test_a_template_with_an_unknown_field(template):
    with pytest.raises(UserError, match="(but there are only question, answer, options, ocr, context, history|cannot be read)"):
        filled(template, dict.fromkeys(FIELDS, "a"))
    with pytest.raises(UserError, match="asks for {ocr}, which the record does not have"):
        filled("{ocr} {question}", {"question": "?"})


# ---- what is learned from, what is asked


def test_a_mixture_is_a_source(mix):
    source = read(mix)
    assert isinstance(source, Mixed) and source.name == "mix" and list(source.held_in) == ["captions", "kinds", "asking"]
    assert [(exam.name, len(exam.samples), exam.ranked) for exam in source.exams(("tasks",))] == [
        ("held_in/captions", 10, True), ("held_in/kinds", 5, True), ("held_in/asking", 2, True), ("held_out/classes", 4, True)]
    captions, kinds, asking, classes = (exam.samples[1] for exam in source.exams(("tasks",)))
    assert captions.turns[0].answer == "large 10" and captions.references == ("large 10",)
    assert "Which kind is it?" in kinds.turns[0].question and kinds.captions == ("food",)
    assert "food" in asking.turns[0].question and asking.captions == ("Which kind is it?",)
    assert classes.turns[0].options == ("class 0", "class 1", "class 2", "class 3") and classes.captions == ("class 2",)


def test_held_out_sets_are_in_nothing_that_is_learned(mix):
    source = read(mix)
    text = " ".join(source.texts())
    assert "large 7" in text and "middle 7" in text and "Which kind is it?" in text and "other" not in text and "class 1" not in text
    for view in ("pairs", "captions", "texts", "instructions"):
        samples = [source.sample(view, "train", i) for i in range(source.size(view, "train"))]
        assert len(samples) == 90 + 39 + 9 and not any("other" in sample.caption or "class" in sample.caption for sample in samples)
        assert {sample.id.split(",")[0] for sample in samples} == set(source.held_in)


def test_a_picture_with_its_caption_counts_once(tmp_path):
    """However many sets are made of one file, by whatever path; a text for each of them there is all the same."""
    things(tmp_path, "a", 20)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    file = mixture(tmp_path, one={"data": "a", "group": "captioning"}, two={"data": "b", "group": "knowledge QA", **QUESTION})
    source = read(file)
    assert [source.size(view, "train") for view in ("pairs", "captions", "texts", "instructions")] == [18, 18, 36, 36]
    told = source.sample("texts", "train", 20)
    assert told.told == ("thing 3",) and told.turns[0].answer == "animals" and told.turns[0].question.startswith("<image>\n")


def test_what_one_set_holds_out_no_other_learns(tmp_path):
    draw(tmp_path, *(f"{i}.png" for i in range(40)))
    for name, held in (("a", range(4)), ("b", range(4, 8)), ("c", range(8, 12))):
        rows = [{"image": f"{i}.png", "caption": f"{name} {i}", "split": "val" if i in held else "train"} for i in range(40)]
        write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    sets = {name: {"data": f"{name}.jsonl", "group": "captioning", "held_out": name == "c"} for name in "abc"}
    source = read(mixture(tmp_path, **sets))
    learned = [source.sample("captions", "train", i).caption for i in range(source.size("captions", "train"))]
    assert sorted(learned) == sorted(f"{name} {i}" for name in "ab" for i in range(12, 40))


def on_disk(folder, name, rows):
    write(folder / name / "rows.jsonl", "\n".join(map(json.dumps, rows)))


def learned(source):
    return sorted({record.id.split()[-1] for records in source.held_in.values() for record, _ in records.entries("instructions", "train")}, key=int)


@pytest.mark.parametrize("way", ["copied", "by another path", "by a link", "as a clip's frame", "through a moved record"])
def test_a_held_out_picture_is_known_again(tmp_path, monkeypatch, way):
    """The pictures 0 and 1 are asked by one set; the lines 1 and 2 of the other show them, and are moved to be asked too.

    A copy is known by its content, which is looked into only where pictures are kept in memory.
    """
    monkeypatch.setattr("nanovlm.data.records.KEPT_PICTURES", 100 if way == "copied" else 0)
    draw(tmp_path, *(f"a/{i}.png" for i in range(12)))
    shown, named = [f"{i}.png" for i in range(12)], [f"../a/{i}.png" for i in range(12)]
    if way == "copied":
        draw(tmp_path, *(f"b/{i}.png" for i in range(12)))
        for name in shown:
            (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
        named = shown
    if way == "by a link":
        (tmp_path / "b").symlink_to(tmp_path / "a")
    rows = [{"image": name, "caption": "hat"} for name in named]
    if way == "as a clip's frame":
        rows[:2] = [{"frames": [named[2], named[i]], "question": "What?", "answer": "hat"} for i in range(2)]
    if way == "through a moved record":
        turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "yes"}]
        rows[:2] = [{"image": [named[1], named[0]], "conversations": turns}, {"image": named[1], "caption": "hat"}]
    on_disk(tmp_path, "b", [row | {"split": "val" if i == 11 else "train"} for i, row in enumerate(rows)])
    asked = [{"image": shown[i], "caption": "hat"} for i in range(1 if way.startswith("through") else 2)]
    write(tmp_path / "a" / "asked.jsonl", "\n".join(map(json.dumps, asked)))
    sets = {"asked": {"data": "a/asked.jsonl", "group": "captioning", "held_out": True}, "b": {"data": "b/rows.jsonl", "group": "captioning"}}
    source = read(mixture(tmp_path, **sets))
    wanted = range(4, 12) if way == "as a clip's frame" else range(3, 12)  # the clips show picture 2, which line 3 shows too
    assert learned(source) == [str(line) for line in wanted]
    (_, held_in) = source.exams(("tasks",))
    assert held_in.name == "held_in/b" and {int(sample.id.split()[-1]) for sample in held_in.samples} == {*range(1, 13)} - {*wanted}


def test_all_of_a_held_out_set_is_asked(tmp_path):
    """Or what it calls "val"; one record is enough."""
    things(tmp_path, "learned", 20)
    splits = {"none": [""] * 12, "one": [""], "val": ["val"] * 3, "train": ["train"] * 3, "both": ["train"] * 5 + ["val"] * 2}
    for name, given in splits.items():
        draw(tmp_path, *(f"{name}/{i}.png" for i in range(len(given))))
        on_disk(tmp_path, name, [{"image": f"{i}.png", "caption": f"{name} {i}"} | ({"split": split} if split else {}) for i, split in enumerate(given)])
    held_out = {name: {"data": name, "group": "captioning", "held_out": True} for name in splits}
    path = mixture(tmp_path, learned={"data": "learned", "group": "captioning"}, **held_out)
    source = read(path)
    assert {exam.name: len(exam.samples) for exam in source.exams(("tasks",))} == {
        "held_in/learned": 2, "held_out/none": 12, "held_out/one": 1, "held_out/val": 3, "held_out/train": 3, "held_out/both": 2}
    assert [sample.caption for sample in source.exams(("tasks",))[-1].samples] == ["both 5", "both 6"]
    assert not any("0 training" in note for note in source.notes({})) and main([str(path), "--model", "instructblip"]) == 0


def test_where_everything_is_held_out_nothing_is_left_to_learn(tmp_path):
    things(tmp_path, "a", 20)
    rows = [{"image": f"a/{i}.png", "caption": "hat"} for i in range(20)]
    write(tmp_path / "all.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match='set a: nothing is left to learn from, .* mark with "split": "val" which of their records are to be asked'):
        read(mixture(tmp_path, a={"data": "a", "group": "captioning"}, b={"data": "all.jsonl", "group": "captioning", "held_out": True}))


def test_lists_of_answers_are_all_right(tmp_path):
    things(tmp_path, "a", 20)
    source = read(mixture(tmp_path, words={"data": "a", "group": "image QA", "question": "Which word goes with it?", "answer": "words"}))
    assert source.exams(("tasks",))[0].samples[0].references == ("things", "word 0")
    assert {source.of("words", "instructions", "train", 18 * i).turns[0].answer for i in range(40)} == {"things", "word 1"}


def test_a_clip_is_shown_whole(tmp_path):
    draw(tmp_path, *(f"run{i}/{frame}.png" for i in range(3) for frame in range(5)))
    rows = [{"clip": f"run{i}", "question": "Which way?", "answer": ("left", "right")[i % 2]} for i in range(3)]
    write(tmp_path / "clips.jsonl", "\n".join(map(json.dumps, rows)))
    source = read(mixture(tmp_path, clips={"data": "clips.jsonl", "group": "video QA"}))
    (shown,) = source.of("clips", "instructions", "train", 0).images
    assert len(shown) == 5
    setting = Setting(RECIPE, 0, torch.device("cpu"), source, make_tokenizer(RECIPE, source, 0))
    leave_out_unfit([Job(RECIPE, RECIPE.stages[-1])], setting)
    assert source.size("instructions", "train") == 2 and not source.skipped


# ---- how often


WORKED = {  # spec §4: size → percent, epochs of 11.52 million draws; proportional, sqrt, uniform. (It has 7.6 where 7.65 is right.)
    "Web CapFilt": (14e6, ("92.3", "59.9", "10.0"), ("0.76", "0.49", "0.08")), "OCR-VQA": (8e5, ("5.27", "14.3", "10.0"), ("0.76", "2.1", "1.4")),
    "COCO": (82e3, ("0.54", "4.58", "10.0"), ("0.76", "6.4", "14")), "VQAv2": (82e3, ("0.54", "4.58", "10.0"), ("0.76", "6.4", "14")),
    "LLaVA reasoning": (77e3, ("0.51", "4.44", "10.0"), ("0.76", "6.6", "15")), "LLaVA conversation": (58e3, ("0.38", "3.85", "10.0"), ("0.76", "7.7", "20")),
    "LLaVA detail": (23e3, ("0.15", "2.43", "10.0"), ("0.76", "12", "50")), "TextCaps": (21e3, ("0.14", "2.32", "10.0"), ("0.76", "13", "55")),
    "A-OKVQA": (17e3, ("0.11", "2.09", "10.0"), ("0.76", "14", "68")), "OKVQA": (9e3, ("0.06", "1.52", "10.0"), ("0.76", "19", "128"))}


def test_the_worked_example_to_the_printed_digits():
    sizes = {name: size for name, (size, _, _) in WORKED.items()}
    for i, by in enumerate(("proportional", "sqrt", "uniform")):
        for name, share in balanced(sizes, by).items():
            percent, epochs = WORKED[name][1][i], WORKED[name][2][i]
            for value, printed in ((100 * share, percent), (share * 60_000 * 192 / sizes[name], epochs)):
                assert f"{value:.{len(printed.partition('.')[2])}f}" == printed, (by, name)


def test_weights_are_roots():
    sizes = {name: size for name, (size, _, _) in WORKED.items()}
    roots = {name: Decimal(size).sqrt() for name, size in sizes.items()}
    assert balanced(sizes) == pytest.approx({name: float(root / sum(roots.values())) for name, root in roots.items()}, rel=0, abs=1e-12)
    by_hand = balanced(sizes, "sqrt", {"OKVQA": 2})
    assert by_hand["OKVQA"] / by_hand["COCO"] == pytest.approx(2 * (9 / 82) ** 0.5) and sum(by_hand.values()) == pytest.approx(1)
    assert set(SAMPLING) == set(POWERS)


def stage(**changes):
    return replace(RECIPE.stages[-1], steps=2500, batch_size=8, **changes)


def places(samples, n=20_000):
    return [samples[place] for place in range(n)]


class Named(Mixed):
    """Opens no picture."""

    def of(self, name, view, split, index):
        return Sample(f"{name}/{index % self.sets[name].size(view, split)}/{index}")


@pytest.mark.parametrize(("how", "factor"), [("sqrt", 1), ("proportional", 1), ("uniform", 1), ("sqrt", 3)])
def test_sets_are_drawn_by_their_weights(mix, how, factor):
    """20,000 places; further off than four standard deviations once in 16,000 draws. And of a set every record as often as any other."""
    table = json.loads(mix.read_text()) | {"sampling": how}
    table["mixture"]["kinds"]["factor"] = factor
    source = read(write(mix, table))
    source.__class__ = Named
    met = Counter(sample.id.split("/")[0] for sample in places(Balanced(source, shares(source), stage(), 0)))
    power = {"sqrt": 0.5, "proportional": 1, "uniform": 0}[how]
    weights = {"captions": 90**power, "kinds": factor * 39**power, "asking": 9**power}
    assert set(met) == set(weights)
    for name, weight in weights.items():
        n, p = 20_000, weight / sum(weights.values())
        assert abs(met[name] - n * p) < 4 * (n * p * (1 - p)) ** 0.5, name


def test_draws_depend_on_seed_and_place_only(mix):
    source = read(mix)
    source.__class__ = Named
    first, again, other = ([sample.id for sample in places(Balanced(source, shares(source), stage(), seed), 200)] for seed in (0, 0, 1))
    assert first == again and sum(a == b for a, b in zip(first, other)) < 20
    samples = Balanced(source, shares(source), stage(), 0)
    batches = MicroBatches(samples, stage(), 0, lambda rows, rng: [row.id for row in rows])
    assert [one for step in range(20, 25) for one in batches[step]] == first[160:200], "resumed at step 20"
    kinds = Counter(sample.id.split("/")[1] for sample in places(samples) if sample.id.startswith("asking"))
    n = kinds.total()
    assert len(kinds) == 9 and all(abs(count - n / 9) < 4 * (n * 8 / 81) ** 0.5 for count in kinds.values())
    assert len({sample.id for sample in places(samples, 200)}) == 200, "met again, a record is asked anew"


def test_a_record_is_asked_in_other_words_when_it_is_met_again(mix, tmp_path):
    source = read(mix)
    samples = Balanced(source, shares(source), stage(), 0)
    met = [samples[place] for place in range(800)]
    for name in source.held_in:
        assert len({s.turns[0].question for s in met if s.id == f"{name}, captions.jsonl line 2"}) > 1, name
    epochs = Epochs(read(tmp_path / "large"), stage(), 0)  # and so it is where there is one set only
    assert len({s.turns[0].question for s in (epochs[place] for place in range(900)) if s.id == "captions.jsonl line 2"}) > 3


def test_batches_of_one_set(mix):
    """With mixed="batches" a step has one set, which is still drawn by weight; of a person's mixture, and of the world's data sets."""
    source = read(mix)
    source.__class__ = Named
    one = stage(mixed="batches")
    world = type("World", (), {"draw": lambda self, name, rng: Sample(f"{name}/{rng.random()}")})()
    for samples, diet in ((Balanced(source, shares(source), one, 0), shares(source)), (Mixture(world, one, 0), one.data)):
        found = [sample.id.rpartition("/")[0].split("/0")[0] for sample in places(samples)]
        sets = [next(name for name in diet if id.startswith(name)) for id in found]
        steps = [set(sets[start:start + 8]) for start in range(0, 20_000, 8)]
        assert all(len(of_step) == 1 for of_step in steps)
        counts = Counter(name for of_step in steps for name in of_step)
        for name, weight in diet.items():
            p = weight / sum(diet.values())
            assert abs(counts[name] - 2500 * p) < 4 * (2500 * p * (1 - p)) ** 0.5, name
    assert one.parts(3) == [("", 1.0)] and stage(mixed="batches", accumulate=2).parts(0) == [("", 1.0)] * 2


def test_a_lesson_ends_between_two_batches_of_one_set():
    lesson = stage(mixed="batches", lessons=((0.0003, {"first": 1}),), data={"then": 1})  # ends at place 6 of 20,000
    assert [next(iter(lesson.diet(place))) for place in (0, 7, 8)] == ["first", "first", "then"]


# ---- what cannot be used


GOOD = {"data": "a", "group": "captioning"}


@pytest.mark.parametrize(("table", "said"), [
    ({"sets": {"mine": {"data": "a"}}}, "set mine: it is none of the paper's data sets .*so its \"group\" is needed"),
    ({"sets": {"a": {"data": "a", "group": "naming"}}}, "set a: field \"group\" is 'naming'; it must be one of captioning, "),
    ({"sets": {"a": GOOD, "b": {"data": "empty.jsonl", "group": "captioning"}}}, "set b: it has 0 usable records; at least two are needed"),
    ({"sets": {"a": GOOD | {"held_out": True}, "NoCaps": {"data": "a"}}}, "all of its data sets are held out, so there is nothing to learn from"),
    ({"sets": {"a": GOOD | {"templates": ["See {colour}:"]}}}, "set a: the template \"See {colour}:\" has the field {colour}, but there are only"),
    ({"sets": {"a": GOOD | {"templates": ["Read {ocr}:"]}}}, "set a: captions.jsonl line 1: the template .* asks for {ocr}, which the record does not"),
    ({"sets": {"a": {"data": "one.jsonl", "group": "classification"}}}, "set a: .*the answer \"hat\", so there are no candidates to rank"),
    ({"sets": {"a": GOOD | {"data": "gone"}}}, "set a: .*gone: there is no such file or folder"),
    ({"sets": {"a": GOOD}, "sampling": "root"}, "field \"sampling\" is 'root'; it must be one of proportional, sqrt, uniform"),
    ({"sets": {}}, "field \"mixture\" holds no data set"),
    ({"sets": {"a": {"group": "captioning"}}}, "set a: field \"data\" is missing"),
    ({"sets": {"a": GOOD | {"weight": 2}}}, "set a: there is no field \"weight\"; the fields are data, group"),
    ({"sets": {"a": GOOD | {"held_out": "yes"}}}, "set a: field \"held_out\" is 'yes'"),
    ({"sets": {"a": GOOD | {"factor": 0}}}, "set a: field \"factor\" is 0; it must be a number above 0"),
    ({"sets": {"a": {"data": "a", "group": "image QA"}}}, "captions.jsonl line 1: it has no question, which the group image QA needs"),
    ({"sets": {"a": {"data": "a", "group": "image QA", "question": "?", "answer": "colour"}}}, "field \"colour\" is missing or empty, which answers"),
    ({"sets": {"a": GOOD | {"answer": "kind"}}}, "field \"answer\" names what answers a question, and there is no field \"question\""),
    ({"sets": {"a": GOOD | {"ocr": "gone.json"}}}, "set a: field \"ocr\" names gone.json, which cannot be read as"),
    ({"sets": {"a": GOOD | {"ocr": "words.json"}}}, "set a: field \"ocr\" names words.json, where \"ocr_tokens\" of 7 is no list of texts"),
    ({"sets": {"a": GOOD | {"ocr": "others.json"}}}, "set a: the table that field \"ocr\" names has words for none of its records"),
    ({"sets": {"a/b": GOOD}}, "set a/b: a set's name must not be empty, nor hold \"/\""),
    ({"sets": {" ": GOOD}}, "a set's name must not be empty"),
    ({"sets": {"a": GOOD}, "smapling": "sqrt"}, "there is no field \"smapling\"; the fields are mixture, sampling"),
    ({"sets": {"a": GOOD | {"factor": True}}}, "set a: field \"factor\" is True, which is not what stands there"),
    ({"sets": {"a": {"data": "a", "group": "image QA", "question": "?"}}}, "set a: field \"question\" asks about every record; name in field \"answer\""),
    ({"sets": {"a": GOOD | {"templates": []}}}, "set a: field \"templates\" must be a list of texts, none of them empty"),
    ({"sets": {"a": GOOD | {"templates": ["See:", 5]}}}, "set a: field \"templates\" must be a list of texts, none of them empty"),
    ({"sets": {"a": {"data": "a", "group": LLAVA, "templates": ["See:"]}}}, "set a: the group LLaVA is asked as it is written, without templates"),
    ({"sets": {"a": GOOD | {"templates": ["<image> See:"]}}}, "set a: the template \"<image> See:\" must not hold \"<image>\""),
    *(({"sets": {"a": {"data": "a", "group": group, **extra, "templates": [template]}}},
       f"set a: the template .* must hold, of {{question}} and {{answer}}, {wanted}, as its group is {group}")
      for group, extra, template, wanted in (
        ("captioning", {}, "{question}", "neither"), ("captioning", {}, "Say {answer}", "neither"), ("image QA", QUESTION, "What is it?", "{question}"),
        ("image QA", QUESTION, "{question} {answer}", "{question}"), (ASKING, QUESTION, "Ask: {question}", "{answer}"),
        (ASKING, QUESTION, "{question} {answer}", "{answer}"), (ASKING, QUESTION, "Ask.", "{answer}"))),
])
def test_bad_input_is_one_sentence(tmp_path, table, said):
    things(tmp_path, "a", 12)
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "words.json", {"data": [{"image_id": 7, "ocr_tokens": "stop"}]})
    write(tmp_path / "others.json", {"data": [{"image_id": 7, "ocr_tokens": ["stop"]}]})
    write(tmp_path / "one.jsonl", "\n".join(json.dumps({"image": f"a/{i}.png", "caption": "hat", "label": "hat"}) for i in range(12)))
    sets = table.pop("sets")
    with pytest.raises(UserError, match=said) as error:
        read(mixture(tmp_path, table, **sets))
    assert "mix" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "name"), [
    ('{"mixture": {"a": {"data": "a"}, "b": {"data": "b"}, "a": {"data": "c"}}}', "a"), ('{"mixture": {"a": {"data": "a", "data": "c"}}}', "data")])
def test_no_name_may_stand_twice(tmp_path, text, name):
    with pytest.raises(UserError, match=f'mix.json: the name "{name}" stands twice in one place'):
        read(write(tmp_path / "mix.json", text))


def test_instructions_that_lose_their_beginning_are_counted(tmp_path):
    things(tmp_path, "a", 12)
    rows = [{"image": f"a/{i}.png", "question": "What?", "answer": "this", "context": "Long " * (400 if i < 3 else 70 if i < 7 else 1),
             "split": "train" if i else "val"} for i in range(12)]
    write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))
    source = read(mixture(tmp_path, b={"data": "b.jsonl", "group": "knowledge QA"}))
    setting = Setting(RECIPE, 0, torch.device("cpu"), source, make_tokenizer(RECIPE, source, 0))
    leave_out_unfit([Job(RECIPE, RECIPE.stages[-1])], setting)
    collate = make_collate(RECIPE, RECIPE.stages[-1], setting.tokenizer, RECIPE.build(RECIPE.stages[-1]).reads)
    assert 70 < len(collate.encode(source.sample("instructions", "train", 5))[0]) < 128, "of which the language model loses nothing"
    assert setting.notes == [("7 instructions of stage tune can be longer than the tokens that there is room for (128 in the language model, "
                              "64 in the Q-Former), and then lose their beginning.")]
    assert source.size("instructions", "train") == 11


def test_the_check_says_what_would_be_read_and_what_is_broken(mix, capsys):
    assert main([str(mix), "--model", "instructblip"]) == 0
    printed = capsys.readouterr().out
    assert "held in   captions (captioning): 90 to train on, 50.6% of the draws, 10 held out" in printed
    assert "held out  classes (classification): 4 held out" in printed and "problems: none" in printed
    assert re.search(r"asking, captions.jsonl line 2\n    <s>.*food.*⟦ Which kind is it\?</s>⟧", printed)
    (mix.parent / "small" / "3.png").write_text("no picture")
    table = json.loads(mix.read_text())
    table["mixture"]["classes"]["data"] = "gone"
    assert main([str(write(mix, table)), "--model", "instructblip"]) == 1
    printed = capsys.readouterr().out
    assert "problems: 2" in printed and "set asking: captions.jsonl line 4: " in printed and "set classes: " in printed and "gone: there is no such" in printed
