"""InstructBLIP's 26 data sets: the table is the paper's, and records as they are published become questions, answers and pictures."""

import json
from collections import Counter
from pathlib import Path

import pytest
from data_files import draw, write

from nanovlm.data.datasets import SETS
from nanovlm.data.formats import read, scan_entry
from nanovlm.data.mixture import plan
from nanovlm.data.places import Places
from nanovlm.data.rows import as_sample
from nanovlm.data.templates import GROUPS
from nanovlm.errors import UserError
from nanovlm.recipes.instructblip import HELD_IN


def test_the_table_is_the_papers():
    """§2.2, Fig. 2: 26 sets in 11 groups, 13 of them held out, four groups as a whole; Table 4 for sizes."""
    held_out = {name for name, one in SETS.items() if one.held_out}
    assert len(SETS) == 26 and len(held_out) == 13 and {one.group for one in SETS.values()} == set(GROUPS) and len(GROUPS) == 11
    assert held_out == {"NoCaps", "Flickr30K", "GQA", "VSR", "IconQA", "VizWiz", "ScienceQA", "TextVQA", "MSVD-QA", "MSRVTT-QA", "iVQA",
                        "Visual Dialog", "HatefulMemes"}
    assert HELD_IN == {name: one.thousands for name, one in SETS.items() if not one.held_out}, "the published recipes learn from these"
    assert {one.group for one in SETS.values()} - {one.group for one in SETS.values() if not one.held_out} == {
        "visual reasoning", "video QA", "dialogue", "classification"}
    assert {name for name, one in SETS.items() if one.ranked} == {  # §2.5
        "ScienceQA", "IconQA", "A-OKVQA", "HatefulMemes", "Visual Dialog", "MSVD-QA", "MSRVTT-QA"}
    assert SETS["Web CapFilt"].thousands == 14_000 and SETS["OKVQA"].thousands == 9


TEN = ["stop"] * 6 + ["4th"] * 4
DIALOGUE = {"data": {"questions": ["is it sunny", "how many dogs"], "answers": ["yes", "2", "no"], "dialogs": [
    {"image_id": 185565, "caption": "two dogs on a beach", "dialog": [
        {"question": 0, "answer": 0, "answer_options": [2, 0], "gt_index": 1}, {"question": 1, "answer": 1, "answer_options": [1, 2], "gt_index": 0}]}]}}
