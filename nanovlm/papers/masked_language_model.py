"""BERT as it is pre-trained: each hidden word is found from all the others, those before it and those behind it.

"BERT: Pre-training of Deep Bidirectional Transformers" (1810.04805) §3.1, Task 1: masked LM

    <s>  top  left :  [MASK]  square .  what colour is the square ?  red  </s>       input_ids (B, T)
     │    │    │   │    │       │    │   │     │    │   │    │    │   │     │
     └────┴────┴───┴────┴── Bert, every word looks at every word ────┴─────┘
                        ▼
                    hidden (K, D), of the K places that are learned
                        ▼
                    word head: dense, GELU, norm ─► · words + bias ─► logits (K, V)
                        ▼
          L = − Σ log p(word that stood there | all that is seen)

The head's map to words is the embedding once more. BLIP's text transformer and BLIP-2's Q-Former start from these weights,
of which the tiny recipes train their own; published BERTs are loaded into this class.

An exam hides the last answer: as many [MASK]s stand in its place as the right answer has tokens, so the number of its tokens
is given away (to the control with exchanged scenes, too). `generate` fills them.

Legend: B batch, T text tokens, K learned places, D width, V vocabulary.
differs: no next-sentence task (§3.1, Task 2), which later work found to be of no use (RoBERTa, 1907.11692 §4.2), and which
BLIP does not read; so there is one segment only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nanovlm import masks
from nanovlm.bert import Bert, BertConfig, WordHead
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.lm_loss import IGNORE, Output, chunk_loss


class MaskedLanguageModel(nn.Module):
    reads = Reads("masked")
    whole_batch = False
    whole_weights = False
    unheard = ()

    def __init__(self, config: BertConfig):
        super().__init__()
        self.bert = Bert(config)
        self.word_head = WordHead(config.width, config.vocab, config.eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """ids (B, T), padded on either side → logits (B, T, V) of what stands, or stood, at each place; the loss with labels."""
        mask = None if attention_mask is None else masks.padding(attention_mask)
        hidden = self.bert(input_ids, mask)  # (B, T, D)
        logits = self.word_head.logits(hidden, self.bert.embeddings.words)  # (B, T, V)
        if labels is None:
            return Output(logits)
        total, count = self.loss(hidden, labels)
        return Output(logits, total / count.clamp(min=1))

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (B, T, D), labels (B, T) → sum over the learned places and their number; nothing is shifted here."""
        learned = labels != IGNORE  # (B, T)
        states = self.word_head(hidden[learned])  # (K, D)
        words = self.bert.embeddings.words.weight  # (V, D)
        return chunk_loss(states, words, labels[learned], self.word_head.bias, smoothing=0.0), learned.sum()

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"mlm": (sum over the learned places, their number)}; batch as made by `Collate.masked`."""
        hidden = self.bert(batch["input_ids"], masks.padding(batch["attention_mask"]))  # (B, T, D)
        return {"mlm": self.loss(hidden, batch["labels"])}

    @torch.no_grad()
    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """The ids behind a row's [MASK]s, in order, int64 (B, n ≤ room), then 0; batch as made by `Collate.blanks`.

        The mask that the model is surest of is filled first, with the likeliest word, which the others then see. There is
        no order of writing and nothing to stop at: `stop` and `how` play no part.
        """
        ids, open_places = batch["input_ids"].clone(), batch["masked"].clone()  # (B, T)
        rows = torch.arange(len(ids), device=ids.device)
        for _ in range(int(batch["masked"].sum(dim=1).max())):
            sure, words = self(ids, batch["attention_mask"]).logits.softmax(dim=-1).max(dim=-1)  # (B, T)
            place = sure.masked_fill(~open_places, -1.0).argmax(dim=1)  # (B,)
            ids[rows, place] = torch.where(open_places[rows, place], words[rows, place], ids[rows, place])
            open_places[rows, place] = False
        return pad_sequence([row[blank] for row, blank in zip(ids, batch["masked"])], batch_first=True)[:, :room]
