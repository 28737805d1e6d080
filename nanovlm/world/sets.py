"""The data sets of the embedded world, by name: what is drawn of a scene, from pairs for contrast to InstructBLIP's tasks.

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
    tasks/…                         InstructBLIP's groups of tasks, each a pool of pictures with an instruction, see tasks.py

The web and what people captioned are pools: a finite number of pictures, each with one text, met again and again. BLIP filters the
web's texts and writes new ones (CapFilt), so each picture needs an index. Of each pool there is an "unnamed" one too.

A shape in a colour in which it was never met is no new thing to a model that has met shapes in any colour; hence the unnamed.
It has to end before the stage does: who is silent on colours without a name would else be silent on all that is unfamiliar, and
call a purple square, never met before, a square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.errors import UserError
from nanovlm.world import clips, drills, mixture, noise, pages, statements, tasks
from nanovlm.world.ask import conversation, put_before
from nanovlm.world.say import DESCRIPTIONS, caption, captions, description, negatives, say, vaguer, wordings
from nanovlm.world.scene import Scene, recoloured

Talk = Callable[[Scene, Random, tuple], tuple[Turn, ...]]
LONG_TALK = 40  # words of a conversation about a scene that is told: to read it costs as much as ten questions
IN_BLIP2, IN_INSTRUCTBLIP = 0.3, 0.5  # how often a talk, or a task, is written as that paper writes it


class World(Protocol):
    """What a data set needs of the world (datasets.Scenes)."""

    def scene(self, rng: Random, pairs: tuple) -> Scene:
        """Another scene."""

    def picture(self, scene: Scene) -> tuple:
        """What it looks like, alone in a tuple."""

    def film(self, scenes: Sequence[Scene]) -> object:
        """The picture of a scene, or the frames of a clip."""


@dataclass(frozen=True)
class DataSet:
    """make: (world, scene, rng, pairs that may be mentioned) → sample, whose id is filled in later."""

    make: Callable[["World", Scene, Random, tuple], Sample]
    many: tuple[int, ...] = (0,)  # objects of a scene in training; 0: one to four
    signs: float = 0.4  # how often a sign stands in it
    numbers: bool = False  # of which some say a number of two digits
    texts: bool = False  # no pictures: all pairs may be told, and numbers
    corpus: bool = True  # of texts: the tokenizer learns from it
    pool: int = 0  # how many pictures there are; 0: endless
    twin: str = ""  # the pool whose scenes, pictures and wordings these are, index by index


def find(name: str) -> DataSet:
    if name not in SETS:
        raise UserError(f"scenes have no data set {name!r}, only {', '.join(SETS)}.")
    return SETS[name]


def plainly(scene: Scene, rng: Random) -> str:
    return description(scene, rng, DESCRIPTIONS[:1])


def _variously(scene: Scene, rng: Random) -> str:
    """Cell by cell most often, as in the lessons."""
    return description(scene, rng, DESCRIPTIONS[:1] if rng.random() < 0.6 else DESCRIPTIONS)


# ---- samples of one kind each: (world, scene, rng, pairs) → sample

def shown(talk: Talk) -> Callable:
    return lambda world, scene, rng, pairs: Sample("", world.picture(scene), turns=put_before(talk(scene, rng, pairs)))


def told(talk: Talk, describe: Callable[[Scene, Random], str] = _variously, blip2: float = 0.0) -> Callable:
    """The same talk where words stand in the picture's place."""
    def make(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        style = "blip2" if rng.random() < blip2 else ""
        return Sample("", told=(describe(scene, rng),), turns=put_before(talk(scene, rng, pairs)), format=style)
    return make


def one(lesson: Callable[[Scene, Random, tuple], Turn]) -> Talk:
    """A talk of one turn."""
    return lambda scene, rng, pairs: (lesson(scene, rng, pairs),)


def pair(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return _pair(world, scene, scene, rng.choice(wordings(scene)), rng, pairs)


def vague_pair(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    wording = vaguer(rng.choice(wordings(scene)), rng)
    return _pair(world, scene, recoloured(scene, rng) if "colour" in wording.left_out else scene, wording, rng, pairs)


def _pair(world: World, scene: Scene, shown: Scene, wording: tuple, rng: Random, pairs: tuple) -> Sample:
    return Sample("", world.picture(shown), caption=say(scene, wording), negatives=negatives(scene, wording, rng, k=2, pairs=pairs))


def captioned(unnamed: bool = False, rate: float = 0.0) -> Callable:
    """A picture and one text. unnamed: in colours without names; rate: how often the text is noisy."""
    left_out = frozenset({"colour"} if unnamed else ())

    def make(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        wording = rng.choice(wordings(scene, left_out))
        shown = recoloured(scene, rng) if unnamed else scene
        # Noise comes last: a clean twin has the same scene, picture and wording. It knows named colours only, hence not `shown`.
        text, kind = noise.noisy(scene, wording, rng, pairs, lambda rng: world.scene(rng, pairs), rate)
        return Sample("", world.picture(shown), caption=text, references=captions(scene, left_out), label=kind,
                      turns=(Turn(IMAGE, text, "caption"),))
    return make


def unnamed_drill(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return shown(one(drills.colourless))(world, recoloured(scene, rng), rng, pairs)


def caption_text(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return Sample("", caption=caption(scene, rng))


def science_text(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    return Sample("", turns=(mixture.science(scene, rng, shown=False),))


def told_task(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """One of InstructBLIP's tasks; frames are told one after the other."""
    scenes, turns = tasks.task(scene, rng, rng.choice(tasks.NAMES), pairs)
    style = "instructblip" if rng.random() < IN_INSTRUCTBLIP else ""
    return Sample("", told=(" then ".join(plainly(one, rng) for one in scenes),), turns=put_before(turns), format=style)


def instructed(group: str) -> Callable:
    """One group of InstructBLIP's tasks, with the picture; a scene that has none of it is asked a question."""
    def make(world: World, scene: Scene, rng: Random, pairs: tuple) -> Sample:
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
    "told/repeat": DataSet(told(one(drills.repeat), plainly, IN_BLIP2), IN_LISTS, texts=True),
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
