"""The embedded world: little scenes that are drawn, not downloaded, so that their whole truth is known.

    +-----------+-----------+      a scene has one to four objects, each in its own cell, and
    |   #####   |           |      sometimes a sign (a digit or a short word), which is not an object
    |   #####   |    GO     |
    |   #####   |           |      Scene(objects=(Object("red", "square", "large", "top left"),
    +-----------+-----------+                     Object("blue", "diamond", "small", "bottom left")),
    |           |           |            sign=Sign("GO", "top right"))
    |     ^     |           |
    |     v     |           |      no two objects of a scene share both colour and shape
    +-----------+-----------+

**Held out.** Of the 36 (colour, shape) pairs the six in HELD_OUT, one for every colour and every shape, are kept out
of all training pictures; every picture that is judged shows at least one. A model that has learned colours and shapes
apart from each other names a blue circle that it has never seen; one that has learned thirty stickers does not.

Lengths are measured on a picture of 48 by 48 and scale with its size. Jitter is part of the scene, hence of its truth.

**Small print**, for LLaVA-1.5-HD: in pictures of 96 by 96 a sign is a number of two digits, drawn at half the size of other
signs. A tile of 48 shows its digits as large as an encoder has met them; the whole, made 48, shows a smear of ten pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 40, 45),
    "green": (40, 175, 70),
    "blue": (60, 105, 245),
    "yellow": (245, 225, 50),
    "purple": (165, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
SIZES = {"large": 21, "small": 14}  # pixels of a 24-pixel cell
COLUMN_ROW = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
CELLS = tuple(COLUMN_ROW)  # in reading order
DIGITS = tuple("0123456789")
WORDS = ("GO", "NO", "UP", "ON", "HI", "IN")
NUMBERS = tuple(map(str, range(10, 100)))

COUNTS = ("one", "two", "three", "four")  # of objects
ATTRIBUTES = {"colour": "colour", "shape": "shape", "size": "size", "position": "cell"}  # kind of question → field of Object

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = (
    ("red", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("white", "diamond"),
)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

GRID = 48  # the picture size in which all lengths below are given
CELL = GRID // 2
JITTER = 1
SIGN_BOX = {"digit": (12, 16), "word": (20, 12), "number": (22, 16)}  # width, height
SIGN_FONT = {"digit": 21, "word": 14, "number": 20}
BACKGROUND = (40, 40, 40)
SIGN_COLOUR = (255, 170, 70)


@dataclass(frozen=True)
class Object:
    colour: str
    shape: str
    size: str
    cell: str
    jitter: tuple[int, int] = (0, 0)

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Sign:
    text: str
    cell: str
    jitter: tuple[int, int] = (0, 0)
    corner: str = ""  # of the cell, one of CELLS: small print, half as large and in that quarter of it

    @property
    def type(self) -> str:
        return "digit" if self.text in DIGITS else "word" if self.text in WORDS else "number"


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    sign: Sign | None = None

    @property
    def things(self) -> list[Object | Sign]:
        """Objects and sign in reading order."""
        return _in_reading_order([*self.objects, self.sign] if self.sign else self.objects)


def random_scene(rng: Random, pairs: tuple = SEEN, including: tuple = (), many: int = 0, signs: float = 0.4,
                 texts: tuple[str, ...] = DIGITS + WORDS, small_print: bool = False) -> Scene:
    """A scene of `many` objects (0: one to four), drawn from `pairs`, one of them from `including` if that is given.

    signs: how often a sign stands beside one to three objects; texts: what it may say.
    """
    cells = rng.sample(CELLS, len(CELLS))
    # Two objects teach best what belongs to what: with one there is nothing to confuse, with three too much.
    many = many or rng.choices((1, 2, 3, 4), (25, 50, 15, 10))[0]
    sign = None
    if many < len(cells) and rng.random() < signs:
        sign = Sign(rng.choice(texts), cells.pop(), _jitter(rng), rng.choice(CELLS) if small_print else "")

    chosen = [rng.choice(including or pairs)]
    while len(chosen) < many:
        # Colours and shapes repeat more often than by chance, or counting red objects would always give one.
        shared = rng.choices((None, 0, 1), (6, 2, 2))[0]
        alike = [pair for pair in pairs if shared is None or pair[shared] == chosen[0][shared]]
        chosen.append(rng.choice([pair for pair in alike if pair not in chosen]))
    objects = [
        Object(colour, shape, rng.choice(("large", "small")), cell, _jitter(rng))
        for (colour, shape), cell in zip(chosen, cells)
    ]
    return Scene(tuple(_in_reading_order(objects)), sign)


def _in_reading_order(things: Iterable) -> list:
    return sorted(things, key=lambda thing: CELLS.index(thing.cell))


def _jitter(rng: Random) -> tuple[int, int]:
    return rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)


def side(thing: Object | Sign, other: Object | Sign) -> str | None:
    """On which side of `other` the thing stands; None on the diagonal, where two answers would be right."""
    (column, row), (other_column, other_row) = COLUMN_ROW[thing.cell], COLUMN_ROW[other.cell]
    if row == other_row:
        return "left" if column < other_column else "right"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def about(scene: Scene) -> Object:
    """The object that a page or a clip of one object shows: a held-out one where the scene has any."""
    return next((thing for thing in scene.objects if thing.pair in HELD_OUT), scene.objects[0])


def recoloured(scene: Scene, rng: Random) -> Scene:
    """The objects in any colours, which have no name: the picture for a caption that is silent about colour.

    Shapes are then met in more than six colours, and become a fact of their own instead of a part of thirty pairs.
    """
    return replace(scene, objects=tuple(replace(thing, colour=_any_colour(rng)) for thing in scene.objects))


def _any_colour(rng: Random) -> str:
    """"#rrggbb", unlike the named colours (a held-out pair must not come in by this door) and unlike the background."""
    while True:
        colour = tuple(rng.randrange(256) for _ in range(3))
        if min(_difference(colour, other) for other in (*COLOURS.values(), BACKGROUND)) > 110:
            return "#{:02x}{:02x}{:02x}".format(*colour)


def _difference(colour: tuple, other: tuple) -> int:
    return sum(abs(a - b) for a, b in zip(colour, other))


def render(scene: Scene, size: int = GRID) -> Image.Image:
    """The picture, RGB, size by size pixels."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    for thing in scene.things:
        left, top, width, height = (round(length * size / GRID) for length in _place(thing))
        if isinstance(thing, Sign):
            font_size = SIGN_FONT[thing.type] * size / GRID / (2 if thing.corner else 1)
            image.paste(SIGN_COLOUR, (left, top), _sign_mask(thing.text, width, height, font_size))
        else:
            image.paste(COLOURS.get(thing.colour, thing.colour), (left, top), shape_mask(thing.shape, width))
    return image


