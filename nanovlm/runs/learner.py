"""The model of one stage while it learns, whole on each rank or shared out over them: how it begins, is saved, goes on and is handed on.

              begins                               is saved                          is handed on
    whole     initial_model ─► device ─► freeze    last.pt                           its state
    shared    … lean ─► freeze ─► shard            last.pt, last-STAGE-STEP/         its state, gathered on rank 0
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs import checkpoint
from nanovlm.runs.folder import RunFolder
from nanovlm.runs.setting import Job, Setting
from nanovlm.training import distributed, sharding
from nanovlm.training.batches import need_even_shares
from nanovlm.training.loop import freeze, need_one_batch
from nanovlm.training.optim import make_optimiser
from nanovlm.training.randomness import random_states, seed_all, set_random_states
from nanovlm.training.weights import State, initial_model

GIB = 2 ** 30


@dataclass
class Learner:
    job: Job
    model: nn.Module
    optimiser: torch.optim.AdamW
    scalars: set[str] | None  # of a model that is shared out, see sharding.shard; None: it is whole

    def save(self, keep: RunFolder, step: int, seconds: float) -> None:
        """Where to go on from, and how long the stage has taken. All ranks call it."""
        name = self.job.stage.name
        if self.scalars is None:
            state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        else:
            state = {"shards": f"last-{name}-{step}"}
            with checkpoint.saving(keep.path / state["shards"]):
                sharding.save(keep.path / state["shards"], self.model, self.optimiser)
        keep.save(name, step, {**state, "stage_seconds": seconds, "random": distributed.from_all(random_states())})

    def go_on(self, keep: RunFolder, half: dict, seed: int) -> None:
        """As it was saved, on as many ranks or on others; on others only what is drawn at random differs."""
        if self.scalars is None:
            self.model.load_state_dict(half["model"])
            self.optimiser.load_state_dict(half["optimiser"])
        else:
            sharding.load(keep.path / half["shards"], self.model, self.optimiser)
        if len(half["random"]) == distributed.world():
            set_random_states(half["random"][distributed.rank()])
        else:
            seed_all(seed, *self.job.name, half["step"])

    def weights(self) -> State:
        """As the plain model has them, on the CPU; of a model that is shared out {} but on rank 0."""
        return checkpoint.cpu_state(self.model) if self.scalars is None else sharding.whole_state(self.model, self.scalars)


def begin(job: Job, setting: Setting, before: dict[str, State]) -> Learner:
    """before: weights of finished stages, by name."""
    model = initial_model(job.recipe, job.stage, setting.seed, before, lean=setting.shard)
    scalars = None
    if setting.shard:
        freeze(model, job.stage.trains)
        scalars = sharding.shard(model, setting.device, torch.bfloat16 if setting.device.type == "cuda" else None)
    else:
        freeze(model.to(setting.device), job.stage.trains)
    return Learner(job, model, make_optimiser(model, job.stage), scalars)


def foresee(recipe: Recipe, stage: Stage, device: torch.device, shard: bool) -> None:
    """What would end the run when the stage begins, hours later perhaps, ends it before the first one: a UserError."""
    need_even_shares(stage)
    with torch.device("meta"):
        model = recipe.build(stage)
    need_one_batch(model, stage)
    if device.type == "cuda" and not shard:
        need_room(model, recipe, stage, device)


def need_room(model: nn.Module, recipe: Recipe, stage: Stage, device: torch.device) -> None:
    """A model that cannot fit whole on a GPU, with its gradients and moments, is refused before it is built. model: its shapes."""
    freeze(model, stage.trains)
    needed = sharding.bytes_unsharded(model)
    room = torch.cuda.get_device_properties(device).total_memory
    if needed > room:
        raise UserError(f"Stage {stage.name} of {recipe.name} needs {needed / GIB:.0f} GiB on each GPU before the first activation, and this one has "
                        f"{room / GIB:.0f}: share the model out with --shard (python -m nanovlm.plan --recipe {recipe.name} says over how many).")
