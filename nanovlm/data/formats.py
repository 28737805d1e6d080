"""Somebody's own pictures and texts: find out what a path holds, and hand it out in the views that training asks for.

Idea: each format is read into the same rows, a row into a record, and whatever is wrong with one is noted instead of raised,
so that `read` can stop at it in one sentence and `nanovlm.data.check` can list all of it. LLaVA conversations are those of
arXiv:2304.08485 and of docs/Finetune_Custom_Data.md of its code.

    PATH ─► scan: (record, row), … ─► Found: records with image paths, problems
                      │ read: stop at a problem, or (on_missing "skip") leave out pictures that are missing or broken
                      ▼
                    Records (records.py): splits, pictures, views

    a.jpg + a.txt, ...            one caption beside each picture, same name
    captions.jsonl / any .jsonl   {"image": "images/a.jpg", "caption": "a hat", "label": "hat", "split": "train"}
    COCO, VQAv2, ScienceQA .json  see benchmarks.py
    LLaVA .json                   [{"id": "7", "image": "a.jpg", "conversations": [
                                    {"from": "human", "value": "<image>\\nhat?"}, {"from": "gpt", "value": "yes"}]}, ..]
                                   (what making/instruct.py makes also tells a "caption", and the "kind" of an answer)

A "caption" may be a list: all of them count as right. Whether a table is one JSON value or one on each line, its content says.
"<image>" means a picture in the questions of conversations only, elsewhere it is text like any other.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

from PIL import Image

from nanovlm.data.benchmarks import Noting, Row, published_reader
from nanovlm.data.records import Records
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.errors import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
PICTURE_FOLDERS = ("", "images", "train2014", "val2014", "train2017", "val2017")  # where a JSON's pictures usually lie
WANTED = (
    'give a folder of pictures with a .txt beside each, a .jsonl of {"image", "caption"}, COCO captions JSON, '
    "LLaVA conversations JSON, VQAv2's questions or ScienceQA's problems.json"
)
VIDEO = re.compile(r"\A<video>(?!.*</video>)|\n<video>\Z", re.DOTALL)  # at the edge of a question; inside it is talk about HTML


class Missing(UserError):
    """There is no picture that could be read: a record to leave out where --on-missing is "skip"."""


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

    @contextmanager
    def noting(self, record: str) -> Iterator[None]:
        """A UserError inside becomes a problem of this record, and reading goes on."""
        try:
            yield
        except UserError as error:
            self.problems.append(Problem(record, str(error), isinstance(error, Missing)))

    def take(self, rows: Iterable[Row], folder: Path) -> "Found":
        """Make a sample of each row; `folder` is where they were read."""
        places = Places(folder)
        for record, row in rows:
            with self.noting(record):
                sample, split = _sample(record, row, places)
                self.samples.append(sample)
                self.splits.append(split)
        return self


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
    if os.path.isdir(path):
        return _scan_folder(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file or folder; {WANTED}.")
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path}: this is neither a folder nor a .json or .jsonl file; {WANTED}.")
    found = Found("captions", path.parent.resolve().name if path.name == "captions.jsonl" else path.stem)
    text = _read_text(path, f"{path}: it")
    table = _whole_table(path, text)
    if table is None:
        rows = _lines(path, text, found.noting)
    elif isinstance(table, list):
        rows = ((f"{path.name} record {i}", row) for i, row in enumerate(table))
    else:
        rows = published_reader(table)(path, table, found.noting)
    found.take(rows, path.parent)
    if any(sample.turns for sample in found.samples):
        found.kind = "conversations"
    return found


# ---- what a path holds, row by row

def _scan_folder(folder: Path) -> Found:
    if (folder / "captions.jsonl").is_file():
        return scan(folder / "captions.jsonl")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() in (".json", ".jsonl")]
    texts = {_stem(file): file for file in files if file.suffix.lower() == ".txt"}
    # A name like a picture's is a promise, to be checked later; under any other name the content decides.
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES
                or (_stem(file) in texts and file.suffix.lower() != ".txt" and _is_picture(file))]
    if any(_stem(picture) in texts for picture in pictures):
        found = Found("folder of pictures with texts", folder.resolve().name)
        return found.take(_pairs(pictures, texts, found.noting), folder)
    if len(tables) == 1:
        return scan(tables[0])
    if tables:
        raise UserError(f"{folder}: it holds {len(tables)} tables ({', '.join(file.name for file in tables[:5])}); "
                        "give the path of one of them.")
    if pictures:
        raise UserError(f"{folder}: it holds pictures ({pictures[0].name}) but no text for any; "
                        f"put a .txt of the same name beside each ({pictures[0].stem}.txt).")
    if below := next((file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES), None):
        raise UserError(f"{folder}: its pictures lie in a subfolder ({below.relative_to(folder)}); give the path of "
                        f"{below.parent}, with a .txt beside each picture.")
    raise UserError(f"{folder}: the folder holds no pictures with texts; {WANTED}.")


def _pairs(pictures: list[Path], texts: dict[str, Path], noting: Noting) -> Iterator[Row]:
    for picture in pictures:
        text = texts.get(_stem(picture))
        with noting(text.name if text else picture.name):
            if text is None:
                raise Missing(f"no text {picture.stem}.txt beside it; write one")
            caption = _read_text(text, "it")
            if not caption.strip():
                raise UserError("the text is empty; write what the picture shows")
            yield picture.name, {"image": picture.name, "caption": caption}
    for stem in sorted(texts.keys() - set(map(_stem, pictures))):
        with noting(texts[stem].name):
            raise Missing("no picture of the same name beside it")


def _whole_table(file: Path, text: str) -> dict | list | None:
    """The table, or None if each line is JSON of its own; which of them it is, the content says and not the file's ending."""
    try:
        table = json.loads(text)
    except ValueError as error:
        if file.suffix.lower() == ".jsonl" or str(error).startswith("Extra data"):  # behind a first line that is whole
            return None
        raise UserError(f"{file}: it cannot be read as JSON ({error}).") from error
    if isinstance(table, list) or published_reader(table):
        return table
    if file.suffix.lower() == ".jsonl":  # of one line
        return None
    raise UserError(f'{file}: it is neither a list of records nor an object with "images" and "annotations"; {WANTED}.')


