"""Assignment 7. Oracles: masks cell by cell, a resampler and a gated layer in numpy, a page whose images are counted by a loop, every window."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assignments.draw import close
from nanovlm import masks
from nanovlm.attention import Attention, KVCache, LayerCache
from nanovlm.data.collate import window
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.decoder import llama
from nanovlm.errors import UserError
from nanovlm.evaluate import fewshot
from nanovlm.evaluate.fewshot import Episode
from nanovlm.gated_xattn import GatedCrossAttention
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.perceiver_resampler import Layer, PerceiverResampler, ResamplerConfig, stretched

V, TAG, CLOSE, D, D_V, Q, LAYERS = 29, 3, 4, 24, 16, 3, 5
VISION = NFNetConfig(12, (1, 1), widths=(8, D_V), strides=(1, 2), stem=((8, 2),), group_width=4, final=0)
RESAMPLER = ResamplerConfig(D_V, layers=2, heads=2, latents=Q, frames=4)
CONFIG = FlamingoConfig(VISION, RESAMPLER, llama(V, D, LAYERS, 4, 32), TAG, CLOSE, every=2)


# --- 7.1 each word looks at one image ---

def counted(row: list[bool]) -> tuple[list[int], list[int]]:
    """Of each token: the image that stands last at or before it, and the image that comes next behind it; 0 = none."""
    before, behind = [], []
    for t in range(len(row)):
        before.append(sum(row[:t + 1]))
        behind.append(sum(row[:t + 1]) + 1 if any(row[t + 1:]) else 0)
    return before, behind


def test_7_1_cell_by_cell(draw):
    B, T, M, latents = draw.sizes(4, 2, 7)
    is_image = torch.rand(B, T, generator=draw.generator) < 0.4
    is_image[0], is_image[1, 0] = False, True
    for got, want in ((masks.last_image(is_image), 0), (masks.next_image(is_image), 1)):
        assert got.dtype == torch.int64
        assert got.tolist() == [counted(row)[want] for row in is_image.tolist()]
    there = torch.rand(B, M, generator=draw.generator) < 0.6
    there[0], there[1, 0], there[1, -1] = True, True, False
    for all_previous in (False, True):
        phi = draw.ids(B, T, low=0, high=M + (1 if all_previous else 3))  # without all_previous also behind the last image
        phi[0, 0], phi[1, -1] = 0, M
        got = masks.image_causal(phi, there, latents, all_previous)
        assert got.dtype == torch.bool and got.shape == (B, T, M * latents)
        for b in range(B):
            for t in range(T):
                for column in range(M * latents):
                    m = column // latents + 1
                    seen = m <= phi[b, t] if all_previous else m == phi[b, t]
                    assert got[b, t, column] == bool(seen and there[b, m - 1]), f"φ {int(phi[b, t])}, image {m}, all_previous {all_previous}"


def test_7_1_the_page_of_the_figure(draw):
    """<s> <image> a cat <image> a dog: two images of two latents each."""
    tags = torch.tensor([[False, True, False, False, True, False, False]])
    assert masks.last_image(tags).tolist() == [[0, 1, 1, 1, 2, 2, 2]]
    assert masks.next_image(tags).tolist() == [[1, 2, 2, 2, 0, 0, 0]]
    got = masks.image_causal(masks.last_image(tags), torch.ones(1, 2, dtype=torch.bool), 2).int().tolist()
    assert got == [[[0, 0, 0, 0], *[[1, 1, 0, 0]] * 3, *[[0, 0, 1, 1]] * 3]]


def test_7_1_who_notices_another_picture(draw):
    """Other numbers in image m: only the words whose φ is m change; words without an image get exactly nothing."""
    torch.manual_seed(draw.random.getrandbits(30))
    attention = draw.bite(Attention(D, 3, kv_width=D_V, bias=""))
    y, media = draw.randn(1, 7, D), draw.randn(1, 3, Q, D_V)
    phi, there = torch.tensor([[0, 1, 1, 2, 3, 3, 4]]), torch.tensor([[True, True, False]])
    mask = masks.image_causal(phi, there, Q)
    with torch.no_grad():
        before = attention(y, media.flatten(1, 2), mask)[0]
        assert not before[phi[0] == 0].any() and not before[phi[0] >= 3].any(), "a word without an image gets something"
        for m in (1, 2, 3):
            other = media.clone()
            other[0, m - 1] += 1
            changed = (attention(y, other.flatten(1, 2), mask)[0] != before).any(dim=-1)
            assert changed.tolist() == [p == m and m < 3 for p in phi[0].tolist()], f"image {m}"


def test_7_1_rows_are_counted_for_themselves(draw):
    tags = torch.rand(5, 7, generator=draw.generator) < 0.5
    for count in (masks.last_image, masks.next_image):
        assert count(tags).tolist() == [count(row[None])[0].tolist() for row in tags], "a row is counted with the others"


def test_7_1_made_where_the_text_is(draw):
    tags, there = torch.ones(2, 5, dtype=torch.bool, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert masks.last_image(tags).device.type == masks.next_image(tags).device.type == "meta"
    phi = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    for all_previous in (False, True):
        assert masks.image_causal(phi, there, 2, all_previous).device.type == "meta"


# --- 7.2 any clip becomes a few latents ---

def numbers(part: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in part.named_parameters()}


def norm(w, name, x, eps=1e-5):
    middle = x - x.mean(-1, keepdims=True)
    return middle / np.sqrt((middle ** 2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name, x, context, heads, mask=None):
    """One head after the other, without biases; a row whose mask is all False gives zero. → what comes out, weights (n, H, T, S)."""
    q, k, v = x @ w[f"{name}.query.weight"].T, context @ w[f"{name}.key.weight"].T, context @ w[f"{name}.value.weight"].T
    d, out, weights = q.shape[-1] // heads, np.zeros(q.shape), np.zeros((len(q), heads, q.shape[1], k.shape[1]))
    mask = np.ones((len(q), q.shape[1], k.shape[1]), dtype=bool) if mask is None else mask
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = np.exp(q[:, :, part] @ k[:, :, part].transpose(0, 2, 1) / math.sqrt(d)) * mask
        total = scores.sum(-1, keepdims=True)
        weights[:, h] = scores / np.where(total == 0, 1, total)
        out[:, :, part] = weights[:, h] @ v[:, :, part]
    return out @ w[f"{name}.out.weight"].T, weights


def feed(w, name, x):
    return np.maximum(x @ w[f"{name}.up.weight"].T, 0) ** 2 @ w[f"{name}.down.weight"].T  # relu(x)²


def layer_by_hand(w, x, features, heads, prefix=""):
    latents = norm(w, f"{prefix}norm_latents", x)
    context = np.concatenate([norm(w, f"{prefix}norm_features", features), latents], axis=1)
    told, weights = attend(w, f"{prefix}attention", latents, context, heads)
    x = x + told
    return x + feed(w, f"{prefix}feedforward", norm(w, f"{prefix}norm", x)), weights


def between(times: np.ndarray, frames: int) -> np.ndarray:
    """The learned times for so many frames: the first ones, or on straight lines between them, ends in their places."""
    rows = []
    for f in range(frames):
        place = f if frames <= len(times) else f * (len(times) - 1) / (frames - 1)
        low = min(int(place), len(times) - 2)
        rows.append(times[low] + (place - low) * (times[low + 1] - times[low]))
    return np.stack(rows)


def resampler_by_hand(resampler, features):
    w, x = numbers(resampler), features.double().numpy()
    n, frames = x.shape[:2]
    if "times" in w:
        moments = between(w["times"], frames)
        for f in range(frames):
            x[:, f] += moments[f]
    x, latents, maps = np.concatenate([x[:, f] for f in range(frames)], axis=1), np.stack([w["latents"]] * n), []
    for i in range(resampler.config.layers):
        latents, weights = layer_by_hand(w, latents, x, resampler.config.heads, f"layers.{i}.")
        maps.append(weights)
    return norm(w, "norm", latents), maps


def as_tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float()


def test_7_2_equals_numpy(draw):
    resampler = draw.bite(PerceiverResampler(RESAMPLER), 0.15)
    for frames in (3, 1, 4, 7):  # as many as were learned, fewer, and more
        n, N = draw.sizes(2, 2, 6)
        features = draw.randn(n, frames, N, D_V)
        close(resampler(features.clone()), as_tensor(resampler_by_hand(resampler, features.clone())[0]))


def test_7_2_one_layer(draw):
    layer = draw.bite(Layer(RESAMPLER), 0.15)
    x, features = draw.randn(5, Q, D_V), 2 + 3 * draw.randn(5, 7, D_V)
    close(layer(x.clone(), features.clone()), as_tensor(layer_by_hand(numbers(layer), x.double().numpy(), features.double().numpy(), 2)[0]))


def test_7_2_times_lie_on_straight_lines(draw):
    times = draw.randn(4, 5)
    for frames in (1, 2, 3, 4, 5, 7, 10, 30):
        close(stretched(times, frames), as_tensor(between(times.double().numpy(), frames)))
    close(stretched(torch.tensor([[0.0, 3.0], [2.0, 5.0], [6.0, 1.0]]), 5), torch.tensor([[0.0, 3], [1, 4], [2, 5], [4, 3], [6, 1]]))


def test_7_2_a_frame_has_a_time_and_a_cell_has_no_place(draw):
    resampler = draw.bite(PerceiverResampler(RESAMPLER), 0.15)
    features = draw.randn(2, 3, 5, D_V)
    with torch.no_grad():
        got = resampler(features)
        close(resampler(features[:, :, draw.order(5)]), got)
        assert (resampler(features.flip(1)) - got).abs().max() > 1e-3, "frames in another order are the same to it"
        timeless = draw.bite(PerceiverResampler(replace(RESAMPLER, frames=0)), 0.15)
        close(timeless(features.flip(1)), timeless(features))
        close(timeless(features.clone()), as_tensor(resampler_by_hand(timeless, features.clone())[0]))


def test_7_2_five_pictures_are_five_times_one_picture(draw):
    """Each stands at time 0, and knows nothing of the others."""
    resampler = draw.bite(PerceiverResampler(RESAMPLER), 0.15)
    features = draw.randn(5, 1, 6, D_V)
    close(resampler(features), torch.cat([resampler(own[None]) for own in features]))


def test_7_2_maps_are_the_weights_of_each_layer(draw):
    """Columns: the F · N features, then the Q latents."""
    resampler, maps, one = draw.bite(PerceiverResampler(RESAMPLER), 0.15), [], []
    features = draw.randn(2, 3, 5, D_V)
    resampler(features.clone(), maps)
    want = resampler_by_hand(resampler, features.clone())[1]
    assert len(maps) == len(want), f"{len(maps)} maps of {len(want)} layers"
    for got, weights in zip(maps, want):
        close(got, as_tensor(weights))
    resampler.layers[0](draw.randn(2, Q, D_V), draw.randn(2, 5, D_V), one)
    assert [m.shape for m in one] == [(2, 2, Q, 5 + Q)]


def test_7_2_what_came_in_is_left_as_it_was(draw):
    resampler, features = draw.bite(PerceiverResampler(RESAMPLER), 0.15), draw.randn(2, 3, 5, D_V)
    kept, latents = features.clone(), resampler.latents.detach().clone()
    with torch.no_grad():
        resampler(features)
    assert torch.equal(features, kept) and torch.equal(resampler.latents, latents)


def test_7_2_all_that_is_learned_feels_the_loss(draw):
    resampler = draw.bite(PerceiverResampler(RESAMPLER), 0.15)
    for frames in (4, 7):
        resampler.zero_grad()
        resampler(draw.randn(2, frames, 5, D_V)).square().sum().backward()
        silent = [name for name, p in resampler.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent, f"no gradient: {silent}"


# --- 7.3 two gates that start shut ---

def gated(draw, alpha=0.8, beta=-0.5, **sizes) -> GatedCrossAttention:
    block = draw.bite(GatedCrossAttention(D, D_V, 3, **sizes), 0.15)
    with torch.no_grad():
        block.attention_gate.fill_(alpha)
        block.dense_gate.fill_(beta)
    return block


def gated_by_hand(block, y, media, mask):
    w = numbers(block)
    told, weights = attend(w, "attention", norm(w, "norm1", y), media, block.attention.heads, mask)
    y = y + math.tanh(block.attention_gate.item()) * told
    return y + math.tanh(block.dense_gate.item()) * feed(w, "feedforward", norm(w, "norm2", y)), weights


def some(draw, B=2, T=5, S=7):
    """Words, media, and a mask under which the second word of the first row sees nothing."""
    mask = draw.mask(B, T, S)
    mask[0, 1] = False
    return 1 + 2 * draw.randn(B, T, D), 1 + 2 * draw.randn(B, S, D_V), mask


@pytest.mark.parametrize("head_dim", [None, 5])
def test_7_3_equals_numpy(draw, head_dim):
    block = gated(draw, head_dim=head_dim)
    y, media, mask = some(draw)
    want, _ = gated_by_hand(block, y.double().numpy(), media.double().numpy(), mask.numpy())
    close(block(y.clone(), media, mask), as_tensor(want))


def test_7_3_closed_gates_leave_the_words_bit_for_bit(draw):
    y, media, mask = some(draw)
    with torch.no_grad():
        got = gated(draw, 0.0, 0.0)(y.clone(), media, mask)
    assert torch.equal(got, y), f"off by {(got - y).abs().max():.2g}: with closed gates the words are to stay as they are"


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.0), (0.0, 0.9), (3.0, -3.0)])
def test_7_3_each_part_has_its_own_gate(draw, alpha, beta):
    block = gated(draw, alpha, beta)
    y, media, mask = some(draw)
    want, _ = gated_by_hand(block, y.double().numpy(), media.double().numpy(), mask.numpy())
    close(block(y.clone(), media, mask), as_tensor(want), 1e-4)


def test_7_3_a_word_without_an_image_gets_nothing_from_the_attention(draw):
    y, media, mask = some(draw)
    with torch.no_grad():
        got = gated(draw, 0.8, 0.0)(y.clone(), media, mask)
        fed = gated(draw, 0.8, 0.7)(y.clone(), media, mask)
    assert torch.equal(got[0, 1], y[0, 1]) and (got[0, 0] != y[0, 0]).any()
    assert (fed[0, 1] != y[0, 1]).any(), "the feed-forward acts on words without an image, too"


def test_7_3_the_media_are_read_once(draw):
    """With a cache the second call does not look at its media again."""
    block, cache = gated(draw), LayerCache()
    y, media, mask = some(draw)
    with torch.no_grad():
        whole = block(y, media, mask)
        first = block(y[:, :3], media, mask[:, :3], cache)
        rest = block(y[:, 3:], draw.randn(*media.shape), mask[:, 3:], cache)
    close(torch.cat([first, rest], dim=1), whole)
    assert cache.keys.shape[2] == media.shape[1]


def test_7_3_maps_are_the_weights(draw):
    block, maps = gated(draw), []
    y, media, mask = some(draw)
    mask[0, 1] = True
    block(y, media, mask, maps=maps)
    assert len(maps) == 1
    close(maps[0], as_tensor(gated_by_hand(block, y.double().numpy(), media.double().numpy(), mask.numpy())[1]))


def test_7_3_at_first_only_the_gates_feel_the_loss(draw):
    block = gated(draw, 0.0, 0.0)
    y, media, mask = some(draw)
    (block(y, media, mask) * draw.randn(*y.shape)).sum().backward()
    for name, p in block.named_parameters():
        felt = p.grad is not None and bool(p.grad.any())
        assert felt == ("gate" in name), f"{name} {'has' if felt else 'has no'} gradient"


# --- 7.4 pictures between the lines, and a cache that knows where it is ---

def flamingo(draw, **changes) -> Flamingo:
    torch.manual_seed(draw.random.getrandbits(30))
    model = draw.bite(Flamingo(replace(CONFIG, **changes)), 0.15)
    with torch.no_grad():
        for block in model.gated_xattn.values():
            block.attention_gate.fill_(0.9)
            block.dense_gate.fill_(-0.6)
    return model


def page(draw, *rows: str, M: int = 3) -> dict[str, Tensor]:
    """"i" is a tag, "e" an <EOC>, "w" a word, "." padding, "x" a tag that stands under padding; each row's images are there."""
    words = draw.ids(len(rows), len(rows[0]), low=5, high=V).tolist()
    ids = torch.tensor([[{"i": TAG, "x": TAG, "e": CLOSE, ".": 0}.get(kind, word) for kind, word in zip(row, line)] for row, line in zip(rows, words)])
    frames = torch.tensor([[int(m < row.count("i")) for m in range(M)] for row in rows])
    return {"images": draw.randn(len(rows), M, 1, 3, 12, 12), "frames": frames, "input_ids": ids,
            "attention_mask": torch.tensor([[kind not in ".x" for kind in row] for row in rows])}


