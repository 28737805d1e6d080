"""Lines: a .jsonl whose records stay on the disk. Each is parsed when it is asked for, by the reader of all other tables (rows.py).

    mix.jsonl  {"image": …}⏎{"image": …}⏎ …
               ▲           ▲
               └ index.py ─┘  starts[i], starts[i + 1]: the bytes of line i + 1, read by `seek`

The index is mapped into memory, the lines are not: a process would count all that it has read of them as its own, and would be killed by
the system where the file is cut meanwhile.

A LLaVA-style .json is one array of records, and has to be read from its beginning; `to_lines` makes lines of it, record by record.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanovlm.data import index
from nanovlm.data.places import Places
from nanovlm.data.rows import as_sample
from nanovlm.errors import UserError
from nanovlm.files import replacing

GAP = re.compile(r"[\s,]*")  # between two records of an array
BUFFER = 1 << 20  # bytes of an array that are read at once


def parsed(line: str | bytes) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"this is no JSON ({error}); write one object per line") from error


class Lines:
    """One file. Record i is line i + 1; a line may be blank."""

    lone = ()  # what no record can be made of, see packed.py

    def __init__(self, path: Path):
        self.path, self.places = path, Places(path.parent)
        self.about = index.about_of(path, self._make)
        _, _, self.facts, self.starts = index.mapped(path)

    def __reduce__(self) -> tuple:
        return Lines, (self.path,)  # another process maps the file itself

    def row(self, i: int) -> tuple[str, object]:
        """(record, row), as formats.py has them."""
        with self.path.open("rb") as file:  # a handle of its own: a file's place would be shared by all worker processes
            file.seek(self.starts[i])
            line = file.read(self.starts[i + 1] - self.starts[i])
        return f"{self.path.name} line {i + 1}", parsed(line)

    def _make(self) -> tuple[Sequence[str], tuple[np.ndarray, ...]]:
        ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        facts = index.gathered(self._count(ends))
        return self.lone, (facts, np.concatenate(ends))

    def _count(self, ends: list[np.ndarray]) -> Iterator[tuple]:
        """The facts of each line; where it ends is put into `ends`."""
        waiting, at = [], 0
        with self.path.open("rb") as file, tqdm(total=self.path.stat().st_size, desc=f"indexing {self.path.name}", unit="B", unit_scale=True,
                                                leave=False, disable=None) as bar:
            for number, line in enumerate(file, start=1):
                yield self._facts(number, line) if line.strip() else index.NOTHING
                at += len(line)
                waiting.append(at)
                if len(waiting) == index.CHUNK:
                    ends.append(np.array(waiting, np.int64))
                    bar.update(at - bar.n)
                    waiting = []
        ends.append(np.array(waiting, np.int64))

    def _facts(self, number: int, line: bytes) -> tuple:
        record = f"{self.path}: {self.path.name} line {number}"
        try:
            row = parsed(line)
            try:
                return index.facts_of(row, line.strip())
            except (TypeError, AttributeError, KeyError):  # the reader knows what is wrong with it
                as_sample(record, row, Anywhere())
                raise
        except UserError as error:
            torn = ""
            if not line.endswith(b"\n") and "no JSON" in str(error):
                torn = "; it is the last line and breaks off: fetch the file again, or remove the line"
            raise UserError(f"{record}: {error}{torn}.") from error


class Anywhere:
    """Places of which nobody asks whether something lies there."""

    def find(self, name: str) -> Path:
        return Path(name)

    clip = find


def to_lines(table: Path, out: Path) -> int:
    """Write each record of a JSON array as a line of its own → how many. Never more than one record is in memory."""
    if out.suffix.lower() != ".jsonl" or out.exists():
        raise UserError(f"--lines {out}: {'there is such a file already' if out.exists() else 'the name must end in .jsonl'}; give another name.")
    number = 0
    with replacing(out) as beside, beside.open("w", encoding="utf-8") as file:
        for number, row in enumerate(array_of(table), start=1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return number


def array_of(table: Path) -> Iterator[object]:
    """The elements of a file that holds one JSON array, read a buffer at a time."""
    decoder, number = json.JSONDecoder(), 0
    try:
        with table.open(encoding="utf-8-sig") as file:
            text, at = file.read(BUFFER).lstrip(), 1
            if not text.startswith("["):
                raise UserError(f"{table}: it is no list of records, and only of such a list lines can be made.")
            while text[(at := GAP.match(text, at).end()):at + 1] != "]":
                try:
                    row, end = decoder.raw_decode(text, at)
                    if end == len(text):
                        raise ValueError("it breaks off")
                except ValueError as error:
                    if not (more := file.read(max(BUFFER, len(text)))):
                        raise UserError(f"{table} record {number}: this is no JSON ({error}); mend it, or fetch the file again.") from error
                    text, at = text[at:] + more, 0
                else:
                    yield row
                    number, at = number + 1, end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: it cannot be read as UTF-8 text ({error}).") from error
