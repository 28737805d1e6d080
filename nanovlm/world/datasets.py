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

A stage names data sets and their weights (recipes/stage.py), which are listed in sets.py. Each is drawn by itself.

Training: pictures, captions and questions show and mention SEEN pairs only; texts tell of all pairs.
Held out: every scene has an object with a HELD_OUT pair. These scenes do not depend on the seed, so that all runs are judged
on the same pictures, and scene 12 is the same in every data set.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from nanovlm.data.prompts import CAPTION
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.source import ASKED_IN, Exam, caption_exam, exam_of, exam_view, task_exam
from nanovlm.errors import UserError
from nanovlm.world import clips, exams, pages, statements, tasks
from nanovlm.world.ask import DESCRIBE, put_before
from nanovlm.world.say import captions
from nanovlm.world.scene import DIGITS, GRID, HELD_OUT, NUMBERS, PAIRS, SEEN, WORDS, Scene, random_scene, render
from nanovlm.world.sets import SETS, DataSet, find, plainly

CORPUS = 4000  # texts


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
                found += [task_exam(out, group, [self._task(group, i) for i in range(n or 200)])
                          for out in (False, True) for group in tasks.NAMES if (group in tasks.HELD_OUT_GROUPS) == out]
            elif name in exams.TOLD:
                found += [exam_of(kind, [self._told(kind, i) for i in range(n or 100)]) for kind in exams.TOLD[name]]
        return found

    def notes(self, figures: dict[str, dict[str, float]] | None) -> list[str]:
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
            return replace(sample, told=(plainly(scene, Random(index)),), turns=put_before(turns))
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
