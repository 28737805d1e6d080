"""Flamingo against other people's code: open_flamingo's modules and whole language model, and a loop over single words.

open_flamingo 2.0.1 pins an old torch, so it is installed without what it asks for (.ci/run); its code is found without importing
the package, which would need open_clip. Gates are open everywhere: where they are shut every error passes.
"""

import importlib
import sys
from collections import OrderedDict
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracles import hf_opt, ours
from tools import bite, close, moved_by_breaking, pad_mask, randn, random_ids
from torch import Tensor, nn

from nanovlm import masks
from nanovlm.attention import rope_angles
from nanovlm.decoder import llama, opt
from nanovlm.errors import UserError
from nanovlm.gated_xattn import GatedCrossAttention
from nanovlm.hub import names, open_flamingo
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.perceiver_resampler import PerceiverResampler, ResamplerConfig

ABSENT = [name for name in ("open_flamingo", "einops", "einops_exts") if find_spec(name) is None]
theirs = pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)}: pip install einops einops_exts && pip install --no-deps open_flamingo==2.0.1")
D, D_V, HEADS, HEAD_DIM, Q, V = 36, 16, 3, 10, 5, 53  # inner width 30, neither D nor D_V
VISION = NFNetConfig(12, (1, 1), widths=(8, D_V), strides=(1, 2), stem=((8, 2),), group_width=4, final=0)  # 9 cells


def of(name: str) -> ModuleType:
    """open_flamingo/src/<name>.py, in a package that has no __init__ of its own."""
    if "open_flamingo_src" not in sys.modules:
        package = ModuleType("open_flamingo_src")
        package.__path__ = [str(Path(find_spec("open_flamingo").submodule_search_locations[0]) / "src")]
        sys.modules["open_flamingo_src"] = package
    return importlib.import_module(f"open_flamingo_src.{name}")


def of_modules(seed: int, frames: int | None = None, previous: bool = False) -> tuple[nn.Module, nn.Module]:
    """Resampler and gated layer."""
    helpers, size = of("helpers"), {"dim_head": HEAD_DIM, "heads": HEADS}
    resampler = helpers.PerceiverResampler(dim=D_V, depth=3, num_latents=Q, max_num_frames=frames, **size)
    gated = helpers.GatedCrossAttentionBlock(dim=D, dim_visual=D_V, only_attend_immediate_media=not previous, **size)
    return bite(resampler, seed), bite(gated, seed + 1)


def of_state(resampler: nn.Module, gated: nn.Module, layer: int = 2) -> dict[str, Tensor]:
    return {**{f"perceiver.{name}": t for name, t in resampler.state_dict().items()},
            **{f"lang_encoder.gated_cross_attn_layers.{layer}.{name}": t for name, t in gated.state_dict().items()}}


def both(seed: int, **how) -> tuple[tuple[nn.Module, nn.Module], tuple[PerceiverResampler, GatedCrossAttention]]:
    pair = of_modules(seed, **how)
    bridge = open_flamingo.from_state(of_state(*pair), heads=HEADS)
    return pair, (bridge.resampler, bridge.gated_xattn["2"])


# --- module by module ---

@theirs
@pytest.mark.parametrize(("frames", "F", "cells", "media"), [(None, 1, 9, 3), (None, 1, 4, 1), (None, 3, 9, 2), (4, 1, 9, 2), (4, 3, 9, 2), (4, 4, 1, 3)])
def test_the_resampler(frames, F, cells, media):
    (resampler, _), (mine, _) = both(F, frames=frames)
    features = randn(2, media, F, cells, D_V, seed=F)
    with torch.no_grad():
        want = resampler(features)
        got = mine(features.flatten(0, 1)).view_as(want)
    assert want.std() > 0.1
    print(f"resampler: {(got - want).abs().max():.1e}")
    close(got, want)
    assert (mine.times is not None) == (frames is not None)


TAGS = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]).bool()


