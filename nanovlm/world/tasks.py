"""InstructBLIP's eleven groups of tasks in the embedded world, each in several wordings.

"InstructBLIP" (2305.06500) §2.1, §2.2, Fig. 2, App. C: 26 data sets become instructions, ten to fifteen templates a task. The
wordings here are our own, as the world is. They take over its forms (a cue, an opening, a request, a labelled question, a limit on
length). There are 13 for captions, 10 for questions, and 6 for the asking of questions, as in the paper's table.

    group            asked                                                        answer
    captions         a short description:                                         a small blue square in the top right.
    signs            ocr tokens: 7. write a short caption.                        the digit 7 in the top left and …
    reasoning    *   is this true? the star is above the circle.                  yes
    questions        question: what colour is the square? short answer:           blue
    knowledge        how many corners has the red object?                         five
    reading          ocr tokens: 47. what does the sign say? be brief.            47
    asking           answer: blue. ask for it.                                    what colour is the square?
    clips        *   (frame after frame) which way does the star move?            left
    dialogue     *   dialogue: is there a star? yes. question: and where is it?   top left
    classes      *   on it is written: a large red star. is that so?              no
    llava            tell me all about the picture.                               top left: red star. bottom right: …
                     are there more large or more small objects?                  one large object and two small …

    * held out as whole groups when the Q-Former is tuned; a language model has read of all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from nanovlm.data.sample import Turn
from nanovlm.world.ask import FOLLOW_UP, KINDS, Asked, ask, follow_up
from nanovlm.world.mixture import OPTIONS, sentence
from nanovlm.world.say import caption, negatives, said, say, wordings
from nanovlm.world.say import captions as captions_of
from nanovlm.world.scene import CELLS, COLOURS, COUNTS, PAIRS, SHAPES, SIZES, Scene, side

CORNERS = {"circle": "none", "triangle": "three", "square": "four", "diamond": "four", "star": "ten", "cross": "twelve"}
FRUITS = {"red": "cherry", "green": "lime", "blue": "blueberry", "yellow": "banana", "purple": "grape", "white": "coconut"}
HELD_OUT_GROUPS = ("reasoning", "clips", "dialogue", "classes")  # as whole groups (§2.2); all others are learned from
FRAMES = 4  # of a clip (§2.5)
YES_NO = ("yes", "no")
CLOSED = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "cell": CELLS}  # field of an object → all that it may be
DIRECTIONS = {"left": "left", "right": "right", "above": "up", "below": "down"}  # a side of where it was → which way it went

CAPTION_WORDINGS = (
    "a short description:", "the picture shows", "describe the picture in one sentence.", "could you describe this for me?",
    "caption:", "a picture of", "what is in the picture? use few words.", "say what you see.", "write a short caption.",
    "give a brief account of the picture.", "what does this show?", "an image caption:", "briefly, what is there?")
QUESTION_WORDINGS = (
    "{}", "question: {}", "question: {} answer:", "question: {} short answer:", "{} answer in a word or two.",
    "look at the picture and say: {}", "given the picture, {} be brief.", 'the question is "{}" what is the answer?',
    "q: {} a:", "{} the short answer is")
ASKING_WORDINGS = (
    "answer: {}. ask for it.", "ask a question about the picture whose answer is: {}", "which question has the answer {}?",
    'the answer is "{}". what was the question?', "make a question that {} answers.", "question for the answer {}:")
TRUE = ("is this true? {}", "true of the picture? {}", "{} is that right?")
WRITTEN = ("on it is written: {} is that so?", "a picture with the text: {} do they fit?")


def task(scene: Scene, rng: Random, group: str, pairs: tuple = PAIRS) -> tuple[tuple[Scene, ...], tuple[Turn, ...]]:
    """What is shown, one scene or the frames of a clip, and the conversation; one of "questions" where the scene has none of its own."""
    if group == "clips":
        return clip(scene, rng)
    return (scene,), GROUPS[group](scene, rng, pairs) or questions(scene, rng, pairs)


def captions(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...]:
    return (Turn(rng.choice(CAPTION_WORDINGS), caption(scene, rng), "caption"),)


def signs(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...] | None:
    if scene.sign is None:
        return None
    return (Turn(f"ocr tokens: {scene.sign.text}. {rng.choice(CAPTION_WORDINGS)}", caption(scene, rng), "caption"),)


def reasoning(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...] | None:
    """A sentence to be judged (VSR), or a question through another thing (GQA), or one with options (IconQA)."""
    couples = [(one, two) for one in scene.objects for two in scene.objects
               if one is not two and side(one, two) and one.shape != two.shape and _alone(scene, one) and _alone(scene, two)]
    form = rng.randrange(3)
    if form == 2 or not couples:
        return _with_options(scene, rng, _asked(scene, rng, pairs, tuple(OPTIONS)))
    one, two = rng.choice(couples)
    where = {"left": "left of", "right": "right of"}.get(side(one, two), side(one, two))
    if form == 1:
        field = rng.choice(("colour", "size"))
        return (Turn(_worded(rng, f"what {field} is the {one.shape} that is {where} the {two.shape}?"), getattr(one, field), "reasoning"),)
    told, other = rng.choice(((where, "yes"), (rng.choice([w for w in ("left of", "right of", "above", "below") if w != where]), "no")))
    return (Turn(rng.choice(TRUE).format(f"the {one.shape} is {told} the {two.shape}."), other, "reasoning", YES_NO),)


def questions(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...]:
    asked = _asked(scene, rng, pairs)
    return (replace(asked.turn, question=_worded(rng, asked.turn.question), kind="questions"),)


def knowledge(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...] | None:
    """What the picture does not show and the language model knows: corners of shapes, fruits of a colour (OKVQA, A-OKVQA)."""
    asked = _asked(scene, rng, pairs, ("colour", "shape"))
    name = asked.turn.question.removesuffix("?").split(" is ", 1)[1].removeprefix("the colour of ").removeprefix("the shape of ")
    shape = asked.turn.kind == "shape"
    knows = CORNERS if shape else FRUITS
    question = f"how many corners has {name}?" if shape else f"which fruit has the colour of {name}?"
    known = Asked(Turn(question, knows[asked.turn.answer], "knowledge"))
    if rng.random() < 0.3:
        return _with_options(scene, rng, known, tuple(dict.fromkeys(knows.values())), "knowledge")
    return (replace(known.turn, question=_worded(rng, question)),)


def reading(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...] | None:
    asked = ask(scene, rng, "reading")
    if asked is None:
        return None
    seen = f"ocr tokens: {asked.turn.answer}. " if rng.random() < 0.5 else ""
    return (replace(asked.turn, question=seen + _worded(rng, asked.turn.question)),)


def asking(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...]:
    asked = _asked(scene, rng, pairs)
    return (Turn(rng.choice(ASKING_WORDINGS).format(asked.turn.answer), asked.turn.question, "asking"),)


def clip(scene: Scene, rng: Random) -> tuple[tuple[Scene, ...], tuple[Turn, ...]]:
    """Four frames, in which an object by itself goes to a neighbouring corner."""
    thing = rng.choice(scene.objects)
    cell = rng.choice([cell for cell in CELLS if cell != thing.cell and side(replace(thing, cell=cell), thing)])
    way = DIRECTIONS[side(replace(thing, cell=cell), thing)]
    late = rng.randint(1, FRAMES - 1)  # the first frame in which it stands there
    frames = tuple(Scene((thing if frame < late else replace(thing, cell=cell),)) for frame in range(FRAMES))
    question, answer = rng.choice((("which way does the {} move?", way), ("where is the {} at the end?", cell),
                                   ("where was the {} at first?", thing.cell)))
    return frames, (Turn(_worded(rng, question.format(thing.shape)), answer, "clips", tuple(DIRECTIONS.values()) if answer == way else CELLS),)


def dialogue(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...] | None:
    before = _asked(scene, rng, pairs)
    after = follow_up(scene, rng, before)
    if after is None:
        return None
    history = f"{before.turn.question} {before.turn.answer}"
    field = next(field for field, question in FOLLOW_UP.items() if question == after.turn.question)
    return (Turn(f"dialogue: {history}. question: {after.turn.question}", after.turn.answer, "dialogue", CLOSED[field]),)


def classes(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...]:
    """Neither text nor picture tells by itself (HatefulMemes): a text about one object, with one fact wrong every second time."""
    thing, wording = rng.choice(scene.objects), rng.choice(wordings(Scene(scene.objects[:1])))
    true = [say(Scene((other,)), wording) for other in scene.objects]
    text, answer = say(Scene((thing,)), wording), "yes"
    if rng.random() < 0.5:
        wrong = negatives(Scene((thing,)), wording, rng, 3, pairs)
        text, answer = next((false for false in wrong if false not in true), text), "no"
    return (Turn(rng.choice(WRITTEN).format(text), "yes" if text in true else answer, "classes", YES_NO),)


def llava(scene: Scene, rng: Random, pairs: tuple) -> tuple[Turn, ...]:
    """A detailed description, complex reasoning, or conversation, as LLaVA-Instruct-150K has them."""
    form = rng.randrange(3)
    if form == 0:
        return (Turn("tell me all about the picture.", " ".join(said(thing) for thing in scene.things), "llava"),)
    if form == 1:
        large = sum(thing.size == "large" for thing in scene.objects)
        small = len(scene.objects) - large
        numbers = " and ".join(_counted(n, size) for n, size in ((large, "large"), (small, "small")))
        conclusion = "There are as many of both." if large == small else f"More are {'large' if large > small else 'small'}."
        return (Turn("are there more large or more small objects?", f"{numbers}. {conclusion}", "llava"),)
    asked = _asked(scene, rng, pairs)
    return (Turn(f"in a sentence, {asked.turn.question}", sentence(asked.turn), "llava"),)


def _counted(n: int, size: str) -> str:
    return f"{('no', *COUNTS)[n]} {size} object{'s' * (n != 1)}"


GROUPS: dict[str, Callable[[Scene, Random, tuple], tuple[Turn, ...] | None]] = {
    "captions": captions, "signs": signs, "reasoning": reasoning, "questions": questions, "knowledge": knowledge,
    "reading": reading, "asking": asking, "dialogue": dialogue, "classes": classes, "llava": llava}
NAMES = (*GROUPS, "clips")


def examine(draw: Callable[[Random], Scene], rng: Random, group: str) -> tuple[tuple[Scene, ...], tuple[Turn, ...]]:
    """A question of this group, about the first scene drawn that has one."""
    while True:
        scene = draw(rng)
        if group == "clips":
            return clip(scene, rng)
        if turns := GROUPS[group](scene, rng, PAIRS):
            return (scene,), turns


def right(scene: Scene, asked: Turn) -> tuple[str, ...]:
    """All that counts as right where not only the answer does: of captions, and of questions that are to be asked."""
    return right_questions(scene, asked) if asked.kind == "asking" else captions_of(scene) if asked.kind == "caption" else (asked.answer,)


def right_questions(scene: Scene, asked: Turn, tries: int = 3000) -> tuple[str, ...]:
    """Of a turn of "asking" the questions whose answer is the given one: the one that was drawn, and all others found by drawing."""
    rng, found = Random(asked.question), {asked.answer: ""}
    answer = next(turn.answer for turn in _drawn(scene, rng) if turn.question == asked.answer)
    for turn, _ in zip(_drawn(scene, rng), range(tries)):
        if turn.answer == answer:
            found[turn.question] = ""
    return tuple(found)


def _drawn(scene: Scene, rng: Random) -> Iterator[Turn]:
    while True:
        yield _asked(scene, rng, PAIRS).turn


def _alone(scene: Scene, thing: object) -> bool:
    return sum(other.shape == thing.shape for other in scene.objects) == 1


def _asked(scene: Scene, rng: Random, pairs: tuple, kinds: tuple[str, ...] = KINDS[:-1]) -> Asked:
    """A question of one of these kinds; one of a colour is always at hand."""
    return ask(scene, rng, rng.choice(kinds), pairs) or ask(scene, rng, "colour", pairs)


def _worded(rng: Random, question: str) -> str:
    return rng.choice(QUESTION_WORDINGS).format(question)


def _with_options(scene: Scene, rng: Random, asked: Asked, among: tuple[str, ...] = (), kind: str = "reasoning") -> tuple[Turn, ...]:
    """The question with two or three answers to choose from, "(a) red (b) blue", and the answer in words."""
    right = asked.turn.answer
    wrong = [answer for answer in among or OPTIONS[asked.turn.kind] if answer != right]
    choices = rng.sample([right, *rng.sample(wrong, min(2, len(wrong)))], min(2, len(wrong)) + 1)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("abc", choices))
    return (Turn(f"question: {asked.turn.question} options: {options}. short answer:", right, kind, tuple(choices)),)


