"""What a published config.json says, as our configs: sizes, activations, positions.

A config.json may leave out what equals the default of its class (LLaVA's often do), so each table gives every field
that is read and its default. What our code cannot do is refused by name: read past, it would give a model that talks
nonsense.
"""

from dataclasses import replace

from nanovlm.bert import BertConfig
from nanovlm.decoder import DecoderConfig, llama, opt
from nanovlm.errors import UserError
from nanovlm.papers.blip2 import BLIP2Config
from nanovlm.papers.clip import CLIPConfig
from nanovlm.papers.llava import LLaVAConfig
from nanovlm.qformer import QFormerConfig
from nanovlm.t5 import T5Config
from nanovlm.tiling import NEXT_GRIDS, llava_next_tiling
from nanovlm.vit import CLIP_L_14, CLIP_L_14_336, ViTConfig

# field: default
CLIP_VISION = {"image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_size": 768, "intermediate_size": 3072,
               "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "intermediate_size": 2048,
             "num_hidden_layers": 12, "num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
OPT = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
       "max_position_embeddings": 2048, "activation_function": "relu", "do_layer_norm_before": True,
       "_remove_final_layer_norm": False, "enable_bias": True, "layer_norm_elementwise_affine": True,
       "tie_word_embeddings": True}
BERT = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "position_embedding_type": "absolute",
        "is_decoder": False, "add_cross_attention": False}
BLIP2_VISION = {"image_size": 224, "patch_size": 14, "hidden_size": 1408, "intermediate_size": 6144,
                "num_hidden_layers": 39, "num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
                "qkv_bias": True}
QFORMER = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
           "intermediate_size": 3072, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
           "hidden_dropout_prob": 0.1, "cross_attention_frequency": 2, "use_qformer_text_input": False}
BLIP2 = {"num_query_tokens": 32, "image_text_hidden_size": 256}
T5 = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
      "feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
      "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True, "decoder_start_token_id": 0, "is_encoder_decoder": True}
