"""Gated cross-attention: new layers between a frozen language model's own, which start as if they were not there.

"Flamingo" (2204.14198) §2.2, Fig. 4, App. A.1.2

    y (B, T, D), words    media (B, S, D_v), what the resampler says of the images
        │                    │
        ├─► norm ─► query    ├─► keys, values         mask: a word looks at one image (masks.image_causal)
        │             └─ Attention ─┘
        + ◄── tanh(α) · ────┘
        ├─► norm ─► FeedForward
        + ◄── tanh(β) · ────┘
        ▼
    y ─► the frozen block of the language model

α and β are two numbers that are learned, and start at 0: tanh 0 = 0, so that the first forward pass is the untouched language
model, bit for bit. At that moment only the two gates have a gradient: what they multiply with 0 cannot feel any. As soon as
they open, all else learns too.

A word without an image gets exactly nothing from the attention; the feed-forward acts on it all the same.

Legend: B batch, T words, S media tokens, D the LM's width, D_v the resampler's.
Differs from the paper in: pre-norm on y, which its pseudo-code leaves out (as open_flamingo has it); media come from a norm
already. How 1536-wide media enter a wider LM is not told: here keys and values map D_v → H·d.
"""

import torch
from torch import Tensor, nn

from nanovlm.attention import Attention, LayerCache
from nanovlm.feedforward import FeedForward


class GatedCrossAttention(nn.Module):
    """y (B, T, width), media (B, S, media_width) → y (B, T, width)."""

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int | None = None, activation: str = "squared_relu"):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim, kv_width=media_width, bias="")
        self.attention_gate = nn.Parameter(torch.zeros(()))  # α
        self.norm2 = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, 4 * width, activation, bias=False)
        self.dense_gate = nn.Parameter(torch.zeros(()))  # β
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, y: Tensor, media: Tensor, mask: Tensor, cache: LayerCache | None = None,
                maps: list | None = None) -> Tensor:
        """mask: bool (B, T, S). cache: keys and values of the media, computed once. maps receives the weights (B, H, T, S)."""
        y = y + self.attention_gate.tanh() * self.attention(self.norm1(y), media, mask, cache=cache, maps=maps)
        return y + self.dense_gate.tanh() * self.feedforward(self.norm2(y))
