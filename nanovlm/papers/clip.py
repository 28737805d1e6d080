"""CLIP: a picture and its caption are pulled together, all others pushed apart.

"Learning Transferable Visual Models From Natural Language Supervision" (2103.00020) §2.3–2.4, Fig. 3. CLIP is none of
the six papers, but the eyes of most of them, and the tiny recipes train their own.

    images (B, 3, h, w) ─► ViT ─► norm of the class token ─► image_projection ─► unit length (B, E) ─┐
                                                                                                     ├─► contrastive loss
    input_ids (B, T) ────► causal decoder ─► its last token ─► text_projection ─► unit length (B, E) ┘

Beside the captions of the batch an image may meet hard negatives of its own: its caption with one fact wrong
(NegCLIP, 2210.01936 §4). A tiny batch teaches few details without them.

Legend: B pairs, T text tokens, K hard negatives of each image, E embedding width.
Differs from the paper in: the temperature τ is learned directly, not as exp(t), clamped at 0.01 either way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.contrastive import contrastive_loss, positives, similarities
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.vit import ViT, ViTConfig


@dataclass(frozen=True)
class CLIPConfig:
    vision: ViTConfig
    text: DecoderConfig
    embedding: int  # E


class CLIP(nn.Module):
    reads = Reads("pairs", wrong_captions=True)
    whole_batch = True
    unheard = ()

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.text = Decoder(config.text)
        self.image_projection = nn.Linear(config.vision.width, config.embedding, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embedding, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → unit vectors (B, E)."""
        tokens = self.vision(images)  # (B, 1 + N, D)
        return F.normalize(self.image_projection(self.vision.norm(tokens[:, 0])), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids (B, T), padded on the right → unit vectors (B, E): the last real token has read the whole sentence."""
        hidden = self.text(input_ids, attention_mask=attention_mask)  # (B, T, D)
        last = attention_mask.sum(dim=1) - 1  # (B,)
        sentence = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return F.normalize(self.text_projection(sentence), dim=-1)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"itc": (sum over pairs, pairs)}; batch as made by `Collate.pairs`."""
        image = self.encode_image(batch["images"])
        text = self.encode_text(batch["input_ids"], batch["attention_mask"])
        temperature = self.temperature.clamp(min=0.01)
        negatives = None
        if "negative_ids" in batch:
            B, K, T = batch["negative_ids"].shape
            flat = self.encode_text(batch["negative_ids"].view(B * K, T), batch["negative_mask"].view(B * K, T))
            negatives = torch.einsum("be,bke->bk", image, flat.view(B, K, -1)) / temperature  # (B, K)
        image_to_text, text_to_image = similarities(image, text, gather)  # (B, G)
        right = positives(batch["text_group"], batch["image_group"], gather)  # (B, G)
        loss = contrastive_loss(image_to_text / temperature, text_to_image / temperature, right, negatives)
        return {"itc": loss}

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosine of each image with each text: (B, number of texts)."""
        return self.encode_image(images) @ self.encode_text(input_ids, attention_mask).T
