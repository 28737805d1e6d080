"""What a published config.json says, as our configs: sizes, activations, positions.

    config.json                    the table of its class             ours
    {"hidden_size": 1024,    ──►   "hidden_size": 768          ──►    ViTConfig(width=1024,
     "hidden_act": "gelu"}         "hidden_act": (…, …)                         activation="gelu",
                                   "patch_size": 32                             patch=32, …)

A config.json may leave out what equals the default of its class (LLaVA's often do), so each table gives every field
that is read with its default: a single value, or the values that our code can do, of which the first is the default.
A function gives the default that follows from the fields above it.

All other fields are refused by name unless they are known to change nothing (HARMLESS): a field that is read past
would give a model that talks, but not as it should.
"""

from collections.abc import Callable
from dataclasses import replace

from nanovlm.bert import BertConfig
from nanovlm.decoder import DecoderConfig, opt
from nanovlm.errors import UserError
from nanovlm.papers.blip import BLIPConfig
from nanovlm.papers.blip2 import BLIP2Config
from nanovlm.papers.clip import CLIPConfig
from nanovlm.papers.llava import LLaVAConfig
from nanovlm.qformer import QFormerConfig
from nanovlm.t5 import T5Config
from nanovlm.tiling import NEXT_GRIDS, Tiling, llava_next_tiling
from nanovlm.vit import CLIP_L_14, CLIP_L_14_336, ViTConfig

# their field: ours; those with another name here are called the same in both
OURS = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "intermediate_size": "ffn",
        "vocab_size": "vocab", "max_position_embeddings": "max_positions", "hidden_act": "activation",
        "layer_norm_eps": "eps", "rms_norm_eps": "eps", "layer_norm_epsilon": "eps", "hidden_dropout_prob": "dropout",
        "patch_size": "patch", "rope_theta": "rope_base", "tie_word_embeddings": "tied", "ffn_dim": "ffn",
        "type_vocab_size": "segments", "num_query_tokens": "queries", "cross_attention_frequency": "cross_every",
        "image_text_hidden_size": "embedding", "d_model": "width", "d_kv": "head_dim", "d_ff": "ffn",
        "num_layers": "layers", "num_decoder_layers": "decoder_layers", "num_heads": "heads",
        "relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max_distance",
        "bos_token_id": "decode_id", "label_smoothing": "smoothing", "decoder_start_token_id": "start_id", "scale_decoder_outputs": "tied", "image_token_index": "image_token_id"}

EVERY = {"is_decoder": (False,), "add_cross_attention": (False,), "is_encoder_decoder": (False,),
         "tie_encoder_decoder": (False,)}
CLIP_VISION = {"model_type": ("clip_vision_model",), "image_size": 224, "patch_size": 32, "num_channels": (3,),
               "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": 1e-5}
IMAGENET_VIT = {"model_type": ("vit",), "image_size": 224, "patch_size": 16, "num_channels": (3,), "hidden_size": 768,
                "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": ("gelu",),
                "layer_norm_eps": 1e-12, "qkv_bias": (True,)}
CLIP_TEXT = {"model_type": ("clip_text_model",), "vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512,
             "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
             "hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": 1e-5}
CLIP = {"model_type": ("clip",), "projection_dim": 512, "text_config": {}, "vision_config": {}, "text_config_dict": {},
        "vision_config_dict": {}}
