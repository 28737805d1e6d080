"""A model that is shared out takes the steps of a whole one: every paper's stages, on two and on four gloo processes."""

from pathlib import Path
from random import Random

import pytest
import torch
from test_contract import samples_of, tiny_stages
from test_invariants import CASES, CPU, build_flamingo
from test_two_processes import OTHERS, share, trained
from tools import bite, close, together
from torch import nn

from nanovlm.decoder import Decoder
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs import shipped
from nanovlm.training import distributed
from nanovlm.training.batches import make_collate
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.randomness import seed_all
from nanovlm.training.sharding import shard, units, whole_state

NAMES = [*CASES, *OTHERS]
# the order of a queue is that of the ranks, so that a queue on four is another one
OF_FOUR = [place for place, case in enumerate(NAMES) if case == "blip2 stage 1" or (case not in OTHERS and case.name in ("llava", "flamingo", "t5"))]


def work(rank: int, ranks: int, folder: str) -> None:
    places = range(len(NAMES)) if ranks == 2 else OF_FOUR
    found = {place: trained(NAMES[place], rank, ranks, pairs=max(3, ranks), sharded=True) for place in places}
    torch.save({"steps": found, "lengths": clips_on_one_rank(rank), "bf16": in_bf16(rank, ranks)}, Path(folder) / f"{rank}.pt")


def clips_on_one_rank(rank: int) -> list[float]:
    """Rank 0 has clips of three frames, the others pictures and a blank: whoever looks fewer times must not be left behind."""
    model = bite(build_flamingo(), 5)
    freeze(model, ("resampler", "gated_xattn", "tags"))
    shard(model, CPU)
    frames = torch.tensor([[3], [2]] if rank == 0 else [[1], [0]])
    ids = torch.tensor([[1, 3, 5, 6, 2]] * 2)
    batch = {"images": torch.randn(2, 1, 3 if rank == 0 else 1, 3, 12, 12), "frames": frames, "input_ids": ids,
             "attention_mask": torch.ones_like(ids, dtype=torch.bool), "labels": ids}
    return [total.item() for total, _ in model.losses(batch, distributed.all_gather).values()]


def in_bf16(rank: int, ranks: int) -> list[list]:
    """Losses and gradients' norms of three steps, computed in bf16: frozen weights kept in bf16, and kept in fp32."""
    found = []
    for kept in (torch.bfloat16, torch.float32):
        model, trains, batches = share(CASES[0], rank, ranks, max(3, ranks))
        freeze(bite(model, 5), CASES[0].stages[0])
        shard(model, CPU, torch.bfloat16)
        for p in model.parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        if kept == torch.float32:  # as exact as before they were rounded
            model, _, _ = share(CASES[0], rank, ranks, max(3, ranks))
            freeze(bite(model, 5), CASES[0].stages[0])
            keep_fp32(model)
        stage = Stage("both", trains, {"talk": 1}, steps=3, batch_size=2 * max(3, ranks), lr=0.3, clip=1.0)
        steps = train_stage(model, stage, batches, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), CPU)
        found.append([(report.losses, report.grad_norm) for report in steps])
    return found


