"""Who is who in a checkpoint: their names of tensors beside ours, one table per layout.

    "layers.{i}.mlp.up_proj": "blocks.{i}.feedforward.up"        a module or a single tensor; {i} is a block's number,
                                                                 the first number of a name

A layout says where each part of the model stands: LLaVA's language model is `language_model.model.…` in the files of
the hub, `model.language_model.…` in the memory of transformers 5 and plain `model.…` in the original code.
"""

import re

Names = dict[str, str]

CLIP_BLOCKS: Names = {
    "encoder.layers.{i}.layer_norm1": "blocks.{i}.norm1",
    "encoder.layers.{i}.self_attn.q_proj": "blocks.{i}.attention.query",
    "encoder.layers.{i}.self_attn.k_proj": "blocks.{i}.attention.key",
    "encoder.layers.{i}.self_attn.v_proj": "blocks.{i}.attention.value",
    "encoder.layers.{i}.self_attn.out_proj": "blocks.{i}.attention.out",
    "encoder.layers.{i}.layer_norm2": "blocks.{i}.norm2",
    "encoder.layers.{i}.mlp.fc1": "blocks.{i}.feedforward.up",
    "encoder.layers.{i}.mlp.fc2": "blocks.{i}.feedforward.down",
}

CLIP_VISION: Names = {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding.weight": "positions",
    "pre_layrnorm": "pre_norm",  # spelt like this in the files
    **CLIP_BLOCKS,
    "post_layernorm": "norm",
}

CLIP_TEXT: Names = {
    "embeddings.token_embedding": "embedding",
    "embeddings.position_embedding": "positions",
    **CLIP_BLOCKS,
    "final_layer_norm": "norm",
}

LLAMA: Names = {
    "embed_tokens": "embedding",
    "layers.{i}.input_layernorm": "blocks.{i}.norm1",
    "layers.{i}.self_attn.q_proj": "blocks.{i}.attention.query",
    "layers.{i}.self_attn.k_proj": "blocks.{i}.attention.key",
    "layers.{i}.self_attn.v_proj": "blocks.{i}.attention.value",
    "layers.{i}.self_attn.o_proj": "blocks.{i}.attention.out",
    "layers.{i}.post_attention_layernorm": "blocks.{i}.norm2",
    "layers.{i}.mlp.gate_proj": "blocks.{i}.feedforward.gate",
    "layers.{i}.mlp.up_proj": "blocks.{i}.feedforward.up",
    "layers.{i}.mlp.down_proj": "blocks.{i}.feedforward.down",
    "norm": "norm",
}

OPT: Names = {
    "embed_tokens": "embedding",
    "embed_positions": "positions",
    "layers.{i}.self_attn_layer_norm": "blocks.{i}.norm1",
    "layers.{i}.self_attn.q_proj": "blocks.{i}.attention.query",
    "layers.{i}.self_attn.k_proj": "blocks.{i}.attention.key",
    "layers.{i}.self_attn.v_proj": "blocks.{i}.attention.value",
    "layers.{i}.self_attn.out_proj": "blocks.{i}.attention.out",
    "layers.{i}.final_layer_norm": "blocks.{i}.norm2",  # the block's last norm, not the model's
    "layers.{i}.fc1": "blocks.{i}.feedforward.up",
    "layers.{i}.fc2": "blocks.{i}.feedforward.down",
    "final_layer_norm": "norm",
}

BERT_LAYER: Names = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "residual1.norm",
    "intermediate.dense": "feedforward.up",
    "output.dense": "feedforward.down",
    "output.LayerNorm": "residual2.norm",
}

QFORMER_LAYER: Names = {
    **{theirs.replace("attention.self", "attention.attention"): ours for theirs, ours in BERT_LAYER.items()},
    "crossattention.attention.query": "cross_attention.query",
    "crossattention.attention.key": "cross_attention.key",
    "crossattention.attention.value": "cross_attention.value",
    "crossattention.output.dense": "cross_attention.out",
    "crossattention.output.LayerNorm": "cross_residual.norm",
    "intermediate_query.dense": "query_feedforward.up",
    "output_query.dense": "query_feedforward.down",
    "output_query.LayerNorm": "query_residual.norm",
}

