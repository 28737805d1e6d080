"""All recipes by name: `names()` lists them, `get(name)` gives one, `build(name)` the model of one of its stages."""

import torch
from torch import nn

from nanovlm.errors import UserError
from nanovlm.recipes import backbones, blip2, blip2_finetuning, llava, llava15
from nanovlm.recipes.stage import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    *backbones.RECIPES, *llava.RECIPES, *blip2.RECIPES, *blip2_finetuning.RECIPES, *llava15.RECIPES)}


def names() -> list[str]:
    return list(RECIPES)


def get(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"There is no recipe {name!r}; the recipes are {', '.join(RECIPES)}.")
    return RECIPES[name]


def build(name: str, device: torch.device | str = "meta", stage: str | None = None) -> nn.Module:
    """The model of the recipe's last stage, or of `stage`, with fresh weights.

    On the default device "meta" nothing is allocated: a model of any size can be looked at and counted.
    """
    with torch.device(device):
        return get(name).build(stage_name(name, stage))


def stage_name(name: str, stage: str | None = None) -> str:
    """The recipe's last stage unless told, and one that it has."""
    stages = [s.name for s in get(name).stages]
    if stage is not None and stage not in stages:
        raise UserError(f"Recipe {name} has no stage {stage!r}; its stages are {', '.join(stages)}.")
    return stage or stages[-1]


def shorter_side(recipe: Recipe) -> int:
    """How many pixels of a picture's shorter side the model can see: with tiles those of the largest canvas."""
    with torch.device("meta"):
        tiling = getattr(recipe.build(recipe.stages[-1].name), "tiling", None)
    return recipe.image_size if tiling is None else max(map(min, tiling.grids)) * tiling.side
