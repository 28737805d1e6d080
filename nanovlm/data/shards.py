"""Shards: tar files whose members are read where they lie, as WebDataset (and with it ALIGN-like sets, MMC4 and OBELICS) packs them.

The layout of WebDataset (github.com/webdataset/webdataset, "The WebDataset Format"): members with the same name up to the first
dot are one record. A picture is a place in the shard, so nothing is unpacked and no name in a shard is ever a path on the disk.

    00000.tar    000.jpg  000.txt           a picture and its text       ─┐
                 001.png  001.json          {"caption": …, "split": …}    ├─►  (record, row), …   as a table has them, formats.py
                 002.json a.jpg  b.jpg      a document, see documents.py ─┘    find(name) ─► Packed: shard, first byte, length
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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


@dataclass
class Shard:
    path: Path
    members: dict[str, Packed] = field(default_factory=dict)

    def __post_init__(self):
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if member.isfile() and not member.issparse():  # links lead elsewhere
                        name = str(PurePosixPath(member.name))  # "./a.jpg", as `tar -c .` writes it, is a.jpg
                        self.members[name] = Packed(self.path, name, member.offset_data, member.size)
                tar.fileobj.seek(tar.offset)  # a header that makes no sense ends the loop as the end mark does
                end = tar.fileobj.read(tarfile.BLOCKSIZE)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"the shard cannot be read as a tar file ({error}); fetch it again") from error
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise UserError(f"the shard breaks off or is damaged behind {len(self.members)} members "
                            f"(byte {tar.offset}); fetch it again")

    def find(self, name: str) -> Packed:
        """The member of this name; no other shard is looked into, nor the disk."""
        if (member := self.members.get(str(PurePosixPath(name)))) is None:
            raise Missing(f'field "image": the picture {name[:80]} is missing in the shard')
        return member

    clip = find  # a clip is a file here, no folder

    def rows(self, noting: Noting) -> Iterator[Row]:
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
                told = self._json(parts[".json"]) if ".json" in parts else {}
                if any(name in told for name in ROWS):
                    claimed.add(key)
                    yield f"{self.path.name}/{parts['.json']}", told
                    continue
                picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
                text = self._text(parts[".txt"]) if ".txt" in parts else told.get("caption")
                if picture and text is not None:
                    yield record, {**told, "image": picture, "caption": text}
                else:
                    lone.append((record, parts))
        for record, parts in lone if not claimed else ():  # beside documents a picture by itself is one of theirs
            with noting(record):
                raise Missing(f"of {', '.join(parts.values())} no record can be made; a picture needs a .txt or a .json of its name")

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
