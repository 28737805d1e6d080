"""Questions about a scene that have exactly one right answer, and conversations made of them.

    scene      large red circle, top left · small blue square, top right · the digit 7, bottom left

    colour     what colour is the square?                          blue
    shape      what shape is the object in the top left?           circle
    size       what size is the red circle?                        large
    position   where is the red object?                            top left
    count      how many objects are there?                         two          (a sign is not an object)
    relation   on which side of the square is the circle?          left         (same row or column only)
    existence  is there a blue circle? is there a star?            no           (as often as yes)
    comparison which is larger, the square or the circle?          circle       (only if one is)
    reading    what does the sign say?                             7
    follow_up  [what colour is the square? blue] and where is it?  top right    (not answerable without the turn before)

An object is called by any name that means it alone and does not give the answer away: "the circle" only if there is one.
"""

from dataclasses import dataclass, replace
from random import Random

from nanovlm.data.sample import IMAGE, Turn
from nanovlm.world.drills import absent
from nanovlm.world.say import caption
from nanovlm.world.scene import ATTRIBUTES, COUNTS, PAIRS, Object, Scene, side

KINDS = (*ATTRIBUTES, "count", "relation", "existence", "comparison", "reading", "follow_up")

ASK = {
    "colour": ("what colour is {}?", "what is the colour of {}?"),
    "shape": ("what shape is {}?", "what is the shape of {}?"),
    "size": ("what size is {}?", "how big is {}?"),
    "position": ("where is {}?", "in which corner is {}?"),
    "existence": ("is there a {}?", "do you see a {}?"),
    "reading": ("what is written?", "what does the sign say?"),
    "object": ("describe {}.", "tell me about {}."),
    "relation": ("on which side of {} is {}?", "seen from {}, where is {}?"),
}
FOLLOW_UP = {
    "colour": "and what colour is it?",
    "shape": "and what shape is it?",
    "size": "and what size is it?",
    "cell": "and where is it?",
}
DESCRIBE = "describe the picture."

LONG_ENOUGH = 16  # words of a conversation about a picture

