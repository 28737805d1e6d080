"""BERT: a text transformer that sees the whole sentence at once, and, if asked to, a picture.

"BERT: Pre-training of Deep Bidirectional Transformers" (1810.04805) §3; with cross-attention, BLIP (2201.12086) §3.1

    input_ids (B, T) ─► words + positions ─► norm ─► x (B, T, D)
      layers × L:   x = norm(x + Attention(x))                       self-attention; `mask` decides which way it looks
                    x = norm(x + Attention(x, image tokens))         only where there is a picture, and a layer for it
                    x = norm(x + FeedForward(x))
                                    ▼
                    hidden (B, T, D) ─► WordHead ─► logits (B, T, V)

The norm stands behind the sum (post-norm), unlike in every decoder here. One class is encoder and decoder: the mask is
the caller's, `masks.padding` for the one, `masks.causal_with_padding` for the other (BLIP's MED).

Legend: B batch, T text tokens, N image tokens, D width, V vocabulary.
Differs from the paper in: no next-sentence head; attention weights are never dropped, only what each part adds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.attention import Attention, KVCache
from nanovlm.errors import UserError
from nanovlm.feedforward import FeedForward


@dataclass(frozen=True)
class BertConfig:
    vocab: int
    width: int
    layers: int
    heads: int
    ffn: int
    max_positions: int = 512
    segments: int = 0  # BERT tells two sentences apart (2); BLIP and BLIP-2 do not (0)
    image_width: int = 0  # of the tokens to cross-attend to; 0: no cross-attention
    eps: float = 1e-12
    dropout: float = 0.1


BERT_BASE = BertConfig(30522, 768, 12, 12, 3072, segments=2)


class Embeddings(nn.Module):
    """Words and where they stand: ids int64 (B, T) → (B, T, D), not yet normed."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.words = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.segments = nn.Embedding(config.segments, config.width) if config.segments else None

    def forward(self, input_ids: Tensor, first: int | Tensor = 0) -> Tensor:
        """first: the place of the first id, after those that a cache holds; or of each row's, int64 (B, 1): a row that is
        padded on the left begins below zero, and its first real token stands at 0.
        """
        places = torch.arange(input_ids.shape[1], device=input_ids.device) + first  # for all rows, or a row of places for each
        longest, room = int(places.max()) + 1, len(self.positions.weight)
        if longest > room:
            raise UserError(f"A text of {longest} tokens does not fit into the {room} positions of this text "
                            "transformer; cut it (max_length of the stage) or build it with more max_positions.")
        x = self.words(input_ids) + self.positions(places.clamp(min=0))  # (B, T, D)
        return x if self.segments is None else x + self.segments.weight[0]  # one sentence: all in the first


class Residual(nn.Module):
    """norm(x + what a part adds): the frame around attention and feed-forward alike."""

    def __init__(self, width: int, eps: float, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        return self.norm(x + self.dropout(added))


class Layer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        frame = (config.width, config.eps, config.dropout)
        self.attention, self.residual1 = Attention(config.width, config.heads), Residual(*frame)
        self.cross_attention = self.cross_residual = None
        if config.image_width:
            self.cross_attention = Attention(config.width, config.heads, kv_width=config.image_width)
            self.cross_residual = Residual(*frame)
        self.feedforward, self.residual2 = FeedForward(config.width, config.ffn), Residual(*frame)

    def forward(self, x: Tensor, mask: Tensor | None, image_tokens: Tensor | None, image_mask: Tensor | None,
                cache: KVCache | None, i: int, maps: list | None) -> Tensor:
        own, cross = (None, None) if cache is None else (cache[i], cache["cross", i])
        x = self.residual1(x, self.attention(x, mask=mask, cache=own, maps=maps))
        if image_tokens is not None and self.cross_attention is not None:
            x = self.cross_residual(x, self.cross_attention(x, image_tokens, mask=image_mask, cache=cross))
        return self.residual2(x, self.feedforward(x))


class Bert(nn.Module):
    """ids (B, T), and image tokens (B, N, D_v) if there are any → hidden (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        initialise(self)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, image_tokens: Tensor | None = None,
                image_mask: Tensor | None = None, cache: KVCache | None = None, first: int | Tensor = 0,
                maps: list | None = None) -> Tensor:
        """mask: bool (B or 1, T or 1, S), see masks.py; all may be seen unless told. Without image tokens the
        cross-attention is skipped; image_mask, bool (B, 1, N), says which of them may be seen. maps receives the
        self-attention weights (B, H, T, S) of every layer.
        """
        x = self.dropout(self.norm(self.embeddings(input_ids, first)))  # (B, T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, image_tokens, image_mask, cache, i, maps)
        return x

    def take_bert(self, bert: "Bert") -> None:
        take_bert(self, bert)


@torch.no_grad()
def take_bert(mine: nn.Module, bert: Bert) -> None:
    """Start from a published BERT: all that both have. Words beyond BERT's, such as [DEC], keep their random rows.

    BERT adds its first segment's embedding to every word; BLIP and the Q-Former, as released, have none.
    """
    words = bert.embeddings.words.weight
    mine.embeddings.words.weight[:len(words)] = words
    mine.embeddings.positions.load_state_dict(bert.embeddings.positions.state_dict())
    mine.norm.load_state_dict(bert.norm.state_dict())
    for layer, theirs in zip(mine.layers, bert.layers, strict=True):
        for part in ("attention", "residual1", "feedforward", "residual2"):
            layer.get_submodule(part).load_state_dict(theirs.get_submodule(part).state_dict())


class WordHead(nn.Module):
    """From a hidden state to scores of words: BERT's masked-word head, and the same for words to come.

    `forward` prepares the state; the map to the V words is the embedding itself, with a bias of its own.
    """

    def __init__(self, width: int, vocab: int, eps: float = 1e-12):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocab))
        initialise(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, D), ready for `lm_loss(…, words.weight, head_bias=self.bias)`."""
        return self.norm(F.gelu(self.transform(hidden)))

    def logits(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        """(…, D) → (…, V)."""
        return F.linear(self(hidden), words.weight, self.bias)

    def take_bert(self, head: "WordHead") -> None:
        """Start from a published BERT's; words beyond BERT's keep their bias of 0."""
        self.load_state_dict({**head.state_dict(), "bias": torch.cat([head.bias, self.bias[len(head.bias):]])})


def initialise(module: nn.Module) -> None:
    """What enters a map with variance 1 leaves with it, whatever the width; embeddings Normal(0, 0.02), as in BERT.

    Small embeddings do no harm here: the norm behind them makes them large.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features ** -0.5)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
