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
    documents .json, .jsonl       texts and pictures in turn, see documents.py: {"texts": ["a", null], "images": [null, "a.jpg"]}
    shards, .tar or a folder      any of these and pairs, read where they lie, see shards.py
    LLaVA .json                   [{"id": "7", "image": "a.jpg", "conversations": [
                                    {"from": "human", "value": "<image>\\nhat?"}, {"from": "gpt", "value": "yes"}]}, ..]
                                   (what making/instruct.py makes also tells a "caption", and the "kind" of an answer)

For "image" there may stand "clip", a folder of frames or a GIF that moves, or "frames", a list of paths: see clips.py.
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

from nanovlm.data import documents
from nanovlm.data.benchmarks import Noting, Row, published_reader
from nanovlm.data.places import Missing, Places
from nanovlm.data.records import Records
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.shards import Shard
from nanovlm.errors import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
WANTED = (
    'give a folder of pictures with a .txt beside each, a .jsonl of {"image", "caption"}, COCO captions JSON, '
    "LLaVA conversations JSON, VQAv2's questions, ScienceQA's problems.json, documents or .tar shards"
)
VIDEO = re.compile(r"\A<video>(?!.*</video>)|\n<video>\Z", re.DOTALL)  # at the edge of a question; inside it is talk about HTML


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
    left_out: list[str] = field(default_factory=list)  # pictures that are not fit for their page, which does without

    @contextmanager
    def noting(self, record: str) -> Iterator[None]:
        """A UserError inside becomes a problem of this record, and reading goes on."""
        try:
            yield
        except UserError as error:
            self.problems.append(Problem(record, str(error), isinstance(error, Missing)))

    def take(self, rows: Iterable[Row], places: Places | Shard) -> "Found":
        """Make a sample of each row; `places` is where their pictures lie."""
        for record, row in rows:
            with self.noting(record):
                sample, split, left_out = _sample(record, row, places)
                self.samples.append(sample)
                self.splits.append(split)
                self.left_out += left_out
        if any(sample.turns for sample in self.samples):
            self.kind = "documents" if any(sample.format == "pages" for sample in self.samples) else "conversations"
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
    return Records(found.name, found.samples, found.splits, skipped, on_missing, cache_side, found.left_out)


def scan(path: str | Path) -> Found:
    """Read everything but the pictures. Raises only where the path as a whole is unusable."""
    path = Path(path)
    if os.path.isdir(path):
        return _scan_folder(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file or folder; {WANTED}.")
    if path.suffix.lower() == ".tar":
        return _scan_shards([path], path.stem)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path}: this is neither a folder nor a .json or .jsonl file, nor a .tar; {WANTED}.")
    found = Found("captions", path.parent.resolve().name if path.name in ("captions.jsonl", "documents.jsonl") else path.stem)
    text = _read_text(path, f"{path}: it")
    table = _whole_table(path, text)
    if table is None:
        rows = _lines(path, text, found.noting)
    elif isinstance(table, list):
        rows = ((f"{path.name} record {i}", row) for i, row in enumerate(table))
    else:
        rows = published_reader(table)(path, table, found.noting)
    return found.take(rows, Places(path.parent))


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
        return found.take(_pairs(pictures, texts, found.noting), Places(folder))
    if shards := [file for file in files if file.suffix.lower() == ".tar"]:
        return _scan_shards(shards, folder.resolve().name)
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


def _scan_shards(files: list[Path], name: str) -> Found:
    found = Found("pairs in shards", name)
    for file in files:
        with found.noting(file.name):
            shard = Shard(file)
            found.take(shard.rows(found.noting), shard)
    return found


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

def _sample(record: str, row: object, places: Places | Shard) -> tuple[Sample, str, list[str]]:
    """The sample, with paths for images, its split, and pictures that it does without."""
    if not isinstance(row, dict):
        raise UserError('the record is no JSON object; write {"image": ..., "caption": ...}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write it, "\ud83d", but no text can hold it
        raise UserError(f"it holds half of a character ({error.object[error.start]!a}); mend or remove it") from error
    if row.get("video") or row.get("videos"):
        raise Missing('field "video": videos are not read, only pictures are; give some of its frames as pictures')
    split = row.get("split") or ""
    if split not in ("", "train", "val"):
        raise UserError(f'field "split" is {split!r}; it must be "train" or "val"')
    if documents.is_document(row):
        sample, left_out = documents.page(record, row, places.find)
        return sample, split, left_out
    sample = _conversation(record, row) if "conversations" in row else _captioned(record, row)
    find = places.clip if "clip" in row else places.find
    images = (tuple(map(find, entry)) if isinstance(entry, tuple) else find(entry) for entry in sample.images)
    return replace(sample, images=tuple(images)), split, []


def _shown(row: dict) -> list[str | tuple[str, ...]]:
    """The names of its pictures; those of a clip's frames stand together."""
    if (frames := row.get("frames")) is not None:
        if not isinstance(frames, list) or not frames or not all(isinstance(frame, str) and frame.strip() for frame in frames):
            raise UserError('field "frames": the clip has no frame; write a list of paths, of one at least')
        return [tuple(frames)]
    images = row.get("clip") or row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError('field "image" must be a path or a list of paths')
    return images


def _captioned(record: str, row: dict) -> Sample:
    for key in ("image", "caption"):
        if key not in row and (key == "caption" or not {"clip", "frames"} & set(row)):
            raise UserError(f'field "{key}" is missing; every record needs "image" and "caption" (or "conversations")')
    if not isinstance(row.get("image", ""), str) or len(shown := _shown(row)) != 1 or not str(shown[0]).strip():
        raise UserError('field "image" must be the path of one picture')
    captions = _captions(row["caption"])
    return Sample(record, tuple(shown), captions[0], captions, label=str(row.get("label") or ""))


def _captions(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError('field "caption" is empty or no text; write one or remove the record')
    return tuple(map(_one_line, texts))


def _conversation(record: str, row: dict) -> Sample:
    if row.get("id") is not None:
        record = f"{record} (id {row['id']})"
    images = _shown(row)
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
