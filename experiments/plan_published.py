"""What every stage of every published recipe would need: `python -m nanovlm.plan`, stored.

    python -m experiments.plan_published                             8 GPUs of 80 GiB; some minutes on two cores
    python -m experiments.plan_published --recipe blip/vit-b         of one recipe anew; the others' plans stay
    python -m experiments.plan_published --table                     print what is stored
    python -m experiments.plan_published --summary                   of it what the README shows
"""

import argparse
import json

from experiments.seeds import RESULTS
from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.plan.__main__ import published
from nanovlm.plan.stages import GIB, Machine, plan
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs.run import versions

PATH = RESULTS / "plan_published.json"
NAMES = [recipe.name for recipe in published()]
SHOWN = ("llava/7b", "llava15/7b", "llava15/13b", "blip/vit-b", "blip2/vit-g-opt-2.7b", "blip2/vit-g-flan-t5-xxl", "instructblip/vicuna-7b",
         "flamingo/3b", "flamingo/9b", "flamingo/80b")
HEAD = ["recipe", "stage", "parameters", "learn", "batch", "micro-batch", "accumulated", "GiB, sharded", "GiB, DDP", "FLOPs a step", "hours"]


def measure(recipe: Recipe, stage: Stage, machine: Machine) -> dict:
    """Plain values of a plan; `needed` is the largest rank's peak, `whole` what DDP keeps before the first activation."""
    found = plan(recipe, stage, machine)
    count, learned = map(sum, zip(*found.parts.values()))
    return {"parameters": count, "learned": learned, "micro": found.micro, "accumulate": found.accumulate, "bytes": found.bytes,
            "needed": found.needed, "whole": found.whole, "fits": found.fits, "flops": found.flops, "hours": round(found.hours, 3)}


def row(run: dict) -> list[str]:
    first = [f"`{run['recipe']}`", run["stage"]]
    if "error" in run:
        return [*first, *[""] * (len(HEAD) - 3), run["error"]]
    return [*first, *(f"{run[kind] / 1e6:,.0f} M" for kind in ("parameters", "learned")), f"{run['batch']:,}", f"{run['micro']}", f"{run['accumulate']}",
            f"{run['needed'] / GIB:.1f}{'' if run['fits'] else ', does not fit'}", f"{run['whole'] / GIB:.1f}", f"{run['flops']:.2e}",
            f"{run['hours']:,.1f}"]


def table(result: dict, names: tuple[str, ...] = ()) -> str:
    runs = [run for run in result["runs"] if not names or run["recipe"] in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *map(row, runs)])


def summary() -> str:
    """The lines of the README."""
    return table(stored(), SHOWN)


def stored() -> dict:
    return json.loads(PATH.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="which (default: all)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    parser.add_argument("--summary", action="store_true", help="print the README's lines of it")
    args = parser.parse_args()
    machine, runs = Machine(), []
    for recipe in [] if args.table or args.summary else map(recipes.get, args.recipe):
        for stage in recipe.stages:
            said = {"recipe": recipe.name, "stage": stage.name, "batch": stage.batch_size, "steps": stage.steps}
            try:
                runs.append(said | measure(recipe, stage, machine))
            except UserError as error:
                runs.append(said | {"error": f"{error}"})
            print(" ".join(row(runs[-1])), flush=True)
    if runs:
        others = [run for run in stored()["runs"] if run["recipe"] not in args.recipe] if PATH.exists() else []
        result = {"gpus": machine.gpus, "memory": machine.memory, "mfu": machine.mfu, "peak": machine.peak, "versions": versions(),
                  "runs": sorted(others + runs, key=lambda run: NAMES.index(run["recipe"]))}
        PATH.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(summary() if args.summary else table(stored()))


if __name__ == "__main__":
    main()
