"""A tar shard whose records stay on the disk: an index beside it says where they lie, and each is read by `seek` when it is asked for.

    00000.tar  ─► one pass of `tarfile` ─► 00000.tar.index.npy    members: name, first byte, length     records: which members make it
    record i   ─► shards.py: Shard.row(JSON, picture, text) ─► row ─► rows.py, as of a shard that is read as a whole

The file must be one that can be read at any place: a disk or a network's file system, no object store.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nanovlm.data import index
from nanovlm.data.places import Missing
from nanovlm.data.rows import as_sample
from nanovlm.data.shards import Packed, Shard
from nanovlm.errors import UserError


class Members:
    """Name → member, from arrays: what a dict of them takes is ten times as much."""

    def __init__(self, shard: Path, names: np.ndarray, places: np.ndarray):
        """names (M): sorted, UTF-8; places (M, 2): first byte, length."""
        self.shard, self.names, self.places = shard, names, places

    def __len__(self) -> int:
        return len(self.names)

    def get(self, name: str) -> Packed | None:
        at = int(np.searchsorted(self.names, name.encode()))
        return self[at] if at < len(self) and self.names[at] == name.encode() else None

    def __getitem__(self, name: str | int) -> Packed:
        at = int(np.searchsorted(self.names, name.encode())) if isinstance(name, str) else name
        return Packed(self.shard, self.names[at].decode(), *map(int, self.places[at]))


class Tar:
    """One shard. Its records are in the order in which the shard has them."""

    def __init__(self, path: Path):
        self.path = path
        self.about = index.about_of(path, self._make)

    @property
    def lone(self) -> list[str]:
        """What no record can be made of."""
        return [name.decode() for name in self._arrays[1]] if self.about[5] else []

    @property
    def facts(self) -> np.ndarray:
        return self._arrays[2]

    @property
    def places(self) -> Shard:
        return Shard(self.path, Members(self.path, *self._arrays[3:5]))

    @property
    def _arrays(self) -> list[np.ndarray]:
        """Of the shards in use: there may be thousands."""
        return index.loaded(self.path, tuple(self.about[:3].tolist()))

    def __reduce__(self) -> tuple:
        return Tar, (self.path,)  # another process reads the index itself

    def row(self, i: int) -> tuple[str, object]:
        """(record, row), as formats.py has them."""
        names, parts = self._arrays[3], self._arrays[5][i]
        names = [names[part].decode() if part >= 0 else "" for part in parts]
        row = self.places.row(*names)
        return f"{self.path.name}/{names[0] or names[1]}", row

    def _make(self) -> tuple[list[str], tuple[np.ndarray, ...]]:
        lone: list[str] = []
        with self._named(lone):
            shard = Shard(self.path)
        members = sorted(shard.members.values(), key=lambda member: member.name.encode())
        number = {member.name: i for i, member in enumerate(members)} | {"": -1}
        parts: list[tuple[int, ...]] = []
        facts = index.gathered(self._count(shard, number, parts, lone))
        if not parts:
            raise UserError(f"{self.path}: the shard holds no record; remove it.")
        names = np.array([member.name.encode() for member in members])
        places = np.array([(member.start, member.length) for member in members], np.int64)
        return lone, (facts, names, places, np.array(parts, np.int32))

    def _count(self, shard: Shard, number: dict[str, int], parts: list[tuple[int, ...]], lone: list[str]) -> Iterator[tuple]:
        """The facts of each record; what it is made of is put into `parts`, and what no record is made of into `lone`."""
        noting = partial(self._named, lone)
        for record, row, names in shard.found(noting):
            with noting(record):
                try:
                    facts = index.facts_of(row, record.encode(), f"{self.path.name}/")
                except (TypeError, AttributeError, KeyError):  # the reader knows what is wrong with it
                    as_sample(record, row, shard)
                    raise
                parts.append(tuple(number[name] for name in names))
                yield facts

    @contextmanager
    def _named(self, lone: list[str], record: str = "") -> Iterator[None]:
        """A UserError inside tells the shard and the record."""
        try:
            yield
        except Missing:
            lone.append(record)
        except UserError as error:
            raise UserError(f"{self.path}: {record or self.path.name}: {str(error).rstrip('.')}.") from error
