"""BLIP fine-tuned for two tasks that need another wiring: to answer questions, and to judge statements about two pictures.

"BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation" (2201.12086) §5.3, §5.4, Fig. 5

    BLIPAnswerer (VQA): the decoder looks at the question's words, which have looked at the picture; it sees no picture itself

        image ─► ViT ─► image tokens (B, N, D_v)
                             ▼
        [ENC] what colour is it? [SEP] ─► question encoder ─► states (B, T, D), of every word
                                                                 ▼
                                                      [DEC] ─► answer decoder ─► red [SEP]

    BLIPReasoner (NLVR2): each layer looks at both pictures, by a cross-attention for each; both begin as the pretrained one

        left  ─► ViT ─► cross-attention 1 ─┐
                                           ├─► merge ─► + ─► norm ─► feed-forward ─► …   [ENC] ─► D → D → 2: false, true
        right ─► ViT ─► cross-attention 2 ─┘
                                           merge =  (left + right) / 2         in the first half of the layers
                                                    W [left ; right] + b       in the second half; W and b are new

Encoder and decoder of the answerer share nothing: in pre-training they do, and go their own ways from there (BLIP issue #98).
Captions and retrieval need no model of their own: BLIP with its tasks ("lm",) and ("itc", "itm") is fine-tuned as it is.

Legend: B samples, T tokens that are read, L tokens of an answer, N image tokens, C candidates, D width of the text, D_v of the ViT.
Differs from the released code in: an answer's loss is a mean over its tokens, and each question has one (released: a sum over the
tokens of each answer, weighted by how many people gave it); padding of a question is hidden when answers are written too (released:
when they are learned and ranked, and shown when they are generated); no drop-path (released: 0.1 in the ViT).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm import generation, masks
from nanovlm.attention import KVCache
from nanovlm.bert import Bert, WordHead
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.lm_loss import IGNORE, lm_loss
from nanovlm.matching import matching_loss
from nanovlm.papers.blip import BLIPConfig, look, opened, read_on
from nanovlm.vit import ViT


class BLIPAnswerer(nn.Module):
    """A picture and a question in, an answer out: written freely (`generate`), or the best of given ones (`rank`)."""

    reads = Reads("conversations")
    whole_batch = False
    whole_weights = False
    unheard = ()

    def __init__(self, config: BLIPConfig):
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.text_encoder = Bert(config.text)
        self.text_decoder = Bert(replace(config.text, image_width=config.text.width))  # looks at states of words
        self.word_head = WordHead(config.text.width, config.text.vocab, config.text.eps)

    def read(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) and questions (B, T), padded on the right → the questions' states (B, T, D)."""
        ids = opened(input_ids, attention_mask, self.config.encode_id)
        return self.text_encoder(ids, masks.padding(attention_mask), look(self.vision, images))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """labels (B, L), answers with their ends, then −100 → states (B, L + 1, D) for the word head, from [DEC] on, and the
        token that stands at each place (B, L + 1), as `lm_loss` wants it: what is learned at place l stands at l + 1.
        """
        question = self.read(images, input_ids, attention_mask)  # (B, T, D)
        answer = F.pad(labels, (1, 0), value=self.config.decode_id)  # (B, L + 1)
        real = answer != IGNORE  # (B, L + 1)
        mask = masks.causal_with_padding(real, real.shape[1])
        states = self.text_decoder(answer.masked_fill(~real, 0), mask, question, masks.padding(attention_mask))
        return self.word_head(states), answer

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over the answers' tokens, their number)}; batch as made by `Collate.teach` in a `separate` format."""
        states, answer = self(batch["images"], batch["input_ids"], batch["attention_mask"], batch["labels"])
        return {"lm": lm_loss(states, self.text_decoder.embeddings.words.weight, answer, head_bias=self.word_head.bias,
                              smoothing=self.config.smoothing)}

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read pictures and questions, and [DEC]: logits (B, V) of the answers' first words, cache."""
        cache, mask = KVCache(), batch["attention_mask"]
        cache.state["context"] = self.read(batch["images"], batch["input_ids"], mask)
        cache.state["context_mask"] = masks.padding(mask)
        logits, cache = self.step(mask.new_full((len(mask), 1), self.config.decode_id, dtype=torch.int64), cache)
        return logits[:, -1], cache

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further words of the answers (B, L): logits (B, L, V) and the cache."""
        return read_on(self.text_decoder, self.word_head, ids, torch.ones_like(ids, dtype=torch.bool), cache), cache

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)

    def rank(self, batch: Batch, candidates: Sequence[Sequence[int]], shortlist: int = 128) -> Tensor:
        """Which of C answers, each with its end, is the likeliest: int64 (B,). Only the `shortlist` of them that begin most
        likely are read to their ends (§5.3: 128 of 3,128).
        """
        return generation.score_candidates(lambda: self.prefill(batch), self.step, candidates, shortlist).argmax(dim=1)


class BLIPReasoner(nn.Module):
    """Two pictures and a statement in; true or false out."""

    reads = Reads("statements")
    whole_batch = False
    whole_weights = True  # it goes through the parts of a layer itself
    unheard = ()

    def __init__(self, config: BLIPConfig):
        super().__init__()
        self.config = config
        D = config.text.width
        self.vision = ViT(config.vision)
        self.text_encoder = Bert(config.text)  # its own cross-attention looks at the left picture
        self.second = nn.ModuleList(deepcopy(layer.cross_attention) for layer in self.text_encoder.layers)  # at the right one
        self.merge = nn.ModuleList(nn.Linear(2 * D, D) for _ in self.second[len(self.second) // 2:])
        self.truth_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 2))

    def judge(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pairs of pictures (B, 2, 3, h, w) and statements (B, T) → logits (B, 2), column 1 = true, read off [ENC]."""
        left, right = look(self.vision, images.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(dim=1)  # (B, N, D_v)
        bert, mask = self.text_encoder, masks.padding(attention_mask)
        x = bert.embeddings(opened(input_ids, attention_mask, self.config.encode_id))  # (B, T, D)
        x = bert.dropout(bert.norm(x))  # (B, T, D)
        for i, layer in enumerate(bert.layers):
            x = layer.residual1(x, layer.attention(x, mask=mask))
            seen = self.merged(i, layer.cross_attention(x, left), self.second[i](x, right))  # (B, T, D)
            x = layer.cross_residual(x, seen)
            x = layer.residual2(x, layer.feedforward(x))
        return self.truth_head(x[:, 0])

    def merged(self, i: int, left: Tensor, right: Tensor) -> Tensor:
        """What layer i has seen in both pictures: (B, T, D) twice → (B, T, D)."""
        averages = len(self.second) - len(self.merge)
        if i < averages:
            return (left + right) / 2
        return self.merge[i - averages](torch.cat([left, right], dim=-1))

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"truth": (sum, B)}; batch as made by `Collate.statements`."""
        logits = self.judge(batch["images"], batch["input_ids"], batch["attention_mask"])
        return {"truth": matching_loss(logits, batch["truth"])}

    @torch.no_grad()
    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """The batch's own word for false or for true, `choices` (2, n): ids (B, n). Nothing is written: `stop` and `how` play no part."""
        true = self.judge(batch["images"], batch["input_ids"], batch["attention_mask"]).argmax(dim=1)
        return batch["choices"][true][:, :room]