def read(block: GatedCrossAttention, y: Tensor, media: Tensor, phi: Tensor, previous: bool = False) -> Tensor:
    there = torch.ones(media.shape[:2], dtype=torch.bool)
    return block(y, media.flatten(1, 2), masks.image_causal(phi, there, media.shape[2], previous))


@theirs
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_gated_layer(seed):
    """Words before, between and behind three images; a row without any; images that no word looks at."""
    (_, gated), (_, mine) = both(seed)
    y, media = randn(4, 9, D, seed=seed), randn(4, 3, Q, D_V, seed=seed + 1)
    with torch.no_grad():
        want = gated(y, media, TAGS)
        got = read(mine, y, media, masks.last_image(TAGS))
        assert (want - y).abs().mean() > 0.1 and mine.attention_gate.abs() > 0.05 and mine.dense_gate.abs() > 0.05
        print(f"gated layer: {(got - want).abs().max():.1e}")
        close(got, want)
        for count in (1, 3):  # further words, after the images of a prompt
            last = TAGS.sum(dim=1, keepdim=True).expand(-1, count)
            close(read(mine, y[:, :count], media, last), gated(y[:, :count], media, TAGS, use_cached_media=True))


@theirs
def test_where_open_flamingo_and_we_differ_on_purpose():
    """All previous images: there, words before the first one look at all; tags without an image: there, they look at all."""
    (_, gated), (_, mine) = both(4, previous=True)
    y, media, phi = randn(4, 9, D), randn(4, 3, Q, D_V, seed=1), masks.last_image(TAGS)
    with torch.no_grad():
        want, got = gated(y, media, TAGS), read(mine, y, media, phi, previous=True)
        close(got[phi > 0], want[phi > 0])
        assert ((got - want)[phi == 0].abs().amax(dim=-1) > 1e-3).all()
        (_, gated), (_, mine) = both(4)
        want, got = gated(y, media[:, :2], TAGS), read(mine, y, media[:, :2], phi)
        close(got[phi < 3], want[phi < 3])
        assert ((got - want)[phi == 3].abs().amax(dim=-1) > 1e-3).all()


@theirs
def test_the_weights_of_these_tests_bite():
    (_, _), (resampler, gated) = both(1, frames=4)
    features, y, media = randn(2, 3, 9, D_V), randn(4, 9, D), randn(4, 3, Q, D_V, seed=1)
    moved = moved_by_breaking(resampler, lambda m: m(features)) | moved_by_breaking(gated, lambda m: read(m, y, media, masks.last_image(TAGS)))
    assert min(moved.values()) > 1e-3, moved


# --- the whole model ---

