"""The Q-Former: a few learned queries read a picture and bring back what a language model needs to know.

"BLIP-2" (2301.12597) §3.1, Fig. 2

    queries (Q, D), learned ─┐                     text: words + positions (B, T, D), if there is text
                             └──► [queries ; text] ─► norm ─► x (B, Q + T, D)
      layers × L:                          │
             self-attention, shared: the mask says which rows see which (masks.py: ITC, ITM, ITG)
                      ┌────────────────────┴───────────────────┐
                 query rows                                text rows
      cross-attention to the image tokens                      │
      (every second layer, from the first)                     │
         query feed-forward                            text feed-forward
                      └────────────────────┬───────────────────┘
                                  x (B, Q + T, D) ─► what the queries bring back (B, Q, D), and the text's states

It is a BERT with two additions, and starts from BERT's weights: the cross-attention is new, the query feed-forward a
copy of the text one. Text never looks at the picture itself, only at the queries. Stage 2 has no text half
(`reads=False`).

Legend: B batch, Q queries, T text tokens, N image tokens, D width, D_v the vision encoder's.
Differs from the released code in: attention weights are never dropped, only what each part adds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm import masks
from nanovlm.attention import Attention, KVCache
from nanovlm.bert import Bert, BertConfig, Embeddings, Residual, initialise, take_bert
from nanovlm.errors import UserError
from nanovlm.feedforward import FeedForward


@dataclass(frozen=True)
class QFormerConfig:
    text: BertConfig  # the text transformer that it is made of; its image_width and segments play no part
    queries: int
    image_width: int
    cross_every: int = 2  # layers 0, 2, 4, … look at the picture
    reads: bool = True  # False: no words and no text feed-forwards, as stage 2 needs it


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, looks: bool):
        super().__init__()
        text = config.text
        frame = (text.width, text.eps, text.dropout)
        self.attention, self.residual1 = Attention(text.width, text.heads), Residual(*frame)
        self.cross_attention = self.cross_residual = None
        if looks:
            self.cross_attention = Attention(text.width, text.heads, kv_width=config.image_width)
            self.cross_residual = Residual(*frame)
        self.query_feedforward, self.query_residual = FeedForward(text.width, text.ffn), Residual(*frame)
        self.feedforward = self.residual2 = None
        if config.reads:
            self.feedforward, self.residual2 = FeedForward(text.width, text.ffn), Residual(*frame)

    def forward(self, x: Tensor, Q: int, image_tokens: Tensor | None, mask: Tensor | None, cache: KVCache | None, i: int,
                maps: list | None, looks: list | None) -> Tensor:
        """x (B, Q + T, D), of which the first Q rows are queries."""
        x = self.residual1(x, self.attention(x, mask=mask, cache=None if cache is None else cache[i], maps=maps))
        queries, text = x[:, :Q], x[:, Q:]
        if Q > 0:
            if self.cross_attention is not None:
                queries = self.cross_residual(queries, self.cross_attention(queries, image_tokens, maps=looks))
            queries = self.query_residual(queries, self.query_feedforward(queries))
        if text.shape[1] > 0:
            text = self.residual2(text, self.feedforward(text))
        return torch.cat([queries, text], dim=1)


class QFormer(nn.Module):
    """Image tokens (B, N, D_v), ids (B, T), or both → (B, Q + T, D), queries first; Q = 0 without a picture."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        D = config.text.width
        self.queries = nn.Parameter(torch.empty(config.queries, D))
        self.embeddings = Embeddings(config.text) if config.reads else None
        self.norm = nn.LayerNorm(D, config.text.eps)
        self.dropout = nn.Dropout(config.text.dropout)
        self.layers = nn.ModuleList(QFormerLayer(config, looks=i % config.cross_every == 0)
                                    for i in range(config.text.layers))
        initialise(self)
        nn.init.normal_(self.queries, std=0.02)
        self.copy_feedforwards()

    def forward(self, image_tokens: Tensor | None = None, input_ids: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None, first: int = 0, maps: list | None = None,
                looks: list | None = None) -> Tensor:
        """mask: bool (B, Q + T or 1, S), see masks.py; everybody sees everybody unless told.

        cache: self-attention keys and values of earlier calls; S counts them. first: the place of the first id.
        maps receives the self-attention weights (B, H, Q + T, S) of every layer, looks the cross-attention's
        (B, H, Q, N) of every layer that has it.
        """
        rows = []
        if image_tokens is not None:
            rows.append(self.queries.expand(len(image_tokens), -1, -1))  # (B, Q, D), no positions: a set, not a sequence
        if input_ids is not None:
            rows.append(self.embeddings(input_ids, first))  # (B, T, D)
        Q = 0 if image_tokens is None else self.config.queries
        x = self.dropout(self.norm(torch.cat(rows, dim=1)))  # the queries are normed with the words
        for i, layer in enumerate(self.layers):
            x = layer(x, Q, image_tokens, mask, cache, i, maps, looks)
        return x

    def bring_back(self, image_tokens: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                   maps: list | None = None, looks: list | None = None) -> Tensor:
        """What the queries say of the picture (B, Q, D); if there is a question (B, T), they and its words see each other.

        What the question's own rows became is not given on. A UserError: a question for a Q-Former that reads none, no question for
        one that reads, ids without a mask or a mask without ids, more or fewer questions than pictures.
        """
        Q = self.config.queries
        if (input_ids is None) != (attention_mask is None) or (input_ids is not None) != self.config.reads:
            raise UserError("This Q-Former reads the question too: give qformer_input_ids and qformer_attention_mask."
                            if self.config.reads else "This Q-Former reads no question: leave out qformer_input_ids and "
                            "qformer_attention_mask.")
        if input_ids is not None and len(input_ids) != len(image_tokens):
            raise UserError(f"One picture stands before each question; this batch has {len(image_tokens)} pictures for {len(input_ids)} "
                            "questions. Leave out records without a picture or with several.")
        mask = None if attention_mask is None else masks.bidirectional(Q, attention_mask)
        return self(image_tokens, input_ids, mask, maps=maps, looks=looks)[:, :Q]

    def copy_feedforwards(self) -> None:
        """The query feed-forwards start as the text's: BERT has learned something there too (LAVIS #706)."""
        for layer in self.layers:
            if layer.feedforward is not None:
                layer.query_feedforward.load_state_dict(layer.feedforward.state_dict())
                layer.query_residual.load_state_dict(layer.residual2.state_dict())

    def take_bert(self, bert: Bert) -> None:
        """Start from BERT (§3.1), the query feed-forwards too."""
        take_bert(self, bert)
        self.copy_feedforwards()
