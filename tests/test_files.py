"""A file is replaced whole or not at all, whatever happens while it is written."""

import os

import pytest

from nanovlm.files import TEMPORARY, replacing


def test_the_file_is_there_once_it_is_whole(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(str(path)) as beside:
        assert beside.parent == tmp_path and beside.name == f"a.json.{os.getpid()}{TEMPORARY}"
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert flushed[0] == path.stat().st_ino  # the content before the rename
    assert os.name != "posix" or flushed[1:] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("when", ["while it is written", "when it is flushed", "before it is begun"])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, monkeypatch, when):
    path = tmp_path / "a.json"
    path.write_text("old")
    if when == "when it is flushed":
        def full(handle):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space|No such file"), replacing(path) as beside:
        if when != "before it is begun":
            beside.write_text("half")
        if when == "while it is written":
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
