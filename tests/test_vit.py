"""The vision transformer against transformers' CLIP, EVA-CLIP (inside BLIP-2) and ImageNet ViT: every hidden state."""

from dataclasses import replace

import pytest
import torch
import transformers
from oracles import hf_clip_vision, ours
from tools import bite, close, moved_by_breaking, randn

from nanovlm.hub import fill
from nanovlm.vit import EVA_CLIP_G_14, ViT, clip_vit, imagenet_vit, interpolate_positions


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("height", "width"), [(20, 20), (25, 35), (10, 15)])
def test_clip_every_hidden_state(activation, height, width):
    """Also on larger, smaller and oblong pictures, where the positions are stretched (align_corners=False)."""
    hf = hf_clip_vision(1, hidden_act=activation)
    model = ours(hf)
    images = randn(2, 3, height, width)
    with torch.no_grad():
        want = hf(images, output_hidden_states=True, interpolate_pos_encoding=True)
        assert len(want.hidden_states) == 5
        for depth, state in enumerate(want.hidden_states):
            close(model(images, depth=depth), state)
        tokens = model(images)
        close(tokens, want.last_hidden_state)  # the last block's, without the final norm
        close(model.norm(tokens[:, 0]), want.pooler_output)


def test_clip_attention_maps():
    hf = hf_clip_vision(2)
    hf.set_attn_implementation("eager")
    images = randn(2, 3, 20, 20)
    maps = []
    with torch.no_grad():
        ours(hf)(images, maps=maps)
        for got, want in zip(maps, hf(images, output_attentions=True).attentions, strict=True):
            close(got, want)


def test_the_weights_of_the_parity_tests_bite():
    model = ours(hf_clip_vision(1))
    moved = moved_by_breaking(model, lambda m: m.norm(m(randn(2, 3, 20, 20))))
    assert min(moved.values()) > 1e-3, moved


SMALL = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 20,
         "patch_size": 5}

EVA_NAMES = {
    "embeddings.class_embedding": "class_token",
    "embeddings.position_embedding": "positions",
    "embeddings.patch_embedding": "patch_embedding",
    "encoder.layers.{i}.layer_norm1": "blocks.{i}.norm1",
    "encoder.layers.{i}.self_attn.query": "blocks.{i}.attention.query",  # split from qkv below
    "encoder.layers.{i}.self_attn.key": "blocks.{i}.attention.key",
    "encoder.layers.{i}.self_attn.value": "blocks.{i}.attention.value",
    "encoder.layers.{i}.self_attn.projection": "blocks.{i}.attention.out",
    "encoder.layers.{i}.layer_norm2": "blocks.{i}.norm2",
    "encoder.layers.{i}.mlp.fc1": "blocks.{i}.feedforward.up",
    "encoder.layers.{i}.mlp.fc2": "blocks.{i}.feedforward.down",
    "post_layernorm": "norm",
}
EVA = replace(EVA_CLIP_G_14, image_size=20, patch=5, width=24, layers=3, heads=3, ffn=44)  # the published kind, small


@pytest.mark.parametrize("size", [(20, 20), (30, 25)])
def test_eva_clip_every_hidden_state(size):
    """q and v have biases, the key has none; no norm before the blocks; a bias on the patches; exact GELU; eps 1e-6."""
    hf = bite(transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**SMALL)), 3)
    for layer in hf.encoder.layers:
        layer.self_attn.qkv.bias.data[24:48] = 0
    state = {}
    for name, tensor in hf.state_dict().items():
        if ".qkv." in name:  # one matrix, rows ordered q, k, v; the key's bias is always zero
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                if not name.endswith("bias") or part != "key":
                    state[name.replace("qkv", part)] = third
        else:
            state[name] = tensor[0] if "position" in name else tensor.flatten() if "class" in name else tensor
    model = ViT(EVA)
    assert fill(model, state, EVA_NAMES, {}) == []
    images = randn(2, 3, *size)
    with torch.no_grad():
        want = hf(images, output_hidden_states=True, interpolate_pos_encoding=True)
        for depth in range(EVA.layers):
            close(model(images, depth=depth), want.hidden_states[depth])
        close(model.norm(model(images)), want.last_hidden_state)  # BLIP-2 reads the normed tokens
    assert "blocks.0.attention.key.bias" not in model.state_dict()
    assert min(moved_by_breaking(model, lambda m: m.norm(m(images))).values()) > 1e-3


