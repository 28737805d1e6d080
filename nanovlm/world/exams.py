"""What is asked of held-out scenes: as many samples of each kind of question, whose last turn is to be judged.

Every scene has an object with a HELD_OUT pair. Scenes are drawn until the answer is the one whose turn it is (so that all answers
are equally frequent) and, unless the question is about no object in particular, until it is about a held-out pair. For
"existence" that goes for yes and no alike, and every second pair that is not there is a near miss. A follow-up stands after the
turn that it needs.

    colour      red, green, blue, yellow, …   in turn           caption          any held-out scene, said in one sentence
    relation    left, right, above, below     in turn           caption of two   two objects and no sign
    option, region, grounding, chat           see mixture.py    science          see mixture.py
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from nanovlm.data.prompts import SHORT, prompted
from nanovlm.data.sample import Turn
from nanovlm.world import mixture, pages, tasks
from nanovlm.world.ask import DESCRIBE, FOLLOW_UP, KINDS, Asked, ask, follow_up, put_before
from nanovlm.world.say import DESCRIPTIONS, caption, captions, description
from nanovlm.world.scene import (
    ATTRIBUTES,
    CELLS,
    COLOURS,
    COUNTS,
    DIGITS,
    HELD_OUT,
    NUMBERS,
    PAIRS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    random_scene,
)

TWO = "caption of two"  # to describe a scene of two objects and no sign; "caption": any scene
# The answers that are asked for in turn; a kind that is absent has too many to list.
ANSWERS = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "position": CELLS, "count": COUNTS,
    "relation": ("left", "right", "above", "below"), "existence": ("yes", "no"), "reading": DIGITS + WORDS,
}  # fmt: skip


# What a reader without eyes is asked, about scenes that are told: the ten kinds bare, with LLaVA-1.5's sentence and in BLIP-2's format,
# a caption, what only the mixture asks, InstructBLIP's tasks; and Flamingo's pages.
TOLD = {"told": (*KINDS, *(f"short/{kind}" for kind in KINDS), *(f"blip2/{kind}" for kind in KINDS), "caption", *mixture.KINDS,
                 "science_text", *(f"task/{group}" for group in tasks.NAMES)),
        "pages": (*(f"names/{shots}" for shots in range(pages.MOST_SHOTS + 1)), "shots/0", "shots/2")}
FORMATS = {"blip2": "blip2", "caption": "blip2", "task": "instructblip", "names": "flamingo", "shots": "flamingo"}


def kinds_of(view: str) -> tuple[str, ...]:
    """What is asked in a view: in "mixture" more kinds, in "science" questions with a picture and with a context in its place."""
    if view == "science":
        return mixture.SCIENCE
    return (*KINDS, *(mixture.KINDS if view == "mixture" else ()), "caption")


def answers(kind: str, small_print: bool = False) -> tuple[str, ...]:
    """Those that are asked for in turn; () where there are too many to list."""
    return NUMBERS if kind == "reading" and small_print else ANSWERS.get(kind, ())


def asked_in_turn(kind: str, index: int, draw: Callable[[Random], Scene], mixed: bool,
                  in_turn: tuple[str, ...]) -> tuple[Scene, tuple[Turn, ...]]:
    """A scene and what is asked about it, without the mark of its picture. draw: a held-out scene. in_turn: `answers(kind)`."""
    rng = Random(f"exam/{kind}/{index}")
    if kind == TWO:
        scene = random_scene(rng, PAIRS, including=HELD_OUT, many=2, signs=0)
        return scene, (Turn(DESCRIBE, caption(scene, rng), "caption"),)
    if kind in (*mixture.KINDS, *mixture.SCIENCE):
        scene = draw(rng)
        about = next(thing for thing in scene.objects if thing.pair in HELD_OUT)
        return scene, (mixture.examine(scene, rng, kind, about),)
    while True:
        scene = draw(rng)
        asked = _examine(scene, rng, kind)
        if asked and _wanted(scene, asked[-1], kind, index, in_turn):
            talk = tuple(one.turn for one in asked)
            return scene, prompted(talk, SHORT) if mixed else talk


def told_in_turn(kind: str, index: int, draw: Callable[[Random], Scene],
                 ) -> tuple[str, tuple[str, ...], tuple[Turn, ...], tuple[str, ...]]:
    """Of a question of TOLD its format, what is told, the turns with their marks, and what counts as right (of captions and the like)."""
    form, _, detail = kind.rpartition("/")
    form, rng, right = form or kind, Random(f"told/{kind}/{index}"), ()
    if form == "names":
        turns, told = pages.names(rng, int(detail), asked_known=True)
    elif form == "shots":
        turns, told = pages.shots([draw(rng) for _ in range(int(detail) + 1)], rng, rng.choice(KINDS[:-1]))
    else:
        if form == "task":
            shown, turns = tasks.examine(draw, rng, detail)
        else:
            scene, turns = _examined(kind, detail, index, draw)
            if kind == "chat":
                turns = (replace(turns[0], question=f"{turns[0].question}\n{mixture.SENTENCE}"),)
            shown = (scene,)
        boxed = kind in ("region", "grounding")
        told = (mixture.with_boxes(shown[0], rng) if boxed else " then ".join(description(s, rng, DESCRIPTIONS[:1]) for s in shown),)
        right = tasks.right_questions(shown[0], turns[-1]) if turns[-1].kind == "asking" else captions(shown[0])
        told, turns = ((), turns) if kind == "science_text" else (told, put_before(turns))  # a science text tells by itself
    return FORMATS.get(form, ""), told, turns, right


def _examined(kind: str, detail: str, index: int, draw: Callable[[Random], Scene]) -> tuple[Scene, tuple[Turn, ...]]:
    if kind == "caption":
        rng = Random(f"exam/{kind}/{index}")
        scene = draw(rng)
        return scene, (Turn("", caption(scene, rng), kind),)
    return asked_in_turn(detail, index, draw, kind.startswith("short"), answers(detail))


def _examine(scene: Scene, rng: Random, kind: str) -> list[Asked]:
    """The question, after the one that it needs if it is a follow-up; empty if this scene has none."""
    if kind != "follow_up":
        asked = ask(scene, rng, kind)
        return [asked] if asked else []
    before = ask(scene, rng, rng.choice((*ATTRIBUTES, "existence")))
    after = follow_up(scene, rng, before)
    return [before, after] if after else []


def _wanted(scene: Scene, asked: Asked, kind: str, index: int, answers: tuple[str, ...]) -> bool:
    """Whether this question has the answer that stands next in the round, and is about a held-out pair."""
    question, answer = asked.turn.question, asked.turn.answer
    if asked.about and not set(asked.about) & set(HELD_OUT):
        return False
    if kind == "comparison":  # first named and second named in turn
        return question.endswith(f"{answer}?") == bool(index % 2)
    if kind == "existence":  # a pair, a colour or a shape in turn; every second absent pair is a near miss
        both = len(asked.told) == 2
        if both != (index // 2 % 3 == 0) or (both and index % 12 == 1 and not _near_miss(scene, asked)):
            return False
    if kind == "follow_up":
        return question == tuple(FOLLOW_UP.values())[index % len(FOLLOW_UP)]
    return answer == answers[index % len(answers)]


def _near_miss(scene: Scene, asked: Asked) -> bool:
    """Both words of the absent pair are in the picture, though not together."""
    ((colour, shape),) = asked.about
    return {colour, shape} <= {word for thing in scene.objects for word in thing.pair}
