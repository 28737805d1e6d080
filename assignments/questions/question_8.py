"""Question of assignment 8: which set drowns under each way of sampling, and what do tiles see that a small picture does not?

First, four sets of 40,000, 8,000, 1,600 and 320 records, and 20,000 samples: how often is a record of each met?

    proportional   all records equally often: of 156 samples one is of the smallest set
    sqrt           what InstructBLIP does
    uniform        the smallest is met again and again, until it is known by heart

Then numbers in small print, in pictures of 96 × 96: LLaVA-1.5 as it is shipped sees them made 48 × 48, its HD sees five views of 48.

    python -m assignments ask 8 handout      your own code; without a folder the package's
"""

import time
from collections import Counter

from matplotlib.figure import Figure

import nanovlm.recipes.instructblip as sampling
from nanovlm import recipes
from nanovlm.evaluate.pupil import Pupil
from nanovlm.metrics import vqa_accuracy
from nanovlm.recipes.stage import Stage, resolve
from nanovlm.runs.run import trained_model
from nanovlm.training import batches
from nanovlm.world.datasets import Scenes

SETS = {"40,000": 40_000, "8,000": 8_000, "1,600": 1_600, "320": 320}
SAMPLES, ASKED = 20_000, 100
WAYS = tuple(sampling.SAMPLING)


def met(way: str) -> dict[str, float]:
    """How often each record of a set is met on average, counted over what your `drawn` draws."""
    diet = sampling.balanced(SETS, way)
    stage = Stage("tune", ("language",), diet, steps=SAMPLES // 16, batch_size=16, lr=1e-3)
    counts = Counter(batches.drawn(stage, 0, place, diet)[0] for place in range(SAMPLES))
    return {name: counts[name] / size for name, size in SETS.items()}


def reads(name: str, samples: list) -> tuple[float, object]:
    """The share of numbers that a shipped model reads rightly, and the model's pupil."""
    recipe = resolve(recipes.get(name), real=False)
    model, words = trained_model(name)
    pupil = Pupil(model, recipe, recipe.stages[-1], words, "cpu")
    said = pupil.answer(samples, room=8)
    return sum(vqa_accuracy(answer, [sample.turns[-1].answer]) for answer, sample in zip(said, samples)) / len(samples), pupil


def draw(table: dict[str, dict[str, float]], read: dict[str, float], path: str) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for n, way in enumerate(WAYS):
        left.bar([place + 0.25 * (n - 1) for place in range(len(SETS))], table[way].values(), 0.22, label=way)
    left.set_xticks(range(len(SETS)), [f"{name} records" for name in SETS])
    left.set(yscale="log", ylabel=f"times each is met in {SAMPLES:,}")
    left.legend()
    right.bar(list(read), list(read.values()))
    right.set(ylim=(0, 1), ylabel="numbers in small print that are read")
    figure.savefig(path, dpi=90)


def main() -> None:
    table = {way: met(way) for way in WAYS}
    for way in WAYS:
        print(f"{way:13} each record is met", *(f"{table[way][name]:.2f} times of {name}; " for name in SETS))
    samples, read = Scenes(0, 96, small_print=True).exam(ASKED, ("reading",), "mixture"), {}
    for name, says in (("llava15/tiny", "whole, 48 × 48"), ("llava15/tiny-hd", "whole and tiles")):
        began = time.monotonic()
        read[says], pupil = reads(name, samples)
        places = pupil.collate.transform.places(samples[0].images[0], pupil.model.reads.image_tokens)
        print(f"{says}: {places} image tokens, {read[says]:.0%} of {ASKED} numbers are read  ({time.monotonic() - began:.0f} s)", flush=True)
    draw(table, read, "question_8.png")


if __name__ == "__main__":
    main()
