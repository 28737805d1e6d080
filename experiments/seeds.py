"""What experiments over several seeds share: one stage's training, and a file that keeps the other seeds when one is measured anew."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm import recipes
from nanovlm.chat import load_run
from nanovlm.evaluate.pupil import Pupil
from nanovlm.recipes.stage import Recipe, Stage, resolve
from nanovlm.runs.cache import Cache
from nanovlm.runs.folder import is_run
from nanovlm.runs.run import Options, run, versions, weights_after
from nanovlm.runs.setting import Job, Setting, needs, world_of
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import MicroBatches, Samples, make_collate, stream
from nanovlm.training.loop import Report, freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.weights import State, initial_model

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def trained_before(name: str, last: int, seed: int) -> tuple[Setting, dict[str, State]]:
    """Of a recipe that has yet to train its `last` stages: world and tokenizer, and the weights that these begin with, by name."""
    recipe = resolve(recipes.get(name), real=False)
    world = world_of(recipe, seed)
    setting = Setting(recipe, seed, CPU, world, find_tokenizer(recipe, world, seed))
    later = [Job(recipe, stage) for stage in recipe.stages[-last:]]
    before = {other.stage.name: other for job in later for other in needs(job, setting) if other not in later}
    return setting, {name: weights_after(job, setting, Cache(setting)) for name, job in before.items()}


def asked(out: Path, recipe: str, options: Options) -> Pupil:
    """The pupil of the run in this folder; the run is made now, or gone on with, unless it is finished."""
    if not (out / "summary.json").exists():
        run(recipe, replace(options, out=str(out), resume=is_run(out)))
    return load_run(out)


def learn(recipe: Recipe, stage: Stage, samples: Samples, seed: int, tokenizer: Tokenizer, finished: dict[str, State],
          after: Callable[[nn.Module, Report], None] = lambda model, report: None,
          prepare: Callable[[nn.Module], None] = lambda model: None) -> nn.Module:
    """The recipe's model after this stage; `finished` has the stages before it. after: called at every step; prepare: before them."""
    model = initial_model(recipe, stage, seed, finished)
    freeze(model, stage.trains)
    prepare(model)
    batches = MicroBatches(samples, stage, seed, make_collate(recipe, stage, tokenizer, model.reads))
    for report in train_stage(model, stage, stream(batches, 0, CPU), make_optimiser(model, stage), CPU):
        if report.step % 200 == 0:
            told = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
            print(f"    {stage.name} {report.step}/{stage.steps}: {told}", flush=True)
        after(model, report)
    return model


class Remembering(nn.Module):
    """Frozen eyes that look at a picture once: all arms of a seed meet the same ones. Half precision in memory."""

    def __init__(self, eyes: nn.Module, memory: dict[int, Tensor]):
        super().__init__()
        self.eyes, self.memory = eyes, memory

    def forward(self, images: Tensor) -> Tensor:
        key = hash(images.numpy().tobytes())
        if key not in self.memory:
            self.memory[key] = self.eyes(images).half()
        return self.memory[key].float()


def spread(values: Sequence[float]) -> str:
    """The mean, and from the lowest to the highest where there are several."""
    return f"{values[0]:.2f}" if len(values) == 1 else f"{sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def machine() -> str:
    """Its class, with the widest instructions that torch uses: two cores are not everywhere as fast."""
    return f"{os.cpu_count()} {platform.machine()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main(about: str, name: str, recipe: str, measure: Callable[[int, float], dict], table: Callable[[dict], str],
         fraction: float) -> None:
    """measure: (seed, fraction of the steps) → plain values; table: all that is stored → Markdown."""
    path = RESULTS / f"{name}.json"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 7])
    parser.add_argument("--steps", type=float, default=fraction, help=f"fraction of the recipe's steps (default: {fraction})")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    for seed in [] if args.table else args.seeds:
        new = {"seed": seed, "fraction": args.steps, "machine": machine(), **measure(seed, args.steps)}
        stored = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        runs = sorted([run for run in stored if run["seed"] != seed] + [new], key=lambda run: run["seed"])
        result = {"recipe": recipe, "versions": versions(), "runs": runs}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))