def of_model(seed: int, every: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """OPT as it was, OPT as open_flamingo's language model, its resampler: 8 heads of 64 at every scale. Ids: V <|endofchunk|>, V + 1 <image>."""
    bare = hf_opt(seed, vocab_size=V + 2, num_hidden_layers=4)
    lm = hf_opt(seed, vocab_size=V + 2, num_hidden_layers=4)
    of("utils").extend_instance(lm, of("flamingo_lm").FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    lm.init_flamingo(V + 1, D, D_V, every, False)
    bite(lm.gated_cross_attn_layers, seed + 1)
    return bare, lm, bite(of("helpers").PerceiverResampler(dim=D_V, depth=2, num_latents=Q), seed + 2)


def of_checkpoint(lm: nn.Module, resampler: nn.Module, kept: str) -> dict[str, Tensor]:
    """As `kept`: everything (FSDP), or what its filter leaves: the copies inside of the LM, and what has "embed" in its name."""
    state = {**{f"perceiver.{name}": t for name, t in resampler.state_dict().items()},
             **{f"lang_encoder.{name}": t for name, t in lm.state_dict().items()}}
    if kept == "all":
        return state
    return {name: t for name, t in state.items() if "gated_cross_attn_layer." in name or "embed" in name or "perceiver" in name}


@theirs
@pytest.mark.parametrize(("every", "kept"), [(1, "all"), (2, "trained"), (3, "trained")])
def test_open_flamingo_on_opt(every, kept, tmp_path):
    """Published file in, same logits and same words out; its gated layers are the last of each group."""
    bare, lm, resampler = of_model(every, every)
    state = of_checkpoint(lm, resampler, kept)
    torch.save(OrderedDict(state) if kept == "all" else {"epoch": 1, "model_state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "checkpoint.pt")
    bridge = open_flamingo.load(tmp_path / "checkpoint.pt", tags=(V + 1, V))
    assert list(bridge.gated_xattn) == [str(i) for i in range(every - 1, 4, every)]
    config = FlamingoConfig(VISION, ResamplerConfig(D_V), opt(V, D, 4, 6, 44, 37), V, V + 1, every, every - 1)
    model = bite(Flamingo(config), 9)
    assert list(model.gated_xattn) == list(bridge.gated_xattn)
    words = ours(bare).language.state_dict()
    model.language.load_state_dict(words | {"embedding.weight": words["embedding.weight"][:V]})
    model.resampler, model.gated_xattn, model.tags = bridge.resampler, bridge.gated_xattn, bridge.tags

    mask, ids = pad_mask([11, 7, 9], "left", 11), random_ids(3, 11, every, high=V)
    ids[0, [2, 6]] = ids[1, 5] = ids[2, [3, 8, 9]] = V  # ours: V <image>, V + 1 <EOC>
    ids[0, 5] = V + 1
    swapped = torch.arange(V + 2)
    swapped[[V, V + 1]] = swapped[[V + 1, V]]
    frames = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    batch = {"images": randn(3, 3, 1, 3, 12, 12), "frames": frames, "input_ids": ids, "attention_mask": mask}

    def their_logits(ids: Tensor, mask: Tensor) -> Tensor:
        features = model.vision(batch["images"].flatten(0, 2)).view(3, 3, 1, 9, D_V)
        for layer in lm._get_decoder_layers():
            layer.condition_vis_x(resampler(features))
        return lm(input_ids=swapped[ids].where(mask, 1), attention_mask=mask.long()).logits[..., swapped]

    with torch.no_grad():
        want, got = their_logits(ids, mask), model(**batch).logits
        assert want[mask].std() > 0.3
        print(f"open_flamingo on OPT, every {every}: {(got - want)[mask].abs().max():.1e} of {want[mask].std():.1f}")
        close(got[mask], want[mask], 2e-5)
        said, grown, seen = model.generate(batch, 5, []), ids, mask
        for _ in range(5):
            grown = torch.cat([grown, their_logits(grown, seen)[:, -1:].argmax(dim=-1)], dim=1)
            seen = torch.cat([seen, mask.new_ones(3, 1)], dim=1)
    assert torch.equal(said, grown[:, 11:])


# --- the file ---

KEYS = [f"perceiver.{name}" for name in (
    "latents", "norm.weight", "norm.bias", "layers.0.0.norm_media.weight", "layers.0.0.norm_media.bias", "layers.0.0.norm_latents.weight",
    "layers.0.0.norm_latents.bias", "layers.0.0.to_q.weight", "layers.0.0.to_kv.weight", "layers.0.0.to_out.weight",
    "layers.0.1.0.weight", "layers.0.1.0.bias", "layers.0.1.1.weight", "layers.0.1.3.weight")]
GATED = "attn_gate ff_gate attn.norm.weight attn.norm.bias attn.to_q.weight attn.to_kv.weight attn.to_out.weight " \
        "ff.0.weight ff.0.bias ff.1.weight ff.3.weight"
SHAPES = {".latents": (Q, D_V), "to_q": (64, D_V), "to_kv": (128, D_V), "to_out": (D_V, 64), "1.1": (4 * D_V, D_V), "1.3": (D_V, 4 * D_V),
          "attn.to_q": (64, D), "attn.to_out": (D, 64), "ff.1": (4 * D, D), "ff.3": (D, 4 * D), "attn_gate": (1,), "ff_gate": (1,)}


def literal(where: str = "lang_encoder.transformer.blocks.{}.gated_cross_attn_layer.") -> dict[str, Tensor]:
    """A checkpoint by the names and shapes that stand in the fact sheet (§7.1), layers 1 and 3, without open_flamingo's code."""
    state = {}
    for name in [*KEYS, *(where.format(i) + key for i in (1, 3) for key in GATED.split())]:
        shape = next((shape for end, shape in reversed(SHAPES.items()) if name.removesuffix(".weight").endswith(end)), None)
        state[name] = randn(*shape or (D_V if name.startswith("perceiver") else D,), seed=len(state))
    return state


@pytest.mark.parametrize("where", ["lang_encoder.gated_cross_attn_layers.{}.", "lang_encoder.transformer.blocks.{}.gated_cross_attn_layer.",
                                   "lang_encoder.gpt_neox.layers.{}.gated_cross_attn_layer."])
def test_the_names_of_the_fact_sheet(where):
    """Every tensor is in its place; what belongs to the language model is left where it is."""
    state = literal(where) | {"lang_encoder.transformer.wte.weight": randn(V + 3, D), "lang_encoder.transformer.blocks.1.decoder_layer.up.weight": randn(2, 2)}
    bridge = open_flamingo.from_state(state, tags=(V + 1, V))
    assert list(bridge.gated_xattn) == ["1", "3"] and not bridge.training
    layer, attention = bridge.resampler.layers[0], bridge.gated_xattn["3"].attention
    assert torch.equal(layer.attention.value.weight, state["perceiver.layers.0.0.to_kv.weight"][64:])
    assert torch.equal(attention.key.weight, state[where.format(3) + "attn.to_kv.weight"][:64])
    assert torch.equal(bridge.gated_xattn["1"].dense_gate, state[where.format(1) + "ff_gate"][0])
    assert torch.equal(bridge.tags, state["lang_encoder.transformer.wte.weight"][[V + 1, V]])
    assert (attention.heads, attention.head_dim, bridge.resampler.config.frames) == (8, 8, 0)
    assert len(bridge.state_dict()) == len(literal()) + 1 + 2 + 1  # a map more for each "to_kv", and the tags
    table = names.OPEN_FLAMINGO
    assert all(names.translate(b.replace("{i}", "7"), {b: a}) == a.replace("{i}", "7") for a, b in table.items())


@pytest.mark.parametrize(("changes", "how", "message"), [
    ({"perceiver.latents": None}, {}, "perceiver.latents is missing: this is no checkpoint of open_flamingo"),
    ({"perceiver.norm.bias": None}, {}, "perceiver.norm.bias is missing"),
    ({"perceiver.media_time_embs": randn(3, 1, D_V)}, {}, "media_time_embs numbers the images of a page"),
    ({"perceiver.more": randn(3)}, {}, "perceiver.more is unused"),
    ({"perceiver.norm.weight": randn(3)}, {}, r"perceiver.norm.weight has shape \(3,\) instead of \(16,\)"),
    ({"lang_encoder.gated_cross_attn_layers.3.ff_gate": randn(1, seed=99)}, {}, "differs from the same layer's other copy"),
    ({"perceiver.latents": torch.ones(Q, D_V, dtype=torch.int8)}, {}, "int8 numbers; quantized"),
    ({}, {"heads": 7}, "has 64 rows, which are not a multiple of 7 heads"),
    ({}, {"tags": (V, V + 1)}, "the file has 0"),
    ({"lang_encoder.model.embed_tokens.weight": randn(V, D)}, {"tags": (V, V + 1)}, f"Token {V + 1} has no row")])
def test_a_file_that_does_not_fit_is_refused(changes, how, message, tmp_path):
    state = {name: t for name, t in (literal() | changes).items() if t is not None}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"^{tmp_path}.*{message}"):
        open_flamingo.load(tmp_path / "checkpoint.pt", **how)


def test_only_gated_layers_or_none_of_them(tmp_path):
    with pytest.raises(UserError, match="gated_cross_attn_layers are missing"):
        open_flamingo.from_state({name: literal()[name] for name in KEYS})
    for content, message in ((b"no file of torch", "UnpicklingError"), (None, "FileNotFoundError")):
        path = tmp_path / "x.pt"
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(UserError, match=message):
            open_flamingo.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="something else than tensors by name"):
        open_flamingo.load(path)
    torch.save(Path("code"), path)  # any class would run code as it is opened
    with pytest.raises(UserError, match="could not be read as a file of tensors"):
        open_flamingo.load(path)


# --- a loop over words, which knows no masks ---

def slowly(model: Flamingo, images: Tensor, frames: Tensor, ids: list[int]) -> Tensor:
    """Logits (T, V) of one page: each word by itself looks at the latents of the image that it has come to."""
    config, decoder, seen = model.config, model.language, []
    media = [model.encode_image(clip[None, :n])[0] for clip, n in zip(images, frames.tolist()) if n]
    words, last = [], -1
    for token in ids:
        last += token == config.image_id
        seen.append([i for i in range(len(media)) if i == last or (config.all_previous and i < last)])
        own = {config.image_id: model.tags[0], config.close_id: model.tags[1]}.get(token, 0.0)
        words.append(decoder.embedding.weight[token] + own)
    y, T = torch.stack(words), len(ids)
    for i, block in enumerate(decoder.blocks):
        if i >= config.first and (i - config.first) % config.every == 0:
            y = torch.stack([gated_word(model.gated_xattn[str(i)], word, [media[m] for m in own]) for word, own in zip(y, seen)])
        rope = rope_angles(torch.arange(T)[None], config.language.width // config.language.heads)
        y = block(y[None], torch.full((T, T), float("-inf")).triu(1), rope)[0]
    return decoder.norm(y) @ decoder.head_weight.T


def gated_word(layer: GatedCrossAttention, word: Tensor, media: list[Tensor]) -> Tensor:
    attention, d = layer.attention, layer.attention.head_dim
    if media:
        latents = torch.cat(media)
        q, k, v = attention.query.weight @ layer.norm1(word), latents @ attention.key.weight.T, latents @ attention.value.weight.T
        heads = [slice(h * d, h * d + d) for h in range(attention.heads)]
        mixed = torch.cat([(k[:, part] @ q[part] / d ** 0.5).softmax(dim=0) @ v[:, part] for part in heads])
        word = word + torch.tanh(layer.attention_gate) * (attention.out.weight @ mixed)
    inside = (layer.feedforward.up.weight @ layer.norm2(word)).clamp(min=0) ** 2
    return word + torch.tanh(layer.dense_gate) * (layer.feedforward.down.weight @ inside)


@pytest.mark.parametrize(("every", "first", "previous"), [(1, 0, False), (2, 0, False), (2, 1, False), (3, 0, True)])
def test_a_page_word_by_word(every, first, previous):
    config = FlamingoConfig(VISION, ResamplerConfig(D_V, 2, 2, latents=Q, frames=3), llama(V, D, 4, 6, 44), 3, 4, every, first, previous)
    model = bite(Flamingo(config), every)
    ids = random_ids(3, 9, every, low=5, high=V)
    ids[0, [1, 4, 6]] = ids[1, [0, 1]] = 3  # row 2 has no image, row 0 one tag more than images
    ids[0, 3] = ids[2, 5] = 4
    frames, images = torch.tensor([[1, 3], [2, 1], [0, 0]]), randn(3, 2, 3, 3, 12, 12)
    with torch.no_grad():
        got = model(images, frames, ids, torch.ones_like(ids, dtype=torch.bool)).logits
        want = torch.stack([slowly(model, *row[:2], row[2].tolist()) for row in zip(images, frames, ids)])
        assert want.std() > 0.3
        print(f"word by word: {(got - want).abs().max():.1e}")
        close(got, want, 2e-5)
        shifted = replace(config, first=(first + 1) % every) if every > 1 else replace(config, all_previous=True)
        other = Flamingo(shifted).eval()
        if every == 1:
            other.load_state_dict(model.state_dict())
            assert (other(images, frames, ids, torch.ones_like(ids, dtype=torch.bool)).logits - got).abs().max() > 1e-2
        else:
            assert list(other.gated_xattn) != list(model.gated_xattn)