# How often each kind is asked: some need a scene that allows them, and some are harder to learn.
WEIGHTS = {
    "colour": 0.7, "shape": 1.0, "size": 0.7, "position": 1.2, "count": 1.5, "object": 1.0,
    "existence": 3.0, "relation": 6.0, "comparison": 5.0, "reading": 4.0,
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
    if kind == "object":
        return _ask_object(scene, rng)
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


def conversation(scene: Scene, rng: Random, pairs: tuple = PAIRS, enough: int = LONG_ENOUGH) -> tuple[Turn, ...]:
    """Questions with one answer, of which the first may be a request for a caption, until about `enough` words are said.

    All are then of about the same length: a batch is as long as its longest row, and with one to three questions in a row half
    of it would be padding.
    """
    talk = (Turn(DESCRIBE, caption(scene, rng), "caption"),) if rng.random() < 0.15 else ()
    return questions(scene, rng, pairs, talk, enough)


def questions(scene: Scene, rng: Random, pairs: tuple = PAIRS, before: tuple[Turn, ...] = (),
              enough: int = LONG_ENOUGH) -> tuple[Turn, ...]:
    """Questions with one answer, some of which lean on the one before, until enough is said; after the turns `before`."""
    talk = list(before)
    while _words(talk) < enough:
        asked = ask(scene, rng, rng.choices(tuple(WEIGHTS), WEIGHTS.values())[0], pairs)
        while asked and _words(talk) < enough and asked.turn.question not in [turn.question for turn in talk]:
            talk.append(asked.turn)
            asked = follow_up(scene, rng, asked) if rng.random() < 0.5 else None
    return tuple(talk)


def put_before(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The mark of a picture on a line of its own before the first question."""
    first = turns[0]
    return (replace(first, question=f"{IMAGE}\n{first.question}"), *turns[1:])


def _words(talk: list[Turn]) -> int:
    return sum(len(f"{turn.question} {turn.answer}".split()) for turn in talk)


def _names(scene: Scene, thing: Object) -> list[tuple[str, frozenset[str]]]:
    """Every name that means this object alone, with the fields that the name tells."""
    cell = (f"the object in the {thing.cell}", frozenset({"cell"}))
    return [cell, *((name, told) for name, told in _looks(thing) if len(_meant(scene, told, thing)) == 1)]


def _looks(thing: Object) -> list[tuple[str, frozenset[str]]]:
    """What the object may be called by its look, with the fields that this tells."""
    return [
        (f"the {thing.colour} {thing.shape}", frozenset({"colour", "shape"})),
        (f"the {thing.shape}", frozenset({"shape"})),
        (f"the {thing.colour} object", frozenset({"colour"})),
    ]


def _meant(scene: Scene, told: frozenset[str], thing: Object) -> list[Object]:
    """The objects of the scene that are like this one in the fields that were told."""
    return [other for other in scene.objects if all(getattr(other, f) == getattr(thing, f) for f in told)]


def _named_alike(scene: Scene, rng: Random, one: Object, two: Object) -> tuple[str, str]:
    """Names of the same kind for both, by their looks: both shapes, both colours, or both in full."""
    couples = [
        (first, second)
        for (first, told), (second, _) in zip(_looks(one), _looks(two))
        if len(_meant(scene, told, one)) == len(_meant(scene, told, two)) == 1
    ]
    return rng.choice(couples)


def _ask_attribute(scene: Scene, rng: Random, kind: str) -> Asked:
    wording, field = rng.choice(ASK[kind]), ATTRIBUTES[kind]
    thing = rng.choice(scene.things if kind == "position" else scene.objects)
    if thing is scene.sign:
        return Asked(Turn(wording.format(f"the {thing.type}"), thing.cell, kind))
    name, told = rng.choice([(name, told) for name, told in _names(scene, thing) if field not in told])
    return Asked(Turn(wording.format(name), getattr(thing, field), kind), (thing.pair,), thing, told | {field})


def _ask_object(scene: Scene, rng: Random) -> Asked:
    """All facts of one object at once: what has to be found is found for four answers together."""
    thing = rng.choice(scene.objects)
    name, _ = rng.choice(_names(scene, thing))
    answer = f"{thing.size} {thing.colour} {thing.shape}, {thing.cell}"
    return Asked(Turn(rng.choice(ASK["object"]).format(name), answer, "object"), (thing.pair,))


def _ask_count(scene: Scene, rng: Random) -> Asked:
    numbers = {"objects": len(scene.objects)}  # what is counted -> how many there are
    for thing in scene.objects:
        plural = "crosses" if thing.shape == "cross" else f"{thing.shape}s"
        for what in (f"{thing.colour} objects", f"{thing.size} objects", plural):
            numbers[what] = numbers.get(what, 0) + 1
    # Most of these numbers are one: larger ones are asked for more often, so that "one" is not the answer to all.
    what = rng.choices(list(numbers), [number**2 for number in numbers.values()])[0]
    return Asked(Turn(f"how many {what} are there?", COUNTS[numbers[what] - 1], "count"))


def _ask_relation(scene: Scene, rng: Random) -> Asked | None:
    couples = [(one, two) for one in scene.objects for two in scene.objects if one is not two and side(one, two)]
    if not couples:
        return None
    one, two = rng.choice(couples)
    name, landmark = _named_alike(scene, rng, one, two)
    question = rng.choice(ASK["relation"]).format(landmark, name)
    return Asked(Turn(question, side(one, two), "relation"), (one.pair, two.pair))


def _ask_existence(scene: Scene, rng: Random, pairs: tuple) -> Asked:
    """Yes as often as no; about a colour, a shape, or both together."""
    there = rng.random() < 0.5
    thing = rng.choice(scene.objects)
    if not there:
        colour, shape = absent(scene, rng, pairs)
        thing = replace(thing, colour=colour, shape=shape)
    name, told = rng.choice([(n, told) for n, told in _looks(thing) if bool(_meant(scene, told, thing)) == there])
    question = rng.choice(ASK["existence"]).format(name.removeprefix("the "))
    about = (thing.pair,) if there or len(told) == 2 else ()
    alone = there and len(_meant(scene, told, thing)) == 1  # else "it" would mean nothing, or several
    return Asked(Turn(question, "yes" if there else "no", "existence"), about, thing if alone else None, told)


def _ask_comparison(scene: Scene, rng: Random) -> Asked | None:
    couples = [(one, two) for one in scene.objects for two in scene.objects if one.size != two.size]
    if not couples:
        return None
    one, two = rng.choice(couples)
    word, size = rng.choice((("larger", "large"), ("smaller", "small")))
    right = one if one.size == size else two
    names = _named_alike(scene, rng, one, two)
    question = f"which is {word}, {names[0]} or {names[1]}?"
    answer = names[(one, two).index(right)].removeprefix("the ")
    return Asked(Turn(question, answer, "comparison"), (one.pair, two.pair))
