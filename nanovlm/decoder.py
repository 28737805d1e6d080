"""The decoder: a language model that reads from left to right and says what comes next.

    OPT, "Open Pre-trained Transformer Language Models" §2.1; LLaMA, "Open and Efficient Foundation Language Models" §2.2

    input_ids (B, T) ─► embedding ┐                      (or inputs_embeds (B, T, D): words and image tokens side by side)
                                  ▼
      blocks × L:   [before_block(i, x, cache)]          Flamingo inserts its gated cross-attention here
                    x = x + Attention(norm₁(x))          causal
                    x = x + FeedForward(norm₂(x))
                                  ▼
                    norm ─► hidden (B, T, D) ─► head ─► logits (B, T, V)

              norm        positions               feed-forward   biases   head
    LLaMA     RMSNorm     rotary                  SwiGLU         none     its own
    OPT       LayerNorm   learned, index + 2      ReLU           all      = embedding
    CLIP text LayerNorm   learned                 QuickGELU      all      = embedding (unused)

`read` is for training; `generation` calls `prefill` and `step`. T5 has the same three, so a paper's bridge works with
either of the two.

Legend: B batch, T tokens, S tokens with the cached ones, D width, V vocabulary.
Differs from the paper in: dropout is 0 (OPT trained with 0.1); it plays no part in loading its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanovlm import masks
from nanovlm.attention import Attention, KVCache, LayerCache, rope_angles
from nanovlm.feedforward import FeedForward, RMSNorm


@dataclass(frozen=True)
class DecoderConfig:
    vocab: int
    width: int
    layers: int
    heads: int
    ffn: int
    max_positions: int
    norm: str = "rms"  # "rms" | "layer"
    eps: float = 1e-6
    activation: str = "swiglu"
    rope_base: float | None = 10000.0  # None: learned positions
    position_offset: int = 0  # OPT's table starts at row 2
    bias: bool = False
    tied: bool = False  # the head is the embedding


def llama(vocab: int, width: int, layers: int, heads: int, ffn: int, max_positions: int = 2048,
          eps: float = 1e-6) -> DecoderConfig:
    return DecoderConfig(vocab, width, layers, heads, ffn, max_positions, eps=eps)


def opt(vocab: int, width: int, layers: int, heads: int, ffn: int, max_positions: int = 2048) -> DecoderConfig:
    return DecoderConfig(vocab, width, layers, heads, ffn, max_positions, norm="layer", eps=1e-5, activation="relu",
                         rope_base=None, position_offset=2, bias=True, tied=True)


def clip_text(vocab: int, width: int, layers: int, heads: int, max_positions: int = 77) -> DecoderConfig:
    """CLIP's text tower is a causal decoder whose last token speaks for the sentence (CLIP §2.4)."""
    return DecoderConfig(vocab, width, layers, heads, 4 * width, max_positions, norm="layer", eps=1e-5,
                         activation="quick_gelu", rope_base=None, bias=True, tied=True)


VICUNA_7B = llama(32000, 4096, 32, 32, 11008)
VICUNA_13B = llama(32000, 5120, 40, 40, 13824)
OPT_2_7B = opt(50272, 2560, 32, 32, 10240)
OPT_6_7B = opt(50272, 4096, 32, 32, 16384)

BeforeBlock = Callable[[int, Tensor, KVCache | None], Tensor]


class Block(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = Attention(config.width, config.heads, bias="qkvo" if config.bias else "")
        self.norm2 = make_norm(config)
        self.feedforward = FeedForward(config.width, config.ffn, config.activation, config.bias)

    def forward(self, x: Tensor, bias: Tensor | None, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None = None,
                maps: list | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), bias=bias, rope=rope, cache=cache, maps=maps)
        return x + self.feedforward(self.norm2(x))


