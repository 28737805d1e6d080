"""The contrastive loss: find your own caption among everybody's, and your own picture among everybody's.

    CLIP §2.3, Fig. 3:    sim_ij = ⟨image_i, text_j⟩ / τ         L = ½ [ CE(sim, right text) + CE(simᵀ, right image) ]

              text_1  text_2  text_3 │ hard negatives of image 1…3 (captions with one fact wrong)
    image_1     ■       ·       ·    │  ·  ·
    image_2     ·       ■       ■    │  ·  ·        text_2 = text_3 word for word: both are right for images 2 and 3,
    image_3     ·       ■       ■    │  ·  ·        so the target is shared between them

Real sets repeat captions and pictures: pairs that share a text or an image are positives, never negatives.

Legend: B pairs on this rank, G pairs over all ranks, K hard negatives of each image, E embedding width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Gather = Callable[[Tensor], Tensor]


def positives(text_group: Tensor, image_group: Tensor, all_text: Tensor, all_image: Tensor) -> Tensor:
    """Which of G pairs are right for each of B: same text or same image → bool (B, G)."""
    return (text_group[:, None] == all_text) | (image_group[:, None] == all_image)


def contrastive_loss(image: Tensor, text: Tensor, temperature: Tensor, text_group: Tensor, image_group: Tensor,
                     gather: Gather, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both directions of CLIP's loss → (sum over this rank's pairs, B).

    image, text: (B, E), unit length. temperature: τ, a scalar. text_group, image_group: int64 (B,), equal number = same
    text or picture. gather: puts all ranks' rows together, with gradient, own rank in its place. negatives: (B, K, E).
    """
    all_image, all_text = gather(image), gather(text)  # (G, E)
    right = positives(text_group, image_group, gather(text_group), gather(image_group))  # (B, G)
    targets = right.float() / right.sum(dim=1, keepdim=True)
    image_to_text = image @ all_text.T / temperature  # (B, G)
    text_to_image = text @ all_image.T / temperature  # (B, G)
    i2t_targets = targets
    if negatives is not None:
        wrong = torch.einsum("be,bke->bk", image, negatives) / temperature  # (B, K)
        image_to_text = torch.cat([image_to_text, wrong], dim=1)  # (B, G + K)
        i2t_targets = F.pad(targets, (0, wrong.shape[1]))
    total = (F.cross_entropy(image_to_text, i2t_targets, reduction="sum")
             + F.cross_entropy(text_to_image, targets, reduction="sum")) / 2
    return total, torch.tensor(len(image), device=image.device)
