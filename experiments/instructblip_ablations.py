"""InstructBLIP's ablations (Table 2, Fig. 4) at tiny scale: does it help that the queries are told what will be asked?

    aware, 1 … 8       the Q-Former reads the instruction; so many of BLIP-2's 16 queries are kept, the first ones
    blind, 1 … 8       it does not; the language model reads it all the same                                       (Table 2)
    proportional, uniform     aware, 4 queries, but sets are drawn by their size, or each as often as the other    (Table 2)
    bare inputs        aware, 4 queries; a question as it is, a caption without being asked for one                (Fig. 4)
    task tags          the same with the name of the group before it: "[questions] what colour is the star?"      (Fig. 4)
    zero-shot          BLIP-2's stage 2 with all of its 16 queries, asked the same, without further training

    python -m experiments.instructblip_ablations                    seeds 0, 1 and 7; a tenth of the recipe's steps
    python -m experiments.instructblip_ablations --seeds 0 --steps 1
    python -m experiments.instructblip_ablations --table            print the stored results as Markdown

Figures: right answers to held-out scenes, the mean over the seven groups that are learned from, and over the four that are not, each
beside what is left with exchanged pictures; all asked in instructions, and what was trained on tags also with tags. One seed is one set of
instructions, one order of them and one start of what BLIP-2 lacks; BLIP-2 is the same for all seeds, the shipped one.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from experiments import seeds
from nanovlm.data.sample import IMAGE, Sample
from nanovlm.data.source import Exam
from nanovlm.evaluate.judges import measure as judged
from nanovlm.evaluate.pupil import Pupil
from nanovlm.recipes.instructblip import TINY_SIZES, balanced
from nanovlm.recipes.stage import Stage
from nanovlm.runs.run import model_of
from nanovlm.runs.setting import Job, Setting
from nanovlm.training.batches import Mixture
from nanovlm.training.weights import State, initial_model
from nanovlm.world import tasks

NAME = "instructblip/tiny"
QUERIES = (1, 2, 4, 8)
QUESTIONS = 100  # of each group
FEW = 4  # queries, where something else is compared

Wording = Callable[[Sample, str], Sample]  # sample, its group → the sample as it is asked


def instructed(sample: Sample, group: str) -> Sample:
    return sample


def bare(sample: Sample, group: str) -> Sample:
    """Without the words around what is asked: a question alone, an answer alone, of a caption nothing."""
    first, *others = sample.turns
    return replace(sample, turns=(replace(first, question=IMAGE + "\n" + unworded(first.question.removeprefix(f"{IMAGE}\n"))), *others))


def tagged(sample: Sample, group: str) -> Sample:
    first, *others = bare(sample, group).turns
    return replace(sample, turns=(replace(first, question=first.question.replace("\n", f"\n[{group}] ", 1)), *others))


def unworded(asked: str) -> str:
    """Of an instruction what stands in the place of "{}" in the wording that it was made with, the longest one that fits."""
    read, asked = re.fullmatch(r"(ocr tokens: \w+\. )?(.*)", asked, re.DOTALL).groups(default="")
    wordings = (*tasks.QUESTION_WORDINGS, *tasks.ASKING_WORDINGS, *tasks.TRUE, *tasks.WRITTEN, *tasks.CAPTION_WORDINGS)
    for wording in sorted(wordings, key=len, reverse=True):
        if found := re.fullmatch(re.escape(wording).replace(r"\{\}", "(.*)"), asked, re.DOTALL):
            return read + (found.group(1) if found.groups() else "")
    return read + asked


class Asked:
    """The samples of a stage in another wording."""

    def __init__(self, samples: Mixture, wording: Wording):
        self.samples, self.wording = samples, wording

    def __getitem__(self, place: int) -> Sample:
        sample = self.samples[place]
        return self.wording(sample, sample.id.split("/")[2])  # scenes/tasks/GROUP/INDEX


def few(queries: int, asks: bool = True) -> Callable[[Stage, Setting], Stage]:
    def change(stage: Stage, setting: Setting) -> Stage:
        return replace(stage, sizes={"asks": asks, "qformer": replace(setting.recipe.config.qformer, queries=queries)},
                       init=stage.init if asks else stage.init[1:])
    return change


def drawn(by: str) -> Callable[[Stage, Setting], Stage]:
    return lambda stage, setting: replace(few(FEW)(stage, setting), data=balanced(TINY_SIZES, by))


# name: (what is changed in the stage, how it is asked in training, how it is asked in the exam too, besides in instructions)
ARMS: dict[str, tuple[Callable[[Stage, Setting], Stage], Wording, dict[str, Wording]]] = {
    **{f"aware, {queries}": (few(queries), instructed, {}) for queries in QUERIES},
    **{f"blind, {queries}": (few(queries, asks=False), instructed, {}) for queries in QUERIES},
    "proportional": (drawn("proportional"), instructed, {}), "uniform": (drawn("uniform"), instructed, {}),
    "bare inputs": (few(FEW), bare, {"as trained": bare}), "task tags": (few(FEW), tagged, {"as trained": tagged}),
}


def cut(finished: dict[str, State], queries: int) -> dict[str, State]:
    """BLIP-2's weights with the first of its queries only."""
    return {stage: {name: tensor[:queries] if name == "qformer.queries" else tensor for name, tensor in state.items()}
            for stage, state in finished.items()}


