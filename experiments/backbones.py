"""How good are the backbones that the embedded world's recipes freeze? Each is judged by what the papers will ask of it.

    clip/tiny, nfnet-clip/tiny   pictures and captions that find each other; what a linear probe reads in its patches (encoder_probe.py)
    lm/tiny, lm/tiny-pages, lm/tiny-t5    questions about scenes that are told in words, in the forms of all six papers; pages of examples
    any other              by the exams that its stage names in `evaluate`

    python -m experiments.backbones                             all of them: from the cache, shipped, or trained now
    python -m experiments.backbones --only clip/tiny --seed 1   one of them
    python -m experiments.backbones --run runs/clip runs/lm     from runs of train_tiny.py --recipe NAME that are finished
    python -m experiments.backbones --table                     print the stored results as Markdown

What is stored already stays until the same backbone is measured anew.
"""

import argparse
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from experiments import encoder_probe
from experiments.seeds import CPU, RESULTS, machine
from nanovlm import recipes
from nanovlm.chat import load_run
from nanovlm.evaluate import judges, retrieval
from nanovlm.evaluate.pupil import Pupil
from nanovlm.runs import shipped
from nanovlm.runs.run import trained_model, versions
from nanovlm.runs.setting import world_of
from nanovlm.world import mixture, tasks
from nanovlm.world.ask import KINDS
from nanovlm.world.pages import MOST_SHOTS

PATH = RESULTS / "backbones.json"
TINY = [name for name in recipes.names() if name in recipes.BACKBONES and "/tiny" in name]
FORMS = {  # what a language model is asked about scenes that are told → its kinds, see world/exams.py
    "ten kinds of questions": KINDS,
    "answered in a word, as LLaVA-1.5 asks": tuple(f"short/{kind}" for kind in KINDS),
    "in BLIP-2's format": tuple(f"blip2/{kind}" for kind in KINDS),
    "a caption": ("caption",),
    "LLaVA-1.5's other kinds, and ScienceQA": (*mixture.KINDS, "science_text"),
    "InstructBLIP's tasks": tuple(f"task/{group}" for group in tasks.NAMES),
}
PAGES = {"after 0 or 2 examples, as Flamingo asks": ("shots/0", "shots/2"),
         f"names given on the page, 1 to {MOST_SHOTS} shots": tuple(f"names/{shots}" for shots in range(1, MOST_SHOTS + 1))}
Figures = dict[str, dict[str, float]]


def measure(name: str, seed: int) -> dict:
    """The recipe's model with this seed: from the cache, shipped (then it is known how long it took) or trained now."""
    model, tokenizer = trained_model(name, seed=seed)
    recipe = recipes.get(name)
    stage, minutes = recipe.stages[-1], None
    if seed == 0 and (file := shipped.path(name, stage.name)).exists():
        minutes = round(shipped.load(file)[1]["seconds"] / 60, 1)
    return judged(Pupil(model, recipe, stage, tokenizer, CPU), name, seed, stage.steps, minutes)


def collect(folder: Path) -> dict:
    """The model of a run, which knows how long it took."""
    pupil = load_run(folder)  # says what is wrong with a run that is not finished
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stages = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["stages"]
    learned = [one for one in stages if not one["cached"]]
    minutes = round(sum(one["seconds"] for one in learned) / 60, 1) if learned else None
    return judged(pupil, config["recipe"]["name"], config["seed"], sum(one["steps"] for one in learned or stages[-1:]), minutes)


def judged(pupil: Pupil, name: str, seed: int, steps: int, minutes: float | None) -> dict:
    world = world_of(recipes.get(name), seed)
    about = {"recipe": name, "seed": seed, "machine": machine(), "versions": versions(), "commit": commit(),
             "parameters": sum(p.numel() for p in pupil.model.parameters()), "steps": steps, "minutes": minutes}
    if pupil.model.reads.kind == "pairs":
        return {**about, "eval": retrieval.measure(pupil, world), "probe": encoder_probe.measure(pupil, seed)}
    return {**about, "eval": judges.evaluate(pupil, world)}


def commit() -> str:
    """Of the code that measures; "+" where it has been changed since."""
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True).stdout.strip()


# ---- Markdown

