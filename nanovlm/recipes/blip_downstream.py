"""BLIP fine-tuned for one task each, which nothing of it sits out: all that is built learns (§5, App. A).

                model          what learns from which data            tiny              vit-b, published
    retrieval   BLIP           ITC + ITM on captions                  72 pixels         384 pixels, COCO, 6 epochs, lr 1e-5
    caption     BLIP           "a picture of …" on captions           72 pixels         384 pixels, COCO, 5 epochs, lr 1e-5
    vqa         BLIPAnswerer   questions and answers                  48 pixels         480 pixels, VQAv2, 10 epochs, lr 2e-5
    nlvr2       BLIPReasoner   statements about two pictures          48 pixels         384 pixels, NLVR2, 15 epochs, lr 3e-5

The first two are what CapFilt's filter and captioner are, looking closer: their stages are those of recipes/blip.py. The published
ones go on from `retrain`, the tiny ones from `pretrain`, which there is with --data too.

vit-l has lr 5e-6 to retrieve and 2e-6 to caption. No vqa: the decoder's cross-attention has met the ViT's 1,024 numbers, and the
question's states have the text's 768; the released code has vit-b only.
differs: an epoch of VQAv2 is its 658,111 questions of train and val (released: Visual Genome's too, whose number is not told), the
rate falls in every step (released: after every epoch). Captions are judged as they are found greedily (paper: 3 beams, 5 to 20 tokens).
"""

from dataclasses import replace

from nanovlm.papers.blip_downstream import BLIPAnswerer, BLIPReasoner
from nanovlm.recipes import blip
from nanovlm.recipes.stage import Recipe, Stage

HOW = {"batch_size": 256, "warmup": 0.0, "weight_decay": 0.05, "augment": True, "fit": "stretch"}
VQA = Stage("vqa", ("vision", "text_encoder", "text_decoder", "word_head"), {"VQAv2": 658}, builds=BLIPAnswerer, format="blip-vqa",
            steps=25_707, lr=2e-5, max_length=64, evaluate=("answers",), **HOW)
NLVR2 = Stage("nlvr2", ("vision", "text_encoder", "second", "merge", "truth_head"), {"NLVR2": 86}, builds=BLIPReasoner,
              steps=5_061, lr=3e-5, max_length=64, evaluate=("statements",), **HOW)


def fine_tuned(base: Recipe, start: str, stage: Stage, image_size: int, **changes) -> Recipe:
    """One more stage on stage `start` of `base`; `changes`: fields of the stage."""
    origin, parts = f"{base.name}@{start}", ("vision", "text_encoder")
    init = (("", origin),)
    if stage.builds is BLIPReasoner:  # merge and head are new, and the second cross-attention begins as the first
        second = ((f"second.{i}", f"{origin}:text_encoder.layers.{i}.cross_attention") for i in range(base.config.text.layers))
        init = (*((part, f"{origin}:{part}") for part in parts), *second)
    return replace(base, name=f"{base.name}-{stage.name}", stages=(replace(stage, init=init, **changes),), image_size=image_size, makes={})


def captioner_and_filter(base: Recipe, start: str, image_size: int, caption: dict, retrieval: dict) -> tuple[Recipe, Recipe]:
    """The two stages of `base` under the names of their tasks, with these changes."""
    stages = (replace(base.stage("captioner"), name="caption", evaluate=("captions",), on_data={}),
              replace(base.stage("filter"), name="retrieval", evaluate=("retrieval",), on_data={}))
    return tuple(fine_tuned(base, start, stage, image_size, **changes) for stage, changes in zip(stages, (caption, retrieval)))


VIT_B, VIT_L = blip.PUBLISHED
TINY_HOW = {"batch_size": 32, "lr": 3e-4, "warmup": 0.03, "betas": (0.9, 0.98), "augment": False, "fit": "crop"}
ON_DATA = {"augment": True}
BOTH_COLOURS = {"captions": 3, "unnamed captions": 1}
RECIPES = (
    *captioner_and_filter(
        blip.TINY, "pretrain", 72,
        {"data": {"captions": 1}, "format": "blip-caption", "steps": 500, "evaluate": ("two",),
         "on_data": ON_DATA | {"evaluate": ("captions", "classes")}, **TINY_HOW},
        {"data": BOTH_COLOURS, "steps": 300, "on_data": ON_DATA, **TINY_HOW}),
    fine_tuned(blip.TINY, "pretrain", VQA, 48, data={"talk": 72, "drills": 13, "unnamed drills": 15}, steps=1000, max_length=256,
               on_data=ON_DATA, **TINY_HOW),
    fine_tuned(blip.TINY, "pretrain", NLVR2, 48, data={"statements": 1}, steps=1000, on_data=ON_DATA | {"evaluate": ("answers",)}, **TINY_HOW),
    *captioner_and_filter(VIT_B, "retrain", 384, {}, {}),
    *captioner_and_filter(VIT_L, "retrain", 384, {}, {}),
    fine_tuned(VIT_B, "retrain", VQA, 480),
    fine_tuned(VIT_B, "retrain", NLVR2, 384),
    fine_tuned(VIT_L, "retrain", NLVR2, 384),
)
