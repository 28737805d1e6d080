"""An encoder-decoder by itself: FlanT5, as it stands frozen behind the bridge of BLIP-2 and InstructBLIP.

    input_ids (B, S) ─► encode ─► memory (B, S, D) ───────┐
                                                          ▼
    labels (B, T) ─► shift_right ─► <start> y₁ … y_T ─► decode ─► hidden (B, T + 1, D) ─► head ─► logits (B, T, V)
                                                                       └─► next-token loss where labels ≠ −100

What is read and what is written are two sequences here: the prompt is never learned, and labels are the answer alone.
`prefill` and `step` are the whole interface between T5 and `generation`, as they are for a decoder in `language_model`.

Legend: B batch, S tokens that are read, T tokens of the answer, D width, V vocabulary.
Differs from the paper in: nothing of its pre-training (spans of C4 that are cut out and filled in) is here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.lm_loss import IGNORE, lm_loss
from nanovlm.papers.language_model import Output, mean_loss
from nanovlm.t5 import T5, T5Config


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


def prefill(t5: T5, attention_mask: Tensor, input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Encode what is read and take the decoder's first step: logits of the next token (B, V), and the cache.

    The memory travels in the cache, so that beams and candidates take their rows of it along.
    """
    memory = t5.encode(input_ids, inputs_embeds, attention_mask)  # (B, S, D)
    cache = KVCache()
    cache.state = {"memory": memory, "memory_mask": attention_mask}
    start = torch.full((len(memory), 1), t5.config.start_id, device=memory.device)  # (B, 1)
    logits, cache = step(t5, start, cache)
    return logits[:, -1], cache


def step(t5: T5, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Read further tokens of the answer (B, T): logits (B, T, V) and the cache."""
    return t5.logits(t5.decode(ids, cache.state["memory"], cache.state["memory_mask"], cache)), cache


class EncoderDecoder(nn.Module):
    """T5 with the interface of a paper."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.language = T5(config)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's states after <start> and after each token (B, T + 1, D), and what is learned (B, T + 1)."""
        memory = self.language.encode(input_ids, attention_mask=attention_mask)
        ids, learned = shift_right(labels, self.language.config.start_id)
        return self.language.decode(ids, memory, attention_mask), learned

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Output:
        """logits (B, T, V), of the token that labels hold at the same place, and the loss."""
        hidden, learned = self.read(input_ids, attention_mask, labels)
        loss = mean_loss({"lm": lm_loss(hidden, self.language.head_weight, learned)})
        return Output(self.language.logits(hidden[:, :-1]), loss)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the answers' tokens, their number)}; labels (B, T) are answers, −100 on padding."""
        hidden, learned = self.read(batch["input_ids"], batch["attention_mask"], batch["labels"])
        return {"lm": lm_loss(hidden, self.language.head_weight, learned)}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, stop: Sequence[int],
                 beams: int = 1) -> Tensor:
        """Prompts (B, S), padded on either side → new token ids (B, n)."""
        return generation.generate(lambda: prefill(self.language, attention_mask, input_ids),
                                   lambda ids, cache: step(self.language, ids, cache), max_new_tokens, stop, beams=beams)

    def score(self, input_ids: Tensor, attention_mask: Tensor, candidates: Sequence[Sequence[int]]) -> Tensor:
        """log p of each candidate as what the answer begins with → (B, number of candidates)."""
        return generation.score_candidates(lambda: prefill(self.language, attention_mask, input_ids),
                                           lambda ids, cache: step(self.language, ids, cache), candidates)
