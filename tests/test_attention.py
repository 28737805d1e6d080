"""Attention: held against plain loops, and the properties that swapped axes, late masks and lost biases break."""

import itertools
import math

import pytest
import torch
from tools import bite, close, randn

from nanovlm import masks
from nanovlm.attention import Attention, KVCache, LayerCache, attend_fast, attend_readable, rope_angles, rotate

B, T, S, D, H, D_KV, HEAD = 2, 5, 7, 12, 3, 10, 6  # head width 4 unless HEAD is given


def slow_attention(layer: Attention, x, context, mask=None, bias=None):
    """One number at a time, with numbers of heads and widths read from the weights."""
    w = {name: p.detach() for name, p in layer.named_parameters()}
    rows, head_dim = w["query.weight"].shape[0], w["query.weight"].shape[0] // layer.heads

    def project(name, vector):
        return w[f"{name}.weight"] @ vector + w.get(f"{name}.bias", torch.zeros(len(w[f"{name}.weight"])))

    out = torch.zeros(x.shape)
    for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        q = project("query", x[b, t])
        gathered = torch.zeros(rows)
        seen = [s for s in range(context.shape[1]) if mask is None or mask[b % len(mask), t, s]]
        for h in range(layer.heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            scores = [float(q[part] @ project("key", context[b, s])[part]) * layer.scale
                      + (0 if bias is None else float(bias[b % len(bias), h, t, s])) for s in seen]
            total = sum(math.exp(score) for score in scores)
            for score, s in zip(scores, seen, strict=True):
                gathered[part] += math.exp(score) / total * project("value", context[b, s])[part]
        if seen:
            out[b, t] = project("out", gathered)
    return out


@pytest.mark.parametrize("letters", ["qkvo", "qvo", "", "k"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("head_dim", "scale"), [(None, None), (HEAD, 1.0)])
def test_equals_a_slow_loop(letters, cross, head_dim, scale):
    layer = bite(Attention(D, H, head_dim, D_KV if cross else None, letters, scale), 1, std=0.4)
    x = randn(B, T, D)
    context = randn(B, S, D_KV, seed=1) if cross else None
    source = x if context is None else context
    keys = source.shape[1]
    mask = randn(B, T, keys, seed=2) > -0.5
    mask[0, 2] = False  # a blind row
    bias = randn(B, H, T, keys, seed=3)
    with torch.no_grad():
        close(layer(x, context), slow_attention(layer, x, source))
        for maps in (None, []):
            close(layer(x, context, mask=mask, maps=maps), slow_attention(layer, x, source, mask))
            both = layer(x, context, mask=mask[:1], bias=bias, maps=maps)
            close(both, slow_attention(layer, x, source, mask[:1], bias))
            close(layer(x, context, bias=bias[:1], maps=maps), slow_attention(layer, x, source, bias=bias[:1]))


@pytest.mark.parametrize("letters", ["qkvo", "qvo", "kv", ""])
def test_the_letters_are_the_biases(letters):
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    found = {name for name, _ in Attention(D, H, bias=letters).named_parameters() if name.endswith("bias")}
    assert found == {f"{names[letter]}.bias" for letter in letters}


def test_the_default_scale_and_an_impossible_width():
    assert Attention(D, H).scale == pytest.approx((D / H) ** -0.5)
    assert Attention(D, H, head_dim=HEAD).scale == pytest.approx(HEAD**-0.5)
    assert Attention(D, H, scale=1.0).scale == 1.0
    with pytest.raises(ValueError, match="12 is not a multiple of 5"):
        Attention(D, 5)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fast_path_is_the_readable_one(with_mask, with_bias):
    """Values and gradients, with rows that see nothing among them."""
    q, k, v = (randn(B, H, n, HEAD, seed=i).requires_grad_() for i, n in enumerate((T, S, S)))
    mask = (randn(B, 1, T, S, seed=4) > -0.5) if with_mask else None
    if with_mask:
        mask[1, 0, 3] = True  # attend_* never see a blind row: Attention opens it and erases the result
    bias = randn(1, H, T, S, seed=5).requires_grad_() if with_bias else None
    inputs = [q, k, v] + ([bias] if with_bias else [])
    results = []
    for attend in (attend_fast, attend_readable):
        y = attend(q, k, v, mask, bias, 0.7)
        results.append((y, *torch.autograd.grad((y * randn(*y.shape, seed=6)).sum(), inputs)))
    for fast, readable in zip(*results, strict=True):
        close(fast, readable)


@pytest.mark.parametrize("with_maps", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_blind_row_is_exactly_zero_and_has_finite_gradients(with_maps, with_bias):
    layer = bite(Attention(D, H), 2)  # its output bias must not show either
    x = randn(B, T, D).requires_grad_()
    mask = torch.ones(B, T, T, dtype=torch.bool)
    mask[0, 1] = False
    bias = randn(1, H, T, T, seed=1) if with_bias else None
    y = layer(x, mask=mask, bias=bias, maps=[] if with_maps else None)
    assert torch.equal(y[0, 1], torch.zeros(D))
    assert (y[0, 0] != 0).all()
    for gradient in torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]):
        assert gradient.isfinite().all()
    only_blind = torch.autograd.grad(layer(x, mask=mask, bias=bias)[0, 1].sum(), [x, *layer.parameters()])
    assert all(not gradient.any() for gradient in only_blind)


def test_nobody_blind_nothing_erased():
    """All-True mask = no mask."""
    layer = bite(Attention(D, H), 3)
    x = randn(B, T, D)
    close(layer(x, mask=torch.ones(1, 1, T, dtype=torch.bool)), layer(x), 1e-6)


def test_permuting_the_tokens_permutes_the_output():
    """Without positions attention is a set operation. Scrambled heads or axes break this at once."""
    layer = bite(Attention(D, H, head_dim=HEAD), 4)
    x, order = randn(B, T, D), torch.tensor([3, 0, 4, 1, 2])
    close(layer(x[:, order]), layer(x)[:, order], 1e-6)
    cross = bite(Attention(D, H, kv_width=D_KV), 5)
    context = randn(B, S, D_KV, seed=1)
    close(cross(x, context[:, torch.tensor([6, 2, 0, 5, 1, 3, 4])]), cross(x, context), 1e-6)


def test_rows_of_a_batch_do_not_meet():
    layer = bite(Attention(D, H), 6)
    x = randn(B, T, D)
    close(layer(x)[1:], layer(x[1:]), 1e-6)


def test_maps_are_the_weights():
    layer = bite(Attention(D, H), 7, 0.4)
    x, mask, maps = randn(B, T, D), masks.causal(T), []
    layer(x, mask=mask, maps=maps)
    (weights,) = maps
    assert weights.shape == (B, H, T, T)
    close(weights.sum(dim=-1), torch.ones(B, H, T), 1e-6)
    assert not weights.masked_select(~mask[:, None]).any()
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 0.01  # heads look at different things
    values = layer.value(x).reshape(B, T, H, D // H).transpose(1, 2)
    close(layer.out((weights @ values).transpose(1, 2).reshape(B, T, D)), layer(x, mask=mask))


# --- rotary positions ---

def test_rotation_is_multiplication_of_complex_numbers():
    """RoFormer Eq. 34: the pair (i, i + d/2) turns by position · base^(−2i/d)."""
    x = randn(B, H, T, HEAD)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 2, 2, 7, 30]])
    turned = rotate(x, rope_angles(positions, HEAD, base=50.0))
    half = HEAD // 2
    for b, t, i in itertools.product(range(B), range(T), range(half)):
        angle = float(positions[b, t]) * 50.0 ** (-2 * i / HEAD)
        pairs = torch.complex(x[b, :, t, i], x[b, :, t, i + half]) * complex(math.cos(angle), math.sin(angle))
        close(turned[b, :, t, i], pairs.real)
        close(turned[b, :, t, i + half], pairs.imag)


