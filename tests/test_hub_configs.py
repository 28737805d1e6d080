"""config.json: published ones load, what we cannot do and what nobody reads is refused with the field's name."""

import copy

import pytest
import torch
import transformers
from oracles import (
    BLIP_TEXT,
    CLIP,
    EVA,
    IMAGE_ID,
    LLAMA,
    hf_bert,
    hf_blip,
    hf_blip2,
    hf_blip2_t5,
    hf_blip_retrieval,
    hf_clip,
    hf_clip_vision,
    hf_instructblip,
    hf_llama,
    hf_llava,
    hf_next,
    hf_opt,
    hf_t5,
    hf_t5_first,
    original_llava,
    ours,
    parts,
    renamed,
    same,
)
from published_configs import PUBLISHED
from tools import bite, close, randn, random_ids

from nanovlm.errors import UserError
from nanovlm.hub import CLASSES, class_of, configs, from_hf, load
from nanovlm.vit import CLIP_L_14

# --- published ---

# To the unit, as transformers counts them on the meta device. It counts 39 · 1408 biases of BLIP-2's keys too, which are
# always zero, and FlanT5's head (32128 · 2048) only when it reads the files
PARAMETERS = {"clip-vit-large-patch14": 427_616_513, "clip-vit-large-patch14-336": 427_944_193,
              "vicuna-7b-v1.5": 6_738_415_616, "llama-7b": 6_738_415_616, "opt-2.7b": 2_651_596_800,
              "opt-6.7b": 6_658_473_984, "bert-base-uncased": 109_514_298, "t5-small": 60_506_624,
              "flan-t5-xl": 2_783_959_040 + 32128 * 2048, "blip2-opt-2.7b": 3_744_761_856 - 39 * 1408,
              "blip2-flan-t5-xl": 3_876_648_448 + 32128 * 2048 - 39 * 1408,
              "blip2-opt-2.7b, written out": 3_744_679_936 - 39 * 1408,
              "blip2-flan-t5-xl, written out": 3_876_648_448 + 32128 * 2048 - 39 * 1408,
              "blip2-itm-vit-g": 1_172_032_258 - 39 * 1408, "instructblip-vicuna-7b": 7_913_210_624 - 39 * 1408,
              "instructblip-flan-t5-xl": 4_022_969_088 - 39 * 1408, "llava-1.5-7b-hf": 7_063_427_072,
              "llava-v1.6-vicuna-7b-hf": 7_063_431_168,
              "blip-image-captioning-base": 223_971_644, "blip-image-captioning-base, short": 223_971_644,
              "blip-image-captioning-large": 446_290_492, "blip-itm-base-coco": 223_744_258, "blip-vqa-base": 361_230_140,
              # 64 words fewer than Hugging Face's, in embedding and head
              "llava-v1.5-7b": 7_063_427_072 - 2 * 64 * 4096, "llava-v1.6-vicuna-7b": 7_063_431_168 - 2 * 64 * 4096}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    """At full size, without memory; and a field that nobody knows is refused in every section."""
    config = PUBLISHED[name]
    published = CLASSES[class_of(config)]
    with torch.device("meta"):
        model = published.model(published.config(config))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    for section in (None, *(part for part in config if part.endswith(("_config", "_config_dict")))):
        if (name, section) != ("blip2-itm-vit-g", "text_config"):  # that model has no language model
            other = copy.deepcopy(config)
            (other[section] if section else other)["sliding_window"] = 4096
            with pytest.raises(UserError, match=rf"config.json: {section or ''}\.?sliding_window is 4096; no code here reads"):
                published.config(other)


def shrink(config: dict) -> dict:
    """The same config with two blocks, 24 wide."""
    small = {**dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim", "encoder_hidden_size"), 24),
             **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 40),
             **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 3), "d_kv": 7,
             **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), 2), "image_size": 28}
    return {name: shrink(value) if isinstance(value, dict) else small.get(name, value) for name, value in config.items()}


@pytest.mark.parametrize("name", ["vicuna-7b-v1.5", "llama-7b", "opt-2.7b", "t5-small", "flan-t5-xl", "bert-base-uncased",
                                  "clip-vit-large-patch14-336"])
