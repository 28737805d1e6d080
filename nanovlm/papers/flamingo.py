"""Flamingo: a frozen language model looks at pictures while it reads, and learns new things from examples on the page.

"Flamingo: a Visual Language Model for Few-Shot Learning" (2204.14198) §2, Fig. 3

    images, clips (B, M, F, 3, h, w) ─► NFNet, frozen ─► grid (n, F, N, D_v) ─► Perceiver Resampler ─► media (B, M·Q, D_v)
                                                                                                          │
    "<s><image>Output: a cat<EOC><image>Output:" ─► embedding ─► y (B, T, D)                              │
                                                                  ▼                                       │
       before layers 0, k, 2k, …:   y = gated cross-attention (y, media), each word to one image  ◄───────┤
       every layer:                 y = the language model's own block, frozen                            │
                                                                  ▼                                       │
                                                      … ─► head ─► the next word                ◄─────────┘

    p(y | x) = Π p(y_l | y_<l, x_≤φ(l))                φ(l): the last image before word l               Eq. 1

A word looks at one image only. It learns about earlier images through the words behind them. So a model that has met five
images on a page can read thirty-two (§2.3). One loss, the next word, on pages (M3W), pairs and clips, each with a weight of
its own (Eq. 2); what is learned are resampler, gated layers and the embeddings of <image> and <EOC>.

On half of the pages each text is taken to belong to the *next* image: a page may have it before or behind (§2.4, p_next).

Legend: B pages, T words, M images or clips of a page, F frames, N cells of a frame, Q latents, D the LM's width, D_v the encoder's.
Differs from the paper in: the language model has rotary positions, Chinchilla has relative ones; <image> cannot be
predicted, so it is never learned as a next word (the paper does not say).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm import generation, masks
from nanovlm.attention import KVCache
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.decoder import BeforeBlock, Decoder, DecoderConfig
from nanovlm.gated_xattn import GatedCrossAttention
from nanovlm.lm_loss import Output, lm_loss, mean_loss
from nanovlm.nfnet import NFNet, NFNetConfig
from nanovlm.perceiver_resampler import PerceiverResampler, ResamplerConfig


@dataclass(frozen=True)
class FlamingoConfig:
    vision: NFNetConfig
    resampler: ResamplerConfig
    language: DecoderConfig
    image_id: int  # <image>, and the <EOC> that closes what is said of one; both may lie behind the LM's vocabulary
    close_id: int
    every: int = 1  # k: a gated layer before the LM's layers first, first + k, first + 2k, …
    first: int = 0
    all_previous: bool = False  # look at all images so far (Table 10 ii)
    most_images: int = 5  # of a page, in training (§2.4)
    p_next: float = 0.5


class Flamingo(nn.Module):
    whole_batch = False
    whole_weights = False
    unheard = ()

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        vocab = config.language.vocab
        if max(config.image_id, config.close_id) >= vocab and (config.image_id, config.close_id) != (vocab, vocab + 1):
            raise ValueError(f"image_id and close_id are {config.image_id} and {config.close_id}; either both are among the {vocab} "
                             f"words, or they are {vocab} and {vocab + 1}")
        self.config = config
        self.reads = Reads("pages", image_tokens=1, most_images=config.most_images, p_next=config.p_next)
        self.vision = NFNet(config.vision)
        self.resampler = PerceiverResampler(config.resampler)
        self.language = Decoder(config.language)
        self.gated_xattn = nn.ModuleDict({
            str(i): GatedCrossAttention(config.language.width, config.resampler.width, config.language.heads)
            for i in range(config.first, config.language.layers, config.every)})
        self.tags = nn.Parameter(torch.zeros(2, config.language.width))  # <image>, <EOC>: what is added to the LM's own rows

    # ---- pictures

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures or clips (n, F, 3, h, w) → (n, Q, D_v)."""
        n, frames = images.shape[:2]
        grid = self.vision(images.flatten(0, 1))  # (n·F, N, D_v)
        return self.resampler(grid.view(n, frames, *grid.shape[1:]))

    def look(self, images: Tensor, frames: Tensor, gather: Gather = alone) -> Tensor:
        """images (B, M, F, 3, h, w), of which clip m has frames[b, m] → media (B, M, Q, D_v), zero where there is none."""
        media = self.resampler.latents.new_zeros(*frames.shape, *self.resampler.latents.shape)  # in the dtype of the weights
        for length in clip_lengths(frames, gather):
            chosen = frames == length  # (B, M)
            media[chosen] = self.encode_image(images[chosen][:, :length]).to(media.dtype)
        return media

    # ---- words

    def embed(self, input_ids: Tensor) -> Tensor:
        """ids (B, T) → (B, T, D): the frozen table, and what <image> and <EOC> have learned."""
        own = torch.stack([input_ids == self.config.image_id, input_ids == self.config.close_id], dim=-1)  # (B, T, 2)
        known = input_ids < self.config.language.vocab
        words = self.language.embedding(input_ids.where(known, 0)) * known[..., None]
        return words + own.to(words.dtype) @ self.tags.to(words.dtype)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), and two rows more where <image> and <EOC> are new to the LM."""
        head, new = self.language.head_weight, self.config.image_id >= self.config.language.vocab
        return torch.cat([head, self.tags]) if new else head

    def before_block(self, media: Tensor, there: Tensor, phi: Tensor, maps: list | None = None) -> BeforeBlock:
        """What the decoder calls before each of its blocks: media (B, M, Q, D_v), there bool (B, M), phi (B, T).

        maps receives the weights (B, H, T, M·Q) of every gated layer. With a cache, a gated layer's keys and values of the media are
        computed once and kept there, under ("image", i).
        """
        mask = masks.image_causal(phi, there, media.shape[2], self.config.all_previous)  # (B, T, M·Q)
        flat = media.flatten(1, 2)  # (B, M·Q, D_v)

        def look(i: int, y: Tensor, cache: KVCache | None) -> Tensor:
            if str(i) not in self.gated_xattn:
                return y
            return self.gated_xattn[str(i)](y, flat, mask, None if cache is None else cache["image", i], maps)
        return look

    def read(self, batch: Batch, cache: KVCache | None = None, maps: list | None = None, gather: Gather = alone) -> Tensor:
        """The language model's last states (B, T, D) of whole pages; a tag under padding is none.

        cache: its state keeps what later words see: media, there, and phi (B,), at which image each row has arrived.
        """
        tag = (batch["input_ids"] == self.config.image_id) & batch["attention_mask"]  # (B, T)
        phi, media, there = masks.last_image(tag), self.look(batch["images"], batch["frames"], gather), batch["frames"] > 0
        if "backwards" in batch:
            phi = masks.next_image(tag).where(batch["backwards"][:, None], phi)
        if cache is not None:  # what comes later sees what the last word saw
            cache.state |= {"phi": phi[:, -1], "media": media, "there": there}
        return self.language(inputs_embeds=self.embed(batch["input_ids"]), attention_mask=batch["attention_mask"], cache=cache,
                             before_block=self.before_block(media, there, phi, maps))

    def forward(self, images: Tensor, frames: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
                backwards: Tensor | None = None, maps: list | None = None) -> Output:
        """images (B, M, F, 3, h, w), frames int64 (B, M), ids, mask, labels (B, T), backwards bool (B,) → logits (B, T, V), loss."""
        batch = {"images": images, "frames": frames, "input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.read(batch if backwards is None else {**batch, "backwards": backwards}, maps=maps)
        loss = None if labels is None else mean_loss({"lm": lm_loss(hidden, self.head_weight, labels)})
        return Output(F.linear(hidden, self.head_weight), loss)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the words to be learned, their number)}; batch as made by `Collate.teach`."""
        return {"lm": lm_loss(self.read(batch, gather=gather), self.head_weight, batch["labels"])}

    # ---- answers

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts, padded on the left, and look at their pictures: next-token logits (B, V), cache."""
        cache = KVCache()
        return F.linear(self.read(batch, cache)[:, -1], self.head_weight), cache

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further ids (B, T): logits (B, T, V) and the cache, which knows at which image a row has arrived."""
        phi = cache.state["phi"][:, None] + masks.last_image(ids == self.config.image_id)  # (B, T)
        look = self.before_block(cache.state["media"], cache.state["there"], phi)
        hidden = self.language(inputs_embeds=self.embed(ids), cache=cache, before_block=look)
        cache.state["phi"] = phi[:, -1]
        return F.linear(hidden, self.head_weight), cache

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)


def clip_lengths(frames: Tensor, gather: Gather) -> list[int]:
    """Of how many frames clips are, (B, M), on this rank or on any other: all of them look the same number of times.

    Without any picture 1: then none is looked at, but with a gradient.
    """
    longest = int(gather(F.pad(frames.flatten(), (0, 1)).amax()[None]).amax())
    clips = gather(torch.bincount(frames.flatten(), minlength=longest + 1)[None]).sum(dim=0)  # (longest + 1,)
    return clips[1:].nonzero()[:, 0].add(1).tolist() or [1]
