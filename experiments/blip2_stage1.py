"""Is stage 1 needed? BLIP-2's Figure 5 at tiny scale: zero-shot question answering while stage 2 learns from captions.

    with       stage 1, then N steps of stage 2
    without    N steps of stage 2, from a random Q-Former
    equal      the same, but as many more steps as stage 1 would have paid for (FLOPs of a step, as torch counts them)

    python -m experiments.blip2_stage1                       seeds 0, 1 and 7; N is 0.3 of the recipe's stage 2
    python -m experiments.blip2_stage1 --seeds 0 --steps 1   one seed, the whole stage
    python -m experiments.blip2_stage1 --table               print the stored results as Markdown

Backbones and stage 1 are those of the recipe, from the cache if they are there; a seed that is stored already is
measured anew, the others stay. Every point is the accuracy on held-out questions of all kinds and, beside it, on the
same questions with the pictures exchanged. The paper's figure has curves only, and its decoder's curve without stage 1
falls as training goes on.
"""

from dataclasses import replace

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments import seeds
from nanovlm import recipes
from nanovlm.data.source import Exam
from nanovlm.evaluate import judges
from nanovlm.evaluate.pupil import Pupil
from nanovlm.lm_loss import mean_loss
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs.run import trained_model
from nanovlm.runs.setting import Setting
from nanovlm.training import randomness
from nanovlm.training.batches import MicroBatches, Mixture, make_collate
from nanovlm.training.loop import Report, freeze
from nanovlm.training.weights import State
from nanovlm.world.ask import KINDS

RECIPE = recipes.get("blip2/tiny")
PER_KIND = 40  # questions of each kind, at every point
POINTS = 6


def flops(setting: Setting, stage: Stage) -> int:
    """Of one step's forward and backward pass."""
    model = RECIPE.build(stage)
    freeze(model, stage.trains)
    collate = make_collate(RECIPE, stage, setting.tokenizer, model.reads)
    batch = MicroBatches(Mixture(setting.source, stage, 0), stage, 0, collate)[0]
    with FlopCounterMode(display=False) as counter:
        mean_loss(model.losses(batch)).backward()
    return counter.get_total_flops()


def curve(setting: Setting, recipe: Recipe, finished: dict[str, State]) -> list[dict]:
    """Train the recipe's last stage and ask it POINTS times on the way."""
    stage, points = recipe.stages[-1], []
    exam = Exam("", setting.source.exam(PER_KIND, KINDS))
    marks = {round(stage.steps * (i + 1) / POINTS) for i in range(POINTS)}

    def ask(model: nn.Module, report: Report) -> None:
        if report.step in marks:
            with randomness.undisturbed(model):
                (judged,) = judges.measure(Pupil(model, RECIPE, stage, setting.tokenizer, seeds.CPU), exam).values()
            points.append({"step": report.step, "loss": round(report.losses["lm"], 4), **judged})
            print(f"  step {report.step}: {judged['value']:.3f} (pictures exchanged {judged['shuffled']:.3f})", flush=True)

    seeds.learn(recipe, stage, Mixture(setting.source, stage, setting.seed), setting.seed, setting.tokenizer, finished, ask)
    return points


def measure(seed: int, fraction: float) -> dict:
    setting, finished = seeds.trained_before(RECIPE.name, last=1, seed=seed)
    finished["clip"] = trained_model("clip/tiny", seed=seed)[0].state_dict()  # where stage 1 would have brought it
    first, second = RECIPE.stages
    second = replace(second, steps=round(second.steps * fraction))
    cost = [flops(setting, stage) for stage in (first, second)]
    alone = replace(second, init=(*second.init, *first.init))  # stage 1 would have brought the vision encoder
    longer = replace(alone, steps=second.steps + round(first.steps * cost[0] / cost[1]))
    curves = {}
    for name, stages in (("with", (first, second)), ("without", (alone,)), ("equal", (longer,))):
        print(f"seed {seed}, {name}: {stages[-1].steps} steps", flush=True)
        curves[name] = curve(setting, replace(RECIPE, stages=stages), finished)
    return {"stage1_steps": first.steps, "gigaflops_a_step": [c / 1e9 for c in cost], "curves": curves}


def table(result: dict) -> str:
    """Markdown: accuracy at the end of each curve, pictures exchanged in brackets."""
    lines = ["| seed | with stage 1 | without | without, equal compute |", "|---|---|---|---|"]
    for run in result["runs"]:
        ends = [run["curves"][name][-1] for name in ("with", "without", "equal")]
        lines.append(f"| {run['seed']} | " + " | ".join(f"{e['value']:.2f} ({e['shuffled']:.2f})" for e in ends) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, "blip2_stage1", RECIPE.name, measure, table, fraction=0.3)