def keep_fp32(model: nn.Module) -> None:
    """`shard` with the frozen weights left as they are: FSDP2 rounds what it gathers."""
    from nanovlm.training import sharding

    usual, sharding.replace = sharding.replace, lambda *_: None
    try:
        shard(model, CPU, torch.bfloat16)
    finally:
        sharding.replace = usual
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.fixture(scope="module", params=[2, 4])
def shards(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    together(request.param, work, request.param, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_shards_equal_one_process(shards):
    """All models of the papers: with text on one rank only, accumulation, checkpointing, tied words, frozen parts, negatives from everywhere."""
    for place, (weights, theirs) in shards[0]["steps"].items():
        mine, losses = trained(NAMES[place], 0, 1, pairs=max(3, len(shards)))
        for ours, other in zip(losses, theirs, strict=True):
            assert other == pytest.approx(ours, rel=3e-5), NAMES[place]
        assert weights.keys() == mine.keys()
        for name, tensor in mine.items():
            assert weights[name].shape == tensor.shape
            close(weights[name], tensor, 3e-6)
    assert len(shards[0]["steps"]) == (len(NAMES) if len(shards) == 2 else 4)


def test_only_the_first_rank_gathers_the_whole(shards):
    for rank in shards[1:]:
        assert all(weights == {} for weights, _ in rank["steps"].values())


def test_clips_of_other_lengths_on_other_ranks_are_waited_for(shards):
    assert all(torch.tensor(rank["lengths"]).isfinite().all() for rank in shards)


def test_frozen_weights_in_bf16_change_nothing_where_bf16_is_computed_in(shards):
    rounded, exact = shards[0]["bf16"]
    assert rounded == exact and rounded[0][0] != rounded[1][0]


# ---- the stages of the recipes, against DDP on the same two processes, which equals one (test_two_processes.py)

def two_steps(recipe: Recipe, stage: Stage, rank: int, sharded: bool) -> tuple[list, dict]:
    seed_all(0, recipe.name, stage.name)
    model = recipe.build(stage)
    if "gated_xattn" in stage.trains:
        bite(model.gated_xattn, 3)
    freeze(model, stage.trains)
    collate = make_collate(recipe, stage, shipped.tokenizer(), model.reads)
    batch = collate(samples_of(recipe, stage)[rank::2], Random(rank))
    scalars = shard(model, CPU) if sharded else None
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    plain = Stage("two", stage.trains, {"talk": 1}, steps=2, batch_size=4, lr=0.1, schedule="constant", warmup=0.0, adaptive_clip=stage.adaptive_clip)
    torch.manual_seed(5)
    reports = list(train_stage(model, plain, [batch] * 2, optimiser, CPU))
    return [(report.losses, report.grad_norm) for report in reports], whole_state(model, scalars) if sharded else model.state_dict()


def kinds_of_stages() -> dict[str, tuple[Recipe, Stage]]:
    """Of stages that train the same parts of the same model one."""
    found = {}
    for name, (recipe, stage) in tiny_stages().items():
        found.setdefault((stage.builds or recipe.model, stage.trains, repr(recipe.config)), (name, (recipe, stage)))
    return dict(found.values())


def stages_work(rank: int, folder: str) -> None:
    found = {name: [two_steps(*place, rank, sharded) for sharded in (False, True)] for name, place in kinds_of_stages().items()}
    if rank == 0:
        torch.save(found, Path(folder) / "stages.pt")


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("stages")
    together(2, stages_work, str(folder))
    return torch.load(folder / "stages.pt", weights_only=True)


@pytest.mark.parametrize("name", kinds_of_stages())
def test_every_tiny_stage_is_the_same_shared_out(stages, name):
    (ours, weights), (theirs, gathered) = stages[name]
    for (losses, norm), (others, other) in zip(ours, theirs, strict=True):
        assert others == pytest.approx(losses, rel=1e-5) and other == pytest.approx(norm, rel=1e-4)
    assert weights.keys() == gathered.keys()
    for key, tensor in weights.items():
        assert gathered[key].shape == tensor.shape
        if tensor.is_floating_point():
            close(gathered[key], tensor, 1e-5)


# ---- what a unit is

def test_every_block_of_a_list_is_a_unit_and_gated_layers_are():
    model = build_flamingo()
    found = units(model)
    assert [id(unit) for unit in found].count(id(model.language.blocks[1])) == 1
    assert {*model.language.blocks, *model.vision.blocks, *model.resampler.layers, *model.gated_xattn.values()} == set(found)
    assert not any(isinstance(unit, Decoder) for unit in found)


@pytest.mark.parametrize("name", tiny_stages())
def test_units_share_no_parameter(name):
    """FSDP2 of torch 2.11 says nothing about one parameter in two groups."""
    recipe, stage = tiny_stages()[name]
    with torch.device("meta"):
        found = units(recipe.build(stage))
    inside = [set(map(id, unit.parameters())) - set().union(*(map(id, other.parameters()) for other in found if other in set(unit.modules()) - {unit}))
              for unit in found]
    assert sum(map(len, inside)) == len(set().union(*inside))
