"""Somebody's own pictures and texts: find out what a path holds, and hand it out in the views that training asks for.

Idea: each format is read into the same rows, a row into a record (rows.py), and whatever is wrong with one is noted instead of raised,
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
    large .jsonl, many shards     they stay on the disk, see stored.py
    shards, .tar or a folder      any of these and pairs, read where they lie, see shards.py
    mixtures .json                {"mixture": {…}}: several of all these for instruction tuning, see mixture.py
    LLaVA .json                   [{"id": "7", "image": "a.jpg", "conversations": [
                                    {"from": "human", "value": "<image>\\nhat?"}, {"from": "gpt", "value": "yes"}]}, ..]
                                   (what making/instruct.py makes also tells a "caption", and the "kind" of an answer)

For "image" there may stand "clip", a folder of frames or a GIF that moves, or "frames", a list of paths: see clips.py.
A "caption" may be a list: all of them count as right. Whether a table is one JSON value or one on each line, its content says.
"<image>" means a picture in the questions of conversations only, elsewhere it is text like any other.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from PIL import Image
from tqdm import tqdm

from nanovlm.data.benchmarks import Noting, Row, answers_of, published_reader
from nanovlm.data.datasets import raw_rows
from nanovlm.data.lines import BUFFER, Lines, parsed
from nanovlm.data.mixture import Entry, Mixed, plan
from nanovlm.data.packed import Tar
from nanovlm.data.places import Missing, Places
from nanovlm.data.records import Records
from nanovlm.data.rows import as_sample
from nanovlm.data.sample import Sample
from nanovlm.data.shards import Shard
from nanovlm.data.stored import Stored
from nanovlm.errors import UserError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
WANTED = (
    'give a folder of pictures with a .txt beside each, a .jsonl of {"image", "caption"}, COCO captions JSON, '
    "LLaVA conversations JSON, VQAv2's questions, ScienceQA's problems.json, documents or .tar shards"
)


LARGE, MANY_LINES, MANY_SHARDS = 64 << 20, 100_000, 8  # bytes, records or shards: a set with more, or as many shards, stays on the disk


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
    entry: Entry | None = None  # of a mixture: then it is read as that set, and asked as that set asks
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
                several = self.entry.rows(row) if self.entry else [row]
                for number, one in enumerate(several, start=1):
                    sample, split, left_out = as_sample(f"{record} question {number}" if len(several) > 1 else record, one, places)
                    self.samples.append(sample)
                    self.splits.append(split)
                    self.left_out += left_out
        if any(sample.turns for sample in self.samples):
            self.kind = "documents" if any(sample.format == "pages" for sample in self.samples) else "conversations"
        return self


def read(path: str | Path, on_missing: str = "error", cache_side: int = 64, whole: bool = False) -> Records | Mixed | Stored:
    """What `path` holds, ready to train on.

    on_missing: a missing or broken picture is an "error", or its record is left out ("skip") and noted in `.skipped`.
    cache_side: pictures of small sets are kept with this shorter side; 1.25 times what the model sees is plenty.
    whole: also a large set is read into memory, for those who need all of it at once.
    """
    if on_missing not in ("error", "skip"):
        raise UserError(f"on_missing is {on_missing!r}; it must be error or skip.")
    if not whole and (parts := parts_of(path)):
        name = _name(parts[0].path) if len(parts) == 1 else Path(path).resolve().name
        return Stored(name, parts, on_missing, cache_side)
    whole = plan(path)
    if whole is None:
        return records_of(scan(path), path, on_missing, cache_side)
    return Mixed(whole, {entry.name: records_of(scan_entry(path, entry), path, on_missing, cache_side) for entry in whole.entries})


def parts_of(path: str | Path) -> list[Lines] | list[Tar]:
    """The files of a set that stays on the disk, with their indexes, which are made now if need be; [] of a smaller one."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    named = {suffix: [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")] for suffix in (".jsonl", ".json", ".tar", ".txt")}
    tables, shards = [file for file in files if file.name == "captions.jsonl"] or named[".jsonl"] + named[".json"], named[".tar"]
    pictures = {_stem(file) for file in files if file.suffix.lower() in PICTURE_SUFFIXES}
    if not pictures.isdisjoint(map(_stem, named[".txt"])) and tables[:1] != [path / "captions.jsonl"]:
        return []
    if shards and not tables and (len(shards) >= MANY_SHARDS or sum(file.stat().st_size for file in shards) > LARGE):
        return [Tar(file) for file in tqdm(shards, desc="opening shards", leave=False, disable=None)]
    return [Lines(tables[0])] if len(tables) == 1 and _stays(tables[0]) else []


