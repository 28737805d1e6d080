"""All recipes by name: `names()` lists them, `get(name)` gives one, `build(name)` the model of one of its stages.

`python -c "from nanovlm import recipes; print(recipes.table())"` prints all of them side by side.
"""

import torch
from torch import nn

from nanovlm.errors import UserError
from nanovlm.recipes import backbones, blip, blip2, blip_downstream, flamingo, instructblip, llava, llava15
from nanovlm.recipes.stage import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    *backbones.RECIPES, *blip.RECIPES, *blip_downstream.RECIPES, *flamingo.RECIPES, *llava.RECIPES, *blip2.RECIPES, *instructblip.RECIPES, *llava15.RECIPES)}

BACKBONES = {recipe.name for recipe in backbones.RECIPES}


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
        return get(name).build(get(name).stage(stage))


def shorter_side(name: str) -> int:
    """How many pixels of a picture's shorter side the model can see: with tiles those of the largest canvas."""
    tiling = build(name).reads.tiling
    return get(name).image_size if tiling is None else max(map(min, tiling.grids)) * tiling.side


def table() -> str:
    """One line for each stage of each recipe: what scale changes and what it does not."""
    lines = [f"{'recipe':<28}{'pixels':>7}{'parameters':>16}  {'stage':<10}{'steps × batch':>19}{'lr':>9}  learns"]
    for name, recipe in RECIPES.items():
        for stage in recipe.stages:
            model = build(name, stage=stage.name)
            lines.append(f"{name:<28}{recipe.image_size:>7}{sum(p.numel() for p in model.parameters()):>16,}  {stage.name:<10}"
                         f"{f'{stage.steps:,} × {stage.batch_size:,}':>19}{stage.lr:>9.1e}  {', '.join(stage.trains)}")
    return "\n".join(lines)
