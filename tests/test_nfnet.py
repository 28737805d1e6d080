"""NFNet against timm's, and what keeps its signal in bounds; adaptive clipping against a slow loop; the CLIP that is made of it."""

import importlib.abc
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from test_counts import count, on_meta
from tools import bite, close, moved_by_breaking, randn, random_ids
from torch import nn
from torch.nn import functional as F

from nanovlm import masks, recipes
from nanovlm.bert import BertConfig
from nanovlm.contrastive import contrastive_loss
from nanovlm.nfnet import ACTIVATIONS, Block, Conv, NFNet, NFNetConfig, expected_betas, nfnet_f
from nanovlm.papers.clip import CLIP, CLIPConfig
from nanovlm.recipes.stage import Stage
from nanovlm.training.optim import adaptive_clip, clip_gradients

# All sizes differ; the last stage has a block that keeps its size. Groups of 8 channels: 2, 3, 4 and 5 of them.
SMALL = NFNetConfig(image_size=64, depths=(1, 2, 1, 2), widths=(32, 48, 64, 80), group_width=8, final=56, classes=11,
                    stem=((8, 2), (16, 1), (32, 1), (64, 2)))
TINY = NFNetConfig(image_size=20, depths=(1, 2), widths=(12, 20), strides=(1, 2), stem=((6, 1), (8, 2)), group_width=2, final=18)


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that bite: gains near 1, and skip gains that let the residuals through, which start at 0."""
    bite(model, seed)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("gain"):
                p.copy_(1 + 0.3 * randn(*p.shape, seed=seed + i))
    return model


# ---- timm's, an independent implementation

class Hollow(type):
    """A class of which every attribute is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class StandIn(ModuleType):
    """A module that has every name, each a class of its own, and every submodule."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Hollow(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """For torchvision, which was built for another torch than ours. timm imports it for pictures; its networks do without."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def timm(module: str) -> ModuleType:
    """timm, or a part of it; whoever else asks for torchvision afterwards does not find the stand-in."""
    sys.meta_path.insert(0, finder := StandIns())
    try:
        return pytest.importorskip(f"timm{module}", reason="timm is not installed, see requirements-dev.txt")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


NAMES = {"downsample.conv": "shortcut", "conv1": "residual.0", "conv2": "residual.2", "conv2b": "residual.4", "conv3": "residual.6",
         "attn_last.fc1": "residual.7.down", "attn_last.fc2": "residual.7.up"}


def ours(name: str, depths: tuple[int, ...]) -> str:
    """timm's name of a tensor → ours."""
    part, _, rest = name.partition(".")
    if part == "stem":  # conv1, conv2, … with an activation between any two
        return f"stem.{2 * int(rest[4]) - 2}{rest[5:]}"
    if part != "stages":
        return name.replace("head.fc", "classifier")
    stage, number, rest = rest.split(".", 2)
    module, _, tensor = rest.rpartition(".")
    inside = "skip_gain" if rest == "skipinit_gain" else f"{NAMES[module]}.{tensor}"
    return f"blocks.{sum(depths[:int(stage)]) + int(number)}.{inside}"


def same_weights(theirs: nn.Module, model: NFNet) -> None:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = {ours(name, model.config.depths): tensor for name, tensor in theirs.state_dict().items()}
    model.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in renamed.items()})


def as_released(theirs: nn.Module, activation: str = "gelu") -> nn.Module:
    """timm adds 1e-5 to the variance of a filter's weights, the released code only keeps fan-in · variance above 1e-4.

    And it runs the exact GELU, while jax.nn.gelu, with which the weights were trained, is the tanh formula.
    """
    for part in theirs.modules():
        if type(part).__name__ == "ScaledStdConv2dSame":
            part.eps = 1e-20
        elif type(part).__name__ == "GammaAct":
            part.act_fn = lambda x, inplace: ACTIVATIONS[activation][0](x)
    return theirs


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("size", [(64, 64), (61, 95), (33, 34)])
def test_equals_timms(activation, size):
    """Grids of even and odd sides, at which SAME padding and the pooled shortcut round up."""
    nfnet = timm(".models.nfnet")
    config = nfnet.NfCfg(depths=SMALL.depths, channels=SMALL.widths, stem_type="deep_quad", stem_chs=64, group_size=8, extra_conv=True,
                         gamma_in_act=True, same_padding=True, skipinit=True, num_features=56, attn_layer="se",
                         attn_kwargs={"rd_ratio": 0.5}, act_layer="relu" if activation == "relu" else "gelu")
    theirs = as_released(awake(nfnet.NormFreeNet(config, num_classes=11), 1), activation)
    model = NFNet(replace(SMALL, activation=activation)).eval()
    same_weights(theirs, model)
    images = randn(2, 3, *size)
    with torch.no_grad():
        grid = theirs.stages(theirs.stem(images))  # before the final convolution
        close(model.features(images), grid)
        close(model(images), grid.flatten(2).transpose(1, 2))
        close(model.pooled(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))
        close(model.logits(images), theirs(images))
    assert min(moved_by_breaking(model, lambda m: m.logits(images)).values()) > 1e-3


