"""What several test files share: weights that bite, random numbers by seed, comparisons."""

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from nanovlm.training import distributed

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings


def bite(model: nn.Module, seed: int, std: float = 0.2) -> nn.Module:
    """Weights under which a broken part shows: norms 1 + N(0, 0.1), gates N(0, 0.5), everything else N(0, std).

    With fresh weights (std 0.02, zero biases, unit norms) a model can lose a bias or a whole head unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("weight") and p.ndim == 1:  # only norms have weights with one axis
                p.copy_(1 + 0.1 * noise)
            elif p.ndim == 0 and "gate" not in name:  # a temperature
                continue
            else:
                p.copy_((0.5 if "gate" in name and p.ndim < 2 else std) * noise)
    return model.eval()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_ids(rows: int, columns: int, seed: int, low: int = 4, high: int = 50) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed))


def pad_mask(lengths: list[int], side: str, columns: int) -> Tensor:
    """bool (rows, columns), True on real tokens."""
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    return mask if side == "right" else mask.flip(1)


def moved_by_breaking(model: nn.Module, output: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """How far output(model) moves when half of one parameter is put out of action, for each parameter in turn.

    Half of a bias or matrix is set to 0, half of a norm's weight to 1. A parity test on weights where this is small
    proves nothing. The key's bias is left out: it adds the same to a query's every score, which softmax cannot see.
    """
    moved = {}
    with torch.no_grad():
        before = output(model)
        for name, p in model.named_parameters():
            if name.endswith("key.bias"):
                continue
            kept = p.clone()
            half = p if p.ndim == 0 else p[: (len(p) + 1) // 2]
            half.fill_(1.0 if name.endswith("weight") and p.ndim == 1 else 0.0)
            moved[name] = (output(model) - before).abs().max().item()
            p.copy_(kept)
    return moved


def together(ranks: int, work: Callable, *args: object) -> None:
    """work(rank, *args) in so many gloo processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_join, (ranks, port, work, args), nprocs=ranks)


def _join(rank: int, ranks: int, port: int, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank))
    distributed.start(torch.device("cpu"))
    try:
        work(rank, *args)
    finally:
        distributed.stop()
    distributed.leave(0)  # as train_tiny.py does
