"""BLIP-2's recipes: two stages, the tiny one and the published ones side by side.

                 eyes (frozen)          Q-Former             LM (frozen)      stage 1              stage 2
    tiny         clip/tiny, 17 tokens   4 × 64, 16 queries   lm/tiny          38,400 captions     144,000 captions
    tiny-t5      the same               the same             lm/tiny-t5       the same            the same
    small        clip/small, 197        6 × 384, 32          lm/small         50k steps of 256    30k steps of 256
    vit-l-…      CLIP-L/14, 257         BERT-base, 32        OPT or FlanT5    129M, 250k steps    129M, 80k steps
    vit-g-…      EVA-CLIP g/14, 257     BERT-base, 32        OPT or FlanT5    the same            the same

What scale changes: sizes, steps, batches, BERT's weights to begin with. What it does not: which parts are frozen, and
the three losses. Hyper-parameters of the published ones: BLIP-2 §3.4. Its minimal learning rate is stated for stage 2
only. differs: the paper trains on six collections, of which COCO's and others' captions were rewritten by CapFilt.
"""

from dataclasses import replace
from functools import partial

from torch import nn

from nanovlm.bert import BERT_BASE, BertConfig
from nanovlm.decoder import OPT_2_7B, OPT_6_7B, DecoderConfig
from nanovlm.papers.blip2 import BLIP2, BLIP2Config, BLIP2Stage1
from nanovlm.qformer import QFormerConfig
from nanovlm.recipes import backbones
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.t5 import FLAN_T5_XL, FLAN_T5_XXL, T5Config
from nanovlm.tokenizer import Tokenizer
from nanovlm.vit import CLIP_L_14, EVA_CLIP_G_14, ViTConfig

BRIDGE_1 = ("vision_norm", "qformer", "word_head", "image_projection", "text_projection", "match_head", "temperature")
BRIDGE_2 = ("vision_norm", "qformer", "projection")
QFORMER_TEXT = replace(BERT_BASE, vocab=BERT_BASE.vocab + 1, segments=0)  # one more word, [DEC]


def build_blip2(config: BLIP2Config, checkpointing: bool, stage: str) -> nn.Module:
    """The model of one of the stages here or in blip2_finetuning.py."""
    if stage in ("stage1", "retrieval"):
        return BLIP2Stage1(config)
    asks = stage == "vqa"
    model = BLIP2(replace(config, asks=asks, qformer=replace(config.qformer, reads=asks)))
    model.language.checkpointing = checkpointing
    return model


def without_last_block(vision: ViTConfig) -> ViTConfig:
    """§3.4: the features of the second-to-last layer, so the last block and the norm behind it are not built."""
    return replace(vision, layers=vision.layers - 1, final_norm=False)


TINY_QFORMER = QFormerConfig(BertConfig(backbones.TINY_VOCAB, width=64, layers=4, heads=4, ffn=128, max_positions=64,
                                        dropout=0.0), queries=16, image_width=backbones.TINY_VISION.width)
TINY_CONFIG = BLIP2Config(without_last_block(backbones.TINY_VISION), TINY_QFORMER, backbones.TINY_LANGUAGE, embedding=64,
                          decode_id=Tokenizer.SPECIALS.index("[DEC]"))

TINY = Recipe(
    name="blip2/tiny",
    build=partial(build_blip2, TINY_CONFIG, False),
    image_size=48,
    vocab=backbones.TINY_VOCAB,
    stages=(
        Stage("stage1", BRIDGE_1, "described", format="pair", steps=1200, batch_size=32, lr=1e-3, weight_decay=0.05,
              betas=(0.9, 0.98), max_length=48, evaluate=("retrieval",), on_data=(("augment", True), ("steps", 2000)),
              init=(("vision", "clip/tiny:vision"),)),
        Stage("stage2", BRIDGE_2, "described", format="blip2", steps=9000, batch_size=16, lr=1e-3, weight_decay=0.05,
              betas=(0.9, 0.98), max_length=256, evaluate=("answers", "two"),
              on_data=(("augment", True), ("steps", 4000), ("evaluate", ("answers", "captions", "classes"))),
              init=(("language", "lm/tiny:language"),)),
    ),
)

# Stage 1 knows no language model: it is the same, but from random numbers of this recipe's own.
TINY_T5 = replace(
    TINY,
    name="blip2/tiny-t5",
    build=partial(build_blip2, replace(TINY_CONFIG, language=backbones.TINY_T5), False),
    stages=(TINY.stages[0],
            replace(TINY.stages[1], format="flan_t5", init=(("language", "lm/tiny-t5:language"),))),
)