def test_rotary_attention_sees_distances_only():
    layer = bite(Attention(D, H, bias="qk"), 8, 0.5)
    x, positions = randn(B, T, D), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 5, 6]])

    def attend(where):
        return layer(x, rope=rope_angles(where, D // H))

    close(attend(positions + 11), attend(positions))
    close(attend(positions * 0), layer(x), 1e-6)  # all in one place: no positions
    moved = positions.clone()
    moved[:, 2] += 3
    assert (attend(moved) - attend(positions)).abs().max() > 1e-3


# --- the cache ---

@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("chunks", [[1] * T, [2, 3], [T], [4, 1]])
def test_self_attention_with_a_cache(chunks, with_gradient, monkeypatch):
    """Without gradients new tokens are written into a store; it has room for two, so that it must grow."""
    monkeypatch.setattr(LayerCache, "ROOM", 2)
    layer = bite(Attention(D, H), 9, 0.4)
    x, positions = randn(B, T, D), torch.arange(T).expand(B, T)
    whole = layer(x, mask=masks.causal(T), rope=rope_angles(positions, D // H))
    cache, seen, parts = KVCache(), 0, []
    for n in chunks:
        new = slice(seen, seen + n)
        seen += n
        rope = rope_angles(positions[:, new], D // H)
        with torch.set_grad_enabled(with_gradient):
            parts.append(layer(x[:, new], mask=masks.causal(n, seen), rope=rope, cache=cache[0]))
    close(torch.cat(parts, dim=1), whole, 1e-6)
    assert (cache[0].store is None) == (with_gradient or len(chunks) == 1)
    assert cache[0].keys.shape == (B, H, T, D // H)


def test_cross_attention_reads_its_context_once():
    layer = bite(Attention(D, H, kv_width=D_KV), 10)
    x, context = randn(B, T, D), randn(B, S, D_KV, seed=1)
    cache = KVCache()
    first = layer(x, context, cache=cache["cross", 1])
    close(first, layer(x, context), 1e-6)
    later = layer(x[:, :2], randn(B, S, D_KV, seed=2), cache=cache["cross", 1])  # this context it does not look at
    close(later, layer(x[:, :2], context), 1e-6)
    assert cache["cross", 1].keys.shape[2] == S  # it does not grow


def test_a_reordered_cache_has_a_store_of_its_own():
    """What one beam writes is not to be read by another, nor by the cache that it came from."""
    layer, x = bite(Attention(D, H), 12), randn(B, T, D)
    with torch.no_grad():
        cache = KVCache()
        for t in range(T):
            layer(x[:, t:t + 1], cache=cache[0])
        one, other = cache.reorder(torch.tensor([0, 1])), cache.reorder(torch.tensor([0, 1]))
        before = cache[0].keys.clone()
        layer(randn(B, 1, D, seed=1), cache=one[0])
        layer(randn(B, 1, D, seed=2), cache=other[0])
    assert torch.equal(cache[0].keys, before)
    assert torch.equal(one[0].keys[:, :, :T], before) and not torch.equal(one[0].keys, other[0].keys)


def test_reordering_a_cache():
    """Rows may repeat; the new cache grows apart from the old one; mask and state go along."""
    layer = bite(Attention(D, H), 11)
    x, rows = randn(B, T, D), torch.tensor([1, 1, 0])
    cache = KVCache()
    cache.extend_mask(torch.tensor([[True] * T, [False] + [True] * (T - 1)]))
    cache.state["image"] = randn(B, 4)
    layer(x, cache=cache["a"])
    picked = cache.reorder(rows)
    assert torch.equal(picked.mask, cache.mask[rows])
    assert torch.equal(picked.state["image"], cache.state["image"][rows])
    new = randn(3, 1, D, seed=2)
    close(layer(new, cache=picked["a"]), layer(torch.cat([x[rows], new], dim=1))[:, -1:], 1e-6)
    picked.extend_mask(torch.ones(3, 1, dtype=torch.bool))
    assert cache["a"].keys.shape[2] == T
    assert cache.mask.shape == (B, T)
    assert picked.mask.shape == (3, T + 1)
