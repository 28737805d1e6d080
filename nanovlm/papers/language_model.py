"""How a decoder is read and stepped: what stands frozen (or half frozen) behind the bridge in all of the papers.

    prompt (B, T) ─► prefill ─► next-token logits (B, V), cache ─► step ─► logits (B, T', V), cache ─► step …

The two functions below are the whole interface between a causal decoder and `generation`; every paper whose language
model reads embeddings starts from them too. `encoder_decoder` has them for T5, and the class for a model by itself.

Legend: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from nanovlm.attention import KVCache
from nanovlm.decoder import Decoder


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
