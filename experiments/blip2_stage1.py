"""Is stage 1 needed? BLIP-2's Figure 5 at tiny scale: zero-shot question answering while stage 2 learns from captions.

    with       stage 1, then N steps of stage 2
    without    N steps of stage 2, from a random Q-Former
    equal      the same, but as many more steps as stage 1 would have paid for (FLOPs of a step, as torch counts them)

    python -m experiments.blip2_stage1                       seeds 0, 1 and 7; N is 0.3 of the recipe's stage 2
    python -m experiments.blip2_stage1 --seeds 0 --steps 1   one seed, the whole stage
    python -m experiments.blip2_stage1 --table               print the stored results as Markdown

Backbones and stage 1 are those of the recipe, from the cache if they are there; a seed that is stored already is
measured anew, the others stay. Every point is the accuracy on held-out questions of all kinds and, beside it, on the
same questions with the pictures exchanged. The paper's figure has curves only, and its decoder's curve without stage 1
falls as training goes on.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm import evaluate, recipes
from nanovlm.data.scene_questions import KINDS
from nanovlm.data.scenes import Scenes
from nanovlm.lm_loss import mean_loss
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.training import checkpoint
from nanovlm.training.batches import MicroBatches, make_collate, stream
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.run import Options, Run, versions
from nanovlm.training.weights import initial_model

RESULTS = Path(__file__).parent / "results" / "blip2_stage1.json"
RECIPE = recipes.get("blip2/tiny")
CPU = torch.device("cpu")
PER_KIND = 40  # questions of each kind, at every point
POINTS = 6


def prepare(seed: int, scratch: str) -> Run:
    """A run that has its backbones and stage 1."""
    training = Run(RECIPE.name, Options(seed=seed, out=str(Path(scratch) / "run")), CPU)
    for job in training.jobs[:-1]:
        training.obtain(replace(job, final=False))
    return training


def flops(training: Run, stage: Stage) -> int:
    """Of one step's forward and backward pass."""
    model = RECIPE.build(stage.name)
    freeze(model, stage.trains)
    batch = MicroBatches(training.world, stage, 0, make_collate(RECIPE, stage, training.tokenizer, model))[0]
    with FlopCounterMode(display=False) as counter:
        mean_loss(model.losses(batch)).backward()
    return counter.get_total_flops()


def curve(training: Run, seed: int, recipe: Recipe) -> list[dict]:
    """Train the recipe's last stage and ask it POINTS times on the way."""
    stage = recipe.stages[-1]
    model = initial_model(recipe, stage, seed, training.finished)
    freeze(model, stage.trains)
    batches = MicroBatches(training.world, stage, seed, make_collate(RECIPE, stage, training.tokenizer, model))
    questions = [sample for kind in KINDS for sample in Scenes().exam(PER_KIND, (kind,))]
    marks = {round(stage.steps * (i + 1) / POINTS) for i in range(POINTS)}
    points = []
    for report in train_stage(model, stage, stream(batches, 0, CPU), make_optimiser(model, stage), CPU):
        if report.step in marks:
            with checkpoint.undisturbed(model):
                examinee = evaluate.Examinee(model, RECIPE, stage, training.tokenizer, CPU)
                judged = evaluate.mean(evaluate.judge_answers(examinee, questions))
            points.append({"step": report.step, "loss": round(report.losses["lm"], 4), **judged})
            print(f"  step {report.step}: {judged['value']:.3f} (pictures exchanged {judged['shuffled']:.3f})", flush=True)
    return points


def measure(seed: int, fraction: float) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        training = prepare(seed, scratch)
        first, second = RECIPE.stages
        second = replace(second, steps=round(second.steps * fraction))
        cost = [flops(training, stage) for stage in (first, second)]
        alone = replace(second, init=(*second.init, *first.init))  # stage 1 would have brought the vision encoder
        longer = replace(alone, steps=second.steps + round(first.steps * cost[0] / cost[1]))
        curves = {}
        for name, stages in (("with", (first, second)), ("without", (alone,)), ("equal", (longer,))):
            print(f"seed {seed}, {name}: {stages[-1].steps} steps", flush=True)
            curves[name] = curve(training, seed, replace(RECIPE, stages=stages))
    return {"seed": seed, "fraction": fraction, "stage1_steps": first.steps, "gigaflops_a_step": [c / 1e9 for c in cost],
            "curves": curves}


def table(result: dict) -> str:
    """Markdown: accuracy at the end of each curve, pictures exchanged in brackets."""
    lines = ["| seed | with stage 1 | without | without, equal compute |", "|---|---|---|---|"]
    for run in result["runs"]:
        ends = [run["curves"][name][-1] for name in ("with", "without", "equal")]
        lines.append(f"| {run['seed']} | " + " | ".join(f"{e['value']:.2f} ({e['shuffled']:.2f})" for e in ends) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 7])
    parser.add_argument("--steps", type=float, default=0.3, help="fraction of stage 2")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for seed in [] if args.table else args.seeds:
        new = measure(seed, args.steps)
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if RESULTS.exists() else []
        runs = sorted([run for run in stored if run["seed"] != seed] + [new], key=lambda run: run["seed"])
        result = {"recipe": RECIPE.name, "machine": f"{os.cpu_count()} {platform.machine()} cores",
                  "versions": versions(), "runs": runs}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
