"""LLaVA-1.5's mixture in the embedded world: one picture, many ways to ask, each with the sentence that says how to answer.

"Improved Baselines with Visual Instruction Tuning" (2310.03744) §3.2, Table 7.

    part        stands for                    question                                    answer
    short       VQAv2, GQA, OKVQA, OCR-VQA    what colour is the square? ⏎ SHORT          blue
    sentences   LLaVA-Instruct                what colour is the square?                  It is blue.
    dense       –                             count red, star, blue circle.               red one, star none, …
    letters     A-OKVQA                       … A. red B. blue ⏎ LETTER                   B
    caption     TextCaps                      CAPTION                                     a small blue square in the …
    region      RefCOCO, Visual Genome        [0.60, 0.10, 0.88, 0.38] ⏎ REGION           small blue square
    grounding   the same, the other way       small blue square ⏎ GROUNDING               [0.60, 0.10, 0.88, 0.38]
    chat        ShareGPT, no picture          top right: small blue square. what colour…  It is blue.

    bare        InstructBLIP's way            what colour is the square?                  blue           not parts of the
    boxes       –                             boxes of square, red.                       square [0.60,  mixture itself
    sign        –                             what does the sign say? ⏎ SHORT             47             (see SIGNS)

Whether a word or a sentence is wanted cannot be guessed from "what colour is the square?": a model that was taught both gives
either, or always the one that was more frequent. SHORT takes the doubt away (§3.2: why InstructBLIP answers in words only).
The sentences stand in data/prompts.py, behind the first question, and hold for the whole conversation.
"""

from dataclasses import replace
from random import Random

from nanovlm.data.prompts import CAPTION, GROUNDING, LETTER, REGION, SHORT, prompted
from nanovlm.data.sample import Turn
from nanovlm.world.ask import FOLLOW_UP, Asked, ask, questions
from nanovlm.world.drills import OPTIONS, box, boxes_of, enumerated, lists
from nanovlm.world.say import DESCRIPTIONS, caption, description
from nanovlm.world.scene import ATTRIBUTES, PAIRS, Object, Scene

# How many of a hundred conversations: short answers lead and one in ten is a letter, as in the paper; lists of lookups hold on to
# what lessons taught.
PARTS = {"short": 46, "dense": 22, "sentences": 9, "letters": 10, "caption": 3, "region": 4, "grounding": 4, "chat": 2}
SIGNS = PARTS | {"sign": 40}  # where signs are in small print: a second digit is learned late
BOXED = ("region", "grounding", "boxes")  # kinds with boxes in question or answer
KINDS = ("option", "region", "grounding", "chat")  # what an exam asks beyond the questions of ask.py
SCIENCE = ("science", "science_text")  # what an exam of view "science" asks
BLIND = ("chat", "science_text")  # of these, what is asked without a picture


def conversation(scene: Scene, rng: Random, pairs: tuple = PAIRS,
                 parts: dict[str, int] = PARTS) -> tuple[tuple[Turn, ...], bool]:
    """The turns of one part, and whether they are about a picture; no mark stands in them yet."""
    part = rng.choices(tuple(parts), parts.values())[0]
    if part == "dense":
        return (lists(scene, rng, pairs, parts),), True
    if part == "boxes":
        return (boxes_of(scene, rng),), True
    if part == "sign" and (asked := ask(scene, rng, "reading")):
        return prompted((asked.turn,), SHORT), True
    if part == "caption":
        return (Turn(CAPTION, caption(scene, rng), "caption"),), True
    if part == "letters":  # these three have one turn, as they are long already and a batch is as long as its longest row
        return (option(scene, rng, rng.choice(tuple(OPTIONS))),), True
    if part in ("region", "grounding"):
        return ({"region": region, "grounding": grounding}[part](scene, rng.choice(scene.objects)),), True
    if part in ("short", "bare", "sign"):
        return prompted(questions(scene, rng, pairs), "" if part == "bare" else SHORT), True
    talk = tuple(replace(turn, answer=sentence(turn)) for turn in questions(scene, rng, pairs)[:2])
    return (talk, True) if part == "sentences" else (told(scene, rng, talk), False)


def description_with_boxes(scene: Scene, rng: Random) -> str:
    """The objects for a reader without eyes who is asked about boxes: who has read of cells and boxes side by side finds the
    places of things in a picture much sooner.
    """
    return " ".join(f"{thing.cell}: {phrase(thing)} {box(scene, thing)}." for thing in rng.sample(scene.objects, len(scene.objects)))


def told(scene: Scene, rng: Random, talk: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The same talk about a scene that is not shown but told."""
    first = talk[0]
    return (replace(first, question=f"{description(scene, rng, DESCRIPTIONS[:1])}\n{first.question}"), *talk[1:])


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
    (turn,) = told(scene, rng, (replace(asked.turn, answer=sentence(asked.turn), kind="chat"),))
    return turn
