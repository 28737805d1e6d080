"""Clips of one object that moves: which way it goes, only the order of the frames tells.

"Flamingo" (2204.14198) §2.1 and App. B.1.2: trained on 8 frames, one a second, and asked about 30 frames, three a second.

    8 frames     .     .     .     .  |  .     .     .     .        a frame each second, around the middle of the clip
    30 frames  . . . . . . . . . . .  |  . . . . . . . . . . .      three each second, around the same middle: the fifth, the
                                                                    eighth, the eleventh … of them are the eight above
    +----------------+
    |  ###>          |    "which way does it move?"  right          its twin shows the same frames in the opposite order
    +----------------+                               left

Where the object starts and how fast it goes is drawn before its direction is, so that no frame by itself tells anything; and in
an exam twins stand side by side: a model that does not know the order gives both the same answer, and is right half of the time at most.
"""

from random import Random

from PIL import Image

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.world.scene import BACKGROUND, COLOURS, GRID, HELD_OUT, SIZES, Object, Scene, about, shape_mask

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TWIN = {"left": "right", "right": "left", "up": "down", "down": "up"}
FRAMES = {"direction": (8, 1.0), "direction_30": (30, 3.0)}  # of an exam: how many, and how many a second
EXAMS = tuple(FRAMES)
QUESTION = "which way does it move?"
SHORTEST = 16  # pixels that it moves in 30 frames, of GRID


def film(thing: Object, rng: Random, direction: str, frames: int, per_second: float, size: int = GRID) -> tuple[Image.Image, ...]:
    """The frames of a clip, each RGB, size by size pixels. The path does not depend on how many there are, nor on the direction."""
    room = GRID - SIZES[thing.size]
    seconds = (FRAMES["direction_30"][0] - 1) / FRAMES["direction_30"][1]  # of the longest clip, in which it stays in the picture
    way = rng.uniform(SHORTEST, room)
    middle, across = rng.uniform(way / 2, room - way / 2), rng.uniform(0, room)
    dx, dy = DIRECTIONS[direction]
    shown = []
    for number in range(frames):
        along = middle + (dx + dy) * (way / seconds * ((number - (frames - 1) / 2) / per_second))
        shown.append(frame(thing, (along, across) if dx else (across, along), size))
    return tuple(shown)


def frame(thing: Object, corner: tuple[float, float], size: int) -> Image.Image:
    """The object with its upper left corner there, in pixels of GRID: in no cell, unlike the objects of a scene."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    left, top, width = (round(length * size / GRID) for length in (*corner, SIZES[thing.size]))
    image.paste(COLOURS[thing.colour], (left, top), shape_mask(thing.shape, width))
    return image


def drawn(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """A clip of 8 frames to learn from: the question, or a sentence about it as a page would have it."""
    thing, direction = about(scene), rng.choice(tuple(DIRECTIONS))
    shown = (film(thing, rng, direction, *FRAMES["direction"], world.image_size),)
    text = f"a {thing.size} {thing.colour} {thing.shape} goes {direction}."
    if rng.random() < 0.5:
        return Sample("", shown, text, (text,), turns=(Turn(f"{IMAGE}{QUESTION}", direction, "direction"),), format="flamingo")
    return Sample("", shown, text, (text,), turns=(Turn(IMAGE, text, "caption"),), format="pages")


def examined(world: object, kind: str, index: int) -> Sample:
    """Numbers 2i and 2i + 1 are twins: the same frames in opposite orders. The two exams show the same clips."""
    rng = Random(f"exam/direction/{index // 2}")
    colour, shape = HELD_OUT[index // 4 % len(HELD_OUT)]
    thing = Object(colour, shape, rng.choice(tuple(SIZES)), "")
    direction = ("left", "up")[index // 2 % 2]
    direction = TWIN[direction] if index % 2 else direction
    shown = (film(thing, rng, direction, *FRAMES[kind], world.image_size),)
    return Sample(f"scenes/exam/{kind}/{index}", shown, turns=(Turn(f"{IMAGE}{QUESTION}", direction, kind),), format="flamingo")