LLAVA = {"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
         "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
ORIGINAL_LLAVA = {"mm_projector_type": "linear", "mm_vision_select_feature": "patch"}

# field: the values that our code can do
ONLY = {"num_channels": (3,), "attention_bias": (False,), "mlp_bias": (False,), "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,), "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
        "activation_function": ("relu",), "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
        "position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,),
        "qkv_bias": (True,), "vision_feature_select_strategy": ("default",), "mm_vision_select_feature": ("patch",),
        "mm_projector_type": ("linear", "mlp2x_gelu"), "feed_forward_proj": ("relu", "gated-gelu"),
        "is_encoder_decoder": (True,)}

# feed_forward_proj: dense_act_fn: ours; the first is the default. BLIP-2's checkpoints say "gelu", FlanT5's nothing.
T5_ACTIVATIONS = {"relu": {"relu": "relu"}, "gated-gelu": {"gelu_new": "geglu_tanh", "gelu": "geglu"}}

VISION_TOWERS = {"openai/clip-vit-large-patch14": CLIP_L_14, "openai/clip-vit-large-patch14-336": CLIP_L_14_336}
IMAGE_TOKEN_INDEX = -200  # <image> in the original code, outside of every vocabulary


def read(config: dict, defaults: dict, **only: tuple) -> dict:
    """The fields named in `defaults`; `only`: further limits than those of ONLY."""
    values = {}
    for name, default in defaults.items():
        value = default if config.get(name) is None else config[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default) or (type(value) is int and value < 1 <= default):
            raise UserError(f"config.json: {name} is {value!r}; a {type(default).__name__} like {default!r} is needed.")
        allowed = only.get(name, ONLY.get(name, (value,)))
        if value not in allowed:
            raise UserError(f"config.json: {name} is {value!r}; supported: {', '.join(map(repr, allowed))}.")
        values[name] = value
    return values


def section(config: dict, name: str) -> dict:
    """A part of the config that has fields of its own; empty where it is left out."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {name} is {value!r}; an object with named fields is needed.")
    return value


def clip_vision(config: dict) -> ViTConfig:
    read(config, {"model_type": "clip_vision_model"}, model_type=("clip_vision_model",))
    c = read(config, CLIP_VISION, hidden_act=("quick_gelu", "gelu"))
    return ViTConfig(c["image_size"], c["patch_size"], c["hidden_size"], c["num_hidden_layers"],
                     c["num_attention_heads"], c["intermediate_size"], activation=c["hidden_act"],
                     eps=c["layer_norm_eps"])


def clip_text(config: dict) -> DecoderConfig:
    c = read(config, CLIP_TEXT, hidden_act=("quick_gelu", "gelu"))
    return DecoderConfig(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                         c["intermediate_size"], c["max_position_embeddings"], norm="layer", eps=c["layer_norm_eps"],
                         activation=c["hidden_act"], rope_base=None, bias=True, tied=True)


def clip_both(config: dict) -> CLIPConfig:
    width = read(config, {"projection_dim": 512})["projection_dim"]
    return CLIPConfig(clip_vision(section(config, "vision_config")), clip_text(section(config, "text_config")), width)


def llama_decoder(config: dict) -> DecoderConfig:
    rope = section(config, "rope_parameters") or section(config, "rope_scaling")  # transformers 5; 4
    read({"rope_type": rope.get("rope_type", rope.get("type"))}, {"rope_type": "default"}, rope_type=("default",))
    c = read({**config, **rope}, LLAMA, hidden_act=("silu",))
    heads = c["num_attention_heads"]
    # no grouped queries, no inner width of its own
    read(config, {"num_key_value_heads": heads, "head_dim": c["hidden_size"] // heads},
         num_key_value_heads=(heads,), head_dim=(c["hidden_size"] // heads,))
    decoder = llama(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], heads, c["intermediate_size"],
                    c["max_position_embeddings"], c["rms_norm_eps"])
    return replace(decoder, rope_base=c["rope_theta"], tied=c["tie_word_embeddings"])


def opt_decoder(config: dict) -> DecoderConfig:
    """All of OPT but 350m, which norms after the sum and has words narrower than its blocks."""
    c = read(config, OPT)
    read(config, {"word_embed_proj_dim": c["hidden_size"]}, word_embed_proj_dim=(c["hidden_size"],))
    decoder = opt(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["ffn_dim"],
                  c["max_position_embeddings"])
    return replace(decoder, tied=c["tie_word_embeddings"])


def bert(config: dict) -> BertConfig:
    c = read(config, BERT, hidden_act=("gelu",))
    return BertConfig(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
                      c["intermediate_size"], c["max_position_embeddings"], segments=c["type_vocab_size"],
                      eps=c["layer_norm_eps"], dropout=c["hidden_dropout_prob"])


def blip2(config: dict, retrieval: bool) -> BLIP2Config:
    """Blip2ForConditionalGeneration, or Blip2ForImageTextRetrieval, whose Q-Former reads."""
    c, v = read(config, BLIP2), read(section(config, "vision_config"), BLIP2_VISION, hidden_act=("gelu",))
    vision = ViTConfig(v["image_size"], v["patch_size"], v["hidden_size"], v["num_hidden_layers"],
                       v["num_attention_heads"], v["intermediate_size"], activation="gelu", pre_norm=False,
                       final_norm=False, patch_bias=True, bias="qvo", eps=v["layer_norm_eps"])
    q = read(section(config, "qformer_config"), QFORMER, hidden_act=("gelu",), use_qformer_text_input=(retrieval,))
    text = BertConfig(q["vocab_size"], q["hidden_size"], q["num_hidden_layers"], q["num_attention_heads"],
                      q["intermediate_size"], q["max_position_embeddings"], eps=q["layer_norm_eps"],
                      dropout=q["hidden_dropout_prob"])
    qformer = QFormerConfig(text, c["num_query_tokens"], v["hidden_size"], q["cross_attention_frequency"], retrieval)
    language = None
    if not retrieval:
        text_config = section(config, "text_config")
        kind = read(text_config, {"model_type": "opt"}, model_type=("opt", "t5"))["model_type"]
        language = t5(text_config) if kind == "t5" else opt_decoder(text_config)
    return BLIP2Config(vision, qformer, language, c["image_text_hidden_size"], eps=v["layer_norm_eps"],
                       trains=not retrieval)


def t5(config: dict) -> T5Config:
    c = read(config, T5)
    activations = T5_ACTIVATIONS[c["feed_forward_proj"]]
    default, *_ = activations
    activation = read(config, {"dense_act_fn": default}, dense_act_fn=tuple(activations))["dense_act_fn"]
    depth = read(config, {"num_decoder_layers": c["num_layers"]})["num_decoder_layers"]
    # transformers 5 writes tie_word_embeddings = True for every T5; what it used to mean stands in a field of its own
    tied = read(config, {"scale_decoder_outputs": c["tie_word_embeddings"]})["scale_decoder_outputs"]
    return T5Config(c["vocab_size"], c["d_model"], c["num_layers"], c["num_heads"], c["d_kv"], c["d_ff"], depth,
                    activations[activation], c["relative_attention_num_buckets"], c["relative_attention_max_distance"],
                    c["layer_norm_epsilon"], tied, c["decoder_start_token_id"])


def llava(config: dict) -> LLaVAConfig:
    """LlavaForConditionalGeneration: a config for each part."""
    c = read(config, LLAVA)
    text = section(config, "text_config")
    read(text, {"model_type": "llama"}, model_type=("llama",))
    # no vision_config means CLIP-L/14-336, the class's default
    vision = clip_vision(config["vision_config"]) if section(config, "vision_config") else CLIP_L_14_336
    return LLaVAConfig(vision, llama_decoder(text), c["image_token_index"], projector_layers=2,
                       feature_layer=feature_layer("vision_feature_layer", c["vision_feature_layer"], vision))


def llava_next(config: dict) -> LLaVAConfig:
    """LlavaNextForConditionalGeneration: the same, and the sizes, [height, width], of the canvases that are cut into tiles."""
    base = llava(config)
    side = base.vision.image_size
    pinpoints = config.get("image_grid_pinpoints") or [[rows * side, columns * side] for rows, columns in NEXT_GRIDS]
    sound = isinstance(pinpoints, list) and all(
        isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 and n % side == 0 for n in size)
        for size in pinpoints)
    if not sound:
        raise UserError(f"config.json: image_grid_pinpoints is {pinpoints!r}; a list of [height, width] is needed, each a "
                        f"multiple of the vision tower's {side} pixels.")
    return replace(base, tiling=llava_next_tiling(side, tuple((height // side, width // side) for height, width in pinpoints)))


def original_llava(config: dict) -> LLaVAConfig:
    """LlavaLlamaForCausalLM: LLaMA's fields, and the vision tower by name."""
    c = read(config, ORIGINAL_LLAVA)
    name = config.get("mm_vision_tower")
    if section(config, "vision_config"):
        vision = clip_vision(config["vision_config"])
    elif name in VISION_TOWERS:
        vision = VISION_TOWERS[name]
    else:
        raise UserError(f"config.json: the sizes of mm_vision_tower {name!r} are not known here; say where it is: "
                        "load(folder, vision=its_folder).")
    layer = config.get("mm_vision_select_layer")
    if type(layer) is not int:
        raise UserError(f"config.json: mm_vision_select_layer is {layer!r}; a number is needed (published: -2).")
    return LLaVAConfig(vision, llama_decoder(config), IMAGE_TOKEN_INDEX,
                       projector_layers=2 if c["mm_projector_type"] == "mlp2x_gelu" else 1,
                       feature_layer=feature_layer("mm_vision_select_layer", layer, vision))


def feature_layer(field: str, layer: int, vision: ViTConfig) -> int:
    """Counted from the end, as ours: of the L + 1 hidden states, 0 (before the first block) is −L − 1."""
    states = vision.layers + 1
    if not -states <= layer < states:
        raise UserError(f"config.json: {field} is {layer}, but the vision tower has {vision.layers} blocks.")
    return layer - states if layer >= 0 else layer
