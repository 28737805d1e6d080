"""Where the pictures of a table lie: from a name in a record to a file on the disk.

    captions_val2014.json  "file_name": "a.jpg" ─► a.jpg beside it, or in images/, val2014/, … beside it or beside its parent
    mine.jsonl             "clip": "run"        ─► run/1.png run/2.png …, the frames of one clip
"""

import os
from pathlib import Path
from unicodedata import normalize

from nanovlm.data.clips import in_folder
from nanovlm.errors import UserError

PICTURE_FOLDERS = ("", "images", "train2014", "val2014", "train2017", "val2017", "train", "val", "test", "train_images",
                   "VisualDialog_val2018")  # where a JSON's pictures usually lie


class Missing(UserError):
    """There is no picture that could be read: a record to leave out where --on-missing is "skip"."""


class Places:
    """Where the pictures of a table may lie: beside it, and beside its parent, as COCO keeps annotations/ next to train2017/."""

    def __init__(self, folder: Path):
        named = [base / name for base in (folder, folder.resolve().parent) for name in PICTURE_FOLDERS]
        self.roots = [root for root in named if root.is_dir()]
        self.others = sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir())

    def find(self, name: str) -> Path:
        if name.startswith("data:") or "://" in name:
            raise Missing(f'field "image" holds a picture\'s data or address ({name[:40]}), not its path; save it as a file '
                          "beside the table and give that")
        # The same letters may be written in two ways: é as one character, or as e with an accent behind it.
        for form in dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name))):
            for root in self.roots:
                if os.path.isfile(root / form):
                    return root / form
        other = next((f"; write {root.name}/{name}, where one lies" for root in self.others if os.path.isfile(root / name)), "")
        raise Missing(f'field "image": the picture {name[:80]} is missing{other}')

    def clip(self, name: str) -> Path | tuple[Path, ...]:
        folder = next((root / name for root in self.roots if (root / name).is_dir()), None)
        return in_folder(folder) if folder else self.find(name)
