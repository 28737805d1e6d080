"""Published weights: every layout they come in gives the same model; tensors that do not fit are an error that lists them."""

import re

import pytest
import torch
from oracles import (
    IMAGE_ID,
    QUERIES,
    hf_bert,
    hf_blip,
    hf_blip2,
    hf_blip2_retrieval,
    hf_blip2_t5,
    hf_blip_answers,
    hf_blip_retrieval,
    hf_clip,
    hf_clip_vision,
    hf_imagenet_vit,
    hf_instructblip,
    hf_instructblip_t5,
    hf_llama,
    hf_llava,
    hf_next,
    hf_opt,
    hf_t5,
    hf_t5_exact,
    hf_t5_first,
    original_llava,
    ours,
    parts,
    renamed,
    same,
)
from test_llava import conversations, expanded, padded
from tools import bite, close, randn, random_ids

from nanovlm.bert import Bert
from nanovlm.errors import UserError
from nanovlm.hub import CLASSES, from_hf, load
from nanovlm.hub.configs import IMAGE_TOKEN_INDEX
from nanovlm.hub.names import rows, translate
from nanovlm.papers.blip import BLIP
from nanovlm.papers.blip2 import BLIP2, BLIP2Stage1
from nanovlm.papers.blip_downstream import BLIPAnswerer
from nanovlm.papers.clip import CLIP as OurCLIP
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.vit import ViT


def hf_bert_alone(seed: int) -> torch.nn.Module:
    return hf_bert(seed).bert


ALL = [(hf_clip_vision, ViT), (hf_imagenet_vit, ViT), (hf_llama, LanguageModel), (hf_opt, LanguageModel), (hf_llava, LLaVA), (hf_next, LLaVA),
       (hf_clip, OurCLIP), (hf_t5, LanguageModel), (hf_t5_exact, LanguageModel), (hf_t5_first, LanguageModel),
       (hf_bert, MaskedLanguageModel), (hf_bert_alone, Bert), (hf_blip2, BLIP2), (hf_blip2_retrieval, BLIP2Stage1),
       (hf_blip2_t5, BLIP2), (hf_instructblip, InstructBLIP), (hf_instructblip_t5, InstructBLIP), (hf_blip, BLIP), (hf_blip_retrieval, BLIP),
       (hf_blip_answers, BLIPAnswerer)]


@pytest.mark.parametrize(("build", "kind"), ALL)
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