def table(result: dict) -> str:
    """All backbones; then what stands in patches, what is told and asked, and the figures of all others."""
    runs, models = result["runs"], [run for run in result["runs"] if by_kind(run["eval"]).keys() >= set(KINDS)]
    parts = [sizes(runs)]
    parts += [probe(run) for run in runs if "probe" in run]
    parts += [told(models), names(models)] if models else []
    parts += [others(run) for run in runs if run not in models]
    return "\n\n".join(filter(None, parts))


def markdown(rows: Iterable[Iterable[str]]) -> str:
    head, *body = map(list, rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]) if body else ""


def sizes(runs: list[dict]) -> str:
    return markdown([["backbone", "parameters", "training steps", "minutes", "seed"], *(
        [run["recipe"], f"{run['parameters']:,}", f"{run['steps']:,}", f"{run['minutes']:.0f}" if run["minutes"] else "–", str(run["seed"])]
        for run in runs)])


def probe(run: dict) -> str:
    """A row for each reading, a column for each number of scenes that the probe learned from."""
    counts = [name for name in run["probe"] if name.isdecimal()]
    most, pixels = run["probe"][counts[-1]], run["probe"]["pixels"]
    head = [f"read in patches of {run['recipe']}", *(f"{int(name):,} scenes" for name in counts), "in raw pixels", "chance", "shuffled", "n"]
    return markdown([head, *(
        [reading, *(f"{figures[reading]['value']:.3f}" for figures in (*(run["probe"][name] for name in counts), pixels)),
         f"{last['chance']:.2f}", f"{last['shuffled']:.2f}", str(last["n"])] for reading, last in most.items())])


def told(runs: list[dict]) -> str:
    """A row for each form: of each model the mean over its kinds and the worst of them. Only a decoder reads pages."""
    forms = FORMS | {"all of these": tuple(kind for kinds in FORMS.values() for kind in kinds)} | PAGES
    head = ["told in words, asked", *(f"{run['recipe']}: {what}" for run in runs for what in ("mean", "worst")), "chance", "shuffled", "n"]
    models = [by_kind(run["eval"]) for run in runs]
    return markdown([head, *([form, *form_of(kinds, models)] for form, kinds in forms.items() if any(kinds[0] in one for one in models))])


def form_of(kinds: tuple[str, ...], models: list[Figures]) -> list[str]:
    """The controls are those of the first model that was asked."""
    cells, controls = [], next(figures for figures in models if kinds[0] in figures)
    for figures in models:
        found = {kind: figures[kind]["value"] for kind in kinds if kind in figures}
        worst = min(found, key=found.get, default=None)
        cells += [f"{mean(found.values()):.3f}", f"{found[worst]:.2f} ({worst})"] if found else ["–", "–"]
    return [*cells, *(f"{mean(controls[kind][control] for kind in kinds):.2f}" for control in ("chance", "shuffled")),
            str(sum(controls[kind]["n"] for kind in kinds))]


def names(runs: list[dict]) -> str:
    """Recall of a made-up name by how many things were shown with theirs; before any was shown it can only be guessed."""
    shots = range(MOST_SHOTS + 1)
    rows = [(run["recipe"], key, by_kind(run["eval"])) for run in runs for key in ("value", "shuffled")]
    return markdown([["names, shots", *map(str, shots)], *(
        [recipe if key == "value" else f"{recipe}, {key}", *(f"{figures[f'names/{n}'][key]:.2f}" for n in shots)]
        for recipe, key, figures in rows if "names/0" in figures)])


def others(run: dict) -> str:
    """Of a backbone that is no language model: what else it was asked."""
    return markdown([[f"{run['recipe']}, held-out", "right", "chance", "shuffled", "n"], *(
        [name, *(f"{figure[key]:.2f}" for key in ("value", "chance", "shuffled")), str(figure["n"])] for name, figure in run["eval"].items())])


def by_kind(figures: Figures) -> Figures:
    """"vqa_accuracy/short/colour" → "short/colour"."""
    return {name.partition("/")[2]: figure for name, figure in figures.items() if "/" in name}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=TINY, choices=TINY, metavar="NAME", help=f"of {', '.join(TINY)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, nargs="+", metavar="FOLDER", help="finished runs, in their place")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    for one in [] if args.table else args.run or args.only:
        new = collect(one) if isinstance(one, Path) else measure(one, args.seed)
        runs = json.loads(PATH.read_text(encoding="utf-8"))["runs"] if PATH.exists() else []
        runs = sorted([run for run in runs if run["recipe"] != new["recipe"]] + [new], key=lambda run: TINY.index(run["recipe"]))
        PATH.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(PATH.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