LLAMA = {"model_type": ("llama",), "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
         "rope_theta": 10000.0, "rope_parameters": {}, "rope_scaling": {}, "hidden_act": ("silu",),
         "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": False,
         # no grouped queries, no inner width of its own
         "num_key_value_heads": lambda c: (c["num_attention_heads"],),
         "head_dim": lambda c: (c["hidden_size"] // c["num_attention_heads"],)}
ROPE = {"rope_theta": 10000.0, "rope_type": ("default",), "type": ("default",)}
OPT = {"model_type": ("opt",), "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12,
       "num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048, "activation_function": ("relu",),
       # not 350m, which norms after the sum and has words narrower than its blocks
       "do_layer_norm_before": (True,), "word_embed_proj_dim": lambda c: (c["hidden_size"],),
       "_remove_final_layer_norm": (False,), "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
       "tie_word_embeddings": True}
T5 = {"model_type": ("t5",), "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
      "num_decoder_layers": lambda c: c["num_layers"], "num_heads": 8, "relative_attention_num_buckets": 32,
      "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0,
      "is_encoder_decoder": (True,), "feed_forward_proj": ("relu", "gated-gelu"),
      "is_gated_act": lambda c: (c["feed_forward_proj"] == "gated-gelu",),
      # BLIP-2's checkpoints say "gelu", FlanT5's nothing
      "dense_act_fn": lambda c: ("gelu_new", "gelu") if c["is_gated_act"] else ("relu",),
      # transformers 5 says True for every T5; what it used to mean stands in a field of its own
      "tie_word_embeddings": True, "scale_decoder_outputs": lambda c: c["tie_word_embeddings"]}
T5_ACTIVATIONS = {"relu": "relu", "gelu_new": "geglu_tanh", "gelu": "geglu"}
READER = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
          "intermediate_size": 3072, "max_position_embeddings": 512, "hidden_act": ("gelu",), "layer_norm_eps": 1e-12,
          "hidden_dropout_prob": 0.1, "position_embedding_type": ("absolute",)}
BERT = {**READER, "model_type": ("bert",), "type_vocab_size": 2, "tie_word_embeddings": (True,)}
BLIP2_VISION = {"model_type": ("blip_2_vision_model",), "image_size": 224, "patch_size": 14, "num_channels": (3,),
                "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
                "hidden_act": ("gelu",), "layer_norm_eps": 1e-6, "qkv_bias": (True,)}
QFORMER = {**READER, "model_type": ("blip_2_qformer",), "cross_attention_frequency": 2}
BLIP2 = {"model_type": ("blip-2",), "num_query_tokens": 32, "image_text_hidden_size": 256, "vision_config": {},
         "qformer_config": {}, "text_config": {}, "is_encoder_decoder": (False, True)}  # the last says what text_config is
INSTRUCTBLIP = {name: default for name, default in BLIP2.items() if name != "image_text_hidden_size"} | {"model_type": ("instructblip",)}
BLIP_VISION = {**BLIP2_VISION, "model_type": ("blip_vision_model",), "image_size": 384, "patch_size": 16, "hidden_size": 768,
               "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "layer_norm_eps": 1e-5}  # BLIP's own code: 1e-6
BLIP_TEXT = {**READER, "model_type": ("blip_text_model",), "vocab_size": 30524, "num_attention_heads": 8, "bos_token_id": 30522,
             "hidden_dropout_prob": 0.0, "label_smoothing": 0.0, "tie_word_embeddings": (True,),
             "is_decoder": (True,)}  # in BLIP that says: it has cross-attention
BLIP = {"model_type": ("blip",), "image_text_hidden_size": 256, "vision_config": {}, "text_config": {}, "tie_word_embeddings": (True,)}
LLAVA = {"model_type": ("llava",), "image_token_index": 32000, "vision_feature_layer": -2,
         "vision_feature_select_strategy": ("default",), "projector_hidden_act": ("gelu",),
         "multimodal_projector_bias": (True,), "tie_word_embeddings": False, "text_config": {}, "vision_config": {}}
LLAVA_NEXT = {**LLAVA, "model_type": ("llava_next",), "image_grid_pinpoints": [], "use_image_newline_parameter": (True,)}
ORIGINAL_LLAVA = {"model_type": ("llava", "llava_llama"), "vision_config": {}, "mm_vision_tower": "", "mm_hidden_size": 1024,
                  "mm_vision_select_layer": -2, "mm_vision_select_feature": ("patch",), "use_mm_proj": (True,),
                  "mm_projector_type": ("linear", "mlp2x_gelu"), "mm_patch_merge_type": ("flat", "spatial_unpad"),
                  # "square" and "pad": how a picture becomes a square, which is for the caller's Transform to do
                  "image_aspect_ratio": ("square", "pad", "anyres"), "image_grid_pinpoints": [],
                  "mm_use_im_start_end": (False,)}

# names and notes; how text is generated; how training goes; what the rest of the config says already
HARMLESS = """_name_or_path name_or_path _commit_hash architectures auto_map transformers_version torch_dtype dtype
    torchscript use_bfloat16 tokenizer_class task_specific_params finetuning_task problem_type id2label label2id num_labels
    prefix use_cache output_attentions output_hidden_states output_scores output_past return_dict return_dict_in_generate
    attn_implementation _attn_implementation _attn_implementation_autoset chunk_size_feed_forward pretraining_tp
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences
    diversity_penalty length_penalty repetition_penalty exponential_decay_length_penalty temperature top_k top_p typical_p
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens ignore_index
    remove_invalid_values tf_legacy_loss gradient_checkpointing initializer_range initializer_factor init_std layerdrop
    logit_scale_init_value freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler
    unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr mm_use_im_patch_token tokenizer_model_max_length
    tokenizer_padding_side image_crop_resolution image_split_resolution vocab_size projection_dim tie_word_embeddings
    encoder_hidden_size image_seq_length image_token_index use_decoder_only_language_model max_sequence_length n_positions
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type pooler_act pooler_output_size encoder_stride pretrain_mm_mlp_adapter label_smoothing"""
HARMLESS_ENDS = ("_token_id", "dropout", "dropout_prob", "dropout_rate")

LIKE = {bool: "true or false", int: "a whole number like {}", float: "a number", str: "a text", list: "a list",
        dict: "an object with named fields"}
VISION_TOWERS = {"openai/clip-vit-large-patch14": CLIP_L_14, "openai/clip-vit-large-patch14-336": CLIP_L_14_336}
QUANTIZED = ("quantized weights are not supported: download the model in fp16 or bf16, or undo it with transformers "
             "(model.dequantize(), then model.save_pretrained(other_folder))")
IMAGE_TOKEN_INDEX = -200  # <image> in the original code, outside of every vocabulary


def refused(field: str, value: object, needed: str) -> UserError:
    return UserError(f"config.json: {field} is {value!r:.200}; {needed}.")


def read(config: dict, table: dict, where: str = "") -> dict:
    """The fields of `table` by our names, without those of a single value, which are only checked.

    where: the section of config.json, for the messages.
    """
    values, ours = {}, {}
    for name, default in {**EVERY, **table}.items():
        default = default(values) if callable(default) else default
        supported = default if type(default) is tuple else ()
        default = supported[0] if supported else default
        value = default if config.get(name) is None else config[name]
        value = float(value) if type(default) is float and type(value) is int else value
        if supported and value not in supported:
            raise refused(where + name, value, f"supported: {', '.join(map(repr, supported))}")
        if type(value) is not type(default) or (type(value) is int and value < 1 <= default):
            raise refused(where + name, value, f"{LIKE[type(default)].format(default)} is needed")
        values[name] = value
        if len(supported) != 1:
            ours[OURS.get(name, name)] = value
    for name, value in config.items():
        if name == "quantization_config" and value:
            raise refused(where + name, value, QUANTIZED)
        known = name in table or name in EVERY or name in HARMLESS.split() or name.endswith(HARMLESS_ENDS)
        if not known and value not in (None, "", [], {}):
            raise refused(where + name, value, "no code here reads this field; delete it if the model is the same without")
    return ours


# --- the parts ---

def clip_vision(config: dict, where: str = "") -> ViTConfig:
    return ViTConfig(**read(config, CLIP_VISION, where))


def imagenet_vit(config: dict) -> ViTConfig:
    """ViTModel or ViTForImageClassification, as DeiT is saved, too: what BLIP's ViT starts from."""
    return ViTConfig(**read(config, IMAGENET_VIT), activation="gelu", pre_norm=False, patch_bias=True)


def clip_text(config: dict, where: str) -> DecoderConfig:
    return DecoderConfig(**read(config, CLIP_TEXT, where), norm="layer", rope_base=None, bias=True, tied=True)


def llama(config: dict, where: str = "") -> DecoderConfig:
    c = read(config, LLAMA, where)
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5; 4
        c |= read({"rope_theta": c["rope_base"], **c.pop(name)}, ROPE, f"{where}{name}.")
    return DecoderConfig(**c)


def opt_decoder(config: dict, where: str = "") -> DecoderConfig:
    c = read(config, OPT, where)
    tied = c.pop("tied")
    return replace(opt(**c), tied=tied)


def t5(config: dict, where: str = "") -> T5Config:
    c = read(config, T5, where)
    activation = T5_ACTIVATIONS[c.pop("dense_act_fn", "relu")]
    del c["feed_forward_proj"]  # which activation says too
    return T5Config(**c, activation=activation)


def bert(config: dict) -> BertConfig:
    return BertConfig(**read(config, BERT))


# --- whole models ---

def clip_section(config: dict, name: str, table: dict) -> tuple[dict, str]:
    """vision_config or text_config, and the name of the section that counts.

    OpenAI's files have vision_config_dict beside it. As in transformers that one counts, defaults included.
    """
    sections = read(config, CLIP)
    read(sections[name], table, f"{name}.")
    if config.get(f"{name}_dict") is None:
        return sections[name], f"{name}."
    return {**sections[name], **dict.fromkeys(table), **sections[f"{name}_dict"]}, f"{name}_dict."


def clip(config: dict) -> CLIPConfig:
    return CLIPConfig(clip_vision(*clip_section(config, "vision_config", CLIP_VISION)),
                      clip_text(*clip_section(config, "text_config", CLIP_TEXT)), read(config, CLIP)["projection_dim"])


def blip(config: dict, tasks: tuple[str, ...]) -> BLIPConfig:
    """BlipForConditionalGeneration, or BlipForImageTextRetrieval: without slow copies, so that it does not learn to compare.

    Only [DEC] stands in config.json; [ENC] is the next id of the published vocabulary.
    """
    c = read(config, BLIP)
    vision = ViTConfig(**read(c["vision_config"], BLIP_VISION, "vision_config."), activation="gelu", pre_norm=False, patch_bias=True)
    text = read(c["text_config"], BLIP_TEXT, "text_config.")
    decode_id, smoothing = text.pop("decode_id"), text.pop("smoothing")
    if decode_id + 1 >= text["vocab"]:
        raise refused("text_config.bos_token_id", decode_id, f"[DEC] and [ENC], one further, are needed among {text['vocab']} words")
    return BLIPConfig(vision, BertConfig(**text, image_width=vision.width), c["embedding"], decode_id, decode_id + 1, tasks,
                      smoothing=smoothing, momentum=None)


def blip_answerer(config: dict) -> BLIPConfig:
    """BlipForQuestionAnswering: its decoder is built to look at what is as wide as the ViT, and looks at the text encoder's states."""
    c = blip(config, ("lm",))
    if c.vision.width != c.text.width:
        raise refused("text_config.hidden_size", c.text.width, f"the answer decoder looks at the question as at a picture: {c.vision.width}, the "
                      "vision tower's, is needed")
    return c


def blip2(config: dict, retrieval: bool = False) -> BLIP2Config:
    """Blip2ForConditionalGeneration, or Blip2ForImageTextRetrieval, whose Q-Former reads."""
    c = read(config, BLIP2)
    vision, qformer = bridge(c, BLIP2_VISION, {**QFORMER, "use_qformer_text_input": (retrieval,)}, retrieval)
    language = None if retrieval else language_of({"model_type": "opt", **c["text_config"]}, {"opt": opt_decoder, "t5": t5})
    return BLIP2Config(vision, qformer, language, c["embedding"], eps=vision.eps, trains=not retrieval)


def instructblip(config: dict) -> BLIP2Config:
    """InstructBlipForConditionalGeneration: its Q-Former reads always, and Vicuna stands in OPT's place."""
    c = read(config, INSTRUCTBLIP)
    vision, qformer = bridge(c, {**BLIP2_VISION, "model_type": ("instructblip_vision_model",)},
                             {**QFORMER, "model_type": ("instructblip_qformer",)}, reads=True)
    return BLIP2Config(vision, qformer, language_of(c["text_config"], {"llama": llama, "t5": t5}), eps=vision.eps, asks=True)


def bridge(sections: dict, vision_table: dict, qformer_table: dict, reads: bool) -> tuple[ViTConfig, QFormerConfig]:
    """EVA-CLIP without its last block and norm, and the Q-Former behind it."""
    vision = ViTConfig(**read(sections["vision_config"], vision_table, "vision_config."), activation="gelu", pre_norm=False,
                       final_norm=False, patch_bias=True, bias="qvo")
    text = read(sections["qformer_config"], qformer_table, "qformer_config.")
    cross_every = text.pop("cross_every")
    return vision, QFormerConfig(BertConfig(**text), sections["queries"], vision.width, cross_every, reads)


def language_of(section: dict, kinds: dict[str, Callable[[dict, str], DecoderConfig | T5Config]]) -> DecoderConfig | T5Config:
    """text_config, read by the one of `kinds` that it names."""
    kind = section.get("model_type")
    if kind not in kinds:
        raise refused("text_config.model_type", kind, f"supported: {', '.join(map(repr, kinds))}")
    return kinds[kind](section, "text_config.")


def llava(config: dict, table: dict = LLAVA) -> LLaVAConfig:
    """LlavaForConditionalGeneration: a config for each part. Its head is tied if either of two fields says so."""
    index, alias = config.get("image_token_index"), config.get("image_token_id")
    if index != alias and None not in (index, alias):
        raise refused("image_token_id", alias, f"it is another name of image_token_index, which is {index!r}: keep one")
    c = read({**config, "image_token_index": alias if index is None else index}, table)
    vision = CLIP_L_14_336  # what the class takes without a vision_config
    if config.get("vision_config") is not None:
        vision = clip_vision(c["vision_config"], "vision_config.")
    language = llama(c["text_config"], "text_config.")
    return LLaVAConfig(vision, replace(language, tied=c["tied"] or language.tied), c["image_token_id"], projector_layers=2,
                       feature_layer=feature_layer("vision_feature_layer", c["vision_feature_layer"], vision))


def llava_next(config: dict) -> LLaVAConfig:
    """LlavaNextForConditionalGeneration: the same with tiles. Only its own tie_word_embeddings counts, not text_config's."""
    base = llava(config, LLAVA_NEXT)
    side, language = base.vision.image_size, replace(base.language, tied=config.get("tie_word_embeddings") or False)
    pinpoints = config.get("image_grid_pinpoints") or [[rows * side, columns * side] for rows, columns in NEXT_GRIDS]
    return replace(base, language=language, tiling=tiling(side, pinpoints))


def original_llava(config: dict) -> LLaVAConfig:
    """LlavaLlamaForCausalLM: LLaMA's fields, and the vision tower by name. LLaVA 1.6 cuts pictures into tiles."""
    c = read({name: config[name] for name in config if name in ORIGINAL_LLAVA}, ORIGINAL_LLAVA)
    language = llama({name: config[name] for name in config if name not in ORIGINAL_LLAVA})
    vision = VISION_TOWERS.get(c["mm_vision_tower"])
    if config.get("vision_config") is not None:
        vision = clip_vision(c["vision_config"], "vision_config.")
    if vision is None:
        raise refused("mm_vision_tower", c["mm_vision_tower"], "its sizes are not known here; say where it is: "
                     "load(folder, vision=its_folder)")
    read({"mm_hidden_size": config.get("mm_hidden_size")}, {"mm_hidden_size": (vision.width,)})
    if config.get("mm_vision_select_layer") is None:
        raise refused("mm_vision_select_layer", None, "a whole number is needed (published: -2)")
    merge, aspect, tiles = c["mm_patch_merge_type"], c["image_aspect_ratio"], None
    if (merge == "spatial_unpad") != (aspect == "anyres"):
        raise refused("mm_patch_merge_type", merge, f"image_aspect_ratio is {aspect!r}; supported together: 'flat' with "
                     "'square' or 'pad', 'spatial_unpad' with 'anyres'")
    if aspect == "anyres":
        tiles = tiling(vision.image_size, c["image_grid_pinpoints"], step=-1)
    return LLaVAConfig(vision, language, IMAGE_TOKEN_INDEX, projector_layers=1 + (c["mm_projector_type"] == "mlp2x_gelu"),
                       feature_layer=feature_layer("mm_vision_select_layer", c["mm_vision_select_layer"], vision),
                       tiling=tiles)


def tiling(side: int, pinpoints: list, step: int = 1) -> Tiling:
    """Pictures are fitted into canvases of these sizes, [height, width], and cut into tiles. step: −1 for [width, height]."""
    sound = pinpoints and type(pinpoints) is list and all(
        type(size) in (list, tuple) and len(size) == 2 and all(type(n) is int and n > 0 and n % side == 0 for n in size)
        for size in pinpoints)
    if not sound:
        raise refused("image_grid_pinpoints", pinpoints, f"a list of {['[height, width]', '[width, height]'][::step][0]} is "
                      f"needed, each a multiple of the vision tower's {side} pixels")
    return llava_next_tiling(side, tuple((a // side, b // side)[::step] for a, b in pinpoints))


def feature_layer(field: str, layer: int, vision: ViTConfig) -> int:
    """Counted from the end, as ours: of the L + 1 hidden states, 0 (before the first block) is −L − 1."""
    states = vision.layers + 1
    if not -states <= layer < states:
        raise refused(field, layer, f"the vision tower has {vision.layers} blocks")
    return layer - states if layer >= 0 else layer
