"""LLaVA: image tokens become words, and a chat model reads them.

"Visual Instruction Tuning" (2304.08485) §4, Fig. 1.

    image (3, h, w) ─► CLIP ViT, block −2, class token dropped ─► Z_v (N, D_v) ─► projector: H_v = W·Z_v (N, D)   Eq. 1
                                                                                        │
    "USER: <image>\\nwhat is it?"  ─► embedding (T, D)                                   │
                    └── the one id <image> is replaced by the N image tokens ◄──────────┘
                              ▼
    [U S E R : v_1 … v_N \\n w h a t …] (T − 1 + N, D) ─► decoder LM ─► loss on the assistant's tokens only       Eq. 3

    stage 1 (align):  only the projector learns, on captions             stage 2 (tune): projector and LM learn, on instructions
    frozen: the vision encoder, always

A conversation may hold any number of images, or none. They come in one tensor, in the order of their <image> marks
through the batch. Training pads on the right, generation on the left, so that the next token always stands last.

Legend: B conversations, T ids, n images in the batch, N image tokens each, L spliced length, D the LM's width.
Differs from the released code in: the sequence is not cut at a maximal length here, where it could cut through an
image; the data side does that (`data/conversation.py`). A batch without images sends zero images through the projector
(the released code a black one, whose tokens it then drops), so that every rank has a gradient for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE, Output, lm_loss, mean_loss
from nanovlm.projector import Projector
from nanovlm.tiling import Tiles, Tiling
from nanovlm.vit import ViT, ViTConfig


@dataclass(frozen=True)
class LLaVAConfig:
    vision: ViTConfig
    language: DecoderConfig
    image_token_id: int
    projector_layers: int = 1  # 2 for LLaVA-1.5
    feature_layer: int = -2  # which of the L + 1 hidden states: −1 the last block's, −2 the one before
    tiling: Tiling | None = None  # LLaVA-1.5-HD, LLaVA-NeXT: pictures larger than the encoder looks at


class LLaVA(nn.Module):
    whole_batch = False
    whole_weights = False
    unheard = ()

    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config = config
        self.reads = Reads("conversations", image_tokens=config.vision.grid ** 2, tiling=config.tiling)
        self.vision = ViT(config.vision)
        self.projector = Projector(config.vision.width, config.language.width, config.projector_layers)
        self.language = Decoder(config.language)
        self.tiles = Tiles(config.tiling, config.language.width) if config.tiling else None

    def encode_image(self, images: Tensor) -> Tensor:
        """images (n, 3, h, w) → Z_v (n, N, D_v). The features before the last block serve best (§4.1, Table 8)."""
        depth = self.config.vision.layers + 1 + self.config.feature_layer
        return self.vision(images, depth=depth)[:, 1:]

    def image_prefix(self, images: Tensor, image_sizes: Tensor | None = None) -> Tensor | list[Tensor]:
        """images (n, 3, h, w) → H_v (n, N, D), what the language model reads.

        With a tiling images are the views of all pictures, and image_sizes int64 (n, 2) their heights and widths: then
        each picture has its own N, and a list of (N, D) is returned.
        """
        if (self.tiles is None) != (image_sizes is None):
            raise UserError("Pictures of this LLaVA are tiled: give image_sizes, the height and width of each." if self.tiles
                            else "Pictures of this LLaVA are not tiled: leave out image_sizes.")
        views = self.projector(self.encode_image(images))  # Eq. 1
        return views if self.tiles is None else self.tiles(views, image_sizes.tolist())

    def splice(self, input_ids: Tensor, attention_mask: Tensor, images: Tensor, labels: Tensor | None = None,
               pad: str = "right", image_sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put an image's tokens in the place of each <image> id.

        input_ids int64 (B, T), attention_mask bool (B, T), labels int64 (B, T) → embeddings (B, L, D), mask bool (B, L),
        labels (B, L), −100 on image tokens and padding. pad: the side that is filled up.
        """
        is_image = (input_ids == self.config.image_token_id) & attention_mask  # (B, T)
        pictures = self.image_prefix(images, image_sizes)  # n of (N, D)
        words = self.language.embedding(input_ids.masked_fill(is_image, 0))  # (B, T, D)
        if len(images) == 0:  # a zero through which every part has a gradient, on this rank too
            words = words + (pictures if self.tiles is None else pictures[0]).sum()
            pictures = ()
        if is_image.sum() != len(pictures):
            raise ValueError(f"the batch has {int(is_image.sum())} <image> marks but {len(pictures)} images")
        rows, learned, waiting = [], [], iter(pictures)
        for b, real in enumerate(attention_mask):
            marks = is_image[b, real].nonzero()[:, 0].tolist()
            own = [next(waiting).to(words.dtype) for _ in marks]
            rows.append(put_in(words[b, real], marks, own))  # (L_b, D)
            if labels is not None:
                learned.append(put_in(labels[b, real], marks, [labels.new_full((len(p),), IGNORE) for p in own]))
        mask = [attention_mask.new_ones(len(row)) for row in rows]
        return (pad_sequence(rows, batch_first=True, padding_side=pad), pad_sequence(mask, batch_first=True, padding_side=pad),
                pad_sequence(learned, True, IGNORE, pad) if learned else None)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
                pad: str = "right", maps: list | None = None, image_sizes: Tensor | None = None) -> Output:
        """logits (B, L, V) over the spliced sequence, and the loss where labels are given.

        maps receives the LM's attention weights (B, H, L, L), block by block.
        """
        embeddings, mask, labels = self.splice(input_ids, attention_mask, images, labels, pad, image_sizes)
        hidden = self.language(inputs_embeds=embeddings, attention_mask=mask, maps=maps)
        loss = None if labels is None else mean_loss({"lm": lm_loss(hidden, self.language.head_weight, labels)})
        return Output(self.language.logits(hidden), loss)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the assistant's tokens, their number)}; batch as made by `Collate.teach`."""
        embeddings, mask, labels = self.splice(batch["input_ids"], batch["attention_mask"], batch["images"],
                                               batch["labels"], image_sizes=batch.get("image_sizes"))
        hidden = self.language(inputs_embeds=embeddings, attention_mask=mask)
        return {"lm": lm_loss(hidden, self.language.head_weight, labels)}  # Eq. 3

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts with their images, whichever side the ids are padded on: next-token logits (B, V), cache."""
        embeddings, mask, _ = self.splice(batch["input_ids"], batch["attention_mask"], batch["images"], pad="left",
                                          image_sizes=batch.get("image_sizes"))
        return self.language.prefill(mask, inputs_embeds=embeddings)

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further ids (B, T): logits (B, T, V) and the cache."""
        return self.language.step(ids, cache)

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)


def put_in(row: Tensor, places: Sequence[int], pieces: Sequence[Tensor]) -> Tensor:
    """row (T, …) with piece i, (N_i, …), where its entry places[i] stood → (T − n + Σ N_i, …)."""
    parts, start = [], 0
    for place, piece in zip(places, pieces, strict=True):
        parts += [row[start:place], piece]
        start = place + 1
    return torch.cat([*parts, row[start:]])
