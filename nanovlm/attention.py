"""Attention: the one operation that every model in this package is made of.

Each position of `x` asks a question (query), every position of the context offers a label (key) and a content (value);
a position receives the average of the contents, weighted by how well the labels fit its question.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V                      "Attention Is All You Need" §3.2, Eq. 1

          x (B, T, D)                       context (B, S, D_kv)      (self-attention: context = x)
              │                                │            │
            query                             key         value
              │ (B, H, T, d)                   │ (B, H, S, d) │
              └──────── QKᵀ · scale + bias ────┘            │
                            │ mask, softmax   (B, H, T, S)  │
                            └─────────── weights · V ───────┘
                                            │ (B, T, H·d)
                                           out ──► (B, T, D)

BERT, OPT, LLaMA, T5, CLIP and EVA differ only in arguments: which of the four projections have a bias
(EVA-CLIP: all but the key), the scale (T5: 1), an additive bias (T5's relative positions), rotary positions (LLaMA), the
inner width (open_flamingo: not the model's) and where the keys come from.

Legend: B batch, T queries, S keys, D width, H heads, d head width.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention, self or cross, with or without a cache.

    width: D of `x` and of the output. heads: H. head_dim: d, D // H unless told. kv_width: D_kv of `context`, D unless
    told. bias: which projections have a bias, letters out of "qkvo". scale: factor on QKᵀ, d ** -0.5 unless told.
    """

    def __init__(self, width: int, heads: int, head_dim: int | None = None, kv_width: int | None = None,
                 bias: str = "qkvo", scale: float | None = None):
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads; give head_dim")
        self.heads = heads
        self.head_dim = head_dim or width // heads
        self.scale = self.head_dim ** -0.5 if scale is None else scale
        inner = heads * self.head_dim
        kv_width = kv_width or width
        self.query = nn.Linear(width, inner, bias="q" in bias)
        self.key = nn.Linear(kv_width, inner, bias="k" in bias)
        self.value = nn.Linear(kv_width, inner, bias="v" in bias)
        self.out = nn.Linear(inner, width, bias="o" in bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, cache: "LayerCache | None" = None,
                maps: list | None = None) -> Tensor:
        """Attend from x (B, T, D) to context (B, S, D_kv), or to x itself; returns (B, T, D).

        mask: bool (B or 1, T, S), True = may attend; a row that may attend to nothing gives exactly zero.
        bias: (B or 1, H or 1, T, S), added to the scores; −inf is a mask too, but then no row may be blind.
        rope: cos and sin from `rope_angles` for the T new positions; x attends to itself.
        cache: keys and values of earlier calls; with a context they are computed once and then kept.
        maps: a list that receives the weights (B, H, T, S); asking for them takes the readable path.
        """
        B, T, _ = x.shape
        q = self.split_heads(self.query(x))  # (B, H, T, d)
        if cache is not None and context is not None and cache.keys is not None:
            k, v = cache.keys, cache.values  # the context does not change while we generate
        else:
            source = x if context is None else context
            k = self.split_heads(self.key(source))  # (B, H, new, d)
            v = self.split_heads(self.value(source))  # (B, H, new, d)
            if rope is not None:  # queries and keys stand in the same places: turned as 2H heads, in half the operations
                q, k = rotate(torch.cat([q, k], dim=1), rope).chunk(2, dim=1)
            if cache is not None:
                k, v = cache.append(k, v)  # (B, H, S, d): the earlier ones too, after rotation: they never move
        blind = None
        if mask is not None:
            mask = mask[:, None]  # one for all heads; a mask of one row serves all T
            blind = ~mask.any(dim=-1, keepdim=True)
            mask = mask | blind  # softmax over nothing is 0/0: let a blind row look, and erase what it saw below
        attend = attend_fast if maps is None else attend_readable
        y = attend(q, k, v, mask, bias, self.scale, maps)  # (B, H, T, d)
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)
        return y if blind is None else y.masked_fill(blind[:, 0], 0.0)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H·d) → (B, H, S, d). The view comes first: heads are slices of the width, not of the sequence."""
        B, S, _ = x.shape
        return x.view(B, S, self.heads, self.head_dim).transpose(1, 2)


def attend_readable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float,
                    maps: list | None = None) -> Tensor:
    """Eq. 1, line by line; the weights (B, H, T, S) are appended to `maps`."""
    scores = q @ k.transpose(-2, -1) * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if maps is not None:
        maps.append(weights)
    return weights @ v  # (B, H, T, d)


def attend_fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float,
                maps: None = None) -> Tensor:
    """The same in one fused kernel that never holds the (T, S) weights; tests hold the two equal."""
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# --- rotary positions (RoFormer, §3.2.2; the rotate-half layout of the published LLaMA weights) ---

@functools.cache
def signed_frequencies(head_dim: int, base: float, device: torch.device) -> Tensor:
    """−base^(-2i/d) for dim i and the same, positive, for its partner i + d/2: fp32 (d,).

    Minus the angle has the same cosine, and the sine with the sign that dim i needs. Kept, for each step asks again.
    """
    i = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)  # (d / 2,)
    frequencies = base ** (-i / head_dim)
    return torch.cat([-frequencies, frequencies])


def rope_angles(positions: Tensor, head_dim: int, base: float = 10000.0,
                dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and ± sin of position · base^(-2i/d) for positions (B, T) → two tensors (B, 1, T, d), the same for every head.

    Calculated in fp32, once for all layers, and cast here to the dtype of what they will turn.
    """
    angles = positions[:, None, :, None] * signed_frequencies(head_dim, base, positions.device)  # (B, 1, T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)  # (B, 1, T, d)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (B, H, T, d) by the angle of its position."""
    cos, sin = rope
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # (B, H, T, d): dim i holds x_{i+d/2}, and the other way round
    return x * cos + partner * sin


