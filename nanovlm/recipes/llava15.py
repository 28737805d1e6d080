"""LLaVA-1.5's recipes: what changed since LLaVA is two maps instead of one, the data, and how much of a picture is seen.

                 vision                         projector   stage 1 "align"       stage 2 "tune"
    tiny         clip/tiny, 16 tokens           2 layers    captions              scenes' mixture
    tiny-hd      the same, 5 views, 88 tokens   2 layers    (goes on from tiny)   "hd": the same, pictures of 96 in tiles
    small        clip/small, 196                2 layers    captions              conversations
    7b, 13b      CLIP-L/14 at 336: 576 tokens   2 layers    558K pairs, lr 1e-3   665K conversations, lr 2e-5
    7b-hd, …     CLIP-L/14 at 224, up to 7      2 layers    as above, at 224      the same, pictures in tiles
                 views: up to 1,888 tokens

Stage 1 crops a picture to a square, stage 2 pads it with the mean colour (the released scripts do): nothing of it is lost where
questions are asked. HD has no stage 1 of its own: the projector has learned on whole pictures, and stage 2
goes on with tiles (§A.1); the tiny one has no stage 2 of its own either.

Hyper-parameters of the published ones: LLaVA-1.5 Table 9, batches of 256 and 128, AdamW without weight decay, cosine, 3 %
warm-up. Steps are one epoch: 558,128 pairs, 665,298 conversations. What is not said of HD: its batch is taken over from 1.5, its
sequence is as long as its language model allows, 4,096 tokens, as the largest pictures take 1,888 of them.
"""

from dataclasses import replace

from nanovlm.decoder import VICUNA_7B, VICUNA_13B, DecoderConfig
from nanovlm.papers.llava import LLaVA, LLaVAConfig
from nanovlm.recipes import llava
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tiling import hd_tiling
from nanovlm.vit import CLIP_L_14, CLIP_L_14_336

JUDGED = ("mixture", "captions", "classes")

# Short answers lead and one in ten is a letter, as in the paper; lists of lookups hold on to what lessons taught, and talk about
# what is told stands for talk without pictures (ShareGPT).
LISTS = {"drills": 46, "letter drills": 31, "box drills": 8, "unnamed drills": 15}
MIXTURE = {"short": 36, "drills": 10, "letter drills": 7, "box drills": 2, "unnamed drills": 12, "sentences": 8, "letters": 9,
           "captions on demand": 3, "regions": 5, "grounding": 3, "told/sentences": 8}
SIGNS = MIXTURE | {"signs": 34}  # where signs are in small print: a second digit is learned late

# The paper's own, in thousands (Table 7; what each stands for is in data/prompts.py).
PUBLISHED_MIXTURE = {"LLaVA-Instruct": 158, "ShareGPT": 40, "VQAv2": 83, "GQA": 72, "OKVQA": 9, "OCR-VQA": 80, "A-OKVQA": 66,
                     "TextCaps": 22, "RefCOCO": 48, "Visual Genome": 86}

TINY = replace(
    llava.TINY, name="llava15/tiny", config=replace(llava.TINY.config, projector_layers=2),
    stages=(llava.TINY.stages[0],
            replace(llava.TINY.stages[1], data=MIXTURE, lessons=((0.16, LISTS),), real="prompted", fit="pad", steps=2400, lr=8e-4,
                    evaluate=JUDGED, on_data={"steps": 2000})))

# Pictures of 96 × 96 in five views of 48: 88 image tokens. The numbers in small print are for tiles.
# differs: goes on from llava15/tiny's stage 2, where the paper's stage 2 has tiles from its first step: questions are learned on 16
# tokens, in less than half of the time, and what is left to learn is to read tiles.
TINY_HD = replace(
    TINY, name="llava15/tiny-hd", config=replace(TINY.config, tiling=hd_tiling(48)), world={"size": 96, "small_print": True},
    stages=(replace(TINY.stages[1], name="hd", trains=(*llava.BOTH, "tiles"), data=SIGNS, lessons=(), steps=1000,
                    on_data={"steps": 800},
                    init=tuple((part, f"llava15/tiny:{part}") for part in ("vision", *llava.BOTH))),))

SMALL = replace(
    llava.SMALL, name="llava15/small", config=replace(llava.SMALL.config, projector_layers=2),
    stages=(replace(llava.SMALL.stages[0], lr=1e-3), replace(llava.SMALL.stages[1], fit="pad")))


def published(name: str, language: DecoderConfig, weights: str, hd: bool = False) -> Recipe:
    """No tiles in stage 1."""
    vision, eyes = (CLIP_L_14, "openai/clip-vit-large-patch14") if hd else (CLIP_L_14_336, "openai/clip-vit-large-patch14-336")
    config = LLaVAConfig(vision, replace(language, eps=1e-5), image_token_id=language.vocab, projector_layers=2,
                         tiling=hd_tiling(vision.image_size) if hd else None)
    return Recipe(
        name, LLaVA, config, image_size=vision.image_size, vocab=language.vocab, words={"text": (weights, "llama")}, checkpointing=True,
        stages=(
            Stage("align", ("projector",), {"LCS": 558}, real="captions", sizes={"tiling": None}, format="plain", steps=2_181,
                  batch_size=256, lr=1e-3, max_length=2048, init=(("vision", f"published:{eyes}"), ("language", f"published:{weights}"))),
            Stage("tune", (*llava.BOTH, *["tiles"] * hd), PUBLISHED_MIXTURE, real="prompted", format="v1", steps=5_198, batch_size=128, lr=2e-5,
                  fit="pad", group=True, max_length=4096 if hd else 2048, evaluate=JUDGED)))


RECIPES = (TINY, TINY_HD, SMALL,
           published("llava15/7b", VICUNA_7B, "lmsys/vicuna-7b-v1.5"),
           published("llava15/13b", VICUNA_13B, "lmsys/vicuna-13b-v1.5"),
           published("llava15/7b-hd", VICUNA_7B, "lmsys/vicuna-7b-v1.5", hd=True),
           published("llava15/13b-hd", VICUNA_13B, "lmsys/vicuna-13b-v1.5", hd=True))
