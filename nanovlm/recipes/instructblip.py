"""InstructBLIP's recipes: one stage of instruction tuning behind BLIP-2's two, on sets that are drawn by the roots of their sizes.

                 vision (frozen)        Q-Former               LM (frozen)          begins with
    tiny         clip/tiny, 17 tokens   4 × 64, 16 queries     lm/tiny              blip2/tiny, both stages
    small        clip/small, 197        6 × 384, 32            lm/small             blip2/small, both stages
    flan-t5-…    EVA-CLIP g/14, 257     BERT-base, 32          FlanT5-XL, -XXL      published BLIP-2, both stages
    vicuna-…     the same               the same               Vicuna-7B, -13B      published stage 1, a stage 2 of its own

What scale changes: sizes, steps, batches. What it does not: what learns, and how the sets are balanced. Hyper-parameters: §2.6.

    p_d = √S_d / Σ √S                                                                            (§2.4)

               size       proportional   √        uniform          by size the largest is nearly all; by turns the smallest are
    captions   32,000     0.48           0.30     0.14             memorised
    knowledge   1,000     0.01           0.05     0.14

Both of BLIP-2's stages are needed: stage 2 has no text half, so words, positions and text feed-forwards come from stage 1, and all
that stage 2 has trained is laid over them.

What the paper leaves open:
- It lowers A-OKVQA's share by hand and raises OKVQA's, and does not say how much: both factors are 1 here.
- The sets that ask for questions have the sizes of those that they reverse; which three those are, is not said either.
- Stage 2 with Vicuna: only that it was run. Steps, batch and rate are those of BLIP-2 with OPT, a decoder too.
- Fine-tuning on one set (§3.5): steps and rates. Here five epochs, at the rate of instruction tuning.
- Vicuna's 32,001st word is [PAD], which is never read.
Each batch is of one set, as in the released code; in the tiny recipes a batch mixes them. An instruction has 128 tokens at most.
differs: a response has what is left of 384, in the released code 256.
"""

from dataclasses import replace

from nanovlm.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from nanovlm.papers.blip2 import BLIP2, BLIP2Config
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.qformer import QFormerConfig
from nanovlm.recipes import blip2
from nanovlm.recipes.stage import Diet, Recipe, Stage
from nanovlm.t5 import T5Config

SAMPLING = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}  # the power of a set's size


