"""The noisy web: captions of which four in ten do not fit their picture, each with a hidden label that says why.

For CapFilt (BLIP, arXiv:2201.12086, Section 3.3): a filter has to find these texts, and a captioner to write better ones.
The label is what the filter is judged by; no model reads it.

    scene        large red circle, top left · small blue square, top right

    ""           a large red circle in the top left and a small blue square in the top right.     (six in ten: right)
    swapped      small green star bottom left.                                                     another scene's caption
    wrong fact   a large red circle in the top left and a small green square in the top right.     see say.negatives
    vague        see more at our shop.                                                             nothing about the picture
    cut          a large red circle in the top left and a small                                    cut off, or
                 a large red circle in the top left and a small blue square in the top right. small green
                                                                                       the first words of another caption follow
A kind is a function of (scene, wording, rng, pairs that may be mentioned, what draws another scene). What the wording leaves
out is left out of every noisy text too: of a picture in colours without names no text tells a colour.

differs from the paper: there the noise comes with the texts of the web, and nobody knows which of them are right.
"""

from collections.abc import Callable
from random import Random

from nanovlm.world.say import Wording, caption, captions, negatives, say
from nanovlm.world.scene import Scene

Draw = Callable[[Random], Scene]
RATE = 0.4  # noisy texts, of all
# No word takes the tokenizer more than three tokens, and none names a fact of a scene.
VAGUE = ("picture {:04}.", "image {:04}.", "photo {} by me.", "look what i found!", "take a look!", "no caption yet.", "more to come.",
         "for sale.", "what do you say?", "this is all i have.", "seen at the shop today.", "see more at our shop.")


def noisy(scene: Scene, wording: Wording, rng: Random, pairs: tuple, draw: Draw, rate: float = RATE) -> tuple[str, str]:
    """(text, kind of noise): the caption in the given wording and "", or at the given rate a noisy text, all kinds equally often."""
    if rng.random() >= rate:
        return say(scene, wording), ""
    kind = rng.choice(tuple(KINDS))
    return KINDS[kind](scene, wording, rng, pairs, draw), kind


def swapped(scene: Scene, wording: Wording, rng: Random, pairs: tuple, draw: Draw) -> str:
    """A caption of another scene. Two scenes that share one caption share them all, so it is none of this scene's."""
    right = captions(scene, wording.left_out)
    while (text := caption(draw(rng), rng, wording.left_out)) in right:
        pass
    return text


def wrong_fact(scene: Scene, wording: Wording, rng: Random, pairs: tuple, draw: Draw) -> str:
    return negatives(scene, wording, rng, k=1, pairs=pairs)[0]


def vague(scene: Scene, wording: Wording, rng: Random, pairs: tuple, draw: Draw) -> str:
    return rng.choice(VAGUE).format(rng.randrange(10_000))


def cut(scene: Scene, wording: Wording, rng: Random, pairs: tuple, draw: Draw) -> str:
    """The caption's first words, or all of it and another caption's first words: a whole caption has one full stop, at its end."""
    text = say(scene, wording)
    return _begun(text, rng) if rng.random() < 0.5 else f"{text} {_begun(swapped(scene, wording, rng, pairs, draw), rng)}"


def _begun(text: str, rng: Random) -> str:
    """Its first words: a quarter to three quarters of them."""
    words = text.split()
    return " ".join(words[:rng.randint(len(words) // 4, len(words) * 3 // 4)])


KINDS = {"swapped": swapped, "wrong fact": wrong_fact, "vague": vague, "cut": cut}
