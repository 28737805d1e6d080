"""A language model by itself: a decoder (LLaMA, OPT) or an encoder-decoder (T5, FlanT5), with the interface of a paper.

    decoder  input_ids (B, S) ───────────────────────────────────────────► hidden (B, S, D) ─────┐
                                                                                                 ├─► head ─► logits, loss
    T5       input_ids (B, S) ─► encode ─► memory (B, S, D) ───────┐                             │
                                                                   ▼                             │
             labels (B, T) ─► shift_right ─► <start> y₁ … y_T ─► decode ─► hidden (B, T + 1, D) ─┘

It is what the tiny recipes pretrain, and where published language models are loaded without a vision encoder.

Legend: B batch, S tokens that are read, T tokens of the answer, D width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.decoder import Decoder, DecoderConfig
from nanovlm.lm_loss import Output, lm_loss, mean_loss
from nanovlm.t5 import T5, T5Config


def build(config: DecoderConfig | T5Config) -> Decoder | T5:
    return T5(config) if isinstance(config, T5Config) else Decoder(config)


class LanguageModel(nn.Module):
    reads = Reads("texts")
    whole_batch = False
    whole_weights = False
    unheard = ()

    def __init__(self, config: DecoderConfig | T5Config):
        super().__init__()
        self.language = build(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """logits: a decoder's (B, S, V); T5's (B, T + 1, V), the last after the whole answer.

        The loss where labels are given, without which an encoder-decoder has nothing to say.
        """
        hidden, learned = self.language.read(attention_mask, labels, input_ids)
        loss = None if labels is None else mean_loss({"lm": lm_loss(hidden, self.language.head_weight, learned)})
        return Output(self.language.logits(hidden), loss)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the learned tokens, their number)}; batch as made by `Collate.teach`."""
        hidden, learned = self.language.read(batch["attention_mask"], batch["labels"], batch["input_ids"])
        return {"lm": lm_loss(hidden, self.language.head_weight, learned)}

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts (B, S), padded on the left (T5: on either side): next-token logits (B, V), cache."""
        return self.language.prefill(batch["attention_mask"], batch["input_ids"])

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further ids (B, T): logits (B, T, V) and the cache."""
        return self.language.step(ids, cache)

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)
