"""The training loop: the only one, for every model and every stage.

    micro-batches ──► model.losses(batch) = {name: (sum, count)} ──► Σ sum / Σ count ──► backward ──► clip ──► AdamW
                                            added up over micro-batches and ranks before anything is divided

Why sums and counts: an answer has 1 to 300 trained tokens. A mean of means would let a rank that drew short answers
shout; dividing once, by the number of trained tokens of the whole global batch, gives every token the same weight, and
so two processes with half the batch each take exactly the step of one process with all of it.

`train_stage` is a generator: it takes a step, then hands a `Report` to the caller, who writes logs and checkpoints
between two steps. Nothing in this file prints, writes or knows of a run's folder.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.contract import Batch
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.recipes.stage import Stage, within
from nanovlm.training import distributed
from nanovlm.training.optim import clip_gradients, lr_at, set_lr

BY_LABELS = ("lm", "mlm")  # losses whose count is that of the labels


class TrainingFailed(Exception):
    """The loss or the gradient is no longer a number; `batches` are the micro-batches that did it."""

    def __init__(self, message: str, batches: list[Batch]):
        super().__init__(message)
        self.batches = batches


@dataclass(frozen=True)
class Report:
    """What one optimiser step did; `step` counts from 1."""

    step: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    seconds: float
    batch: Batch  # the first micro-batch of this rank, for the vital signs; of mixed losses one of the first data set


class Losses(nn.Module):
    """DDP watches over `forward`; the models' losses live in `losses`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return self.model.losses(batch, distributed.all_gather)


def freeze(model: nn.Module, trains: tuple[str, ...]) -> list[str]:
    """Everything but `trains` loses its gradient and goes to eval(); returns the trained parameters' names.

    So does what a model calls `unheard`, as nothing of it reaches any loss: it would be missed by DDP and the vital signs.
    What two parts share has a name in each of them, and learns if either does (BLIP's encoder and decoder).
    """
    model.eval().requires_grad_(False)
    trained = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(within(name, part) for part in trains) and not any(within(name, part) for part in model.unheard):
            parameter.requires_grad_(True)
            trained.append(name)
    for part in trains:
        if not any(within(name, part) for name in trained):
            raise ValueError(f"The stage trains {part!r}, but the model has no parameters of that name.")
        if part not in trained:  # a module, not a parameter
            model.get_submodule(part).train()
    return trained


def train_stage(model: nn.Module, stage: Stage, batches: Iterable[Batch], optimiser: torch.optim.Optimizer,
                device: torch.device, first: int = 0) -> Iterator[Report]:
    """Steps `first`, …, stage.steps - 1; `batches` yields stage.accumulate micro-batches for each of them."""
    need_one_batch(model, stage)
    wrapped = distributed.wrap(Losses(model), device)
    stream = iter(batches)
    for step in range(first, stage.steps):
        started = time.monotonic()
        micro = [to_device(next(stream), device) for _ in range(stage.accumulate)]
        lr = lr_at(step, stage)
        set_lr(optimiser, lr)
        optimiser.zero_grad(set_to_none=True)
        losses = _backward(wrapped, micro, device, stage, step)
        norm = clip_gradients(model, stage).item()
        _check_finite({**losses, "gradient norm": norm}, step, lr, stage, micro)  # before the weights are touched
        optimiser.step()
        yield Report(step + 1, losses, lr, norm, time.monotonic() - started, micro[0])


def need_one_batch(model: nn.Module, stage: Stage) -> None:
    """UserError where a batch that must stay whole would be split."""
    if stage.accumulate > 1 and model.whole_batch:
        raise UserError(f"Stage {stage.name} has accumulate={stage.accumulate}, but its loss compares every pair with "
                        "the whole batch: set accumulate to 1 and, if memory is short, make batch_size smaller.")


def _backward(wrapped: nn.Module, micro: list[Batch], device: torch.device, stage: Stage, step: int) -> dict[str, float]:
    """Leaves the gradient of Σ_names weight · Σ sum / Σ count in the parameters, sums over micro-batches and ranks.

    A weight is 1, unless the stage mixes the losses of several data sets, each of which then has its own names: "lm/pages".
    """
    sums: dict[str, Tensor] = {}
    parts, counts = [(f"/{name}" if name else "", weight) for name, weight in stage.parts(step)], {}
    if len(micro) > 1:  # then the labels tell the count before the first of them goes forward
        for part in dict.fromkeys(part for part, _ in parts):
            tokens = _all_sum(sum(trained_tokens(batch) for batch, (own, _) in zip(micro, parts) if own == part))
            counts |= {f"{name}{part}": tokens for name in BY_LABELS}
    for i, (batch, (part, weight)) in enumerate(zip(micro, parts, strict=True)):
        last = i == len(micro) - 1
        with nullcontext() if last else distributed.accumulating(wrapped):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = {f"{name}{part}": value for name, value in wrapped(batch).items()}
            counts = counts or {name: _all_sum(count) for name, (_, count) in losses.items()}
            if not losses.keys() <= counts.keys():
                raise UserError(f"Stage {stage.name} has accumulate={stage.accumulate} and the losses {sorted(losses)}, whose "
                                "counts are known only when all of the batch has been seen; set accumulate to 1.")
            # DDP and FSDP2 take the mean of the ranks' gradients; we want their sum.
            loss = sum(total * (weight * distributed.world() / counts[name]) for name, (total, _) in losses.items())
            loss.backward()
        for name, (total, _) in losses.items():
            sums[name] = sums.get(name, 0.0) + total.detach().float()
    totals = distributed.all_sum(torch.stack(list(sums.values())))
    return dict(zip(sums, (totals / torch.stack([counts[name] for name in sums])).tolist(), strict=True))


def trained_tokens(batch: Batch) -> Tensor:
    """How many tokens a language model learns to say; the first of a row is never one, as nothing stands before it, nor hidden."""
    return (batch["labels"] != IGNORE).sum()


def _all_sum(count: Tensor) -> Tensor:
    """Over the ranks, and at least 1: a batch may have nothing to learn."""
    return distributed.all_sum(count.float()).clamp(min=1)


def _check_finite(values: dict[str, float], step: int, lr: float, stage: Stage, micro: list[Batch]) -> None:
    for name, value in values.items():
        if not abs(value) < float("inf"):  # also True for nan
            raise TrainingFailed(f"The {name} became {value} at step {step + 1} of stage {stage.name} "
                                 f"(learning rate {lr:.2g})", micro)


def to_device(value: object, device: torch.device) -> object:
    """A batch, or anything in it, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, (list, tuple)) else value