def test_the_vit_that_blip_starts_from():
    """Every token after the last norm; without ImageNet's classes."""
    hf, images = hf_imagenet_vit(2), randn(2, 3, 20, 20)
    with torch.no_grad():
        model = ours(hf)
        want = hf.vit(images).last_hidden_state
        torch.testing.assert_close(model.norm(model(images)), want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.1
    from_hf({**parts(hf)[0], "architectures": ["ViTModel"]}, parts(hf.vit)[1])


# --- train and eval, dtypes ---

@pytest.mark.parametrize(("build", "section"), [(hf_bert, None), (hf_blip2, "qformer_config")])
def test_what_comes_back_is_in_eval(build, section, tmp_path):
    """In train mode dropout would make every call another answer."""
    hf, images, ids = build(1), randn(2, 3, 20, 20), random_ids(2, 5, 1)
    (hf.config if section is None else getattr(hf.config, section)).hidden_dropout_prob = 0.5
    hf.save_pretrained(tmp_path)
    for model in (load(tmp_path), from_hf(*parts(hf))):
        assert not any(part.training for part in model.modules())
        call = (lambda m=model: m(ids).logits) if section is None else (lambda m=model: m.image_prefix(images))
        assert torch.equal(call(), call())
        model.train()
        assert not torch.equal(call(), call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_nothing_is_copied(dtype):
    config, state = parts(hf_llama(13))
    state = {name: t.to(dtype) for name, t in state.items()}
    model = from_hf(config, state)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.language.head.weight.data_ptr() == state["lm_head.weight"].data_ptr()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_pixels_take_the_dtype_of_the_weights():
    """A checkpoint in bf16, pixels in fp32: cast in the vision transformer, as transformers does."""
    images, ids = randn(2, 3, 20, 20), random_ids(2, 5, 1)
    mask, marked = torch.ones_like(ids, dtype=torch.bool), torch.cat([torch.full((2, 1), IMAGE_ID), ids], dim=1)
    long = torch.stack([expanded(row) for row in marked])
    queries = torch.cat([torch.full((2, QUERIES), IMAGE_ID), ids], dim=1)
    cases = [(hf_clip_vision, lambda m: m(images), lambda hf: hf(images).last_hidden_state),
             (hf_llava, lambda m: m(images, marked, torch.ones_like(marked, dtype=torch.bool)).logits,
              lambda hf: hf(input_ids=long, pixel_values=images).logits),
             (hf_blip2, lambda m: m(images, ids, mask).logits,
              lambda hf: hf(input_ids=queries, pixel_values=images, attention_mask=torch.ones_like(queries)).logits),
             (hf_blip2_t5, lambda m: m(images, ids, mask, ids).logits[:, :-1],
              lambda hf: hf(input_ids=queries, pixel_values=images, attention_mask=torch.ones_like(queries), labels=ids).logits),
             (hf_blip, lambda m: m.word_head.logits(m.write(m.encode_image(images), ids, mask), m.text_decoder.embeddings.words),
              lambda hf: hf(images, torch.cat([torch.full((2, 1), 51), ids[:, 1:]], dim=1), mask.long()).logits)]
    for build, run, theirs in cases:
        hf = build(1)
        with torch.no_grad():
            exact = theirs(hf)
            hf = hf.to(torch.bfloat16)
            model = ours(hf)
            got, want = run(model), theirs(hf)
        assert got.dtype == want.dtype == torch.bfloat16
        error, theirs_error = ((logits.float() - exact).abs().mean() for logits in (got, want))
        assert error < 1.5 * theirs_error and error < 0.1 * exact.std()  # as far from fp32 as theirs


def test_two_dtypes_become_that_of_the_largest_tensor():
    """LLaVA's code was saved in fp16, the CLIP tower that it needs in fp32."""
    config, state, eyes, tower = original_llava(2)
    state = {name: t.to(torch.bfloat16) for name, t in state.items()}
    model = from_hf({**config, "vision_config": eyes}, {**state, **tower})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    images, words = conversations(4)
    ids, mask = padded(words, "right")
    assert model(images, ids.masked_fill(ids == IMAGE_ID, -200), mask).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("extra", "name"), [
    ({"model.layers.0.mlp.up_proj.weight": torch.ones(44, 36, dtype=torch.int8)}, "up_proj.weight holds torch.int8"),
    ({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 36, dtype=torch.int32)}, "up_proj.qweight holds torch.int32"),
    ({"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(4, dtype=torch.uint8)}, "absmax holds torch.uint8"),
    ({"model.norm.weight": torch.ones(36).to(torch.float8_e4m3fn)}, "norm.weight holds torch.float8"),
])
def test_quantized_tensors_are_called_so(extra, name):
    config, state = parts(hf_llama(13))
    with pytest.raises(UserError, match=f"{name}.* numbers; quantized weights are not supported: download.*dequantize"):
        from_hf(config, {**state, **extra})


# --- names ---

FILES = [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
         ("model.multi_modal_projector", "multi_modal_projector"), ("model.image_newline", "image_newline")]
LAYOUTS = [
    [("model.vision_tower.", "model.vision_tower.vision_model.")],  # late transformers 4, in memory
    [("model.vision_tower.", "vision_tower.vision_model."), *FILES],  # the files of the hub
    [("model.vision_tower.", "vision_tower."), *FILES],  # the files that transformers 5 writes
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("build", [hf_llava, hf_next])
def test_layouts_of_llava(build, layout):
    """And what is missing is named as this file would name it."""
    hf = build(2)
    config, state = parts(hf)
    other = renamed(state, *layout)
    assert not set(other) & {name for name in state if "vision" in name}
    same(from_hf(config, other), ours(hf))
    for gone in other:
        lone = gone.removeprefix("model.") if gone.endswith(("lm_head.weight", "image_newline")) else ""  # the only one of its kind
        if not re.search(r"layers\.[1-9]\.", gone):
            with pytest.raises(UserError, match=rf"json: {re.escape(gone)} is missing\.$|{lone or '^$'} is missing"):
                from_hf(config, {name: t for name, t in other.items() if name != gone})


def test_other_prefixes_and_endings():
    hf = hf_clip_vision(3)
    config, state = parts(hf)
    same(from_hf(config, renamed(state, ("", "vision_model."))), ours(hf))
    config, state = parts(hf_opt(3))
    same(from_hf(config, renamed(state, ("model.decoder.", "decoder."))), ours(hf_opt(3)))
    for hf, prefix in ((hf_bert(3), ""), (hf_bert(3).bert, "bert.")):  # bert-base-uncased came from TensorFlow
        config, state = parts(hf)
        old = {prefix + re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", name)): t
               for name, t in state.items()}
        same(from_hf(config, old), ours(hf))
        with pytest.raises(UserError, match="encoder.layer.0.output.LayerNorm.gamma is missing"):
            from_hf(config, {name: t for name, t in old.items() if not name.endswith("layer.0.output.LayerNorm.gamma")})


def test_the_class_is_named_by_architectures_and_where_it_is_left_out_by_the_type():
    config, state = parts(hf_bert(3))
    same(from_hf({**config, "architectures": ["BertForPreTraining"]}, state), from_hf(config, state))
    alone = {name: t for name, t in state.items() if not name.startswith("cls")}
    assert type(from_hf({**config, "architectures": None}, alone)) is Bert
    config, state, eyes, tower = original_llava(1)
    for left_out in ({}, {"model_type": "llava_llama"}):
        bare = {name: value for name, value in {**config, **left_out}.items() if name != "architectures"}
        assert from_hf({**bare, "vision_config": eyes}, {**state, **tower}).config.image_token_id == IMAGE_TOKEN_INDEX


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_tower.vision_model."])
@pytest.mark.parametrize("layers", [1, 2])
def test_original_llava(layers, prefix):
    config, state, eyes, tower = original_llava(layers)
    model = from_hf({**config, "vision_config": eyes}, {**state, **renamed(tower, ("", prefix))})
    assert model.config.image_token_id == IMAGE_TOKEN_INDEX == -200
    assert (model.projector.second is not None) == (layers == 2)
    hugging = ours(hf_llava(4))
    want = hugging.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    if layers == 2:  # then it is the very same model, under another id for the image
        images, words = conversations(4)
        ids, mask = padded(words, "right")
        with torch.no_grad():
            got = model(images, ids.masked_fill(ids == IMAGE_ID, -200), mask).logits
            close(got, hugging(images, ids, mask).logits, 0)


def test_a_missing_tower_is_named_with_the_mend():
    config, state, eyes, _ = original_llava(2)
    with pytest.raises(UserError, match=r"vision_tower.pre_layrnorm.weight is missing.*hold no vision tower; add it"):
        from_hf({**config, "vision_config": eyes}, state)
    del state["model.mm_projector.0.bias"]
    with pytest.raises(UserError, match=r"; model.mm_projector.0.bias is missing"):
        from_hf({**config, "vision_config": eyes}, state)


def test_the_tables_read_both_ways():
    """Every name of theirs goes to ours and, row by row, back; only T5's two kinds have several of theirs for one of ours."""
    for published in CLASSES.values():
        table = published.names
        for theirs, mine in table.items():
            name, ours_ = theirs.replace("{i}", "17"), mine.replace("{i}", "17")
            assert "," not in name + ours_ and translate(name, table) == ours_
            assert translate(f"{name}.bias", table) == f"{ours_}.bias"
            assert translate(ours_, {mine: theirs}) == name
            twice = {a for a, b in table.items() if b == mine and not a.endswith(("wi", "wi_1"))}
            first = "language_model.model.decoder.embed_tokens", "language_model.model.embed_tokens"  # BLIP-2 on OPT, InstructBLIP on LLaMA
            assert len(twice) <= 1 or twice in ({name, "language_model.shared"} for name in first)
    table = CLASSES["LlamaForCausalLM"].names
    assert translate("model.layers.x.mlp.up_proj.weight", table) is None
    assert translate("model.layers.1.mlp.up_proj.weight.extra", table) is None
    assert rows({"a.{x,y}": "{one,two}.b", "c.{i}": "d.{i}"}) == {"a.x": "one.b", "a.y": "two.b", "c.{i}": "d.{i}"}
    with pytest.raises(ValueError, match="shorter"):
        rows({"a.{x,y,z}": "{one,two}.b"})


# --- tensors ---

def test_all_that_does_not_fit_is_listed():
    config, state = parts(hf_llama(9))
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


BLIP_COPIES = ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight",
               "text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias")
T5_COPIES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
COPIES = {hf_opt: ("model.decoder.embed_tokens.weight", "lm_head.weight"), hf_t5: T5_COPIES,
          hf_t5_first: (*T5_COPIES, "lm_head.weight"),
          hf_blip2: ("language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"),
          **dict.fromkeys((hf_blip2_t5, hf_instructblip_t5), tuple(f"language_model.{name}" for name in T5_COPIES)),
          hf_blip: BLIP_COPIES, hf_blip_answers: BLIP_COPIES,
          hf_bert: ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
                    "cls.predictions.bias", "cls.predictions.decoder.bias")}


@pytest.mark.parametrize("build", [build for build, _ in ALL if build not in (hf_llava, hf_next, hf_t5_exact)])
def test_each_missing_tensor_is_noticed(build):
    """Whichever is taken away, its own name is in the message; of several copies one is enough."""
    config, state = parts(build(10))
    idle = re.compile(r"(block|layers|layer)\.[1-9]\.\w|pooler|classifier|position_ids|qkv")  # block 0 stands for all
    for name in state:
        if not idle.search(name) and name not in COPIES.get(build, ()):
            with pytest.raises(UserError, match=rf"(json:|or|;) {re.escape(name)} (is missing|or)"):
                from_hf(config, {other: t for other, t in state.items() if other != name})
    model = from_hf(config, state)
    for name in COPIES.get(build, ()):
        if not name.endswith("bias"):
            same(from_hf(config, {other: t for other, t in state.items() if other != name}), model)
    if build in COPIES:
        with pytest.raises(UserError, match="is missing"):
            from_hf(config, {name: t for name, t in state.items() if name not in COPIES[build]})


@pytest.mark.parametrize(("build", "name", "hint"), [
    (hf_opt, "lm_head.weight", r" \(or tie_word_embeddings in config.json must be false\)"),
    (hf_t5_first, "lm_head.weight", r" \(or tie_word_embeddings in config.json must be false\)"),
    (hf_blip, "text_decoder.cls.predictions.decoder.weight", ""), (hf_blip, "text_decoder.cls.predictions.decoder.bias", ""),
    (hf_t5, "encoder.embed_tokens.weight", ""), (hf_t5, "decoder.embed_tokens.weight", "")])
def test_a_copy_may_not_differ(build, name, hint):
    config, state = parts(build(11))
    with pytest.raises(UserError, match=rf"config.json: {name} differs from [\w.]+, but in our model they are one{hint}\.$"):
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


def test_buffers_of_older_files_are_ignored():
    config, state = parts(hf_llava(12))
    old = {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
           "model.vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    same(from_hf(config, {**state, **old}), from_hf(config, state))
    config, state = parts(hf_instructblip(12))
    old = {"qformer.embeddings.position_ids": torch.arange(23)[None],
           "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    same(from_hf(config, {**state, **old}), from_hf(config, state))
    config, state = parts(hf_blip(12))
    old = {"text_decoder.bert.embeddings.position_ids": torch.arange(23)[None]}
    same(from_hf(config, {**state, **old}), from_hf(config, state))


def test_the_key_of_blips_vision_tower_has_a_bias():
    """Three maps stand in one, the query's first, then the key's; BLIP-2's key has none (below)."""
    hf = hf_blip(14)
    fused, attention = hf.vision_model.encoder.layers[1].self_attn.qkv, ours(hf).vision.blocks[1].attention
    for i, one in enumerate((attention.query, attention.key, attention.value)):
        assert torch.equal(one.weight, fused.weight[24 * i:24 * (i + 1)]) and torch.equal(one.bias, fused.bias[24 * i:24 * (i + 1)])


@pytest.mark.parametrize("build", [hf_blip2, hf_instructblip])
def test_a_key_with_a_bias_is_refused(build):
    hf = bite(build(1), 1)  # not without_key_bias
    with pytest.raises(UserError, match="layers.0.self_attn.qkv.bias: the key's third is not zero"):
        from_hf(*parts(hf))
