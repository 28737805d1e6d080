"""What is each kind of LLaVA's data good for? Table 4 of the paper at tiny scale: one model, four diets.

    all                  conversations, detailed descriptions, reasoning, as often as in the paper (58 : 23 : 77)
    conversation         the first only
    detail + reasoning   the others only
    none                 stage 1 only

    python -m experiments.llava_data_mix               seeds 0, 1 and 7
    python -m experiments.llava_data_mix --table       print the stored results as Markdown

A picture of the embedded world is told to the teacher of `nanovlm.making.instruct` (by rules), which writes the talk. The language
model is lm/tiny, which then reads such talk about captions; the image encoder is clip/tiny's. Steps, batches and the seed are the same
for all diets.
Judged on 200 held-out scenes for each kind, every one with an object in a (colour, shape) that no training picture shows:
conversations by the answer to one of their questions, descriptions by the sentences that are right (F1 of said and true),
reasoning by its conclusion. Beside it, the same with the pictures exchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from torch import nn

from experiments import seeds
from nanovlm import metrics, recipes
from nanovlm.data.sample import Sample, Turn
from nanovlm.evaluate.pupil import Pupil, permuted
from nanovlm.making import instruct
from nanovlm.making.symbols import Symbols
from nanovlm.making.teachers import rules
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import InTurn, Mixture
from nanovlm.training.weights import initial_model
from nanovlm.world.ask import put_before
from nanovlm.world.say import captions
from nanovlm.world.scene import HELD_OUT, PAIRS, SEEN, boxes, random_scene, render

NAME = "llava_data_mix"
RECIPE, READER = recipes.get("llava/tiny"), recipes.get("lm/tiny")
SHARES = {"conversation": 58, "detail": 23, "reasoning": 77}  # thousands, §3
DIETS = {"all": tuple(SHARES), "conversation": ("conversation",), "detail + reasoning": ("detail", "reasoning"), "none": ()}
PER_KIND = 200
ROOM = 256  # tokens for an answer: four things are described in about 200
TALK_STEPS = 2_000  # of the language model, where the fraction is 1; stage 1 is always whole


class Talk:
    """A teacher's talk about scenes, made when asked for: samples like any other. told: a caption stands in the picture's place."""

    def __init__(self, seed: int, kinds: Sequence[str], told: bool = False):
        self.seed, self.kinds, self.told = seed, kinds, told

    def __getitem__(self, place: int) -> Sample:
        return self.sample("train", place, SEEN)

    def sample(self, split: str, index: int, among: tuple, including: tuple = ()) -> Sample:
        rng = Random(f"talk/{self.seed}/{split}/{index}")
        scene = random_scene(rng, among, including)
        (kind,) = rng.choices(self.kinds, [SHARES[kind] for kind in self.kinds])
        every = captions(scene)
        symbols = Symbols(f"scene-{index}", Path(), tuple(rng.sample(every, min(5, len(every)))), tuple(boxes(scene)))
        pairs, _, why = instruct.ask(rules, symbols, kind, rng)
        if not pairs:
            raise ValueError(f"the teacher has nothing to say of {symbols}: {why}")
        turns = put_before(tuple(Turn(question, answer, kind) for question, answer in pairs))
        shown = {"told": symbols.captions[:1]} if self.told else {"images": (render(scene, RECIPE.image_size),)}
        return Sample(f"talk/{index}", references=every, turns=turns, **shown)

    def exam(self) -> list[Sample]:
        """Of a conversation now an early, now a late question."""
        asked = [self.sample("val", index, PAIRS, HELD_OUT) for index in range(PER_KIND)]
        return [replace(s, turns=s.turns[:1 + i % len(s.turns)]) for i, s in enumerate(asked)]


def mark(sample: Sample, said: str) -> float:
    """From 0 to 1; of several captions that are true, any will do."""
    turn = sample.turns[-1]
    captions_too = {text.lower() for text in sample.references}
    if turn.kind == "reasoning":
        return float(sentences(said)[-1:] == sentences(turn.answer)[-1:])
    if turn.answer.lower() in captions_too:
        return float(said.lower() in captions_too)
    if turn.kind == "conversation":
        return metrics.vqa_accuracy(said, [turn.answer])
    got, wanted = (["a caption" if s.lower() in captions_too else s for s in sentences(text)] for text in (said, turn.answer))
    right = len(set(got) & set(wanted))
    return 2 * right / (len(got) + len(wanted))


def sentences(text: str) -> list[str]:
    return [f"{part}." for part in text.rstrip(".").split(". ")]


def judged(model: nn.Module, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    pupil = Pupil(model, RECIPE, RECIPE.stages[1], tokenizer, seeds.CPU)
    results = {}
    for kind in SHARES:
        exam = Talk(0, (kind,)).exam()
        value, shuffled = (sum(map(mark, exam, pupil.answer(samples, ROOM))) / len(exam)
                           for samples in (exam, permuted(exam)))
        results[kind] = {"value": round(value, 4), "shuffled": round(shuffled, 4), "n": len(exam)}
        print(f"    {kind}: {value:.3f} (pictures exchanged {shuffled:.3f})", flush=True)
    return results


def measure(seed: int, fraction: float) -> dict:
    setting, finished = seeds.trained_before(RECIPE.name, last=2, seed=seed)
    align, tune = RECIPE.stages
    tune = replace(tune, steps=round(tune.steps * fraction))
    lesson = replace(READER.stages[0], lessons=(), init=(("language", "lm/tiny:language"),), steps=round(TALK_STEPS * fraction))
    reader, recipe = replace(READER, stages=(lesson,)), replace(RECIPE, stages=(align, tune))
    told = InTurn(Talk(seed, DIETS["all"], told=True), Mixture(setting.source, lesson, seed))
    tokenizer = setting.tokenizer
    finished["lm"] = seeds.learn(reader, lesson, told, seed, tokenizer, finished).state_dict()
    finished["align"] = seeds.learn(recipe, align, Mixture(setting.source, align, seed), seed, tokenizer, finished).state_dict()
    results = {}
    for diet, kinds in DIETS.items():
        print(f"seed {seed}, {diet}", flush=True)
        if kinds:
            model = seeds.learn(recipe, tune, Talk(seed, kinds), seed, tokenizer, finished)
        else:
            model = initial_model(recipe, tune, seed, finished)
        results[diet] = judged(model, tokenizer)
    return {"steps": {"lm": lesson.steps, "tune": tune.steps}, "diets": results}


def table(result: dict) -> str:
    """Markdown: the mean over the seeds, from the lowest to the highest in brackets, then pictures exchanged."""
    lines = ["| stage 2 on | " + " | ".join(SHARES) + " | mean |", "|---|" + "---|" * (len(SHARES) + 1)]
    for diet in DIETS:
        runs = [run["diets"][diet] for run in result["runs"]]
        columns = [[run[kind]["value"] for run in runs] for kind in SHARES]
        blind = [sum(run[kind]["shuffled"] for run in runs) / len(runs) for kind in SHARES]
        cells = [f"{sum(c) / len(c):.2f} ({min(c):.2f}–{max(c):.2f}; {b:.2f})" for c, b in zip(columns, blind)]
        means = [sum(run[kind]["value"] for kind in SHARES) / len(SHARES) for run in runs]
        lines.append(f"| {diet} | " + " | ".join(cells) + f" | {sum(means) / len(means):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, NAME, RECIPE.name, measure, table, fraction=0.5)
