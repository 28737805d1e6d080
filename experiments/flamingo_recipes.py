"""Real pages: does Flamingo learn from documents in which text and photos alternate, and do the photos help?

    python -m experiments.flamingo_recipes --data ../shared/data/recipes                trains, then measures
    python -m experiments.flamingo_recipes --data ../shared/data/recipes --run FOLDER   measures a finished run, or makes it there
    python -m experiments.flamingo_recipes --table                                      print what is stored

Figures: nats for each token of the held-out pages (windows of as many tokens as in training). "bare": the frozen language model, which the run trained
on the same texts, before the gates open; "exchanged": every photo in another one's place; "blank": no photos.
"""

import argparse
import json
import tempfile
from pathlib import Path
from random import Random

import torch

from experiments.seeds import RESULTS, asked, machine
from nanovlm.contract import Batch
from nanovlm.data import formats
from nanovlm.evaluate.pupil import Pupil
from nanovlm.runs.run import Options, versions

NAME = "flamingo_recipes"
WINDOWS = 8  # of each held-out page


def held_out(pupil: Pupil, data: Path) -> Batch:
    source = formats.read(data)
    pages = [source.sample("pages", "val", i) for i in range(source.size("pages", "val"))]
    pages = [page for page in pages if page.images]
    return pupil.collate.pages(pages * WINDOWS, Random(0)) | {"backwards": torch.zeros(len(pages) * WINDOWS, dtype=torch.bool)}


@torch.no_grad()
def loss(pupil: Pupil, batch: Batch) -> float:
    total, count = pupil.model.losses(batch)["lm"]
    return (total / count).item()


def measure(pupil: Pupil, batch: Batch) -> dict[str, float]:
    exchanged = batch | {name: batch[name].roll(1, dims=0) for name in ("images", "frames")}
    found = {"trained": loss(pupil, batch), "exchanged": loss(pupil, exchanged), "blank": loss(pupil, batch | {"images": batch["images"] * 0})}
    with torch.no_grad():
        for block in pupil.model.gated_xattn.values():
            block.attention_gate.zero_()
            block.dense_gate.zero_()
    return {"bare": loss(pupil, batch), **found}


def table(result: dict) -> str:
    rows = [["nats for each token of held-out pages", *result["losses"]], ["---"] * (1 + len(result["losses"])),
            [f"recipes, {result['windows']} windows", *(f"{value:.3f}" for value in result["losses"].values())]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    path = RESULTS / f"{NAME}.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder recipes")
    parser.add_argument("--run", type=Path, help="where the run is, or is to be made (default: a folder that is deleted)")
    parser.add_argument("--steps", type=float, help="of each stage, as train_tiny.py takes it (default: all)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as scratch:
            out = args.run or Path(scratch) / "run"
            pupil = asked(out, "flamingo/tiny", Options(data=str(args.data), steps=args.steps))
        batch = held_out(pupil, args.data)
        result = {"recipe": "flamingo/tiny", "data": "recipes", "steps": args.steps, "machine": machine(), "versions": versions(),
                  "windows": len(batch["input_ids"]), "losses": measure(pupil, batch)}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
