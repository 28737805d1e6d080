"""What a tiny language model reads before it sees: scenes that are told, and talk about them.

    top right: small blue square. top left: large red circle.      where the picture will stand later
    what colour is the square?                                      a question, asked as it will be then
    blue

A language model that has learned to use what stands before the question needs no new skill when the bridge puts image
tokens there. Only answers are learned: what a description says is drawn at random, so nobody could predict it, and the
attempt drowns the rest.

    text    LLaVA's conversations; one in ten is the description alone, answered by a caption, as in the view "captions",
            and one in five, lessons too, is written as BLIP-2 writes it, with the description before everything else
    told    after the same lessons LLaVA-1.5's mixture, one text in ten with boxes

Boxes come BLOCK texts in a row, none between: a description with boxes is twice as long as others, a batch is as long as its
longest row, and one such row would be in nearly every batch.
"""

from random import Random

from nanovlm.data.sample import Turn
from nanovlm.world import mixture
from nanovlm.world.ask import conversation
from nanovlm.world.drills import REPEAT, boxes_of, dense, lists
from nanovlm.world.mixture import BOXED, PARTS
from nanovlm.world.say import DESCRIPTIONS, caption, description
from nanovlm.world.scene import PAIRS, Scene

BLOCK = 16  # a micro-batch of lm/tiny-told
BOXED_SHARE = 0.1  # of the blocks
ABOUT_BOXES = {"region": 4, "grounding": 4, "boxes": 2}  # parts of the mixture in such a block, and in the others
WITHOUT_BOXES = {part: weight for part, weight in PARTS.items() if part not in BOXED}


def document(scene: Scene, rng: Random, lesson: str | None) -> tuple[Turn, ...]:
    """A conversation about a scene that is told, not shown, or the first two lessons; mostly told cell by cell, as in these."""
    front = _description(scene, rng, lesson)
    if lesson == "repeat":
        talk = (Turn(REPEAT, description(scene, rng, DESCRIPTIONS[:1]), lesson),)
    elif lesson == "dense":
        talk = (dense(scene, rng),)
    elif rng.random() < 0.1:
        return (Turn(front, caption(scene, rng), "caption"),)
    else:
        talk = conversation(scene, rng)
    return put_before(talk, front)


def told(scene: Scene, rng: Random, lesson: str | None, block: Random) -> tuple[Turn, ...]:
    """A part of the mixture about a scene that is told, with boxes where boxes are asked for.

    block: the same for BLOCK texts in a row, decides whether they are about boxes.
    """
    if lesson in ("repeat", "dense"):
        return document(scene, rng, lesson)
    boxed = block.random() < BOXED_SHARE
    if lesson:
        talk, shown = (boxes_of(scene, rng) if boxed else lists(scene, rng, PAIRS, WITHOUT_BOXES),), True
    else:
        talk, shown = mixture.conversation(scene, rng, parts=ABOUT_BOXES if boxed else WITHOUT_BOXES)
    if not shown:  # it is told already
        return talk
    return put_before(talk, mixture.description_with_boxes(scene, rng) if boxed else _description(scene, rng, lesson))


def _description(scene: Scene, rng: Random, lesson: str | None) -> str:
    return description(scene, rng, DESCRIPTIONS[:1] if lesson or rng.random() < 0.6 else DESCRIPTIONS)


def put_before(turns: tuple[Turn, ...], front: str) -> tuple[Turn, ...]:
    """A description, or the mark of a picture, on a line of its own before the first question."""
    first = turns[0]
    return (Turn(f"{front}\n{first.question}", first.answer, first.kind), *turns[1:])
