"""AdamW and the learning rate of every step.

    lr                      AdamW (arXiv:1711.05101, Alg. 2) shrinks the weights beside the gradient step, not
     │    ╭──╮              through it. Only matrices shrink: a norm's gain or a bias pulled towards 0 would
     │   ╱    ╲             change what the layer computes, not how large its weights are.
     │  ╱      ╲___
     │ ╱           ╲____ min_lr · lr
     └──────────────────── step
      warm-up  cosine
"""

import math

import torch
from torch import nn

from nanovlm.recipes.stage import Stage


def lr_at(step: int, stage: Stage) -> float:
    """The learning rate of step 0, 1, …, stage.steps - 1: linear warm-up, then a cosine or a constant."""
    warm = round(stage.warmup * stage.steps)
    if step < warm:
        return stage.lr * (step + 1) / (warm + 1)  # the first step already moves
    if stage.schedule == "constant":
        return stage.lr
    done = (step - warm) / max(1, stage.steps - 1 - warm)  # 0 right after the warm-up, 1 at the last step
    return stage.lr * (stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimiser(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """Frozen parameters are left out, so that they cost no optimiser state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu") for p in trained)  # one kernel per group instead of ten per parameter
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas, fused=fused)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
