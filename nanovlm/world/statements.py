"""Statements about two pictures, each as often true as false: NLVR2 (1811.00491) in small.

    +---------+  +---------+     both pictures show a red circle.                            true: both do
    |  ●   ▲  |  |  ■      |     there is a star in only one picture.                        true: one does, and the other does not
    |         |  |      ●  |     the left picture has more objects than the right one.       true: it has

What is said is drawn first, then whether it shall be true, then pictures until it is as it shall be. So the words alone tell nothing
of the truth. Nor does one picture alone of "only one", as each shows what is looked for every second time; of the others one
picture tells something.

Training: SEEN pairs, shown and said. Held out: each picture shows a HELD_OUT pair, and what is looked for is one, or its colour or
shape.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Protocol

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.world.scene import COLOURS, HELD_OUT, PAIRS, SEEN, Scene

Stated = tuple[str, Callable[[Scene, Scene], bool]]  # what is said, and whether it holds of (left, right)


class World(Protocol):
    def scene(self, rng: Random, pairs: tuple, including: tuple) -> Scene:
        """One with one of the pairs `including`, with any where these are ()."""

    def picture(self, scene: Scene) -> tuple: ...


def drawn(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """In training, or like it of held-out scenes; `scene` itself plays no part, for there have to be two."""
    return statement(world, rng, rng.choice(tuple(KINDS)), rng.random() < 0.5, pairs is not SEEN)


def examined(world: World, index: int) -> Sample:
    """Each kind in turn, false and then true."""
    true, kind = divmod(index % (2 * len(KINDS)), len(KINDS))
    sample = statement(world, Random(f"statement/{index}"), tuple(KINDS)[kind], bool(true), True)
    return replace(sample, id=f"scenes/statement/{index}")


def statement(world: World, rng: Random, kind: str, true: bool, held_out: bool) -> Sample:
    pairs, about, usual = (PAIRS, HELD_OUT, HELD_OUT) if held_out else (SEEN, SEEN, ())
    pair = rng.choice(about)
    words = rng.choice((pair, pair[:1], pair[1:]))  # red circle, red object, circle
    text, holds = KINDS[kind](rng, words)

    def showing(wanted: bool) -> Scene:
        """A scene that shows what is looked for, or one that does not."""
        while True:
            scene = world.scene(rng, pairs, including=(pair,) if wanted else usual)
            if shows(scene, words) == wanted:
                return scene

    while True:
        left, right = (showing(rng.random() < 0.5) for _ in range(2))
        if holds(left, right) == true:
            turn = Turn(f"{IMAGE}\n{IMAGE}\n{text}", "yes" if true else "no", "statement")
            return Sample("", (*world.picture(left), *world.picture(right)), turns=(turn,))


def both(rng: Random, words: tuple) -> Stated:
    return f"both pictures show {_a(words)}.", lambda left, right: shows(left, words) and shows(right, words)


def one(rng: Random, words: tuple) -> Stated:
    return f"there is {_a(words)} in only one picture.", lambda left, right: shows(left, words) != shows(right, words)


def more(rng: Random, words: tuple) -> Stated:
    side, other = rng.sample(("left", "right"), 2)
    how = rng.choice(("more", "fewer"))
    sign = 1 if (side, how) in (("left", "more"), ("right", "fewer")) else -1
    return (f"the {side} picture has {how} objects than the {other} one.",
            lambda left, right: sign * len(left.objects) > sign * len(right.objects))


KINDS = {"both": both, "one": one, "more": more}


def shows(scene: Scene, words: tuple) -> bool:
    """Is there an object of this look? words: a colour, a shape, or both."""
    return any(set(words) <= set(thing.pair) for thing in scene.objects)


def _a(words: tuple) -> str:
    return f"a {' '.join(words)}" + (" object" if words[-1] in COLOURS else "")
