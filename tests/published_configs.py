"""config.json of published checkpoints, written by hand as their repositories have them, full of fields that say nothing.

Transformers 4 wrote every field of every section out, those of generation and of classification too.
"""

# what transformers 4 wrote into a section for each field that it did not set
WRITTEN_OUT = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "begin_suppress_tokens": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.27.0.dev0", "typical_p": 1.0, "use_bfloat16": False}

CLIP_TEXT = {"attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
             "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
             "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
             "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
             "vocab_size": 49408}
CLIP_VISION = {"attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024,
               "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
               "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3,
               "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}


def clip(size: int) -> dict:
    legacy = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
              "patch_size": 14, "projection_dim": 768}
    return {
        "_name_or_path": "clip-vit-large-patch14/", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 768,
        "text_config": {**WRITTEN_OUT, **CLIP_TEXT},
        "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                             "num_hidden_layers": 12, "projection_dim": 768},
        "torch_dtype": "float32", "transformers_version": None,
        "vision_config": {**WRITTEN_OUT, **CLIP_VISION, "image_size": size},
        "vision_config_dict": legacy if size == 224 else {**legacy, "image_size": size}}


VICUNA = {"_name_or_path": "vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
          "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
          "max_length": 4096, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
          "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1,
          "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
          "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 32000}
LLAMA_1 = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
           "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
           "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
           "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True,
           "vocab_size": 32000}


def opt(width: int) -> dict:
    return {"_name_or_path": f"facebook/opt-{width}", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
            "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4 * width,
            "hidden_size": width, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
            "model_type": "opt", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 1,
            "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True,
            "vocab_size": 50272, "word_embed_proj_dim": width}


BERT_BASE = {"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
             "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
             "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
             "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
             "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2,
             "use_cache": True, "vocab_size": 30522}
T5_SMALL = {"architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
            "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
            "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
            "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0,
            "relative_attention_num_buckets": 32, "vocab_size": 32128,
            "task_specific_params": {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}}}
FLAN_T5_XL = {**T5_SMALL, "d_ff": 5120, "d_model": 2048, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 24,
              "num_heads": 32, "num_layers": 24, "relative_attention_max_distance": 128, "tie_word_embeddings": False,
              "torch_dtype": "float32", "transformers_version": "4.24.0.dev0", "use_cache": True}

BLIP2_VISION = {**WRITTEN_OUT, "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408,
                "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 6144,
                "layer_norm_eps": 1e-05, "model_type": "blip_2_vision_model", "num_attention_heads": 16,
                "num_channels": 3, "num_hidden_layers": 39, "patch_size": 14, "projection_dim": 512, "qkv_bias": True}
QFORMER = {**WRITTEN_OUT, "attention_probs_dropout_prob": 0.1, "classifier_dropout": None, "cross_attention_frequency": 2,
           "encoder_hidden_size": 1408, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
           "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
           "max_position_embeddings": 512, "model_type": "blip_2_qformer", "num_attention_heads": 12,
           "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "vocab_size": 30522}


def blip2(text: dict, **changes) -> dict:
    tied = text.get("tie_word_embeddings", True)
    return {"_commit_hash": None, "architectures": ["Blip2ForConditionalGeneration"], "initializer_factor": 1.0,
            "initializer_range": 0.02, "is_encoder_decoder": text["model_type"] == "t5", "model_type": "blip-2",
            "num_query_tokens": 32, "qformer_config": QFORMER, "text_config": {**WRITTEN_OUT, **text},
            "tie_word_embeddings": tied, "torch_dtype": "float32", "transformers_version": None,
            "use_decoder_only_language_model": text["model_type"] == "opt", "vision_config": BLIP2_VISION, **changes}


BLIP2_OPT_WRITTEN_OUT = blip2({**opt(2560), "enable_bias": True, "layer_norm_elementwise_affine": True},
                              image_token_index=50265)
BLIP2_T5_WRITTEN_OUT = blip2({**FLAN_T5_XL, "dense_act_fn": "gelu", "is_gated_act": True}, image_token_index=32100)
# as their repositories have them today: what equals the default is left out
SHORT = {"architectures": ["Blip2ForConditionalGeneration"], "image_text_hidden_size": 256, "initializer_factor": 1.0,
         "initializer_range": 0.02, "model_type": "blip-2", "num_query_tokens": 32,
         "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"}, "torch_dtype": "float32",
         "transformers_version": "4.47.0.dev0",
         "vision_config": {"dropout": 0.0, "initializer_factor": 1.0, "model_type": "blip_2_vision_model",
                           "num_channels": 3, "projection_dim": 512}}