def _lines(file: Path, text: str, noting: Noting) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        record = f"{file.name} line {number}"
        with noting(record):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"this is no JSON ({error}); write one object per line") from error
                yield record, row


# ---- a row becomes a sample

def _sample(record: str, row: object, places: "Places") -> tuple[Sample, str]:
    """The sample, with paths for images, and its split."""
    if not isinstance(row, dict):
        raise UserError('the record is no JSON object; write {"image": ..., "caption": ...}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write it, "\ud83d", but no text can hold it
        raise UserError(f"it holds half of a character ({error.object[error.start]!a}); mend or remove it") from error
    if row.get("video") or row.get("videos"):
        raise Missing('field "video": videos are not read, only pictures are; give some of its frames as pictures')
    sample = _conversation(record, row) if "conversations" in row else _captioned(record, row)
    split = row.get("split") or ""
    if split not in ("", "train", "val"):
        raise UserError(f'field "split" is {split!r}; it must be "train" or "val"')
    return replace(sample, images=tuple(map(places.find, sample.images))), split


def _captioned(record: str, row: dict) -> Sample:
    for key in ("image", "caption"):
        if key not in row:
            raise UserError(f'field "{key}" is missing; every record needs "image" and "caption" (or "conversations")')
    if not isinstance(row["image"], str) or not row["image"].strip():
        raise UserError('field "image" must be the path of one picture')
    captions = _captions(row["caption"])
    return Sample(record, (row["image"],), captions[0], captions, label=str(row.get("label") or ""))


def _captions(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError('field "caption" is empty or no text; write one or remove the record')
    return tuple(map(_one_line, texts))


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
    # The answer to the question with the picture; of a long one the first sentence names it best, 40 words at most.
    shown = next((turn for turn in turns if IMAGE in turn.question), turns[0])
    first_sentence = re.split(r"(?<=[.!?])\s", _one_line(shown.answer), maxsplit=1)[0]
    captions = _captions(row["caption"]) if row.get("caption") else (" ".join(first_sentence.split()[:40]),)
    return Sample(record, tuple(images), captions[0], captions, turns=turns, form=str(row.get("form") or ""))


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
        if speaker == "human" and VIDEO.search(message["value"].strip()):
            raise Missing(f"{where}: <video>: videos are not read, only pictures are; give some of its frames as pictures")
        if speaker == "gpt" and not message["value"].strip():
            raise UserError(f"{where}: the answer is empty; write one or remove the turn")
    if len(messages) % 2:
        raise UserError(f'field "conversations"[{len(messages) - 1}]: the last question has no answer')
    return tuple(Turn(asked["value"].strip(), said["value"].strip(), str(said.get("kind") or ""))
                 for asked, said in zip(messages[::2], messages[1::2]))


class Places:
    """Where the pictures of a table may lie: beside it, and beside its parent, as COCO keeps annotations/ next to train2017/."""

    def __init__(self, folder: Path):
        named = [base / name for base in (folder, folder.resolve().parent) for name in PICTURE_FOLDERS]
        self.roots = [root for root in named if root.is_dir()]
        self.others = sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir())

    def find(self, name: str) -> Path:
        if name.startswith("data:") or "://" in name:
            raise Missing(f'field "image" holds a picture\'s data or address ({name[:40]}), not its path; save it as a file '
                          "beside the table and give that")
        # The same letters may be written in two ways: é as one character, or as e with an accent behind it.
        for form in dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name))):
            for root in self.roots:
                if os.path.isfile(root / form):
                    return root / form
        other = next((f"; write {root.name}/{name}, where one lies" for root in self.others if os.path.isfile(root / name)), "")
        raise Missing(f'field "image": the picture {name[:80]} is missing{other}')


def _read_text(file: Path, it: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{it} cannot be read as UTF-8 text ({error})") from error


def _is_picture(file: Path) -> bool:
    try:
        Image.open(file).close()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _stem(file: Path) -> str:
    return normalize("NFC", file.stem)


def _one_line(text: str) -> str:
    return " ".join(text.split())
