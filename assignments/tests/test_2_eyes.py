"""Assignment 2. Oracles: a ViT in numpy, patches cut out by slicing, bicubic weights by hand, loops over pairs and their groups."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from assignments.draw import close
from nanovlm.bert import BertConfig
from nanovlm.contrastive import contrastive_loss
from nanovlm.decoder import clip_text
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers.clip import CLIP, CLIPConfig
from nanovlm.vit import Block, ViT, clip_vit, imagenet_vit, interpolate_positions

D, PATCH = 12, 3
PLAIN = clip_vit(4 * PATCH, PATCH, D, 3, 2)  # 4 × 4 patches
CONFIGS = {"CLIP": PLAIN, "ImageNet": imagenet_vit(4 * PATCH, PATCH, D, 3, 3),
           "EVA": replace(imagenet_vit(4 * PATCH, PATCH, D, 2, 2), bias="qvo", final_norm=False)}

# --- 2.1 a picture is read like a sentence ---

def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(w, name, x, eps):
    middle = x - x.mean(-1, keepdims=True)
    return middle / np.sqrt((middle ** 2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name, x, heads):
    """→ what the heads say together, and their weights (B, H, N, N)."""
    q, k, v = (linear(w, f"{name}.{part}", x) for part in ("query", "key", "value"))
    d, out, maps = q.shape[-1] // heads, np.zeros(q.shape), []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, :, part] @ k[:, :, part].transpose(0, 2, 1) / math.sqrt(d)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(weights / weights.sum(-1, keepdims=True))
        out[:, :, part] = maps[-1] @ v[:, :, part]
    return linear(w, f"{name}.out", out), np.stack(maps, axis=1)


def block_by_hand(w, config, x):
    """Eq. 2 and 3: x = x + Attention(norm₁(x)), then x = x + FeedForward(norm₂(x))."""
    added, maps = attend(w, "attention", norm(w, "norm1", x, config.eps), config.heads)
    x = x + added
    hidden = linear(w, "feedforward.up", norm(w, "norm2", x, config.eps))
    if config.activation == "quick_gelu":
        hidden = hidden / (1 + np.exp(-1.702 * hidden))
    else:
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(w, "feedforward.down", hidden), maps


def numbers(module):
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def tokens_by_hand(model, images, depth=None, positions=None):
    """Patch by patch, line by line, the class token in front → tokens, and each block's weights."""
    config, w = model.config, numbers(model)
    B, _, height, width = images.shape
    kernel, rows = w["patch_embedding.weight"], []
    for top, left in product(range(0, height, config.patch), range(0, width, config.patch)):
        patch = images[:, :, top:top + config.patch, left:left + config.patch].double().numpy()
        rows.append(np.einsum("bcij,dcij->bd", patch, kernel) + w.get("patch_embedding.bias", 0))
    x = np.stack([np.broadcast_to(w["class_token"], (B, D)), *rows], axis=1) + (w["positions"] if positions is None else positions)
    if config.pre_norm:
        x = norm(w, "pre_norm", x, config.eps)
    maps = []
    for block in list(model.blocks)[:depth]:
        x, weights = block_by_hand(numbers(block), config, x)
        maps.append(weights)
    return torch.from_numpy(x), maps


def vit(draw, kind="CLIP"):
    return draw.bite(ViT(CONFIGS[kind]))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_2_1_equals_numpy(draw, kind):
    model, images = vit(draw, kind), draw.randn(2, 3, 12, 12)
    for depth in (None, 0, 1, 2):
        want, weights = tokens_by_hand(model, images, depth)
        for maps in (None, []):
            close(model(images, depth, maps=maps), want, 3e-5)
        assert len(maps) == len(weights), f"weights of {len(maps)} blocks, wanted {len(weights)}"
        for got, wanted in zip(maps, weights, strict=True):
            close(got, torch.from_numpy(wanted))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_2_1_one_block_equals_numpy(draw, kind):
    config = CONFIGS[kind]
    block, x, maps = draw.bite(Block(config)), draw.randn(2, 5, D), []
    want, weights = block_by_hand(numbers(block), config, x.double().numpy())
    close(block(x), torch.from_numpy(want))
    close(block(x, maps), torch.from_numpy(want))
    assert len(maps) == 1
    close(maps[0], torch.from_numpy(weights))


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2), (4, 4), (3, 1)])
def test_2_1_a_patch_moves_the_token_of_its_row(draw, rows, columns):
    """Line by line, not column by column; what is left over at the edge of a picture is not seen."""
    model, images = vit(draw), draw.randn(1, 3, rows * PATCH + 1, columns * PATCH + 2)
    before = model(images, 0)
    assert before.shape == (1, 1 + rows * columns, D)
    for row, column in product(range(rows), range(columns)):
        changed = images.clone()
        changed[:, 1, row * PATCH + 2, column * PATCH + 1] += 1
        moved = (model(changed, 0) != before).any(dim=2)[0].nonzero()[:, 0].tolist()
        assert moved == [1 + row * columns + column], f"patch {row, column} moves tokens {moved}"


