"""BLIP-2 fine-tuned for one task: the image encoder learns too now, the language model stays frozen (§4.2 to §4.4).

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

from nanovlm.recipes import blip2
from nanovlm.recipes.stage import Recipe, Stage

STAGE_1 = ("vision", *blip2.BRIDGE_1)  # what learns; stage 2's language model does not
STAGE_2 = ("vision", *blip2.BRIDGE_2)


def fine_tuned(name: str, base: Recipe, stage: Stage, image_size: int) -> Recipe:
    """One more stage on `base`; stage.name says which model is built of its sizes, and which of its stages it goes on from."""
    init = {"caption": (("", base.name),), "retrieval": (("", f"{base.name}@stage1"),),
            "vqa": (("qformer", f"{base.name}@stage1:qformer"), ("", base.name))}[stage.name]
    return Recipe(name, base.build, (replace(stage, init=init),), image_size, base.vocab)


def published(name: str, base: Recipe, stage: Stage, layer_decay: float) -> Recipe:
    """The tables differ in this by language model."""
    return fine_tuned(name, base, replace(stage, layer_decay=layer_decay), 490 if stage.name == "vqa" else 364)


# 5 epochs each, with a warm-up of 1,000 steps
CAPTION = Stage("caption", STAGE_2, "captions", format="blip2-caption", steps=11_069, batch_size=256, lr=1e-5,
                warmup=1_000 / 11_069, weight_decay=0.05, augment=True, max_length=32, evaluate=("captions",))
VQA = Stage("vqa", STAGE_2, "instruct", format="blip2", steps=25_707, batch_size=128, lr=1e-5, warmup=1_000 / 25_707,
            weight_decay=0.05, augment=True, max_length=64, evaluate=("answers",))
RETRIEVAL = Stage("retrieval", STAGE_1, "pairs", steps=12_651, batch_size=224, lr=1e-5, warmup=1_000 / 12_651,
                  weight_decay=0.05, augment=True, max_length=35, evaluate=("retrieval",))

TINY = {  # the published stages, where smaller data and models need something else
    "caption": replace(CAPTION, steps=1_000, batch_size=32, lr=3e-4, warmup=0.03, layer_decay=0.95, augment=False,
                       max_length=256, evaluate=("two",),
                       on_data=(("augment", True), ("evaluate", ("captions", "classes")))),
    "vqa": replace(VQA, steps=2_000, batch_size=32, lr=3e-4, warmup=0.03, layer_decay=0.95, augment=False,
                   max_length=256, on_data=(("augment", True), ("evaluate", ("answers", "captions", "classes")))),
    # as in stage 1: the world's own pairs leave facts out of captions, which are complete where it is judged
    "retrieval": replace(RETRIEVAL, view="described", format="pair", steps=300, batch_size=32, lr=3e-4, warmup=0.03,
                         layer_decay=0.95, augment=False, max_length=48, on_data=(("augment", True),)),
}

BASE = {recipe.name: recipe for recipe in blip2.RECIPES}
VIT_L, OPT_2_7B, OPT_6_7B = (BASE[f"blip2/{name}"] for name in ("vit-l-opt-2.7b", "vit-g-opt-2.7b", "vit-g-opt-6.7b"))

RECIPES = (
    fine_tuned("blip2/tiny-caption", blip2.TINY, TINY["caption"], 72),
    fine_tuned("blip2/tiny-vqa", blip2.TINY, TINY["vqa"], 48),
    fine_tuned("blip2/tiny-retrieval", blip2.TINY, TINY["retrieval"], 72),
    published("blip2/vit-g-opt-2.7b-caption", OPT_2_7B, CAPTION, 1.0),
    published("blip2/vit-g-opt-6.7b-caption", OPT_6_7B, CAPTION, 0.95),
    published("blip2/vit-g-opt-2.7b-vqa", OPT_2_7B, VQA, 0.95),
    published("blip2/vit-g-opt-6.7b-vqa", OPT_6_7B, VQA, 0.9),
    published("blip2/vit-l-retrieval", VIT_L, replace(RETRIEVAL, lr=5e-6, betas=(0.9, 0.98)), 0.95),
    published("blip2/vit-g-retrieval", OPT_2_7B, RETRIEVAL, 0.95),
)
