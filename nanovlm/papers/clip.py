"""CLIP: a picture and its caption are pulled together, all others pushed apart.

"Learning Transferable Visual Models From Natural Language Supervision" (2103.00020) §2.3–2.4, Fig. 3. CLIP is not
one of the six papers, but most of them use its image encoder. The tiny recipes train their own. Flamingo's encoder (2204.14198 §B.1.3)
learns from the same loss, with other parts:

    images (B, 3, h, w) ─► ViT ─► norm of the class token ─► image_projection ─► unit length (B, E) ─┐
                                                                                                     ├─► contrastive loss
    input_ids (B, T) ────► causal decoder ─► its last token ─► text_projection ─► unit length (B, E) ┘

    pool "mean":  NFNet ─► mean over the grid, and BERT ─► mean over the real tokens; the rest is the same

Beside the captions of the batch an image may meet hard negatives of its own: its caption with one fact wrong
(NegCLIP, 2210.01936 §4). A tiny batch teaches few details without them.

Legend: B pairs, T text tokens, K hard negatives of each image, E embedding width.
Differs from the papers in: the temperature τ is learned directly, not as exp(t), clamped at 0.01 either way. Flamingo adds
the two directions of the loss up, here they are averaged as in CLIP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm import masks
from nanovlm.bert import Bert, BertConfig
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.contrastive import contrastive_loss, positives, similarities
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.nfnet import NFNet, NFNetConfig
from nanovlm.vit import ViT, ViTConfig


@dataclass(frozen=True)
class CLIPConfig:
    vision: ViTConfig | NFNetConfig
    text: DecoderConfig | BertConfig
    embedding: int  # E
    pool: str = "token"  # one token stands for the whole: ViT's class token, the decoder's last; or "mean": NFNet and BERT
    smoothing: float = 0.0  # share of the target that is spread over all candidates


def build(config: CLIPConfig) -> tuple[nn.Module, nn.Module, int]:
    """The two encoders, and the width of what the first one gives for a picture."""
    if config.pool == "mean":
        return NFNet(config.vision), Bert(config.text), config.vision.pooled_width
    return ViT(config.vision), Decoder(config.text), config.vision.width


class CLIP(nn.Module):
    reads = Reads("pairs", wrong_captions=True)
    whole_batch = True
    whole_weights = False
    unheard = ()

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.vision, self.text, width = build(config)
        self.image_projection = nn.Linear(width, config.embedding, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embedding, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → unit vectors (B, E), of the class token after the final norm; pool "mean": of `vision.pooled`."""
        if self.config.pool == "mean":
            picture = self.vision.pooled(images)  # (B, P)
        else:
            tokens = self.vision(images)  # (B, 1 + N, D)
            picture = self.vision.norm(tokens[:, 0])
        return F.normalize(self.image_projection(picture), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids (B, T), padded on the right → unit vectors (B, E), of the last real token; pool "mean": of the mean over the real ones."""
        if self.config.pool == "mean":
            hidden = self.text(input_ids, masks.padding(attention_mask))  # (B, T, D)
            sentence = masked_mean(hidden, attention_mask)
        else:
            hidden = self.text(input_ids, attention_mask=attention_mask)  # (B, T, D)
            last = attention_mask.sum(dim=1) - 1  # (B,), the last real token has read the whole sentence
            sentence = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return F.normalize(self.text_projection(sentence), dim=-1)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"itc": (sum over pairs, pairs)}; batch as made by `Collate.pairs`. Cosines are divided by the temperature, at least 0.01.

        negative_ids, negative_mask (B, K, T'), if there are any: each image's own wrong captions.
        """
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
        loss = contrastive_loss(image_to_text / temperature, text_to_image / temperature, right, negatives,
                                self.config.smoothing)
        return {"itc": loss}

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosine of each image with each text: (B, number of texts)."""
        return self.encode_image(images) @ self.encode_text(input_ids, attention_mask).T


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Of the real tokens only: (B, T, D), bool (B, T) → (B, D)."""
    real = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
    return (hidden * real).sum(dim=1) / real.sum(dim=1)
