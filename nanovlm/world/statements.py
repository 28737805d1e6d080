"""Statements about two pictures, each as often true as false: NLVR2 (1811.00491) in small.

    +---------+  +---------+     both pictures show a red circle.                            true: both do
    |  ●   ▲  |  |  ■      |     there is a star in exactly one picture.                     true: one does, and the other does not
    |         |  |      ●  |     the left picture has more objects than the right one.       true: it has

What is said is drawn first, then whether it shall be true, then pictures until it is as it shall be. So the words alone tell nothing
of the truth. Nor does one picture alone of "exactly one", as each shows what is looked for every second time; of the others one
picture tells something.

Training: SEEN pairs, shown and said. Held out: each picture shows a HELD_OUT pair, and what is looked for is one, or its colour or
shape.
"""

from collections.abc import Callable
from random import Random

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.world.scene import COLOURS, Scene

KINDS = ("both", "one", "more")
Draw = Callable[[Random, tuple], Scene]  # of (rng, pairs) a scene with one of these pairs; with any, of ()


def statement(rng: Random, kind: str, true: bool, pairs: tuple, draw: Draw, picture: Callable[[Scene], tuple]) -> Sample:
    """One of KINDS, about something of `pairs`."""
    pair = rng.choice(pairs)
    words = rng.choice((pair, pair[:1], pair[1:]))  # red circle, red object, circle
    text, holds = {"both": _both, "one": _one, "more": _more}[kind](rng, words)
    while True:
        scenes = [_showing(rng, words, pair, rng.random() < 0.5, draw) for _ in range(2)]
        if holds(*scenes) == true:
            turn = Turn(f"{IMAGE}\n{IMAGE}\n{text}", "yes" if true else "no", "statement")
            return Sample("", (*picture(scenes[0]), *picture(scenes[1])), turns=(turn,))


def _showing(rng: Random, words: tuple, pair: tuple, wanted: bool, draw: Draw) -> Scene:
    """A scene that shows what is looked for, or one that does not."""
    while True:
        scene = draw(rng, (pair,) if wanted else ())
        if shows(scene, words) == wanted:
            return scene


Stated = tuple[str, Callable[[Scene, Scene], bool]]  # what is said, and whether it holds of (left, right)


def _both(rng: Random, words: tuple) -> Stated:
    return f"both pictures show {_a(words)}.", lambda left, right: shows(left, words) and shows(right, words)


def _one(rng: Random, words: tuple) -> Stated:
    return f"there is {_a(words)} in exactly one picture.", lambda left, right: shows(left, words) != shows(right, words)


def _more(rng: Random, words: tuple) -> Stated:
    side, other = rng.sample(("left", "right"), 2)
    how, sign = rng.choice((("more", 1), ("fewer", -1)))
    sign = sign if side == "left" else -sign
    return (f"the {side} picture has {how} objects than the {other} one.",
            lambda left, right: sign * (len(left.objects) - len(right.objects)) > 0)


def shows(scene: Scene, words: tuple) -> bool:
    """Is there an object of this look? words: a colour, a shape, or both."""
    return any(set(words) <= set(thing.pair) for thing in scene.objects)


def _a(words: tuple) -> str:
    return f"a {' '.join(words)}" + (" object" if words[-1] in COLOURS else "")