def test_f0_equals_timms_at_its_full_size():
    theirs = as_released(awake(timm("").create_model("dm_nfnet_f0"), 2))
    model = NFNet(replace(nfnet_f(0, classes=1000), activation="gelu")).eval()
    same_weights(theirs, model)
    with torch.no_grad():
        got, want = model.logits(randn(1, 3, 96, 64)), theirs(randn(1, 3, 96, 64))
    close(got / want.std(), want / want.std(), 2e-5)


def test_adaptive_clipping_equals_timms():
    agc = timm(".utils.agc")
    for parameter in some_parameters():
        copy = nn.Parameter(parameter.detach().clone())
        copy.grad = parameter.grad.clone()
        agc.adaptive_clip_grad(copy, clip_factor=0.05)
        adaptive_clip(parameter, 0.05)
        close(parameter.grad, copy.grad, 1e-7)


# ---- sizes

@pytest.mark.parametrize(("n", "published"), [(0, 71_489_284), (1, 132_634_256), (6, 438_359_116)])
def test_the_f_series_has_the_published_sizes(n, published):
    model = on_meta(NFNet, nfnet_f(n, classes=1000))
    assert count(model) == published and count(model.stem) == 97_680
    assert len(model.blocks) == 12 * (n + 1)


def test_flamingos_encoder_is_f6_without_its_classifier():
    """435M, as Flamingo counts it (Table 5), with the final convolution that nobody reads."""
    model = recipes.build("nfnet-clip/f6").vision
    assert count(model) == 438_359_116 - 1000 * (3072 + 1)
    assert f"{(count(model) - count(model.final_conv)) / 1e6:.3f}" == "430.561"  # flamingo.md §0
    assert (model.config.width, model.config.pooled_width, model.config.grid) == (1536, 3072, 9)


@pytest.mark.parametrize(("size", "side"), [(288, 9), (320, 10), (480, 15), (300, 10), (32, 1)])
def test_the_grid(size, side):
    """Flamingo's 100 tokens of 320 pixels; where the stride does not go into the size it is rounded up."""
    assert nfnet_f(6, image_size=size).grid == side
    model = on_meta(NFNet, nfnet_f(0, image_size=size))
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, side ** 2, 1536)


def test_a_token_is_a_place_line_by_line():
    model = awake(NFNet(TINY))
    images = randn(1, 3, 20, 28)
    with torch.no_grad():
        tokens, grid = model(images)[0], model.features(images)[0]
        assert grid.shape == (20, 5, 7) and tokens.shape == (35, 20)
        assert torch.equal(tokens[1 * 7 + 4], grid[:, 1, 4])
        images[:, :, :4, 24:] += 1  # the upper right corner changes its own token most
        assert (model(images)[0] - tokens).norm(dim=1).argmax() == 6


# ---- what stands in the place of normalisation

def test_expected_betas():
    """flamingo.md §1.1: F6's."""
    betas = expected_betas((7, 14, 42, 21), 0.2)
    first = [1, 0.9806, 0.9623, 0.9449, 0.9285, 0.9129, 0.8980, 0.8839, 0.9806]  # the eighth still counts the first stage's blocks
    assert betas[:9] == pytest.approx(first, abs=5e-5) and len(betas) == 84
    assert min(betas) == betas[63] == pytest.approx(0.6108, abs=5e-5) and betas[-1] == pytest.approx(0.7454, abs=5e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gamma_makes_the_variance_one(name):
    function, gamma = ACTIVATIONS[name]
    assert (gamma * function(randn(1_000_000))).var().item() == pytest.approx(1, abs=0.01)


def test_weights_are_standardised_filter_by_filter():
    conv = awake(Conv(6, 4, 3, groups=2))
    for filter_, weight, gain in zip(conv.standardised(), conv.weight, conv.gain, strict=True):
        values = weight.flatten().tolist()
        mean = sum(values) / 27
        variance = sum((value - mean) ** 2 for value in values) / 27
        want = [gain.item() * (value - mean) / (27 * variance) ** 0.5 for value in values]
        close(filter_.flatten(), torch.tensor(want), 1e-6)
    nn.init.ones_(conv.weight)
    assert torch.equal(conv.standardised(), torch.zeros(4, 3, 3, 3)), "equal weights: no division by zero"


def test_same_padding():
    """Even sizes are padded behind only, odd ones on both sides; a third places come out at stride 3."""
    conv = Conv(1, 1, 3, stride=2)
    conv.standardised = lambda: torch.ones(1, 1, 3, 3)
    with torch.no_grad():
        assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]
        assert conv(torch.ones(1, 1, 5, 4))[0, 0].tolist() == [[6, 4], [9, 6], [6, 4]]
    assert [Conv(1, 1, 3, stride=3).same(size) for size in (6, 7, 8, 9)] == [(0, 0), (1, 1), (0, 1), (0, 0)]


