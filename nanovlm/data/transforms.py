"""From a file to the tensor a vision encoder reads.

Idea: a picture of any size, mode and orientation becomes upright RGB, then a square, then normalised floats. The
resampling is Pillow's bicubic with antialiasing, which the published encoders were trained with.
Papers: Radford et al. 2021, CLIP (arXiv:2103.00020), the released preprocessing ("crop"); Li et al. 2022, BLIP
(arXiv:2201.12086), released code ("stretch"); Liu et al. 2023, LLaVA-1.5 (arXiv:2310.03744), released code ("pad").

    file ─► upright RGB ─► fit to (size, size) ─► / 255 ─► (x - mean) / std ─► (3, size, size)

                        crop                 pad                   stretch
    a wide picture   ┌──┬────┬──┐         ┌──────────┐           ┌────┐
                     │  │kept│  │         │   mean   │           │all,│
                     └──┴────┴──┘         │ picture  │           │thin│
                     centre of it         │   mean   │           └────┘
                                          └──────────┘

A picture that is tiled (see tiling.py) becomes several such views.
"""

import struct
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from nanovlm.errors import UserError
from nanovlm.tiling import Tiling

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "pad", "stretch")
# how a camera was held (EXIF's orientation) → what makes the picture upright
UPRIGHT = dict(zip(range(2, 9), (Image.Transpose[name] for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))
HEIC = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")  # how such a file begins, behind 4 bytes


@dataclass(frozen=True)
class Transform:
    """One way to make a tensor of a picture; `augment` adds a random crop and a flip, for training only.

    With a `tiling` a picture has several views, and `fit` and `augment` play no part.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    fit: str = "crop"
    augment: bool = False
    tiling: Tiling | None = None

    def __post_init__(self):
        if self.fit not in FITS:
            raise UserError(f"Transform: fit is {self.fit!r}; it must be one of {', '.join(FITS)}.")

    def __call__(self, image: Image.Image, rng: Random | None = None) -> Tensor:
        """image: PIL, any mode. rng: needed only where `augment` is on. Returns float32 (3, size, size)."""
        image = to_rgb(image)
        if self.augment:
            image = random_crop_and_flip(image, self.size, rng)
        elif self.fit == "crop":
            image = resize_and_crop(image, self.size)
        elif self.fit == "pad":
            image = resize(pad_to_square(image, self.mean), (self.size, self.size))
        else:
            image = resize(image, (self.size, self.size))
        return self.normalise(image)

    def views(self, image: Image.Image, rng: Random | None = None) -> Tensor:
        """float32 (V, 3, size, size): the picture alone or, tiled, the whole of it and then its tiles row by row."""
        if self.tiling is None:
            return self(image, rng)[None]
        return torch.stack([self.normalise(view) for view in cut(to_rgb(image), self.tiling, self.mean)])

    def places(self, image: Image.Image, image_tokens: int) -> int:
        """How many places of the sequence the picture takes, where a view takes image_tokens."""
        if self.tiling is None:
            return image_tokens
        return self.tiling.tokens((image.height, image.width), isqrt(image_tokens))

    def normalise(self, image: Image.Image) -> Tensor:
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # uint8 (3, size, size): cheap to turn now
        scale, shift = _scale_and_shift(self.mean, self.std)
        return torch.from_numpy(pixels).float().mul_(scale).add_(shift)


@cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as one product and one sum, each (3, 1, 1): small pictures spend their time on this."""
    means, stds = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (1 / (255 * stds)).float(), (-means / stds).float()


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """CLIP: the shorter side becomes `size`, then the square in the middle is kept."""
    width, height = image.size
    short = min(width, height)
    image = resize(image, (size * width // short, size * height // short))  # the longer side is rounded down
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def pad_to_square(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    """LLaVA-1.5: the whole picture in the middle of a square of the mean colour, which becomes 0 when normalised.

    Of an odd rest the smaller half stands above, or on the left; so it does in `cut`.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), mean_colour(mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def cut(image: Image.Image, tiling: Tiling, mean: tuple[float, float, float]) -> list[Image.Image]:
    """LLaVA-1.5 §3.4: the whole as a square, then the tiles of the picture fitted into its grid, each side × side."""
    side, size = tiling.side, (image.height, image.width)
    rows, columns = tiling.grid(size)
    height, width = tiling.fitted(size)
    canvas = Image.new("RGB", (columns * side, rows * side), mean_colour(mean) if tiling.fill == "mean" else (0, 0, 0))
    canvas.paste(resize(image, (width, height)), ((canvas.width - width) // 2, (canvas.height - height) // 2))
    wholes = [resize(pad_to_square(image, mean) if tiling.whole == "pad" else image, (side, side))] * tiling.wholes
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return [*wholes, *(canvas.crop((left, top, left + side, top + side)) for left, top in corners)]


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, ...]:
    """What becomes 0, or nearly, when it is normalised."""
    return tuple(int(channel * 255) for channel in mean)


def random_crop_and_flip(image: Image.Image, size: int, rng: Random) -> Image.Image:
    """60 to 100 % of the largest square's area, anywhere, slightly stretched, mirrored half of the time.

    A flip swaps left and right: leave augment off where the texts name sides or the pictures hold writing.
    """
    side = min(image.size)
    area, stretch = rng.uniform(0.6, 1.0), rng.uniform(0.9, 1.1)
    width = min(image.width, side * (area * stretch) ** 0.5)
    height = min(image.height, side * (area / stretch) ** 0.5)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: what is transparent becomes white, 16 bits become 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips at 255 here, which turns almost every 16-bit picture white.
        scale = 1.0 if image.mode == "F" else 1 / 257
        grey = np.clip(np.asarray(image).astype(np.float32) * scale, 0, 255).round()
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def load_image(path: object, side: int | None = None, frame: int = 0, rough: bool = False) -> Image.Image:
    """The picture as upright RGB; with `side`, its shorter side is at most that. path: one, or what opens as one (shards.py).

    rough: for who resizes it anyway. A JPEG comes out at two to four times the side, other files at their own size.

    The content decides what kind of file it is, not its name. Every way to be no picture is a UserError that names it.
    """
    place = Path(path) if isinstance(path, str) else path
    try:
        with place.open("rb") as file, Image.open(file) as image:
            if frame:
                image.seek(frame)
            if side is not None:
                image.draft("RGB", (2 * side, 2 * side))  # a JPEG decoder can skip what would be thrown away
            image.load()
            picture = to_rgb(upright(image))
    except FileNotFoundError as error:
        raise UserError(f"{path}: the picture is missing.") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the picture cannot be read ({_reason(place, error)}); replace or remove it.") from error
    if side is not None and not rough and min(picture.size) > side:
        scale = side / min(picture.size)
        picture = resize(picture, (max(side, round(picture.width * scale)), max(side, round(picture.height * scale))))
    return picture


def upright(image: Image.Image) -> Image.Image:
    """Turned as its camera was held. (ImageOps.exif_transpose also writes the tags anew, and stops at one of a wrong type.)"""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, struct.error):  # tags that cannot be read say nothing
        turn = None
    return image.copy() if turn is None else image.transpose(turn)  # a copy lets go of the file


def _reason(path: object, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        with path.open("rb") as file:
            start = file.read(32)
        if not start:
            return "it is empty"
        if start[4:].startswith(HEIC):
            return f"it is a HEIC photo, which is not supported: convert it, as with `magick {path.name} photo.jpg`"
        return "it is a video" if start[4:8] == b"ftyp" else "its content is no known picture format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
