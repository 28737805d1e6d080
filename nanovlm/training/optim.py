"""AdamW, the learning rate of every step, and how large a gradient may be.

    lr                      AdamW (arXiv:1711.05101, Alg. 2) shrinks the weights beside the gradient step, not
     │    ╭──╮              through it. Only matrices shrink: a norm's gain or a bias pulled towards 0 would
     │   ╱    ╲             change what the layer computes, not how large its weights are.
     │  ╱      ╲___
     │ ╱           ╲____ min_lr · lr
     └──────────────────── step
      warm-up  cosine

Layer-wise decay (`Stage.layer_decay` d, as BEiT has it, arXiv:2106.08254 App., and BLIP-2 T7–T9 for its encoder): a
layer's lr is lr · d^(L + 1 − layer). The embeddings are layer 0, block i is layer i + 1, what follows the encoder is
layer L + 1 and learns at the full lr. The last block has d, therefore, and the first of 39, at d = 0.95, 0.14.
differs: BLIP-2's released code makes these groups too, but its schedule never reads their factors.

Adaptive gradient clipping (`Stage.adaptive_clip`, arXiv:2102.06171 §4, Eq. 3): not one norm for the whole gradient, but for each
unit i, a row of a matrix or a filter of a convolution, measured by the unit's own weights:
    G_i ← G_i · λ · max(|W_i|, ε) / |G_i|     where |G_i| is more than λ · max(|W_i|, ε)
"""

import math
import re
from collections import defaultdict

import torch
from torch import Tensor, nn

from nanovlm.recipes.stage import Stage, within
from nanovlm.training.sharding import own_rows


def lr_at(step: int, stage: Stage) -> float:
    """The learning rate of step 0, 1, …, stage.steps - 1: linear warm-up, then a cosine, a constant or an exponential."""
    warm = round(stage.warmup * stage.steps)
    if step < warm:
        return stage.lr * (step + 1) / (warm + 1)  # the first step already moves
    if stage.schedule == "constant":
        return stage.lr
    done = (step - warm) / max(1, stage.steps - 1 - warm)  # 0 right after the warm-up, 1 at the last step
    if stage.schedule == "exponential":
        return stage.lr * stage.min_lr ** done
    return stage.lr * (stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimiser(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """Frozen parameters are left out, so that they cost no optimiser state."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part in stage.undecayed:
        if not any(within(name, part) for name in trained):
            raise ValueError(f"Stage {stage.name} leaves {part!r} undecayed, but trains no parameters of that name.")
    last = 1 + max((layer for name, _ in model.named_parameters() if (layer := layer_of(name)) is not None), default=0)
    groups = defaultdict(list)  # parameters by weight decay and factor of the learning rate
    for name, p in trained.items():
        layer = last if (found := layer_of(name)) is None else found
        decays = p.ndim >= 2 and not any(within(name, part) for part in stage.undecayed)
        groups[stage.weight_decay if decays else 0.0, stage.layer_decay ** (last - layer)].append(p)
    fused = all(p.device.type in ("cuda", "cpu") for p in trained.values())  # one kernel per group, not ten per parameter
    return torch.optim.AdamW([{"params": parameters, "weight_decay": decay, "factor": factor}
                              for (decay, factor), parameters in groups.items()],
                             lr=stage.lr, betas=stage.betas, fused=fused)


def layer_of(name: str) -> int | None:
    """0 for the vision encoder's embeddings, i + 1 for its block i, None for all else, its final norm included."""
    block = re.match(r"vision\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith("vision.") and not name.startswith("vision.norm.") else None


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def clip_gradients(model: nn.Module, stage: Stage) -> Tensor:
    """Clip as the stage says, in place → the norm of the whole gradient before that.

    What is clipped adaptively does not count for the global norm (Flamingo §B.1.3: λ for the NFNet, a norm for the rest).
    A classifier in such a part is not clipped at all: it is the one layer that the paper leaves out (§4.1).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not stage.adaptive_clip:
        return nn.utils.clip_grad_norm_(trained.values(), stage.clip or float("inf"))
    norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    for part, factor in stage.adaptive_clip.items():
        inside = [name for name in trained if within(name, part)]
        if not inside:
            raise ValueError(f"Stage {stage.name} clips {part!r} adaptively, but trains no parameters of that name.")
        for name in inside:
            parameter = trained.pop(name)
            if parameter.grad is not None and not within(name, f"{part}.classifier"):
                adaptive_clip(parameter, factor)
    if trained:
        nn.utils.clip_grad_norm_(trained.values(), stage.clip or float("inf"))
    return norm


@torch.no_grad()
def adaptive_clip(parameter: nn.Parameter, factor: float, eps: float = 1e-3) -> None:
    """In place. eps: a gain that starts at 0 could never move otherwise."""
    axes = tuple(range(1, parameter.ndim)) or None  # of a gain or a bias the whole tensor is one unit
    weight, gradient = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (parameter, parameter.grad))
    less = (factor * weight.clamp(min=eps) / gradient.clamp(min=1e-6)).clamp(max=1)
    own_rows(parameter.grad).mul_(own_rows(less))
