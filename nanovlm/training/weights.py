"""Where a stage's weights come from: chance, the stage before, a trained backbone, or a published checkpoint.

    build (random, seeded by stage) ──► modules of the same name from the recipe's stage before ──► `init` of the stage
"""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage

PUBLISHED = "published:"

State = dict[str, Tensor]


def seed_all(*parts: object) -> None:
    """Every stage starts from random states of its own: whether the ones before were cached does not matter."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def needed_backbones(stage: Stage) -> list[str]:
    """The recipes whose weights `init` takes, in order, each once."""
    return list(dict.fromkeys(origin.split(":")[0] for _, origin in stage.init if not origin.startswith(PUBLISHED)))


def initial_model(recipe: Recipe, stage: Stage, seed: int, finished: dict[str, State]) -> nn.Module:
    """The model as the stage finds it; `finished` holds recipe name → weights of its latest finished stage."""
    seed_all(seed, recipe.name, stage.name)
    model = recipe.build(stage.name)
    if recipe.name in finished:
        take_over(model, finished[recipe.name])
    for module, origin in stage.init:
        if origin.startswith(PUBLISHED):
            load_published(model, module, origin.removeprefix(PUBLISHED))
        else:
            backbone, part = origin.split(":")
            load_part(model, module, finished[backbone], part)
    return model


def take_over(model: nn.Module, old: State) -> None:
    """Every top-level part that `old` has too goes on with its weights; all of them, or it is an error."""
    mine = model.state_dict()
    shared = {name.split(".")[0] for name in old}
    model.load_state_dict({**mine, **{name: old[name] for name in mine if name.split(".")[0] in shared}})


def load_part(model: nn.Module, module: str, old: State, part: str) -> None:
    """Module `module` of the model := module `part` of the backbone, as far as the model has it.

    BLIP-2 leaves out the encoder's last block; what the model has and the backbone lacks is an error.
    """
    prefix = part + "."
    weights = {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}
    if not weights:
        raise ValueError(f"init takes {part!r}, but the backbone has no such module.")
    fill(model.get_submodule(module), weights)


def fill(module: nn.Module, weights: State) -> None:
    module.load_state_dict({name: weights[name] for name in module.state_dict() if name in weights})


def load_published(model: nn.Module, module: str, name: str) -> None:
    """From $NANOVLM_WEIGHTS/ORG/NAME; the checkpoint is that module alone, or a model that has one of that name."""
    home = os.environ.get("NANOVLM_WEIGHTS")
    if not home or not (Path(home) / name).is_dir():
        raise UserError(f"The published weights {name} are needed for {module}: put their folder at {name} below a "
                        f"folder of your choice and set NANOVLM_WEIGHTS to the latter (now {home or 'not set'}).")
    # Imported here, because hub knows every paper: editing one of them must not invalidate all cached backbones.
    from nanovlm import hub

    loaded = hub.load(Path(home) / name)
    target = model.get_submodule(module)
    if hasattr(target, "take_bert") and not hasattr(loaded, module):  # a text transformer is where it starts from
        target.take_bert(getattr(loaded, "bert", loaded))
    else:
        fill(target, getattr(loaded, module, loaded).state_dict())
