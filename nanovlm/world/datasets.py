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
    mixture   the same, asked in LLaVA-1.5's ways (mixture.py)   and with the form of the answer on demand
    text      description "\\n" question -> answer, no picture         what the tiny language model reads beforehand
    told      the same, of the mixture (both in told.py)      and what LLaVA-1.5's reads

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

from nanovlm.data.prompts import CAPTION
from nanovlm.data.sample import TALKS, TEXTS, VIEWS, Sample, Turn
from nanovlm.data.source import Exam, caption_exam, exam_of, exam_view
from nanovlm.errors import UserError
from nanovlm.world import exams, mixture, told
from nanovlm.world.ask import DESCRIBE, conversation
from nanovlm.world.drills import COLOURLESS, dense, lists
from nanovlm.world.say import captions, negatives, notes, say, vaguer, wordings
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
from nanovlm.world.told import put_before

SPLITS = ("train", "val")
# view -> the lessons that come before conversations, each with the sample where it ends
LESSONS = {"text": {"repeat": 16_000, "dense": 80_000}, "told": {"repeat": 16_000, "dense": 80_000, "lists": 112_000},
           "instruct": {"dense": 12_000}, "mixture": {"lists": 24_000}, "science": {"dense": 12_000}}
UNNAMED = 112_000  # of view "described": samples before this one


class Scenes:
    """Samples are made when asked for, each from its own random numbers: nothing is stored, any index is at hand."""

    name = "scenes"
    skipped = ()

    def __init__(self, seed: int = 0, size: int = GRID, small_print: bool = False,
                 parts: dict[str, int] | None = None):
        """small_print: signs are numbers of two digits, half as large as others. parts: of the view "mixture", PARTS or SIGNS unless told."""
        self.seed = seed
        self.image_size = size
        self.small_print = small_print
        self.parts = parts or (mixture.SIGNS if small_print else mixture.PARTS)

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
            block = Random(f"{self.seed if split == 'train' else 'val'}/{split}/{index // told.BLOCK}")
            return Sample(name, turns=told.told(scene, rng, lesson, block), references=captions(scene))
        if view == "text":
            style = "blip2" if rng.random() < 0.2 else ""
            return Sample(name, turns=told.document(scene, rng, lesson), references=captions(scene), format=style)
        if view == "pairs":
            return self._pair(name, scene, rng, pairs, split)
        if view in TALKS and split == "train" and rng.random() < 0.15:
            return self._colourless(name, scene, rng)
        if view in ("mixture", "science") and not lesson:
            return self._mixed(name, scene, rng, pairs, view)
        if view in TALKS:
            if view == "mixture":
                talk = (lists(scene, rng, pairs, self.parts),)
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
            turns = (mixture.science(scene, rng, shown),)
        else:
            turns, shown = mixture.conversation(scene, rng, pairs, self.parts)
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

    def galleries(self, n: int = 500) -> list[list[Sample]]:
        """One gallery of n held-out pictures with a caption each, all of different scenes."""
        chosen: dict[tuple, Sample] = {}  # all captions of a scene → its sample: equal captions mean the same scene
        index = 0
        while len(chosen) < n:
            sample = self.sample("captions", "val", index)
            chosen.setdefault(sample.references, sample)
            index += 1
        return [list(chosen.values())]

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        """answers, mixture, science: an exam for each kind of question. captions: of any scene; two: of two objects."""
        found: list[Exam] = []
        view = exam_view(names)
        for name in names:
            if name in ("answers", *TALKS):
                found += [exam_of(kind, self.exam(n or 200, (kind,), view)) for kind in exams.kinds_of(view) if kind != "caption"]
            elif name in ("captions", "two"):
                kind = "caption" if name == "captions" else exams.TWO
                found.append(caption_exam(self.exam(n or 200, (kind,), view)))
        return found

    def notes(self, figures: dict[str, dict[str, float]]) -> list[str]:
        return []

    def exam(self, n: int = 200, kinds: Sequence[str] = (), view: str = "instruct") -> list[Sample]:
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
            sample = self.sample("captions", "val", index)
            return replace(sample, turns=(Turn(f"<image>\n{CAPTION if mixed else DESCRIBE}", sample.caption, kind),))
        scene, turns = exams.asked_in_turn(kind, index, self._val_scene, mixed, self.answers(kind))
        sample = Sample(f"scenes/exam/{kind}/{index}", turns=turns, references=captions(scene))
        if kind in mixture.BLIND:
            return sample
        return replace(sample, images=(render(scene, self.image_size),), turns=put_before(turns, "<image>"))


def _lesson(view: str, index: int) -> str | None:
    """The lesson that this training sample of the view belongs to; None behind the last one."""
    return next((lesson for lesson, end in LESSONS.get(view, {}).items() if index < end), None)