VERSIONS = {  # name → (file, its records as published, pictures, what is read of the last record)
    "A-OKVQA": ("aokvqa_v1p0_train.json", [{
        "split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH", "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"], "correct_choice_idx": 3, "direct_answers": ["ride", "cab"],
        "rationales": ["He has bags."]}] * 2, ["train2017/000000299207.jpg"],
        ("What is the man by the bags awaiting?", "cab", ("skateboarder", "train", "delivery", "cab"))),
    "OCR-VQA": ("dataset.json", {"761183272": {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.gif", "questions": ["Who wrote this book?", "Is it a comic?"],
        "answers": ["Sandra Boynton", "No"], "title": "Mom's", "authorName": "Sandra Boynton", "genre": "Calendars", "split": 1}},
        ["images/761183272.gif"], ("Is it a comic?", "No", ())),
    "TextVQA": ("TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": [{
        "question": "what is the sign?", "image_id": "003a8ae2ef43b901", "image_classes": ["Sign"], "question_id": 34602,
        "question_tokens": ["what"], "answers": TEN, "set_name": "val"}] * 2}, ["003a8ae2ef43b901.jpg"], ("what is the sign?", "stop", ())),
    "GQA": ("testdev_balanced_questions.json", {"201307251": {
        "semantic": [], "entailed": [], "question": "Is it overcast?", "imageId": "n161313", "isBalanced": True, "answer": "no",
        "fullAnswer": "No, it is clear.", "types": {}}} | {"2": {"imageId": "n161313", "question": "What is there?", "answer": "a tree"}},
        ["images/n161313.jpg"], ("What is there?", "a tree", ())),
    "VSR": ("test.jsonl", "\n".join([json.dumps({
        "image": "000000085637.jpg", "image_link": "http://images.cocodataset.org/train2017/000000085637.jpg",
        "caption": "The bench is left of the dog.", "label": 0, "relation": "left of", "annotator_id": 5, "vote_true_validator_id": []})] * 2),
        ["images/000000085637.jpg"], ("The bench is left of the dog. Is that true?", "no", ())),
    "IconQA": ("problems.json", {"7": {"question": "What number?", "choices": [], "answer": "6", "ques_type": "fill_in_blank", "split": "test"},
                                 "11": {"question": "What shape comes next?", "choices": ["circle", "star"], "answer": 1,
                                        "ques_type": "choose_txt", "grade": "kindergarten", "split": "test"},
                                 "12": {"question": "What colour?", "choices": ["red", "blue"], "answer": 0, "ques_type": "choose_txt", "split": "test"}},
               ["test/choose_txt/11/image.png", "test/choose_txt/12/image.png"], ("What colour?", "red", ("red", "blue"))),
    "ScienceQA": ("problems.json", {str(i): {
        "question": "Which is farthest north?", "choices": ["Maine", "Ohio"], "answer": 0, "hint": "Look at the map.", "image": picture,
        "lecture": "Maps.", "solution": "It is up.", "split": "test"} for i, picture in enumerate(("image.png", "image.png", None))},
        ["test/0/image.png", "test/1/image.png"], ("Which is farthest north?", "Maine", ("Maine", "Ohio"))),
    "VizWiz": ("val.json", [{
        "image": "VizWiz_val_00000000.jpg", "question": "Ok. What is this?", "answers": [{"answer": a, "answer_confidence": "yes"} for a in TEN],
        "answer_type": "other", "answerable": 1}] * 2, ["val/VizWiz_val_00000000.jpg"], ("Ok. What is this?", "stop", ())),
    "HatefulMemes": ("dev_seen.jsonl", "\n".join(json.dumps({"id": i, "img": "img/08291.png", "label": i % 2, "text": "white people is this"})
                                                 for i in range(2)), ["img/08291.png"], ("Is it hateful?", "yes", ("no", "yes"))),
    "Visual Dialog": ("visdial_1.0_val.json", DIALOGUE, ["VisualDialog_val2018_000000185565.jpg"], ("how many dogs?", "2", ("2", "no"))),
    "MSVD-QA": ("test_qa.json", [{"answer": answer, "id": 30933, "question": "what is chewing on a nut", "video_id": 1301}
                                 for answer in ("animal", "monkey")], ["vid1301/1.png", "vid1301/2.png"],
                ("what is chewing on a nut?", "monkey", ("animal", "monkey"))),
    "MSRVTT-QA": ("test_qa.json", [{"answer": answer, "category_id": 2, "id": 158581, "question": "what is being done?", "video_id": 7010}
                                   for answer in ("cook", "sing")], ["video7010/1.png"], ("what is being done?", "sing", ("cook", "sing"))),
}


def published(folder, name, file, table, pictures, **more):
    draw(folder, *pictures)
    write(folder / file, table)
    other = {"other": {"data": str(folder / file), "group": "LLaVA"}}  # so that one is held in
    write(folder / "mixture.json", {"mixture": {name: {"data": file, **more}, **other}})
    return scan_entry(folder / "mixture.json", plan(folder / "mixture.json").entries[0])


@pytest.mark.parametrize("name", VERSIONS)
def test_a_file_as_it_is_published(tmp_path, name):
    file, table, pictures, (question, answer, options) = VERSIONS[name]
    found = published(tmp_path, name, file, table, pictures)
    assert not found.problems and len(found.samples) == 2
    turn = found.samples[-1].turns[0]
    assert (turn.question, turn.answer, turn.options) == (f"<image>\n{question}", answer, options)
    (shown,) = found.samples[-1].images
    assert [str(path.relative_to(tmp_path)) for path in (shown if isinstance(shown, tuple) else (shown,))] == pictures[-2 if "MSVD" in name else -1:]
    assert found.samples[0].task.group == SETS[name].group


def test_every_reader_is_tested():
    assert {name for name, one in SETS.items() if one.read} == {*VERSIONS, "TextCaps", "A-OKVQA questions"}