IMAGENET_NAMES = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patch_embedding",
    "layers.{i}.layernorm_before": "blocks.{i}.norm1",
    "layers.{i}.attention.q_proj": "blocks.{i}.attention.query",
    "layers.{i}.attention.k_proj": "blocks.{i}.attention.key",
    "layers.{i}.attention.v_proj": "blocks.{i}.attention.value",
    "layers.{i}.attention.o_proj": "blocks.{i}.attention.out",
    "layers.{i}.layernorm_after": "blocks.{i}.norm2",
    "layers.{i}.mlp.fc1": "blocks.{i}.feedforward.up",
    "layers.{i}.mlp.fc2": "blocks.{i}.feedforward.down",
    "layernorm": "norm",
}


@pytest.mark.parametrize("size", [(20, 20), (30, 25)])
def test_imagenet_vit_every_hidden_state(size):
    """BLIP's encoder: biases everywhere, the final norm on every token."""
    config = replace(imagenet_vit(image_size=20, patch=5, width=24, layers=3, heads=3), ffn=44)
    hf = bite(transformers.ViTModel(transformers.ViTConfig(**SMALL, layer_norm_eps=1e-6), add_pooling_layer=False), 4)
    state = hf.state_dict()
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        state[name] = state[name][0, 0] if "cls" in name else state[name][0]
    model = ViT(config)
    assert fill(model, state, IMAGENET_NAMES, {}) == []
    images = randn(2, 3, *size)
    with torch.no_grad():
        want = hf(images, output_hidden_states=True, interpolate_pos_encoding=True)
        for depth in range(config.layers):
            close(model(images, depth=depth), want.hidden_states[depth])
        close(model.norm(model(images)), want.last_hidden_state)
    assert min(moved_by_breaking(model, lambda m: m.norm(m(images))).values()) > 1e-3


def cubic(t: float) -> list[float]:
    """Weights of the four neighbours at −1, 0, 1, 2 for a point t between 0 and 1 (Keys, a = −0.75)."""
    a = -0.75

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


@pytest.mark.parametrize("align_corners", [True, False])
def test_interpolation_against_a_slow_loop(align_corners):
    """BLIP-2's code keeps CLIP's corners in the corners; EVA's and ImageNet's pixels are areas: both, point by point."""
    n, rows, columns, D = 3, 5, 7, 2
    positions = randn(1 + n * n, D)
    grid = positions[1:].reshape(n, n, D)

    def source(i: int, m: int) -> float:
        return i * (n - 1) / (m - 1) if align_corners else (i + 0.5) * n / m - 0.5

    want = torch.zeros(rows, columns, D)
    for r in range(rows):
        for c in range(columns):
            y, x = source(r, rows), source(c, columns)
            for i, wy in enumerate(cubic(y - int(y // 1))):
                for j, wx in enumerate(cubic(x - int(x // 1))):
                    row = min(max(int(y // 1) + i - 1, 0), n - 1)  # the border is repeated outwards
                    column = min(max(int(x // 1) + j - 1, 0), n - 1)
                    want[r, c] += wy * wx * grid[row, column]
    got = interpolate_positions(positions, rows, columns, align_corners)
    close(got[1:], want.reshape(-1, D))
    assert torch.equal(got[0], positions[0])  # the class token has no place in the picture


def test_align_corners_reaches_the_encoder():
    """The flag of the config is the one that `forward` uses."""
    plain = clip_vit(image_size=20, patch=5, width=24, layers=1, heads=3)
    models = [bite(ViT(config), 5) for config in (plain, replace(plain, align_corners=True))]
    large, native = randn(2, 3, 30, 30), randn(2, 3, 20, 20)
    assert (models[0](large) - models[1](large)).abs().max() > 1e-3
    assert torch.equal(models[0](native), models[1](native))  # nothing to stretch


def test_patches_are_read_row_by_row():
    """Changing the patch in row 1, column 2 of the 4 × 4 grid changes token 1 + 1·4 + 2 before the blocks, no other."""
    model = ours(hf_clip_vision(6))
    images = randn(2, 3, 20, 20)
    changed = images.clone()
    changed[0, :, 5:10, 10:15] += 1
    different = (model(images, depth=0) != model(changed, depth=0)).any(dim=-1)
    assert different.nonzero().tolist() == [[0, 1 + 1 * 4 + 2]]
