"""The embedded world as a source of samples: data sets of pictures with captions, of conversations, and of texts.

A worked example, of the data set "talk":

    +-----------+-----------+    user       <image>
    |   #####   |           |               what colour is the square?
    |   #####   |     7     |    assistant  red
    |   #####   |           |    user       and where is it?
    +-----------+-----------+    assistant  top left
    |           |           |    user       which is smaller, the diamond or the square?
    |           |     ^     |    assistant  diamond
    |           |     v     |
    +-----------+-----------+

A stage names data sets and their weights (recipes/stage.py). Each is drawn by itself:

    pairs, vague pairs              picture, caption, captions with one fact wrong; "vague": facts are left out of the caption
    captions, unnamed captions      "<image>" → caption; "unnamed": in colours without names, of which the caption is silent
    web pairs, clean web pairs      picture, text; the web's texts are noisy, see noise.py; "clean": the same pictures with right captions
    human pairs                     a few pictures with right captions
    talk                            questions, several turns: LLaVA's instructions
    drills, letter drills, …        lists of lookups, see drills.py; "unnamed drills": notes of objects in colours without names
    short, sentences, letters, …    LLaVA-1.5's ways to ask, see mixture.py; signs: what a sign says, and nothing else
    science, science texts          question, context, options → reason, letter: ScienceQA in small, half of it without pictures
    statements                      two pictures and a statement about them, true or false, see statements.py
    caption texts                   a caption and nothing else: for BERT, which is to read captions
    told/…                          each of these talks about a scene that is told where the picture will stand later
    told/repeat, told/captions, …   what only a reader without eyes is asked; told/tasks: see tasks.py
    names, long names, plain names, shots, page texts   pages that are told, see pages.py
    named pages, web pages, …       the same with pictures, and pages of a small web; page pairs: a picture and a text, as a page; thing pairs: of one object
    clips                           eight frames of something that moves, see clips.py

The web and what people captioned are pools: a finite number of pictures, each with one text, met again and again. BLIP filters the
web's texts and writes new ones (CapFilt), so each picture needs an index. Of each pool there is an "unnamed" one too.

A shape in a colour in which it was never met is no new thing to a model that has met shapes in any colour; hence the unnamed.
It has to end before the stage does: who is silent on colours without a name would else be silent on all that is unfamiliar, and
call a purple square, never met before, a square.

Training: pictures, captions and questions show and mention SEEN pairs only; texts tell of all pairs.
Held out: every scene has an object with a HELD_OUT pair. These scenes do not depend on the seed, so that all runs are judged
on the same pictures, and scene 12 is the same in every data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from nanovlm.data.prompts import CAPTION
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.source import ASKED_IN, Exam, caption_exam, exam_of, exam_view, task_exam
from nanovlm.errors import UserError
from nanovlm.world import clips, drills, exams, mixture, noise, pages, statements, tasks
from nanovlm.world.ask import DESCRIBE, conversation, put_before
from nanovlm.world.say import DESCRIPTIONS, caption, captions, description, negatives, say, vaguer, wordings
from nanovlm.world.scene import (
    DIGITS,
    GRID,
    HELD_OUT,
    NUMBERS,
    PAIRS,
    SEEN,
    WORDS,
    Scene,
    random_scene,
    recoloured,
    render,
)

Talk = Callable[[Scene, Random, tuple], tuple[Turn, ...]]
LONG_TALK = 40  # words of a conversation about a scene that is told: to read it costs as much as ten questions
IN_BLIP2, IN_INSTRUCTBLIP = 0.3, 0.5  # how often a talk, or a task, is written as that paper writes it


@dataclass(frozen=True)
class DataSet:
    """make: (world, scene, rng, pairs that may be mentioned) → sample, whose id is filled in later."""

    make: Callable[["Scenes", Scene, Random, tuple], Sample]
    many: tuple[int, ...] = (0,)  # objects of a scene in training; 0: one to four
    signs: float = 0.4  # how often a sign stands in it
    numbers: bool = False  # of which some say a number of two digits
    texts: bool = False  # no pictures: all pairs may be told, and numbers
    corpus: bool = True  # of texts: the tokenizer learns from it
    pool: int = 0  # how many pictures there are; 0: endless
    twin: str = ""  # the pool whose scenes, pictures and wordings these are, index by index


class Scenes:
    """Samples are made when asked for, each from its own random numbers: nothing is stored, any index is at hand."""

    name = "scenes"
    skipped = ()

    def __init__(self, seed: int = 0, size: int = GRID, small_print: bool = False):
        """small_print: signs are numbers of two digits, half as large as others."""
        self.seed = seed
        self.image_size = size
        self.small_print = small_print

    def texts(self) -> list[str]:
        """A corpus that holds every word of the world, for the tokenizer; whatever the signs say, it is the same one."""
        plain, names = Scenes(self.seed), [name for name, made in SETS.items() if made.texts and made.corpus]
        samples = [plain.draw(name, Random(f"{self.seed}/corpus/{name}/{i}")) for name in names for i in range(CORPUS // len(names))]
        # an answer stands behind a blank, as formats write it: else a word that is only ever an answer would be no token
        return ["\n".join([*sample.told, *(text for turn in sample.turns for text in (turn.question.replace(IMAGE, ""), f" {turn.answer}"))])
                for sample in samples]

    def draw(self, name: str, rng: Random) -> Sample:
        """One training sample of the data set."""
        made = find(name)
        return self.pooled(name, rng.randrange(made.pool)) if made.pool else self._drawn(made, rng)

    def pool(self, name: str) -> int:
        """How many pictures the data set has; 0: endless."""
        return find(name).pool

    def pooled(self, name: str, index: int) -> Sample:
        """The one sample of a pool that has this index, whenever it is asked for."""
        made = find(name)
        if index not in range(made.pool):
            raise UserError(f"the data set {name!r} is a pool of {made.pool} pictures and has no picture {index}")
        return replace(self._drawn(made, Random(f"{self.seed}/{made.twin or name}/{index}")), id=f"scenes/{name}/{index}")

    def _drawn(self, made: DataSet, rng: Random) -> Sample:
        pairs = PAIRS if made.texts else SEEN
        scene = self.scene(rng, pairs, many=rng.choice(made.many), signs=made.signs, numbers=made.texts or made.numbers)
        sample = made.make(self, scene, rng, pairs)
        return replace(sample, references=sample.references or captions(scene))

    def held_out(self, name: str, index: int) -> Sample:
        scene, made = self._val_scene(Random(f"val/{index}")), find(name)
        sample = made.make(self, scene, Random(f"val/{made.twin or name}/{index}"), PAIRS)
        return replace(sample, id=f"scenes/val/{index}", references=sample.references or captions(scene))

    def look(self, diet: dict[str, float], real: str, n: int) -> list[Sample]:
        """Of the heaviest data set of the diet."""
        return [self.held_out(max(diet, key=diet.get), i) for i in range(n)]

    def scene(self, rng: Random, pairs: tuple, many: int = 0, including: tuple = (), signs: float = 0.4,
              numbers: bool = False) -> Scene:
        if self.small_print:
            return random_scene(rng, pairs, including, many, 0.9, NUMBERS, small_print=True)
        texts = 6 * (DIGITS + WORDS) + NUMBERS if numbers else DIGITS + WORDS
        return random_scene(rng, pairs, including, many, signs, texts)

    def _val_scene(self, rng: Random) -> Scene:
        return self.scene(rng, PAIRS, including=HELD_OUT)

    def picture(self, scene: Scene) -> tuple:
        return (render(scene, self.image_size),)

    def film(self, scenes: Sequence[Scene]) -> object:
        """What Sample.images holds: the picture of a scene, or the frames of a clip."""
        frames = tuple(self.picture(scene)[0] for scene in scenes)
        return frames if len(frames) > 1 else frames[0]

    def galleries(self, n: int = 500) -> list[list[Sample]]:
        """One gallery of n held-out pictures with a caption each, all of different scenes."""
        chosen: dict[tuple, Sample] = {}  # all captions of a scene → its sample: equal captions mean the same scene
        index = 0
        while len(chosen) < n:
            sample = self.held_out("captions", index)
            chosen.setdefault(sample.references, sample)
            index += 1
        return [list(chosen.values())]

    def noisy(self, n: int = 1000) -> list[Sample]:
        """n held-out pictures with the web's texts, with what is wrong with them as labels."""
        return [self.held_out("web pairs", index) for index in range(n)]

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        """answers, mixture, science: an exam for each kind of question. captions: of any scene; two: of two objects.

        told: all of these and InstructBLIP's tasks, where words stand in the pictures' places. pages: see pages.py.
        statements: true and false ones, of each kind in turn. fewshot: naming by example, one exam for each number of
        shots, on the same episodes, and their controls. clips: which way something moves, in 8 frames and in 30. tasks:
        InstructBLIP's eleven groups, held_in/… and held_out/….
        """
        found: list[Exam] = []
        view = exam_view(names)
        for name in names:
            if name in ASKED_IN:
                found += [exam_of(kind, self.exam(n or 200, (kind,), view)) for kind in exams.kinds_of(view) if kind != "caption"]
            elif name in ("captions", "two"):
                kind = "caption" if name == "captions" else exams.TWO
                found.append(caption_exam(self.exam(n or 200, (kind,), view)))
            elif name == "statements":
                found.append(exam_of("statement", [statements.examined(self, i) for i in range(n or 600)]))
            elif name == "fewshot":
                found += pages.exams([pages.examined(self, index) for index in range(n or 300)])
            elif name == "clips":
                found += [exam_of(kind, [clips.examined(self, kind, i) for i in range(n or 200)]) for kind in clips.EXAMS]
            elif name == "tasks":
                found += [task_exam(group in tasks.HELD_OUT_GROUPS, group, [self._task(group, i) for i in range(n or 200)]) for group in tasks.NAMES]
            elif name in exams.TOLD:
                found += [exam_of(kind, [self._told(kind, i) for i in range(n or 100)]) for kind in exams.TOLD[name]]
        return found

    def notes(self, figures: dict[str, dict[str, float]]) -> list[str]:
        return []

    def exam(self, n: int = 200, kinds: Sequence[str] = (), view: str = "answers") -> list[Sample]:
        """n samples of each kind (all of the view unless told), whose last turn is to be judged: see exams.py."""
        known = exams.kinds_of(view)
        if unknown := set(kinds) - {*known, exams.TWO}:
            raise UserError(f"scenes have no questions of kind {min(unknown)!r}, only {', '.join(known)} and {exams.TWO}")
        return [self._exam_question(kind, index, view) for kind in kinds or known for index in range(n)]

    def answers(self, kind: str) -> tuple[str, ...]:
        return exams.answers(kind, self.small_print)

    def _exam_question(self, kind: str, index: int, view: str) -> Sample:
        mixed = view == "mixture"
        if kind == "caption":
            sample = self.held_out("captions", index)
            return replace(sample, turns=(Turn(f"{IMAGE}\n{CAPTION if mixed else DESCRIBE}", sample.caption, kind),))
        scene, turns = exams.asked_in_turn(kind, index, self._val_scene, mixed, self.answers(kind))
        sample = Sample(f"scenes/exam/{kind}/{index}", turns=turns, references=captions(scene))
        if kind == "science_text":
            return sample
        if kind == "chat":
            return replace(sample, told=(_plainly(scene, Random(index)),), turns=put_before(turns))
        return replace(sample, images=self.picture(scene), turns=put_before(turns))

    def _task(self, group: str, index: int) -> Sample:
        """One of InstructBLIP's tasks, about a held-out scene or a clip."""
        rng = Random(f"exam/task/{group}/{index}")
        scenes, turns = tasks.examine(self._val_scene, rng, group)
        return Sample(f"scenes/exam/task/{group}/{index}", (self.film(scenes),), references=tasks.right(scenes[0], turns[-1]), turns=put_before(turns))

    def _told(self, kind: str, index: int) -> Sample:
        """A question of an exam, about scenes that are told."""
        form, told, turns, right = exams.told_in_turn(kind, index, self._val_scene)
        return Sample(f"scenes/told/{kind}/{index}", told=told, turns=turns, references=right, format=form)


