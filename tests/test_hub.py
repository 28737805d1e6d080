"""Published weights: every layout they come in gives the same model; what does not fit is an error that lists it."""

import json
import re
import sys

import pytest
import torch
from oracles import (
    CLIP,
    IMAGE_ID,
    LLAMA,
    hf_bert,
    hf_blip2,
    hf_blip2_retrieval,
    hf_blip2_t5,
    hf_clip,
    hf_clip_vision,
    hf_llama,
    hf_llava,
    hf_opt,
    hf_t5,
    hf_t5_exact,
    hf_t5_first,
    ours,
)
from safetensors.torch import save_file
from test_llava import conversations, padded
from tools import close, randn, random_ids

from nanovlm.bert import MaskedLM
from nanovlm.errors import UserError
from nanovlm.hub import BUILD, from_hf, load
from nanovlm.hub.configs import IMAGE_TOKEN_INDEX, VISION_TOWERS, original_llava
from nanovlm.hub.names import LAYOUTS, backwards, translate
from nanovlm.papers.blip2 import BLIP2, BLIP2Stage1
from nanovlm.papers.clip import CLIP as OurCLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA
from nanovlm.vit import CLIP_L_14, ViT


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """The same class, sizes and weights."""
    assert type(a) is type(b)
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def parts(hf) -> tuple[dict, dict]:
    return hf.config.to_dict(), dict(hf.state_dict())


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    """Prefixes exchanged."""
    for old, new in pairs:
        state = {(new + name.removeprefix(old) if name.startswith(old) else name): t for name, t in state.items()}
    return state


@pytest.mark.parametrize(("build", "kind"), [
    (hf_clip_vision, ViT), (hf_llama, LanguageModel), (hf_opt, LanguageModel), (hf_llava, LLaVA), (hf_clip, OurCLIP),
    (hf_t5, LanguageModel), (hf_t5_exact, LanguageModel), (hf_t5_first, LanguageModel), (hf_bert, MaskedLM),
    (hf_blip2, BLIP2), (hf_blip2_retrieval, BLIP2Stage1), (hf_blip2_t5, BLIP2)])
def test_from_disk_equals_from_memory(build, kind, tmp_path):
    """As transformers writes it: whole, and in shards with an index."""
    hf = build(1)
    hf.save_pretrained(tmp_path / "whole")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model = ours(hf)
    assert type(model) is kind
    same(load(tmp_path / "whole"), model)
    same(load(tmp_path / "shards"), model)


FILES = [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
         ("model.multi_modal_projector", "multi_modal_projector")]


@pytest.mark.parametrize("layout", [
    [("model.vision_tower.", "model.vision_tower.vision_model.")],  # late transformers 4, in memory
    [("model.vision_tower.", "vision_tower.vision_model."), *FILES],  # the files of the hub
    [("model.vision_tower.", "vision_tower."), *FILES],  # the files that transformers 5 writes
])
def test_layouts_of_llava(layout):
    hf = hf_llava(2)
    config, state = parts(hf)
    other = renamed(state, *layout)
    assert not set(other) & {name for name in state if "vision" in name}
    same(from_hf(config, other), ours(hf))


def test_clip_with_and_without_its_prefix():
    hf = hf_clip_vision(3)
    config, state = parts(hf)
    same(from_hf(config, renamed(state, ("", "vision_model."))), ours(hf))


# --- the original LLaVA ---

def original(layers: int) -> tuple[dict, dict, dict, dict]:
    """(config, tensors, the tower's config, the tower's tensors) as the original code names them."""
    hf = hf_llava(4)
    _, state = parts(hf)
    eyes = {name.removeprefix("model.vision_tower."): t for name, t in state.items() if "vision_tower" in name}
    state = {name: t for name, t in state.items() if "vision_tower" not in name}
    state = renamed(state, ("model.language_model.", "model."),
                    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
                    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"))
    if layers == 1:
        state = {name: t for name, t in renamed(state, ("model.mm_projector.0", "model.mm_projector")).items()
                 if "mm_projector.2" not in name}
    config = {**hf.config.to_dict()["text_config"], "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"],
              "mm_hidden_size": 24, "mm_vision_select_layer": -2, "mm_vision_tower": "somebody/tiny-tower",
              "mm_projector_type": {1: "linear", 2: "mlp2x_gelu"}[layers]}
    return config, state, hf.config.to_dict()["vision_config"], eyes


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_tower.vision_model."])
@pytest.mark.parametrize("layers", [1, 2])
def test_original_llava(layers, prefix):
    config, state, eyes, tower = original(layers)
    model = from_hf({**config, "vision_config": eyes}, {**state, **renamed(tower, ("", prefix))})
    assert model.config.image_token_id == IMAGE_TOKEN_INDEX == -200
    assert (model.projector.second is not None) == (layers == 2)
    hugging = ours(hf_llava(4))
    want = hugging.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    if layers == 2:  # then it is the very same model, under another id for the image
        images, rows = conversations(4)
        ids, mask = padded(rows, "right")
        with torch.no_grad():
            got = model(images, ids.masked_fill(ids == IMAGE_ID, -200), mask).logits
            close(got, hugging(images, ids, mask).logits, 0)


