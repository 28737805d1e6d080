"""Image–text matching: does this text belong to this picture? A yes-or-no question about pairs that look alike.

    ITM, ALBEF (2107.07651) §3.2, BLIP §3.2, BLIP-2 §3.2:   L = CE(head(image and text read together), belongs or not)

    my pair      (image⁺, text⁺)     belongs           the wrong partner is drawn among all G of the batch with the
    and for it   (image⁻, text⁺)     does not          probability softmax(similarity / τ): what the contrastive loss
                 (image⁺, text⁻)     does not          finds most alike is what there is most to learn from

With three pairs, one of which belongs, a blind guess costs H(1/3) = 0.6365 nats; a loss that stays there learns nothing.
Pairs with an equal image or an equal text are never negatives: "a hat" belongs to every picture of a hat.

Legend: B pairs on this rank, G pairs on all, P pairs to be judged (3 B).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.contract import Gather
from nanovlm.errors import UserError


def need_wrong_partners(right: Tensor) -> None:
    """right: bool (B, G), which of all pairs are right for each of mine."""
    if right.all(dim=1).any():
        raise UserError("A pair of the batch has no wrong partner in it: all the others share its text or its picture. Image-text "
                        "matching needs at least two different pairs in every batch: make batch_size larger, or give captions that differ.")


@torch.no_grad()
def hard_negatives(similarity: Tensor, right: Tensor) -> Tensor:
    """For each of B rows one of G columns that is wrong, the likelier the more alike it is → int64 (B,).

    similarity: (B, G), divided by τ. right: bool (B, G) from `contrastive.positives`: never drawn.
    """
    need_wrong_partners(right)
    # fp32 and -inf: in half precision a sum of tiny probabilities is 0, and multinomial fails (LAVIS #107)
    probability = similarity.float().masked_fill(right, float("-inf")).softmax(dim=1)
    return torch.multinomial(probability, 1)[:, 0]


def three_pairs(image_tokens: Tensor, ids: Tensor, mask: Tensor, wrong_image: Tensor, wrong_text: Tensor,
                gather: Gather) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """My pairs, then my texts with a wrong image, then my images with a wrong text.

    image_tokens (B, N, D_v), ids and mask (B, T), wrong_image and wrong_text: places (B,) among the G pairs of all ranks.
    → image tokens (3 B, N, D_v), ids and mask (3 B, T); and which belong, int64 (3 B,).
    """
    B = len(ids)
    images = torch.cat([image_tokens, gather(image_tokens)[wrong_image], image_tokens])
    texts, text_mask = (torch.cat([own, own, gather(own)[wrong_text]]) for own in (ids, mask))
    return (images, texts, text_mask), (torch.arange(3 * B, device=ids.device) < B).long()


def pad_to_longest(ids: Tensor, mask: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T) → (B, length of the longest text on any rank), so that all ranks' texts fit together."""
    missing = int(gather(torch.tensor([ids.shape[1]], device=ids.device)).max()) - ids.shape[1]
    return F.pad(ids, (0, missing)), F.pad(mask, (0, missing))


def matching_loss(logits: Tensor, belongs: Tensor) -> tuple[Tensor, Tensor]:
    """logits (P, 2), column 1 = belongs; belongs int64 (P,) → (sum, P)."""
    return F.cross_entropy(logits.float(), belongs, reduction="sum"), torch.tensor(len(belongs), device=logits.device)
