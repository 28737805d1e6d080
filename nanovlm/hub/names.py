"""Who is who in a checkpoint: their name of each tensor beside ours, one table for each class that was saved.

Different versions of a code write different prefixes. They are made equal before the table is read:

    model.language_model.layers.3.mlp.up_proj.weight             in the memory of transformers 5
        │ RENAMES
        ▼
    language_model.model.layers.3.mlp.up_proj.weight             in the files on the hub
        │ the table of the class
        ▼
    language.blocks.3.feedforward.up.weight                      ours

A table is put together from the tables of its parts: LLaVA's is those of CLIP's vision tower, of LLaMA and a projector.

    "layers.{i}.mlp.up_proj": "blocks.{i}.feedforward.up"        a module or a single tensor; {i} is a block's number,
                                                                 the first number of a name
    "mlp.{gate,up}_proj": "feedforward.{gate,up}"                two rows in one
"""

import re

Names = dict[str, str]


def under(theirs: str, ours: str, table: Names) -> Names:
    """The table with a prefix before each name."""
    return {theirs + a: ours + b for a, b in table.items()}


def spelt_out(name: str) -> list[str]:
    """"{a,b}.c" → ["a.c", "b.c"]"""
    before, *rest = re.split(r"\{([^{}]*,[^{}]*)\}", name)
    return [before + choice + rest[1] for choice in rest[0].split(",")] if rest else [name]


def rows(table: Names) -> Names:
    return {a: b for theirs, ours in table.items() for a, b in zip(spelt_out(theirs), spelt_out(ours), strict=True)}


# --- the parts ---

CLIP_BLOCKS = rows({
    "encoder.layers.{i}.layer_norm{1,2}": "blocks.{i}.norm{1,2}",
    "encoder.layers.{i}.self_attn.{q_proj,k_proj,v_proj,out_proj}": "blocks.{i}.attention.{query,key,value,out}",
    "encoder.layers.{i}.mlp.{fc1,fc2}": "blocks.{i}.feedforward.{up,down}",
})
CLIP_VISION = rows({
    "embeddings.{class_embedding,patch_embedding,position_embedding.weight}": "{class_token,patch_embedding,positions}",
    "{pre_layrnorm,post_layernorm}": "{pre_norm,norm}",  # spelt like this in the files
    **CLIP_BLOCKS,
})
IMAGENET_VIT = rows({
    "embeddings.{cls_token,position_embeddings,patch_embeddings.projection}": "{class_token,positions,patch_embedding}",
    "layers.{i}.layernorm_{before,after}": "blocks.{i}.norm{1,2}",
    "layers.{i}.attention.{q,k,v,o}_proj": "blocks.{i}.attention.{query,key,value,out}",
    "layers.{i}.mlp.{fc1,fc2}": "blocks.{i}.feedforward.{up,down}",
    "layernorm": "norm",
})
CLIP_TEXT = rows({
    "{embeddings.token_embedding,embeddings.position_embedding,final_layer_norm}": "{embedding,positions,norm}",
    **CLIP_BLOCKS,
})
LLAMA = rows({
    "{model.embed_tokens,model.norm,lm_head}": "language.{embedding,norm,head}",
    "model.layers.{i}.{input,post_attention}_layernorm": "language.blocks.{i}.{norm1,norm2}",
    "model.layers.{i}.self_attn.{q,k,v,o}_proj": "language.blocks.{i}.attention.{query,key,value,out}",
    "model.layers.{i}.mlp.{gate,up,down}_proj": "language.blocks.{i}.feedforward.{gate,up,down}",
})
OPT = rows({
    "model.decoder.{embed_tokens,embed_positions,final_layer_norm}": "language.{embedding,positions,norm}",
    "model.decoder.layers.{i}.{self_attn,final}_layer_norm": "language.blocks.{i}.{norm1,norm2}",
    "model.decoder.layers.{i}.self_attn.{q,k,v,out}_proj": "language.blocks.{i}.attention.{query,key,value,out}",
    "model.decoder.layers.{i}.{fc1,fc2}": "language.blocks.{i}.feedforward.{up,down}",
    "lm_head": "language.head",
})
# T5 numbers the parts of a block too: layer.0 is self-attention; of the decoder, layer.1 is cross-attention.
# `embed_tokens` is `shared` once more, and the first block's position bias serves all
T5_BLOCKS = {
    "{embed_tokens,final_layer_norm}": "{embedding,norm}",
    "block.0.layer.0.SelfAttention.relative_attention_bias": "position_bias",
    "block.{i}.layer.0.layer_norm": "blocks.{i}.norm1",
    "block.{i}.layer.0.SelfAttention.{q,k,v,o}": "blocks.{i}.attention.{query,key,value,out}",
}
T5_LAST = {"layer_norm": "norm2", "DenseReluDense.{wi_0,wi_1,wi,wo}": "feedforward.{gate,up,up,down}"}  # T5 v1.0: one wi
T5_CROSS = {"layer_norm": "norm_cross", "EncDecAttention.{q,k,v,o}": "cross_attention.{query,key,value,out}"}
T5 = rows({
    "{shared,lm_head}": "language.{embedding,head}",
    **under("encoder.", "language.encoder.", T5_BLOCKS),
    **under("decoder.", "language.decoder.", T5_BLOCKS),
    **under("encoder.block.{i}.layer.1.", "language.encoder.blocks.{i}.", T5_LAST),
    **under("decoder.block.{i}.layer.1.", "language.decoder.blocks.{i}.", T5_CROSS),
    **under("decoder.block.{i}.layer.2.", "language.decoder.blocks.{i}.", T5_LAST),
})
BERT_LAYER = {
    "attention.output.{dense,LayerNorm}": "{attention.out,residual1.norm}",
    "{intermediate.dense,output.dense,output.LayerNorm}": "{feedforward.up,feedforward.down,residual2.norm}",
}
QFORMER_LAYER = {
    "attention.attention.{query,key,value}": "attention.{query,key,value}",
    **BERT_LAYER,
    "crossattention.attention.{query,key,value}": "cross_attention.{query,key,value}",
    "crossattention.output.{dense,LayerNorm}": "{cross_attention.out,cross_residual.norm}",
    "{intermediate,output}_query.dense": "query_feedforward.{up,down}",
    "output_query.LayerNorm": "query_residual.norm",
}
BLIP_EYES = rows({
    "vision_model.embeddings.{class,patch,position}_embedding": "vision.{class_token,patch_embedding,positions}",
    **under("vision_model.", "vision.", {a.replace("out_proj", "projection"): b for a, b in CLIP_BLOCKS.items()}),
})
QFORMER_EYES = rows({
    **BLIP_EYES,
    "{vision_model.post_layernorm,query_tokens}": "{vision_norm,qformer.queries}",
    **under("qformer.encoder.layer.{i}.", "qformer.layers.{i}.", QFORMER_LAYER),
})
BLIP2_EYES = {**QFORMER_EYES, "qformer.layernorm": "qformer.norm"}

