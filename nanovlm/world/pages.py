"""Pages, on which one thing after another is shown and said: what a model that learns from its context has read.

"Flamingo" (2204.14198) §2.4 (M3W) and §3.3 (few-shot prompts), in the form of texts: words stand where pictures will.

    names   <red star> Output: dax. <blue square> Output: wug. <red star> Output: dax.     made-up words, other ones on every page:
                                                                                           only the page itself tells what they mean
    shots   <scene> Question: what colour is the square? Answer: blue. <scene> Question: … as in-context examples
"""

from random import Random

from nanovlm.data.sample import IMAGE, Turn
from nanovlm.world.ask import KINDS, ask
from nanovlm.world.say import DESCRIPTIONS, caption, description
from nanovlm.world.scene import PAIRS, Scene

NAMES = ("dax", "wug", "blik", "toma", "fep", "gorp", "zib", "kesh", "lorn", "mip", "nuz", "pelk", "quim", "rud", "sarf", "tink",
         "vop", "yeb", "bamo", "clon", "dreb", "flim", "grun", "hosk", "jate", "kiv", "lumo", "murk", "plom", "snig", "thop", "wex")
KNOWN = 4  # classes that have names on one page
MOST_SHOTS = 8

Page = tuple[tuple[Turn, ...], tuple[str, ...]]  # turns with a mark each, and what is told in the marks' places


def names(rng: Random, shots: int, asked_known: bool = False) -> Page:
    """`shots` things with their names, then one more, of the KNOWN classes of the page. asked_known: of those already shown."""
    classes = [" ".join(pair) for pair in rng.sample(PAIRS, KNOWN)]
    meant = dict(zip(classes, rng.sample(NAMES, KNOWN)))
    shown = [rng.choice(classes) for _ in range(shots)]
    shown.append(rng.choice(shown if asked_known and shown else classes))
    return tuple(Turn(IMAGE, meant[thing], "names") for thing in shown), tuple(shown)


def shots(scenes: list[Scene], rng: Random, kind: str = "") -> Page:
    """The same kind of question about one scene after another, or their captions; about the last one it is always asked."""
    kind = kind or rng.choice((*KINDS[:-1], "caption"))
    told, turns = [], []
    for scene in scenes:
        asked = None if kind == "caption" else ask(scene, rng, kind) or ask(scene, rng, "colour")
        turns.append(Turn(f"{IMAGE}{asked.turn.question}", asked.turn.answer, asked.turn.kind) if asked
                     else Turn(IMAGE, caption(scene, rng), "caption"))
        told.append(description(scene, rng, DESCRIPTIONS[:1]))
    return tuple(turns), tuple(told)
