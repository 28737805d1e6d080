"""The step between two stages at which models make data: who writes, who judges, and the file that it leaves in the run's folder.

    stages "captioner", "filter" ──► bootstrapped.jsonl ──► stage "retrain"
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.evaluate.pupil import Pupil
from nanovlm.making.bootstrap import Bootstrapped, Write, grow
from nanovlm.recipes.stage import CapFilt
from nanovlm.runs.folder import on_first
from nanovlm.runs.progress import say, warn
from nanovlm.runs.setting import Job, Setting
from nanovlm.training.weights import State

SAID_EVERY = 2000  # pictures


def made_for(job: Job, setting: Setting, before: dict[str, State], folder: Path | None) -> dict[str, Bootstrapped]:
    """The data sets of the job's diets that stages before make, by name."""
    return {name: make(name, made, job, setting, before, folder) for name, made in job.makes.items()}


def make(name: str, made: CapFilt, job: Job, setting: Setting, before: dict[str, State], folder: Path | None) -> Bootstrapped:
    """No more pictures than the stage has places for: a shortened run is short here, too."""
    world = setting.data_for(job)
    count = min(world.pool(made.web), job.stage.steps * job.stage.batch_size)
    captioner, judge = (pupil_of(stage, job, setting, before) for stage in (made.captioner, made.filter))
    write = writer(captioner, made, f"{setting.seed}/{name}")

    def report(done: int) -> None:
        if done % SAID_EVERY == 0 or done == count:
            say(f"{name}: {done:,} of {count:,} pictures captioned and filtered")

    path = folder / f"{name.replace(' ', '-')}.jsonl" if folder else None
    texts = on_first(lambda: grow(path, [world.pooled(made.web, i) for i in range(count)], write, judge.belongs, report))
    if not any(text.kept for text in texts):
        warn(f"{name}: the filter takes none of {len(texts):,} texts for right, so none is dropped; train the filter longer")
        texts = [replace(text, belongs=None) for text in texts]
    return Bootstrapped(world, made.web, texts)


def pupil_of(name: str, job: Job, setting: Setting, before: dict[str, State]) -> Pupil:
    stage = job.recipe.stage(name)
    model = job.recipe.build(stage)
    model.load_state_dict(before[name])
    return Pupil(model.to(setting.device), job.recipe, stage, setting.tokenizer, setting.device)


def writer(pupil: Pupil, made: CapFilt, key: str) -> Write:
    """Captions as CapFilt wants them: sampled from the nucleus, or by beams; the same for the same pictures, whenever they are made."""
    def write(samples: Sequence[Sample]) -> list[str]:
        generator = torch.Generator(pupil.device).manual_seed(Random(f"{key}/{samples[0].id}").getrandbits(63))
        how = {"beams": made.beams} if made.beams > 1 else {"temperature": 1.0, "top_p": made.top_p, "generator": generator}
        asked = [replace(sample, turns=(Turn(IMAGE, sample.caption, "caption"),)) for sample in samples]  # its own text is not looked at
        return pupil.answer(asked, made.room, **how)

    return write
