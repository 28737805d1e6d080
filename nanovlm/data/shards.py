"""Shards: tar files whose members are read where they lie, as WebDataset (and with it ALIGN-like sets, MMC4 and OBELICS) packs them.

The layout of WebDataset (github.com/webdataset/webdataset, "The WebDataset Format"): members with the same name up to the first
dot are one record. A picture is a place in the shard, so nothing is unpacked and no name in a shard is ever a path on the disk.

    00000.tar    000.jpg  000.txt           a picture and its text       ─┐
                 001.png  001.json          {"caption": …, "split": …}    ├─►  (record, row), …   as a table has them, formats.py
                 002.json a.jpg  b.jpg      a document, see documents.py ─┘    find(name) ─► Packed: shard, first byte, length
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath

from nanovlm.data.benchmarks import Noting, Row
from nanovlm.data.places import Missing
from nanovlm.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
ROWS = ("texts", "text_list", "conversations")  # fields of a JSON that is a record by itself


@dataclass(frozen=True)
class Packed:
    """A member of a shard; it can be opened as a path can."""

    shard: Path
    name: str
    start: int
    length: int

    def read_bytes(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.length)

    def open(self, mode: str = "rb") -> BytesIO:
        return BytesIO(self.read_bytes())

    def resolve(self) -> "Packed":
        return replace(self, shard=self.shard.resolve())

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class Shard:
    def __init__(self, path: Path, members: Mapping[str, Packed] | None = None):
        """members: by name, where somebody has read them before (packed.py)."""
        self.path, self.members = path, _members(path) if members is None else members

    def find(self, name: str) -> Packed:
        """The member of this name; no other shard is looked into, nor the disk."""
        if (member := self.members.get(str(PurePosixPath(name)))) is None:
            raise Missing(f'field "image": the picture {name[:80]} is missing in the shard')
        return member

    clip = find  # a clip is a file here, no folder

    def rows(self, noting: Noting) -> Iterator[Row]:
        return ((record, row) for record, row, _ in self.found(noting))

    def found(self, noting: Noting) -> Iterator[tuple[str, dict, tuple[str, str, str]]]:
        """record, row, and the names of what it is made of: JSON, picture and text, "" for what there is not. See `row`."""
        groups: dict[str, dict[str, str]] = {}
        for name in self.members:
            place = PurePosixPath(name)
            stem, _, ending = place.name.partition(".")
            if stem:  # no hidden file
                groups.setdefault(str(place.with_name(stem)), {})[f".{ending.lower()}"] = name
        claimed: set[str] = set()  # pictures of documents
        lone: list[tuple[str, dict[str, str]]] = []
        for key, parts in groups.items():
            record = f"{self.path.name}/{key}"
            with noting(record):
                names = parts.get(".json", ""), next((parts[ending] for ending in PICTURES if ending in parts), ""), parts.get(".txt", "")
                row = self.row(*names)
                if row is None:
                    lone.append((record, parts))
                elif any(name in row for name in ROWS):
                    claimed.add(key)
                    yield f"{self.path.name}/{names[0]}", row, names
                else:
                    yield record, row, names
        for record, parts in lone if not claimed else ():  # beside documents a picture by itself is one of theirs
            with noting(record):
                raise Missing(f"of {', '.join(parts.values())} no record can be made; a picture needs a .txt or a .json of its name")

    def row(self, json: str, picture: str, text: str) -> dict | None:
        """Of members with one name; None where they are no record."""
        told = self._json(json) if json else {}
        if any(name in told for name in ROWS):
            return told
        caption = self._text(text) if text else told.get("caption")
        return {**told, "image": picture, "caption": caption} if picture and caption is not None else None

    def _text(self, name: str) -> str:
        try:
            return self.members[name].read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{name} cannot be read as UTF-8 text ({error})") from error

    def _json(self, name: str) -> dict:
        try:
            told = json.loads(self._text(name))
        except ValueError as error:
            raise UserError(f"{name} is no JSON ({error})") from error
        if not isinstance(told, dict):
            raise UserError(f"{name} is no JSON object")
        return told


def _members(path: Path) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and not member.issparse():  # links lead elsewhere
                    name = str(PurePosixPath(member.name))  # "./a.jpg", as `tar -c .` writes it, is a.jpg
                    found[name] = Packed(path, name, member.offset_data, member.size)
                tar.members.clear()  # or the headers of a million members stay in memory
            tar.fileobj.seek(tar.offset)  # a header that makes no sense ends the loop as the end mark does
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"the shard cannot be read as a tar file ({error}); fetch it again") from error
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise UserError(f"the shard breaks off or is damaged behind {len(found)} members "
                        f"(byte {tar.offset}); fetch it again")
    return found
