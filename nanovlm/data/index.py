"""The index of a file of records that stays on the disk: where each record lies, and the little that a run must know of it before.

A file of 665,000 conversations is 774 MiB; read as records it takes 3.5 GB in every process. Its index takes 18 bytes a record, is
made once, by one pass over the file, and lies beside it, where every process maps it instead of reading it.

    mix.jsonl             ─► mix.jsonl.index.npy     about │ no records │ facts of each record │ where each lies, see lines.py, packed.py
    size, time of change  ◄─────────────────────────── of the file as it was then: if they differ, the index is made again

about  size and time; numbers of records, of those to be held out, of what is no record; samples in each view, those held out not counted
facts  words, below zero where there is no picture; pictures, captions; page, turns or line without a record; the split it was given;
       the lowest and the highest lot of its pictures. A lot is a hash of a picture's name: by it a picture is held out, and with it
       each record that shows it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from nanovlm.data.documents import is_document, parts_of
from nanovlm.data.rows import shown
from nanovlm.data.sample import IMAGE, REAL
from nanovlm.errors import UserError
from nanovlm.files import replacing

FORM = 1  # of the index; one of another form is made again
BLANK, CAPTIONED, TURNS, PAGE = range(4)  # kinds of records
GIVEN = {"": 0, "train": 1, "val": 2}
VAL = GIVEN["val"]
FACTS = np.dtype([("words", "i4"), ("images", "u2"), ("captions", "u2"), ("kind", "u1"), ("given", "u1"), ("low", "u4"), ("high", "u4")])
LOTS = 1 << 32
CHUNK = 1 << 16  # records that are turned into numbers at once
LOADED = 16  # indexes of shards in memory, a megabyte each
NOTHING = (0, 0, 0, BLANK, 0, 0, 0)


def facts_of(row: dict, key: bytes, where: str = "") -> tuple:
    """A row of FACTS. key: what the lot of a text without pictures is drawn by; where: stands before the names of pictures.

    A row that cannot be counted is no record: a KeyError or the like, and the reader says what is wrong with it.
    """
    if is_document(row):
        parts = parts_of(row)
        kind, texts, names = PAGE, [text for part, text in parts if part == "text"], [name for part, name in parts if part == "image"]
    elif "conversations" in row:
        kind, texts, names = TURNS, [message["value"] for message in row["conversations"]], shown(row)
    elif "question" in row:
        kind, texts, names = TURNS, [row["question"], str(row.get("answer", ""))], shown(row)
    else:
        kind, texts, names = CAPTIONED, row["caption"], shown(row)
        texts = texts if isinstance(texts, list) else [texts]
    marks = " ".join(texts[::2]).count(IMAGE) if "conversations" in row and kind == TURNS else len(names)
    if marks != len(names) or kind == CAPTIONED and len(names) != 1:
        raise KeyError("image")
    words = len(" ".join(texts).split())
    lots = [lot(f"{where}{name}".encode()) for name in names] or [lot(key)]
    return (words if names else -words, len(names), len(texts) if kind == CAPTIONED else 1, kind, GIVEN[row.get("split") or ""],
            min(lots), max(lots))


def lot(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=4).digest(), "big")


def entries(facts: np.ndarray, view: str) -> np.ndarray:
    """How often a training epoch of this view meets each record: what `met_as` (views.py) says of records, said of their facts."""
    kind = facts["kind"]
    times = np.where((kind == CAPTIONED) & (view != "instructions"), facts["captions"].astype(np.int64), 1)
    if view in ("pairs", "captions"):
        return np.where((facts["images"] == 1) & (kind != BLANK), times, 0)
    hidden = (kind == BLANK) | ((kind == PAGE) & (view in ("conversations", "prompted", "instructions")))
    return np.where(hidden, 0, times)


def gathered(rows: Iterable[tuple]) -> np.ndarray:
    """Facts as an array, a chunk at a time: a million tuples are large."""
    chunks, waiting = [np.empty(0, FACTS)], []
    for row in rows:
        waiting.append(row)
        if len(waiting) == CHUNK:
            chunks.append(np.array(waiting, FACTS))
            waiting = []
    return np.concatenate([*chunks, np.array(waiting, FACTS)])


# ---- the file

def path_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.index.npy")


def stamp(file: Path) -> list[int]:
    status = os.stat(file)
    return [FORM, status.st_size, status.st_mtime_ns]


def about_of(file: Path, make: Callable[[], tuple[Sequence[str], tuple[np.ndarray, ...]]]) -> np.ndarray:
    """What the index says of the file as a whole. It is made first where there is none, or where the file is another by now.

    make: what no record can be made of; and the arrays, facts first.
    """
    if not _fresh(file):
        before = stamp(file)
        lone, arrays = make()
        given = arrays[0][arrays[0]["given"] != VAL]
        about = [*before, len(arrays[0]), len(arrays[0]) - len(given), len(lone), *(entries(given, view).sum() for view in REAL)]
        told = np.array([record.encode() for record in lone] or np.empty(0, "S1"))
        try:
            with replacing(path_of(file)) as beside, open(beside, "wb") as out:
                for array in (np.array(about, np.int64), told, *arrays):
                    np.save(out, array)
        except OSError as error:
            raise UserError(f"{path_of(file)}: the index of {file.name} cannot be written ({error.strerror}); it must lie beside the file: "
                            "make the folder writable, or copy the file into another one.") from error
    with open(path_of(file), "rb") as stored:
        return np.load(stored, allow_pickle=False)


def _fresh(file: Path) -> bool:
    try:
        with open(path_of(file), "rb") as stored:
            about = np.load(stored, allow_pickle=False)
            return about[:3].tolist() == stamp(file) and os.stat(path_of(file)).st_size > stored.tell()
    except (OSError, ValueError, EOFError):  # none, or torn
        return False


@lru_cache(LOADED)
def loaded(file: Path, stamped: tuple[int, ...]) -> list[np.ndarray]:
    """All arrays of the index. stamped: of the file that is meant, so that nothing old is taken from the cache."""
    size, found = path_of(file).stat().st_size, []
    with open(path_of(file), "rb") as stored:
        while stored.tell() < size:
            found.append(np.load(stored, allow_pickle=False))
    return found


def mapped(file: Path) -> Iterator[np.ndarray]:
    """The same, but not read before somebody looks. A map holds a file open, of which a process may have about a thousand."""
    path = path_of(file)
    size = path.stat().st_size
    with open(path, "rb") as stored:
        while stored.tell() < size:
            npy.read_magic(stored)
            shape, _, dtype = npy.read_array_header_1_0(stored)
            length = int(np.prod(shape)) * dtype.itemsize
            yield np.memmap(path, dtype, "r", stored.tell(), shape) if length else np.empty(shape, dtype)
            stored.seek(length, os.SEEK_CUR)
