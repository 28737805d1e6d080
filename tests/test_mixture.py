"""LLaVA-1.5's mixture: every answer is right in the form that is asked for, judged by the oracle of the scenes."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from scene_oracle import check_conversation, judge, read

from nanovlm import recipes
from nanovlm.data.conversation import encode
from nanovlm.data.prompts import CAPTION, GROUNDING, LETTER, PROMPTS, REGION, SETS, SHORT, prompted
from nanovlm.data.sample import Turn
from nanovlm.errors import UserError
from nanovlm.evaluate import judges
from nanovlm.metrics import box_hit, intersection_over_union
from nanovlm.runs.setting import make_tokenizer
from nanovlm.world import ask, datasets, mixture, told
from nanovlm.world.datasets import LESSONS, Scenes
from nanovlm.world.mixture import PARTS
from nanovlm.world.scene import HELD_OUT

AFTER = LESSONS["mixture"]["lists"]
SAID = {  # sentence → the short answer in it
    r"Yes, there is\.": "yes", r"No, there is not\.": "no", r"It is on this side: (\w+)\.": None, r"The sign says (\w+)\.": None,
    r"There (?:is|are) (\w+)\.": None, r"It is in the (top|bottom) (left|right)\.": None,
    r"It is a (large|small) (\w+ \w+) in the (\w+ \w+)\.": None, r"It is the (.+)\.": None, r"It is a (\w+)\.": None,
    r"It is (\w+)\.": None}
CORNERS = {(True, True): "top left", (False, True): "top right", (True, False): "bottom left", (False, False): "bottom right"}


def in_short(sentence: str) -> str:
    for pattern, answer in SAID.items():
        if found := re.fullmatch(pattern, sentence):
            if answer:
                return answer
            return ", ".join((" ".join(found.groups()[:2]), found[3])) if len(found.groups()) == 3 else " ".join(found.groups())
    raise AssertionError(f"{sentence!r} is no sentence of ours")


def boxed(box: str, truth: dict) -> dict[str, str]:
    """The thing in the cell where the box has its middle; the box is as large as it should be."""
    left, top, right, bottom = (float(x) for x in re.findall(r"\d\.\d\d", box))
    thing = truth[CORNERS[(left + right) / 2 < 0.5, (top + bottom) / 2 < 0.5]]
    assert 0 <= left < right <= 1 and (right - left > 0.36) == (thing["size"] == "large")
    return thing


def check(turns: tuple[Turn, ...], truth: dict) -> str:
    """Every answer is right; returns which part of the mixture the conversation is of."""
    first, *others = turns
    told, _, question = first.question.rpartition("<image>\n")
    assert not told and not any("<image>" in turn.question for turn in others)
    first = replace(first, question=question)
    if question == CAPTION:
        assert read(first.answer) == truth
        return "caption"
    if question.endswith(LETTER):
        for turn in (first, *others):
            asked, *choices, last = turn.question.split("\n")
            assert last == LETTER and turn.kind == "option"
            named = dict(choice.split(". ") for choice in choices)
            assert len(set(named.values())) == len(named) >= 2 and list(named) == list("ABCD")[:len(named)]
            assert named[turn.answer] == judge(asked, truth, None)[0]
        return "letters"
    if question.endswith((REGION, GROUNDING)):
        for turn in (first, *others):
            asked, last = turn.question.split("\n")
            box, phrase = (asked, turn.answer) if last == REGION else (turn.answer, asked)
            thing = boxed(box, truth)
            assert phrase == f"{thing['size']} {thing['colour']} {thing['shape']}"
        return "region" if question.endswith(REGION) else "grounding"
    if question.endswith(f"\n{SHORT}"):
        check_conversation([replace(first, question=question.removesuffix(f"\n{SHORT}")), *others], truth)
        return "short"
    if first.kind == "boxes":
        looks = question.removeprefix("boxes of ").rstrip(".").split(", ")
        for look, (said, box) in zip(looks, re.findall(r"([a-z ,]+) (\[.*?\])", first.answer), strict=True):
            assert said.strip(", ") == look and set(look.split()) <= set(boxed(box, truth).values())
        return "dense"
    if first.kind in ("notes", "census", "places", "sides", "letters"):
        check_conversation([first], truth)
        return "dense"
    check_conversation([replace(turn, answer=in_short(turn.answer)) for turn in (first, *others)], truth)
    return "sentences"


def test_every_answer_is_right_and_in_the_form_that_is_asked_for(monkeypatch):
    """And the parts come as often as they should: within five standard deviations of 3,000 draws."""
    monkeypatch.setattr(datasets, "render", lambda *_: "picture")
    parts, n = Counter(), 3000
    for index in range(AFTER, AFTER + n):
        sample = Scenes().sample("mixture", "train", index)
        truth = read(sample.references[0])
        if not sample.images:
            told, question = sample.turns[0].question.split("\n")
            assert read(told) == truth
            assert check((replace(sample.turns[0], question=question), *sample.turns[1:]), truth) == "sentences"
            parts["chat"] += 1
        elif sample.turns[0].question.endswith("colours aside."):
            check_conversation([replace(sample.turns[0], question="take notes, colours aside.")], truth)
        else:
            parts[check(sample.turns, truth)] += 1
    for part, weight in PARTS.items():
        p = 0.85 * weight / sum(PARTS.values())  # 15 of 100 are in colours without names
        assert abs(parts[part] - n * p) < 5 * (n * p * (1 - p)) ** 0.5, part


def test_lessons_come_first():
    first = Scenes().sample("mixture", "train", 17).turns
    assert len(first) == 1 and first[0].kind in ("notes", "census", "places", "sides", "letters", "boxes")


def read_beforehand(index: int) -> str:
    """The part that a text is of. Its answers follow from what is told, and boxes are told where boxes are asked for."""
    sample = Scenes().sample("told", "train", index)
    assert not sample.images and "<image>" not in sample.turns[0].question
    truth, (told, question) = read(sample.references[0]), sample.turns[0].question.split("\n", 1)
    boxes = re.findall(r"\[.*?\]", told)
    asked = re.findall(r"\[.*?\]", f"{question} {sample.turns[0].answer}")
    objects = {cell: thing for cell, thing in truth.items() if "shape" in thing}
    assert read(re.sub(r" \[.*?\]", "", told)) == (objects if asked else truth)
    assert set(asked) <= set(boxes) and len(boxes) == (len(objects) if asked else 0)
    part = check((replace(sample.turns[0], question=question), *sample.turns[1:]), truth)
    return "boxes" if asked and part == "dense" else part


def test_what_is_told_beforehand_is_the_mixture_without_pictures():
    """Boxes come in blocks, one in ten; in blocks with and without them, the parts come as often as they should."""
    begin, n = LESSONS["told"]["lists"], 2400
    parts = [read_beforehand(index) for index in range(begin, begin + n)]
    blocks = [parts[i:i + told.BLOCK] for i in range(0, n, told.BLOCK)]
    with_boxes = [block for block in blocks if set(block) <= set(told.ABOUT_BOXES)]
    assert not any(set(block) & set(told.ABOUT_BOXES) for block in blocks if block not in with_boxes)
    assert with_boxes
    words = {**told.WITHOUT_BOXES, "sentences": PARTS["sentences"] + PARTS["chat"]}  # talk without a picture looks like these
    words.pop("chat")
    for some, weights in ((with_boxes, told.ABOUT_BOXES), ([block for block in blocks if block not in with_boxes], words)):
        found = Counter(part for block in some for part in block)
        for part, weight in weights.items():
            m, p = found.total(), weight / sum(weights.values())
            assert abs(found[part] - m * p) < 5 * (m * p * (1 - p)) ** 0.5, part


def test_one_block_in_ten_is_about_boxes():
    """By the first text of each; and a block is a micro-batch of those who read them."""
    first, n = LESSONS["told"]["lists"], 2000
    begins = [Scenes().sample("told", "train", first + told.BLOCK * i).turns[0] for i in range(n)]
    p = told.BOXED_SHARE
    assert abs(sum("[" in turn.question for turn in begins) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    stage = recipes.get("lm/tiny-told").stages[0]
    assert stage.batch_size // stage.accumulate == told.BLOCK
    assert all(end % told.BLOCK == 0 for end in LESSONS["told"].values()), "no block is cut in two"


def test_the_world_of_small_print_asks_for_its_signs():
    """And is otherwise the mixture."""
    first, n = LESSONS["mixture"]["lists"], 1000
    small, plain = ([source.sample("mixture", "train", first + index).turns for index in range(n)] for source in (Scenes(0, 96, True), Scenes()))
    alone = [sum(len(turns) == 1 and turns[0].kind == "reading" for turns in of) for of in (small, plain)]
    p = 0.85 * 0.9 * 40 / 140  # with named colours, where nine of ten have a sign (four objects leave no room: fewer)
    assert 0.6 * n * p < alone[0] < 1.2 * n * p and alone[1] < 0.02 * n
    assert {turns[0].kind for turns in small} == {turns[0].kind for turns in plain}


def test_the_exam_asks_in_the_same_words():
    """Each kind, the ten of LLaVA too, about a held-out pair; what is asked without a picture has none."""
    exam = Scenes().exam(12, view="mixture")
    kinds = Counter(sample.turns[-1].kind for sample in exam)
    assert set(kinds) == {*ask.KINDS, *mixture.KINDS, "caption"} and set(kinds.values()) == {12}
    for sample in exam:
        truth, kind = read(sample.references[0]), sample.turns[-1].kind
        assert any((thing.get("colour"), thing.get("shape")) in HELD_OUT for thing in truth.values())
        if kind == "chat":
            told, question = sample.turns[0].question.split("\n")
            assert not sample.images and read(told) == truth
            check_conversation([Turn(question, in_short(sample.turns[0].answer))], truth)
        else:
            wanted = {"option": "letters", "region": "region", "grounding": "grounding", "caption": "caption"}
            assert check(sample.turns, truth) == wanted.get(kind, "short")
    with pytest.raises(UserError, match="no questions of kind 'region'"):
        Scenes().exam(1, ["region"])


def test_the_plain_exam_is_as_it_was():
    assert {sample.turns[-1].kind for sample in Scenes().exam(2)} == {*ask.KINDS, "caption"}
    assert not any(prompt in turn.question for sample in Scenes().exam(3) for turn in sample.turns
                   for prompt in PROMPTS)


# --- ScienceQA in small ---

def test_science_reasons_before_the_letter():
    """Half with a picture, half with a context that tells it; the reason names the right thing, the letter the right answer."""
    blind = 0
    train = [Scenes().sample("science", "train", LESSONS["science"]["dense"] + index) for index in range(400)]
    for sample in [*train, *Scenes().exam(30, view="science")]:
        (turn,) = sample.turns
        if turn.kind == "notes":
            continue
        truth, text = read(sample.references[0]), turn.question.removeprefix("<image>\n")
        question, context, options = text.split("\n")
        assert bool(sample.images) == turn.question.startswith("<image>") == (context == "Context: N/A")
        blind += not sample.images
        if not sample.images:
            assert read(context.removeprefix("Context: ")) == truth
        size, colour, shape, cell, letter = re.fullmatch(
            r"There is a (\w+) (\w+) (\w+) in the (\w+ \w+)\. The answer is ([A-C])\.", turn.answer).groups()
        assert {"size": size, "colour": colour, "shape": shape}.items() <= truth[cell].items()
        named = dict(re.findall(r"\(([A-C])\) ([a-z ]+?)(?= \(|$)", options))
        assert named[letter] == judge(question, truth, None)[0] and named[letter] in (size, colour, shape, cell)
    assert 150 < blind < 250
    exams = Scenes().exams(("science",), 5)
    assert [(exam.name, exam.judges, exam.room, len(exam.samples)) for exam in exams] == [
        ("science", ("letter",), 1024, 5), ("science_text", ("letter",), 1024, 5)]
    assert all(sample.turns[-1].kind == exam.name for exam in exams for sample in exam.samples)
    assert judges.JUDGES["letter"].score(["The answer is A."] * 2, [["x The answer is A."], ["y The answer is B."]]) == [1, 0]


# --- boxes ---

@pytest.mark.parametrize(("said", "hit"), [
    ("[0.10, 0.10, 0.50, 0.50]", 1), ("0.1 0.1 0.5 0.5", 1), ("[0.10, 0.10, 0.50, 0.31]", 1), ("[0.10, 0.10, 0.50, 0.29]", 0),
    ("[0.50, 0.50, 0.10, 0.10]", 0), ("[0.10, 0.10, 0.50]", 0), ("", 0), ("top left", 0), ("[0.60, 0.10, 0.90, 0.50]", 0),
    ("[0.10, 0.10, 0.50, 0.50, 0.60]", 0)])
def test_a_box_is_right_from_half_on(said, hit):
    assert box_hit(said, "[0.10, 0.10, 0.50, 0.50]") == hit


def test_intersection_over_union_by_counting():
    """Against counting unit squares."""
    boxes = [(0, 0, 4, 3), (2, 1, 6, 5), (4, 0, 6, 3), (1, 1, 2, 2), (0, 0, 4, 3)]
    for a in boxes:
        for b in boxes:
            cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
            want = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
            assert intersection_over_union(a, b) == pytest.approx(want)


def test_boxes_are_judged_as_boxes():
    judged_by = {exam.name: exam.judges for exam in Scenes().exams(("mixture",), 1)}
    assert judged_by == {kind: ("box" if kind == "grounding" else "answer",) for kind in (*ask.KINDS, *mixture.KINDS)}
    said, truth = ["[0.10, 0.10, 0.50, 0.49]"], [["[0.10, 0.10, 0.50, 0.50]"]]
    assert judges.JUDGES["box"].score(said, truth) == [1] and judges.JUDGES["answer"].score(said, truth) == [0]


def test_the_five_sentences_are_short_for_the_tiny_tokenizer():
    """They are in its corpus: in pieces of one letter each they would fill the context."""
    tokenizer, plain = (make_tokenizer(recipes.get(name), Scenes(), 0) for name in ("llava15/tiny", "llava/tiny"))
    for prompt in PROMPTS:
        assert len(tokenizer.encode(prompt)) <= len(prompt.split()) + 4 < len(plain.encode(prompt))
    assert len(tokenizer.encode(" number")) == 1 < len(plain.encode(" number"))
    ids, _ = encode(Scenes().exam(1, ["option"], view="mixture")[0].turns, tokenizer, "tiny")
    assert len(ids) < 80


# --- the published mixture ---

def test_the_sets_of_table_7():
    assert sum(part.thousands for part in SETS) == 664
    assert [part.name for part in SETS if not part.pictures] == ["ShareGPT"]
    assert {prompt for part in SETS for prompt in part.prompts} == set(PROMPTS)


def test_a_sentence_is_added_once():
    talk = (Turn("<image>\nhow many?", "two"), Turn("where?", "left"))
    asked = prompted(talk, SHORT)
    assert asked == (Turn(f"<image>\nhow many?\n{SHORT}", "two"), talk[1])
    assert prompted(asked, SHORT) == asked == prompted(asked, LETTER)
    assert prompted(talk, "") == talk
