"""BLIP-2's recipes: two stages, the tiny one and the published ones side by side.

                 vision (frozen)        Q-Former             LM (frozen)      stage 1              stage 2
    tiny         clip/tiny, 17 tokens   4 × 64, 16 queries   lm/tiny          38,400 captions     144,000 captions
    tiny-t5      the same               the same             lm/tiny-t5       the same            the same
    small        clip/small, 197        6 × 384, 32          lm/small         50k steps of 256    30k steps of 256
    vit-l-…      CLIP-L/14, 257         BERT-base, 32        OPT or FlanT5    129M, 250k steps    129M, 80k steps
    vit-g-…      EVA-CLIP g/14, 257     BERT-base, 32        OPT or FlanT5    the same            the same

What scale changes: sizes, steps, batches, BERT's weights to begin with. What it does not: which parts are frozen, and
the three losses. Hyper-parameters of the published ones: BLIP-2 §3.4. Its minimal learning rate is stated for stage 2
only. differs: the paper trains on six collections, of which COCO's and others' captions were rewritten by CapFilt.

Fine-tuned for one task the image encoder learns too, and the language model stays frozen (§4.2 to §4.4):

    stage 2 of a recipe ──► caption     "a photo of …"                             COCO captions    364 pixels
      └── and its stage 1 ► vqa         the Q-Former reads the question (Fig. 7)   VQAv2            490 pixels
              stage 1 ────► retrieval   ITC + ITM + ITG; equal pictures are        COCO captions    364 pixels
                                        no negatives of each other

Hyper-parameters of the published ones: Tables 7 (captions), 8 (questions) and 9 (retrieval). What they leave open:
- Steps. An epoch is taken as the 566,747 captions of COCO's Karpathy training split, or as the 658,111 questions of
  VQAv2's train and val splits (443,757 + 214,354); the paper adds Visual Genome's, and does not say how many.
- Where the Q-Former's text half comes from for questions: stage 2 has none, so it is stage 1's, and all that stage 2
  has trained is laid over it. InstructBLIP does so; for BLIP-2 it was asked and not answered (LAVIS #739).
- Precision: fp32 weights under bf16 autocast, as in all of our stages; an unfrozen ViT in fp16 became NaN (LAVIS #111).

A larger picture has more patches than the encoder has positions: vit.py stretches them at every step (differs: the
released code stretches them once and trains the result). Tiny captions and retrieval look at 72 pixels, 36 patches in
place of 16; tiny questions stay at 48, which is quicker.
"""

from dataclasses import replace

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
JUDGED = ("answers", "captions", "classes")
BOTH_COLOURS = {"captions": 3, "unnamed captions": 1}
COLLECTIONS = {"COCO": 0.6, "Visual Genome": 0.8, "CC3M": 3, "CC12M": 10, "SBU": 1, "LAION": 115}  # million pictures (§3.4)
BERT_WORDS = ("google-bert/bert-base-uncased", "bert")  # the Q-Former's
QFORMER_TEXT = replace(BERT_BASE, vocab=BERT_BASE.vocab + 1, segments=0)  # one more word, [DEC]


def without_last_block(vision: ViTConfig) -> ViTConfig:
    """§3.4: the features of the second-to-last layer, so the last block and the norm behind it are not built."""
    return replace(vision, layers=vision.layers - 1, final_norm=False)


TINY_QFORMER = QFormerConfig(BertConfig(backbones.TINY_VOCAB, width=64, layers=4, heads=4, ffn=128, max_positions=64,
                                        dropout=0.0), queries=16, image_width=backbones.TINY_VISION.width)
TINY = Recipe(
    "blip2/tiny", BLIP2, BLIP2Config(without_last_block(backbones.TINY_VISION), TINY_QFORMER, backbones.TINY_LANGUAGE,
                                     embedding=64, decode_id=Tokenizer.SPECIALS.index("[DEC]")),
    image_size=48, vocab=backbones.TINY_VOCAB,
    stages=(
        Stage("stage1", BRIDGE_1, BOTH_COLOURS, real="pairs", builds=BLIP2Stage1, steps=1200, batch_size=32, lr=1e-3, weight_decay=0.05,
              betas=(0.9, 0.98), max_length=48, evaluate=("retrieval",), on_data={"augment": True, "steps": 2000},
              init=(("vision", "clip/tiny:vision"),)),
        Stage("stage2", BRIDGE_2, {"captions": 1}, lessons=((0.78, BOTH_COLOURS),), real="captions", format="blip2", steps=7000, batch_size=16, lr=1e-3, weight_decay=0.05,
              betas=(0.9, 0.98), max_length=256, evaluate=("answers", "two"),
              on_data={"augment": True, "steps": 4000, "evaluate": JUDGED}, init=(("language", "lm/tiny:language"),))))

