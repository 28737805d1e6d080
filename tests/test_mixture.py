"""LLaVA-1.5's mixture: every answer is right in the form that is asked for, judged by the oracle of the scenes."""

from collections import Counter
from dataclasses import replace

import pytest
from scene_oracle import check_science, check_talk, read, read_told, unmarked

from nanovlm import recipes
from nanovlm.data.conversation import encode
from nanovlm.data.prompts import LETTER, PROMPTS, SETS, SHORT, prompted
from nanovlm.data.sample import Turn
from nanovlm.errors import UserError
from nanovlm.evaluate import judges
from nanovlm.metrics import box_hit, intersection_over_union
from nanovlm.recipes.llava15 import PUBLISHED_MIXTURE
from nanovlm.runs.setting import make_tokenizer, world_of
from nanovlm.world import ask, mixture
from nanovlm.world.datasets import Scenes
from nanovlm.world.scene import HELD_OUT


def test_the_exam_asks_in_the_same_words():
    """Each kind, the ten of LLaVA too, about a held-out pair; what is asked without a picture has none."""
    exam = Scenes().exam(12, view="mixture")
    kinds = Counter(sample.turns[-1].kind for sample in exam)
    assert set(kinds) == {*ask.KINDS, *mixture.KINDS, "caption"} and set(kinds.values()) == {12}
    for sample in exam:
        truth, kind = read(sample.references[0]), sample.turns[-1].kind
        assert any((thing.get("colour"), thing.get("shape")) in HELD_OUT for thing in truth.values())
        if kind == "chat":
            assert not sample.images and read_told(sample.told[0]) == (truth, [])
        else:
            assert sample.images and not sample.told
        asked = {"option": "letters", "region": "regions", "grounding": "grounding", "caption": "captions on demand", "chat": "sentences"}
        check_talk(asked.get(kind, "short"), unmarked(sample), truth)
    with pytest.raises(UserError, match="no questions of kind 'region'"):
        Scenes().exam(1, ["region"])


def test_the_plain_exam_is_as_it_was():
    assert {sample.turns[-1].kind for sample in Scenes().exam(2)} == {*ask.KINDS, "caption"}
    assert not any(prompt in turn.question for sample in Scenes().exam(3) for turn in sample.turns
                   for prompt in PROMPTS)


# --- ScienceQA in small ---

def test_science_reasons_before_the_letter():
    """Half with a picture, half with a context that tells it; test_scenes.py judges what is learned from."""
    for sample in Scenes().exam(30, view="science"):
        (turn,) = sample.turns
        shown = turn.kind == "science"
        assert bool(sample.images) == turn.question.startswith("<image>\n") == ("Context: N/A" in turn.question) == shown
        check_science(replace(turn, question=turn.question.removeprefix("<image>\n")), read(sample.references[0]))
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


def test_the_five_sentences_are_short_for_the_tiny_tokenizer(world_tokenizer):
    """They are in its corpus: in pieces of one letter each they would fill the context. Every tiny recipe has this one."""
    for prompt in PROMPTS:
        assert len(world_tokenizer.encode(prompt)) <= len(prompt.split()) + 4
    assert len(world_tokenizer.encode(" number")) == 1
    ids, _ = encode(Scenes().exam(1, ["option"], view="mixture")[0].turns, world_tokenizer, "tiny")
    assert len(ids) < 80
    for recipe in map(recipes.get, ("llava15/tiny", "llava15/tiny-hd", "blip2/tiny-t5")):
        assert make_tokenizer(recipe, world_of(recipe, 0), 0).to_dict() == world_tokenizer.to_dict()


# --- the published mixture ---

def test_the_sets_of_table_7():
    assert sum(part.thousands for part in SETS) == 664
    assert [part.name for part in SETS if not part.pictures] == ["ShareGPT"]
    assert {prompt for part in SETS for prompt in part.prompts} == set(PROMPTS)
    assert {part.name: part.thousands for part in SETS} == PUBLISHED_MIXTURE == recipes.get("llava15/7b").stages[1].data


def test_a_sentence_is_added_once():
    talk = (Turn("<image>\nhow many?", "two"), Turn("where?", "left"))
    asked = prompted(talk, SHORT)
    assert asked == (Turn(f"<image>\nhow many?\n{SHORT}", "two"), talk[1])
    assert prompted(asked, SHORT) == asked == prompted(asked, LETTER)
    assert prompted(talk, "") == talk
