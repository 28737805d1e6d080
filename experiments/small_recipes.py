"""Do the `small` recipes train? Each stage for a hundred steps on the CPU, at a small batch, beside its plan for one GPU of 24 GB.

    python -m experiments.small_recipes --steps 100 --batch 2            all of them: hours on two cores
    python -m experiments.small_recipes --recipe llava/small --minutes 5 one recipe, at most so long a stage; the others' results stay
    python -m experiments.small_recipes --table                          print what is stored

    clip/small ── few steps ─┐
    lm/small ──── few steps ─┴─► llava/small: align, `steps` steps ──► tune, `steps` steps

A small recipe has 39 to 341 M parameters and sees pictures of 224 pixels. It goes on from small backbones, which are not shipped and are
not trained here either: they take a few steps, so that their weights go the way that they will go. So nothing is learned that is worth
anything; what is shown is that every stage runs at its full size, that its loss falls, and what it needs.

`first` and `last` are means of the first and the last tenth of the losses, all of a stage's losses added up. Of mixed losses (Flamingo)
each data set has a micro-batch of `batch` in every step. Each recipe runs in a process of its own, as its peak of memory is asked of it.
"""

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from experiments.seeds import CPU, RESULTS, machine
from nanovlm import recipes
from nanovlm.plan.stages import GIB, Machine, plan
from nanovlm.recipes.stage import Recipe, Stage, resolve
from nanovlm.runs.run import versions
from nanovlm.runs.setting import Job, Setting, needs, world_of
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.training.batches import MicroBatches, make_collate, stream
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.weights import State, initial_model

PATH = RESULTS / "small_recipes.json"
GPU = Machine(gpus=1, memory=24)
SEED = 0


def small() -> list[str]:
    return [name for name in recipes.names() if name.endswith("/small") and name not in recipes.BACKBONES]


def reduced(recipe: Recipe, steps: int, batch: int) -> Recipe:
    """The same recipe, its stages shorter and with less at once."""
    stages = []
    for stage in recipe.stages:
        micro = len(stage.data) if stage.mixed == "losses" else 1
        stages.append(replace(stage, steps=steps, batch_size=batch * micro, accumulate=micro, portions={}))
    return replace(recipe, stages=tuple(stages))


def train(recipe: Recipe, stage: Stage, setting: Setting, finished: dict[str, State], seconds: float) -> tuple[State, dict]:
    """The stage's weights and what was seen on the way, for at most so many seconds; `recipe` is as `reduced` makes it."""
    model = initial_model(recipe, stage, SEED, finished)
    freeze(model, stage.trains)
    collate = make_collate(recipe, stage, setting.tokenizer, model.reads)
    batches = MicroBatches(setting.samples(Job(recipe, stage), {}), stage, SEED, collate)
    losses, began = [], time.monotonic()
    for report in train_stage(model, stage, stream(batches, 0, CPU), make_optimiser(model, stage), CPU):
        losses.append(sum(report.losses.values()))
        if time.monotonic() - began > seconds:
            break
    tenth = max(1, len(losses) // 10)
    return model.state_dict(), {
        "steps": len(losses), "first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth,
        "seconds_a_step": (time.monotonic() - began) / len(losses)}


def measure(name: str, steps: int, batch: int, few: int, seconds: float) -> dict:
    """All stages of a small recipe, one after the other."""
    recipe = resolve(recipes.get(name), real=False)
    world = world_of(recipe, SEED)
    setting = Setting(recipe, SEED, CPU, world, find_tokenizer(recipe, world, SEED))
    kept: dict[tuple[str, str], State] = {}

    def before(job: Job) -> dict[str, State]:
        """The weights of all that the job needs; what has no steps yet takes a few."""
        for other in needs(job, setting):
            if other.name not in kept:
                short = reduced(other.recipe, few, batch)
                kept[other.name], _ = train(short, short.stage(other.stage.name), setting, before(other), seconds)
        return {other.stage.name: kept[other.name] for other in needs(job, setting)}

    stages = []
    for stage in recipe.stages:
        job, planned, short = Job(recipe, stage), plan(recipe, stage, GPU), reduced(recipe, steps, batch)
        kept[job.name], seen = train(short, short.stage(stage.name), setting, before(job), seconds)
        stages.append({"stage": stage.name, "parameters": sum(count for count, _ in planned.parts.values()),
                       "batch": short.stage(stage.name).batch_size,
                       "micro": planned.micro, "accumulate": planned.accumulate, "needed": planned.needed, "fits": planned.fits, **seen})
        print(f"{name} {stages[-1]}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {"recipe": name, "peak_rss": peak, "threads": torch.get_num_threads(), "machine": machine(), "stages": stages}


def alone(*arguments: object) -> dict:
    """`measure` in a process that has held nothing before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def table(result: dict) -> str:
    head = ["recipe", "stage", "parameters", "one GPU of 24 GB: micro-batch × accumulated", "GiB", "CPU: batch", "steps", "loss, first tenth",
            "last tenth", "seconds a step", "peak memory, GiB"]
    lines = [head, ["---"] * len(head)]
    for run in result["runs"]:
        for stage in run["stages"]:
            lines.append([f"`{run['recipe']}`", stage["stage"], f"{stage['parameters'] / 1e6:,.0f} M", f"{stage['micro']} × {stage['accumulate']}",
                          f"{stage['needed'] / GIB:.1f}{'' if stage['fits'] else ', does not fit'}", f"{stage['batch']}", f"{stage['steps']}",
                          f"{stage['first']:.2f}", f"{stage['last']:.2f}", f"{stage['seconds_a_step']:.1f}", f"{run['peak_rss'] / GIB:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=small(), default=small(), metavar="NAME", help="which (default: all)")
    parser.add_argument("--steps", type=int, default=100, help="of each stage (default: 100)")
    parser.add_argument("--batch", type=int, default=2, help="samples of a micro-batch (default: 2)")
    parser.add_argument("--few", type=int, default=2, help="steps of what a recipe goes on from (default: 2)")
    parser.add_argument("--minutes", type=float, default=60, help="the longest that a stage may take; it then has fewer steps (default: 60)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    for name in [] if args.table else args.recipe:
        new = alone(name, args.steps, args.batch, args.few, 60 * args.minutes)
        runs = json.loads(PATH.read_text(encoding="utf-8"))["runs"] if PATH.exists() else []
        runs = sorted([run for run in runs if run["recipe"] != name] + [new], key=lambda run: small().index(run["recipe"]))
        PATH.write_text(json.dumps({"versions": versions(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(PATH.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