@pytest.mark.parametrize("align", [False, True])
def test_2_1_another_grid_has_stretched_positions(draw, align):
    model, images = draw.bite(ViT(replace(PLAIN, align_corners=align))), draw.randn(2, 3, 2 * PATCH, 5 * PATCH)
    positions = stretched(model.positions.detach(), 2, 5, align).numpy()
    close(model(images), tokens_by_hand(model, images, None, positions)[0], 3e-5)


def test_2_1_pictures_come_in_the_weights_precision(draw):
    """Pictures are fp32 whatever the weights are."""
    model, images = vit(draw).bfloat16(), draw.randn(1, 3, 12, 12)
    got = model(images)
    assert got.dtype == torch.bfloat16
    close(got, model(images.bfloat16()))


# --- 2.2 the same eyes on another grid ---

def cubic(x):
    """Keys' kernel with a = −0.75, as torch has it."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
    return a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0


def along(n, m, align):
    """How much of each of n old places is in each of m new ones: (m, n); beyond the edge the edge goes on."""
    weights = torch.zeros(m, n, dtype=torch.float64)
    for new in range(m):
        old = new * (n - 1) / max(1, m - 1) if align else (new + 0.5) * n / m - 0.5
        for k in range(math.floor(old) - 1, math.floor(old) + 3):
            weights[new, min(max(k, 0), n - 1)] += cubic(old - k)
    return weights


def stretched(positions, rows, columns, align):
    side = math.isqrt(len(positions) - 1)
    down, across, out = along(side, rows, align), along(side, columns, align), [positions[0].double()]
    for row, column in product(range(rows), range(columns)):
        out.append(sum(down[row, i] * across[column, j] * positions[1 + i * side + j].double() for i, j in product(range(side), range(side))))
    return torch.stack(out)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("side", "rows", "columns"), [(3, 2, 5), (3, 5, 2), (2, 4, 4), (4, 3, 3), (3, 1, 6), (5, 7, 4), (4, 2, 8), (3, 3, 5)])
def test_2_2_equals_a_loop(draw, side, rows, columns, align):
    positions = draw.randn(1 + side * side, 6)
    got = interpolate_positions(positions, rows, columns, align)
    close(got, stretched(positions, rows, columns, align), 1e-5)
    assert torch.equal(got[0], positions[0]), "the class token stands nowhere: its position stays as it is"


def test_2_2_unless_told_corners_are_not_aligned(draw):
    positions = draw.randn(10, 4)
    close(interpolate_positions(positions, 5, 6), stretched(positions, 5, 6, False), 1e-5)


def test_2_2_its_own_grid_is_left_alone(draw):
    for side in (1, 2, 3, 7):
        positions = draw.randn(1 + side * side, 5)
        for align in (False, True):
            assert torch.equal(interpolate_positions(positions, side, side, align), positions)


def test_2_2_half_precision_goes_through_full(draw):
    """Resized in fp32, then rounded once: no number is off by more than half of bf16's last bit, 1/256 of it."""
    positions = draw.randn(10, 14).bfloat16()
    got, want = interpolate_positions(positions, 5, 4), stretched(positions.float(), 5, 4, False)
    assert got.dtype == torch.bfloat16
    close(got, want, 0.02)
    off = ((got.double() - want).abs() - 1e-5) / want.abs()
    assert off.max() <= 1 / 250, f"off by 1/{1 / off.max():.0f} of the number, allowed 1/250"


def test_2_2_gradients_reach_all_positions(draw):
    positions = draw.randn(10, 4).requires_grad_()
    gradient, = torch.autograd.grad(interpolate_positions(positions, 6, 5).sum(), positions)
    assert (gradient.abs() > 1e-3).all()


# --- 2.3 find your own caption ---