def test_at_first_a_block_is_its_shortcut():
    """And its skip gain is the first to move: the residual's own gradient is 0 as long as it is."""
    x = randn(2, 12, 8, 8)
    keeps, shrinks = Block(TINY, 12, 12, 1, 0.9, 0.0), Block(TINY, 12, 20, 2, 0.9, 0.0)
    assert torch.equal(keeps(x), x)
    h = ACTIVATIONS["gelu_tanh"][0](x) * ACTIVATIONS["gelu_tanh"][1] * 0.9
    close(shrinks(x), shrinks.shortcut(F.avg_pool2d(h, 2)), 1e-6)
    keeps(x).square().sum().backward()
    assert keeps.skip_gain.grad != 0 and all(not p.grad.any() for p in keeps.residual.parameters())


def test_the_signal_neither_fades_nor_explodes():
    """With random weights each block gets the variance that it expects. No pooling here: it makes uncorrelated noise smaller."""
    torch.manual_seed(0)
    model = NFNet(NFNetConfig(16, (6, 6), (64, 128), (1, 1), ((32, 1),), 32, final=0))
    x = model.stem(randn(8, 3, 16, 16))
    for block in model.blocks:
        nn.init.ones_(block.skip_gain)
        with torch.no_grad():
            seen, x = x.std().item() * block.beta, block(x)
        assert 0.85 < seen < 1.2


def test_stochastic_depth_leaves_whole_residuals_out():
    block = awake(Block(TINY, 12, 12, 1, 1.0, drop=0.25))
    x = randn(1, 12, 4, 4).expand(4000, 12, 4, 4)
    with torch.no_grad():
        full = block(x[:1]) - x[:1]
        torch.manual_seed(0)
        shares = ((block.train()(x) - x) / full).mean(dim=(1, 2, 3))  # of every picture: 0 or 1, kept ones are not scaled up
    assert ((shares.abs() < 1e-3) | ((shares - 1).abs() < 1e-3)).all()
    assert abs(shares.mean() - 0.75) < 0.03  # four standard deviations
    drops = [block.drop for block in NFNet(replace(TINY, depths=(1, 3), drop_path=0.2)).blocks]
    assert drops == pytest.approx([0, 0.05, 0.1, 0.15])


# ---- adaptive gradient clipping

def some_parameters() -> list[nn.Parameter]:
    """A filter bank, a matrix, a gain and a scalar, some units of each with small gradients."""
    found = []
    for i, shape in enumerate([(5, 3, 2, 2), (7, 4), (6,), ()]):
        parameter = nn.Parameter(randn(*shape, seed=i))
        rows = torch.linspace(0.01, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else 0.5
        parameter.grad = randn(*shape, seed=9 + i) * rows
        found.append(parameter)
    return found


def test_adaptive_clipping_is_a_loop_over_units():
    for parameter in some_parameters():
        before = parameter.grad.clone()
        adaptive_clip(parameter, 0.1)
        units = zip(parameter, before, parameter.grad) if parameter.ndim > 1 else [(parameter, before, parameter.grad)]
        clipped = []
        for weight, gradient, got in units:
            most = 0.1 * max(weight.norm().item(), 1e-3)
            clipped.append(gradient.norm().item() > most)
            close(got, gradient * (most / gradient.norm()) if clipped[-1] else gradient, 1e-6)
        assert any(clipped) and (parameter.ndim < 2 or not all(clipped)), "the case has units of both kinds"


def test_a_gain_that_starts_at_zero_moves():
    gain = nn.Parameter(torch.zeros(()))
    gain.grad = torch.tensor(5.0)
    adaptive_clip(gain, 0.01)
    assert gain.grad.item() == pytest.approx(1e-5)


class Two(nn.Module):
    """An NFNet with a classifier, and a rest."""

    def __init__(self):
        super().__init__()
        self.vision, self.text = awake(NFNet(replace(TINY, classes=5)), 3), bite(nn.Linear(4, 3), 4)
        for i, p in enumerate(self.parameters()):
            p.grad = randn(*p.shape, seed=i)


def stage(**changes) -> Stage:
    return Stage("s", ("vision", "text"), {"captions": 1}, steps=1, batch_size=2, lr=1e-3, **changes)


def test_one_part_by_units_the_rest_by_its_norm():
    model, untouched = Two(), Two()
    norm = clip_gradients(model, stage(adaptive_clip={"vision": 0.01}, clip=0.1))
    assert norm.item() == pytest.approx(torch.cat([p.grad.flatten() for p in untouched.parameters()]).norm().item(), rel=1e-5)
    rest = torch.cat([p.grad.flatten() for p in model.text.parameters()])
    assert rest.norm().item() == pytest.approx(0.1, rel=1e-4)
    for (name, p), twin in zip(model.vision.named_parameters(), untouched.vision.parameters(), strict=True):
        if name.startswith("classifier"):
            assert torch.equal(p.grad, twin.grad), "the final linear layer"
        else:
            adaptive_clip(twin, 0.01)
            assert torch.equal(p.grad, twin.grad) and p.grad.norm() < 0.011 * max(p.norm().item(), 1e-3), name
    with pytest.raises(ValueError, match="adaptively"):
        clip_gradients(model, stage(adaptive_clip={"visoin": 0.01}))


@pytest.mark.parametrize("clip", [0.1, 0.0, 1e6])
def test_without_it_the_norm_is_that_of_everything(clip):
    model, untouched = Two(), Two()
    norm = clip_gradients(model, stage(clip=clip))
    assert norm == nn.utils.clip_grad_norm_(untouched.parameters(), clip or float("inf"))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))