@pytest.mark.parametrize("whole_clip", [True, False])
def test_original_llava_from_disk_with_its_tower(whole_clip, tmp_path):
    """The tower's folder may hold CLIP as a whole (as OpenAI published it) or its vision part only."""
    config, state, eyes, tower = original(1)
    state = {name: t.contiguous() for name, t in state.items()}
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "llava" / "model.safetensors")
    if whole_clip:
        clip = hf_clip(5)
        clip.save_pretrained(tmp_path / "clip")
        eyes, tower = clip.config.to_dict()["vision_config"], dict(clip.vision_model.state_dict())
    else:
        clip = hf_clip_vision(5)
        clip.load_state_dict(tower)
        clip.save_pretrained(tmp_path / "clip")
    model = load(tmp_path / "llava", vision=tmp_path / "clip")
    same(model, from_hf({**config, "vision_config": eyes}, {**state, **tower}))
    with pytest.raises(UserError, match="somebody/tiny-tower.*load\\(folder, vision=its_folder\\)"):
        load(tmp_path / "llava")
    with pytest.raises(UserError, match="clip: vision= adds the tower that an original LLaVA"):
        load(tmp_path / "clip", vision=tmp_path / "clip")
    with pytest.raises(UserError, match="llava/config.json: model_type is 'llava'; a vision tower is"):
        load(tmp_path / "llava", vision=tmp_path / "llava")


def test_a_missing_tower_is_named_with_the_mend():
    config, state, eyes, _ = original(2)
    with pytest.raises(UserError, match=r"vision_model.pre_layrnorm.weight is missing.*hold no vision tower; add it"):
        from_hf({**config, "vision_config": eyes}, state)


def test_the_published_towers_are_known_by_name():
    config, *_ = original(1)
    for name in ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"):
        assert original_llava({**config, "mm_vision_tower": name}).vision == VISION_TOWERS[name]
    assert VISION_TOWERS["openai/clip-vit-large-patch14"] == CLIP_L_14


# --- configs ---

