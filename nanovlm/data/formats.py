"""Somebody's own pictures and texts: find out what a path holds, and hand it out in the views that training asks for.

Idea: each format is read into the same records, and whatever is wrong with one is noted instead of raised, so that
`read` can stop at it in one sentence and `nanovlm.data.check` can list all of it. Formats: COCO captions
(arXiv:1504.00325); LLaVA conversations (arXiv:2304.08485, and docs/Finetune_Custom_Data.md of its code).

    PATH ─► scan ─► Found: records with image paths, problems
                      │ read: stop at a problem, or (on_missing "skip") leave out pictures that are missing or broken
                      ▼
                    Records (records.py): splits, pictures, views

    a.jpg + a.txt, ...            one caption beside each picture, same name
    captions.jsonl / any .jsonl   {"image": "images/a.jpg", "caption": "a hat", "label": "hat", "split": "train"}
    COCO .json                    {"images": [{"id": 7, "file_name": "a.jpg"}, ..],
                                   "annotations": [{"image_id": 7, "caption": "a hat"}, ..]}
    VQAv2, ScienceQA .json        see benchmarks.py
    LLaVA .json                   [{"id": "7", "image": "a.jpg", "conversations": [
                                    {"from": "human", "value": "<image>\\nhat?"}, {"from": "gpt", "value": "yes"}]}, ..]
                                   (what making/instruct.py makes also tells a "caption", and the "kind" of an answer)
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from nanovlm.data import benchmarks
from nanovlm.data.records import Records
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.errors import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
PICTURE_FOLDERS = ("", "images", "train2014", "val2014", "train2017", "val2017")  # where a JSON's pictures usually lie
WANTED = (
    'give a folder of pictures with a .txt beside each, a .jsonl of {"image", "caption"}, COCO captions JSON, '
    "LLaVA conversations JSON, VQAv2's questions or ScienceQA's problems.json"
)



@dataclass(frozen=True)
class Problem:
    """Why a record cannot be used; `picture` where it is only that a picture is missing or broken."""

    record: str
    reason: str
    picture: bool = False

    def __str__(self) -> str:
        return f"{self.record}: {self.reason}"


@dataclass
class Found:
    """What a path holds. `samples` have paths for images; splits[i] is "train", "val" or, where none is given, ""."""

    kind: str
    name: str
    samples: list[Sample] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read(path: str | Path, on_missing: str = "error", cache_side: int = 64) -> Records:
    """What `path` holds, ready to train on.

    on_missing: a missing or broken picture is an "error", or its record is left out ("skip") and noted in `.skipped`.
    cache_side: pictures of small sets are kept with this shorter side; 1.25 times what the model sees is plenty.
    """
    if on_missing not in ("error", "skip"):
        raise UserError(f"on_missing is {on_missing!r}; it must be error or skip.")
    found = scan(path)
    stop = [problem for problem in found.problems if on_missing == "error" or not problem.picture]
    if stop:
        more = f" ({len(stop) - 1} more: python -m nanovlm.data.check {path} lists them)" if len(stop) > 1 else ""
        raise UserError(f"{path}: {stop[0]}{more}.")
    skipped = [(problem.record, problem.reason) for problem in found.problems]
    return Records(found.name, found.samples, found.splits, skipped, on_missing, cache_side)


def scan(path: str | Path) -> Found:
    """Read everything but the pictures. Raises only where the path as a whole is unusable."""
    path = Path(path)
    if path.is_dir():
        return _scan_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder; {WANTED}.")
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path}: this is neither a folder nor a .json or .jsonl file; {WANTED}.")
    rows = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_json(path)
    name = path.parent.resolve().name if path.name == "captions.jsonl" else path.stem
    if benchmarks.is_vqav2(rows):
        rows = benchmarks.vqav2(path, rows)
    elif benchmarks.is_science_qa(rows):
        rows = benchmarks.science_qa(path, rows)
    if isinstance(rows, dict):
        return _scan_coco(path, name, rows)
    found, roots = Found("captions", name), _picture_roots(path)
    for record, row in rows:
        _add(found, record, row, roots)
    if any(sample.turns for sample in found.samples):
        found.kind = "conversations"
    return found


def _scan_folder(folder: Path) -> Found:
    if (folder / "captions.jsonl").is_file():
        return scan(folder / "captions.jsonl")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() in (".json", ".jsonl")]
    texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
    # A name like a picture's is a promise, to be checked later; under any other name the content decides.
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES
                or (file.stem in texts and file.suffix.lower() != ".txt" and _is_picture(file))]
    if any(picture.stem in texts for picture in pictures):
        return _scan_pictures_with_texts(folder, pictures, texts)
    if len(tables) == 1:
        return scan(tables[0])
    if tables:
        raise UserError(f"{folder}: it holds {len(tables)} tables ({', '.join(file.name for file in tables[:5])}); "
                        "give the path of one of them.")
    if pictures:
        raise UserError(f"{folder}: it holds pictures ({pictures[0].name}) but no text for any; "
                        f"put a .txt of the same name beside each ({pictures[0].stem}.txt).")
    raise UserError(f"{folder}: the folder holds no pictures with texts; {WANTED}.")


def _scan_pictures_with_texts(folder: Path, pictures: list[Path], texts: dict[str, Path]) -> Found:
    found = Found("folder of pictures with texts", folder.resolve().name)
    for picture in pictures:
        if picture.stem not in texts:
            found.problems.append(Problem(picture.name, f"no text {picture.stem}.txt beside it; write one", True))
            continue
        try:
            caption = _one_line(texts[picture.stem].read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            found.problems.append(Problem(texts[picture.stem].name, f"cannot be read as UTF-8 text ({error})"))
            continue
        if not caption:
            found.problems.append(Problem(texts[picture.stem].name, "the text is empty; write what the picture shows"))
            continue
        found.samples.append(Sample(picture.name, (picture,), caption, (caption,)))
        found.splits.append("")
    for stem in sorted(texts.keys() - {picture.stem for picture in pictures}):
        found.problems.append(Problem(texts[stem].name, "no picture of the same name beside it", True))
    return found


def _scan_coco(file: Path, name: str, table: dict) -> Found:
    """One record per picture; its several captions are references of one another."""
    found, captions, roots = Found("COCO captions", name), defaultdict(list), _picture_roots(file)
    for i, note in enumerate(table["annotations"]):
        caption = note.get("caption") if isinstance(note, dict) else None
        if not isinstance(caption, str) or not caption.strip() or "image_id" not in note:
            missing = "image_id" if isinstance(caption, str) and caption.strip() else "caption"
            found.problems.append(Problem(f"{file.name} annotations[{i}]", f'field "{missing}" is missing or empty'))
            continue
        captions[str(note["image_id"])].append(_one_line(caption))
    for i, image in enumerate(table["images"]):
        if not isinstance(image, dict) or "id" not in image or not isinstance(image.get("file_name"), str):
            found.problems.append(Problem(f"{file.name} images[{i}]", 'field "id" or "file_name" is missing'))
            continue
        texts = tuple(captions.pop(str(image["id"]), ()))
        if texts:
            row = {"image": image["file_name"], "caption": texts[0]}
            _add(found, f"{file.name} image {image['id']}", row, roots, references=texts)
    for image_id in captions:
        found.problems.append(Problem(file.name, f'field "image_id" is {image_id}, which "images" does not list'))
    return found


def _add(found: Found, record: str, row: object, roots: list[Path], references: tuple[str, ...] = ()) -> None:
    """One row becomes a sample or a problem."""
    try:
        if isinstance(row, UserError):
            raise row
        if isinstance(row, ValueError):
            raise UserError(f"this is no JSON ({row}); write one object per line")
        make = _conversation if isinstance(row, dict) and "conversations" in row else _captioned
        sample, split = make(record, row), row.get("split") or ""
        if split not in ("", "train", "val"):
            raise UserError(f'field "split" is {split!r}; it must be "train" or "val"')
    except UserError as error:
        found.problems.append(Problem(record, str(error)))
        return
    paths = [_find_picture(name, roots) for name in sample.images]
    if None in paths:
        missing = sample.images[paths.index(None)]
        found.problems.append(Problem(record, f'field "image": the picture {missing} is missing', True))
        return
    found.samples.append(replace(sample, images=tuple(paths), references=references or sample.references))
    found.splits.append(split)


def _captioned(record: str, row: object) -> Sample:
    if not isinstance(row, dict):
        raise UserError('the record is no JSON object; write {"image": ..., "caption": ...}')
    for key in ("image", "caption"):
        if key not in row:
            raise UserError(f'field "{key}" is missing; every record needs "image" and "caption" (or "conversations")')
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f'field "{key}" is empty or no text; write one or remove the record')
    caption = _one_line(row["caption"])
    return Sample(record, (row["image"],), caption, (caption,), label=str(row.get("label") or ""))


def _conversation(record: str, row: dict) -> Sample:
    if row.get("id") is not None:
        record = f"{record} (id {row['id']})"
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError('field "image" must be a path or a list of paths')
    turns = _turns(row["conversations"])
    marks = sum(turn.question.count(IMAGE) for turn in turns)
    if marks != len(images):
        raise UserError(f'{marks} "{IMAGE}" marks in field "conversations" but {len(images)} pictures in field '
                        '"image"; there must be one mark for each picture')
    # A long answer names the picture best in its first sentence; 40 words are what a pair can hold.
    first_sentence = re.split(r"(?<=[.!?])\s", _one_line(turns[0].answer), maxsplit=1)[0]
    caption = _one_line(str(row.get("caption") or "")) or " ".join(first_sentence.split()[:40])
    return Sample(record, tuple(images), caption, (caption,), turns=turns, form=str(row.get("form") or ""))


def _turns(messages: object) -> tuple[Turn, ...]:
    """differs: the released code drops a leading gpt turn; here it is an error, since something before it got lost."""
    if not isinstance(messages, list) or not messages:
        raise UserError('field "conversations" must be a list of {"from", "value"}, and not empty')
    for i, message in enumerate(messages):
        speaker, where = ("human", "gpt")[i % 2], f'field "conversations"[{i}]'
        if not isinstance(message, dict) or not isinstance(message.get("value"), str) or "from" not in message:
            raise UserError(f'{where} must be {{"from": "{speaker}", "value": "..."}}')
        if message["from"] != speaker:
            start = "the conversation starts with the assistant: " if i == 0 and message["from"] == "gpt" else ""
            raise UserError(f'{start}{where} is from "{message["from"]}" but must be from "{speaker}"; '
                            "human and gpt take turns, human first")
        if speaker == "gpt" and not message["value"].strip():
            raise UserError(f"{where}: the answer is empty; write one or remove the turn")
    if len(messages) % 2:
        raise UserError(f'field "conversations"[{len(messages) - 1}]: the last question has no answer')
    return tuple(Turn(asked["value"].strip(), said["value"].strip(), str(said.get("kind") or ""))
                 for asked, said in zip(messages[::2], messages[1::2]))


def _read_json(file: Path) -> dict | list[tuple[str, object]]:
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: it cannot be read as JSON ({error}).") from error
    if isinstance(table, dict) and isinstance(table.get("images"), list) and isinstance(table.get("annotations"), list):
        return table
    if benchmarks.is_vqav2(table) or benchmarks.is_science_qa(table):
        return table
    if isinstance(table, list):
        return [(f"{file.name} record {i}", row) for i, row in enumerate(table)]
    raise UserError(f'{file}: it is neither a list of records nor an object with "images" and "annotations"; {WANTED}.')


def _read_jsonl(file: Path) -> list[tuple[str, object]]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: it cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = error  # noted with the other problems of the file
            rows.append((f"{file.name} line {number}", row))
    return rows


def _picture_roots(table: Path) -> list[Path]:
    """The folders beside the table, and beside its parent: COCO keeps annotations/ next to train2017/."""
    roots = [base / name for base in (table.parent, table.parent.resolve().parent) for name in PICTURE_FOLDERS]
    return [root for root in roots if root.is_dir()]


def _find_picture(name: str, roots: list[Path]) -> Path | None:
    return next((root / name for root in roots if (root / name).is_file()), None)


def _is_picture(file: Path) -> bool:
    try:
        Image.open(file).close()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())
