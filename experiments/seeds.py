"""What experiments over several seeds share: one stage's training, and a file that keeps the other seeds when one is measured anew."""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs.run import Options, Run, versions
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import MicroBatches, make_collate, stream
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.weights import State, initial_model

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


def trained_before(recipe: str, last: int, seed: int) -> Run:
    """A run that has yet to train its `last` stages: for its tokenizer, world and `finished`. It has no folder any more."""
    with tempfile.TemporaryDirectory() as scratch:
        training = Run(recipe, Options(seed=seed, out=str(Path(scratch) / "run")), CPU)
        for job in training.jobs[:-last]:
            training.obtain(replace(job, final=False))  # so that it is looked for in the cache
    return training


def learn(recipe: Recipe, stage: Stage, source: object, seed: int, tokenizer: Tokenizer, finished: dict[str, State],
          after: Callable[[nn.Module, object], None] = lambda model, report: None) -> nn.Module:
    """The recipe's model after this stage; `finished` has the stages before it. after: called at every step."""
    model = initial_model(recipe, stage, seed, finished)
    freeze(model, stage.trains)
    batches = MicroBatches(source, stage, seed, make_collate(recipe, stage, tokenizer, model))
    for report in train_stage(model, stage, stream(batches, 0, CPU), make_optimiser(model, stage), CPU):
        if report.step % 200 == 0:
            print(f"    {stage.name} {report.step}/{stage.steps}: loss {report.losses['lm']:.3f}", flush=True)
        after(model, report)
    return model


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