def balanced(sizes: dict[str, float], by: str = "sqrt", factors: dict[str, float] | None = None) -> Diet:
    """How often each set is drawn, 1 in sum: by the power SAMPLING[by] of its size.

    factors: by hand on top, as the paper does it for two sets and does not say how much (§2.4); 1 where none is given.
    """
    weights = {name: size ** SAMPLING[by] * (factors or {}).get(name, 1.0) for name, size in sizes.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def both_stages(base: str) -> tuple[tuple[str, str], ...]:
    """All of BLIP-2's stage 2, and below it the text half of stage 1."""
    return ("qformer", f"{base}@stage1:qformer"), ("", base)


TINY_SIZES = {"tasks/captions": 32_000, "tasks/signs": 2_000, "tasks/questions": 16_000, "tasks/knowledge": 1_000, "tasks/reading": 8_000,
              "tasks/asking": 4_000, "tasks/llava": 4_000}

TINY = Recipe(
    "instructblip/tiny", InstructBLIP, replace(blip2.TINY.config, asks=True), image_size=48, vocab=blip2.TINY.vocab,
    stages=(
        Stage("tune", blip2.BRIDGE_2, balanced(TINY_SIZES), format="instructblip", steps=7000, batch_size=16, lr=1e-3, weight_decay=0.05,
              max_length=256, real="instructions", evaluate=("tasks",), init=both_stages("blip2/tiny"),
              on_data={"augment": True, "steps": 2000}),))

# One query of its own cannot carry a whole scene: here it matters whether it is told what will be asked.
NARROW_INIT = (("qformer.layers", "blip2/tiny@stage1:qformer.layers"), *(
    (part, f"blip2/tiny:{part}") for part in ("vision", "vision_norm", "qformer.norm", "qformer.layers", "projection", "language")))
NARROW = replace(
    TINY, name="instructblip/tiny-narrow", config=replace(TINY.config, qformer=replace(blip2.TINY_QFORMER, queries=1)),
    stages=(replace(TINY.stages[0], init=(("qformer.embeddings", "blip2/tiny@stage1:qformer.embeddings"), *NARROW_INIT)),))
NARROW_BLIND = replace(NARROW, name="instructblip/tiny-narrow-blind", config=replace(NARROW.config, asks=False),
                       stages=(replace(TINY.stages[0], init=NARROW_INIT[1:]),))

# Steps and rates follow the paper's proportions and have not been run.
SMALL = Recipe(
    "instructblip/small", InstructBLIP, replace(blip2.SMALL.config, asks=True), image_size=224, vocab=blip2.SMALL.vocab,
    stages=(
        Stage("tune", blip2.BRIDGE_2, balanced(TINY_SIZES), format="instructblip", steps=20_000, batch_size=128, lr=1e-4, weight_decay=0.05,
              augment=True, max_length=512, real="instructions", evaluate=("tasks",), init=both_stages("blip2/small")),))

# --- published ---

# Thousands of training samples (Table 4 in App. C): of COCO, TextCaps and VQAv2 the pictures are counted.
HELD_IN = {"COCO Caption": 82, "Web CapFilt": 14_000, "TextCaps": 21, "VQAv2": 82, "OKVQA": 9, "A-OKVQA": 17, "OCR-VQA": 800,
           "VQAv2 questions": 82, "OKVQA questions": 9, "A-OKVQA questions": 17,
           "LLaVA detail": 23, "LLaVA reasoning": 77, "LLaVA conversation": 58}
STAGE_1 = "published:Salesforce/blip2-itm-vit-g"
EYES, *_ = blip2.EVA_EYES


def config(language: DecoderConfig | T5Config) -> BLIP2Config:
    return BLIP2Config(blip2.without_last_block(EYES), QFormerConfig(blip2.QFORMER_TEXT, 32, EYES.width), language, asks=True)


def tune(format: str, batch_size: int, stage_2: str, **how) -> Stage:
    """§2.6; the rate rises for 1,000 of 60,000 steps, from 1e-8, and falls to 0. stage_2: where all but the text half comes from."""
    return Stage("tune", blip2.BRIDGE_2, balanced(HELD_IN), mixed="batches", real="instructions", format=format, steps=60_000,
                 batch_size=batch_size, lr=1e-5, warmup=1_000 / 60_000, weight_decay=0.05, augment=True, max_length=384, evaluate=("tasks",),
                 init=(("qformer", STAGE_1), ("", stage_2)), **how)


def on_flan_t5(size: str, language: T5Config, batch_size: int) -> Recipe:
    words = {"text": (f"google/flan-t5-{size}", "t5"), "bridge": blip2.BERT_WORDS}
    return Recipe(f"instructblip/flan-t5-{size}", InstructBLIP, config(language), image_size=224, vocab=language.vocab, words=words,
                  checkpointing=True, stages=(tune("instructblip-t5", batch_size, f"published:Salesforce/blip2-flan-t5-{size}"),))


def on_vicuna(size: str, language: DecoderConfig, batch_size: int) -> Recipe:
    """With one word more. There is no published BLIP-2 on Vicuna: the authors ran its stage 2 themselves (§2.6)."""
    name, language, weights = f"instructblip/vicuna-{size}", replace(language, vocab=language.vocab + 1), f"lmsys/vicuna-{size}-v1.1"
    second = replace(
        blip2.OPT_2.stage("stage2"), builds=BLIP2, sizes={"asks": False},
        init=(*((part, STAGE_1) for part in ("vision", "vision_norm", "qformer")), ("language", f"published-words:{weights}")))
    words = {"text": (weights, "vicuna"), "bridge": blip2.BERT_WORDS}
    return Recipe(name, InstructBLIP, config(language), image_size=224, vocab=language.vocab, words=words, checkpointing=True,
                  stages=(second, tune("instructblip", batch_size, f"{name}@stage2", anew=True)))


PUBLISHED = (on_flan_t5("xl", blip2.T5_XL, 192), on_flan_t5("xxl", blip2.T5_XXL, 64),
             on_vicuna("7b", VICUNA_7B, 128), on_vicuna("13b", VICUNA_13B, 64))


def on_one_set(base: Recipe, name: str, data: str, **how) -> Recipe:
    """§3.5: fine-tuned on one set, the eyes frozen at 224 pixels."""
    stage = replace(base.stage(), name="one-set", data={data: 1}, mixed="samples", init=(("", base.name),), **how)
    return replace(base, name=name, stages=(stage,))


FINE_TUNED = (
    on_one_set(TINY, "instructblip/tiny-knowledge", "tasks/knowledge", steps=500, lr=3e-4),
    *(on_one_set(base, f"{base.name}-{name.lower()}", name, steps=5 * 1000 * HELD_IN[name] // base.stage().batch_size, warmup=0.03)
      for base in PUBLISHED[1:3] for name in ("OKVQA", "A-OKVQA", "OCR-VQA")))  # of Table 3; ScienceQA is no set of HELD_IN
RECIPES = (TINY, NARROW, NARROW_BLIND, SMALL, *PUBLISHED, *FINE_TUNED)