class Decoder(nn.Module):
    """ids (B, T) or embeddings (B, T, D) → hidden (B, T, D); `logits` turns hidden states into scores of words."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = None
        if config.rope_base is None:
            self.positions = nn.Embedding(config.max_positions + config.position_offset, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.checkpointing = False  # trade compute for memory: keep a block's input only, run it again to go backward
        initialise(self)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                attention_mask: Tensor | None = None, cache: KVCache | None = None,
                before_block: BeforeBlock | None = None, maps: list | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        attention_mask: bool (B, T) of the new tokens, True on real ones, all real unless told; with a cache the earlier
        columns are remembered. Padding may stand on either side: positions count real tokens. maps receives the
        attention weights (B, H, T, S) of every block.
        """
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        B, T, _ = x.shape
        seen = torch.ones(B, T, dtype=torch.bool, device=x.device) if attention_mask is None else attention_mask
        if cache is not None:
            seen = cache.extend_mask(seen)  # (B, S)
        positions = masks.positions(seen)[:, -T:]  # (B, T)
        bias = None
        if T > 1 or not seen.all():  # a lone new token with no padding before it may look at everything
            bias = masks.causal_bias(seen, T, x.dtype)  # (B, 1, T, S)
        rope = None
        if self.positions is None:
            rope = rope_angles(positions, self.config.width // self.config.heads, self.config.rope_base, x.dtype)
        else:
            x = x + self.positions(positions + self.config.position_offset)
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x, cache)
            if self.checkpointing and torch.is_grad_enabled():  # a frozen one in eval(), too: what stands before it may learn
                x = checkpoint(block, x, bias, rope, use_reentrant=False)
            else:
                x = block(x, bias, rope, None if cache is None else cache[i], maps)
        return self.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)."""
        return F.linear(hidden, self.head_weight)

    def read(self, attention_mask: Tensor | None, labels: Tensor | None, input_ids: Tensor | None = None,
             inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, D), and what is learned at each of the T places, as `lm_loss` wants it: the labels."""
        return self(input_ids, inputs_embeds, attention_mask), labels

    def prefill(self, attention_mask: Tensor | None, input_ids: Tensor | None = None,
                inputs_embeds: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Read prompts that are padded on the left: logits of the next token (B, V), and the cache."""
        cache = KVCache()
        hidden = self(input_ids, inputs_embeds, attention_mask, cache)
        return self.logits(hidden[:, -1]), cache

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further tokens (B, T): logits (B, T, V) and the cache."""
        return self.logits(self(ids, cache=cache)), cache


def make_norm(config: DecoderConfig) -> nn.Module:
    return RMSNorm(config.width, config.eps) if config.norm == "rms" else nn.LayerNorm(config.width, config.eps)


def initialise(decoder: Decoder) -> None:
    """What enters a map with variance 1 leaves with it, so one rule serves widths from 64 to 8192; biases start at zero.

    The maps that write into the residual stream start smaller by √(2L) (GPT-2 §2.3). The head is Normal(0, 0.02): the
    first guesses are nearly uniform, and the loss starts at ln V. An embedding that is not also the head starts as large
    as what the blocks will add to it: at 0.02 the words drown, and 200 steps are lost before the model hears them.

    Without biases and without learned positions a head can only look for "the word before" by something that all words
    have in common, which rotation then turns into a place. So an eighth of each word's dims starts at 1: position heads,
    and with them everything that is looked up, are then learned sooner.
    """
    for name, parameter in decoder.named_parameters():
        if name == "embedding.weight" and not decoder.config.tied:
            nn.init.normal_(parameter, std=0.5)
            if decoder.positions is None and not decoder.config.bias:
                nn.init.ones_(parameter[:, :parameter.shape[1] // 8])
        elif name.startswith(("embedding", "positions", "head")):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim >= 2:
            writes = name.endswith(("attention.out.weight", "feedforward.down.weight"))
            fan_in = parameter.shape[1]
            nn.init.normal_(parameter, std=(fan_in * (2 * decoder.config.layers if writes else 1)) ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