EVA_VISION: Names = {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding": "positions",
    **{theirs.replace("out_proj", "projection"): ours for theirs, ours in CLIP_BLOCKS.items()},
}

T5_ATTENTION: Names = {"q": "query", "k": "key", "v": "value", "o": "out"}
T5_GATED: Names = {"wi_0": "gate", "wi_1": "up", "wo": "down"}  # T5 v1.1, FlanT5
T5_PLAIN: Names = {"wi": "up", "wo": "down"}  # T5 v1.0

HF_PROJECTOR: Names = {"linear_1": "first", "linear_2": "second"}
ORIGINAL_LINEAR: Names = {"mm_projector": "first"}
ORIGINAL_MLP: Names = {"mm_projector.0": "first", "mm_projector.2": "second"}  # 1 is the GELU between them


def under(theirs: str, ours: str, table: Names) -> Names:
    """The table with a prefix before each name."""
    return {theirs + a: ours + b for a, b in table.items()}


BERT: Names = {
    "embeddings.word_embeddings": "embeddings.words",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.segments",
    "embeddings.LayerNorm": "norm",
    **under("encoder.layer.{i}.", "layers.{i}.", BERT_LAYER),
}

BLIP2_EYES: Names = {
    **under("vision_model.", "vision.", EVA_VISION),
    "vision_model.post_layernorm": "vision_norm",
    "query_tokens": "qformer.queries",
    "qformer.layernorm": "qformer.norm",
    **under("qformer.encoder.layer.{i}.", "qformer.layers.{i}.", QFORMER_LAYER),
}


def t5(feedforward: Names) -> Names:
    """T5 numbers the parts of a block too: layer.0 is self-attention; of the decoder, layer.1 is cross-attention."""
    return {
        "shared": "embedding",
        "encoder.embed_tokens": "encoder.embedding",  # the same once more, and again
        "decoder.embed_tokens": "decoder.embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "encoder.position_bias",  # for all blocks
        "encoder.block.{i}.layer.0.layer_norm": "encoder.blocks.{i}.norm1",
        **under("encoder.block.{i}.layer.0.SelfAttention.", "encoder.blocks.{i}.attention.", T5_ATTENTION),
        "encoder.block.{i}.layer.1.layer_norm": "encoder.blocks.{i}.norm2",
        **under("encoder.block.{i}.layer.1.DenseReluDense.", "encoder.blocks.{i}.feedforward.", feedforward),
        "encoder.final_layer_norm": "encoder.norm",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "decoder.position_bias",
        "decoder.block.{i}.layer.0.layer_norm": "decoder.blocks.{i}.norm1",
        **under("decoder.block.{i}.layer.0.SelfAttention.", "decoder.blocks.{i}.attention.", T5_ATTENTION),
        "decoder.block.{i}.layer.1.layer_norm": "decoder.blocks.{i}.norm_cross",
        **under("decoder.block.{i}.layer.1.EncDecAttention.", "decoder.blocks.{i}.cross_attention.", T5_ATTENTION),
        "decoder.block.{i}.layer.2.layer_norm": "decoder.blocks.{i}.norm2",
        **under("decoder.block.{i}.layer.2.DenseReluDense.", "decoder.blocks.{i}.feedforward.", feedforward),
        "decoder.final_layer_norm": "decoder.norm",
        "lm_head": "head",
    }


def llava(language: str, head: str, projector: Names, vision: str) -> Names:
    """A layout of LLaVA: where each part stands in theirs."""
    return {**under(language, "language.", LLAMA), head: "language.head", **under("", "projector.", projector),
            **under(vision, "vision.", CLIP_VISION)}


# language model, its head, projector, vision tower
HF_LLAVA = (
    # the files of the hub; the files that transformers 5 writes
    ("language_model.model.", "language_model.lm_head", "multi_modal_projector.", "vision_tower.vision_model."),
    ("language_model.model.", "language_model.lm_head", "multi_modal_projector.", "vision_tower."),
    # state_dict() in transformers 5; in late transformers 4
    ("model.language_model.", "lm_head", "model.multi_modal_projector.", "model.vision_tower."),
    ("model.language_model.", "lm_head", "model.multi_modal_projector.", "model.vision_tower.vision_model."),
)

