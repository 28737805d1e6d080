"""VQAv2 and ScienceQA, from records as they are published; what decides for a letter."""

import json

import pytest
from PIL import Image

from nanovlm.data import formats
from nanovlm.data.prompts import CAPTION, SHORT
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.source import exam_of
from nanovlm.errors import UserError
from nanovlm.evaluate import judges
from nanovlm.metrics import option_letter, same_letter

# Records of the published files, shortened in number only.
QUESTIONS = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "train2014", "questions": [
    {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
    {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
    {"image_id": 262146, "question": "Is the sky blue?", "question_id": 262146000}]}
ANNOTATIONS = {"annotations": [
    {"question_type": "what is this", "multiple_choice_answer": "net", "answer_type": "other", "image_id": 458752,
     "question_id": 458752000, "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": 1}]},
    {"question_type": "what", "multiple_choice_answer": "pitcher", "answer_type": "other", "image_id": 458752, "question_id": 458752001},
    {"question_type": "is the", "multiple_choice_answer": "no", "answer_type": "yes/no", "image_id": 262146, "question_id": 262146000}]}
PROBLEMS = {
    "1": {"question": "Which of these states is farthest north?", "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
          "answer": 0, "hint": "", "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science",
          "lecture": "Maps have four cardinal directions, or main directions.",
          "solution": "To find the answer, look at the compass rose.", "split": "train"},
    "2": {"question": "Is this a sentence fragment?", "choices": ["yes", "no"], "answer": 1, "hint": "The dog ran home.", "image": None,
          "lecture": "", "solution": "It has a subject and a verb.", "split": "test"}}


@pytest.fixture
def vqa(tmp_path):
    (tmp_path / "train2014").mkdir()
    for number in (458752, 262146):
        Image.new("RGB", (9, 9), (number % 256, 0, 0)).save(tmp_path / "train2014" / f"COCO_train2014_{number:012}.jpg")
    file = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    file.write_text(json.dumps(QUESTIONS))
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps(ANNOTATIONS))
    return file


def test_vqav2_is_one_conversation_for_each_picture(vqa):
    found = formats.scan(vqa)
    assert not found.problems and found.kind == "conversations"
    first, second = found.samples
    assert [(t.question, t.answer, t.kind) for t in first.turns] == [
        ("<image>\nWhat is this photo taken looking through?", "net", "other"),
        ("What position is this man playing?", "pitcher", "other")]
    assert first.images[0].name == "COCO_train2014_000000458752.jpg" and second.turns[0].kind == "yes/no"


def test_in_a_mixture_the_form_is_said(vqa):
    """Of what has short answers, and of plain captions; elsewhere the questions stay as they are."""
    records = formats.read(vqa)
    for view, ending in (("conversations", "?"), ("prompted", f"?\n{SHORT}")):
        assert records.sample(view, "train", 0).turns[0].question.endswith(ending)
    (vqa.parent / "c.jsonl").write_text("".join(json.dumps({"image": f"train2014/COCO_train2014_{n:012}.jpg", "caption": f"a {n}"}) + "\n"
                                                for n in (458752, 262146)))
    asked = formats.read(vqa.parent / "c.jsonl").sample("prompted", "train", 0).turns[0].question
    assert asked.endswith(f"\n{CAPTION}")


