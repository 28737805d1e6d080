"""The contrastive loss: find your own caption among everybody's, and your own picture among everybody's.

    CLIP §2.3, Fig. 3:    sim_ij = ⟨image_i, text_j⟩ / τ         L = ½ [ CE(sim, right text) + CE(simᵀ, right image) ]
    BLIP-2 §3.2:          sim_ij = max_q ⟨query_iq, text_j⟩ / τ  an image is Q vectors, the best of which counts

              text_1  text_2  text_3 │ hard negatives of image 1…3 (captions with one fact wrong)
    image_1     ■       ·       ·    │  ·  ·
    image_2     ·       ■       ■    │  ·  ·        text_2 = text_3 word for word: both are right for images 2 and 3,
    image_3     ·       ■       ■    │  ·  ·        so the target is shared between them

Real sets repeat captions and pictures: pairs that share a text or an image are positives, never negatives.

Legend: B pairs on this rank, G pairs over all ranks, K hard negatives of each image, Q vectors of an image, E their width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Gather = Callable[[Tensor], Tensor]


def positives(text_group: Tensor, image_group: Tensor, gather: Gather) -> Tensor:
    """Which of G pairs are right for each of B: same text or same image (equal numbers, int64 (B,)) → bool (B, G)."""
    return (text_group[:, None] == gather(text_group)) | (image_group[:, None] == gather(image_group))


def similarities(image: Tensor, text: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    """Cosine of my images with all texts, and of my texts with all images → both (B, G).

    image: (B, E) or (B, Q, E), text: (B, E), unit length. gather: puts all ranks' rows together, with gradient, own rank
    in its place.
    """
    mine, everyones = as_set(image), as_set(gather(image))  # (B, Q, E) and (G, Q, E)
    image_to_text = torch.einsum("bqe,ge->bgq", mine, gather(text)).amax(dim=2)
    text_to_image = torch.einsum("be,gqe->bgq", text, everyones).amax(dim=2)
    return image_to_text, text_to_image


def as_set(image: Tensor) -> Tensor:
    """CLIP's one vector of an image is a set of one: (B, E) → (B, 1, E)."""
    return image[:, None] if image.ndim == 2 else image


def contrastive_loss(image_to_text: Tensor, text_to_image: Tensor, right: Tensor, negatives: Tensor | None = None,
                     smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Both directions of CLIP's loss → (sum over this rank's pairs, B).

    image_to_text, text_to_image: (B, G), already divided by τ. right: bool (B, G) from `positives`. negatives: (B, K),
    each image with its own wrong captions, divided by τ: further candidates for the image, none for a text. smoothing:
    share of the target spread over all candidates. Of several right ones each has the same share of the target.
    """
    targets = right.float() / right.sum(dim=1, keepdim=True)  # (B, G)
    wider = targets
    if negatives is not None:
        image_to_text = torch.cat([image_to_text, negatives], dim=1)  # (B, G + K)
        wider = F.pad(targets, (0, negatives.shape[1]))
    total = (F.cross_entropy(image_to_text, wider, reduction="sum", label_smoothing=smoothing)
             + F.cross_entropy(text_to_image, targets, reduction="sum", label_smoothing=smoothing)) / 2
    return total, torch.tensor(len(right), device=right.device)