def by_hand(model: Flamingo, batch: dict[str, Tensor], all_previous: bool = False) -> Tensor:
    """The decoder with each gated layer put in by hand, and a mask made token by token."""
    ids, real = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    backwards = batch["backwards"].tolist() if "backwards" in batch else [False] * len(ids)
    B, T, M = len(ids), len(ids[0]), batch["frames"].shape[1]
    mask = torch.zeros(B, T, M * Q, dtype=torch.bool)
    for b in range(B):
        tags = [ids[b][t] == TAG and real[b][t] for t in range(T)]
        before, behind = counted(tags)
        for t in range(T):
            phi = behind[t] if backwards[b] else before[t]
            for m in range(1, M + 1):
                if (m <= phi if all_previous else m == phi) and batch["frames"][b, m - 1] > 0:
                    mask[b, t, (m - 1) * Q:m * Q] = True
    media = model.look(batch["images"], batch["frames"]).reshape(B, M * Q, D_V)
    config = model.config

    def put_in(i, y, cache):
        stands = i >= config.first and (i - config.first) % config.every == 0
        return model.gated_xattn[str(i)](y, media, mask) if stands else y
    return model.language(inputs_embeds=model.embed(batch["input_ids"]), attention_mask=batch["attention_mask"], before_block=put_in)


