"""Captioner and filter, fine-tuned apart from a finished run, on records of a person's own.

    runs/blip: pretrain.pt ─┬─► captioner.pt     on the human pairs, for a few epochs
                            └─► filter.pt
The stages are those of the run's recipe; where they stand in a folder already, nothing is trained.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from nanovlm import recipes
from nanovlm.data.records import Records
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, resolve
from nanovlm.runs import checkpoint
from nanovlm.runs.folder import RunFolder, is_run
from nanovlm.runs.progress import say
from nanovlm.runs.run import weights_after
from nanovlm.runs.setting import Job, Setting
from nanovlm.training.weights import State, needed_stages

EPOCHS, FEWEST = 8, 60  # of the human pairs, for captioner and filter each; and steps of each at least


def open_run(path: Path) -> tuple[str, Recipe, tuple[str, str]]:
    """What the run was trained on, its recipe, and (recipe, stage) that captioner and filter go on from."""
    wanted = "name a run of train_tiny.py --model blip --data NOISY, such as runs/blip"
    if not is_run(path):
        raise UserError(f"--model {path} is no folder of a run: {wanted}.")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    recipe = recipes.get(config["recipe"]["name"])
    if not recipe.makes:
        raise UserError(f"--model {path} is a run of {recipe.name}, which has neither captioner nor filter: {wanted}.")
    first, = needed_stages(recipe.stage(next(iter(recipe.makes.values())).captioner))
    if not (path / f"{first[1]}.pt").exists():
        raise UserError(f"--model {path} is not finished: go on with it by train_tiny.py --recipe {recipe.name} --out {path} --resume.")
    return config["data"], recipe, first


def to_tune(recipe: Recipe, names: Sequence[str], human: Records, steps: float | None) -> Recipe:
    """Captioner and filter alone, trained for as long as so few texts are worth; augmented, as all stages are on a person's pictures."""
    stages = [recipe.stage(name) for name in names]
    stages = [replace(stage, anew=True, augment=True, evaluate=(),
                      steps=max(FEWEST, ceil(EPOCHS * human.size(stage.real, "train") / stage.batch_size))) for stage in stages]
    return resolve(replace(recipe, stages=tuple(stages)), real=False, steps=steps)


def tune(jobs: Sequence[Job], setting: Setting, keep: RunFolder, first: tuple[str, str], path: Path) -> dict[str, State]:
    """The weights of captioner and filter, as far as they are not in the folder trained now."""
    begins = setting.job(*first)
    if not keep.has(begins):
        keep.write(begins, checkpoint.load(path / f"{begins.stage.name}.pt"), {"name": begins.stage.name, "seconds": 0.0, "cached": True})
    setting.work = [job for job in jobs if not keep.has(job)]
    planned = ", ".join(f"{job.stage.name} {job.stage.steps:,} steps of {job.stage.batch_size} pairs" for job in setting.work)
    say(f"plan: {planned or 'nothing to train'}")
    return {job.stage.name: weights_after(job, setting, keep) for job in jobs}