def test_a_shortened_config_means_the_defaults():
    """The hub's llava-1.5-7b names five of LLaMA's fields only."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000,
              "text_config": text}
    with torch.device("meta"):
        model = BUILD["llava"](config)
    language = model.config.language
    assert (language.width, language.layers, language.heads, language.ffn) == (4096, 32, 32, 11008)
    assert (language.vocab, language.max_positions, language.eps, language.rope_base) == (32064, 4096, 1e-5, 10000.0)
    assert model.reads.image_tokens == 576
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072  # LlavaForConditionalGeneration of that config


@pytest.mark.parametrize("rope", [
    {"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}])
def test_rope_theta_of_transformers_4_and_5(rope):
    hf = hf_llama(6)
    config, state = parts(hf)
    config = {name: value for name, value in config.items() if not name.startswith("rope")}
    model = from_hf({**config, **rope}, state)
    ids = random_ids(2, 9, 6)
    with torch.no_grad():
        close(model(ids).logits, hf(ids).logits)
    assert model.language.config.rope_base == 500.0


def test_every_size_is_read_and_none_assumed():
    """Other eps, theta and activation than the defaults change the numbers, as in the oracle."""
    ids, images = random_ids(2, 9, 7), randn(2, 3, 20, 20)
    with torch.no_grad():
        for changes in ({"rms_norm_eps": 0.3}, {"rope_theta": 3.0}, {"tie_word_embeddings": True}):
            hf = hf_llama(7, **changes)
            close(ours(hf)(ids).logits, hf(ids).logits)
        for changes in ({"layer_norm_epsilon": 0.3}, {"relative_attention_num_buckets": 6},
                        {"relative_attention_max_distance": 6}, {"decoder_start_token_id": 17}):
            hf = hf_t5(7, **changes)
            close(ours(hf)(ids, None, ids).logits[:, :-1], hf(ids, labels=ids).logits)
        for changes in ({"layer_norm_eps": 0.3}, {"hidden_act": "gelu"}):
            hf = hf_clip_vision(7, **changes)
            close(ours(hf)(images), hf(images).last_hidden_state)


REFUSED = [
    (hf_llama, {"num_key_value_heads": 2}, "num_key_value_heads is 2; supported: 6"),
    (hf_llama, {"head_dim": 8}, "head_dim is 8; supported: 6"),
    (hf_llama, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    (hf_llama, {"attention_bias": True}, "attention_bias is True"),
    (hf_llama, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    (hf_llama, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    (hf_llama, {"hidden_size": "36"}, "hidden_size is '36'; a int"),
    (hf_llama, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (hf_llama, {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 7}, "36 is not a multiple of 5 heads"),
    (hf_llama, {"model_type": "mistral"}, "model_type is 'mistral'; the supported ones are clip_vision_model, clip, llama"),
    (hf_llama, {"model_type": None}, "model_type is None"),
    (hf_opt, {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    (hf_opt, {"word_embed_proj_dim": 20}, "word_embed_proj_dim is 20; supported: 36"),
    (hf_opt, {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    (hf_clip_vision, {"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'quick_gelu', 'gelu'"),
    (hf_clip_vision, {"num_channels": 1}, "num_channels is 1"),
    (hf_t5, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; supported: 'relu', 'gated-gelu'"),
    (hf_t5, {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'; supported: 'gelu_new', 'gelu'"),
    (hf_t5_first, {"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; supported: 'relu'"),
    (hf_t5, {"is_encoder_decoder": False}, "is_encoder_decoder is False; supported: True"),
    (hf_t5, {"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    (hf_t5, {"d_kv": "64"}, "d_kv is '64'; a int"),
    (hf_t5, {"relative_attention_num_buckets": 2}, "2 buckets up to distance 13: at least 4 are needed"),
    (hf_t5, {"model_type": "mt5"}, "model_type is 'mt5'; the supported ones are .*opt, .*t5, llava"),
    (hf_llava, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    (hf_llava, {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
    (hf_llava, {"vision_feature_layer": -6}, "vision_feature_layer is -6, but the vision tower has 4 blocks"),
    (hf_llava, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    (hf_llava, {"text_config": {**LLAMA, "model_type": "qwen2"}}, "model_type is 'qwen2'"),
    (hf_llava, {"vision_config": {**CLIP, "model_type": "siglip"}}, "model_type is 'siglip'"),
    (hf_llava, {"text_config": "llama"}, "text_config is 'llama'; an object"),
]


@pytest.mark.parametrize(("build", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(build, changes, message):
    config, state = parts(build(8))
    with pytest.raises(UserError, match=message):
        from_hf({**config, **changes}, state)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'; supported: 'linear', 'mlp2x_gelu'"),
    ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
])
def test_what_is_not_supported_of_the_original_llava(changes, message):
    config, state, eyes, tower = original(1)
    with pytest.raises(UserError, match=message):
        from_hf({**config, "vision_config": eyes, **changes}, {**state, **tower})


# --- tensors ---

def test_all_that_does_not_fit_is_listed():
    config, state = parts(hf_llama(9))
    state = dict(state)
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = state["stranger"] = torch.zeros(3)
    state["lm_head.weight"] = torch.zeros(53, 35)
    with pytest.raises(UserError) as error:
        from_hf(config, state)
    for problem in ("model.layers.1.mlp.up_proj.weight is missing", "model.norm.weight is missing",
                    "stranger is unused", "model.layers.2.mlp.up_proj.weight is unused",
                    "lm_head.weight has shape (53, 35) instead of (53, 36)"):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 4  # these five and no more


@pytest.mark.parametrize("build", [hf_clip_vision, hf_llama, hf_opt, hf_llava, hf_clip, hf_t5, hf_t5_first])
def test_each_missing_tensor_is_noticed(build):
    """Whichever is taken away, its own name is in the message (further copies of an embedding may go)."""
    config, state = parts(build(10))
    copies = ["lm_head.weight"] if build in (hf_opt, hf_t5_first) else []
    for name in state:
        if name in (*copies, *T5_COPIES) or re.search(r"(block|layers)\.[1-9]\.", name):
            continue  # block 0 stands for all
        with pytest.raises(UserError, match=f"{name} is missing"):
            from_hf(config, {other: t for other, t in state.items() if other != name})


T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def test_copies_of_t5s_embedding_may_be_there_or_not_but_not_differ():
    for build, copies in ((hf_t5, T5_COPIES), (hf_t5_first, (*T5_COPIES, "lm_head.weight"))):
        config, state = parts(build(11))
        model = from_hf(config, state)
        same(from_hf(config, {name: t for name, t in state.items() if name not in copies}), model)
        for name in copies:
            with pytest.raises(UserError, match=f"config.json: {name} is unused.$"):
                from_hf(config, {**state, name: state[name] + 1})


def test_t5_as_transformers_4_wrote_it():
    """There tie_word_embeddings meant what it says; and T5's first files have a bias that its code never reads."""
    for build, tied in ((hf_t5, False), (hf_t5_first, True)):
        config, state = parts(build(12))
        model = from_hf(config, state)
        new = ("scale_decoder_outputs", "tie_word_embeddings", "dense_act_fn", "is_gated_act")
        old = {name: value for name, value in config.items() if name not in new}
        same(from_hf({**old, "tie_word_embeddings": tied}, state), model)
        idle = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(10, 5)}
        same(from_hf(config, {**state, **idle}), model)
        assert (model.language.head is None) == tied


