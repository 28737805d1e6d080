"""Does BLIP's filter find the wrong captions of a person's own pictures? Noise is put in on purpose, so that the answer is known.

    emoji: 1,412 things, each drawn by three artists, and 150 more that are held out
      ├─ a tenth of the 1,412: human.jsonl, right captions                          ─► fine-tunes captioner and filter
      └─ the others: web/captions.jsonl, three captions in ten exchanged            ─► pre-trains BLIP, and is filtered

    python -m experiments.capfilt_emoji --data ../shared/data/emoji                  everything, in a folder that is thrown away
    python -m experiments.capfilt_emoji --data ../shared/data/emoji --work FOLDER    the same, kept; goes on with what is there
    python -m experiments.capfilt_emoji --table                                      print what is stored

Measured: ROC AUC against the hidden labels, of the filter's P(belongs), of the same before fine-tuning, and of cosines, CLIP's too;
with the middle 95 % of 1,000 bootstrap resamples. The pictures of held-out things were in no training: three in ten get exchanged captions.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch

from experiments.seeds import CPU, RESULTS, machine
from nanovlm import plots, recipes
from nanovlm.data import formats
from nanovlm.data.records import Records
from nanovlm.data.sample import Sample
from nanovlm.evaluate.filtering import figures_of
from nanovlm.evaluate.pupil import Pupil, chunks
from nanovlm.making import bootstrap
from nanovlm.making.capfilt import capfilt
from nanovlm.metrics import roc_auc
from nanovlm.runs import checkpoint
from nanovlm.runs.folder import is_run
from nanovlm.runs.run import Options, run, versions
from nanovlm.runs.tuned import CLEANED
from nanovlm.tokenizer import Tokenizer

NOISE, HUMAN = 0.3, 0.1
RESAMPLES = 1000


def measure(data: Path, work: Path, seed: int, steps: float) -> tuple[dict, dict]:
    """(figures, blocks for the picture); what `work` holds already is not made again."""
    wrong = make(data, work, seed)
    web, human, begun, clean = work / "web", work / "human.jsonl", work / "run", work / "clean"
    if not (begun / "summary.json").exists():
        run("blip/tiny", Options(data=str(web), out=str(begun), seed=seed, steps=steps, resume=is_run(begun)))
    if not (clean / "captions.jsonl").exists():
        capfilt(begun, str(human), 1, Options(data=str(web), out=str(clean), seed=seed, resume=is_run(clean, CLEANED)))
    read = formats.read(web, cache_side=recipes.shorter_side("blip/tiny") * 4 // 3)
    samples, held = shown(read, "train"), shown(read, "val")
    rng = Random(seed)
    swapped = rng.sample(range(len(held)), round(NOISE * len(held)))
    for i, caption in zip(swapped, exchange([held[i].caption for i in swapped], rng)):
        held[i] = Sample(held[i].id, held[i].images, caption)
    held_wrong = [i in set(swapped) for i in range(len(held))]
    figures, after = {}, []
    for name, stage, folder in (("the filter", "filter", clean), ("BLIP before fine-tuning", "pretrain", begun), ("CLIP, its encoder", "clip", begun)):
        pupil = opened(folder, stage, begun)
        for where, those, labels in (("web", samples, wrong), ("held out", held, held_wrong)):
            scores = {"P(belongs)": pupil.belongs} if hasattr(pupil.model, "match") else {}
            for score, judge in (scores | {"cosine": partial(cosines, pupil)}).items():
                believed = judge(those)
                figures[f"{where}: {name}, {score}"] = auc(believed, labels, seed)
                after = after or believed
    told = [text.belongs for text in bootstrap.read(clean / "texts.jsonl") if text.source == "web"]
    assert max(abs(a - b) for a, b in zip(told, after, strict=True)) < 1e-3, "the command has judged the same"
    texts = bootstrap.read(clean / "texts.jsonl")
    counted = {source: {"n": len(own), "dropped": sum(not text.kept for text in own)} for source in bootstrap.SOURCES
               if (own := [text for text in texts if text.source == source])}
    return {"auc": figures, "at one half": figures_of(after, wrong), "texts": counted}, blocks(samples, after, wrong)


def shown(records: Records, split: str) -> list[Sample]:
    return [records.sample("pairs", split, i) for i in range(records.size("pairs", split))]


def opened(folder: Path, stage: str, begun: Path) -> Pupil:
    recipe = recipes.get("clip/tiny" if stage == "clip" else "blip/tiny")
    model = recipe.build(recipe.stage(stage))
    model.load_state_dict(checkpoint.load(folder / f"{stage}.pt"))
    return Pupil(model, recipe, recipe.stage(stage), Tokenizer.from_dict(checkpoint.load(begun / "last.pt")["tokenizer"]), CPU)


@torch.no_grad()
def cosines(pupil: Pupil, samples: Sequence[Sample]) -> list[float]:
    """Of each picture with its own caption: what ITC alone thinks."""
    found = []
    for chunk in chunks(samples):
        batch = pupil.collate.images(chunk) | pupil.collate.texts([sample.caption for sample in chunk])
        found += pupil.model.score(batch["images"], batch["input_ids"], batch["attention_mask"]).diagonal().tolist()
    return found


def auc(believed: Sequence[float], wrong: Sequence[bool], seed: int) -> dict:
    """How often a wrong caption is believed less than a right one; middle 95 % of the resamples."""
    draws, scores, labels = np.random.default_rng(seed), np.array(believed), np.array(wrong)
    again = [roc_auc((-scores[some]).tolist(), labels[some].tolist()) for some in draws.integers(len(labels), size=(RESAMPLES, len(labels)))]
    low, high = np.quantile(again, (0.025, 0.975))
    return {"value": roc_auc((-scores).tolist(), labels.tolist()), "low": float(low), "high": float(high), "n": len(labels), "wrong": int(labels.sum())}


def blocks(samples: Sequence[Sample], believed: Sequence[float], wrong: Sequence[bool]) -> dict:
    """Four texts of each kind, drawn by chance, as plots.save_verdicts wants them."""
    rng, found = Random(0), {}
    for title, dropped, exchanged in (("dropped, and the caption was exchanged", True, True), ("dropped, though it was right", True, False),
                                      ("kept, though it was exchanged", False, True)):
        those = [i for i, belief in enumerate(believed) if (belief < 0.5) == dropped and wrong[i] == exchanged]
        found[f"{title}: {len(those):,}"] = [(samples[i].images[0], [(f"{samples[i].caption} ({believed[i]:.2f})", not dropped)])
                                             for i in rng.sample(those, min(4, len(those)))]
    return {title: cells for title, cells in found.items() if cells}


# --- the two sets ---

def make(data: Path, folder: Path, seed: int) -> list[bool]:
    """Write `folder`/web/captions.jsonl and `folder`/human.jsonl; whether each caption that is trained on was exchanged."""
    rows = [json.loads(line) for line in (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"image": str((data / row["image"]).resolve()), "caption": row["caption"], "split": row["split"]} for row in rows]
    rng = Random(seed)
    train = [row for row in rows if row["split"] == "train"]
    names = sorted({row["caption"] for row in train})
    clean = set(rng.sample(names, round(HUMAN * len(names))))
    web = [row for row in rows if row["caption"] not in clean]
    pool = [i for i, row in enumerate(web) if row["split"] == "train"]
    wrong = rng.sample(pool, round(NOISE * len(pool)))
    swapped = exchange([web[i]["caption"] for i in wrong], rng)
    for i, caption in zip(wrong, swapped):
        web[i] = web[i] | {"caption": caption}
    (folder / "web").mkdir(parents=True, exist_ok=True)
    write_lines(folder / "web/captions.jsonl", web)
    write_lines(folder / "human.jsonl", [row for row in train if row["caption"] in clean])
    return [i in set(wrong) for i in pool]


def exchange(captions: list[str], rng: Random) -> list[str]:
    """The same captions in another order, in which none stands where it stood."""
    moved = captions[:]
    while any(a == b for a, b in zip(captions, moved)):
        rng.shuffle(moved)
    return moved


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- what is stored ---

def table(result: dict) -> str:
    """Markdown: a row for each score, a column for each seed."""
    rows = [["AUC", *(f"seed {one['seed']}" for one in result["runs"]), "captions", "exchanged"]]
    rows.append(["---"] * len(rows[0]))
    for name, first in result["runs"][0]["auc"].items():
        cells = [f"{one['auc'][name]['value']:.3f} ({one['auc'][name]['low']:.3f} to {one['auc'][name]['high']:.3f})" for one in result["runs"]]
        rows.append([name, *cells, f"{first['n']:,}", f"{first['wrong']:,}"])
    for name in ("precision", "recall"):
        rows.append([f"web, dropped at P < 0.5: {name}", *(f"{one['at one half'][name]:.3f}" for one in result["runs"]), "", ""])
    for source in result["runs"][0]["texts"]:
        rows.append([f"dropped of the texts by {source}", *(f"{one['texts'][source]['dropped'] / one['texts'][source]['n']:.3f}"
                                                            for one in result["runs"]), f"{result['runs'][0]['texts'][source]['n']:,}", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    path = RESULTS / "capfilt_emoji.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder emoji")
    parser.add_argument("--work", type=Path, help="where to make the sets, the run and the clean set (default: a folder that is deleted)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=0.5, help="of pre-training and its backbones: a fraction (default: 0.5)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as scratch:
            figures, drawn = measure(args.data, args.work or Path(scratch), args.seed, args.steps)
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        new = {"seed": args.seed, "fraction": args.steps, "machine": machine(), **figures}
        result = {"recipe": "blip/tiny", "data": "emoji", "versions": versions(),
                  "runs": sorted([one for one in runs if one["seed"] != args.seed] + [new], key=lambda one: one["seed"])}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plots.save_verdicts(drawn, RESULTS / "capfilt_emoji.png")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
