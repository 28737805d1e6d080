"""Tiny models of transformers, with weights that bite: what ours are held against."""

from collections.abc import Sequence

import torch
import transformers
from tools import bite
from torch import Tensor, nn

from nanovlm import generation
from nanovlm.contract import Batch
from nanovlm.hub import from_hf

transformers.logging.set_verbosity_error()

# All sizes differ, so that no axis can be taken for another.
CLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 20,
        "patch_size": 5}
LLAMA = {"vocab_size": 53, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6,
         "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = {"vocab_size": 53, "hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 44, "num_hidden_layers": 2,
       "num_attention_heads": 6, "max_position_embeddings": 37, "dropout": 0.0,
       "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"vocab_size": 53, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 44,
        "max_position_embeddings": 23, "type_vocab_size": 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
EVA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20,
       "patch_size": 5}
QFORMER = {**{k: v for k, v in BERT.items() if k != "type_vocab_size"}, "cross_attention_frequency": 2}
QUERIES = 7
T5 = {"vocab_size": 53, "d_model": 26, "d_kv": 7, "d_ff": 34, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 5,
      "relative_attention_num_buckets": 10, "relative_attention_max_distance": 13, "dropout_rate": 0.0,
      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
      "decoder_start_token_id": 3, "eos_token_id": 2, "pad_token_id": 0}
IMAGE_ID = 51
BLIP_TEXT = {**{k: v for k, v in BERT.items() if k != "type_vocab_size"}, "bos_token_id": 51, "sep_token_id": 2}  # [DEC]; [ENC] is 52


def hf_clip_vision(seed: int, **changes) -> nn.Module:
    return bite(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**CLIP, **changes})), seed)


def hf_imagenet_vit(seed: int) -> nn.Module:
    return bite(transformers.ViTForImageClassification(transformers.ViTConfig(**CLIP)), seed)


def hf_llama(seed: int, **changes) -> nn.Module:
    return bite(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})), seed)


def hf_opt(seed: int, **changes) -> nn.Module:
    return bite(transformers.OPTForCausalLM(transformers.OPTConfig(**{**OPT, **changes})), seed)


def hf_t5(seed: int, **changes) -> nn.Module:
    """FlanT5, with a head of its own, as its files have it: transformers 5 ties the head of every new T5."""
    hf = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, **changes}))
    if hf.config.scale_decoder_outputs:
        return bite(hf, seed)
    hf.lm_head.weight = nn.Parameter(torch.empty_like(hf.lm_head.weight))
    return bite(hf, seed, 0.15)  # its unscaled scores and logits make more of every rounding


def hf_t5_exact(seed: int, **changes) -> nn.Module:
    """As BLIP-2 runs it."""
    return hf_t5(seed, **{"dense_act_fn": "gelu", **changes})


def hf_t5_first(seed: int, **changes) -> nn.Module:
    """T5 v1.0: no gate, and the head is the embedding."""
    return hf_t5(seed, **{"feed_forward_proj": "relu", "tie_word_embeddings": True, **changes})


def hf_llava(seed: int, text: dict | None = None, **changes) -> nn.Module:
    """text: changes of the language model's config."""
    language = transformers.LlamaConfig(**{**LLAMA, **(text or {})})
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**CLIP), image_token_index=IMAGE_ID,
                                      text_config=language, image_seq_length=16, **changes)
    return bite(transformers.LlavaForConditionalGeneration(config), seed)


