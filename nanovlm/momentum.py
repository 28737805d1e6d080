"""Momentum contrast: the keys are made by a slow copy of the encoders, many of them are kept, and the targets are soft.

    MoCo (1911.05722) §3.2, Alg. 1: the slow copy and the queue;  ALBEF (2107.07651) §3.2 and §3.3, Eq. 6: soft labels;  BLIP §3.2

    images, texts ─► encoders (learn)               ─► queries (B, E) ─────────────────────┐
         │                │ θ_m ← m θ_m + (1 − m) θ                                        ├─► similarity (B, G + Q)
         └───────► their slow copies, no gradient   ─► keys (G, E) ─► [keys ; queue (Q, E)]┘        │
                                                          │              ▲                          ▼
                                                          └── enqueued ──┘ after the loss    CE(similarity / τ, y)

    y = (1 − α) · one-hot + α · softmax(the slow copy's own similarities / τ)

Why a queue: negatives by the thousand, whatever the batch. Why a slow copy: keys of many steps lie side by side, and only a copy
that hardly moves makes them comparable. Why soft targets: of noisy pairs the right one may be wrong, and a "negative" may fit as well;
the slow copy has an opinion on it, which changes slowly, too.

The copies are buffers, not parameters: no optimiser and no count of parameters ever sees them, but every checkpoint does.

Legend: B pairs on this rank, G pairs on all ranks, Q keys in the queue, E width of the common space, m momentum.
Differs from the released code in: keys are those of all ranks (released: a rank's own and the queue), so that two processes take
the step of one; pairs with an equal text or image, in the queue too, are all right (released: in fine-tuning only); the queue may
be of any size that a batch fits in (released: a multiple of the batch); the copies run without dropout (released: with it); α goes on where
pre-training left it (released: fine-tuning ramps it again), and from shipped weights, which have no copies, it begins at 0.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.contract import Gather
from nanovlm.errors import UserError


@dataclass(frozen=True)
class MomentumConfig:
    queue: int = 57_600  # Q
    momentum: float = 0.995  # m
    alpha: float = 0.4  # α, the share of the soft targets
    ramp: int = 10_000  # steps over which α grows from 0: before that the slow copy knows nothing (BLIP: two epochs)


class Momentum(nn.Module):
    """Slow copies of `encoders`, and a queue of what they made. `losses` of a paper call, in this order: follow, contrast, enqueue."""

    def __init__(self, config: MomentumConfig, encoders: Mapping[str, nn.Module], embedding: int):
        super().__init__()
        self.config = config
        self.copies = nn.ModuleDict({name: as_buffers(deepcopy(encoder)) for name, encoder in encoders.items()})
        for name in ("images", "texts"):
            self.register_buffer(name, F.normalize(torch.randn(config.queue, embedding), dim=-1))  # (Q, E)
            self.register_buffer(f"{name}_group", torch.full((config.queue,), -1))  # (Q,), of a key that is no pair's: −1
        self.register_buffer("place", torch.tensor(0))  # where the next key is written
        self.register_buffer("steps", torch.tensor(0))

    def need_room(self, pairs: int) -> None:
        """UserError where so many pairs, those of all ranks, are more than the queue holds."""
        if pairs > self.config.queue:
            raise UserError(f"The queue holds {self.config.queue} keys, but the batch has {pairs} pairs: make `queue` of the recipe's "
                            f"MomentumConfig at least {pairs}, or batch_size smaller.")

    @torch.no_grad()
    def follow(self, encoders: Mapping[str, nn.Module]) -> None:
        """θ_m ← m θ_m + (1 − m) θ, before the keys are made; at the first step the copies become exact ones. Counts `steps`."""
        weight = 1.0 if self.steps == 0 else 1 - self.config.momentum
        for name, encoder in encoders.items():
            slow, fast = self.copies[name].state_dict(), dict(encoder.named_parameters())
            torch._foreach_lerp_([slow[key] for key in fast], list(fast.values()), weight)
        self.steps += 1

    def contrast(self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], groups: tuple[Tensor, Tensor],
                 temperature: Tensor, gather: Gather) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """queries, keys: of images and of texts, unit vectors (B, E). groups: int64 (B,), equal for equal images, for equal texts.

        → the loss as (sum, B), and the logits image → texts, text → images among the G pairs of the batch, both (B, G).
        The loss is the mean of both directions; a gradient reaches queries and temperature only. α grows in a line from 0, at step 0, to
        its value, at step `ramp`. Right are all keys of an equal image or an equal text, and they share the target.
        """
        (image, text), (image_key, text_key), (image_group, text_group) = queries, keys, groups
        images, texts = torch.cat([gather(image_key), self.images]), torch.cat([gather(text_key), self.texts])  # (G + Q, E)
        right = ((image_group[:, None] == torch.cat([gather(image_group), self.images_group]))
                 | (text_group[:, None] == torch.cat([gather(text_group), self.texts_group])))  # (B, G + Q)
        hard = right.float() / right.sum(dim=1, keepdim=True)
        alpha = self.config.alpha * min(1.0, self.steps.item() / max(1, self.config.ramp))
        total, in_batch = 0.0, []
        for query, slow, bank in ((image, image_key, texts), (text, text_key, images)):
            logits = query @ bank.T / temperature  # (B, G + Q)
            soft = (slow @ bank.T / temperature).softmax(dim=1).detach()
            target = alpha * soft + (1 - alpha) * hard
            total = total + F.cross_entropy(logits, target, reduction="sum") / 2
            in_batch.append(logits[:, :len(bank) - self.config.queue])
        return (total, torch.tensor(len(image), device=image.device)), tuple(in_batch)

    @torch.no_grad()
    def enqueue(self, keys: tuple[Tensor, Tensor], groups: tuple[Tensor, Tensor], gather: Gather) -> None:
        """The keys of all ranks take the places of the oldest, beyond the queue's end from its beginning; `place` moves on with them."""
        image_key, text_key, image_group, text_group = map(gather, (*keys, *groups))
        image_key, text_key = image_key.to(self.images.dtype), text_key.to(self.texts.dtype)  # autocast may have made them bf16
        G, Q = len(image_key), self.config.queue
        at = (self.place + torch.arange(G, device=image_key.device)) % Q
        self.images[at], self.texts[at] = image_key, text_key
        self.images_group[at], self.texts_group[at] = image_group, text_group
        self.place.copy_((self.place + G) % Q)


def as_buffers(module: nn.Module) -> nn.Module:
    """The module with its parameters turned into buffers of the same names."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