def test_a_published_config_means_what_it_means_to_transformers(name):
    """Shrunk, with the same weights: the same numbers, so every default of the class is right."""
    config = shrink(PUBLISHED[name])
    if name == "llama-7b":  # transformers' defaults where its file says nothing
        config = {**config, "num_key_value_heads": 3}
    if name.startswith("clip"):  # OpenAI's file has the sizes twice
        config["vision_config_dict"]["image_size"] = 28
    kind = {"t5": "T5", "bert": "Bert", "clip": "CLIP", "llama": "Llama", "opt": "OPT"}[config["model_type"]]
    settings = getattr(transformers, f"{kind}Config")(**config)
    hf = bite(getattr(transformers, config["architectures"][0])(settings), 1)
    if name == "flan-t5-xl":
        hf.lm_head.weight = torch.nn.Parameter(randn(*hf.lm_head.weight.shape) * 0.2)
    model, ids, images = from_hf(config, dict(hf.state_dict())), random_ids(2, 9, 1), randn(2, 3, 28, 28)
    with torch.no_grad():
        if name.startswith("clip"):
            close(model.vision(images), hf.vision_model(images).last_hidden_state)
            close(model.text(ids), hf.text_model(ids).last_hidden_state)
        elif kind == "T5":
            close(model(ids, None, ids).logits[:, :-1], hf(ids, labels=ids).logits, 3e-5)
        else:
            got = model(ids)
            close(got.logits, hf(ids).logits, 2e-5)


@pytest.mark.parametrize("name", ["blip-image-captioning-base", "blip-itm-base-coco"])
def test_blips_config_means_what_it_means_to_transformers(name):
    """As above; its class hands the vision tower's width on to the text, whatever the text's own section says."""
    config = shrink(PUBLISHED[name])
    config["vision_config"] |= {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32}
    config["text_config"] |= {"encoder_hidden_size": 999, "num_attention_heads": 4, "layer_norm_eps": 0.2}
    hf = bite(getattr(transformers, config["architectures"][0])(transformers.BlipConfig(**copy.deepcopy(config))), 1)
    model, ids, images = from_hf(config, dict(hf.state_dict())), random_ids(2, 9, 1), randn(2, 3, 32, 32)
    tokens, mask = model.encode_image(images), torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        if "itm" in name:
            ids[:, 0] = 30523
            close(model.match(tokens, ids, mask), hf(ids, images, attention_mask=mask.long()).itm_score)
        else:
            ids[:, 0] = 30522
            close(model.word_head.logits(model.write(tokens, ids, mask), model.text_decoder.embeddings.words), hf(images, ids, mask.long()).logits)


def test_a_config_of_blip_without_fields_means_its_defaults():
    """Eight heads of the text, 384 pixels, eps 1e-5 of the vision tower, no dropout, no smoothing."""
    theirs, ours_ = transformers.BlipConfig(), configs.blip({"model_type": "blip"}, ("lm",))
    for section, mine in ((theirs.vision_config, ours_.vision), (theirs.text_config, ours_.text)):
        for name, value in section.to_dict().items():
            if name in configs.OURS and hasattr(mine, configs.OURS[name]):
                assert getattr(mine, configs.OURS[name]) == value, name
    assert (ours_.vision.image_size, ours_.text.heads, ours_.text.image_width, ours_.embedding) == (384, 8, 768, 256)
    assert (ours_.decode_id, ours_.encode_id, ours_.smoothing) == (30522, 30523, 0.0) and ours_.text.segments == 0


def test_a_shortened_config_means_the_defaults():
    """The hub's llava-1.5-7b names five of LLaMA's fields only."""
    config = configs.llava(PUBLISHED["llava-1.5-7b-hf"])
    language = config.language
    assert (language.width, language.layers, language.heads, language.ffn) == (4096, 32, 32, 11008)
    assert (language.vocab, language.max_positions, language.eps, language.rope_base) == (32064, 4096, 1e-5, 10000.0)
    assert config.vision.grid ** 2 == 576
    whole = {"model_type": "llava", "text_config": PUBLISHED["llava-1.5-7b-hf"]["text_config"]}
    assert configs.llava(whole) == config  # no vision_config: CLIP-L/14-336


def test_the_published_towers_are_known_by_name():
    config = PUBLISHED["llava-v1.5-7b"]
    for name in ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"):
        assert configs.original_llava({**config, "mm_vision_tower": name}).vision == configs.VISION_TOWERS[name]
    assert configs.VISION_TOWERS["openai/clip-vit-large-patch14"] == CLIP_L_14


# --- honoured ---