@pytest.mark.parametrize(("every", "first"), [(2, 0), (2, 1), (1, 0), (3, 1)])
def test_7_4_a_page_by_hand(draw, every, first):
    model = flamingo(draw, every=every, first=first)
    batch = page(draw, "wiwwiew", "x.wwiwi", "wwwwwww", "iiiwwew")
    batch["frames"][0, 1] = 0  # a tag whose image is not there
    with torch.no_grad():
        close(model.read(batch), by_hand(model, batch), 5e-5)


def test_7_4_on_some_pages_texts_stand_before_their_images(draw):
    model = flamingo(draw)
    batch = page(draw, "wwiwiww", "wwiwiww", "wiwwiw.") | {"backwards": torch.tensor([True, False, True])}
    with torch.no_grad():
        close(model.read(batch), by_hand(model, batch), 5e-5)


def test_7_4_all_images_before(draw):
    """One that is not there takes no share of what is looked at."""
    model = flamingo(draw, all_previous=True)
    batch = page(draw, "wiwwiew", "iiiwwew")
    batch["frames"][1, 1] = 0
    with torch.no_grad():
        close(model.read(batch), by_hand(model, batch, all_previous=True), 5e-5)


def test_7_4_between_gated_layers_nothing_happens(draw):
    """before_block: a gated layer before block 0, 2, 4, and what comes in before the others."""
    model, y, phi = flamingo(draw), draw.randn(2, 4, D), torch.tensor([[0, 1, 2, 2], [1, 1, 1, 3]])
    media, there, maps = draw.randn(2, 2, Q, D_V), torch.tensor([[True, True], [True, False]]), []
    look = model.before_block(media, there, phi, maps)
    with torch.no_grad():
        for i in range(LAYERS):
            out = look(i, y, None)
            if i % 2:
                assert out is y or torch.equal(out, y), f"before block {i} stands no gated layer"
                continue
            mask = torch.zeros(2, 4, 2 * Q, dtype=torch.bool)
            for b, t in ((0, 1), (1, 0), (1, 1), (1, 2)):
                mask[b, t, :Q] = True
            mask[0, 2:, Q:] = True
            close(out, model.gated_xattn[str(i)](y, media.reshape(2, 2 * Q, D_V), mask))
    assert [m.shape for m in maps] == [(2, 4, 4, 2 * Q)] * 3