def find(name: str) -> DataSet:
    if name not in SETS:
        raise UserError(f"scenes have no data set {name!r}, only {', '.join(SETS)}.")
    return SETS[name]


def _plainly(scene: Scene, rng: Random) -> str:
    return description(scene, rng, DESCRIPTIONS[:1])


def _variously(scene: Scene, rng: Random) -> str:
    """Cell by cell most often, as in the lessons."""
    return description(scene, rng, DESCRIPTIONS[:1] if rng.random() < 0.6 else DESCRIPTIONS)


# ---- samples of one kind each: (world, scene, rng, pairs) → sample

def shown(talk: Talk) -> Callable:
    return lambda world, scene, rng, pairs: Sample("", world.picture(scene), turns=put_before(talk(scene, rng, pairs)))


def told(talk: Talk, describe: Callable[[Scene, Random], str] = _variously, blip2: float = 0.0) -> Callable:
    """The same talk where words stand in the picture's place."""
    def make(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        style = "blip2" if rng.random() < blip2 else ""
        return Sample("", told=(describe(scene, rng),), turns=put_before(talk(scene, rng, pairs)), format=style)
    return make


def one(lesson: Callable[[Scene, Random, tuple], Turn]) -> Talk:
    """A talk of one turn."""
    return lambda scene, rng, pairs: (lesson(scene, rng, pairs),)


def pair(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return _pair(world, scene, scene, rng.choice(wordings(scene)), rng, pairs)


def vague_pair(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    wording = vaguer(rng.choice(wordings(scene)), rng)
    return _pair(world, scene, recoloured(scene, rng) if "colour" in wording.left_out else scene, wording, rng, pairs)


def _pair(world: Scenes, scene: Scene, shown: Scene, wording: tuple, rng: Random, pairs: tuple) -> Sample:
    return Sample("", world.picture(shown), caption=say(scene, wording), negatives=negatives(scene, wording, rng, k=2, pairs=pairs))


def captioned(unnamed: bool = False, rate: float = 0.0) -> Callable:
    """A picture and one text. unnamed: in colours without names; rate: how often the text is noisy."""
    left_out = frozenset({"colour"} if unnamed else ())

    def make(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        wording = rng.choice(wordings(scene, left_out))
        shown = recoloured(scene, rng) if unnamed else scene
        # Noise comes last: a clean twin has the same scene, picture and wording. It knows named colours only, hence not `shown`.
        text, kind = noise.noisy(scene, wording, rng, pairs, lambda rng: world.scene(rng, pairs), rate)
        return Sample("", world.picture(shown), caption=text, references=captions(scene, left_out), label=kind,
                      turns=(Turn(IMAGE, text, "caption"),))
    return make


def unnamed_drill(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return shown(one(drills.colourless))(world, recoloured(scene, rng), rng, pairs)


def caption_text(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return Sample("", caption=caption(scene, rng))


def science_text(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return Sample("", turns=(mixture.science(scene, rng, shown=False),))


def told_task(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """One of InstructBLIP's tasks; frames are told one after the other."""
    scenes, turns = tasks.task(scene, rng, rng.choice(tasks.NAMES), pairs)
    style = "instructblip" if rng.random() < IN_INSTRUCTBLIP else ""
    return Sample("", told=(" then ".join(_plainly(one, rng) for one in scenes),), turns=put_before(turns), format=style)


def instructed(group: str) -> Callable:
    """One group of InstructBLIP's tasks, with the picture; a scene that has none of it is asked a question."""
    def make(world: Scenes, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        scenes, turns = tasks.task(scene, rng, group, pairs)
        return Sample("", (world.film(scenes),), turns=put_before(turns))
    return make


def pools(prefix: str, web: int, human: int) -> dict[str, DataSet]:
    """The web, noisy and clean, and what people captioned. prefix: "", or "unnamed " for pictures in colours without names."""
    noisy, right = f"{prefix}web pairs", captioned(unnamed=bool(prefix))
    return {
        noisy: DataSet(captioned(bool(prefix), noise.RATE), pool=web), f"{prefix}clean web pairs": DataSet(right, pool=web, twin=noisy),
        f"{prefix}human pairs": DataSet(right, pool=human),
    }


TALKS: dict[str, Talk] = {
    "talk": conversation, "drills": one(drills.dense), "letter drills": one(drills.letters), "box drills": one(drills.boxes_of),
    "short": mixture.short, "sentences": mixture.sentences, "letters": mixture.letters,
    "captions on demand": mixture.captioned, "regions": mixture.regions, "grounding": mixture.grounded,
    "signs": mixture.read_sign, "science": one(lambda scene, rng, pairs: mixture.science(scene, rng, shown=True)),
}
BOXED = ("box drills", "regions", "grounding")
LISTS = ("drills", "letter drills", "box drills")  # from scenes of two or three objects
IN_LISTS = (2, 2, 3)
SIGNED = ("signs", "reading")  # groups of tasks that need a sign
# pictures with an instruction each: as unequal as the paper's sets (COCO, TextCaps, VQAv2, OKVQA, OCR-VQA, the same reversed, LLaVA)
TASK_POOLS = {"captions": 32_000, "signs": 2_000, "questions": 16_000, "knowledge": 1_000, "reading": 8_000, "asking": 4_000, "llava": 4_000}
SETS: dict[str, DataSet] = {
    "pairs": DataSet(pair), "vague pairs": DataSet(vague_pair, signs=0.5, numbers=True),
    "captions": DataSet(captioned()), "unnamed captions": DataSet(captioned(unnamed=True)), "unnamed drills": DataSet(unnamed_drill),
    "statements": DataSet(statements.drawn), "science texts": DataSet(science_text),
    "names": DataSet(pages.told_names(pages.MOST_SHOTS), texts=True), "shots": DataSet(pages.told_shots, texts=True),
    "long names": DataSet(pages.told_names(pages.SHOTS[-1]), texts=True, corpus=False), "plain names": DataSet(pages.plain_names, texts=True, corpus=False),
    "page texts": DataSet(pages.page_text, (1, 1, 2), 0.2, texts=True, corpus=False),
    "named pages": DataSet(pages.named_page, (1,), corpus=False), "web pages": DataSet(pages.web_page, (1, 1, 2), 0.2, corpus=False),
    "page pairs": DataSet(pages.pair, corpus=False), "thing pairs": DataSet(pages.thing_pair, corpus=False), "clips": DataSet(clips.drawn, (1,), corpus=False),
    "told/tasks": DataSet(told_task, texts=True), "caption texts": DataSet(caption_text, texts=True, corpus=False),
    "told/repeat": DataSet(told(one(drills.repeat), _plainly, IN_BLIP2), IN_LISTS, texts=True),
    "told/captions": DataSet(told(lambda scene, rng, pairs: (Turn("", caption(scene, rng), "caption"),), blip2=1.0), texts=True),
    **{name: DataSet(shown(talk), IN_LISTS if name in LISTS else (0,)) for name, talk in TALKS.items()},
    **{f"told/{name}": DataSet(told(talk, mixture.with_boxes if name in BOXED else _variously,
                                    IN_BLIP2 if name in ("talk", "drills") else 0.0),
                               IN_LISTS if name in LISTS else (0,), texts=True) for name, talk in TALKS.items()},
    **pools("", web=8000, human=1200), **pools("unnamed ", web=2600, human=400),
    **{f"tasks/{group}": DataSet(instructed(group), (1, 2, 2, 3) if group in SIGNED else (0,), 1.0 if group in SIGNED else 0.4, pool=size)
       for group, size in TASK_POOLS.items()},
    "told/sentences on demand": DataSet(told(mixture.sentences_on_demand), texts=True),
    "told/talk": DataSet(told(lambda scene, rng, pairs: conversation(scene, rng, pairs, LONG_TALK), blip2=IN_BLIP2), texts=True),
}
CORPUS = 4000  # texts
