"""T5: one stack reads a text in both directions, a second one writes the answer, and looks at what the first has read.

    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (1910.10683) §2.1
    T5 v1.1: a gated feed-forward and a head of its own
    FlanT5: "Scaling Instruction-Finetuned Language Models" (2210.11416)

    input_ids (B, S) ─► embedding ┐           (or inputs_embeds (B, S, D): BLIP-2 puts image queries before the words)
                                  ▼
      encoder, blocks × L:   x = x + Attention(norm₁(x), b)        both directions
                             x = x + FeedForward(norm₂(x))
                                  ▼
                                norm ─► memory (B, S, D) ──────────────┐
                                                                       │ keys and values
    decoder_ids (B, T) ─► embedding ─► decoder, blocks × L':           │
                             x = x + Attention(norm₁(x), b)            │                        causal
                             x = x + Attention(norm_cross(x), memory) ◄┘                        no positions
                             x = x + FeedForward(norm₂(x))
                                  ▼
                                norm ─► hidden (B, T, D) ─► head ─► logits (B, T, V)

    scores = QKᵀ + b,   b[h, t, k] = table[bucket(k − t), h]

Positions are nothing but b: a number for each head and each distance, in buckets that grow wider with the distance; one
table per stack, in all its layers. The scores are not divided by √d: the query maps start that much smaller instead.

              feed-forward      head
    T5        ReLU              = embedding, after x · D^-½
    T5 v1.1   GEGLU (tanh)      its own
    FlanT5    GEGLU (tanh)      its own               BLIP-2 runs it with the exact GELU

What is read and what is written are two sequences: the prompt is never learned, and labels are the answer alone. `read`
teaches; `prefill` and `step` are what `generation` drives.

Legend: B batch, S tokens of the encoder, T new tokens of the decoder, K keys (in the decoder with the cached ones),
D width, H heads, d head width, V vocabulary.
Differs from the paper in: nothing of its pre-training (spans of C4, cut out and filled in) is here; dropout is 0 (T5 was
tuned with 0.1); the first weights are ours, see `initialise`.
Differs from Hugging Face in: fp16 overflows are not clamped; the published weights ask for bf16 or fp32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanovlm import masks
from nanovlm.attention import Attention, KVCache, LayerCache
from nanovlm.feedforward import FeedForward, RMSNorm
from nanovlm.lm_loss import IGNORE


@dataclass(frozen=True)
class T5Config:
    vocab: int
    width: int
    layers: int
    heads: int
    head_dim: int  # heads · head_dim need not be the width
    ffn: int
    decoder_layers: int | None = None  # as many as the encoder has unless told
    activation: str = "geglu_tanh"  # "relu" for T5 v1.0; "geglu", the exact GELU, for FlanT5 inside of BLIP-2
    buckets: int = 32
    max_distance: int = 128  # everything further away shares the last bucket
    eps: float = 1e-6
    tied: bool = False  # the head is the embedding, and what it reads is scaled by D^-½
    start_id: int = 0  # what the decoder reads first: T5 takes <pad>

    def __post_init__(self):
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(f"{self.buckets} buckets up to distance {self.max_distance}: at least 4 are needed, and a "
                             "distance above half of their number")


# As published. BLIP-2 takes their weights but the exact GELU: replace(…, activation="geglu").
FLAN_T5_XL = T5Config(32128, 2048, 24, 32, 64, 5120)
FLAN_T5_XXL = T5Config(32128, 4096, 24, 64, 64, 10240)


def relative_buckets(offset: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Which bucket an offset, the key's index − the query's, falls into: int64, of any shape → int64.

    Half of the buckets hold one distance each, 0, 1, 2, …; the others grow by a constant factor up to max_distance.
    Where both directions are seen each has half of all buckets; where only the past is, offsets above 0 do not matter.
    """
    if causal:
        after, distance = 0, (-offset).clamp(min=0)
    else:
        buckets = buckets // 2
        after, distance = (offset > 0) * buckets, offset.abs()
    exact = buckets // 2
    # fp32 and in the order of the published code: at the edge of a bucket a last bit decides
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    wide = (exact + growth.long()).clamp(max=buckets - 1)
    return after + torch.where(distance < exact, distance, wide)


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


