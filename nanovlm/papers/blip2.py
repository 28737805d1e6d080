"""BLIP-2: a small transformer learns to ask a frozen image encoder what a frozen language model wants to know.

"BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models" (2301.12597) §3

    stage 1 (§3.2), no language model: the queries learn what text needs of a picture

      image ─► ViT, frozen ─► norm ─► image tokens (B, N, D_v) ─┐
                                              32 queries ─► Q-Former ◄─ text
                                                               │
          ITC   max_q ⟨query_q, [CLS]⟩ / τ     queries and text apart      which text belongs to which image, in the batch
          ITM   mean_q head(query_q)           queries and text together   is this text this picture's? hard negatives
          ITG   text after [DEC], word by word text sees queries, not back say what is in the picture
                                                               │  loss = ITC + ITM + ITG
    stage 2 (§3.3): what they bring back is put before the words of a frozen language model

      image ─► ViT ─► norm ─► Q-Former, text half cut away ─► (B, Q, D) ─► projection ─► (B, Q, D_lm) ─┐
                          "<s> a red circle \\n" ─► word embeddings (B, T, D_lm) ──────────────────────┴─► LM ─► loss

    frozen: ViT and LM. Learning: norm, Q-Former, heads or projection: 0.9 to 3.4 % of the whole.

    fine-tuning (§4.2 to §4.4): the ViT learns too, the LM stays frozen. Captions go on from stage 2, retrieval from
    stage 1. For questions the Q-Former keeps its text half, so that the queries know what is asked (`asks`):

      image ─► ViT ─► norm ─► queries + question, both ways ─► Q-Former ─► what the queries say, (B, Q, D) ─► as above

ITC and ITG share one pass of the queries: its keys and values are kept, and the text reads them. That equals one pass
over both under the mask `multimodal_causal`, where queries do not look at text either.

Legend: B pairs, G pairs on all ranks, Q queries, T text tokens, N image tokens, E width of the common space.
Differs from the released code in: gathered features keep their gradient on every rank, as in one process with the whole
batch (released: only the own half does); pairs with an equal text are no negatives (released: equal images only, and
only in fine-tuning); the frozen LM is in eval(), without dropout; "<s>" is given, not learned (released: predicted from
the last query, where there is no prompt).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm import generation, masks
from nanovlm.attention import KVCache
from nanovlm.bert import WordHead
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.contrastive import contrastive_loss, positives, similarities
from nanovlm.decoder import DecoderConfig
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE, Output, lm_loss, mean_loss
from nanovlm.matching import hard_negatives, matching_loss, pad_to_longest, three_pairs
from nanovlm.papers.language_model import build
from nanovlm.qformer import QFormer, QFormerConfig
from nanovlm.t5 import T5Config
from nanovlm.vit import ViT, ViTConfig

MOST_ASKED = 128  # tokens of a question that a Q-Former reads, its [CLS] and [SEP] among them: the last ones


@dataclass(frozen=True)
class BLIP2Config:
    vision: ViTConfig  # without the last block and the final norm (§3.4: second-to-last features)
    qformer: QFormerConfig
    language: DecoderConfig | T5Config | None  # None where only stage 1 is wanted
    embedding: int = 256  # E
    decode_id: int = 30522  # [DEC], which opens a text to be written
    smoothing: float = 0.1  # of ITC's and ITG's targets
    eps: float = 1e-6  # of the norm behind the vision encoder
    trains: bool = True  # False: stage 1 as published for retrieval, without word head and temperature
    asks: bool = False  # stage 2's Q-Former reads the question too; without, it has no text half


def most_asked(config: QFormerConfig) -> int:
    return min(MOST_ASKED, config.text.max_positions)


class BLIP2Stage1(nn.Module):
    """Image encoder and Q-Former, text half included: contrast, match, describe, retrieve."""

    reads = Reads("pairs", matches=True)
    whole_batch = True  # splitting a batch would change who is a negative
    whole_weights = False
    unheard = ()

    def __init__(self, config: BLIP2Config):
        super().__init__()
        self.config = config
        D, E = config.qformer.text.width, config.embedding
        self.vision = ViT(config.vision)
        self.vision_norm = nn.LayerNorm(config.vision.width, config.eps)
        self.qformer = QFormer(config.qformer)
        self.word_head = WordHead(D, config.qformer.text.vocab, config.qformer.text.eps) if config.trains else None
        self.image_projection = nn.Linear(D, E)
        self.text_projection = nn.Linear(D, E)
        self.match_head = nn.Linear(D, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07)) if config.trains else None

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → image tokens (B, 1 + N, D_v), normed; the norm learns, the encoder does not."""
        return self.vision_norm(self.vision(images))

    def project_queries(self, queries: Tensor) -> Tensor:
        """(B, Q, D) → unit vectors (B, Q, E)."""
        return F.normalize(self.image_projection(queries), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids (B, T), padded on the right → unit vectors (B, E), read off the first token, [CLS]."""
        states = self.qformer(input_ids=input_ids, mask=masks.padding(attention_mask))  # (B, T, D)
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)

    def need_heads(self, purpose: str) -> None:
        if not self.config.trains:
            raise UserError(f"This BLIP-2 has no word head and no temperature, as published for retrieval: it scores and "
                            f"matches, but {purpose}, it needs both; take stage 1 of a BLIP-2 recipe.")

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"itc": …, "itm": …, "itg": …}, each (sum, count); batch as made by `Collate.pairs`."""
        self.need_heads("to be trained")
        image_tokens, cache = self.encode_image(batch["images"]), KVCache()
        ids, mask = pad_to_longest(batch["input_ids"], batch["attention_mask"], gather)
        queries = self.qformer(image_tokens, cache=cache)  # (B, Q, D)
        i2t, t2i = similarities(self.project_queries(queries), self.encode_text(ids, mask), gather)  # (B, G)
        i2t, t2i = i2t / self.temperature, t2i / self.temperature
        right = positives(batch["text_group"], batch["image_group"], gather)  # (B, G)
        pairs, belongs = three_pairs(image_tokens, ids, mask, hard_negatives(t2i, right), hard_negatives(i2t, right), gather)
        return {"itc": contrastive_loss(i2t, t2i, right, smoothing=self.config.smoothing),
                "itm": matching_loss(self.match(*pairs), belongs),
                "itg": self.itg_loss(ids, mask, cache)}

    def match(self, image_tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pair p = (image tokens p, text p) → logits (P, 2): every query answers, and their mean counts."""
        Q = self.config.qformer.queries
        states = self.qformer(image_tokens, input_ids, masks.bidirectional(Q, attention_mask))  # (P, Q + T, D)
        return self.match_head(states[:, :Q]).mean(dim=1)

    def itg_loss(self, ids: Tensor, mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """ITG: each word from [DEC], the words before it and the queries in `cache`, which learn through this too."""
        Q = self.config.qformer.queries
        read = torch.cat([torch.full_like(ids[:, :1], self.config.decode_id), ids[:, 1:]], dim=1)  # [DEC] for [CLS]
        states = self.qformer(input_ids=read, mask=masks.multimodal_causal(Q, mask)[:, Q:], cache=cache)  # (B, T, D)
        return lm_loss(self.word_head(states), self.qformer.embeddings.words.weight, ids.masked_fill(~mask, IGNORE),
                       head_bias=self.word_head.bias, smoothing=self.config.smoothing)

    @torch.no_grad()
    def score(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosine of each image's best query with each text: (B, number of texts)."""
        queries = self.project_queries(self.qformer(self.encode_image(images)))
        return similarities(queries, self.encode_text(input_ids, attention_mask), alone)[0]

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Look at pictures, then read [DEC]: logits (B, V) of a caption's first word, cache."""
        self.need_heads("to describe a picture")
        cache, start = KVCache(), torch.full((len(batch["images"]), 1), self.config.decode_id, device=batch["images"].device)
        self.qformer(self.encode_image(batch["images"]), cache=cache)
        cache.extend_mask(start.new_ones(len(start), self.config.qformer.queries, dtype=torch.bool))
        logits, cache = self.step(start, cache)
        return logits[:, -1], cache

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """Captions by the Q-Former alone: new token ids (B, n), beginning after [DEC]."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further words (B, T) behind the queries and words of the cache: logits (B, T, V) and the cache."""
        T, Q = ids.shape[1], self.config.qformer.queries
        seen = cache.extend_mask(torch.ones_like(ids, dtype=torch.bool))  # (B, S)
        states = self.qformer(input_ids=ids, mask=masks.causal_with_padding(seen, T), cache=cache,
                              first=seen.shape[1] - T - Q)
        return self.word_head.logits(states, self.qformer.embeddings.words), cache


# --- a picture's prefix before each text: what a language model makes of both ---

def prepend(language: nn.Module, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor,
            there: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings (B, P + T, D_lm) and mask bool (B, P + T) of a prefix (B, P, D_lm) and a text, padded on either side.

    there: bool (B, P), where some of the prefix is padding too.
    """
    if len(prefix) != len(input_ids):
        raise UserError(f"One picture stands before each text; this batch has {len(prefix)} pictures for {len(input_ids)} texts. "
                        "Leave out records without a picture or with several.")
    there = attention_mask.new_ones(prefix.shape[:2]) if there is None else there
    return torch.cat([prefix, language.embedding(input_ids)], dim=1), torch.cat([there, attention_mask], dim=1)


def read(language: nn.Module, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None,
         there: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The language model's last states (B, L, D_lm), and what is learned at each of the L places, as `lm_loss` wants it.

    labels: for a decoder the ids themselves (B, T), −100 where nothing is learned: nothing is at the prefix's places,
    the last of which may predict the text's first token. For an encoder-decoder the answers (B, T_out).
    """
    embeddings, mask = prepend(language, prefix, input_ids, attention_mask, there)
    if labels is not None and not isinstance(language.config, T5Config):
        labels = F.pad(labels, (prefix.shape[1], 0), value=IGNORE)
    return language.read(mask, labels, inputs_embeds=embeddings)


def output(language: nn.Module, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None,
           there: Tensor | None = None) -> Output:
    """Logits at all places, and the loss where labels are given."""
    hidden, learned = read(language, prefix, input_ids, attention_mask, labels, there)
    loss = None if labels is None else mean_loss({"lm": lm_loss(hidden, language.head_weight, learned)})
    return Output(language.logits(hidden), loss)


def answer_loss(language: nn.Module, prefix: Tensor, batch: Batch, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over what is to be said, their number); batch as made by `Collate.teach`."""
    hidden, learned = read(language, prefix, batch["input_ids"], batch["attention_mask"], batch["labels"], there)
    return lm_loss(hidden, language.head_weight, learned)


def prefill(language: nn.Module, prefix: Tensor, batch: Batch, there: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Read prompts behind their prefixes: next-token logits (B, V), cache.

    A decoder's are padded on the left. T5's on the right: it counts distances by index, padding or not, and what
    stands between a picture and its question would move them apart.
    """
    embeddings, mask = prepend(language, prefix, batch["input_ids"], batch["attention_mask"], there)
    return language.prefill(mask, inputs_embeds=embeddings)


class BLIP2(nn.Module):
    """Stage 2: one picture before each text, and a frozen language model that goes on from both.

    Where `config.asks`, `qformer_input_ids` and `qformer_attention_mask` (B, T_q), padded on the right, are the
    question that the Q-Former reads beside the picture, in its own words and between its own [CLS] and [SEP].
    """

    whole_batch = False
    whole_weights = False

    def __init__(self, config: BLIP2Config):
        super().__init__()
        self.config = config
        self.reads = Reads("conversations", question=most_asked(config.qformer) if config.asks else 0)
        self.vision = ViT(config.vision)
        self.vision_norm = nn.LayerNorm(config.vision.width, config.eps)
        self.qformer = QFormer(replace(config.qformer, reads=config.asks))
        last = f"qformer.layers.{config.qformer.text.layers - 1}"
        # only the queries are heard: what the last layer makes of the question plays no part in anything
        self.unheard = (f"{last}.feedforward", f"{last}.residual2") if config.asks else ()
        self.projection = nn.Linear(config.qformer.text.width, config.language.width)
        self.language = build(config.language)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, h, w) → image tokens (B, 1 + N, D_v), normed."""
        return self.vision_norm(self.vision(images))

    def image_prefix(self, images: Tensor, qformer_input_ids: Tensor | None = None,
                     qformer_attention_mask: Tensor | None = None) -> Tensor:
        """images (B, 3, h, w) → (B, Q, D_lm), what the language model reads in place of the picture."""
        image_tokens = self.encode_image(images)
        return self.projection(self.qformer.bring_back(image_tokens, qformer_input_ids, qformer_attention_mask))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
                qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None) -> Output:
        """logits: a decoder's (B, Q + T, V); an encoder-decoder's (B, T_out + 1, V), the last after the whole answer.

        The loss where labels are given, without which an encoder-decoder has nothing to say.
        """
        prefix = self.image_prefix(images, qformer_input_ids, qformer_attention_mask)
        return output(self.language, prefix, input_ids, attention_mask, labels)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over what is to be said, their number)}; batch as made by `Collate.teach`."""
        return {"lm": answer_loss(self.language, self.prefix_of(batch), batch)}

    def prefix_of(self, batch: Batch) -> Tensor:
        return self.image_prefix(batch["images"], batch.get("qformer_input_ids"), batch.get("qformer_attention_mask"))

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts behind their pictures' prefixes: next-token logits (B, V), cache."""
        return prefill(self.language, self.prefix_of(batch), batch)

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further words (B, T): logits (B, T, V) and the cache."""
        return self.language.step(ids, cache)

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)
