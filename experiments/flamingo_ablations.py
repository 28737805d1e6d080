"""Flamingo's ablations (Tables 3 and 10) at tiny scale: what each part brings. Every arm meets the same pages for as many steps.

    baseline                       as in the recipe
    no pages, no pairs, no clips   without one of the kinds of data                                       (Table 3 i)
    by turns                       one data set in each step, in place of the weighted sum of all         (3 ii)
    no gates                       what the gates would multiply is added whole from the first step on    (3 iii)
    every 2nd, first, middle       gated layers before every second LM layer, the first, the third        (3 v)
    pooling                        a frame's mean and an MLP in the resampler's place                     (3 vi)
    tuned LM, tuned LM at a tenth  the language model learns too, at the same rate and at a tenth of it   (3 viii)
    all previous                   a word looks at all images so far                                      (10 ii)
    no times                       the resampler does not know the order of frames
    lr 1e-2, no gates at lr 1e-2   do gates keep a rate that is far too high from doing harm?

    python -m experiments.flamingo_ablations                    seeds 0, 1 and 7; two fifths of the recipe's steps
    python -m experiments.flamingo_ablations --seeds 0 --steps 1
    python -m experiments.flamingo_ablations --table            print the stored results as Markdown

Figures: naming by example after 2, 4, 8 shots (held-out classes), beside what is left with exchanged pictures; captions of two held-out
objects (CIDEr: what belongs to what is lost in a mean); direction of clips; the LM's recall of names in text after 8 shots, by itself and
through the gated layers; the loss on pages before the first step and at the last one.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import seeds
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.source import Exam, exam_of
from nanovlm.evaluate.judges import measure as judged
from nanovlm.evaluate.pupil import Pupil
from nanovlm.papers.flamingo import Flamingo
from nanovlm.recipes import flamingo
from nanovlm.recipes.stage import Stage
from nanovlm.runs.setting import Setting
from nanovlm.training.batches import Mixture
from nanovlm.training.loop import Report
from nanovlm.training.weights import State
from nanovlm.world import clips, pages
from nanovlm.world.say import caption, captions
from nanovlm.world.scene import HELD_OUT, PAIRS, random_scene

NAME = "flamingo/tiny"
OPEN = 20.0  # tanh 20 is 1 in fp32
TOLD_SHOTS = 8
# The recipe looks at scenes for 350 steps before it begins to name things; with short pairs of one object it begins sooner.
SOONER = {"data": {"named pages": 1.0, "thing pairs": 1.0, "page pairs": 0.2, "clips": 0.2},
          "portions": {"named pages": 16, "thing pairs": 12, "page pairs": 4, "clips": 4}, "batch_size": 36}
EPISODES, CLIPS, SCENES = 200, 100, 100
FIGURES = ("2 shots", "4 shots", "8 shots", "8, shuffled", "two objects", "direction", "recall", "recall through")


class Pooled(nn.Module):
    """The mean of all cells and frames, and an MLP that makes as many latents of it (Table 3 vi has an MLP of the resampler's size)."""

    def __init__(self, width: int, latents: int):
        super().__init__()
        self.latents, self.up, self.down = latents, nn.Linear(width, 4 * width), nn.Linear(4 * width, latents * width)

    def forward(self, features: Tensor) -> Tensor:
        """(n, F, N, D) → (n, Q, D)."""
        made = self.down(F.gelu(self.up(features.mean(dim=(1, 2)))))
        return F.layer_norm(made.unflatten(1, (self.latents, -1)), features.shape[-1:])


def without(stage: Stage, *names: str) -> Stage:
    """Each of the other data sets as in the recipe; fewer samples in a step."""
    portions = {name: n for name, n in stage.portions.items() if name not in names}
    return replace(stage, data={name: weight for name, weight in stage.data.items() if name not in names}, portions=portions,
                   accumulate=len(portions), batch_size=sum(portions.values()))


def by_turns(stage: Stage) -> Stage:
    """As many samples of each set in as many steps as there are sets: their batches are a quarter of the steps' together."""
    sets = len(stage.data)
    return replace(stage, mixed="turns", portions={}, accumulate=1, batch_size=stage.batch_size // sets, steps=stage.steps * sets)


def sized(**changes) -> Callable[[Stage], Stage]:
    return lambda stage: replace(stage, sizes=stage.sizes | changes)


def timeless(stage: Stage) -> Stage:
    return sized(resampler=replace(flamingo.TINY.config.resampler, frames=0))(stage)


def tuned(stage: Stage) -> Stage:
    return replace(stage, trains=(*stage.trains, "language"))


def unchanged(model: Flamingo) -> None:
    pass


def ungated(model: Flamingo) -> None:
    for block in model.gated_xattn.values():
        for gate in (block.attention_gate, block.dense_gate):
            gate.requires_grad_(False).fill_(OPEN)


def pooled(model: Flamingo) -> None:
    model.resampler = Pooled(model.config.resampler.width, model.config.resampler.latents)


def same(stage: Stage) -> Stage:
    return stage


# name: (what is changed in the stage, and in the model before its first step)
ARMS: dict[str, tuple[Callable[[Stage], Stage], Callable[[Flamingo], None]]] = {
    "baseline": (same, unchanged),
    "no pages": (lambda stage: without(stage, "named pages"), unchanged),
    "no pairs": (lambda stage: without(stage, "thing pairs", "page pairs"), unchanged), "no clips": (lambda stage: without(stage, "clips"), unchanged),
    "by turns": (by_turns, unchanged), "no gates": (same, ungated),
    "every 2nd": (sized(every=2), unchanged), "first": (sized(every=4), unchanged), "middle": (sized(every=4, first=2), unchanged),
    "pooling": (same, pooled), "tuned LM": (tuned, unchanged), "tuned LM at a tenth": (tuned, unchanged),
    "all previous": (sized(all_previous=True), unchanged), "no times": (timeless, unchanged),
    "lr 1e-2": (lambda stage: replace(stage, lr=1e-2), unchanged), "no gates at lr 1e-2": (lambda stage: replace(stage, lr=1e-2), ungated),
}


class Trial:
    """One arm of one seed: its model, trained, and all that is measured."""

    def __init__(self, setting: Setting, finished: dict[str, State], fraction: float, name: str, memory: dict[int, Tensor]):
        change, self.surgery = ARMS[name]
        stage = change(replace(setting.recipe.stages[-1], **SOONER))
        self.stage = replace(stage, steps=round(stage.steps * fraction))
        self.recipe, self.setting, self.memory = replace(setting.recipe, stages=(self.stage,)), setting, memory
        self.kept: list[tuple[Tensor, Tensor]] = []  # the LM's parameters, and what they were before the last step
        self.tenth, self.losses = name == "tuned LM at a tenth", []
        samples = Mixture(setting.source, self.stage, setting.seed)
        self.model = seeds.learn(self.recipe, self.stage, samples, setting.seed, setting.tokenizer, finished, self.after, self.prepare)

    def prepare(self, model: Flamingo) -> None:
        self.surgery(model)
        model.vision = seeds.Remembering(model.vision, self.memory)
        self.kept = [(p, p.detach().clone()) for p in model.language.parameters()] if self.tenth else []

    @torch.no_grad()
    def after(self, model: Flamingo, report: Report) -> None:
        self.losses.append(next(iter(report.losses.values())))
        for parameter, before in self.kept:  # a tenth of AdamW's step
            before.lerp_(parameter, 0.1)
            parameter.copy_(before)

    def figures(self) -> dict[str, float]:
        model, world = self.model.eval(), self.setting.source
        model.vision = model.vision.eyes
        pupil = Pupil(model, self.recipe, self.stage, self.setting.tokenizer, seeds.CPU)
        episodes = [pages.examined(world, i) for i in range(EPISODES)]
        found = {"first loss": self.losses[0], "last loss": sum(self.losses[-20:]) / 20}
        for shots in (2, 4, 8):
            marks = measured(pupil, Exam(str(shots), [pages.last(page, shots) for page in episodes], ("fewshot",), room=4))
            found |= {f"{shots} shots": marks["value"], f"{shots}, shuffled": marks["shuffled"]}
        scenes = Exam("", [two(world, i) for i in range(SCENES)], ("cider",))
        directions = exam_of("direction", [clips.examined(world, "direction", i) for i in range(CLIPS)])
        found |= {"two objects": measured(pupil, scenes)["value"], "direction": measured(pupil, directions)["value"]}
        texts = [told(i) for i in range(EPISODES)]
        found["recall through"] = right(pupil, texts)
        model.gated_xattn = nn.ModuleDict()  # the language model by itself
        return found | {"recall": right(pupil, texts)}


def measured(pupil: Pupil, exam: Exam) -> dict[str, float]:
    (figure,) = judged(pupil, exam).values()
    return figure


def two(world, index: int) -> Sample:
    """A held-out scene of two objects, to be told as a pair is."""
    rng = Random(f"ablations/two/{index}")
    scene = random_scene(rng, PAIRS, including=HELD_OUT, many=2, signs=0)
    return Sample(f"two/{index}", world.picture(scene), references=captions(scene), turns=(Turn(IMAGE, caption(scene, rng), "caption"),), format="pair")


def told(index: int) -> Sample:
    """Names in text, of which one that was shown is asked again."""
    turns, words = pages.names(Random(f"ablations/told/{index}"), TOLD_SHOTS, asked_known=True)
    return Sample(f"told/{index}", told=words, turns=turns, format="flamingo")


def right(pupil: Pupil, samples: list[Sample]) -> float:
    said = pupil.answer(samples, 4)
    return sum(answer == sample.turns[-1].answer for answer, sample in zip(said, samples)) / len(samples)


def measure(seed: int, fraction: float) -> dict:
    setting, finished = seeds.trained_before(NAME, 1, seed)
    memory, found = {}, {}
    for name in ARMS:
        print(f"seed {seed}, {name}", flush=True)
        found[name] = Trial(setting, finished, fraction, name, memory).figures()
        print({figure: round(value, 2) for figure, value in found[name].items()}, flush=True)
    return {"steps": round(setting.recipe.stages[-1].steps * fraction), "arms": found}


def table(result: dict) -> str:
    """Markdown: each figure the mean over the seeds, and from the lowest to the highest."""
    lines = [f"| arm | {' | '.join((*FIGURES, 'loss: first', 'last'))} |", "|---" * (len(FIGURES) + 3) + "|"]
    for arm in result["runs"][0]["arms"]:
        cells = [seeds.spread([run["arms"][arm][name] for run in result["runs"]]) for name in (*FIGURES, "first loss", "last loss")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, "flamingo_ablations", NAME, measure, table, fraction=0.4)
