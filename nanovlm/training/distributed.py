"""Several processes, one training run. Everything here also works in a single process, without a process group.

    torchrun --nproc-per-node 2 train_tiny.py --model llava        gloo on CPUs, nccl on GPUs

        global batch   0  1  2  3  4  5  6  7
        rank 0         0     2     4     6        forward, backward ┐
        rank 1            1     3     5     7     forward, backward ┴ gradients averaged (DDP) → the same step on each

Models know nothing of this: the loop wraps them, and hands `all_gather` to losses that need the whole batch.
Every rank holds the same weights, so rank 0 alone writes files and prints. A model that is too large for that is shared out over the
ranks: sharding.py, which --shard asks for. The rule: DDP for whatever fits whole on each GPU with its gradients and moments.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nanovlm.errors import UserError


def start(device: torch.device) -> None:
    """Join the process group that torchrun set up; without torchrun do nothing."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        cuda = device.type == "cuda"
        # Rank 0 evaluates and writes pictures while the others wait: give it time. What is on the CPU, names and figures, goes by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), device_id=device if cuda else None)


class PeerLost(Exception):
    """Another process of this run is gone."""


def lost(error: RuntimeError) -> bool:
    """Whether the error says that another process is gone, or does not answer."""
    return isinstance(error, dist.DistError) or (world() > 1 and any(word in str(error) for word in ("gloo", "Gloo", "NCCL")))


def choose_device(name: str) -> torch.device:
    """"auto", "cpu", "cuda" or "mps" → this process's device; auto is its GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU; use --device cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no usable Apple GPU; use --device cpu.")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", local_rank())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than there are GPUs ({torch.cuda.device_count()}); "
                            "make --nproc-per-node smaller.")
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu" if name == "auto" else name)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with this exit code. One of several at once: gloo's threads may outlive the group, and abort Python's own end."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait() -> None:
    if world() > 1:
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    tensor = tensor.detach().clone()
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag whether it is up on any rank; all ranks get the same answers at the same step."""
    return list(flags) if world() == 1 else [total > 0 for total in all_sum(torch.tensor(flags, device=device).float()).tolist()]


def from_first(value: object) -> object:
    """Rank 0's value on every rank: a decision that must not differ, such as the name of the run's folder."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP, where there are several ranks and something learns that they do not share already."""
    if world() == 1 or not any(p.requires_grad and not isinstance(p, DTensor) for p in module.parameters()):
        return module
    ids = [device.index] if device.type == "cuda" else None
    # buffers (momentum copies, queues) become the same on each rank by themselves
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def accumulating(module: nn.Module) -> AbstractContextManager:
    """What to go backward in when more of the batch is to come. DDP then leaves out its all-reduce. Shards are reduced each time: whole
    gradients, kept until the last micro-batch, would not fit.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def from_all(value: object) -> list:
    """Every rank's value, on all ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


class _Gather(torch.autograd.Function):
    """Every rank's rows, one rank after the other; each rank's gradient flows back to the rank that made the rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # My rows were candidates in everybody's loss: add up what all of them have to say.
        total = all_sum(gradient.contiguous())
        return total[rank() * ctx.rows:(rank() + 1) * ctx.rows]


def all_gather(rows: Tensor) -> Tensor:
    """(B, …) on each rank → (world · B, …) on all, with gradient for floats; every rank must bring as many rows."""
    return rows if world() == 1 else _Gather.apply(rows)
