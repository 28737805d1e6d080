"""Does InstructBLIP follow instructions about real pictures, and a form of question that it was not tuned for?

    held in     names      captioning: the name of an emoji
                questions  image QA: to which group it belongs, a word that goes with it (any of about six counts), or who drew it
                asking     question generation: the same the other way round, half as often as its size would have it
                garments   image QA: which piece of clothing is it?
    held out    clothes    classification as a whole group: which of ten classes, the likeliest of them

New in *clothes* is the form, with options and a class to be chosen; the classes themselves *garments* has named. And what is asked in
*asking* can be told from the answer: a group, a keyword and an artist are not alike.

    python -m experiments.instructblip_mixture --data ../shared/data                trains instructblip/tiny, all stages, then asks
    python -m experiments.instructblip_mixture --data ../shared/data --steps 0.03   a look at how it works
    python -m experiments.instructblip_mixture --table                              print what is stored

Sets are drawn by the roots of their sizes; the language model and the eyes are trained on the held-in sets only. Shortened runs are not stored.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from experiments.seeds import RESULTS, asked, machine
from nanovlm.evaluate.judges import evaluate
from nanovlm.runs.run import Options, versions
from nanovlm.runs.setting import read_source

RECIPE = "instructblip/tiny"
QUESTIONS = (("Which group does it belong to?", "group"), ("Which word goes with it?", "keywords"), ("Which artist drew it?", "artist"))


def write_mixture(data: Path, folder: Path) -> Path:
    """The mixture, its paths relative to the folder that it is written into; and a table of questions, one for each emoji by turns."""
    emoji, clothes = (os.path.relpath(data / name, folder) for name in ("emoji", "clothes"))
    rows = [json.loads(line) for line in (data / "emoji" / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = []
    for i, row in enumerate(rows):
        question, field = QUESTIONS[i // len(QUESTIONS) % len(QUESTIONS)]  # three artists have drawn the same thing, one after the other
        asked.append({"image": f"{emoji}/{row['image']}", "question": question, "answer": row[field], "split": row["split"]})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    sets = {
        "names": {"data": f"{emoji}/captions.jsonl", "group": "captioning"},
        "questions": {"data": "questions.jsonl", "group": "image QA"},
        "asking": {"data": "questions.jsonl", "group": "question generation", "factor": 0.5},
        "garments": {"data": f"{clothes}/captions.jsonl", "group": "image QA", "question": "Which piece of clothing is it?", "answer": "label"},
        "clothes": {"data": f"{clothes}/captions.jsonl", "group": "classification", "question": "What class of clothing is this?", "held_out": True}}
    path = folder / "real pictures.json"
    path.write_text(json.dumps({"mixture": sets, "sampling": "sqrt"}), encoding="utf-8")
    return path


def table(result: dict) -> str:
    """Markdown: a row for each set, its figures of each seed side by side."""
    rows = [["set", "right", "always the same", "pictures exchanged", "n"], ["---"] * 5]
    for name in result["runs"][0]["eval"]:
        figures = [run["eval"][name] for run in result["runs"]]
        rows.append([name.removeprefix("vqa_accuracy/"), *(" / ".join(f"{one[key]:.2f}" for one in figures) for key in ("value", "chance", "shuffled")),
                     str(figures[0]["n"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    path = RESULTS / "instructblip_mixture.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder with emoji and clothes (default: %(default)s)")
    parser.add_argument("--run", type=Path, help="where the run is, or is to be made (default: a folder that is deleted)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, help="of each stage, as train_tiny.py takes it (default: all)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as scratch:
            mixture = write_mixture(args.data.resolve(), Path(scratch).resolve())
            pupil = asked(args.run or Path(scratch) / "run", RECIPE, Options(data=str(mixture), seed=args.seed, steps=args.steps))
            figures = evaluate(pupil, read_source(pupil.recipe, str(mixture), "error", args.seed))
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        new = {"seed": args.seed, "steps": args.steps, "machine": machine(), "eval": figures}
        result = {"recipe": RECIPE, "data": "emoji and clothes", "versions": versions(),
                  "runs": sorted([one for one in runs if one["seed"] != args.seed] + [new], key=lambda one: one["seed"])}
        if args.steps is not None:
            print(table({"runs": [new]}))
            return
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
