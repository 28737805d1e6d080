"""LLaVA's recipes: two stages, the tiny one and the published ones side by side.

                 vision                LM                stage 1 "align"           stage 2 "tune"
    tiny         clip/tiny, 16 tokens  lm/tiny           projector, captions       projector + LM, conversations
    small        clip/small, 196       lm/small          the same                  the same
    7b, 13b      CLIP-L/14, 256        Vicuna            595K pairs, lr 2e-3       158K × 3 epochs, lr 2e-5

What scale changes: sizes, steps, learning rates. What it does not: what is frozen, what learns, on which kind of data.
Hyper-parameters of the published ones: LLaVA §5 and App. C (batch 128 then 32, Adam, no weight decay, cosine, 3 % warm-up).
"""

from dataclasses import replace

from nanovlm.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from nanovlm.papers.llava import LLaVA, LLaVAConfig
from nanovlm.recipes import backbones
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tokenizer import Tokenizer
from nanovlm.vit import CLIP_L_14

JUDGED = ("answers", "captions", "classes")
IMAGE_ID = Tokenizer.SPECIALS.index("<image>")
BOTH = ("projector", "language")
LISTS = {"drills": 85, "unnamed drills": 15}

TINY = Recipe(
    "llava/tiny", LLaVA, LLaVAConfig(backbones.TINY_VISION, backbones.TINY_LANGUAGE, IMAGE_ID), image_size=48,
    vocab=backbones.TINY_VOCAB,
    stages=(
        Stage("align", ("projector",), {"captions": 1}, real="captions", format="plain", steps=100, batch_size=64, lr=1e-3, max_length=256,
              on_data={"augment": True}, init=(("vision", "clip/tiny:vision"), ("language", "lm/tiny:language"))),
        Stage("tune", BOTH, {"talk": 72, "drills": 13, "unnamed drills": 15}, lessons=((0.08, LISTS),), format="tiny", steps=1600, batch_size=32, lr=1e-3, betas=(0.9, 0.98), max_length=256,
              evaluate=JUDGED, on_data={"augment": True, "steps": 2000})))

SMALL = Recipe(
    "llava/small", LLaVA, LLaVAConfig(backbones.SMALL_VISION, backbones.SMALL_LANGUAGE, IMAGE_ID), image_size=224,
    vocab=backbones.SMALL_VOCAB,
    stages=(
        Stage("align", ("projector",), {"captions": 1}, real="captions", format="plain", steps=5_000, batch_size=64, lr=2e-3, max_length=512,
              init=(("vision", "clip/small:vision"), ("language", "lm/small:language"))),
        Stage("tune", BOTH, {"talk": 1}, format="v1", steps=20_000, batch_size=32, lr=2e-4, max_length=1024, evaluate=JUDGED)))


def published(name: str, language: DecoderConfig, weights: str) -> Recipe:
    """The paper's own two stages. differs: one unused id stands for <image>, as in the released code since v1.0.0."""
    return Recipe(
        name, LLaVA, LLaVAConfig(CLIP_L_14, language, image_token_id=language.vocab), image_size=224, vocab=language.vocab,
        words={"text": (weights, "llama")}, checkpointing=True,
        stages=(
            Stage("align", ("projector",), {"CC3M": 595}, real="captions", format="plain", steps=4_651, batch_size=128, lr=2e-3, max_length=2048,
                  init=(("vision", "published:openai/clip-vit-large-patch14"), ("language", f"published:{weights}"))),
            Stage("tune", BOTH, {"LLaVA-Instruct": 158}, format="v0", steps=14_786, batch_size=32, lr=2e-5, max_length=2048,
                  evaluate=JUDGED)))


def science(base: Recipe, stage: Stage) -> Recipe:
    """The other stage 2 (§5.2): ScienceQA, the reason before the letter, after the same alignment."""
    return replace(base, name=f"{base.name}-science", stages=(base.stages[0], stage))


# 12 epochs of 12,726 questions (App. C); learning rate and batch from the released script, as the paper gives none
SCIENCE = Stage("science", BOTH, {"ScienceQA": 13}, format="v0", steps=1_193, batch_size=128, lr=2e-5, max_length=2048,
                evaluate=("science",))

PUBLISHED = (published("llava/7b", VICUNA_7B, "lmsys/vicuna-7b-v1.3"),
             published("llava/13b", VICUNA_13B, "lmsys/vicuna-13b-v1.3"))
RECIPES = (TINY, science(TINY, replace(TINY.stages[1], name="science", steps=2400, evaluate=("science",),
                                       data={"science": 43, "science texts": 42, "unnamed drills": 15})),
           SMALL, *PUBLISHED, *(science(base, SCIENCE) for base in PUBLISHED))