def test_a_tied_head_may_be_there_or_not_but_not_differ():
    config, state = parts(hf_opt(11))
    model = from_hf(config, state)
    same(from_hf(config, {name: t for name, t in state.items() if name != "lm_head.weight"}), model)
    same(from_hf(config, renamed(state, ("model.decoder.", "decoder."))), model)
    with pytest.raises(UserError, match="lm_head.weight is unused"):
        from_hf(config, {**state, "lm_head.weight": state["lm_head.weight"] + 1})


def test_buffers_of_older_files_are_ignored():
    config, state = parts(hf_llava(12))
    old = {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
           "model.vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    same(from_hf(config, {**state, **old}), from_hf(config, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_nothing_is_copied(dtype):
    config, state = parts(hf_llama(13))
    state = {name: t.to(dtype) for name, t in state.items()}
    model = from_hf(config, state)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.language.head.weight.data_ptr() == state["lm_head.weight"].data_ptr()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_the_tables_read_both_ways():
    """Every name of ours goes to theirs and back, in every layout; no two of theirs are one of ours."""
    for layouts in LAYOUTS.values():
        for layout in layouts:
            assert len(set(layout.values())) == len(layout)
            for theirs, mine in layout.items():
                name = theirs.replace("{i}", "17")
                assert translate(name, layout) == mine.replace("{i}", "17")
                assert translate(mine.replace("{i}", "17"), backwards(layout)) == name
    assert translate("model.layers.x.mlp.up_proj.weight", LAYOUTS["llama"][0]) is None
    assert translate("model.layers.1.mlp.up_proj.weight.extra", LAYOUTS["llama"][0]) is None


# --- files ---

@pytest.fixture
def folder(tmp_path):
    hf_llama(14).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def test_bad_files_are_named(folder):
    def message() -> str:
        with pytest.raises(UserError) as error:
            load(folder)
        return str(error.value)

    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.write_bytes(kept[:1000])
    assert f"{shard} could not be read" in message()
    shard.unlink()
    assert f"{shard} could not be read" in message()
    shard.write_bytes(kept)
    kept = index.read_text()
    fewer = {name: file for name, file in json.loads(kept)["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps({"weight_map": fewer}))
    assert "is missing" in message() and str(folder) in message()
    index.write_text("{}")
    assert f"{index}: the field weight_map" in message()
    index.write_text("[3]")
    assert f"{index} holds a list" in message()
    index.write_text(kept)
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": null', 1))
    assert f"{folder}: The tensors do not fit config.json" in message()  # the default, 32, does not
    config.write_text("{")
    assert f"{config} is not JSON" in message()
    config.unlink()
    assert f"{config} could not be read" in message()


def test_a_folder_without_tensors(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no \\*.safetensors; if it has \\*.bin files, let transformers convert them"):
        load(tmp_path)
    with pytest.raises(UserError, match="nowhere/config.json could not be read"):
        load(tmp_path / "nowhere")


def test_without_the_package_safetensors(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load(folder)