# Stage 1 knows no language model: it is the same, but from random numbers of this recipe's own.
TINY_T5 = replace(
    TINY, name="blip2/tiny-t5", config=replace(TINY.config, language=backbones.TINY_T5),
    stages=(TINY.stages[0], replace(TINY.stages[1], format="flan_t5", init=(("language", "lm/tiny-t5:language"),))))

# For one GPU of 24 GB, at 224 pixels; steps and rates follow the paper's proportions and have not been run.
SMALL_QFORMER = QFormerConfig(BertConfig(backbones.SMALL_VOCAB, width=384, layers=6, heads=6, ffn=1536, max_positions=128),
                              queries=32, image_width=backbones.SMALL_VISION.width)
SMALL = Recipe(
    "blip2/small", BLIP2, replace(TINY.config, vision=without_last_block(backbones.SMALL_VISION), embedding=256,
                                  qformer=SMALL_QFORMER, language=backbones.SMALL_LANGUAGE),
    image_size=224, vocab=backbones.SMALL_VOCAB,
    stages=(
        Stage("stage1", BRIDGE_1, {"pairs": 1}, real="pairs", builds=BLIP2Stage1, steps=50_000, batch_size=256, lr=3e-4, weight_decay=0.05,
              betas=(0.9, 0.98), augment=True, max_length=77, evaluate=("retrieval",), init=(("vision", "clip/small:vision"),)),
        Stage("stage2", BRIDGE_2, {"captions": 1}, real="captions", format="blip2", steps=30_000, batch_size=256, lr=3e-4, min_lr=0.5,
              weight_decay=0.05, betas=(0.9, 0.98), augment=True, max_length=512, evaluate=JUDGED,
              init=(("language", "lm/small:language"),))))

# the encoder, its weights, and stage 1's batch with it (§3.4)
CLIP_EYES = (replace(CLIP_L_14, align_corners=True), "openai/clip-vit-large-patch14", 2_320)
EVA_EYES = (EVA_CLIP_G_14, "Salesforce/blip2-itm-vit-g", 1_680)


def published(name: str, eyes: tuple[ViTConfig, str, int], language: DecoderConfig | T5Config,
              language_weights: str) -> Recipe:
    """BLIP-2 §3.4. OPT is told nothing before a caption, FlanT5 its beginning."""
    vision, vision_weights, batch_size = eyes
    format, kind, second_batch = ("flan_t5", "t5", 1_520) if isinstance(language, T5Config) else ("blip2", "opt", 1_920)
    return Recipe(
        name, BLIP2, BLIP2Config(without_last_block(vision), QFormerConfig(QFORMER_TEXT, 32, vision.width), language),
        image_size=224, vocab=language.vocab, words={"text": (language_weights, kind), "bridge": BERT_WORDS}, checkpointing=True,
        stages=(
            Stage("stage1", BRIDGE_1, COLLECTIONS, real="pairs", builds=BLIP2Stage1, steps=250_000, batch_size=batch_size,
                  lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98), warmup=2_000 / 250_000, augment=True, max_length=32,
                  evaluate=("retrieval",), init=(("vision", f"published:{vision_weights}"),
                                                 ("qformer", "published-bert:google-bert/bert-base-uncased"))),
            Stage("stage2", BRIDGE_2, COLLECTIONS, real="captions", format=format, steps=80_000, batch_size=second_batch,
                  lr=1e-4, min_lr=0.5, weight_decay=0.05, betas=(0.9, 0.98), warmup=2_000 / 80_000, augment=True, max_length=32, evaluate=JUDGED,
                  init=(("language", f"published:{language_weights}"),))))