# ---- Flamingo's contrastive training

B, T, VOCAB = 3, 7, 50
CONFIG = CLIPConfig(TINY, BertConfig(VOCAB, 16, 2, 4, 24, max_positions=9, dropout=0.0), 10, pool="mean", smoothing=0.1)


def pairs(seed: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.arange(T) < torch.tensor([7, 4, 5])[:, None]
    wrong = torch.ones(B, 2, T, dtype=torch.bool)
    return {"images": randn(B, 3, 20, 20, seed=seed), "input_ids": random_ids(B, T, seed), "attention_mask": mask,
            "text_group": torch.arange(B), "image_group": torch.arange(B), "negative_ids": random_ids(B * 2, T, 5).view(B, 2, T),
            "negative_mask": wrong}


def test_both_sides_are_means():
    model, batch = awake(CLIP(CONFIG)), pairs()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        hidden = model.text(ids, masks.padding(mask))
        means = torch.stack([row[real].mean(dim=0) for row, real in zip(hidden, mask, strict=True)])
        close(model.encode_text(ids, mask), F.normalize(model.text_projection(means), dim=-1), 1e-6)
        close(model.encode_text(ids[1:2, :4], mask[1:2, :4]), model.encode_text(ids, mask)[1:2], 1e-6)  # padding changes nothing
        grid = model.vision.activation(model.vision.final_conv(model.vision.features(batch["images"])))
        want = F.normalize(model.image_projection(grid.flatten(2).mean(dim=2)), dim=-1)
        close(model.encode_image(batch["images"]), want, 1e-6)


def test_its_loss_is_smoothed_and_reaches_everything():
    model, batch = awake(CLIP(CONFIG)), pairs()
    total, n = model.losses(batch)["itc"]
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["input_ids"], batch["attention_mask"])
    wrong = model.encode_text(batch["negative_ids"].flatten(0, 1), batch["negative_mask"].flatten(0, 1)).view(B, 2, -1)
    scores = image @ text.T / 0.07
    negatives = (image[:, None] * wrong).sum(dim=2) / 0.07
    want, _ = contrastive_loss(scores, scores.T, torch.eye(B).bool(), negatives, 0.1)
    close(total, want, 1e-4)
    plain, _ = contrastive_loss(scores, scores.T, torch.eye(B).bool(), negatives)
    assert n == B and abs(total - plain) > 0.01
    total.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_the_recipes_are_flamingos():
    """§B.1.3; the published joint space is 1,376 wide."""
    model = recipes.build("nfnet-clip/f6")
    assert model.image_projection.weight.shape == (1376, 3072) and model.text_projection.weight.shape == (1376, 768)
    for name in ("nfnet-clip/tiny", "nfnet-clip/small", "nfnet-clip/f6"):
        recipe = recipes.get(name)
        assert recipe.config.pool == "mean" and recipe.config.smoothing == 0.1
        assert recipe.stages[-1].adaptive_clip == {"vision": 0.01}
    stage_, config = recipes.get("nfnet-clip/f6").stages[-1], recipes.get("nfnet-clip/tiny").config.vision
    assert (stage_.steps, stage_.batch_size, stage_.lr, stage_.clip) == (1_200_000, 16_384, 1e-3, 10.0)
    assert (config.grid, config.width) == (6, 128)
