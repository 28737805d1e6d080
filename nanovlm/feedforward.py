"""The feed-forward network: what a transformer block does to each token by itself, and the norms around it.

    FFN(x) = down( act( up(x) ) )                          "Attention Is All You Need" §3.3, Eq. 2
    gated:   down( act( gate(x) ) · up(x) )                "GLU Variants Improve Transformer" (SwiGLU: LLaMA, GEGLU: T5)

    x (B, T, D) ──► up (D → F) ──► act ──► down (F → D) ──► (B, T, D)
            └─────► gate ─► act ─┘·            (only the gated kinds)

Legend: B batch, T tokens, D width, F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x): CLIP's approximation of GELU. The weights were trained with it, so erf GELU is a silent error."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula, the form that T5 v1.1 was trained with."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)²: "Primer" (2109.08668) §4, which Flamingo's new layers have (App. A.1)."""
    return F.relu(x).square()


# name: (function, gated?)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, False),  # OPT
    "gelu": (F.gelu, False),  # BERT, EVA-CLIP, ImageNet ViT (exact, erf)
    "quick_gelu": (quick_gelu, False),  # CLIP
    "squared_relu": (squared_relu, False),  # Flamingo's new layers
    "swiglu": (F.silu, True),  # LLaMA
    "geglu": (F.gelu, True),  # FlanT5 as BLIP-2 runs it
    "geglu_tanh": (gelu_tanh, True),  # FlanT5 as published
}


class FeedForward(nn.Module):
    """Two (or, gated, three) linear maps applied to each token by itself: (B, T, width) → (B, T, width)."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        self.activation, gated = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, hidden, bias=bias) if gated else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight: LayerNorm without the mean and the bias ("Root Mean Square Layer Normalization" Eq. 4).

    The statistics are fp32 whatever the input is, then cast back, then scaled: the order of the published LLaMA code,
    which matters in bf16. Written with few operations, none on a Python number (each is made a tensor first, which costs
    as much again): on a CPU F.rms_norm is a dozen small ones, and a tiny model's step has 2L + 1 norms.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        mean_square = torch.addcmul(length.new_full((), self.eps), length, length, value=1 / x.shape[-1])
        return self.weight * (x * mean_square.rsqrt()).type_as(x)
