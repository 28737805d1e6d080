"""A language model by itself, an encoder-decoder (T5, FlanT5) or a decoder (LLaMA, OPT): the same four calls for both.

    T5       input_ids (B, S) ─► encode ─► memory (B, S, D) ───────┐
                                                                   ▼
             labels (B, T) ─► shift_right ─► <start> y₁ … y_T ─► decode ─► hidden (B, T + 1, D) ─┐
                                                                                                 ├─► head ─► logits, loss
    decoder  input_ids (B, S) ───────────────────────────────────────────► hidden (B, S, D) ─────┘

What is read and what is written are two sequences in T5: the prompt is never learned, and labels are the answer alone.
`read` teaches; `prefill` and `step` are the whole interface to `generation`. They take embeddings in place of ids too:
that is how BLIP-2 and InstructBLIP stand on either.

Legend: B batch, S tokens that are read, T tokens of the answer, L = S or T + 1, D width, V vocabulary.
Differs from the papers in: nothing of T5's pre-training (spans of C4 that are cut out and filled in) is here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.lm_loss import IGNORE, lm_loss
from nanovlm.papers import language_model
from nanovlm.papers.language_model import Output, mean_loss
from nanovlm.t5 import T5, T5Config


def build(config: DecoderConfig | T5Config) -> Decoder | T5:
    return T5(config) if isinstance(config, T5Config) else Decoder(config)


def shift_right(labels: Tensor, start_id: int) -> tuple[Tensor, Tensor]:
    """Answers (B, T) → what the decoder reads and which of it is learned, both (B, T + 1).

        labels      y₁ y₂ y₃ −100
        ids        <s> y₁ y₂ y₃ <s>          padding is read as start_id: no learned token comes after it
        learned   −100 y₁ y₂ y₃ −100         the token that stands at each position, as `lm_loss` wants it
    """
    B, T = labels.shape
    start = labels.new_full((B, 1), start_id)  # (B, 1)
    ids = torch.cat([start, labels.masked_fill(labels == IGNORE, start_id)], dim=1)  # (B, T + 1)
    learned = torch.cat([torch.full_like(start, IGNORE), labels], dim=1)  # (B, T + 1)
    return ids, learned


def read(language: Decoder | T5, attention_mask: Tensor | None, labels: Tensor | None, input_ids: Tensor | None = None,
         inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The last states (B, L, D), and what is learned at each of the L places, as `lm_loss` wants it.

    labels: a decoder's are as long as what it reads; an encoder-decoder's are the answers (B, T), −100 on padding.
    """
    if isinstance(language, Decoder):
        return language(input_ids, inputs_embeds, attention_mask), labels
    memory = language.encode(input_ids, inputs_embeds, attention_mask)  # (B, S, D)
    ids, learned = shift_right(labels, language.config.start_id)
    return language.decode(ids, memory, attention_mask), learned


def output(language: Decoder | T5, hidden: Tensor, learned: Tensor | None) -> Output:
    """What `read` gave becomes logits, a decoder's (B, S, V), T5's (B, T, V) of the token that labels hold there, and loss."""
    loss = None if learned is None else mean_loss({"lm": lm_loss(hidden, language.head_weight, learned)})
    return Output(language.logits(hidden if isinstance(language, Decoder) else hidden[:, :-1]), loss)


def prefill(language: Decoder | T5, attention_mask: Tensor | None, input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Read prompts, a decoder's padded on the left: logits of the next token (B, V), and the cache.

    T5 encodes and takes the decoder's first step. The memory travels in the cache, so that beams and candidates take
    their rows of it along.
    """
    if isinstance(language, Decoder):
        return language_model.prefill(language, attention_mask, input_ids, inputs_embeds)
    memory = language.encode(input_ids, inputs_embeds, attention_mask)  # (B, S, D)
    cache = KVCache()
    cache.state = {"memory": memory, "memory_mask": attention_mask}
    start = torch.full((len(memory), 1), language.config.start_id, device=memory.device)  # (B, 1)
    logits, cache = step(language, start, cache)
    return logits[:, -1], cache


def step(language: Decoder | T5, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Read further tokens of the answer (B, T): logits (B, T, V) and the cache."""
    if isinstance(language, Decoder):
        return language_model.step(language, ids, cache)
    return language.logits(language.decode(ids, cache.state["memory"], cache.state["memory_mask"], cache)), cache


class LanguageModel(nn.Module):
    """A decoder or an encoder-decoder with the interface of a paper."""

    def __init__(self, config: DecoderConfig | T5Config):
        super().__init__()
        self.language = build(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """The loss where labels are given, without which an encoder-decoder has nothing to say."""
        return output(self.language, *read(self.language, attention_mask, labels, input_ids))

    def losses(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the learned tokens, their number)}; batch as made by `collate_conversations`."""
        hidden, learned = read(self.language, batch["attention_mask"], batch["labels"], batch["input_ids"])
        return {"lm": lm_loss(hidden, self.language.head_weight, learned)}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop: Sequence[int],
                 beams: int = 1) -> Tensor:
        """Prompts (B, S), padded on the left (T5: on either side) → new token ids (B, n)."""
        return generation.generate(lambda: prefill(self.language, attention_mask, input_ids),
                                   lambda ids, cache: step(self.language, ids, cache), max_new_tokens, stop, beams=beams)

    def score(self, input_ids: Tensor, attention_mask: Tensor, candidates: Sequence[Sequence[int]]) -> Tensor:
        """log p of each candidate after each prompt, as what the answer begins with → (B, number of candidates)."""
        return generation.score_candidates(lambda: prefill(self.language, attention_mask, input_ids),
                                           lambda ids, cache: step(self.language, ids, cache), candidates)
