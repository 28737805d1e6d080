"""InstructBLIP's recipes: one stage of instruction tuning behind BLIP-2's two, on sets that are drawn by the roots of their sizes.

                 vision (frozen)        Q-Former               LM (frozen)          begins with
    tiny         clip/tiny, 17 tokens   4 × 64, 16 queries     lm/tiny              blip2/tiny, both stages
    small        clip/small, 197        6 × 384, 32            lm/small             blip2/small, both stages
    flan-t5-xl   EVA-CLIP g/14, 257     BERT-base, 32          FlanT5-XL            published BLIP-2
    vicuna-7b    the same               the same               Vicuna-7B            published stage 1, a stage 2 of its own

What scale changes: sizes, steps, batches. What it does not: what learns, and how the sets are balanced. Hyper-parameters: §2.6.

    p_d = √S_d / Σ √S                                                                            (§2.4)

               size       proportional   √        uniform          by size the largest is nearly all; by turns the smallest are
    captions   32,000     0.48           0.27     0.14             memorised
    knowledge   1,000     0.01           0.05     0.14
"""

from dataclasses import replace

from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.recipes import blip2
from nanovlm.recipes.stage import Diet, Recipe, Stage

SAMPLING = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}  # the power of a set's size


def balanced(sizes: dict[str, float], by: str = "sqrt", factors: dict[str, float] | None = None) -> Diet:
    """How often each set is drawn, 1 in sum. factors: by hand on top, as the paper does it for two sets and does not say how much (§2.4)."""
    weights = {name: size ** SAMPLING[by] * (factors or {}).get(name, 1.0) for name, size in sizes.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


TINY_SIZES = {"tasks/captions": 32_000, "tasks/signs": 2_000, "tasks/questions": 16_000, "tasks/knowledge": 1_000, "tasks/reading": 8_000,
              "tasks/asking": 4_000, "tasks/llava": 4_000}

TINY = Recipe(
    "instructblip/tiny", InstructBLIP, replace(blip2.TINY.config, asks=True), image_size=48, vocab=blip2.TINY.vocab,
    stages=(
        Stage("tune", blip2.BRIDGE_2, balanced(TINY_SIZES), format="instructblip", steps=5000, batch_size=16, lr=1e-3, weight_decay=0.05,
              max_length=256, evaluate=("tasks",), init=(("qformer", "blip2/tiny@stage1:qformer"), ("", "blip2/tiny")),
              on_data={"augment": True, "steps": 2000}),))

RECIPES = (TINY,)
