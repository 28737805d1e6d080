"""Drills: questions whose answer is a list of lookups. They are in none of the papers.

A model that meets "what colour is the square?" at once is content with the two or three colours of the scene for thousands of
steps and never learns to look for the square. A list leaves no such way out: each of its answers stands behind another look.

    repeat     say it again.                                       top left: large red circle. …     (texts only)
    notes      take notes.                                         blue small top right square; digit 7 bottom left; …
    census     count red, star, blue circle.                       red one, star none, blue circle none.
    places     find square, red, digit.                            square top right, red top left, digit bottom left.
    sides      sides of square red, circle square.                 square red right, circle square left.
    letters    colour of square, star. A. red B. blue …            square B, star A.
    boxes      boxes of square.                                    square [0.60, 0.10, 0.88, 0.38].
"""

from collections.abc import Sequence
from random import Random

from nanovlm.data.sample import Turn
from nanovlm.world.say import DESCRIPTIONS, description, notes
from nanovlm.world.scene import ATTRIBUTES, CELLS, COLOURS, COUNTS, PAIRS, SHAPES, SIZES, Object, Scene, boxes, side

NOTES = "take notes."
COLOURLESS = "take notes, colours aside."
REPEAT = "say it again."

OPTIONS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "position": CELLS,
           "count": COUNTS, "relation": ("left", "right", "above", "below")}


def repeat(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Of a scene that is told, for it has no other words: to find a word again, and to go on from it."""
    return Turn(REPEAT, description(scene, rng, DESCRIPTIONS[:1]), "repeat")


def dense(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """A question whose answer is many answers: a census most often, since what is not there is the hardest to see."""
    lesson = rng.choices((_notes, census, places, sides), (2, 3, 1, 2))[0]
    return lesson(scene, rng, pairs) or _notes(scene, rng, pairs)


def colourless(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Of objects in colours that have no name."""
    return Turn(COLOURLESS, notes(scene, rng, colours=False), "notes")


def _notes(scene: Scene, rng: Random, pairs: tuple) -> Turn:
    return Turn(NOTES, notes(scene, rng), "notes")


def census(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Five looks in one question, and how many objects each fits: what "is there" and "how many" need, and densely so."""
    named = [absent(scene, rng, pairs), *(thing.pair for thing in scene.objects)]
    looks = [*COLOURS, *SHAPES, "large", "small", *map(" ".join, named)]
    there = [look for look in looks if fitting(scene, look)]
    asked = rng.sample(there, min(3, len(there)))
    asked += rng.sample([look for look in looks if look not in there], 5 - len(asked))
    rng.shuffle(asked)
    numbers = [("none", *COUNTS)[fitting(scene, look)] for look in asked]
    return Turn(f"count {', '.join(asked)}.", ", ".join(f"{look} {n}" for look, n in zip(asked, numbers)) + ".", "census")


def places(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Up to four things by name, and the corner of each: what "where is" needs."""
    named = [(look, thing.cell) for thing in scene.objects for look in single_looks(scene, thing)]
    named += [(thing.type, thing.cell) for thing in (scene.sign,) if thing]
    asked = rng.sample(named, min(4, len(named)))
    answer = ", ".join(f"{look} {cell}" for look, cell in asked)
    return Turn(f"find {', '.join(look for look, _ in asked)}.", f"{answer}.", "places")


def sides(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn | None:
    """Up to four couples of names, and where the first stands as seen from the second; None if none is in line."""
    couples = [
        (f"{look} {landmark}", side(one, two))
        for one in scene.objects for two in scene.objects if one is not two and side(one, two)
        for look, landmark in zip(looks_of(one), looks_of(two))
        if {look, landmark} <= {*single_looks(scene, one), *single_looks(scene, two)}
    ]
    if not couples:
        return None
    asked = rng.sample(couples, min(4, len(couples)))
    answer = ", ".join(f"{names} {where}" for names, where in asked)
    return Turn(f"sides of {', '.join(names for names, _ in asked)}.", f"{answer}.", "sides")


def letters(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Up to four things by name, and the letter before what each is: what a choice of options needs, and densely so."""
    kind = rng.choice(tuple(ATTRIBUTES))
    field = ATTRIBUTES[kind]
    named = [(look, getattr(thing, field)) for thing in scene.objects for look in single_looks(scene, thing)
             if getattr(thing, field) not in look.split()]
    asked = rng.sample(named, min(4, len(named)))
    if not asked:
        return dense(scene, rng, pairs)
    right = list(dict.fromkeys(answer for _, answer in asked))
    wrong = [answer for answer in OPTIONS[kind] if answer not in right]
    choices = [*right, *rng.sample(wrong, min(len(wrong), max(0, 4 - len(right))))]
    rng.shuffle(choices)
    answer = ", ".join(f"{look} {'ABCD'[choices.index(value)]}" for look, value in asked)
    return Turn(f"{kind} of {', '.join(look for look, _ in asked)}.\n{enumerated(choices)}", f"{answer}.", "letters")


def boxes_of(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> Turn:
    """Two things by name, and the box of each."""
    named = [(look, thing) for thing in scene.objects for look in single_looks(scene, thing)]
    asked = rng.sample(named, min(2, len(named)))
    answer = ", ".join(f"{look} {box(scene, thing)}" for look, thing in asked)
    return Turn(f"boxes of {', '.join(look for look, _ in asked)}.", f"{answer}.", "boxes")


def enumerated(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices))


def box(scene: Scene, thing: Object) -> str:
    """Left, top, right, bottom as fractions of the picture, two decimals (how many is not published)."""
    corners = dict(zip(scene.things, (corners for _, corners in boxes(scene))))[thing]
    return f"[{', '.join(f'{x:.2f}' for x in corners)}]"


def looks_of(thing: Object) -> tuple[str, str, str]:
    return thing.colour, thing.shape, " ".join(thing.pair)


def single_looks(scene: Scene, thing: Object) -> list[str]:
    """The looks that this object alone has."""
    return [look for look in looks_of(thing) if fitting(scene, look) == 1]


def fitting(scene: Scene, look: str) -> int:
    """How many objects have all of these words."""
    return sum(set(look.split()) <= {thing.size, *thing.pair} for thing in scene.objects)


def absent(scene: Scene, rng: Random, pairs: tuple) -> tuple[str, str]:
    """A pair that is not in the picture; every second one is a near miss, both of whose words are."""
    present = [thing.pair for thing in scene.objects]
    absent = [pair for pair in pairs if pair not in present]
    colours, shapes = {pair[0] for pair in present}, {pair[1] for pair in present}
    near = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    return rng.choice(near if near and rng.random() < 0.5 else absent)
