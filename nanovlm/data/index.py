"""The index of a file of records that stays on the disk: where each record lies, and the little that a run must know of it before.

A file of 665,000 conversations is 774 MiB; read as records it takes 3.5 GB in every process. Its index takes 18 bytes a record, is
made once, by one pass over the file, and lies beside it, where every process maps it instead of reading it.

    mix.jsonl             ─► mix.jsonl.index.npy     about │ facts of each record │ where each record lies, see lines.py and packed.py
    size, time of change  ◄─────────────────────────── of the file as it was then: if they differ, the index is made again

facts  words, below zero where there is no picture; pictures, captions; page, turns or line without a record; the split it was given;
       the lowest and the highest lot of its pictures. A lot is a hash of a picture's name: by it a picture is held out, and with it
       each record that shows it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
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


def open_index(file: Path, make: Callable[[], tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """about, facts and places of the file, mapped; made first where there are none, or where the file is another by now."""
    if not _fresh(file):
        before = stamp(file)
        facts, *places = make()
        given = facts[facts["given"] != VAL]
        about = [*before, len(facts), np.count_nonzero(facts["given"] == VAL), *(entries(given, view).sum() for view in REAL)]
        try:
            with replacing(path_of(file)) as beside, open(beside, "wb") as out:
                for array in (np.array(about, np.int64), facts, *places):
                    np.save(out, array)
        except OSError as error:
            raise UserError(f"{path_of(file)}: the index of {file.name} cannot be written ({error.strerror}); it must lie beside the file: "
                            "make the folder writable, or copy the file into another one.") from error
    return list(_mapped(path_of(file)))


def _fresh(file: Path) -> bool:
    try:
        with open(path_of(file), "rb") as stored:
            return np.load(stored, allow_pickle=False)[:3].tolist() == stamp(file)
    except (OSError, ValueError, EOFError):  # none, or torn
        return False


def _mapped(path: Path) -> Iterator[np.ndarray]:
    """Each array of a file into which several were saved one after the other."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            length = int(np.prod(shape)) * dtype.itemsize
            yield np.memmap(path, dtype, "r", file.tell(), shape) if length else np.empty(shape, dtype)
            file.seek(length, os.SEEK_CUR)