def test_7_4_maps_of_a_page_are_those_of_its_gated_layers(draw):
    model, maps = flamingo(draw), []
    with torch.no_grad():
        model.read(page(draw, "wiwiwww", M=2), maps=maps)
    assert [m.shape for m in maps] == [(1, 4, 7, 2 * Q)] * 3


def grown(batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    return batch | {"input_ids": torch.cat([batch["input_ids"], ids], 1),
                    "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(ids, dtype=torch.bool)], 1)}


def logits_by_hand(model: Flamingo, batch: dict[str, Tensor], last: int) -> Tensor:
    return by_hand(model, batch)[:, -last:] @ model.head_weight.T


def test_7_4_steps_go_on_where_the_prompt_was_read(draw):
    """Rows that have arrived at different images; new words, and tags among them whose images the prompt brought."""
    model, batch = flamingo(draw), page(draw, "..wiwwi", "wwwwwww", ".wiwwww")
    batch["frames"] = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    w = draw.ids(3, 9, low=5, high=V)
    w[0, 3], w[1, 4], w[2, 1], w[2, 6] = TAG, TAG, TAG, TAG  # the last of them has no image
    with torch.no_grad():
        cache, parts, at = KVCache(), [], 0
        close(model.read(batch, cache), by_hand(model, batch), 5e-5)
        for length in (1, 1, 3, 1, 2, 1):
            logits, cache = model.step(w[:, at:at + length], cache)
            assert logits.shape == (3, length, V)
            parts.append(logits)
            at += length
        close(torch.cat(parts, dim=1), logits_by_hand(model, grown(batch, w), 9), 1e-4)


def test_7_4_beams_take_their_images_along(draw):
    """Rows that are exchanged between two steps keep their own images and their own count."""
    model, batch = flamingo(draw), page(draw, "..wiwiw", "wwwwwww", ".wiwwww")
    w, rows = draw.ids(3, 2, low=5, high=V), torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = KVCache()
        model.read(batch, cache)
        got, _ = model.step(w, cache.reorder(rows))
        close(got, logits_by_hand(model, grown({name: t[rows] for name, t in batch.items()}, w), 2), 1e-4)


def test_7_4_media_are_read_once_for_each_gated_layer(draw):
    model, batch, calls = flamingo(draw), page(draw, "wiwiwww", M=2), Counter()
    for name, block in model.gated_xattn.items():
        block.attention.key.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        cache = KVCache()
        model.read(batch, cache)
        for _ in range(3):
            _, cache = model.step(draw.ids(1, 1, low=5, high=V), cache)
    assert calls == Counter({"0": 1, "2": 1, "4": 1}), f"keys of the media were computed {dict(calls)} times in a prompt and three steps"
    assert set(cache.state) == {"media", "there", "phi"} and cache.state["phi"].tolist() == [2]


def test_7_4_with_closed_gates_it_is_the_language_model_bit_for_bit(draw):
    model, batch = flamingo(draw), page(draw, "wiwwiew", "..wwiwi")
    with torch.no_grad():
        for block in model.gated_xattn.values():
            block.attention_gate.zero_()
            block.dense_gate.zero_()
        bare = model.language(inputs_embeds=model.embed(batch["input_ids"]), attention_mask=batch["attention_mask"])
        assert torch.equal(model.read(batch), bare)


# --- 7.5 a window of a page ---

def cut(ids, labels, images, start, length, most):
    """What the window from `start` on is, token by token."""
    got_ids, got_labels, shown = [], [], []
    for place in range(len(ids)):
        mark = ids[place] == TAG
        number = sum(i == TAG for i in ids[:place])
        if place < start or length and place >= start + length:
            continue
        if mark and most and len(shown) == most:
            break
        got_ids.append(ids[place])
        got_labels.append(labels[place] if place > start else -100)
        shown += [images[number]] if mark else []
    return got_ids, got_labels, shown


def a_page(draw, n: int, marks: int):
    """Ids that say where they stand, marks among them, labels on about half, and the images' names."""
    ids = [100 + place for place in range(n)]
    for place in draw.random.sample(range(1, n), marks):
        ids[place] = TAG
    labels = [i if i != TAG and draw.random.random() < 0.6 else -100 for i in ids]
    labels[0] = ids[0]
    return ids, labels, tuple(f"{m}.jpg" for m in range(marks))


def as_lists(found) -> tuple[list, list, list]:
    return tuple(map(list, found))


def test_7_5_every_window_is_cut_by_hand(draw):
    for n, marks, length, most in ((17, 4, 9, 2), (17, 4, 9, 0), (12, 3, 12, 1), (12, 3, 20, 2), (12, 3, 0, 2), (12, 3, 0, 0), (23, 9, 10, 3), (9, 1, 8, 1)):
        ids, labels, images = a_page(draw, n, marks)
        starts = range(n - length + 1) if 0 < length < n else [0]
        every = [cut(ids, labels, images, start, length, most) for start in starts]
        for seed in range(40):
            got = as_lists(window(list(ids), list(labels), images, TAG, length, most, Random(seed)))
            assert got in every, f"no window of {length} tokens and {most} images of this page: {got}"
        assert as_lists(window(list(ids), list(labels), images, TAG, length, most, None)) == every[0]


def test_7_5_the_windows_of_a_small_page(draw):
    """<s> a <image> b c <image> d <image> e: five tokens from the fourth place on, and one image at most."""
    ids, labels = [1, 10, TAG, 11, 12, TAG, 13, TAG, 14], [-100, 10, -100, 11, 12, -100, 13, -100, 14]
    found = {tuple(map(tuple, window(ids, labels, ("x", "y", "z"), TAG, 5, 1, Random(seed)))) for seed in range(60)}
    assert found == {
        ((1, 10, TAG, 11, 12), (-100, 10, -100, 11, 12), ("x",)),
        ((10, TAG, 11, 12), (-100, -100, 11, 12), ("x",)),
        ((TAG, 11, 12), (-100, 11, 12), ("x",)),
        ((11, 12, TAG, 13), (-100, 12, -100, 13), ("y",)),
        ((12, TAG, 13), (-100, -100, 13), ("y",))}


def test_7_5_any_start_is_as_likely(draw):
    """4,000 draws of 9 starts. More than 5 standard deviations off: once in 1.7 million cells, 9 cells here."""
    ids, labels, images = list(range(100, 114)), list(range(100, 114)), ()
    rng, n = Random(draw.random.getrandbits(30)), 4000
    counts = Counter(window(ids, labels, images, TAG, 6, 2, rng)[0][0] - 100 for _ in range(n))
    assert set(counts) == set(range(9)), f"it begins at {sorted(counts)}, wanted 0 to 8"
    for start, count in counts.items():
        assert abs(count - n / 9) <= 5 * math.sqrt(n * 8 / 81), f"start {start}: {count / n:.3f}, wanted {1 / 9:.3f}"
    assert {window(ids, labels, images, TAG, 1, 2, rng)[0][0] for _ in range(400)} == set(ids), "a window of one token may be anywhere, too"


def test_7_5_marks_and_images_fit(draw):
    """As many images as marks, and none too many, in 300 windows of a long page."""
    ids, labels, images = a_page(draw, 60, 20)
    for seed in range(300):
        row, row_labels, shown = window(ids, labels, images, TAG, 25, 4, Random(seed))
        marks = list(row).count(TAG)
        assert len(shown) == marks <= 4, f"{marks} marks, {len(shown)} images"
        assert len(row) == len(row_labels) and row_labels[0] == -100


def test_7_5_a_question_loses_nothing_by_chance(draw):
    """Without rng it is the page's beginning; the page itself is left as it was."""
    ids, labels, images = a_page(draw, 15, 3)
    kept = list(ids), list(labels)
    got = as_lists(window(ids, labels, images, TAG, 7, 5, None))
    assert got == cut(ids, labels, images, 0, 7, 5) and (ids, labels) == kept


# --- 7.6 examples before a question ---

def shown(name: str, asked: str = "", images: int = 1) -> Sample:
    return Sample(name, tuple(f"{name}{i}.jpg" for i in range(images)), turns=(Turn(IMAGE * images + asked, f" {name} ", "names"),))


def test_7_6_the_prompt_to_the_letter(draw):
    """Turns and pictures in the order in which they are read, and the format "flamingo"."""
    query, dax, wug = shown("blik"), shown("dax"), shown("wug", "what is it? ", images=2)
    got = fewshot.with_examples(query, [dax, wug])
    assert got.images == ("dax0.jpg", "wug0.jpg", "wug1.jpg", "blik0.jpg")
    assert [(t.question, t.answer, t.kind) for t in got.turns] == [
        ("<image>", "dax", "names"), ("<image><image>what is it?", "wug", "names"), ("<image>", " blik ", "names")]
    assert got.format == "flamingo" and got.id == "blik"
    none = fewshot.zero_shot(query, [dax, wug, shown("toma")])
    assert none.images == ("blik0.jpg",) and none.format == "flamingo"
    assert [(t.question, t.answer) for t in none.turns] == [("", "dax"), ("what is it?", "wug"), ("<image>", " blik ")]


def test_7_6_of_a_conversation_the_last_question_is_the_example(draw):
    talk = Sample("talk", ("a.jpg", "b.jpg"), turns=(Turn(f"{IMAGE}{IMAGE}\nwho?", "she"), Turn(" and where? ", " here ", "place")))
    turn = fewshot.worked(talk)
    assert (turn.question, turn.answer, turn.kind) == ("<image><image>and where?", "here", "place")
    assert (fewshot.worked(replace(talk, images=())).question) == "and where?"


def test_7_6_the_query_keeps_its_own_turns(draw):
    talk = Sample("talk", ("a.jpg",), turns=(Turn(f"{IMAGE}who?", "she"), Turn("where?", "")), caption="c", label="l")
    got = fewshot.with_examples(talk, [shown("dax")])
    assert got.turns[1:] == talk.turns and got.images == ("dax0.jpg", "a.jpg") and (got.caption, got.label) == ("c", "l")
    assert fewshot.with_examples(talk, []) == replace(talk, format="flamingo")


NAMES = ("dax", "wug", "blik", "toma")


def said(sample: Sample) -> list[str]:
    return [turn.answer.strip() for turn in sample.turns]


def test_7_6_fewer_shots_are_those_next_to_the_query(draw):
    episode = Episode(shown("fep"), [shown(name) for name in NAMES])
    for shots in (1, 2, 3, 4):
        (got,) = fewshot.prompts(episode, shots)
        assert said(got) == [*NAMES[len(NAMES) - shots:], "fep"], f"{shots} shots"
        assert got.images == tuple(f"{name}0.jpg" for name in (*NAMES[len(NAMES) - shots:], "fep"))
    (open_,) = fewshot.prompts(episode, 0)
    assert said(open_) == ["dax", "wug", "fep"] and open_.images == ("fep0.jpg",), "open answers: two examples in words"
    (closed,) = fewshot.prompts(replace(episode, among=("yes", "no")), 0)
    assert said(closed) == ["fep"], "answers to choose from need no example of what an answer looks like"
    (closed,) = fewshot.prompts(replace(episode, among=("yes", "no")), 2)
    assert said(closed) == ["blik", "toma", "fep"]


def test_7_6_several_orders(draw):
    episode = Episode(shown("fep"), [shown(name) for name in NAMES])
    got = fewshot.prompts(episode, 3, several=4)
    assert len(got) == 4 and said(got[0]) == ["wug", "blik", "toma", "fep"]
    assert len({tuple(said(one)) for one in got}) == 4
    assert all(sorted(said(one)[:-1]) == sorted(NAMES[1:]) and said(one)[-1] == "fep" for one in got)
    assert all(one.images == tuple(f"{name}0.jpg" for name in said(one)) for one in got), "pictures go with their answers"
    assert len(fewshot.prompts(episode, 2, several=9)) == 2


def test_7_6_more_shots_than_examples_are_refused(draw):
    episode = Episode(shown("fep"), [shown(name) for name in NAMES])
    assert said(fewshot.prompts(episode, 4)[0])[:-1] == list(NAMES)
    for among in ((), ("yes", "no")):
        with pytest.raises(UserError):
            fewshot.prompts(replace(episode, among=among), 5)
    vectors = torch.nn.functional.normalize(draw.randn(4, 6), dim=-1)
    assert len(fewshot.rices(vectors[0], vectors, list(episode.examples), 4)) == 4
    with pytest.raises(UserError):
        fewshot.rices(vectors[0], vectors, list(episode.examples), 5)


@pytest.mark.parametrize("shots", [0, 1, 3, 8])
def test_7_6_rices_puts_the_most_similar_last(draw, shots):
    features, query = (torch.nn.functional.normalize(draw.randn(*shape), dim=-1) for shape in ((8, 5), (5,)))
    support = [shown(f"s{i}") for i in range(8)]
    alike = [sum(float(a) * float(b) for a, b in zip(row, query)) for row in features]
    want = sorted(range(8), key=lambda i: alike[i])[8 - shots:]
    assert [sample.id for sample in fewshot.rices(query, features, support, shots)] == [f"s{i}" for i in want]
