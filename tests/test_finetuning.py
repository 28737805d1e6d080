"""Fine-tuning: weights from a stage in the middle, laid over each other; layers that learn slower; BLIP-2's three tasks."""

from dataclasses import replace

import pytest
import torch
import training_fakes as fakes

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe
from nanovlm.training import checkpoint, weights
from nanovlm.training.run import Options, Run, plan, run

MIDDLE, END = ("", "fake/tiny@align"), ("", "fake/tiny")


def more(*init: tuple[str, str], name: str = "more", size: int = 6) -> Recipe:
    return replace(fakes.recipe("more/tiny", (fakes.stage(name, ("bridge",), steps=2, init=init),)), image_size=size)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fakes in place of the real recipes, an empty cache, and the folder for runs."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.setitem(recipes.RECIPES, "more/tiny", more(MIDDLE))
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


# --- where weights come from ---

@pytest.mark.parametrize(("init", "want"), [
    ((MIDDLE,), ["see", "align", "more"]),
    ((END,), ["see", "align", "tune", "more"]),
    ((MIDDLE, END), ["see", "align", "tune", "more"]),
    ((END, MIDDLE), ["see", "align", "tune", "more"]),
    ((("eyes", "eyes/tiny:eyes"), MIDDLE), ["see", "align", "more"])])
def test_only_what_is_needed_is_trained_and_once(world, init, want):
    assert [job.stage.name for job in plan(more(*init), False, None)] == want
    assert [job.final for job in plan(more(*init), False, None)] == [False] * (len(want) - 1) + [True]


def test_stages_that_are_not_there_or_not_told_apart_are_refused(world):
    with pytest.raises(UserError, match="fake/tiny has no stage 'algin'; its stages are align, tune"):
        plan(more(("", "fake/tiny@algin")), False, None)
    with pytest.raises(ValueError, match="same name.*see, align, align"):
        plan(more(MIDDLE, name="align"), False, None)


def test_entries_are_laid_over_each_other_tensor_by_tensor(world):
    """The first has all, the second the bridge's weight only: the bias is the first's still."""
    whole = {name: torch.full_like(tensor, 1.0) for name, tensor in fakes.FakeVLM().state_dict().items()}
    part = {"bridge.weight": torch.full((7, 5), 2.0), "unheard.of": torch.zeros(1)}
    finished = {"align": whole, "tune": part}
    recipe = more(MIDDLE, END)
    model = weights.initial_model(recipe, recipe.stages[0], 0, finished).state_dict()
    assert {name: float(t.flatten()[0]) for name, t in model.items()} == {
        name: 2.0 if name == "bridge.weight" else 1.0 for name in whole}
    recipe = more(END, MIDDLE)
    model = weights.initial_model(recipe, recipe.stages[0], 0, finished).state_dict()
    assert all(tensor.eq(1).all() for tensor in model.values()), "the later one wins"
    recipe = more(("bridge", "fake/tiny:bridge"))
    with pytest.raises(ValueError, match="more.*nothing.*bridge.bias"):
        weights.initial_model(recipe, recipe.stages[0], 0, finished)


def test_a_stage_in_the_middle_is_shared_with_the_whole_run(world):
    """The cache knows it whether or not something is trained behind it, and what follows begins with its weights."""
    run("fake/tiny", Options(out=str(world / "whole")))
    summary = run("more/tiny", Options(out=str(world / "more")))
    assert [(s["name"], s["cached"]) for s in summary["stages"]] == [("see", True), ("align", True), ("more", False)]
    align, new = (checkpoint.load(world / f"more/{name}.pt") for name in ("align", "more"))
    assert torch.equal(align["eyes.weight"], new["eyes.weight"])
    assert not torch.equal(align["bridge.weight"], new["bridge.weight"])
    run("more/tiny", Options(out=str(world / "again"), cache=False))
    assert all(torch.equal(tensor, new[name]) for name, tensor in checkpoint.load(world / "again/more.pt").items())


def test_what_made_a_stage_is_in_its_key(world, monkeypatch):
    def key(stage: str) -> str:
        jobs = Run("more/tiny", Options(out=str(world / "key"), overwrite=True), torch.device("cpu"))
        return jobs.cache_key(next(job for job in jobs.jobs if job.stage.name == stage))

    before = {name: key(name) for name in ("align", "more")}
    align, tune = fakes.recipe().stages
    for changed, same in (((align, replace(tune, lr=1.0)), True), ((replace(align, lr=1.0), tune), False)):
        monkeypatch.setitem(recipes.RECIPES, "fake/tiny", replace(fakes.recipe(), stages=changed))
        assert [key(name) == before[name] for name in ("align", "more")] == [same, same]


def test_every_recipe_of_a_run_sees_pictures_of_its_own_size(world):
    """Fine-tuning looks closer than what it starts from; the backbones are those of any other run all the same."""
    jobs = Run("more/tiny", Options(out=str(world / "size")), torch.device("cpu"))
    assert [(job.stage.name, jobs.data_for(job).image_size) for job in jobs.jobs] == [("see", 4), ("align", 4), ("more", 6)]