def test_words_that_a_machine_has_read_come_from_their_own_table(tmp_path):
    """TextCaps with Rosetta's words; the first 30 of them."""
    words = [f"w{i}" for i in range(40)]
    write(tmp_path / "ocr.json", {"data": [{"image_id": "a", "ocr_tokens": words, "ocr_info": []}]})
    table = {"data": [{"image_id": name, "caption_str": "a stop sign", "reference_strs": ["a stop sign", "a red sign"]} for name in "ab"]}
    found = published(tmp_path, "TextCaps", "TextCaps_0.1_train.json", table, ["a.jpg", "b.jpg"], ocr="ocr.json")
    assert not found.problems and found.samples[0].references == ("a stop sign", "a red sign")
    assert [dict(sample.task.fields) for sample in found.samples] == [{"ocr": ", ".join(words[:30])}, {}]


def test_what_was_said_before_is_told(tmp_path):
    file, table, pictures, _ = VERSIONS["Visual Dialog"]
    first, second = published(tmp_path, "Visual Dialog", file, table, pictures).samples
    assert dict(first.task.fields) == {"context": "two dogs on a beach"}
    assert dict(second.task.fields) == {"context": "two dogs on a beach", "history": "is it sunny? yes."}


def test_a_folder_with_questions_and_their_answers(tmp_path):
    """OKVQA, in VQAv2's layout; one question of a picture at a time, any of them."""
    names = ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json")
    draw(tmp_path, *(f"okvqa/COCO_train2014_{i:012}.jpg" for i in range(2)))
    write(tmp_path / "okvqa" / names[0], {"questions": [
        {"image_id": i // 2, "question": f"Which sport, {i}?", "question_id": i} for i in range(4)]})
    write(tmp_path / "okvqa" / names[1], {"annotations": [{"question_id": i, "multiple_choice_answer": f"sport {i}"} for i in range(4)]})
    write(tmp_path / "mixture.json", {"mixture": {"OKVQA": {"data": "okvqa"}}})
    source = read(tmp_path / "mixture.json")
    met = Counter(source.of("OKVQA", "instructions", split, i).turns[0].answer for split in ("train", "val") for i in range(60))
    assert set(met) == {f"sport {i}" for i in range(4)} and source.sets["OKVQA"].size("instructions", "train") == 1


def test_a_record_that_is_not_as_published_is_one_sentence(tmp_path):
    table = [{"image_id": 1, "question": "?", "choices": ["a"]}, {"image_id": 1, "question": "?", "choices": ["a"], "correct_choice_idx": 7}, 5]
    found = published(tmp_path, "A-OKVQA", "a.json", table, [])
    assert [str(problem) for problem in found.problems] == [
        'a.json record 0: field "correct_choice_idx" is missing',
        "a.json record 1: it is not as this data set is published (list index out of range)",
        'a.json record 2: the record is no JSON object; write {"image": ..., "caption": ...}']


@pytest.mark.parametrize(("more", "said"), [
    ({"answer": {"text": "stop"}}, 'field "answer" must be a list of texts'), ({"answer": [["stop"]]}, 'field "answer" must be a list of texts'),
    ({"answer": None}, 'field "answer" must be a list of texts'), ({"answer": " "}, 'field "answer" is missing or empty'),
    ({"candidates": "stop"}, 'field "candidates" must be a list of texts'), ({"options": "stop"}, 'field "options" must be a list of texts'),
    ({"candidates": ["stop", " "]}, "one of the answers to choose from is empty"), ({"options": ["stop", ""]}, "one of the answers to choose from is empty"),
    ({"options": {"a": "stop"}}, 'field "options" must be a list of texts'), ({"ocr": 5}, 'field "ocr" must be a list of texts'),
    ({"history": ["sunny?", "yes"]}, 'field "history" must be a text'), ({"context": 5}, 'field "context" must be a text')])
def test_a_question_that_cannot_be_asked_is_one_sentence(more, said):
    row = {"question": "What says the sign?", "answer": "stop"}
    places = Places(Path(__file__).parent)
    with pytest.raises(UserError, match=said):
        as_sample("a", {**row, **more}, places)
    sample, _, _ = as_sample("a", {**row, "answer": 0, "candidates": [0, 1], "ocr": ["stop", 4]}, places)
    assert sample.turns[0].answer == "0" and sample.turns[0].options == ("0", "1") and dict(sample.task.fields) == {"ocr": "stop, 4"}
