"""Do tiles see more than one small picture, after the same steps? Three times llava15/tiny-hd, from the same model and on the same samples.

    the whole       the picture of 96 × 96 shrunk to 48: 16 image tokens
    tiles alone     cut into tiles of 48: 72
    with tiles      both: 88, as the recipe has it

    python -m experiments.llava15_tiles               seeds 0, 1 and 7
    python -m experiments.llava15_tiles --table       print the stored results as Markdown

A tile is a quarter of the picture, so what is in two places ("on which side", "how many", "which is larger") is seen across a seam.
The three are stored as rungs, in the ladder's form.
"""

from dataclasses import replace

from experiments import llava15_ladder, seeds
from nanovlm import recipes
from nanovlm.runs.run import trained_model
from nanovlm.tiling import hd_tiling
from nanovlm.training.batches import Mixture

NAME, HD = "llava15_tiles", recipes.get("llava15/tiny-hd")
TILINGS = {"the whole": None, "tiles alone": replace(hd_tiling(48), whole="none"), "with tiles": HD.config.tiling}
SEAM = ("relation", "count", "comparison")


def measure(seed: int, fraction: float) -> dict:
    setting, before = seeds.trained_before(HD.name, last=1, seed=seed)
    rungs = {}
    for name, tiling in TILINGS.items():
        stage = replace(HD.stages[0], steps=round(HD.stages[0].steps * fraction))
        if not tiling:
            stage = replace(stage, trains=tuple(part for part in stage.trains if part != "tiles"))
        recipe = replace(HD, config=replace(HD.config, tiling=tiling), stages=(stage,))
        print(f"seed {seed}, {name}", flush=True)
        if recipe == HD:
            model, _ = trained_model(HD.name, seed=seed)  # maybe train_tiny.py has left it in the cache
        else:
            model = seeds.learn(recipe, stage, Mixture(setting.source, stage, seed), seed, setting.tokenizer, before)
        rungs[name] = llava15_ladder.judged(model, recipe, setting.tokenizer)
    return {"steps": stage.steps, "rungs": rungs}


def table(result: dict) -> str:
    return llava15_ladder.table(result, ("short", "reading", *SEAM), ())


if __name__ == "__main__":
    seeds.main(__doc__, NAME, HD.name, measure, table, fraction=1.0)