def test_val2014_alone_is_split_as_any_set(vqa):
    """It has nothing to train on but itself: a tenth is held out."""
    (vqa.parent / "val2014").mkdir()
    for picture in list((vqa.parent / "train2014").iterdir()):
        picture.rename(vqa.parent / "val2014" / picture.name.replace("train", "val"))
    vqa.write_text(json.dumps({**QUESTIONS, "data_subtype": "val2014"}))
    assert [formats.read(vqa).size("conversations", split) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize(("change", "complaint"), [
    ({"image_id": "abc"}, '"image_id" (a number), "question" and'), ({"question_id": 7}, "have no answer to question_id 7")])
def test_what_is_wrong_with_vqav2(vqa, change, complaint):
    """One question is, and all of them are read to say so."""
    first, *others = QUESTIONS["questions"]
    vqa.write_text(json.dumps({**QUESTIONS, "questions": [{**first, **change}, *others]}))
    found = formats.scan(vqa)
    assert len(found.samples) == 2
    (problem,) = map(str, found.problems)
    assert problem.startswith(f"{vqa.name} questions[0]: ") and complaint in problem


def test_questions_without_their_annotations(vqa):
    vqa.with_name("v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(UserError, match="are expected in v2_mscoco_train2014_annotations.json"):
        formats.scan(vqa)


@pytest.fixture
def science(tmp_path):
    (tmp_path / "images" / "train" / "1").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "train" / "1" / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    return tmp_path / "problems.json"


def test_science_qa_is_qcm_lea(science):
    found = formats.scan(science)
    assert not found.problems and found.splits == ["train", "val"]
    first, second = found.samples
    assert first.turns[0].question == ("Which of these states is farthest north?\nContext: N/A\n"
                                       "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma\n<image>")
    assert first.turns[0].answer == ("Maps have four cardinal directions, or main directions. "
                                     "To find the answer, look at the compass rose. The answer is A.")
    assert second.images == () and second.turns[0].question.endswith("Context: The dog ran home.\nOptions: (A) yes (B) no")
    assert second.turns[0].answer == "It has a subject and a verb. The answer is B." and second.turns[0].kind == "science"


@pytest.mark.parametrize(("change", "complaint"), [({"answer": 4}, 'field "answer" is 4'), ({"choices": ["a"]}, "of its 1"),
                                                   ({"question": " "}, '"question" is empty'), ({"answer": True}, "True")])
def test_what_is_wrong_with_science_qa(science, change, complaint):
    science.write_text(json.dumps({**PROBLEMS, "1": {**PROBLEMS["1"], **change}}))
    found = formats.scan(science)
    assert len(found.samples) == 1 and complaint in str(found.problems[0])
    assert str(found.problems[0]).startswith("problems.json problem 1: ")


def test_a_mark_that_people_wrote_is_text(vqa, science):
    """In a question, a hint or a choice; answers are text anyway."""
    first, second, third = QUESTIONS["questions"]
    vqa.write_text(json.dumps({**QUESTIONS, "questions": [{**first, "question": "Is it an <image>?"},
                                                          {**second, "question": "<image>"}, third]}))
    turns = formats.scan(vqa).samples[0].turns
    assert [turn.question for turn in turns] == ["<image>\nIs it an < image>?", "< image>"]
    science.write_text(json.dumps({"1": {**PROBLEMS["1"], "hint": "An <image>."}, "2": {**PROBLEMS["2"], "choices": ["<image>", "no"]}}))
    found = formats.scan(science)
    assert not found.problems and [sample.turns[0].question.count("<image>") for sample in found.samples] == [1, 0]


def test_an_exam_asks_in_the_words_of_its_view(vqa):
    """What was trained with the line is judged with it."""
    records = formats.read(vqa)
    assert records.exam(view="prompted")[0].turns[0].question.endswith(SHORT)
    assert SHORT not in records.exam()[0].turns[0].question


class Parrot:
    """Says the same to everything; of an exam only what judges need."""

    def __init__(self, text: str):
        self.text = text

    def answer(self, samples: list, room: int, ranked: bool) -> list[str]:
        assert room == 1024, "the letter comes last"
        return [self.text] * len(samples)


def test_chance_is_the_most_frequent_letter_not_the_most_frequent_reason():
    samples = [Sample(str(i), ("picture",), turns=(Turn("q", f"reason {i}. The answer is {letter}.", "science"),))
               for i, letter in enumerate("CBBBBABBBB")]
    marks = judges.measure(Parrot("The answer is C."), exam_of("science", samples))
    assert marks == {"vqa_accuracy/science": {"value": 0.1, "n": 10, "chance": 0.8, "shuffled": 0.1}}


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), (" B ", "B"), ("B. Louisiana", "B"), ("It is north. The answer is C.", "C"), ("The answer is A. The answer is A.", None),
    ("The answer is A. No. The answer is B.", None), ("Because", None), ("", None), ("b", None), ("The answer is D", None),
    ("A cat", None)])
def test_what_decides_for_a_letter(text, letter):
    assert option_letter(text) == letter


def test_letters_are_compared_not_reasons():
    assert same_letter("Nonsense. The answer is B.", "It has a verb. The answer is B.") == 1
    assert same_letter("It has a verb. The answer is A.", "It has a verb. The answer is B.") == 0
    assert same_letter("", "") == 0 and exam_of("science", []).judges == ("letter",)