class Block(nn.Module):
    """An encoder's block, or, with cross-attention, a decoder's."""

    def __init__(self, config: T5Config, cross: bool):
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attention = Attention(config.width, config.heads, config.head_dim, bias="", scale=1.0)
        self.norm_cross = RMSNorm(config.width, config.eps) if cross else None
        self.cross_attention = None
        if cross:
            self.cross_attention = Attention(config.width, config.heads, config.head_dim, bias="", scale=1.0)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.feedforward = FeedForward(config.width, config.ffn, config.activation, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None,
                cache: LayerCache | None = None, cross_cache: LayerCache | None = None,
                maps: list | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), bias=bias, cache=cache, maps=maps)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory, memory_mask, cache=cross_cache, maps=maps)
        return x + self.feedforward(self.norm2(x))


class Stack(nn.Module):
    """The blocks of one side, the norm after them, and the one table of position biases that all of them use."""

    def __init__(self, config: T5Config, layers: int, decoder: bool):
        super().__init__()
        self.buckets, self.max_distance, self.causal = config.buckets, config.max_distance, decoder
        self.position_bias = nn.Embedding(config.buckets, config.heads)
        self.blocks = nn.ModuleList(Block(config, cross=decoder) for _ in range(layers))
        self.norm = RMSNorm(config.width, config.eps)

    def bias(self, T: int, K: int) -> Tensor:
        """b for the last T of K positions → (1, H, T, K); in the decoder −∞ where the key is still to come.

        Differences of indices, whatever is padding: a text that is padded on the left has the same distances as alone.
        """
        device = self.position_bias.weight.device
        keys = torch.arange(K, device=device)  # (K,)
        offset = keys - keys[K - T:, None]  # (T, K)
        bucket = relative_buckets(offset, self.buckets, self.max_distance, self.causal)  # (T, K)
        # heads first, in memory too: the fused kernels read the bias of a query key by key
        bias = self.position_bias(bucket).permute(2, 0, 1).contiguous()[None]  # (1, H, T, K)
        if self.causal and T > 1:
            bias = bias.masked_fill(~masks.causal(T, K, device), float("-inf"))
        return bias

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None,
                cache: KVCache | None = None, maps: list | None = None, checkpointing: bool = False) -> Tensor:
        for i, block in enumerate(self.blocks):
            if checkpointing and torch.is_grad_enabled():  # a frozen one in eval(), too
                x = checkpoint(block, x, bias, memory, memory_mask, use_reentrant=False)
            else:
                caches = (None, None) if cache is None else (cache[i], cache["cross", i])
                x = block(x, bias, memory, memory_mask, *caches, maps)
        return self.norm(x)


