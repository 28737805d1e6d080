"""Small data sets on disk, for the tests of the readers."""

import io
import json
import tarfile
from pathlib import Path
from zlib import crc32

from PIL import Image

from nanovlm.data.records import Records
from nanovlm.data.sample import Sample


def draw(folder: Path, *names: str) -> None:
    """Different little pictures, so that none counts as a copy of another."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), tuple(crc32(name.encode()).to_bytes(4, "big")[:3])).save(folder / name)


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return file


def everything(source: Records, view: str) -> list[Sample]:
    return [source.sample(view, split, i) for split in ("train", "val") for i in range(source.size(view, split))]


LLAVA = [  # the first record is the example of docs/Finetune_Custom_Data.md; then text only, two images, image last
    {
        "id": "997bb945-628d-4724-b370-b84de974a19f",
        "image": "part-000001/997bb945.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWrite a prompt for Stable Diffusion to generate this image."},
            {"from": "gpt", "value": "a beautiful painting of chernobyl by nekro. Second sentence."},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]},
    {
        "id": 7,
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a hat"},
            {"from": "human", "value": "and <image>?"},
            {"from": "gpt", "value": "a shoe"},
        ],
    },
    {
        "id": "c",
        "image": "b.png",
        "conversations": [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "a shoe"}],
    },
]


def llava_set(folder: Path) -> Path:
    draw(folder, "images/part-000001/997bb945.jpg", "a.png", "b.png")
    return write(folder / "chat.json", LLAVA)