BLIP2_OPT = {**SHORT, "image_token_index": 50265, "use_decoder_only_language_model": True,
             "text_config": {"_name_or_path": "facebook/opt-2.7b", "activation_dropout": 0.0,
                             "architectures": ["OPTForCausalLM"], "eos_token_id": 50118, "ffn_dim": 10240,
                             "hidden_size": 2560, "model_type": "opt", "num_attention_heads": 32,
                             "num_hidden_layers": 32, "prefix": "</s>", "torch_dtype": "float16", "vocab_size": 50304,
                             "word_embed_proj_dim": 2560}}
BLIP2_T5 = {**SHORT, "image_token_index": 32100, "use_decoder_only_language_model": False,
            "text_config": {**FLAN_T5_XL, "bos_token_id": 1, "classifier_dropout": 0.0, "dense_act_fn": "gelu",
                            "is_gated_act": True}}
BLIP2_ITM = {**SHORT, "architectures": ["Blip2ForImageTextRetrieval"], "image_token_index": None,
             "qformer_config": {"model_type": "blip_2_qformer", "use_qformer_text_input": True, "vocab_size": 30523},
             "text_config": {"model_type": "opt"}, "use_decoder_only_language_model": True}



def instructblip(text: dict, **changes) -> dict:
    """With the fields that its classes wrote when the checkpoints were converted."""
    vision = {name: value for name, value in BLIP2_VISION.items() if name not in ("dropout", "initializer_factor", "num_channels", "projection_dim")}
    return {"architectures": ["InstructBlipForConditionalGeneration"], "initializer_factor": 1.0, "initializer_range": 0.02,
            "model_type": "instructblip", "num_query_tokens": 32, "text_config": {**WRITTEN_OUT, **text}, "tie_word_embeddings": False,
            "qformer_config": {**QFORMER, "model_type": "instructblip_qformer", "vocab_size": 30523}, "torch_dtype": "float32",
            "transformers_version": None, "use_decoder_only_language_model": text["model_type"] == "llama",
            "vision_config": {**vision, "layer_norm_eps": 1e-06, "model_type": "instructblip_vision_model"}, **changes}


INSTRUCTBLIP_VICUNA = instructblip({**LLAMA_1, "_name_or_path": "vicuna-7b", "tie_word_embeddings": False, "vocab_size": 32001},
                                   image_token_index=32000)
INSTRUCTBLIP_T5 = instructblip({**FLAN_T5_XL, "bos_token_id": 1, "dense_act_fn": "gelu", "is_gated_act": True}, image_token_index=32100)

# BLIP's config.json, with the fields that its classes wrote when the checkpoints were converted
BLIP_TEXT = {**WRITTEN_OUT, "attention_probs_dropout_prob": 0.0, "bos_token_id": 30522, "encoder_hidden_size": 768, "eos_token_id": 2,
             "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
             "intermediate_size": 3072, "is_decoder": True, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
             "model_type": "blip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
             "projection_dim": 768, "sep_token_id": 102, "use_cache": True, "vocab_size": 30524}
BLIP_VISION = {**WRITTEN_OUT, "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "gelu", "hidden_size": 768, "image_size": 384,
               "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
               "model_type": "blip_vision_model", "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16,
               "projection_dim": 512}
BLIP_CAPTIONS = {"_commit_hash": None, "architectures": ["BlipForConditionalGeneration"], "image_text_hidden_size": 256,
                 "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "blip", "projection_dim": 512,
                 "text_config": BLIP_TEXT, "torch_dtype": "float32", "transformers_version": None, "vision_config": BLIP_VISION}