class T5(nn.Module):
    """`encode` a text (B, S), `decode` an answer (B, T) to it; `logits` turns hidden states into scores of words."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.encoder = Stack(config, config.layers, decoder=False)
        self.decoder = Stack(config, config.decoder_layers or config.layers, decoder=True)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.checkpointing = False  # trade compute for memory: keep a block's input only, run it again to go backward
        initialise(self)

    def encode(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
               attention_mask: Tensor | None = None, maps: list | None = None) -> Tensor:
        """The memory (B, S, D). attention_mask: bool (B, S), True on real tokens, padding on either side.

        maps receives the attention weights (B, H, S, S) of every block.
        """
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        B, S, _ = x.shape
        bias = self.encoder.bias(S, S)  # (1, H, S, S)
        if attention_mask is not None:
            seen = masks.padding(attention_mask)  # (B, 1, S)
            seen = seen | ~seen.any(dim=-1, keepdim=True)  # a row without words would be NaN; nobody reads what it sees
            bias = bias.masked_fill(~seen[:, None], float("-inf"))  # (B, H, S, S)
        return self.encoder(x, bias, maps=maps, checkpointing=self.checkpointing)

    def decode(self, decoder_ids: Tensor, memory: Tensor, memory_mask: Tensor | None = None,
               cache: KVCache | None = None, maps: list | None = None) -> Tensor:
        """Hidden states, as the head reads them, (B, T, D).

        decoder_ids: int64 (B, T), start_id first; padding stands on the right, where no real token looks. memory_mask:
        bool (B, S). cache: the earlier tokens, and the memory's keys and values, which are computed in the first call
        only. maps receives, block by block, the weights (B, H, T, K) and (B, H, T, S).
        """
        x = self.embedding(decoder_ids)  # (B, T, D)
        B, T, _ = x.shape
        K = T
        if cache is not None:
            K = cache.extend_mask(torch.ones(B, T, dtype=torch.bool, device=x.device)).shape[1]
        seen = None if memory_mask is None else masks.padding(memory_mask).expand(-1, T, -1)  # (B, T, S)
        hidden = self.decoder(x, self.decoder.bias(T, K), memory, seen, cache, maps, self.checkpointing)  # (B, T, D)
        # a head that is the embedding has rows of length √D: without the scale its scores would be as wide
        return hidden * self.config.width ** -0.5 if self.head is None else hidden

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)."""
        return F.linear(hidden, self.head_weight)

    def read(self, attention_mask: Tensor | None, labels: Tensor, input_ids: Tensor | None = None,
             inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoder's states (B, T + 1, D), start_id first, and what is learned at each place, as `lm_loss` wants it.

        labels: the answers (B, T), −100 on padding. attention_mask: bool (B, S), of what is read.
        """
        memory = self.encode(input_ids, inputs_embeds, attention_mask)  # (B, S, D)
        ids, learned = shift_right(labels, self.config.start_id)
        return self.decode(ids, memory, attention_mask), learned

    def prefill(self, attention_mask: Tensor | None, input_ids: Tensor | None = None,
                inputs_embeds: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Encode prompts and take the decoder's first step: logits of the first token (B, V), and the cache.

        The memory travels in the cache, so that beams and candidates take their rows of it along.
        """
        cache = KVCache()
        memory = self.encode(input_ids, inputs_embeds, attention_mask)  # (B, S, D)
        cache.state = {"memory": memory, "memory_mask": attention_mask}
        start = torch.full((len(memory), 1), self.config.start_id, device=memory.device)  # (B, 1)
        logits, cache = self.step(start, cache)
        return logits[:, -1], cache

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further tokens of the answer (B, T): logits (B, T, V) and the cache."""
        return self.logits(self.decode(ids, cache.state["memory"], cache.state["memory_mask"], cache)), cache


def initialise(t5: T5) -> None:
    """What enters a map with variance 1 leaves with it. The query maps start smaller by √d, for nothing else divides
    the scores (T5's own rule); those that write into the residual stream by √ of how many do so in their stack.

    A head of its own is Normal(0, 0.02): the first guesses are nearly uniform, the loss starts at ln V. Embeddings
    start as large as what the blocks will add to them, as in `decoder.initialise`.

    Position biases: three heads of four (rounded up) look at one distance each from the first step on, 0, 1, 2, … back; in an encoder,
    where 0 back says nothing, the first two at 1 back and 1 ahead. "The word before" needs a bias of several units, AdamW
    moves a number by little more than its learning rate in a step, and all blocks of a stack share one table.

    Where an encoder looks at itself and a decoder at it, queries start as the keys of the same word, made small: like finds
    like (mimetic initialisation, 2305.09828).
    """
    for stack in (t5.encoder, t5.decoder):
        nn.init.normal_(stack.position_bias.weight, std=0.5)
        for head in range(t5.config.heads - t5.config.heads // 4):
            bucket = min(head if stack.causal else max(head, 1), stack.buckets // 2 - 1)
            bucket += stack.buckets // 2 if head == 1 and not stack.causal else 0
            nn.init.constant_(stack.position_bias.weight[bucket, head:head + 1], 5.0)
    for name, parameter in t5.named_parameters():
        fan_in = parameter.shape[-1]
        if name == "embedding.weight":
            nn.init.normal_(parameter, std=0.5)
        elif name == "head.weight":
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("query.weight"):
            nn.init.normal_(parameter, std=(fan_in * t5.config.head_dim) ** -0.5)
        elif name.endswith(("out.weight", "down.weight")):
            writers = 2 * len(t5.encoder.blocks) if name.startswith("encoder") else 3 * len(t5.decoder.blocks)
            nn.init.normal_(parameter, std=(fan_in * writers) ** -0.5)
        elif parameter.ndim == 2 and "position_bias" not in name:
            nn.init.normal_(parameter, std=fan_in ** -0.5)
    for attention in [block.attention for block in t5.encoder.blocks] + [b.cross_attention for b in t5.decoder.blocks]:
        attention.query.weight.data.copy_(attention.key.weight.data * t5.config.head_dim ** -0.5)