# For one GPU of 24 GB, at 224 pixels; steps and rates follow the paper's proportions and have not been run.
SMALL_QFORMER = QFormerConfig(BertConfig(backbones.SMALL_VOCAB, width=384, layers=6, heads=6, ffn=1536, max_positions=128),
                              queries=32, image_width=backbones.SMALL_VISION.width)
SMALL = Recipe(
    name="blip2/small",
    build=partial(build_blip2, replace(TINY_CONFIG, vision=without_last_block(backbones.SMALL_VISION), embedding=256,
                                       qformer=SMALL_QFORMER, language=backbones.SMALL_LANGUAGE), False),
    image_size=224,
    vocab=backbones.SMALL_VOCAB,
    stages=(
        Stage("stage1", BRIDGE_1, "pairs", steps=50_000, batch_size=256, lr=3e-4, weight_decay=0.05, betas=(0.9, 0.98),
              augment=True, max_length=77, evaluate=("retrieval",), init=(("vision", "clip/small:vision"),)),
        Stage("stage2", BRIDGE_2, "captions", format="blip2", steps=30_000, batch_size=256, lr=3e-4, min_lr=0.5,
              weight_decay=0.05, betas=(0.9, 0.98), augment=True, max_length=512,
              evaluate=("answers", "captions", "classes"), init=(("language", "lm/small:language"),)),
    ),
)

# the encoder, its weights, and stage 1's batch with it (§3.4)
CLIP_EYES = (replace(CLIP_L_14, align_corners=True), "openai/clip-vit-large-patch14", 2_320)
EVA_EYES = (EVA_CLIP_G_14, "Salesforce/blip2-itm-vit-g", 1_680)


def published(name: str, eyes: tuple[ViTConfig, str, int], language: DecoderConfig | T5Config,
              language_weights: str) -> Recipe:
    """BLIP-2 §3.4. OPT is told nothing before a caption, FlanT5 its beginning."""
    vision, vision_weights, batch_size = eyes
    config = BLIP2Config(without_last_block(vision), QFormerConfig(QFORMER_TEXT, 32, vision.width), language)
    format, second_batch = ("flan_t5", 1_520) if isinstance(language, T5Config) else ("blip2", 1_920)
    return Recipe(
        name=name,
        build=partial(build_blip2, config, True),
        image_size=224,
        vocab=language.vocab,
        stages=(
            Stage("stage1", BRIDGE_1, "pairs", steps=250_000, batch_size=batch_size, lr=1e-4, weight_decay=0.05,
                  betas=(0.9, 0.98), warmup=2_000 / 250_000, augment=True, max_length=32, evaluate=("retrieval",),
                  init=(("vision", f"published:{vision_weights}"), ("qformer", "published:google-bert/bert-base-uncased"))),
            Stage("stage2", BRIDGE_2, "captions", format=format, steps=80_000, batch_size=second_batch, lr=1e-4, min_lr=0.5,
                  weight_decay=0.05, betas=(0.9, 0.98), warmup=2_000 / 80_000, augment=True, max_length=32,
                  evaluate=("answers", "captions", "classes"), init=(("language", f"published:{language_weights}"),)),
        ),
    )


# with the exact GELU, as in the released code; FlanT5 itself was trained with the tanh form
T5_XL, T5_XXL = (replace(config, activation="geglu") for config in (FLAN_T5_XL, FLAN_T5_XXL))
RECIPES = (TINY, TINY_T5, SMALL,
           published("blip2/vit-l-opt-2.7b", CLIP_EYES, OPT_2_7B, "facebook/opt-2.7b"),
           published("blip2/vit-g-opt-2.7b", EVA_EYES, OPT_2_7B, "facebook/opt-2.7b"),
           published("blip2/vit-g-opt-6.7b", EVA_EYES, OPT_6_7B, "facebook/opt-6.7b"),
           published("blip2/vit-l-flan-t5-xl", CLIP_EYES, T5_XL, "google/flan-t5-xl"),
           published("blip2/vit-g-flan-t5-xl", EVA_EYES, T5_XL, "google/flan-t5-xl"),
           published("blip2/vit-g-flan-t5-xxl", EVA_EYES, T5_XXL, "google/flan-t5-xxl"))