@pytest.mark.parametrize("rope", [
    {"rope_theta": 500.0}, {"rope_theta": 500, "rope_scaling": None}, {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
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


@pytest.mark.parametrize("legacy", [{"hidden_act": "gelu"}, {"layer_norm_eps": 0.3}, {}])
def test_clips_second_vision_config_counts_as_in_transformers(legacy, tmp_path):
    """Where vision_config_dict and vision_config differ the former wins, and what it leaves out is the class's default."""
    sizes = {name: value for name, value in CLIP.items()}
    written = {**hf_clip(5).config.to_dict(), "architectures": ["CLIPModel"],
               "vision_config": {**sizes, "layer_norm_eps": 0.2}, "vision_config_dict": {**sizes, **legacy}}
    hf = bite(transformers.CLIPModel(transformers.CLIPConfig(**copy.deepcopy(written))), 5)
    model, images = from_hf(written, dict(hf.state_dict())), randn(2, 3, 20, 20)
    assert model.config.vision.eps == legacy.get("layer_norm_eps", 1e-5)
    with torch.no_grad():
        close(model.vision(images), hf.vision_model(images).last_hidden_state)
    text, second = written["text_config"], {"hidden_size": 16, "num_attention_heads": 4}
    assert configs.clip({**written, "text_config_dict": second}).text.width == 16
    assert configs.clip({**written, "text_config_dict": second}).text.layers == 12 != text["num_hidden_layers"]
    with pytest.raises(UserError, match="vision_config_dict.hidden_act is 'relu'; supported: 'quick_gelu', 'gelu'"):
        configs.clip({**written, "vision_config_dict": {**sizes, "hidden_act": "relu"}})
    eyes, where = configs.clip_section(written, "vision_config", configs.CLIP_VISION)  # a tower for LLaVA
    assert configs.clip_vision(eyes, where) == model.config.vision


def test_the_image_token_has_two_names():
    config, state = parts(hf_llava(8))
    index = config.pop("image_token_index")
    assert from_hf({**config, "image_token_id": 7}, state).config.image_token_id == 7
    assert from_hf({**config, "image_token_id": index, "image_token_index": index}, state).config.image_token_id == index
    with pytest.raises(UserError, match="image_token_id is 7; it is another name of image_token_index, which is 51"):
        from_hf({**config, "image_token_id": 7, "image_token_index": index}, state)


@pytest.mark.parametrize("build", [hf_llava, hf_next])
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_a_head_tied_at_the_top_or_in_the_text_only(build, top, text, tmp_path):
    """As in transformers: LLaVA is tied if one of the two says so, LLaVA-NeXT if its own field does."""
    hf = build(9, {"tie_word_embeddings": text}, tie_word_embeddings=top)
    hf.tie_weights()
    hf.save_pretrained(tmp_path)
    model = load(tmp_path)
    same(model, ours(hf))
    assert (model.language.head is None) == (top or (text and build is hf_llava))
    hidden = randn(2, 3, 36)
    close(model.language.logits(hidden), hf.lm_head(hidden))


def test_a_head_that_the_config_does_not_expect_or_misses_names_the_field():
    config, state = parts(hf_llama(9))
    with pytest.raises(UserError, match=r"lm_head.weight is missing \(or tie_word_embeddings in config.json must be true\)"):
        from_hf(config, {name: t for name, t in state.items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lm_head.weight differs .*\(or tie_word_embeddings in config.json must be false\)"):
        from_hf({**config, "tie_word_embeddings": True}, state)


def test_blip2_on_a_t5_without_a_gate():
    hf = hf_blip2_t5(3, feed_forward_proj="relu")
    model, images, ids = ours(hf), randn(2, 3, 20, 20), random_ids(2, 5, 3)
    marked = torch.cat([torch.full((2, 7), IMAGE_ID), ids], dim=1)
    assert model.language.config.activation == "relu"
    with torch.no_grad():
        want = hf(input_ids=marked, pixel_values=images, attention_mask=torch.ones_like(marked), labels=ids).logits
        close(model(images, ids, torch.ones_like(ids, dtype=torch.bool), ids).logits[:, :-1], want)


# --- LLaVA 1.6 in its own code ---

def original_next(pinpoints: list) -> tuple[dict, dict, torch.nn.Module]:
    """config and tensors as the original code saves them, and the same model of transformers."""
    hf = hf_next(4, image_grid_pinpoints=[[height, width] for width, height in pinpoints])
    state = renamed(dict(hf.state_dict()), ("model.language_model.", "model."),
                    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
                    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
                    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."))
    config, *_ = original_llava(2)
    return {**config, "max_position_embeddings": 400, "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints,
            "vision_config": hf.config.to_dict()["vision_config"]}, state, hf


def test_original_llava_1_6_has_tiles():
    """Its sizes are [width, height]; otherwise it is the model of LlavaNextForConditionalGeneration."""
    config, state, hf = original_next([[20, 40], [60, 20]])
    model, hugging = from_hf(config, state), ours(hf)
    assert model.config.tiling.grids == ((2, 1), (1, 3)) and model.config.tiling == hugging.config.tiling
    same(model, hugging)
    sizes = torch.tensor([[50, 22], [13, 41]])
    views = sum(model.config.tiling.views(tuple(size)) for size in sizes.tolist())
    ids = torch.tensor([[5, IMAGE_ID, 7, 8], [IMAGE_ID, 4, 9, 6]])
    mask, images = torch.ones_like(ids, dtype=torch.bool), randn(views, 3, 20, 20)
    with torch.no_grad():
        got = model(images, ids.masked_fill(ids == IMAGE_ID, -200), mask, image_sizes=sizes).logits
        close(got, hugging(images, ids, mask, image_sizes=sizes).logits, 0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"image_aspect_ratio": "pad"}, "mm_patch_merge_type is 'spatial_unpad'; image_aspect_ratio is 'pad'; supported together"),
    ({"image_aspect_ratio": None}, "mm_patch_merge_type is 'spatial_unpad'; image_aspect_ratio is 'square'"),
    ({"mm_patch_merge_type": None}, "mm_patch_merge_type is 'flat'; image_aspect_ratio is 'anyres'"),
    ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'; supported: 'flat', 'spatial_unpad'"),
    ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'; supported: 'square', 'pad', 'anyres'"),
    ({"image_grid_pinpoints": None}, r"image_grid_pinpoints is \[\]; a list of \[width, height\] is needed"),
    ({"image_grid_pinpoints": [[20, 30]]}, r"image_grid_pinpoints is \[\[20, 30\]\]; a list of \[width, height\]"),
    ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'; supported: 'linear', 'mlp2x_gelu'"),
    ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
    ({"mm_vision_select_layer": 9}, "mm_vision_select_layer is 9; the vision tower has 4 blocks"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024; supported: 24"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; supported: False"),
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'; no code here reads this field"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'; supported: 'default'"),
])
def test_what_is_not_supported_of_the_original_llava(changes, message):
    config, state, _ = original_next([[20, 40], [60, 20]])
    with pytest.raises(UserError, match=message):
        from_hf({**config, **changes}, state)


# --- refused ---

REFUSED = [
    (hf_llama, {"num_key_value_heads": 2}, "num_key_value_heads is 2; supported: 6"),
    (hf_llama, {"head_dim": 8}, "head_dim is 8; supported: 6"),
    (hf_llama, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    (hf_llama, {"attention_bias": True}, "attention_bias is True"),
    (hf_llama, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type is 'linear'"),
    (hf_llama, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic'"),
    (hf_llama, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5; no code"),
    (hf_llama, {"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object with named fields is needed"),
    (hf_llama, {"hidden_size": "36"}, "hidden_size is '36'; a whole number like 4096 is needed"),
    (hf_llama, {"num_hidden_layers": 0}, "num_hidden_layers is 0; a whole number like 32"),
    (hf_llama, {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 7}, "36 is not a multiple of 5 heads"),
    (hf_llama, {"model_type": "mistral"}, "model_type is 'mistral'; supported: 'llama'"),
    (hf_llama, {"model_type": "mistral", "architectures": None}, "model_type is 'mistral'; supported: clip_vision_model, vit, clip, lla"),
    (hf_llama, {"model_type": None, "architectures": []}, "model_type is None"),
    (hf_llama, {"architectures": ["MistralForCausalLM"]}, r"architectures is \['MistralForCausalLM'\]; supported: CLIPVisionModel, "),
    (hf_llama, {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': .1.}; no code here reads"),
    (hf_llama, {"quantization_config": {"load_in_4bit": True}}, "quantization_config is .*; quantized weights are not supported"),
    (hf_opt, {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    (hf_opt, {"word_embed_proj_dim": 20}, "word_embed_proj_dim is 20; supported: 36"),
    (hf_opt, {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    (hf_clip_vision, {"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'quick_gelu', 'gelu'"),
    (hf_clip_vision, {"num_channels": 1}, "num_channels is 1"),
    (hf_bert, {"is_decoder": True}, "is_decoder is True; supported: False"),
    (hf_bert, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; supported: 'absolute'"),
    (hf_bert, {"tie_word_embeddings": False}, "tie_word_embeddings is False; supported: True"),
    (hf_bert, {"architectures": ["BertForSequenceClassification"]}, "architectures is .*; supported: .*BertForMaskedLM"),
    (hf_t5, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; supported: 'relu', 'gated-gelu'"),
    (hf_t5, {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'; supported: 'gelu_new', 'gelu'"),
    (hf_t5, {"is_gated_act": False}, "is_gated_act is False; supported: True"),
    (hf_t5_first, {"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; supported: 'relu'"),
    (hf_t5, {"is_encoder_decoder": False}, "is_encoder_decoder is False; supported: True"),
    (hf_t5, {"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    (hf_t5, {"d_kv": "64"}, "d_kv is '64'; a whole number"),
    (hf_t5, {"relative_attention_num_buckets": 2}, "2 buckets up to distance 13: at least 4 are needed"),
    (hf_t5, {"model_type": "mt5"}, "model_type is 'mt5'; supported: 't5'"),
    (hf_blip2, {"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'; supported: 'opt', 't5'"),
    (hf_instructblip, {"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt'; supported: 'llama', 't5'"),
    (hf_instructblip, {"text_config": {}}, "text_config.model_type is None; supported: 'llama', 't5'"),
    (hf_instructblip, {"qformer_config": {"model_type": "blip_2_qformer"}}, "qformer_config.model_type is 'blip_2_qformer'; supported: 'inst"),
    (hf_instructblip, {"image_text_hidden_size": 256}, "image_text_hidden_size is 256; no code here reads this field"),
    (hf_blip2, {"vision_config": {"qkv_bias": False}}, "vision_config.qkv_bias is False; supported: True"),
    (hf_blip2, {"qformer_config": {"use_qformer_text_input": True}}, "qformer_config.use_qformer_text_input is True; supported: False"),
    (hf_blip, {"tie_word_embeddings": False}, "tie_word_embeddings is False; supported: True"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "tie_word_embeddings": False}}, "text_config.tie_word_embeddings is False"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "is_decoder": False}}, "text_config.is_decoder is False; supported: True"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "hidden_act": "relu"}}, "text_config.hidden_act is 'relu'; supported: 'gelu'"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "num_attention_heads": 4}}, "30 is not a multiple of 4 heads"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "position_embedding_type": "relative_key"}}, "text_config.position_embedding_type"),
    (hf_blip, {"text_config": {**BLIP_TEXT, "bos_token_id": 52}}, r"text_config.bos_token_id is 52; \[DEC\] and \[ENC\], one further"),
    (hf_blip, {"vision_config": {**EVA, "qkv_bias": False}}, "vision_config.qkv_bias is False; supported: True"),
    (hf_blip, {"vision_config": {**EVA, "image_size": [20, 25]}}, r"vision_config.image_size is \[20, 25\]; a whole number"),
    (hf_blip_retrieval, {"vision_config": {**EVA, "model_type": "clip_vision_model"}}, "vision_config.model_type is 'clip_vision_model'"),
    (hf_blip_retrieval, {"image_text_hidden_size": 0}, "image_text_hidden_size is 0; a whole number"),
    (hf_blip, {"architectures": ["BlipForQuestionAnswering"]}, "text_config.hidden_size is 30; the answer decoder looks.*: 24, the vision tower's"),
    (hf_blip, {"architectures": ["BlipModel"]}, r"architectures is \['BlipModel'\]; supported: .*BlipForConditionalGeneration"),
    (hf_llava, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    (hf_llava, {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]; a whole number"),
    (hf_llava, {"vision_feature_layer": -6}, "vision_feature_layer is -6; the vision tower has 4 blocks"),
    (hf_llava, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    (hf_llava, {"text_config": {**LLAMA, "model_type": "qwen2"}}, "text_config.model_type is 'qwen2'"),
    (hf_llava, {"vision_config": {**CLIP, "model_type": "siglip"}}, "vision_config.model_type is 'siglip'"),
    (hf_llava, {"text_config": {**LLAMA, "quantization_config": {"bits": 4}}}, "text_config.quantization_config is .*; quantized"),
    (hf_llava, {"text_config": "llama"}, "text_config is 'llama'; an object"),
    (hf_next, {"use_image_newline_parameter": False}, "use_image_newline_parameter is False; supported: True"),
    (hf_clip, {"vision_config_dict": "b/32"}, "vision_config_dict is 'b/32'; an object with named fields"),
]


@pytest.mark.parametrize(("build", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(build, changes, message):
    config, state = parts(build(8))
    with pytest.raises(UserError, match=f"^config.json: (width )?{message}"):
        from_hf({**config, **changes}, state)
