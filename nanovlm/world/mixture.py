"""LLaVA-1.5's mixture in the embedded world: one picture, many ways to ask, each with the sentence that says how to answer.

"Improved Baselines with Visual Instruction Tuning" (2310.03744) §3.2, Table 7.

    data set    stands for                    question                                    answer
    short       VQAv2, GQA, OKVQA, OCR-VQA    what colour is the square? ⏎ SHORT          blue
    sentences   LLaVA-Instruct                what colour is the square?                  It is blue.
    drills …    –                             count red, star, blue circle.               red one, star none, …
    letters     A-OKVQA                       … A. red B. blue ⏎ LETTER                   B
    captions …  TextCaps                      CAPTION                                     a small blue square in the …
    regions     RefCOCO, Visual Genome        [0.60, 0.10, 0.88, 0.38] ⏎ REGION           small blue square
    grounding   the same, the other way       small blue square ⏎ GROUNDING               [0.60, 0.10, 0.88, 0.38]
    chat        ShareGPT, no picture          top right: small blue square. what colour…  It is blue.

Whether a word or a sentence is wanted cannot be guessed from "what colour is the square?": a model that was taught both gives
either, or always the one that was more frequent. SHORT takes the doubt away (§3.2: why InstructBLIP answers in words only).
The sentences stand in data/prompts.py, behind the first question, and hold for the whole conversation.
A talk is a function (scene, rng, pairs) → turns, in which no mark of a picture stands yet: see datasets.py.
"""

from dataclasses import replace
from random import Random

from nanovlm.data.prompts import CAPTION, GROUNDING, LETTER, REGION, SHORT, prompted
from nanovlm.data.sample import Turn
from nanovlm.world.ask import FOLLOW_UP, Asked, ask, questions
from nanovlm.world.drills import OPTIONS, box, enumerated
from nanovlm.world.say import DESCRIPTIONS, caption, description
from nanovlm.world.scene import ATTRIBUTES, PAIRS, Object, Scene

SENTENCE = "Answer in a full sentence."  # ours: the paper's line for short answers has no counterpart
KINDS = ("option", "region", "grounding", "chat")  # what an exam asks beyond the questions of ask.py
SCIENCE = ("science", "science_text")  # what an exam of view "science" asks


def short(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return prompted(questions(scene, rng, pairs), SHORT)


def sentences(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return tuple(replace(turn, answer=sentence(turn)) for turn in questions(scene, rng, pairs)[:2])


def sentences_on_demand(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    """For a reader who is also given short answers to bare questions, as LLaVA's talk has them."""
    first, *others = sentences(scene, rng, pairs)
    return (replace(first, question=f"{first.question}\n{SENTENCE}"), *others)


def letters(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return (option(scene, rng, rng.choice(tuple(OPTIONS))),)


def captioned(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return (Turn(CAPTION, caption(scene, rng), "caption"),)


def regions(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return (region(scene, rng.choice(scene.objects)),)


def grounded(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    return (grounding(scene, rng.choice(scene.objects)),)


def read_sign(scene: Scene, rng: Random, pairs: tuple = PAIRS) -> tuple[Turn, ...]:
    asked = ask(scene, rng, "reading")
    return prompted((asked.turn,), SHORT) if asked else short(scene, rng, pairs)


def with_boxes(scene: Scene, rng: Random) -> str:
    """The objects for a reader without eyes who is asked about boxes: who has read of cells and boxes side by side finds the
    places of things in a picture much sooner.
    """
    return " ".join(f"{thing.cell}: {phrase(thing)} {box(scene, thing)}." for thing in rng.sample(scene.objects, len(scene.objects)))


def sentence(turn: Turn) -> str:
    """A short answer, said as LLaVA's instructions have it."""
    answer, kind = turn.answer, turn.kind
    if kind == "follow_up":
        kind = next(field for field, question in FOLLOW_UP.items() if question == turn.question)
    if kind == "existence":
        return "Yes, there is." if answer == "yes" else "No, there is not."
    if kind == "count":
        return f"There {'is' if answer == 'one' else 'are'} {answer}."
    if kind == "object":
        look, cell = answer.split(", ")
        return f"It is a {look} in the {cell}."
    return {"colour": "It is {}.", "size": "It is {}.", "shape": "It is a {}.", "position": "It is in the {}.",
            "cell": "It is in the {}.", "relation": "It is on this side: {}.",
            "comparison": "It is the {}.", "reading": "The sign says {}."}[kind].format(answer)


def option(scene: Scene, rng: Random, kind: str, asked: Asked | None = None) -> Turn:
    """A question with two to four answers to choose from; where the scene has none of this kind, one about a colour."""
    asked = asked or ask(scene, rng, kind) or ask(scene, rng, "colour")
    right = asked.turn.answer
    wrong = [answer for answer in OPTIONS[asked.turn.kind] if answer != right]
    choices = [right, *rng.sample(wrong, min(len(wrong), rng.choice((2, 3))))]
    rng.shuffle(choices)
    return Turn(f"{asked.turn.question}\n{enumerated(choices)}\n{LETTER}", "ABCD"[choices.index(right)], "option")


def science(scene: Scene, rng: Random, shown: bool, asked: Asked | None = None) -> Turn:
    """ScienceQA in small (LLaVA §5.2): question, context, options, and the reason before the letter.

    shown: the picture is there, else the context tells what would be in it, as half of ScienceQA has no picture.
    """
    asked = asked or ask(scene, rng, rng.choice(tuple(ATTRIBUTES)))
    while asked.it is None:  # of the sign there is no more to say than where it is
        asked = ask(scene, rng, rng.choice(tuple(ATTRIBUTES)))
    right, thing = asked.turn.answer, asked.it
    wrong = [answer for answer in OPTIONS[asked.turn.kind] if answer != right]
    choices = rng.sample([right, *rng.sample(wrong, min(2, len(wrong)))], min(2, len(wrong)) + 1)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices))
    context = "N/A" if shown else description(scene, rng, DESCRIPTIONS[:1])
    reason = f"There is a {phrase(thing)} in the {thing.cell}."
    return Turn(f"{asked.turn.question}\nContext: {context}\nOptions: {options}",
                f"{reason} The answer is {'ABC'[choices.index(right)]}.", "science")


def region(scene: Scene, thing: Object) -> Turn:
    return Turn(f"{box(scene, thing)}\n{REGION}", phrase(thing), "region")


def grounding(scene: Scene, thing: Object) -> Turn:
    return Turn(f"{phrase(thing)}\n{GROUNDING}", box(scene, thing), "grounding")


def phrase(thing: Object) -> str:
    return f"{thing.size} {thing.colour} {thing.shape}"


def examine(scene: Scene, rng: Random, kind: str, about: Object) -> Turn:
    """One of KINDS, or of science's two, about the object `about`."""
    if kind == "region":
        return region(scene, about)
    if kind == "grounding":
        return grounding(scene, about)
    while True:
        asked = ask(scene, rng, rng.choice(tuple(ATTRIBUTES)))
        if asked.it is about:
            break
    if kind == "option":
        return option(scene, rng, asked.turn.kind, asked)
    if kind in SCIENCE:
        return replace(science(scene, rng, kind == "science", asked), kind=kind)
    return replace(asked.turn, answer=sentence(asked.turn), kind="chat")
