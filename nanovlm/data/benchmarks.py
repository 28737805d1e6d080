"""COCO captions, VQAv2 and ScienceQA, as they are published, become rows: captions or conversations.

    COCO       captions_train2014.json: {"images": [{"id": 7, "file_name": "a.jpg"}, …],
                                         "annotations": [{"image_id": 7, "caption": "a hat"}, …]}

    VQAv2      v2_OpenEnded_mscoco_train2014_questions.json ─┐   all questions about a picture in one conversation
               v2_mscoco_train2014_annotations.json ─────────┘   (LLaVA-1.5 App. A.2), each answered in a word or two

    ScienceQA  problems.json ─► question ⏎ Context: hint or N/A ⏎ Options: (A) … (B) … ⏎ <image>            QCM
                                lecture solution The answer is B.                                           → LEA

Papers: Chen et al. 2015 (1504.00325); Goyal et al. 2017 (1612.00837); Lu et al. 2022 (2209.09513), the form QCM-LEA as LLaVA's
converter has it (LLaVA §5.2). Half of ScienceQA's questions have no picture; they stay in. Its "val" and "test" are both held
out here. Differs from the official VQA score in: of ten people's answers the most frequent one is the truth.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from nanovlm.data.sample import IMAGE, unmarked
from nanovlm.errors import UserError

Row = tuple[str, object]  # what messages call a record, and its JSON
Noting = Callable[[str], AbstractContextManager]  # a UserError inside is noted as a problem of the record named


def published_reader(table: object) -> Callable[[Path, dict, Noting], Iterator[Row]] | None:
    """Which of the three reads this table; None if it is of none of them."""
    if not isinstance(table, dict):
        return None
    if isinstance(table.get("images"), list) and isinstance(table.get("annotations"), list):
        return coco
    if isinstance(table.get("questions"), list):
        return vqav2
    return science_qa if table and all(isinstance(p, dict) and "choices" in p for p in table.values()) else None


def coco(file: Path, table: dict, noting: Noting) -> Iterator[Row]:
    """One row per picture; its several captions are references of one another."""
    captions = defaultdict(list)
    for i, note in enumerate(table["annotations"]):
        with noting(f"{file.name} annotations[{i}]"):
            note = note if isinstance(note, dict) else {}
            if not isinstance(note.get("caption"), str) or not note["caption"].strip():
                raise UserError('field "caption" is missing or empty')
            if "image_id" not in note:
                raise UserError('field "image_id" is missing or empty')
            captions[str(note["image_id"])].append(note["caption"])
    for i, image in enumerate(table["images"]):
        with noting(f"{file.name} images[{i}]"):
            if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
                raise UserError('field "id" or "file_name" is missing')
            if texts := captions.pop(str(image["id"]), None):
                yield f"{file.name} image {image['id']}", {"image": image["file_name"], "caption": texts}
    for image_id in captions:
        with noting(file.name):
            raise UserError(f'field "image_id" is {image_id}, which "images" does not list')


def vqav2(file: Path, table: dict, noting: Noting) -> Iterator[Row]:
    """One row of LLaVA's JSON for each picture."""
    answers = {note.get("question_id"): note for note in _annotations(file) if isinstance(note, dict)}
    by_picture: dict[int, list] = defaultdict(list)
    for i, asked in enumerate(table["questions"]):
        with noting(f"{file.name} questions[{i}]"):
            if not isinstance(asked, dict) or type(asked.get("image_id")) is not int or not {"question", "question_id"} <= set(asked):
                raise UserError('"image_id" (a number), "question" and "question_id" are needed')
            note = answers.get(asked["question_id"], {})
            if not isinstance(note.get("multiple_choice_answer"), str):
                raise UserError(f"the annotations have no answer to question_id {asked['question_id']}")
            said = {"from": "gpt", "value": note["multiple_choice_answer"], "kind": note.get("answer_type", "")}
            by_picture[asked["image_id"]] += [{"from": "human", "value": unmarked(str(asked["question"]))}, said]
    folder = table.get("data_subtype", "train2014")
    for number, turns in by_picture.items():
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        yield f"{file.name} image {number}", {"image": f"COCO_{folder}_{number:012}.jpg", "form": "short", "conversations": turns}


def _annotations(file: Path) -> list:
    beside = answers_of(file)
    try:
        notes = json.loads(beside.read_text(encoding="utf-8-sig"))["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: its answers are expected in {beside.name} beside it, which cannot be read "
                        f"({type(error).__name__}); put it there.") from error
    return notes


def answers_of(questions: Path) -> Path:
    """Beside the questions: the same name without "OpenEnded_", and with "annotations"."""
    return questions.with_name(questions.name.replace("OpenEnded_", "").replace("questions", "annotations"))


def science_qa(file: Path, table: dict, noting: Noting) -> Iterator[Row]:
    """One row for each problem; pictures in SPLIT/ID/ beside the file, or below its folder images/."""
    for number, problem in table.items():
        with noting(f"{file.name} problem {number}"):
            yield f"{file.name} problem {number}", _problem(number, problem)


def _problem(number: str, problem: dict) -> dict:
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f'field "answer" is {answer!r}; the number of one of its {len(choices or ())} "choices" is needed')
    if not str(problem.get("question") or "").strip():
        raise UserError('field "question" is empty')
    options = " ".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    asked = unmarked(f"{problem['question']}\nContext: {problem.get('hint') or 'N/A'}\nOptions: {options}")
    said = " ".join(str(part) for part in (problem.get("lecture"), problem.get("solution"), f"The answer is {chr(65 + answer)}.") if part)
    split, picture = problem.get("split", "train"), problem.get("image")
    row = {"conversations": [{"from": "human", "value": f"{asked}\n{IMAGE}" if picture else asked},
                             {"from": "gpt", "value": said, "kind": "science"}],
           "split": "train" if split == "train" else "val"}
    return row | ({"image": f"{split}/{number}/{picture}"} if picture else {})
