"""Questions about a scene that have exactly one right answer, and conversations made of them.

    scene      large red circle, top left · small blue square, top right · the digit 7, bottom left

    colour     what colour is the square?                          blue
    shape      what shape is the object in the top left?           circle
    size       what size is the red circle?                        large
    position   where is the red object?                            top left
    count      how many objects are there?                         two          (a sign is not an object)
    relation   on which side of the blue square is the red circle? left         (same row or column only)
    existence  is there a blue circle?                             no           (as often as yes)
    comparison which is larger, the blue square or the red circle? red circle   (only if one is)
    reading    what does the sign say?                             7
    follow_up  [what colour is the square? blue] and where is it?  top right    (not answerable without the turn before)

An object is called by any name that means it alone and does not give the answer away: "the circle" only if there is one.
"""

from dataclasses import dataclass
from random import Random

from nanovlm.data.conversation import Turn
from nanovlm.data.scene_language import caption
from nanovlm.data.scene_world import PAIRS, Object, Scene, side

ATTRIBUTES = {"colour": "colour", "shape": "shape", "size": "size", "position": "cell"}  # kind -> field of Object
KINDS = (*ATTRIBUTES, "count", "relation", "existence", "comparison", "reading", "follow_up")
NUMBERS = ("one", "two", "three", "four")

ASK = {
    "colour": ("what colour is {}?", "what is the colour of {}?"),
    "shape": ("what shape is {}?", "what is the shape of {}?"),
    "size": ("what size is {}?", "how big is {}?"),
    "position": ("where is {}?", "in which corner is {}?"),
    "existence": ("is there a {}?", "do you see a {}?"),
    "reading": ("what is written?", "what does the sign say?"),
    "relation": ("on which side of {} is {}?", "seen from {}, where is {}?"),
}
FOLLOW_UP = {
    "colour": "and what colour is it?",
    "shape": "and what shape is it?",
    "size": "and what size is it?",
    "cell": "and where is it?",
}
DESCRIBE = "describe the picture."

