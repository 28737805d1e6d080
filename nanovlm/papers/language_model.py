"""A language model by itself: what stands frozen (or half frozen) behind the bridge in all of the papers.

    input_ids (B, T) ─► decoder ─► hidden (B, T, D) ─► head ─► logits (B, T, V)
                                       └─► next-token loss where labels ≠ −100

The two functions below are the whole interface between a causal decoder and `generation`; every paper whose language
model reads embeddings starts from them too.

Legend: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.lm_loss import lm_loss


@dataclass
class Output:
    """logits (B, T, V), and loss, the mean over trained tokens, where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


def prefill(decoder: Decoder, attention_mask: Tensor, input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Read a prompt that is padded on the left: logits of the next token (B, V), and the cache."""
    cache = KVCache()
    hidden = decoder(input_ids, inputs_embeds, attention_mask, cache)
    return decoder.logits(hidden[:, -1]), cache


def step(decoder: Decoder, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Read further tokens (B, T): logits (B, T, V) and the cache."""
    return decoder.logits(decoder(ids, cache=cache)), cache


def mean_loss(losses: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Σ of the named losses, each divided by its own count (at least 1: a batch may have nothing to learn)."""
    return sum(total / count.clamp(min=1) for total, count in losses.values())


class LanguageModel(nn.Module):
    """A decoder with the interface of a paper."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.language = Decoder(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        hidden = self.language(input_ids, attention_mask=attention_mask)
        loss = None if labels is None else mean_loss({"lm": lm_loss(hidden, self.language.head_weight, labels)})
        return Output(self.language.logits(hidden), loss)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        hidden = self.language(batch["input_ids"], attention_mask=batch["attention_mask"])
        return {"lm": lm_loss(hidden, self.language.head_weight, batch["labels"])}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop: Sequence[int],
                 beams: int = 1) -> Tensor:
        """Prompts (B, T), padded on the left → new token ids (B, n)."""
        return generation.generate(lambda: prefill(self.language, attention_mask, input_ids),
                                   lambda ids, cache: step(self.language, ids, cache), max_new_tokens, stop, beams=beams)

    def score(self, input_ids: Tensor, attention_mask: Tensor, candidates: Sequence[Sequence[int]]) -> Tensor:
        """log p of each candidate after each prompt → (B, number of candidates)."""
        return generation.score_candidates(lambda: prefill(self.language, attention_mask, input_ids),
                                           lambda ids, cache: step(self.language, ids, cache), candidates)
