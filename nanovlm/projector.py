"""The projector: the smallest bridge there is, one matrix from image tokens to the language model's word space.

    LLaVA §4.1, Eq. 1:    H_v = W · Z_v             Z_v image tokens, H_v "visual words"
    LLaVA-1.5 §3.2:       H_v = W₂ · GELU(W₁ · Z_v)

    image tokens (B, N, D_v) ──► linear ──► [GELU ──► linear] ──► (B, N, D)

No norm, no positions, no resampling: N image tokens go in and N come out, in the same order.

Legend: B batch, N image tokens, D_v the vision encoder's width, D the language model's.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """(B, N, vision_width) → (B, N, width). layers: 1 (LLaVA) or 2 (LLaVA-1.5)."""

    def __init__(self, vision_width: int, width: int, layers: int = 1):
        super().__init__()
        self.first = nn.Linear(vision_width, width)
        self.second = nn.Linear(width, width) if layers == 2 else None

    def forward(self, image_tokens: Tensor) -> Tensor:
        x = self.first(image_tokens)
        return x if self.second is None else self.second(F.gelu(x))
