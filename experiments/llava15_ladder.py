"""What made LLaVA-1.5 of LLaVA, step by step: Table 2 of the paper at tiny scale.

    linear          one map; half of the talk in sentences, half in short answers, and nothing says which is wanted
    format prompt   "Answer the question using a single word or phrase." behind the questions with short answers
    MLP             two maps
    short VQA       four times as many short answers as sentences; letters and captions on demand
    regions         boxes → phrases and phrases → boxes
    resolution      tiles: 88 image tokens of five views instead of 16 of one
    tiles alone     the last without the whole picture (§4.2), which is the end of no ladder

    python -m experiments.llava15_ladder               seeds 0, 1 and 7
    python -m experiments.llava15_ladder --table       print the stored results as Markdown

Every rung has what the rungs before it have. All see the same world, pictures of 96 × 96 with numbers in small print, shrunk to 48
but for tiles; image encoder and language model are those of llava15/tiny with seed 0 (so the seeds here are those of stage 1 and 2),
steps are the same. The language model has read of letters, boxes and the sentence before; its own knowledge of them is where every rung
begins. Judged on held-out scenes, asked with the sentences of the mixture; `sentences`: how many answers are one where none is asked
for, `words`: how many are not one where a word is.
"""

from dataclasses import replace

from torch import nn

from experiments import seeds
from nanovlm import metrics, recipes
from nanovlm.data.prompts import SHORT
from nanovlm.evaluate import judges
from nanovlm.evaluate.pupil import Pupil
from nanovlm.papers.llava import LLaVAConfig
from nanovlm.recipes.llava15 import MIXTURE
from nanovlm.recipes.stage import Diet, Recipe
from nanovlm.runs.setting import world_of
from nanovlm.tiling import hd_tiling
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import Mixture
from nanovlm.world.ask import KINDS

NAME, TINY = "llava15_ladder", recipes.get("llava15/tiny")
STEPS = 2400  # of stage 2 where the fraction is 1; stage 1 is always whole
BASE = replace(TINY, world={"size": 96, "small_print": True}, stages=(
    replace(TINY.stages[0], sizes={"tiling": None}), replace(TINY.stages[1], steps=STEPS)))
HALF = {"drills": 19, "unnamed drills": 15, "sentences": 33}
PROMPT = HALF | {"short": 33}
MORE = {name: weight for name, weight in MIXTURE.items() if name not in ("regions", "grounding", "box drills")}
ONE, TWO = (replace(TINY.config, projector_layers=layers) for layers in (1, 2))
TILED = replace(TWO, tiling=hd_tiling(48))
RUNGS = {  # name → model, data of stage 2
    "linear": (ONE, HALF | {"talk": 33}), "format prompt": (ONE, PROMPT), "MLP": (TWO, PROMPT), "short VQA": (TWO, MORE),
    "regions": (TWO, MIXTURE), "resolution": (TILED, MIXTURE),
    "tiles alone": (replace(TILED, tiling=replace(TILED.tiling, whole="none")), MIXTURE)}
NEW = ("option", "region", "grounding")  # kinds
PER_KIND = 100


def recipe_of(config: LLaVAConfig, data: Diet, fraction: float) -> Recipe:
    """Lessons are about what the rung's data are about."""
    align, tune = BASE.stages
    trains = (*tune.trains, "tiles") if config.tiling else tune.trains
    lessons = tuple((end, {name: weight for name, weight in lists.items() if name in data}) for end, lists in tune.lessons)
    tune = replace(tune, steps=round(tune.steps * fraction), trains=trains, data=data, lessons=lessons)
    return replace(BASE, config=config, stages=(align, tune))


def judged(model: nn.Module, recipe: Recipe, tokenizer: Tokenizer) -> dict:
    world, pupil = world_of(recipe, 0), Pupil(model, recipe, recipe.stages[-1], tokenizer, seeds.CPU)
    marks = {exam.name: of_kind for exam in world.exams(("mixture",), PER_KIND) if exam.name in KINDS + NEW
             for of_kind in judges.marks(pupil, exam).values()}
    marks["short"] = [mark for kind in KINDS for mark in marks[kind]]
    found = {kind: {k: round(v, 4) for k, v in judges.mean(of_kind).items()} for kind, of_kind in marks.items()}
    asked = world.exam(PER_KIND, ("colour", "count", "position"), "mixture")
    plain = [replace(s, turns=(replace(s.turns[0], question=s.turns[0].question.removesuffix(f"\n{SHORT}")),)) for s in asked]
    said = [[metrics.is_sentence(text) for text in pupil.answer(samples)] for samples in (asked, plain)]
    found |= {"words": 1 - sum(said[0]) / len(asked), "sentences": sum(said[1]) / len(plain)}
    print("  " + ", ".join(f"{name} {row['value'] if isinstance(row, dict) else row:.2f}" for name, row in found.items()), flush=True)
    return found


def measure(seed: int, fraction: float) -> dict:
    """Every rung is trained after the same backbones."""
    setting, before = seeds.trained_before(TINY.name, last=2, seed=0)
    rungs = {}
    for rung, (config, data) in RUNGS.items():
        recipe = recipe_of(config, data, fraction)
        world = world_of(recipe, seed)
        print(f"seed {seed}, {rung}", flush=True)
        align, tune = recipe.stages
        aligned = seeds.learn(recipe, align, Mixture(world, align, seed), seed, setting.tokenizer, before).state_dict()
        model = seeds.learn(recipe, tune, Mixture(world, tune, seed), seed, setting.tokenizer, before | {align.name: aligned})
        rungs[rung] = judged(model, recipe, setting.tokenizer)
    return {"steps": tune.steps, "rungs": rungs}


def table(result: dict, kinds: tuple[str, ...] = ("short", *NEW, "relation", "reading"),
          forms: tuple[str, ...] = ("words", "sentences")) -> str:
    """Markdown: the mean over the seeds; from the lowest to the highest in brackets, where there are several."""
    head = ("rung", *kinds, *forms)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rung in result["runs"][0]["rungs"]:
        runs = [run["rungs"][rung] for run in result["runs"]]
        columns = [[run[name]["value"] for run in runs] for name in kinds] + [[run[name] for run in runs] for name in forms]
        lines.append(f"| {rung} | " + " | ".join(f"{sum(c) / len(c):.2f}" + f" ({min(c):.2f}–{max(c):.2f})" * (len(c) > 1) for c in columns) + " |")
    blind = [rung["short"]["shuffled"] for run in result["runs"] for rung in run["rungs"].values()]
    lines.append(f"\nWith the pictures exchanged, `short` is {min(blind):.2f} to {max(blind):.2f}.")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, NAME, TINY.name, measure, table, fraction=0.4)
