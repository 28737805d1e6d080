"""Captioner and filter, fine-tuned apart from a finished run, on records of a person's own.

    runs/blip/pretrain.pt ─┬─► clean/captioner.pt     each on the human pairs, for a few epochs
                           └─► clean/filter.pt
The stages are those of the run's recipe, the folder is one like a run's: what stands there already is not trained again.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path

from nanovlm import recipes
from nanovlm.data.records import Records
from nanovlm.data.sample import Sample
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.published_tokenizer import restored
from nanovlm.recipes.stage import CapFilt, Recipe, as_config, resolve
from nanovlm.runs import checkpoint
from nanovlm.runs.cache import Cache
from nanovlm.runs.capfilt import pupil_of
from nanovlm.runs.folder import RunFolder, is_run
from nanovlm.runs.progress import say
from nanovlm.runs.run import Options, shortened, versions, weights_after
from nanovlm.runs.setting import Job, Setting, leave_out_unfit
from nanovlm.training import distributed
from nanovlm.training.weights import needed_stages

CLEANED = "nanovlm capfilt"  # the mark of such a folder
EPOCHS, FEWEST = 8, 60  # of the human pairs, for captioner and filter each; and steps of each at least


def open_run(path: Path, beams: int) -> tuple[str, Recipe, CapFilt]:
    """What a finished run was trained on, its recipe, and how that one makes data."""
    wanted = "name a run of train_tiny.py --model blip --data NOISY, such as runs/blip"
    if not is_run(path):
        raise UserError(f"--model {path} is no folder of a run: {wanted}.")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    recipe, data = recipes.get(config["recipe"]["name"]), config["data"]
    if not recipe.makes:
        raise UserError(f"--model {path} is a run of {recipe.name}, which has neither captioner nor filter: {wanted}.")
    made = next(iter(recipe.makes.values()))
    if not (path / f"{origin(recipe, made.captioner)[1]}.pt").exists():
        raise UserError(f"--model {path} is not finished: go on with it by train_tiny.py --recipe {recipe.name} --out {path} --resume.")
    return data if isinstance(data, str) else data[origin(recipe, made.captioner)[1]], recipe, replace(made, beams=beams)


def origin(recipe: Recipe, name: str) -> tuple[str, str]:
    """(recipe, stage) that captioner and filter go on from."""
    return needed_stages(recipe.stage(name))[0]


def to_tune(recipe: Recipe, made: CapFilt, human: Records, steps: float | None) -> Recipe:
    """Captioner and filter alone, trained for as long as so few texts are worth; augmented, as all stages are on a person's pictures."""
    stages = [recipe.stage(name) for name in (made.captioner, made.filter)]
    stages = [replace(stage, anew=True, augment=True, evaluate=(),
                      steps=max(FEWEST, ceil(EPOCHS * human.size(stage.real, "train") / stage.batch_size))) for stage in stages]
    return resolve(replace(recipe, stages=tuple(stages)), real=False, steps=steps)


def prepare(path: Path, whole: Recipe, made: CapFilt, human: Records, why: Callable[[Sample], str | None],
            options: Options) -> tuple[Setting, RunFolder]:
    """All that can be wrong is found, and nothing is written yet; why: what speaks against learning from a record."""
    out = Path(options.out).resolve()
    for flag, given in (("--data", options.data), ("--model", path)):
        if out in (Path(given).resolve(), *Path(given).resolve().parents):
            raise UserError(f"--out {options.out} holds what {flag} names: write to another folder.")
    for name in (made.captioner, made.filter):
        human.leave_out(whole.stage(name).real, why, ("train",))
    recipe = to_tune(whole, made, human, options.steps)
    keep = RunFolder(recipe.name, options.out, options.resume, options.overwrite, what=CLEANED)
    tokenizer = restored(checkpoint.load(path / "last.pt")["tokenizer"])
    setting = Setting(recipe, options.seed, distributed.choose_device(options.device), human, tokenizer)
    leave_out_unfit([Job(recipe, stage) for stage in recipe.stages], setting)
    return setting, keep


def tune(path: Path, setting: Setting, keep: RunFolder, options: Options, asked: dict) -> list[Pupil]:
    """Captioner and filter, as far as they are not in the folder trained now; asked: what else a resumed call must ask for again."""
    keep.begin(setting, Cache(setting, kept=False), {
        "what": CLEANED, "recipe": as_config(setting.recipe), "seed": options.seed, "data": str(Path(options.data).resolve()),
        "on_missing": options.on_missing, "steps": options.steps, "--model": str(path.resolve()), **asked,
        "machine": {"device": str(setting.device), "processes": 1, **versions()}})
    jobs = [Job(setting.recipe, stage) for stage in setting.recipe.stages]
    first = setting.job(*origin(setting.recipe, jobs[0].stage.name))
    if not keep.has(first):
        keep.write(first, checkpoint.load(path / f"{first.stage.name}.pt"), {"name": first.stage.name, "seconds": 0.0, "cached": True})
    setting.work = [job for job in jobs if not keep.has(job)]
    planned = ", ".join(f"{job.stage.name} {job.stage.steps:,} steps of {job.stage.batch_size} pairs" for job in setting.work)
    say(f"plan: {planned or 'nothing to train'}, then captions and verdicts")
    if options.steps is not None:
        say(shortened(options.steps))
    return [pupil_of(job.stage.name, job, setting, {job.stage.name: weights_after(job, setting, keep)}) for job in jobs]