# --- the classes that are put together; CLIP_VISION, LLAMA, OPT and T5 are classes by themselves ---

CLIP = rows({
    **under("vision_model.", "vision.", CLIP_VISION),
    **under("text_model.", "text.", CLIP_TEXT),
    "{visual_projection,text_projection,logit_scale}": "{image_projection,text_projection,temperature}",
})
BERT = rows({
    "embeddings.{word,position,token_type}_embeddings": "embeddings.{words,positions,segments}",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.self.{query,key,value}": "layers.{i}.attention.{query,key,value}",
    **under("encoder.layer.{i}.", "layers.{i}.", BERT_LAYER),
})
MASKED_LM = rows({
    **under("bert.", "bert.", BERT),
    "cls.predictions.transform.{dense,LayerNorm}": "word_head.{transform,norm}",
    "cls.predictions.{bias,decoder}": "word_head.{bias,decoder}",  # the decoder is the embedding once more
})
MED = rows({  # BLIP's text transformer, encoder or decoder
    **BERT,
    "encoder.layer.{i}.crossattention.self.{query,key,value}": "layers.{i}.cross_attention.{query,key,value}",
    "encoder.layer.{i}.crossattention.output.{dense,LayerNorm}": "layers.{i}.{cross_attention.out,cross_residual.norm}",
})
BLIP_CAPTIONS = rows({
    **BLIP_EYES,
    "vision_model.post_layernorm": "vision.norm",
    **under("text_decoder.bert.", "text_decoder.", MED),
    "text_decoder.cls.predictions.transform.{dense,LayerNorm}": "word_head.{transform,norm}",
    "text_decoder.cls.predictions.{bias,decoder}": "{word_head.bias,text_decoder.words_again}",
})
BLIP_ANSWERS = {**BLIP_CAPTIONS, **rows(under("text_encoder.", "text_encoder.", MED))}
BLIP_RETRIEVAL = rows({
    **BLIP_EYES,
    "vision_model.post_layernorm": "vision.norm",
    **under("text_encoder.", "text_encoder.", MED),
    "{vision_proj,text_proj,itm_head}": "{image_projection,text_projection,match_head}",
})
BLIP2 = {**BLIP2_EYES, "language_projection": "projection", **under("language_model.", "", OPT | T5)}
INSTRUCTBLIP = rows({
    **QFORMER_EYES,
    "qformer.embeddings.{word_embeddings,position_embeddings,layernorm}": "qformer.{embeddings.words,embeddings.positions,norm}",
    "language_projection": "projection",
    **under("language_model.", "", LLAMA | T5),
})
BLIP2_RETRIEVAL = rows({
    **BLIP2_EYES,
    "embeddings.{word,position}_embeddings": "qformer.embeddings.{words,positions}",
    "{vision_projection,text_projection,itm_head}": "{image_projection,text_projection,match_head}",
})
LLAVA = rows({
    **under("vision_tower.", "vision.", CLIP_VISION),
    "multi_modal_projector.{linear_1,linear_2}": "projector.{first,second}",
    "image_newline": "tiles.row_end",  # LLaVA-NeXT only
    **under("language_model.", "", LLAMA),
})
# after open_flamingo.py has cut `to_kv` in two and given the gated layers one prefix
OPEN_FLAMINGO = rows({
    "perceiver.{latents,frame_embs,norm}": "resampler.{latents,times,norm}",
    "perceiver.layers.{i}.0.norm_{media,latents}": "resampler.layers.{i}.norm_{features,latents}",
    "perceiver.layers.{i}.0.to_{q,k,v,out}": "resampler.layers.{i}.attention.{query,key,value,out}",
    "perceiver.layers.{i}.1.{0,1,3}": "resampler.layers.{i}.{norm,feedforward.up,feedforward.down}",
    "gated_cross_attn_layers.{i}.{attn_gate,ff_gate,attn.norm}": "gated_xattn.{i}.{attention_gate,dense_gate,norm1}",
    "gated_cross_attn_layers.{i}.attn.to_{q,k,v,out}": "gated_xattn.{i}.attention.{query,key,value,out}",
    "gated_cross_attn_layers.{i}.ff.{0,1,3}": "gated_xattn.{i}.{norm2,feedforward.up,feedforward.down}",
})

