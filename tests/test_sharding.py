"""A model that is shared out takes the steps of a whole one: every paper's stages, on two and on four gloo processes."""

from pathlib import Path
from random import Random

import pytest
import torch
from test_contract import tiny_stages
from test_invariants import CASES
from test_two_processes import OTHERS, trained
from tools import close, together

NAMES = [*CASES, *OTHERS]
named = {"ids": lambda case: case if case in OTHERS else case.name}


def worker(rank: int, ranks: int, places: list[int], folder: str) -> None:
    pairs = max(3, ranks)
    torch.save([trained(case, rank, ranks, pairs, sharded=True) for case in (NAMES[place] for place in places)], Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("two")
    together(2, worker, 2, list(range(len(NAMES))), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", NAMES, **named)
def test_two_shards_equal_one(case, two_shards):
    weights, losses = trained(case, 0, 1)
    for results in two_shards:
        for mine, other in zip(losses, results[NAMES.index(case)][1], strict=True):
            assert other == pytest.approx(mine, rel=3e-5)
    for name, tensor in weights.items():
        close(two_shards[0][NAMES.index(case)][0][name], tensor, 3e-6)
    assert two_shards[1][NAMES.index(case)][0] == {}