# every layout that a kind of checkpoint comes in; the one that knows most of its names is used
LAYOUTS: dict[str, tuple[Names, ...]] = {
    "clip_vision_model": (
        CLIP_VISION,  # transformers 5
        under("vision_model.", "", CLIP_VISION),  # before
    ),
    "clip": (
        {**under("vision_model.", "vision.", CLIP_VISION), "visual_projection": "image_projection",
         **under("text_model.", "text.", CLIP_TEXT), "text_projection": "text_projection",
         "logit_scale": "temperature"},
    ),
    "llama": (
        {**under("model.", "language.", LLAMA), "lm_head": "language.head"},
    ),
    "opt": (
        {**under("model.decoder.", "language.", OPT), "lm_head": "language.head"},
        {**under("decoder.", "language.", OPT), "lm_head": "language.head"},
    ),
    "bert": (
        BERT,
        under("bert.", "", BERT),
    ),
    "bert (words)": (
        {**under("bert.", "bert.", BERT), "cls.predictions.transform.dense": "head.transform",
         "cls.predictions.transform.LayerNorm": "head.norm", "cls.predictions.bias": "head.bias",
         "cls.predictions.decoder": "head.decoder"},  # the embedding once more
    ),
    "blip-2": (
        {**BLIP2_EYES, "language_projection": "projection", "language_model.lm_head": "language.head",
         **under("language_model.model.decoder.", "language.", OPT)},
        {**BLIP2_EYES, "language_projection": "projection", **under("language_model.", "language.", t5(T5_GATED))},
    ),
    "blip-2 (retrieval)": (
        {**BLIP2_EYES, "embeddings.word_embeddings": "qformer.embeddings.words",
         "embeddings.position_embeddings": "qformer.embeddings.positions", "vision_projection": "image_projection",
         "text_projection": "text_projection", "itm_head": "match_head"},
    ),
    "t5": (
        under("", "language.", t5(T5_GATED)),
        under("", "language.", t5(T5_PLAIN)),
    ),
    "llava": tuple(llava(language, head, under(projector, "", HF_PROJECTOR), vision)
                   for language, head, projector, vision in HF_LLAVA),
    # the row end stands beside the projector
    "llava_next": tuple({**llava(language, head, under(projector, "", HF_PROJECTOR), vision),
                         projector.replace("multi_modal_projector.", "image_newline"): "tiles.row_end"}
                        for language, head, projector, vision in HF_LLAVA),
    # LLaVA's own code: one or two layers; the tower added from a CLIP file, from memory, or (rarely) in the checkpoint
    "llava (original)": tuple(
        llava("model.", "lm_head", under("model.", "", projector), vision)
        for projector in (ORIGINAL_LINEAR, ORIGINAL_MLP)
        for vision in ("vision_model.", "", "model.vision_tower.vision_tower.vision_model.")
    ),
}

# second copies that some files hold and our models do without: ours, and what it must be equal to
TIED = {"language.head.weight": "language.embedding.weight", "language.encoder.embedding.weight": "language.embedding.weight",
        "language.decoder.embedding.weight": "language.embedding.weight", "head.decoder.weight": "bert.embeddings.words.weight",
        "head.decoder.bias": "head.bias"}
NOT_OURS = (  # some files hold them, some do not
    "inv_freq", "position_ids", "decoder.version",  # computed, not learned
    "EncDecAttention.relative_attention_bias.weight",  # in T5's first files, and never read
    "pooler.dense.weight", "pooler.dense.bias", "seq_relationship.weight", "seq_relationship.bias",  # BERT's, for pairs
)


def translate(name: str, table: Names) -> str | None:
    """What the table calls a tensor, None if it does not know it; a row may name the tensor or the module it is in."""
    module, end = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups(default="")
    number = re.search(r"\.(\d+)\.", name)
    for whole, rest in ((name, ""), (module, end)):
        for key in (whole, re.sub(r"\.\d+\.", ".{i}.", whole, count=1)):
            if key in table:
                return table[key].replace("{i}", number[1] if number else "") + rest
    return None


def backwards(table: Names) -> Names:
    """Our names on the left."""
    return {ours: theirs for theirs, ours in table.items()}
