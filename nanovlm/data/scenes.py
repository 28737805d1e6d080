"""The embedded world as a source of samples: pictures with captions, conversations, and texts without pictures.

A worked example, sample("instruct", "train", i):

    +-----------+-----------+    user       <image>
    |   #####   |           |               what colour is the square?
    |   #####   |     7     |    assistant  red
    |   #####   |           |    user       and where is it?
    +-----------+-----------+    assistant  top left
    |           |           |    user       which is smaller, the diamond or the square?
    |           |     ^     |    assistant  diamond
    |           |     v     |
    +-----------+-----------+

Eight views of the world:

    pairs     picture + caption + captions with one fact wrong       contrastive learning
    captions  "<image>" -> caption                                   the bridge learns to pass on what is there
    described the same, some in colours without names                and where it learns from captions alone
    instruct  "<image>\\n" question -> answer, several turns           instruction tuning
    science   question, context, options -> reason, letter             ScienceQA in small, half of it without pictures
    mixture   the same, asked in LLaVA-1.5's ways (scene_mixture.py)   and with the form of the answer on demand
    text      description "\\n" question -> answer, no picture         what the tiny language model reads beforehand
    told      the same, of the mixture (both in scene_texts.py)      and what LLaVA-1.5's reads

Lessons come first. "What colour is the square?" has two or three likely answers for whoever knows the colours of the
picture, and a model that meets such questions at once is content with that for thousands of steps: it never learns to
look for the square. LESSONS, before the questions, leave it no such way out:

    repeat   top right: small blue square. top left: large red circle.     texts only: to find a word again, and go on
             say it again.                  -> top left: large red circle. top right: ...
    dense    take notes.                    -> blue small top right square; circle top left red large.
                                               one fact of a thing, and the others have to be looked up
             count red, star, blue circle.  -> red one, star none, blue circle none.
             find red, digit.               -> red top left, digit bottom left.
             sides of square red.           -> square red right.
    lists    mixture, and told after the others: the same, and
             colour of square. A. red …     -> square B.
             boxes of square.               -> square [0.60, 0.10, 0.88, 0.38].

In the view "instruct" about one picture in seven then shows its objects in colours that have no name ("take notes, colours
aside."): a shape in a colour in which it was never met is no new thing to a model that has met shapes in any colour. In
"described" it is one in four, and its caption does not tell colours. That ends at sample UNNAMED: who is silent on colours
without a name would else be silent on all that is unfamiliar, and call a purple square, never met before, a square.

Split "train": pictures, captions and questions show and mention SEEN pairs only; texts tell of all pairs.
Split "val": every scene has an object with a HELD_OUT pair. These scenes do not depend on the seed, so that all runs
are judged on the same pictures, and scene 12 is the same in every view.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from nanovlm.data import scene_mixture, scene_texts
from nanovlm.data.conversation import TALKS, TEXTS, VIEWS, Sample, Turn
from nanovlm.data.mixture import CAPTION, SHORT, prompted
from nanovlm.data.scene_language import (
    caption,
    captions,
    negatives,
    notes,
    say,
    vaguer,
    wordings,
)
from nanovlm.data.scene_questions import (
    ATTRIBUTES,
    COLOURLESS,
    DESCRIBE,
    FOLLOW_UP,
    KINDS,
    Asked,
    ask,
    conversation,
    dense,
    follow_up,
)
from nanovlm.data.scene_texts import put_before
from nanovlm.data.scene_world import (
    CELLS,
    COLOURS,
    DIGITS,
    GRID,
    HELD_OUT,
    NUMBERS,
    PAIRS,
    SEEN,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    random_scene,
    recoloured,
    render,
)
from nanovlm.errors import UserError

SPLITS = ("train", "val")
# view -> the lessons that come before conversations, each with the sample where it ends
LESSONS = {"text": {"repeat": 16_000, "dense": 80_000}, "told": {"repeat": 16_000, "dense": 80_000, "lists": 112_000},
           "instruct": {"dense": 12_000}, "mixture": {"lists": 24_000}, "science": {"dense": 12_000}}
UNNAMED = 112_000  # of view "described": samples before this one

TWO = "caption of two"  # to describe a scene of two objects and no sign, in an exam; "caption": any scene
# The answers that exam() asks for in turn; a kind that is absent has too many to list.
ANSWERS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "position": CELLS,
    "count": ("one", "two", "three", "four"),
    "relation": ("left", "right", "above", "below"),
    "existence": ("yes", "no"),
    "reading": DIGITS + WORDS,
}


class Scenes:
    """Samples are made when asked for, each from its own random numbers: nothing is stored, any index is at hand."""

    name = "scenes"

    def __init__(self, seed: int = 0, size: int = GRID, small_print: bool = False,
                 parts: dict[str, int] | None = None):
        """small_print: signs are numbers of two digits, half as large as others. parts: of the view "mixture", PARTS or SIGNS unless told."""
        self.seed = seed
        self.image_size = size
        self.small_print = small_print
        self.parts = parts or (scene_mixture.SIGNS if small_print else scene_mixture.PARTS)

    def size(self, view: str, split: str) -> int:
        return 1_000_000 if split == "train" else 1000

    def texts(self) -> list[str]:
        """A corpus that holds every word of the world, for the tokenizer; whatever the signs say, it is the same one."""
        plain = Scenes(self.seed)
        samples = (plain.sample("text", "train", LESSONS["text"]["dense"] - 100 + index) for index in range(3000))
        return ["\n".join(f"{turn.question}\n{turn.answer}" for turn in sample.turns) for sample in samples]

    def sample(self, view: str, split: str, index: int) -> Sample:
        if view not in VIEWS or split not in SPLITS:
            raise UserError(f"scenes have the views {VIEWS} and the splits {SPLITS}, not {view!r} and {split!r}")
        rng = Random(f"{self.seed}/{view}/{split}/{index}" if split == "train" else f"val/{view}/{index}")
        pairs = SEEN if split == "train" and view not in TEXTS else PAIRS  # what may be shown and mentioned
        lesson = _lesson(view, index) if split == "train" else None
        if split == "val":
            scene = self._val_scene(Random(f"val/{index}"))
        elif lesson:
            scene = self._scene(rng, pairs, many=rng.choice((2, 2, 3)), view=view)
        else:
            scene = self._scene(rng, pairs, many=rng.choice((1, 2, 2)) if view == "pairs" else 0, view=view)
        name = f"scenes/{split}/{index}"
        if view == "told":
            block = Random(f"{self.seed if split == 'train' else 'val'}/{split}/{index // scene_texts.BLOCK}")
            return Sample(name, turns=scene_texts.told(scene, rng, lesson, block), references=captions(scene))
        if view == "text":
            style = "blip2" if rng.random() < 0.2 else ""
            return Sample(name, turns=scene_texts.document(scene, rng, lesson), references=captions(scene), format=style)
        if view == "pairs":
            return self._pair(name, scene, rng, pairs, split)
        if view in TALKS and split == "train" and rng.random() < 0.15:
            return self._colourless(name, scene, rng)
        if view in ("mixture", "science") and not lesson:
            return self._mixed(name, scene, rng, pairs, view)
        if view in TALKS:
            if view == "mixture":
                talk = (scene_mixture.lists(scene, rng, pairs, self.parts),)
            else:
                talk = (dense(scene, rng, pairs),) if lesson else conversation(scene, rng, pairs)
            turns = put_before(talk, "<image>")
            return Sample(name, (render(scene, self.image_size),), references=captions(scene), turns=turns)
        wording, shown = rng.choice(wordings(scene)), scene
        if view == "described" and split == "train" and index < UNNAMED and rng.random() < 0.25:
            wording, shown = wording._replace(left_out=frozenset({"colour"})), recoloured(scene, rng)
        true = say(scene, wording)
        turns = (Turn("<image>", true, "caption"),)
        return Sample(name, (render(shown, self.image_size),), caption=true, references=captions(scene), turns=turns)

    def _scene(self, rng: Random, pairs: tuple, many: int = 0, including: tuple = (), view: str = "") -> Scene:
        if self.small_print:
            return random_scene(rng, pairs, including, many, 0.9, NUMBERS, small_print=True)
        return random_scene(rng, pairs, including, many, texts=DIGITS + WORDS + NUMBERS * (view == "told"))

    def _val_scene(self, rng: Random) -> Scene:
        return self._scene(rng, PAIRS, including=HELD_OUT)

    def _mixed(self, name: str, scene: Scene, rng: Random, pairs: tuple, view: str) -> Sample:
        """One part of the mixture, of which one in fifty has no picture, or of the science set, of which half has none."""
        if view == "science":
            shown = rng.random() < 0.5
            turns = (scene_mixture.science(scene, rng, shown),)
        else:
            turns, shown = scene_mixture.conversation(scene, rng, pairs, self.parts)
        if not shown:
            return Sample(name, turns=turns, references=captions(scene))
        images = (render(scene, self.image_size),)
        return Sample(name, images, references=captions(scene), turns=put_before(turns, "<image>"))

    def _pair(self, name: str, scene: Scene, rng: Random, pairs: tuple, split: str) -> Sample:
        """A picture and what is said of it; in training, facts are left out of the text now and then."""
        wording, shown = rng.choice(wordings(scene)), scene
        if split == "train":
            wording = vaguer(wording, rng)
            shown = recoloured(scene, rng) if "colour" in wording.left_out else scene
        false = negatives(scene, wording, rng, k=2, pairs=pairs)
        images = (render(shown, self.image_size),)
        return Sample(name, images, caption=say(scene, wording), references=captions(scene), negatives=false)

    def _colourless(self, name: str, scene: Scene, rng: Random) -> Sample:
        """A picture in colours without names, and notes that are silent about them."""
        images = (render(recoloured(scene, rng), self.image_size),)
        turns = (Turn(f"<image>\n{COLOURLESS}", notes(scene, rng, colours=False), "notes"),)
        return Sample(name, images, references=captions(scene), turns=turns)

    def references(self, sample: Sample) -> tuple[str, ...]:
        return sample.references

    def galleries(self, n: int = 500) -> list[list[Sample]]:
        """One gallery of n held-out pictures with a caption each, all of different scenes."""
        chosen: dict[tuple, Sample] = {}  # all captions of a scene → its sample: equal captions mean the same scene
        index = 0
        while len(chosen) < n:
            sample = self.sample("captions", "val", index)
            chosen.setdefault(sample.references, sample)
            index += 1
        return [list(chosen.values())]

    def exam(self, n: int = 200, kinds: Sequence[str] = (), view: str = "instruct") -> list[Sample]:
        """n samples of each kind (all unless told), whose last turn is to be judged. Every scene has a held-out pair.

        view "mixture": more kinds, and behind each first question the sentence that says how to answer. "science": questions
        with a picture, and with a context in its place.

        Scenes are drawn until the answer is the one whose turn it is (so that all answers are equally frequent) and,
        unless the question is about no object in particular, until it is about a held-out pair. For "existence" that
        goes for yes and no alike, and every second pair that is not there is a near miss. A follow-up stands after the
        turn that it needs.
        """
        more = scene_mixture.KINDS if view == "mixture" else ()
        known = scene_mixture.SCIENCE if view == "science" else (*KINDS, *more, "caption")
        if unknown := set(kinds) - {*known, TWO}:
            raise UserError(f"scenes have no questions of kind {min(unknown)!r}, only {', '.join(known)} and {TWO}")
        return [self._exam_question(kind, index, view) for kind in kinds or known for index in range(n)]

    def answers(self, kind: str) -> tuple[str, ...]:
        """Those that an exam asks for in turn; () where there are too many to list."""
        return NUMBERS if kind == "reading" and self.small_print else ANSWERS.get(kind, ())

    def _exam_question(self, kind: str, index: int, view: str) -> Sample:
        mixed = view == "mixture"
        if kind == "caption":
            sample = self.sample("captions", "val", index)
            return replace(sample, turns=(Turn(f"<image>\n{CAPTION if mixed else DESCRIBE}", sample.caption, kind),))
        scene, turns = self._asked(kind, index, Random(f"exam/{kind}/{index}"), mixed)
        sample = Sample(f"scenes/exam/{kind}/{index}", turns=turns, references=captions(scene))
        if kind in scene_mixture.BLIND:
            return sample
        return replace(sample, images=(render(scene, self.image_size),), turns=put_before(turns, "<image>"))

    def _asked(self, kind: str, index: int, rng: Random, mixed: bool) -> tuple[Scene, tuple[Turn, ...]]:
        """A scene and what is asked about it, without the mark of its picture."""
        if kind == TWO:
            scene = random_scene(rng, PAIRS, including=HELD_OUT, many=2, signs=0)
            return scene, (Turn(DESCRIBE, caption(scene, rng), "caption"),)
        if kind in (*scene_mixture.KINDS, *scene_mixture.SCIENCE):
            scene = self._val_scene(rng)
            about = next(thing for thing in scene.objects if thing.pair in HELD_OUT)
            return scene, (scene_mixture.examine(scene, rng, kind, about),)
        while True:
            scene = self._val_scene(rng)
            asked = _examine(scene, rng, kind)
            if asked and _wanted(scene, asked[-1], kind, index, self.answers(kind)):
                turns = tuple(one.turn for one in asked)
                return scene, prompted(turns, SHORT) if mixed else turns


def _lesson(view: str, index: int) -> str | None:
    """The lesson that this training sample of the view belongs to; None behind the last one."""
    return next((lesson for lesson, end in LESSONS.get(view, {}).items() if index < end), None)


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
