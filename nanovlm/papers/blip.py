"""BLIP: one text transformer that encodes, matches and writes, and that learns from its own corrections of the web's captions.

"BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation" (2201.12086) §3

    image ─► ViT, which learns ─► norm ─► image tokens (B, N, D_v)
                                           │
      MED, "multimodal mixture of encoder-decoder" (§3.1, Fig. 2): a BERT, in three modes, told apart by their first token
      │
      ├ text encoder           [CLS] text   looks both ways, at no picture   ─► [CLS] ─► ITC  which text belongs to which image, among all
      ├ image-grounded encoder [ENC] text   looks both ways, and at N        ─► [ENC] ─► ITM  is this text this picture's? (§3.2)
      └ image-grounded decoder [DEC] text   looks back only, and at N        ─► words ─► LM   say what is in the picture

    shared between encoder and decoder, by reference: embeddings, cross-attention, feed-forward
    separate:                                         self-attention: the encoder looks both ways, the decoder back    (Table 3)

                      layer i of the encoder          layer i of the decoder
    self-attention        its own                         its own
    cross-attention         ■ ──────────────────────────────■   one and the same module
    feed-forward            ■ ──────────────────────────────■   one and the same module

ITC's keys come from slow copies and a queue (momentum.py). ITM's wrong partners are drawn by ITC's similarities (matching.py).

`config.tasks` says which of the three losses a model is built for, and with them its parts: all for pre-training; ("lm",) is the
captioner, ("itc", "itm") the filter of CapFilt and the model for retrieval. Parts that they share have the same names.

Legend: B pairs, G pairs on all ranks, T text tokens, N image tokens (the class token too), E width of the common space,
D width of the text, D_v of the ViT, V words, P pairs to be matched.
Differs from the released code in: wrong partners come from all ranks (released: from the own one); equal texts or pictures
are never wrong partners (released: in fine-tuning), so that nothing needs to be added to probabilities; norms, biases and τ are not decayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm import generation, masks
from nanovlm.attention import KVCache
from nanovlm.bert import Bert, BertConfig, WordHead
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.contrastive import positives
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE, lm_loss
from nanovlm.matching import hard_negatives, matching_loss, need_wrong_partners, pad_to_longest, three_pairs
from nanovlm.momentum import Momentum, MomentumConfig
from nanovlm.vit import ViT, ViTConfig

# Table 3: what encoder and decoder have in common, besides the embeddings
SHARED = {"all": ("attention", "cross_attention", "feedforward"), "all but self-attention": ("cross_attention", "feedforward"),
          "all but cross-attention": ("attention", "feedforward"), "none": ()}
FRAMES = {"attention": "residual1", "cross_attention": "cross_residual", "feedforward": "residual2"}  # each part's sum and norm
COPIED = ("vision", "text_encoder", "image_projection", "text_projection")  # what momentum follows


@dataclass(frozen=True)
class BLIPConfig:
    vision: ViTConfig
    text: BertConfig  # looks at image tokens: its image_width is the ViT's width
    embedding: int = 256  # E
    decode_id: int = 30522  # [DEC]
    encode_id: int = 30523  # [ENC]
    tasks: tuple[str, ...] = ("itc", "itm", "lm")  # only "lm": captioner; "itc" and "itm": filter, retrieval
    shared: str = "all but self-attention"  # one of SHARED
    smoothing: float = 0.1  # of the LM's targets
    momentum: MomentumConfig | None = field(default_factory=MomentumConfig)  # None: as published, not to be trained on ITC


class BLIP(nn.Module):
    """Pairs in, three losses out; and what each mode is good for: `score`, `match`, `generate`."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        self.config = config
        compares, writes = "itc" in config.tasks, "lm" in config.tasks
        self.reads = Reads("pairs", matches=True) if compares else Reads("conversations")
        self.whole_batch = compares  # its negatives are the batch
        self.whole_weights = compares  # encoder and decoder share them, slow copies follow them
        D, E = config.text.width, config.embedding
        self.vision = ViT(config.vision)
        self.text_encoder = Bert(config.text) if compares else None
        self.text_decoder = Bert(config.text) if writes else None
        self.word_head = WordHead(D, config.text.vocab, config.text.eps) if writes else None
        self.image_projection = nn.Linear(config.vision.width, E) if compares else None
        self.text_projection = nn.Linear(D, E) if compares else None
        self.match_head = nn.Linear(D, 2) if compares else None
        if compares and writes:
            share(self.text_encoder, self.text_decoder, config.shared)
        learns = compares and config.momentum is not None
        self.temperature = nn.Parameter(torch.tensor(0.07)) if learns else None
        self.momentum = Momentum(config.momentum, self.copied(), E) if learns else None
        self.unheard = ("momentum",) if learns else ()

    def copied(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in COPIED}

    # ---- the three modes

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → image tokens (B, N, D_v), all of them normed."""
        return look(self.vision, images)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids (B, T), padded on the right → unit vectors (B, E), read off the first token, [CLS]."""
        return unit(self.text_projection, self.text_encoder(input_ids, masks.padding(attention_mask)))

    def match(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pair p = (image tokens p, text p) → logits (P, 2), column 1 = belongs, read off [ENC]."""
        ids = opened(input_ids, attention_mask, self.config.encode_id)
        states = self.text_encoder(ids, masks.padding(attention_mask), image_tokens)  # (P, T, D)
        return self.match_head(states[:, 0])

    def write(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The decoder's states (B, T, D): each word from [DEC], the words before it and the picture."""
        ids, mask = opened(input_ids, attention_mask, self.config.decode_id), masks.causal_with_padding(attention_mask, input_ids.shape[1])
        return self.text_decoder(ids, mask, image_tokens)

    # ---- to learn

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"itc": …, "itm": …, "lm": …}, those of `config.tasks`, each (sum, count).

        batch: as made by `Collate.pairs`; for the captioner by `Collate.teach`, which says by labels what is to be learned.
        """
        image_tokens = self.encode_image(batch["images"])
        losses = self.compare(image_tokens, batch, gather) if self.text_encoder is not None else {}
        return losses | ({"lm": self.lm_loss(image_tokens, batch)} if self.text_decoder is not None else {})

    def compare(self, image_tokens: Tensor, batch: Batch, gather: Gather) -> dict[str, tuple[Tensor, Tensor]]:
        """ITC and ITM: {"itc": (sum, count), "itm": …}. In this order: τ is kept between 0.001 and 0.5, the slow copies follow, they make
        the keys, ITC compares, the keys are enqueued; then the pairs for ITM. Where no gradient is wanted, only to know the losses,
        nothing changes: neither τ nor copies nor queue.

        UserError, before anything has changed: without momentum, where a pair has no wrong partner, where the queue has no room.
        """
        if self.momentum is None:
            raise UserError("This BLIP has no slow copies, no queue and no temperature, as published for retrieval: it scores and "
                            "matches, but to be trained it needs them; give its config a MomentumConfig.")
        ids, mask = pad_to_longest(batch["input_ids"], batch["attention_mask"], gather)
        groups, learns = (batch["image_group"], batch["text_group"]), torch.is_grad_enabled()
        right = positives(groups[1], groups[0], gather)  # (B, G)
        need_wrong_partners(right)  # a batch that cannot be learned from is refused before anything has changed
        if learns:  # not when somebody only wants to know the loss
            self.momentum.need_room(right.shape[1])
            self.temperature.data.clamp_(0.001, 0.5)
            self.momentum.follow(self.copied())
        keys = self.keys(batch["images"], ids, mask)
        image, text = unit(self.image_projection, image_tokens), self.encode_text(ids, mask)  # (B, E)
        itc, (i2t, t2i) = self.momentum.contrast((image, text), keys, groups, self.temperature, gather)
        if learns:
            self.momentum.enqueue(keys, groups, gather)
        pairs, belongs = three_pairs(image_tokens, ids, mask, hard_negatives(t2i, right), hard_negatives(i2t, right), gather)
        return {"itc": itc, "itm": matching_loss(self.match(*pairs), belongs)}

    @torch.no_grad()
    def keys(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the slow copies make of pictures and texts: unit vectors, both (B, E)."""
        slow = self.momentum.copies
        return (unit(slow["image_projection"], look(slow["vision"], images)),
                unit(slow["text_projection"], slow["text_encoder"](ids, masks.padding(mask))))

    def lm_loss(self, image_tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every word of a pair's text and its end, [SEP], or what the batch's labels say; [DEC] is given, not learned."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = batch.get("labels", ids.masked_fill(~mask, IGNORE))
        states = self.word_head(self.write(image_tokens, ids, mask))  # (B, T, D)
        return lm_loss(states, self.text_decoder.embeddings.words.weight, labels, head_bias=self.word_head.bias,
                       smoothing=self.config.smoothing)

    # ---- to use

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosine of each image with each text: (B, number of texts)."""
        return unit(self.image_projection, self.encode_image(images)) @ self.encode_text(input_ids, attention_mask).T

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Look at pictures, read what their captions begin with: logits (B, V) of the next word, cache. ids padded on the left."""
        cache, ids, mask = KVCache(), batch["input_ids"], batch["attention_mask"]
        cache.state["context"] = self.encode_image(batch["images"])
        logits = read_on(self.text_decoder, self.word_head, opened(ids, mask, self.config.decode_id), mask, cache)
        return logits[:, -1], cache

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further words (B, T): logits (B, T, V) and the cache."""
        return read_on(self.text_decoder, self.word_head, ids, torch.ones_like(ids, dtype=torch.bool), cache), cache

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)


def share(encoder: Bert, decoder: Bert, how: str) -> None:
    """The decoder's parts become the encoder's own, by reference (§3.2, Table 3): one module, two owners, one gradient.

    how: a key of SHARED, which names the parts; each comes with its sum and norm, see FRAMES. Embeddings and the norm behind them
    are shared by all but "none". What is not shared the decoder keeps.
    """
    if how != "none":
        decoder.embeddings, decoder.norm = encoder.embeddings, encoder.norm
    for mine, theirs in zip(encoder.layers, decoder.layers):
        for part in SHARED[how]:
            theirs.add_module(part, mine.get_submodule(part))
            theirs.add_module(FRAMES[part], mine.get_submodule(FRAMES[part]))


def look(vision: ViT, images: Tensor) -> Tensor:
    """(B, 3, h, w) → (B, N, D_v)."""
    return vision.norm(vision(images))


def unit(projection: nn.Linear, states: Tensor) -> Tensor:
    """The first of the states (B, …, D), in the common space: unit vectors (B, E)."""
    return F.normalize(projection(states[:, 0]), dim=-1)


def opened(input_ids: Tensor, attention_mask: Tensor, task: int) -> Tensor:
    """A copy of the ids (B, T) with the task's token in the place of each row's first, [CLS]: the ids themselves are ITC's.

    Padding may stand on either side: the first is the first that the mask, bool (B, T), calls real.
    """
    return input_ids.scatter(1, attention_mask.long().argmax(dim=1, keepdim=True), task)


def read_on(decoder: Bert, head: WordHead, ids: Tensor, real: Tensor, cache: KVCache) -> Tensor:
    """Read ids (B, T), of which `real` are no padding, behind those of the cache: logits (B, T, V).

    The decoder looks at cache.state["context"] (B, N, D_v), where cache.state["context_mask"] (B, 1, N), if there is one, allows.
    """
    T, seen = ids.shape[1], cache.extend_mask(real)  # (B, S)
    first = seen.sum(dim=1, keepdim=True) - T  # below zero where a row is padded on the left
    states = decoder(ids, masks.causal_with_padding(seen, T), cache.state["context"], cache.state.get("context_mask"), cache, first)
    return head.logits(states, decoder.embeddings.words)
