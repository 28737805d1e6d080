"""Clips from files: the frames of a moving picture, one a second, in the place of one picture.

"Flamingo" (2204.14198) §2.1 and App. B.1.2: a video is sampled at one frame a second, and what the model makes of its frames is as
many tokens as those of one picture; a picture is a clip of one frame.

    folder/ 1.png 2.png … 10.png ─► (1.png, 2.png, …, 10.png)        in the order of their numbers
    a.gif, of 40 and 70 and 90 hundredths of a second ─► the frames that are seen at 0 s, 1 s, …, before it ends
"""

import re
from itertools import accumulate
from pathlib import Path

from PIL import Image

from nanovlm.data.transforms import load_image
from nanovlm.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of frames in a folder
AT_LEAST = 0.02  # seconds: how long a frame of a GIF is seen at least, for some are written with a time of 0
Picture = Image.Image | tuple[Image.Image, ...]


def frames(path: object, per_second: float = 1.0, side: int | None = None) -> tuple[Image.Image, ...]:
    """The frames of a folder, all of them, or of a file, so many a second; of a file that does not move the one. side: see load_image."""
    if isinstance(path, (str, Path)) and Path(path).is_dir():
        return tuple(load_image(file, side) for file in in_folder(Path(path)))
    first = load_image(path, side)  # and all that can be wrong with it is said there
    ends = _ends(Path(path) if isinstance(path, str) else path)
    shown, at = [first], 1
    while at / per_second < ends[-1] - 1e-6:
        number = next(number for number, end in enumerate(ends) if at / per_second < end - 1e-6)
        shown.append(load_image(path, side, number))
        at += 1
    return tuple(shown)


def _ends(path: object) -> list[float]:
    """When each frame of a file is over, in seconds."""
    seconds = []
    try:
        with path.open("rb") as file, Image.open(file) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                seconds.append(max(AT_LEAST, image.info.get("duration", 0) / 1000))
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: the clip breaks off behind frame {len(seconds)} ({error}); replace or remove it.") from error
    return list(accumulate(seconds))


def in_folder(folder: Path) -> tuple[Path, ...]:
    """Its pictures, 2.png before 10.png."""
    found = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not found:
        raise UserError(f"the clip {folder.name} has no frame: the folder holds no picture; put its frames there")
    return tuple(sorted(found, key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]))


def load(entry: object, side: int | None = None, rough: bool = False) -> Picture:
    """What an entry of Sample.images shows: a picture, or the frames of a clip. side, rough: see load_image."""
    if isinstance(entry, tuple):
        return tuple(load_image(path, side, rough=rough) for path in entry)
    if entry.suffix.lower() != ".gif":
        return load_image(entry, side, rough=rough)
    shown = frames(entry, side=side)
    return shown if len(shown) > 1 else shown[0]


def still(picture: Picture) -> Image.Image:
    """A clip for a model of pictures: its first frame."""
    return picture[0] if isinstance(picture, tuple) else picture


def files(entry: object) -> tuple:
    """The files of an entry of Sample.images."""
    return entry if isinstance(entry, tuple) else (entry,)
