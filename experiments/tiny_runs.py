"""What the tiny recipes reach: runs of three seeds, judged on held-out data, and the tables of experiments/README.md.

    python -m experiments.tiny_runs                                  llava/tiny on the embedded world, seeds 0, 1 and 7
    python -m experiments.tiny_runs --data ../shared/data/clothes    on a person's own pictures
    python -m experiments.tiny_runs --collect runs/a runs/b          from runs that are finished: no training; other seeds stay as they are stored
    python -m experiments.tiny_runs --table                          print the stored results as Markdown
    python -m experiments.tiny_runs --summary                        the most telling figure of each, as the project's README has them

Each run is `train_tiny.py --no-cache`: on the shipped backbones, and nothing else is left from before; what a run did not train itself
its last row names. Each figure stands beside its two
controls (evaluate/): chance, the most common answer; shuffled, the same questions with the pictures permuted.
"""

import argparse
import json
import tempfile
from pathlib import Path

from experiments.seeds import RESULTS, machine
from nanovlm.runs.run import Options, run

SUMMARY = (  # stored result, metric, what is asked
    ("llava_tiny_scenes", "vqa_accuracy", "ten kinds of questions"),
    ("llava_tiny_scenes", "caption_exact", "a caption with every fact of the scene"),
    ("llava15_tiny_scenes", "vqa_accuracy", "the ten kinds, and letters, regions, boxes"),
    ("llava15_tiny-hd_scenes", "vqa_accuracy/reading", "a number of two digits in small print"),
    ("blip_tiny_scenes", "i2t_r1", "which of 500 texts belongs to the picture, learned from noisy texts"),
    ("blip_tiny_scenes", "caption_exact", "a caption with every fact of two objects, learned from noisy texts"),
    ("blip_tiny_scenes", "filter/swapped/recall", "captions of other pictures: how many the filter finds"),
    ("flamingo_tiny_scenes", "fewshot_accuracy/4", "a made-up name, after four pictures with their names (at best 0.68)"),
    ("flamingo_tiny_scenes", "fewshot_accuracy/8", "the same after eight (at best 0.90)"),
    ("flamingo_tiny_scenes", "vqa_accuracy/direction", "which way something moves in a clip of eight frames"),
    ("blip2_tiny_scenes", "i2t_r1", "which of 500 texts belongs to the picture"),
    ("blip2_tiny_scenes", "vqa_accuracy", "ten kinds of questions, after captions only"),
    ("blip2_tiny_scenes", "caption_exact", "a caption with every fact of two objects"),
    ("instructblip_tiny_scenes", "vqa_accuracy/held_in", "the groups of tasks that it learned from"),
    ("instructblip_tiny_scenes", "vqa_accuracy/held_out", "groups of tasks that it never learned from"),
    ("llava_tiny_clothes", "vqa_accuracy/class", "photos: which of ten kinds of clothes"),
    ("blip2_tiny_emoji", "i2t_r10/itc", "emoji never seen: the right name among the first ten of 150"),
)


def measure(recipe: str, data: str | None, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        return kept(run(recipe, Options(data=data, seed=seed, cache=False, out=str(Path(scratch) / "run"))))


def kept(summary: dict) -> dict:
    """Of a summary.json what is stored here; a run that took a backbone from the cache says so beside its time."""
    stages = {stage["name"]: stage["seconds"] for stage in summary["stages"]}
    cached = [stage["name"] for stage in summary["stages"] if stage["cached"] and not stage.get("shipped")]
    shipped = [stage["name"] for stage in summary["stages"] if stage.get("shipped")]
    return {"seed": summary["seed"], "seconds": summary["seconds"], "stages": stages, **({"cached": cached} if cached else {}), **({"shipped": shipped} if shipped else {}),
            "eval": summary["eval"], "notes": summary["notes"], "versions": summary["versions"]}


def table(result: dict) -> str:
    """Markdown: a row for each metric, a column for each seed; chance and shuffled are means over the seeds."""
    runs = result["runs"]
    rows = [["held-out", *(f"seed {one['seed']}" for one in runs), "chance", "shuffled", "n"], ["---"] * (len(runs) + 4)]
    for name, first in runs[0]["eval"].items():
        judged = [one["eval"][name] for one in runs]
        controls = [sum(j[control] for j in judged) / len(judged) for control in ("chance", "shuffled")]
        rows.append([name, *(f"{value:.2f}" for value in (*(j["value"] for j in judged), *controls)), str(first["n"])])
    taken = [f"{', '.join(sorted({name for one in runs for name in one.get(where, ())}))} {said}" for where, said in
             (("shipped", "shipped"), ("cached", "from the cache")) if any(one.get(where) for one in runs)]
    rows.append([f"seconds, {', '.join(taken)}" if taken else "seconds, cold", *(f"{one['seconds']:.0f}" for one in runs), "", "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary() -> str:
    """Markdown: one figure in each row, the mean over the seeds, beside its controls; no row where no result is stored."""
    rows = [["recipe", "asked of held-out pictures", "right", "chance", "shuffled", "seeds"], ["---"] * 6]
    for name, metric, asked in SUMMARY:
        if not (path := RESULTS / f"{name}.json").is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        judged = [one["eval"][metric] for one in result["runs"]]
        means = [sum(j[key] for j in judged) / len(judged) for key in ("value", "chance", "shuffled")]
        rows.append([f"`{result['recipe']}`", asked, *(f"{mean:.2f}" for mean in means), ", ".join(str(one["seed"]) for one in result["runs"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llava/tiny")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 7])
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        print(summary())
        return
    name = "_".join([*args.recipe.split("/"), Path(args.data).stem if args.data else "scenes"])
    path = RESULTS / f"{name}.json"
    if not args.table:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        for one in args.collect or args.seeds:
            new = kept(json.loads((one / "summary.json").read_text(encoding="utf-8"))) if isinstance(one, Path) else measure(args.recipe, args.data, one)
            runs = sorted([run for run in runs if run["seed"] != new["seed"]] + [new], key=lambda run: run["seed"])
            result = {"recipe": args.recipe, "data": Path(args.data).stem if args.data else "scenes", "machine": machine(), "runs": runs}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
