"""VQAv2 and ScienceQA, as they are published, become conversations.

    VQAv2      v2_OpenEnded_mscoco_train2014_questions.json ─┐   all questions about a picture in one conversation
               v2_mscoco_train2014_annotations.json ─────────┘   (LLaVA-1.5 App. A.2), each answered in a word or two

    ScienceQA  problems.json ─► question ⏎ Context: hint or N/A ⏎ Options: (A) … (B) … ⏎ <image>            QCM
                                lecture solution The answer is B.                                           → LEA

Papers: Goyal et al. 2017 (1612.00837); Lu et al. 2022 (2209.09513), the form QCM-LEA as LLaVA's converter has it (LLaVA §5.2).
Half of ScienceQA's questions have no picture; they stay in. Its "val" and "test" are both held out here.
Differs from the official VQA score in: of ten people's answers the most frequent one is the truth.
"""

import json
from collections import defaultdict
from pathlib import Path

from nanovlm.errors import UserError

Rows = list[tuple[str, object]]


def is_vqav2(table: object) -> bool:
    return isinstance(table, dict) and isinstance(table.get("questions"), list)


def is_science_qa(table: object) -> bool:
    return isinstance(table, dict) and bool(table) and all(isinstance(p, dict) and "choices" in p for p in table.values())


def vqav2(file: Path, table: dict) -> Rows:
    """One row of LLaVA's JSON for each picture, and for each question that is broken a UserError."""
    answers = {note.get("question_id"): note for note in _annotations(file) if isinstance(note, dict)}
    by_picture: dict[int, list] = defaultdict(list)
    broken: Rows = []
    for i, asked in enumerate(table["questions"]):
        where = f"{file.name} questions[{i}]"
        if not isinstance(asked, dict) or type(asked.get("image_id")) is not int or not {"question", "question_id"} <= set(asked):
            broken.append((where, UserError('"image_id" (a number), "question" and "question_id" are needed')))
            continue
        note = answers.get(asked["question_id"])
        if not note or not isinstance(note.get("multiple_choice_answer"), str):
            broken.append((where, UserError(f"the annotations have no answer to question_id {asked['question_id']}")))
            continue
        by_picture[asked["image_id"]].append((asked["question"], note["multiple_choice_answer"], note.get("answer_type", "")))
    folder = table.get("data_subtype", "train2014")
    return broken + [(f"{file.name} image {number}", {
        "image": f"COCO_{folder}_{number:012}.jpg", "form": "short",
        "conversations": [turn for i, (question, answer, kind) in enumerate(asked) for turn in (
            {"from": "human", "value": f"<image>\n{question}" if i == 0 else question},
            {"from": "gpt", "value": answer, "kind": kind})]}) for number, asked in by_picture.items()]


def _annotations(file: Path) -> list:
    """Beside the questions: the same name without "OpenEnded_", and with "annotations"."""
    beside = file.with_name(file.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    try:
        notes = json.loads(beside.read_text(encoding="utf-8-sig"))["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: its answers are expected in {beside.name} beside it, which cannot be read "
                        f"({type(error).__name__}); put it there.") from error
    return notes


def science_qa(file: Path, table: dict) -> Rows:
    """One row for each problem; pictures in SPLIT/ID/ beside the file, or below its folder images/."""
    return [(f"{file.name} problem {number}", _problem(number, problem)) for number, problem in table.items()]


def _problem(number: str, problem: dict) -> dict | UserError:
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or type(answer) is not int or not 0 <= answer < len(choices):
        return UserError(f'field "answer" is {answer!r}; the number of one of its {len(choices or ())} "choices" is needed')
    if not str(problem.get("question") or "").strip():
        return UserError('field "question" is empty')
    options = " ".join(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    asked = f"{problem['question']}\nContext: {problem.get('hint') or 'N/A'}\nOptions: {options}"
    said = " ".join(filter(None, (problem.get("lecture"), problem.get("solution"), f"The answer is {chr(65 + answer)}.")))
    split, picture = problem.get("split", "train"), problem.get("image")
    row = {"conversations": [{"from": "human", "value": f"{asked}\n<image>" if picture else asked},
                             {"from": "gpt", "value": said, "kind": "science"}],
           "split": "train" if split == "train" else "val"}
    return row | ({"image": f"{split}/{number}/{picture}"} if picture else {})