def loss_by_hand(i2t, t2i, right, negatives, smoothing):
    """Row by row: −Σ target · log p, the target shared between all that are right, a part of it spread over all candidates."""
    total = 0.0
    for b in range(len(right)):
        good = [g for g in range(right.shape[1]) if right[b, g]]
        for scores in (i2t[b].tolist() + (negatives[b].tolist() if negatives is not None else []), t2i[b].tolist()):
            top = max(scores)
            log_sum = top + math.log(math.fsum(math.exp(score - top) for score in scores))
            for place, score in enumerate(scores):
                target = (1 - smoothing) / len(good) * (place in good) + smoothing / len(scores)
                total += target * (log_sum - score) / 2
    return total


def table(draw, B=3, G=7):
    """Similarities of B pairs with G; the own pair is right, and in some rows others too."""
    right = torch.zeros(B, G, dtype=torch.bool)
    right[range(B), range(1, B + 1)] = True
    right[0, 5] = right[0, 6] = right[2, 0] = True
    return 3 * draw.randn(B, G), 3 * draw.randn(B, G), right


@pytest.mark.parametrize("with_negatives", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_2_3_is_a_loop(draw, with_negatives, smoothing):
    (i2t, t2i, right), negatives = table(draw), 3 * draw.randn(3, 4) if with_negatives else None
    total, count = contrastive_loss(i2t, t2i, right, negatives, smoothing)
    assert int(count) == 3 and count.shape == total.shape == ()
    want = loss_by_hand(i2t, t2i, right, negatives, smoothing)
    close(total, torch.tensor(want), 1e-5 * want)
    if not smoothing and not with_negatives:
        close(contrastive_loss(i2t, t2i, right)[0], torch.tensor(want), 1e-5 * want)


@pytest.mark.parametrize("with_negatives", [False, True])
def test_2_3_gradients(draw, with_negatives):
    """p − target, halved, in each direction."""
    (i2t, t2i, right), negatives = table(draw), 3 * draw.randn(3, 4) if with_negatives else draw.randn(3, 0)
    inputs = [x.double().requires_grad_() for x in (i2t, t2i, negatives)]
    total, _ = contrastive_loss(inputs[0], inputs[1], right, inputs[2] if with_negatives else None)
    got = torch.autograd.grad(total, inputs if with_negatives else inputs[:2])
    target = right.double() / right.sum(dim=1, keepdim=True)
    p = torch.cat([inputs[0], inputs[2]], dim=1).softmax(dim=1)
    want = [(p[:, :7] - target) / 2, (inputs[1].softmax(dim=1) - target) / 2, p[:, 7:] / 2]
    for a, b in zip(got, want):
        close(a, b.detach(), 1e-6)


def test_2_3_a_caption_that_is_repeated_is_no_negative(draw):
    """Of two equal texts both are right; a loss of 0 is then out of reach, and half and half is best."""
    right = torch.tensor([[True, True, False]])
    even = torch.tensor([[30.0, 30.0, 0.0]])
    close(contrastive_loss(even, even, right)[0], torch.tensor(math.log(2)), 1e-4)
    assert contrastive_loss(even + torch.tensor([5.0, 0, 0]), even, right)[0] > math.log(2) + 0.5


def test_2_3_a_blind_guess_costs_ln_g_and_a_sure_one_nothing(draw):
    B, K = draw.sizes(2, 3, 9)
    right, none = torch.eye(B, dtype=torch.bool), torch.zeros(B, B)
    close(contrastive_loss(none, none, right)[0] / B, torch.tensor(math.log(B)))
    close(contrastive_loss(none, none, right, torch.zeros(B, K))[0] / B, torch.tensor((math.log(B) + math.log(B + K)) / 2))
    sure = 100.0 * right
    close(contrastive_loss(sure, sure, right, torch.zeros(B, K))[0], torch.tensor(0.0))


def test_2_3_made_where_the_table_is(draw):
    i2t, t2i, right = table(draw)
    want = loss_by_hand(i2t, t2i, right, i2t[:, :2], 0.0)
    with torch.device("meta"):  # what is made without `device` does not go with the rest
        total, count = contrastive_loss(i2t, t2i, right, i2t[:, :2])
    assert count.device.type == total.device.type == "cpu" and int(count) == 3
    close(total, torch.tensor(want), 1e-4)


# --- 2.4 one vector for a picture, one for a sentence ---

EMBEDDING, VOCAB = 10, 29
TOKEN = CLIPConfig(replace(PLAIN, layers=2), clip_text(VOCAB, 8, 2, 2, max_positions=20), EMBEDDING)
MEAN = CLIPConfig(NFNetConfig(12, (1, 1), (8, 16), (1, 2), ((4, 2),), group_width=4, final=14),
                  BertConfig(VOCAB, 8, 2, 2, 16, max_positions=20, dropout=0.0), EMBEDDING, pool="mean")


def clip(draw, config=TOKEN):
    return draw.bite(CLIP(config), 0.4)


def unit(x):
    x = x.double()
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


def test_2_4_the_class_token_speaks_for_the_picture(draw):
    model, images = clip(draw), draw.randn(3, 3, 12, 12)
    w, tokens = numbers(model.vision), tokens_by_hand(model.vision, images)[0].numpy()
    picture = norm(w, "norm", tokens[:, 0], PLAIN.eps)
    want = unit(torch.from_numpy(picture) @ model.image_projection.weight.detach().double().T)
    close(model.encode_image(images), want, 3e-5)


def alone(model, ids, length):
    """A text by itself, without padding: all its states (length, D)."""
    row = ids[:length][None]
    return model.text(row)[0] if model.config.pool == "token" else model.text(row, torch.ones(1, 1, length, dtype=torch.bool))[0]


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_2_4_a_text_by_itself_and_among_others(draw, pool):
    """The last real token speaks, or the mean of the real ones does; what padding holds plays no part."""
    model = clip(draw, TOKEN if pool == "token" else MEAN)
    ids, real = draw.ids(5, 6, high=VOCAB), draw.padding(5, 6)
    want = []
    for row, length in zip(ids, real.sum(dim=1).tolist(), strict=True):
        states = alone(model, row, length).double()
        want.append(states[-1] if pool == "token" else states.sum(dim=0) / length)
    want = unit(torch.stack(want).detach() @ model.text_projection.weight.detach().double().T)
    for padded in (ids, ids.masked_fill(~real, 0), ids.masked_fill(~real, VOCAB - 1)):
        close(model.encode_text(padded, real), want, 3e-5)


def test_2_4_pictures_are_averaged_where_the_mean_speaks(draw):
    model, images = clip(draw, MEAN), draw.randn(3, 3, 12, 12)
    want = unit(model.vision.pooled(images).detach().double() @ model.image_projection.weight.detach().double().T)
    close(model.encode_image(images), want, 3e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_2_4_vectors_are_of_unit_length_and_learn(draw, pool):
    model = clip(draw, TOKEN if pool == "token" else MEAN)
    images, texts = model.encode_image(draw.randn(4, 3, 12, 12)), model.encode_text(draw.ids(4, 5, high=VOCAB), draw.padding(4, 5))
    for vectors, projection in ((images, model.image_projection), (texts, model.text_projection)):
        assert vectors.shape == (4, EMBEDDING)
        close(vectors.norm(dim=1), torch.ones(4))
        gradient, = torch.autograd.grad(vectors[:, 0].sum(), projection.weight)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_2_4_made_where_the_ids_are(draw, pool):
    model = clip(draw, TOKEN if pool == "token" else MEAN)
    ids, real = draw.ids(4, 5, high=VOCAB), draw.padding(4, 5)
    want = model.encode_text(ids, real)
    model.text = OnCPU(model.text)
    with torch.device("meta"):
        close(model.encode_text(ids, real), want.detach())


class OnCPU(nn.Module):
    """The text encoder makes its own tensors on the CPU, whatever is the default meanwhile."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **named):
        with torch.device("cpu"):
            return self.inner(*args, **named)


# --- 2.5 everybody's captions, and wrong ones of one's own ---

def pairs(draw, B=3, G=5, K=2, T=4):
    """G pairs over all ranks, of which B are here, at places 1 to 3; two texts are equal, and so are two pictures."""
    own = slice(1, 1 + B)
    everyone = {"images": draw.randn(G, 3, 12, 12), "input_ids": draw.ids(G, T, high=VOCAB), "attention_mask": draw.padding(G, T),
                "text_group": torch.tensor([4, 1, 9, 1, 7]), "image_group": torch.tensor([5, 0, 2, 3, 2])}
    batch = {name: rows[own] for name, rows in everyone.items()}
    batch |= {"negative_ids": draw.ids(B, K, T + 1, high=VOCAB), "negative_mask": draw.padding(B * K, T + 1).view(B, K, T + 1)}
    return batch, everyone


def gatherer(model, batch, everyone):
    """Puts the other ranks' rows around this rank's, whichever of the four it is given; with gradient to the own ones."""
    with torch.no_grad():
        known = [(model.encode_image(everyone["images"]), model.encode_image(batch["images"])),
                 (model.encode_text(everyone["input_ids"], everyone["attention_mask"]), model.encode_text(batch["input_ids"], batch["attention_mask"])),
                 *((everyone[name], batch[name]) for name in ("text_group", "image_group"))]

    def gather(rows):
        for every, own in known:
            if rows.shape == own.shape and rows.is_floating_point() == own.is_floating_point() and torch.allclose(rows, own, atol=1e-5):
                return torch.cat([every[:1], rows, every[1 + len(rows):]])
        raise AssertionError(f"gather is given something that is neither vectors nor groups of this rank: {tuple(rows.shape)}")

    return gather


def losses_by_hand(model, batch, everyone, temperature):
    """From the model's own vectors, pair by pair."""
    with torch.no_grad():
        image, text = model.encode_image(everyone["images"]).double(), model.encode_text(everyone["input_ids"], everyone["attention_mask"]).double()
        B, G, negatives = len(batch["images"]), len(image), None
        own = image[1:1 + B] if G > B else image
        if "negative_ids" in batch:
            wrong = [model.encode_text(ids, real).double() for ids, real in zip(batch["negative_ids"], batch["negative_mask"], strict=True)]
            negatives = torch.stack([torch.stack([own[b] @ vector for vector in wrong[b]]) for b in range(B)]) / temperature
    right = torch.tensor([[bool(batch["text_group"][b] == everyone["text_group"][g] or batch["image_group"][b] == everyone["image_group"][g])
                           for g in range(G)] for b in range(B)])
    texts = text[1:1 + B] if G > B else text
    return loss_by_hand(own @ text.T / temperature, texts @ image.T / temperature, right, negatives, model.config.smoothing)


@pytest.mark.parametrize("with_negatives", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_2_5_pair_by_pair(draw, with_negatives, smoothing):
    model, (batch, everyone) = clip(draw, replace(TOKEN, smoothing=smoothing)), pairs(draw)
    if not with_negatives:
        batch = {name: rows for name, rows in batch.items() if "negative" not in name}
    for temperature in (0.07, 0.5):
        model.temperature.data.fill_(temperature)
        found = model.losses(batch, gatherer(model, batch, everyone))
        assert list(found) == ["itc"]
        total, count = found["itc"]
        want = losses_by_hand(model, batch, everyone, temperature)
        assert int(count) == 3
        close(total, torch.tensor(want), 1e-4 * want)


def test_2_5_alone_the_batch_is_everybody(draw):
    model, (batch, _) = clip(draw), pairs(draw)
    want = losses_by_hand(model, batch, batch, 0.07)
    close(model.losses(batch)["itc"][0], torch.tensor(want), 1e-4 * want)


def test_2_5_divided_by_the_temperature(draw):
    """Cosines are between −1 and 1: only divided by a small temperature a sure guess costs nothing. It stops at 0.01."""
    model, (batch, everyone) = clip(draw), pairs(draw)
    for temperature, held in ((0.003, 0.01), (-1.0, 0.01), (0.01, 0.01), (2.0, 2.0)):
        model.temperature.data.fill_(temperature)
        want = losses_by_hand(model, batch, everyone, held)
        close(model.losses(batch, gatherer(model, batch, everyone))["itc"][0], torch.tensor(want), 1e-4 * want)


def test_2_5_everything_learns(draw):
    model, (batch, everyone) = clip(draw), pairs(draw)
    total, _ = model.losses(batch, gatherer(model, batch, everyone))["itc"]
    for name, gradient in zip(dict(model.named_parameters()), torch.autograd.grad(total, list(model.parameters()), allow_unused=True), strict=True):
        assert gradient is not None and gradient.abs().sum() > 0, f"nothing reaches {name}"


def test_2_5_wrong_captions_teach_too(draw):
    """The words of a wrong caption, and the picture that it is put to, get a gradient from it."""
    model, (batch, _) = clip(draw), pairs(draw)
    seen = {int(i) for i in batch["input_ids"][batch["attention_mask"]]}
    only = sorted({int(i) for i in batch["negative_ids"][batch["negative_mask"]]} - seen)
    gradient, = torch.autograd.grad(model.losses(batch)["itc"][0], model.text.embedding.weight)
    assert only and (gradient[only].abs().sum(dim=1) > 0).all()