def _stays(table: Path) -> bool:
    """Whether it is a table of lines with more than LARGE bytes or MANY_LINES records."""
    large = table.stat().st_size > LARGE
    with table.open("rb") as file:
        begin = file.readline(LARGE).strip().removeprefix(b"\xef\xbb\xbf")
        many = large or sum(block.count(b"\n") for block in iter(lambda: file.read(BUFFER), b"")) > MANY_LINES
    if large and begin.startswith(b"["):
        raise UserError(f"{table}: a list of {table.stat().st_size >> 20} MiB is too large to be read whole by every process; make lines of it, which "
                        f"stay on the disk: python -m nanovlm.data.check {table} --lines {table.with_suffix('.jsonl')}.")
    return many and begin.startswith(b"{") and (table.suffix.lower() == ".jsonl" or begin.endswith(b"}"))  # COCO's are of one line


def _name(path: Path) -> str:
    return path.parent.resolve().name if path.name in ("captions.jsonl", "documents.jsonl") else path.stem


def records_of(found: Found, path: str | Path, on_missing: str, cache_side: int) -> Records:
    stop = [problem for problem in found.problems if on_missing == "error" or not problem.picture]
    if stop:
        more = f" ({len(stop) - 1} more: python -m nanovlm.data.check {path} lists them)" if len(stop) > 1 else ""
        raise UserError(f"{path}: {stop[0]}{more}.")
    skipped = [(problem.record, problem.reason) for problem in found.problems]
    held_out = found.entry is not None and found.entry.held_out
    return Records(found.name, found.samples, found.splits, skipped, on_missing, cache_side, found.left_out, held_out)


def scan_entry(path: str | Path, entry: Entry) -> Found:
    """A set of the mixture `path`, ready to be asked."""
    try:
        found = scan(entry.data, entry)
        found.samples = entry.finished(found.samples)
    except UserError as error:
        raise UserError(f"{path}, set {entry.name}: {str(error).rstrip('.')}.") from error
    found.name = f"{Path(path).stem}, set {entry.name}"
    return found


def scan(path: str | Path, entry: Entry | None = None) -> Found:
    """Read everything but the pictures. Raises only where the path as a whole is unusable. entry: of a mixture, as which it is read."""
    path = Path(path)
    if os.path.isdir(path):
        return _scan_folder(path, entry)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file or folder; {WANTED}.")
    if path.suffix.lower() == ".tar":
        return _scan_shards([path], path.stem, entry)
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path}: this is neither a folder nor a .json or .jsonl file, nor a .tar; {WANTED}.")
    found = Found("captions", _name(path), entry=entry)
    text = _read_text(path, f"{path}: it")
    published = entry is not None and entry.read is not None
    table = _whole_table(path, text, published)
    if published and table is not None:
        rows = ((f"{path.name} {record}", row) for record, row in raw_rows(table))
    elif table is None:
        rows = _lines(path, text, found.noting)
    elif isinstance(table, list):
        rows = ((f"{path.name} record {i}", row) for i, row in enumerate(table))
    else:
        rows = published_reader(table)(path, table, found.noting)
    return found.take(rows, Places(path.parent))


# ---- what a path holds, row by row

def _scan_folder(folder: Path, entry: Entry | None) -> Found:
    if (folder / "captions.jsonl").is_file():
        return scan(folder / "captions.jsonl", entry)
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() in (".json", ".jsonl")]
    texts = {_stem(file): file for file in files if file.suffix.lower() == ".txt"}
    # A name like a picture's is a promise, to be checked later; under any other name the content decides.
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES
                or (_stem(file) in texts and file.suffix.lower() != ".txt" and _is_picture(file))]
    if any(_stem(picture) in texts for picture in pictures):
        found = Found("folder of pictures with texts", folder.resolve().name, entry=entry)
        return found.take(_pairs(pictures, texts, found.noting), Places(folder))
    if shards := [file for file in files if file.suffix.lower() == ".tar"]:
        return _scan_shards(shards, folder.resolve().name, entry)
    # VQAv2's and OKVQA's answers are read with their questions
    tables = [file for file in tables if file not in [answers_of(other) for other in tables if answers_of(other) != other]]
    if len(tables) == 1:
        return scan(tables[0], entry)
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


def _scan_shards(files: list[Path], name: str, entry: Entry | None) -> Found:
    found = Found("pairs in shards", name, entry=entry)
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


def _whole_table(file: Path, text: str, published: bool = False) -> dict | list | None:
    """The table, or None if each line is JSON of its own; which of them it is, the content says and not the file's ending.

    published: it is one of the 26 sets', of which datasets.py knows the form.
    """
    try:
        table = json.loads(text)
    except ValueError as error:
        if file.suffix.lower() == ".jsonl" or str(error).startswith("Extra data"):  # behind a first line that is whole
            return None
        raise UserError(f"{file}: it cannot be read as JSON ({error}).") from error
    if isinstance(table, list) or published_reader(table) or published and file.suffix.lower() == ".json":
        return table
    if file.suffix.lower() == ".jsonl":  # of one line
        return None
    raise UserError(f'{file}: it is neither a list of records nor an object with "images" and "annotations"; {WANTED}.')


def _lines(file: Path, text: str, noting: Noting) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        record = f"{file.name} line {number}"
        with noting(record):
            if line.strip():
                yield record, parsed(line)


# ---- files

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