BLIP_CAPTIONS_LARGE = {**BLIP_CAPTIONS, "text_config": {**BLIP_TEXT, "encoder_hidden_size": 1024},
                       "vision_config": {**BLIP_VISION, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                                         "num_hidden_layers": 24}}
BLIP_ITM = {**BLIP_CAPTIONS, "architectures": ["BlipForImageTextRetrieval"]}
BLIP_VQA = {**BLIP_CAPTIONS, "architectures": ["BlipForQuestionAnswering"]}
# what equals the default is left out; the heads do not
BLIP_SHORT = {"architectures": ["BlipForConditionalGeneration"], "model_type": "blip",
              "text_config": {"label_smoothing": 0.1, "model_type": "blip_text_model", "num_attention_heads": 12},
              "vision_config": {"dropout": 0.0, "initializer_factor": 1.0, "model_type": "blip_vision_model", "num_channels": 3}}

LLAVA_VISION = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
                "vocab_size": 32000}
LLAVA_HF = {"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
            "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
                            "torch_dtype": "float16", "vocab_size": 32064},
            "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
            "vision_config": LLAVA_VISION, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "vocab_size": 32064}
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
LLAVA_NEXT_HF = {**LLAVA_HF, "architectures": ["LlavaNextForConditionalGeneration"], "image_grid_pinpoints": GRIDS,
                 "image_seq_length": 576, "model_type": "llava_next", "multimodal_projector_bias": True,
                 "use_image_newline_parameter": True}
LLAVA_ORIGINAL = {**VICUNA, "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
                  "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad",
                  "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
                  "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
                  "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                  "model_type": "llava", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
                  "unfreeze_mm_vision_tower": False, "use_mm_proj": True}
LLAVA_NEXT_ORIGINAL = {**LLAVA_ORIGINAL, "_name_or_path": "lmsys/vicuna-7b-v1.5", "attention_bias": False,
                       "attention_dropout": 0.0, "image_aspect_ratio": "anyres", "image_crop_resolution": 224,
                       "image_grid_pinpoints": GRIDS, "image_split_resolution": 224, "mm_patch_merge_type": "spatial_unpad",
                       "mm_projector_lr": None, "mm_vision_tower_lr": 2e-06, "rope_theta": 10000.0,
                       "tokenizer_model_max_length": 4096, "tokenizer_padding_side": "right",
                       "unfreeze_mm_vision_tower": True}

PUBLISHED = {
    "clip-vit-large-patch14": clip(224), "clip-vit-large-patch14-336": clip(336), "vicuna-7b-v1.5": VICUNA,
    "llama-7b": LLAMA_1, "opt-2.7b": opt(2560), "opt-6.7b": opt(4096), "bert-base-uncased": BERT_BASE,
    "t5-small": T5_SMALL, "flan-t5-xl": FLAN_T5_XL, "blip2-opt-2.7b": BLIP2_OPT, "blip2-flan-t5-xl": BLIP2_T5,
    "blip2-opt-2.7b, written out": BLIP2_OPT_WRITTEN_OUT, "blip2-flan-t5-xl, written out": BLIP2_T5_WRITTEN_OUT,
    "instructblip-vicuna-7b": INSTRUCTBLIP_VICUNA, "instructblip-flan-t5-xl": INSTRUCTBLIP_T5,
    "blip2-itm-vit-g": BLIP2_ITM, "blip-image-captioning-base": BLIP_CAPTIONS, "blip-image-captioning-base, short": BLIP_SHORT,
    "blip-image-captioning-large": BLIP_CAPTIONS_LARGE, "blip-itm-base-coco": BLIP_ITM,
    "blip-vqa-base": BLIP_VQA, "llava-1.5-7b-hf": LLAVA_HF, "llava-v1.5-7b": LLAVA_ORIGINAL,
    "llava-v1.6-vicuna-7b-hf": LLAVA_NEXT_HF, "llava-v1.6-vicuna-7b": LLAVA_NEXT_ORIGINAL}