def boxes(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(name, (x1, y1, x2, y2)) of every thing in reading order; coordinates run from 0 to 1, x to the right, y down."""
    found = []
    for thing in scene.things:
        left, top, width, height = _place(thing)
        name = f"the {thing.type} {thing.text}" if isinstance(thing, Sign) else f"{thing.colour} {thing.shape}"
        found.append((name, (left / GRID, top / GRID, (left + width) / GRID, (top + height) / GRID)))
    return found


def _place(thing: Object | Sign) -> tuple[float, float, float, float]:
    """left, top, width, height on the 48-pixel grid."""
    column, row = COLUMN_ROW[thing.cell]
    width, height = SIGN_BOX[thing.type] if isinstance(thing, Sign) else (SIZES[thing.size],) * 2
    left = (CELL - width) // 2 + thing.jitter[0]  # in its cell
    top = (CELL - height) // 2 + thing.jitter[1]
    if isinstance(thing, Sign) and thing.corner:  # the same in a quarter of it, where all lengths are halved
        column, row = (n + m / 2 for n, m in zip((column, row), COLUMN_ROW[thing.corner]))
        left, top, width, height = left / 2, top / 2, width / 2, height / 2
    return column * CELL + left, row * CELL + top, width, height


# Corners of the shapes in a box from (0, 0) to (1, 1); the circle is drawn as an ellipse.
CORNERS = {
    "square": ((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)),
    "triangle": ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "cross": (
        (0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66),
        (0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34),
    ),
    "star": (
        (0.5, 0), (0.61, 0.37), (1, 0.38), (0.69, 0.6), (0.81, 1),
        (0.5, 0.76), (0.19, 1), (0.31, 0.6), (0, 0.38), (0.39, 0.37),
    ),
    "diamond": ((0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)),
}  # fmt: skip
FINE = 8  # masks are drawn this many times larger and shrunk, which smooths their edges


@cache
def shape_mask(shape: str, width: int) -> Image.Image:
    side_length = width * FINE
    mask = Image.new("L", (side_length, side_length))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, side_length - 1, side_length - 1), fill=255)
    else:
        pen.polygon([(x * (side_length - 1), y * (side_length - 1)) for x, y in CORNERS[shape]], fill=255)
    return mask.resize((width, width), Image.Resampling.BOX)


@cache
def _sign_mask(text: str, width: int, height: int, font_size: float) -> Image.Image:
    mask = Image.new("L", (width * FINE, height * FINE))
    font = ImageFont.load_default(size=font_size * FINE)
    pen = ImageDraw.Draw(mask)
    # The font that comes with Pillow is thin for letters this small: the stroke makes it bold.
    stroke = round(font_size * FINE / 32)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font, stroke_width=stroke)
    corner = (mask.width - left - right) / 2, (mask.height - top - bottom) / 2
    pen.text(corner, text, fill=255, font=font, stroke_width=stroke)
    return mask.resize((width, height), Image.Resampling.BOX)
