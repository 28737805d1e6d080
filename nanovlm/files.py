"""A file is written beside and then renamed: whatever happens meanwhile, a whole file is there, the old one or the new one.

    replacing("last.pt") ──► last.pt.4711.tmp ──► written, flushed to the disk ──► renamed over last.pt

A kill, a full disk or a power cut leaves the old file; what was half written bears the ending TEMPORARY.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """The path to write to in the block; at its end the file becomes `path`. After an error in the block nothing is left of it."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
        if os.name == "posix":  # the rename itself is only safe from a power cut once the folder is flushed
            _flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