def figures(pupil: Pupil, exams: list[Exam], wording: Wording = instructed) -> dict[str, dict[str, float]]:
    """held_in, held_out and each group: value, shuffled, chance."""
    found: dict[str, dict[str, float]] = {}
    for exam in exams:
        group = exam.name.split("/")[1]
        (found[exam.name],) = judged(pupil, replace(exam, samples=[wording(sample, group) for sample in exam.samples])).values()
    for part in ("held_in", "held_out"):
        own = [figure for name, figure in found.items() if name.startswith(part)]
        found[part] = {key: sum(figure[key] for figure in own) / len(own) for key in ("value", "chance", "shuffled")}
    return found


def trial(setting: Setting, finished: dict[str, State], exams: list[Exam], fraction: float, name: str, memory: dict[int, Tensor]) -> dict:
    """One arm of one seed: what its model reaches, asked in instructions and as it was trained."""
    change, wording, others = ARMS[name]
    stage = change(setting.recipe.stages[-1], setting)
    stage = replace(stage, steps=round(stage.steps * fraction))
    recipe = replace(setting.recipe, stages=(stage,))
    samples = Asked(Mixture(setting.source, stage, setting.seed), wording)
    kept = cut(finished, stage.sizes["qformer"].queries)

    def prepare(model) -> None:
        model.vision = seeds.Remembering(model.vision, memory)

    model = seeds.learn(recipe, stage, samples, setting.seed, setting.tokenizer, kept, prepare=prepare)
    pupil = Pupil(model, recipe, stage, setting.tokenizer, seeds.CPU)
    return {"instructions": figures(pupil, exams), **{way: figures(pupil, exams, asked) for way, asked in others.items()}}


def zero_shot(setting: Setting, finished: dict[str, State], exams: list[Exam]) -> dict:
    """BLIP-2, which frames of clips are added to, asked in instructions, and in its own way: "Question: … Answer:"."""
    stage = replace(setting.recipe.stages[-1], sizes={"asks": False}, init=setting.recipe.stages[-1].init[1:])
    recipe = replace(setting.recipe, stages=(stage,))
    model = model_of(Job(recipe, stage), initial_model(recipe, stage, setting.seed, finished).state_dict())
    pupils = {way: Pupil(model, recipe, replace(stage, format=way), setting.tokenizer, seeds.CPU) for way in ("instructblip", "blip2")}
    return {"instructions": figures(pupils["instructblip"], exams), "as trained": figures(pupils["blip2"], exams)}


def measure(seed: int, fraction: float) -> dict:
    setting, finished = seeds.trained_before(NAME, 1, seed)
    exams = setting.source.exams(("tasks",), QUESTIONS)
    memory, found = {}, {"zero-shot": zero_shot(setting, finished, exams)}
    for name in ARMS:
        found[name] = trial(setting, finished, exams, fraction, name, memory)
        told = {part: round(found[name]["instructions"][part]["value"], 3) for part in ("held_in", "held_out")}
        print(f"seed {seed}, {name}: {told}", flush=True)
    return {"steps": round(setting.recipe.stages[-1].steps * fraction), "arms": found}


def table(result: dict) -> str:
    """Markdown: each figure the mean over the seeds, and from the lowest to the highest."""
    groups = [f"held_out/{group}" for group in tasks.HELD_OUT_GROUPS]
    lines = [f"| arm | held_in | shuffled | held_out | shuffled | {' | '.join(tasks.HELD_OUT_GROUPS)} |", "|---" * (5 + len(groups)) + "|"]
    for arm, ways in result["runs"][0]["arms"].items():
        for way in ways:
            rows = [run["arms"][arm][way] for run in result["runs"]]
            cells = [seeds.spread([row[part][key] for row in rows]) for part in ("held_in", "held_out") for key in ("value", "shuffled")]
            cells += [seeds.spread([row[group]["value"] for row in rows]) for group in groups]
            lines.append(f"| {arm}{'' if way == 'instructions' else ', asked as it was trained'} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, "instructblip_ablations", NAME, measure, table, fraction=0.1)