# --- what some files write: what the table says. ^ is the beginning of a name; the rows act one after the other ---

OLD_VIT = rows({  # the files on the hub
    "^vit.": "^", "^encoder.layer.": "^layers.", ".attention.output.dense": ".attention.o_proj", ".{intermediate,output}.dense": ".mlp.{fc1,fc2}",
    ".attention.attention.{query,key,value}": ".attention.{q,k,v}_proj",
})
OLD_BERT = rows({"LayerNorm.{gamma,beta}": "LayerNorm.{weight,bias}"})  # written by TensorFlow
HF_LLAVA = rows({
    "^{model.language_model.,lm_head}": "^language_model.{model.,lm_head}",
    "vision_tower.vision_model.": "vision_tower.",
    "^model.{vision_tower,multi_modal_projector,image_newline}": "^{vision_tower,multi_modal_projector,image_newline}",
})
ORIGINAL_LLAVA = rows({
    # the tower: in the checkpoint (LLaVA 1.6), or added from CLIP's files, old and new
    "^{model.vision_tower.vision_tower.vision_model,vision_model}.": "^{vision_tower,vision_tower}.",
    "^{embeddings,encoder,pre_layrnorm,post_layernorm}.": "^vision_tower.{embeddings,encoder,pre_layrnorm,post_layernorm}.",
    # the projector: two layers with a GELU, number 1, between them, or a single one
    "^model.mm_projector.{0.,2.,}": "^multi_modal_projector.{linear_1.,linear_2.,linear_1.}",
    "^{model.image_newline,model.,lm_head}": "^{image_newline,language_model.model.,language_model.lm_head}",
})

# second copies that some files hold and our models do without: ours, and what it must be equal to
TIED = rows({
    "language.{head,encoder.embedding,decoder.embedding}.weight": "language.{embedding,embedding,embedding}.weight",
    "word_head.decoder.{weight,bias}": "{bert.embeddings.words.weight,word_head.bias}",
    "text_decoder.words_again.{weight,bias}": "{text_decoder.embeddings.words.weight,word_head.bias}",
})
# some files hold them, some do not: what is computed; a bias that T5 never reads; heads for pairs of sentences and for ImageNet
NOT_OURS = ("inv_freq", "position_ids", "decoder.version", "EncDecAttention.relative_attention_bias.weight",
            "pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias", "seq_relationship.weight", "seq_relationship.bias")


# --- from one name to the other ---

def normalise(name: str, renames: Names) -> str:
    """A name as the class's table says it."""
    name = "^" + name
    for theirs, here in renames.items():
        name = name.replace(theirs, here, 1)
    return name[1:]


def translate(name: str, table: Names) -> str | None:
    """What the table calls a tensor, None if it does not know it; a row may name the tensor or the module it is in."""
    number = re.search(r"\.(\d+)\.", name)
    for key in (name, re.sub(r"\.\d+\.", ".{i}.", name, count=1)):
        for end in ("", ".weight", ".bias"):
            if key.endswith(end) and key.removesuffix(end) in table:
                return table[key.removesuffix(end)].replace("{i}", number[1] if number else "") + end
    return None


def originals(ours: str, table: Names, renames: Names, present: list[str]) -> list[str]:
    """What our tensor is called in a file that holds the names `present`; T5's two kinds have a name each for one."""
    found = [name for theirs, mine in table.items() if (name := translate(ours, {mine: theirs}))]
    for theirs, here in renames.items():
        if any(theirs in "^" + name for name in present):  # this file writes it so
            found = [("^" + name).replace(here, theirs, 1).removeprefix("^") for name in found]
    return found