# --- the cache of keys and values ---

class LayerCache:
    """Keys and values (B, H, S, d) of one attention layer, growing along S.

    Where no gradient is wanted they are views of a store with room for ROOM more tokens, into which a new one is
    written, instead of copying all the earlier ones for each.
    """

    ROOM = 64

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.store: Tensor | None = None  # keys and values one above the other, and S longer than they are

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = k, v
        elif torch.is_grad_enabled():  # what a gradient passes through may not be written over
            self.keys, self.values = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        else:
            self.keys, self.values = self.write(k, v)
        return self.keys, self.values

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, d = k.shape
        S = self.keys.shape[2]
        if self.store is None or self.store.shape[3] < S + T:
            self.store = k.new_empty(2, B, H, S + T + self.ROOM, d)
            self.store[:, :, :, :S] = torch.stack([self.keys, self.values])
        torch.stack([k, v], out=self.store.narrow(3, S, T))
        return self.store.narrow(3, 0, S + T).unbind()


class KVCache:
    """What generation carries from step to step: a LayerCache per layer and which columns are real tokens.

    `cache[key]` makes the layer's cache on first use; any hashable key will do (a block's number, ("cross", 3)).
    `mask` is bool (B, S), True on real tokens; `state` holds further tensors whose first axis is the batch.
    """

    def __init__(self):
        self.layers: dict[object, LayerCache] = {}
        self.mask: Tensor | None = None
        self.state: dict[str, Tensor] = {}

    def __getitem__(self, key: object) -> LayerCache:
        return self.layers.setdefault(key, LayerCache())

    def extend_mask(self, new: Tensor) -> Tensor:
        """Add the columns `new` (B, T) and return the whole mask (B, S)."""
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        return self.mask

    def reorder(self, rows: Tensor) -> "KVCache":
        """A new cache whose row j is this one's row rows[j]; rows may repeat (beams, candidates)."""
        picked = KVCache()
        picked.mask = None if self.mask is None else self.mask[rows]
        picked.state = {name: tensor[rows] for name, tensor in self.state.items()}
        for key, layer in self.layers.items():
            picked[key].keys, picked[key].values = layer.keys[rows], layer.values[rows]
        return picked