# Some kinds need a scene that allows them. These weights even out how often each is asked in a conversation.
WEIGHTS = {
    "colour": 1.0, "shape": 1.0, "size": 1.0, "position": 1.0, "count": 1.0,
    "existence": 1.0, "relation": 3.0, "comparison": 6.0, "reading": 20.0,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A turn, and what is needed to go on from it."""

    turn: Turn
    about: tuple[tuple[str, str], ...] = ()  # the (colour, shape) pairs that the question turns on
    it: Object | None = None  # what "it" means in the next question
    told: frozenset[str] = frozenset()  # the fields of `it` that have been told or asked


def ask(scene: Scene, rng: Random, kind: str, pairs: tuple = PAIRS) -> Asked | None:
    """A question of this kind that mentions no pair outside `pairs`; None if the scene has no such question."""
    if kind in ATTRIBUTES:
        return _ask_attribute(scene, rng, kind)
    if kind == "count":
        return _ask_count(scene, rng)
    if kind == "relation":
        return _ask_relation(scene, rng)
    if kind == "existence":
        return _ask_existence(scene, rng, pairs)
    if kind == "comparison":
        return _ask_comparison(scene, rng)
    if kind == "reading" and scene.sign:
        return Asked(Turn(rng.choice(ASK[kind]), scene.sign.text, kind))
    return None


def follow_up(scene: Scene, rng: Random, before: Asked) -> Asked | None:
    """A question about "it", which the turn before named. It is not asked where all objects have the same answer."""
    it = before.it
    if it is None:
        return None
    fields = [
        field
        for field in FOLLOW_UP
        if field not in before.told and any(getattr(o, field) != getattr(it, field) for o in scene.objects)
    ]
    if not fields:
        return None
    field = rng.choice(fields)
    return Asked(Turn(FOLLOW_UP[field], getattr(it, field), "follow_up"), (it.pair,), it, before.told | {field})


def conversation(scene: Scene, rng: Random, turns: int = 4, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    """Up to `turns` questions of different kinds in random order; three times in ten one of them asks for a caption."""
    talk: list[Turn] = []
    describe = rng.random() < 0.3
    room = turns - 2 * describe  # a caption is as long as two turns
    # Weighted order without replacement (Efraimidis and Spirakis, 2006).
    for kind in sorted(WEIGHTS, key=lambda kind: rng.random() ** (1 / WEIGHTS[kind]), reverse=True):
        asked = ask(scene, rng, kind, pairs) if len(talk) < room else None
        while asked and len(talk) < room and asked.turn.question not in [turn.question for turn in talk]:
            talk.append(asked.turn)
            asked = follow_up(scene, rng, asked) if rng.random() < 0.4 else None
    if describe:
        talk.insert(rng.choice((0, len(talk))), Turn(DESCRIBE, caption(scene, rng), "caption"))
    return tuple(talk)


def _names(scene: Scene, thing: Object) -> list[tuple[str, frozenset[str]]]:
    """Every name that means this object alone, with the fields that the name tells."""
    names = [
        (f"the object in the {thing.cell}", frozenset({"cell"})),
        (_full_name(thing), frozenset({"colour", "shape"})),
    ]
    if sum(other.shape == thing.shape for other in scene.objects) == 1:
        names.append((f"the {thing.shape}", frozenset({"shape"})))
    if sum(other.colour == thing.colour for other in scene.objects) == 1:
        names.append((f"the {thing.colour} object", frozenset({"colour"})))
    return names


def _full_name(thing: Object) -> str:
    return f"the {thing.colour} {thing.shape}"


def _ask_attribute(scene: Scene, rng: Random, kind: str) -> Asked:
    wording, field = rng.choice(ASK[kind]), ATTRIBUTES[kind]
    thing = rng.choice(scene.things if kind == "position" else scene.objects)
    if thing is scene.sign:
        return Asked(Turn(wording.format(f"the {thing.type}"), thing.cell, kind))
    name, told = rng.choice([(name, told) for name, told in _names(scene, thing) if field not in told])
    return Asked(Turn(wording.format(name), getattr(thing, field), kind), (thing.pair,), thing, told | {field})


def _ask_count(scene: Scene, rng: Random) -> Asked:
    numbers = {"objects": len(scene.objects)}  # what is counted -> how many there are
    for thing in scene.objects:
        plural = "crosses" if thing.shape == "cross" else f"{thing.shape}s"
        for what in (f"{thing.colour} objects", f"{thing.size} objects", plural):
            numbers[what] = numbers.get(what, 0) + 1
    # Most of these numbers are one: larger ones are asked for more often, so that "one" is not the answer to all.
    what = rng.choices(list(numbers), [number**2 for number in numbers.values()])[0]
    return Asked(Turn(f"how many {what} are there?", NUMBERS[numbers[what] - 1], "count"))


def _ask_relation(scene: Scene, rng: Random) -> Asked | None:
    couples = [(one, two) for one in scene.objects for two in scene.objects if one is not two and side(one, two)]
    if not couples:
        return None
    one, two = rng.choice(couples)
    question = rng.choice(ASK["relation"]).format(_full_name(two), _full_name(one))
    return Asked(Turn(question, side(one, two), "relation"), (one.pair, two.pair))


def _ask_existence(scene: Scene, rng: Random, pairs: tuple) -> Asked:
    wording = rng.choice(ASK["existence"])
    if rng.random() < 0.5:
        thing = rng.choice(scene.objects)
        turn = Turn(wording.format(f"{thing.colour} {thing.shape}"), "yes", "existence")
        return Asked(turn, (thing.pair,), thing, frozenset({"colour", "shape"}))
    present = [thing.pair for thing in scene.objects]
    absent = [pair for pair in pairs if pair not in present]
    colours, shapes = {pair[0] for pair in present}, {pair[1] for pair in present}
    # Half of the wrong pairs are near misses: both words are in the picture, though not together, or else one is.
    near = [[p for p in absent if (p[0] in colours) + (p[1] in shapes) == words] for words in (2, 1)]
    pair = rng.choice(absent if rng.random() < 0.5 else near[0] or near[1])
    return Asked(Turn(wording.format(" ".join(pair)), "no", "existence"), (pair,))


def _ask_comparison(scene: Scene, rng: Random) -> Asked | None:
    couples = [(one, two) for one in scene.objects for two in scene.objects if one.size != two.size]
    if not couples:
        return None
    one, two = rng.choice(couples)
    word, size = rng.choice((("larger", "large"), ("smaller", "small")))
    right = one if one.size == size else two
    question = f"which is {word}, {_full_name(one)} or {_full_name(two)}?"
    return Asked(Turn(question, f"{right.colour} {right.shape}", "comparison"), (one.pair, two.pair))