# with the exact GELU, as in the released code; FlanT5 itself was trained with the tanh form
T5_XL, T5_XXL = (replace(config, activation="geglu") for config in (FLAN_T5_XL, FLAN_T5_XXL))
PUBLISHED = (published("blip2/vit-l-opt-2.7b", CLIP_EYES, OPT_2_7B, "facebook/opt-2.7b"),
             published("blip2/vit-g-opt-2.7b", EVA_EYES, OPT_2_7B, "facebook/opt-2.7b"),
             published("blip2/vit-g-opt-6.7b", EVA_EYES, OPT_6_7B, "facebook/opt-6.7b"),
             published("blip2/vit-l-flan-t5-xl", CLIP_EYES, T5_XL, "google/flan-t5-xl"),
             published("blip2/vit-g-flan-t5-xl", EVA_EYES, T5_XL, "google/flan-t5-xl"),
             published("blip2/vit-g-flan-t5-xxl", EVA_EYES, T5_XXL, "google/flan-t5-xxl"))
VIT_L, OPT_2, OPT_6, *_ = PUBLISHED

# --- fine-tuning ---

STAGE_1 = ("vision", *BRIDGE_1)  # what learns; stage 2's language model does not
STAGE_2 = ("vision", *BRIDGE_2)

# 5 epochs each, with a warm-up of 1,000 steps
CAPTION = Stage("caption", STAGE_2, {"COCO": 567}, real="captions", format="blip2-caption", steps=11_069, batch_size=256, lr=1e-5,
                warmup=1_000 / 11_069, weight_decay=0.05, augment=True, max_length=32, evaluate=("captions",))
VQA = Stage("vqa", STAGE_2, {"VQAv2": 658}, sizes={"asks": True}, format="blip2", steps=25_707, batch_size=128, lr=1e-5,
            warmup=1_000 / 25_707, weight_decay=0.05, augment=True, max_length=64, evaluate=("answers",))
RETRIEVAL = Stage("retrieval", STAGE_1, {"COCO": 567}, real="pairs", builds=BLIP2Stage1, steps=12_651, batch_size=224, lr=1e-5,
                  warmup=1_000 / 12_651, weight_decay=0.05, augment=True, max_length=35, evaluate=("retrieval",))


def fine_tuned(name: str, base: Recipe, stage: Stage, image_size: int, **changes) -> Recipe:
    """One more stage on `base`, which goes on from one of its two; `changes`: fields of the stage."""
    init = {"caption": (("", base.name),), "retrieval": (("", f"{base.name}@stage1"),),
            "vqa": (("qformer", f"{base.name}@stage1:qformer"), ("", base.name))}[stage.name]
    return replace(base, name=name, stages=(replace(stage, init=init, **changes),), image_size=image_size)


# the published stages, where smaller data and models need something else
TINY_HOW = {"batch_size": 32, "lr": 3e-4, "warmup": 0.03, "layer_decay": 0.95, "augment": False}
FINE_TUNED = (
    fine_tuned("blip2/tiny-caption", TINY, CAPTION, 72, data={"captions": 1}, steps=1_000, max_length=256, evaluate=("two",),
               on_data={"augment": True, "evaluate": ("captions", "classes")}, **TINY_HOW),
    fine_tuned("blip2/tiny-vqa", TINY, VQA, 48, data={"talk": 72, "drills": 13, "unnamed drills": 15}, steps=2_000, max_length=256,
               on_data={"augment": True, "evaluate": JUDGED}, **TINY_HOW),
    # as in stage 1: the world's own pairs leave facts out of captions, which are complete where it is judged
    fine_tuned("blip2/tiny-retrieval", TINY, RETRIEVAL, 72, steps=300, max_length=48, data=BOTH_COLOURS,
               on_data={"augment": True}, **TINY_HOW),
    fine_tuned("blip2/vit-g-opt-2.7b-caption", OPT_2, CAPTION, 364, layer_decay=1.0),
    fine_tuned("blip2/vit-g-opt-6.7b-caption", OPT_6, CAPTION, 364, layer_decay=0.95),
    fine_tuned("blip2/vit-g-opt-2.7b-vqa", OPT_2, VQA, 490, layer_decay=0.95),
    fine_tuned("blip2/vit-g-opt-6.7b-vqa", OPT_6, VQA, 490, layer_decay=0.9),
    fine_tuned("blip2/vit-l-retrieval", VIT_L, RETRIEVAL, 364, layer_decay=0.95, lr=5e-6, betas=(0.9, 0.98)),
    fine_tuned("blip2/vit-g-retrieval", OPT_2, RETRIEVAL, 364, layer_decay=0.95),
)
RECIPES = (TINY, TINY_T5, SMALL, *PUBLISHED, *FINE_TUNED)