def hf_next(seed: int, text: dict | None = None, **changes) -> nn.Module:
    """LLaVA 1.6 on views of 20 × 20 pixels."""
    pinpoints = [[20 * rows, 20 * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    language = transformers.LlamaConfig(**{**LLAMA, "max_position_embeddings": 400, **(text or {})})
    config = transformers.LlavaNextConfig(vision_config=transformers.CLIPVisionConfig(**CLIP), image_token_index=IMAGE_ID,
                                          text_config=language, **{"image_grid_pinpoints": pinpoints, **changes})
    return bite(transformers.LlavaNextForConditionalGeneration(config), seed)


def hf_clip(seed: int) -> nn.Module:
    text = {"vocab_size": 53, "hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 2,
            "num_attention_heads": 5, "max_position_embeddings": 13,
            "bos_token_id": 51, "eos_token_id": 52, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=7)
    return bite(transformers.CLIPModel(config), seed)


def hf_bert(seed: int, **changes) -> nn.Module:
    return bite(transformers.BertForMaskedLM(transformers.BertConfig(**{**BERT, **changes})), seed)


def blip_config(text: dict, vision: dict, **changes) -> transformers.BlipConfig:
    return transformers.BlipConfig(text_config={**BLIP_TEXT, **text}, vision_config={**EVA, **vision}, image_text_hidden_size=9, **changes)


def hf_blip(seed: int, text: dict | None = None, vision: dict | None = None) -> nn.Module:
    """Fresh, its vision tower is nearly zero (initializer_range 1e-10): nothing would be compared."""
    return bite(transformers.BlipForConditionalGeneration(blip_config(text or {}, vision or {})), seed)


def hf_blip_answers(seed: int, text: dict | None = None) -> nn.Module:
    """Its decoder looks at states as wide as the ViT's: the two widths have to be equal."""
    config = blip_config({"hidden_size": 24, "num_attention_heads": 6, **(text or {})}, {})
    return bite(transformers.BlipForQuestionAnswering(config), seed)


def hf_blip_retrieval(seed: int, text: dict | None = None, vision: dict | None = None) -> nn.Module:
    return bite(transformers.BlipForImageTextRetrieval(blip_config(text or {}, vision or {})), seed)


def blip2_config(text: dict, **qformer) -> transformers.Blip2Config:
    return transformers.Blip2Config(vision_config=EVA, qformer_config={**QFORMER, **qformer}, text_config=text,
                                    num_query_tokens=QUERIES, image_text_hidden_size=9)


def hf_blip2(seed: int) -> nn.Module:
    config = blip2_config({"model_type": "opt", **OPT})
    config.image_token_index = IMAGE_ID
    return without_key_bias(bite(transformers.Blip2ForConditionalGeneration(config), seed))


def hf_blip2_t5(seed: int, **changes) -> nn.Module:
    """On an encoder-decoder with the exact GELU, as BLIP-2's checkpoints have it, and a head of its own."""
    config = blip2_config({"model_type": "t5", **T5, **(changes or {"dense_act_fn": "gelu"})})
    config.image_token_index = IMAGE_ID
    hf = transformers.Blip2ForConditionalGeneration(config)
    hf.language_model.lm_head.weight = nn.Parameter(torch.empty_like(hf.language_model.lm_head.weight))
    return without_key_bias(bite(hf, seed, 0.15))


def hf_blip2_retrieval(seed: int) -> nn.Module:
    config = blip2_config({"model_type": "opt", **OPT}, use_qformer_text_input=True)
    return without_key_bias(bite(transformers.Blip2ForImageTextRetrieval(config), seed))


def instructblip_sizes(text: dict, queries: int) -> dict:
    return {"vision_config": EVA, "qformer_config": QFORMER, "text_config": text, "num_query_tokens": queries}


def hf_instructblip(seed: int, queries: int = QUERIES) -> nn.Module:
    """On a LLaMA, as Vicuna is one."""
    config = transformers.InstructBlipConfig(**instructblip_sizes({"model_type": "llama", **LLAMA}, queries), image_token_index=IMAGE_ID)
    return without_key_bias(bite(transformers.InstructBlipForConditionalGeneration(config), seed))


def hf_instructblip_t5(seed: int, queries: int = QUERIES) -> nn.Module:
    """On an encoder-decoder, as hf_blip2_t5."""
    sizes = instructblip_sizes({"model_type": "t5", **T5, "dense_act_fn": "gelu"}, queries)
    hf = transformers.InstructBlipForConditionalGeneration(transformers.InstructBlipConfig(**sizes, image_token_index=IMAGE_ID))
    hf.language_model.lm_head.weight = nn.Parameter(torch.empty_like(hf.language_model.lm_head.weight))
    return without_key_bias(bite(hf, seed, 0.15))


def for_clips(hf: nn.Module) -> nn.Module:
    """An InstructBLIP of transformers as its class for four frames, with the same weights."""
    sizes = instructblip_sizes(hf.config.text_config.to_dict(), hf.config.num_query_tokens)
    clips = transformers.InstructBlipVideoForConditionalGeneration(transformers.InstructBlipVideoConfig(**sizes, video_token_index=IMAGE_ID))
    clips.load_state_dict(hf.state_dict(), assign=True)  # a head that was untied stays so
    return clips.eval()


def without_key_bias(hf: nn.Module) -> nn.Module:
    """EVA-CLIP's keys have none; transformers keeps zeros in its place, in the middle of the three."""
    for layer in hf.vision_model.encoder.layers:
        third = len(layer.self_attn.qkv.bias) // 3
        layer.self_attn.qkv.bias.data[third:2 * third] = 0
    return hf


def parts(hf: nn.Module) -> tuple[dict, dict]:
    """config.json as save_pretrained writes it, and the tensors."""
    return {**hf.config.to_dict(), "architectures": [type(hf).__name__]}, dict(hf.state_dict())


def ours(hf: nn.Module) -> nn.Module:
    """Our model with the same weights, by the loader that published checkpoints take."""
    config, state = parts(hf)
    return from_hf(config, {name: tensor.clone() for name, tensor in state.items()})


def same(a: nn.Module, b: nn.Module) -> None:
    """The same class, sizes and weights."""
    assert type(a) is type(b)
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    """Prefixes exchanged."""
    for old, new in pairs:
        state = {(new + name.removeprefix(old) if name.startswith(old) else name): t for name, t in state.items()}
    return state


def original_llava(layers: int) -> tuple[dict, dict, dict, dict]:
    """hf_llava(4) as the original code names it: (config, tensors, the tower's config, the tower's tensors)."""
    hf = hf_llava(4)
    state = dict(hf.state_dict())
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


def scores(model: nn.Module, batch: Batch, candidates: Sequence[Sequence[int]]) -> Tensor:
    """log p of each candidate answer behind each prompt of the batch, (B, candidates), as exams ask for it."""
    return generation.score_candidates(lambda: model.prefill(batch), model.step, candidates)
