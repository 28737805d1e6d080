"""The plan beside PyTorch's own memory tracker: eight ranks by fake tensors, models of full width and a few layers."""

from dataclasses import replace

import pytest
import torch
from packaging.version import Version

from experiments.plan_simulation import CASES, Case, compare
from nanovlm import recipes
from nanovlm.recipes.stage import Recipe

new_enough = pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="before PyTorch 2.13 the tracker counts optimiser states twice")


def shallow(recipe: Recipe) -> Recipe:
    """As wide as published, with few layers: two gated layers of Flamingo's, two blocks of everything else."""
    config = recipe.config
    changes = {"language": replace(config.language, layers=2)}
    if "flamingo" in recipe.name:
        changes |= {"resampler": replace(config.resampler, layers=2), "vision": replace(config.vision, depths=(1, 1, 1, 1))}
    else:
        changes["vision"] = replace(config.vision, layers=2)
    if "blip2" in recipe.name:
        changes["qformer"] = replace(config.qformer, text=replace(config.qformer.text, layers=2))
    return replace(recipe, config=replace(config, **changes))


@new_enough
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.recipe)
def test_the_plan_is_what_the_tracker_counts(case: Case):
    """Weights to the byte, moments but for the count of steps that each parameter has; what a step makes within a tenth."""
    found = compare(case, shallow(recipes.get(case.recipe)))
    planned, tracked = found["planned"], found["tracked"]
    assert planned["weights"] == tracked["weights"] and planned["gradients"] == tracked["gradients"]
    assert 0 <= tracked["moments"] - planned["moments"] < 4096
    assert planned["activations"] == pytest.approx(tracked["activations"], rel=0.1)
    assert planned["peak"] == pytest.approx(tracked["peak"], rel=0.1)
