"""Does BLIP's filter find the wrong captions of a person's own pictures? Noise is put in on purpose, so that the answer is known.

    emoji: 1,412 things, each drawn by three artists, and 150 more that are held out
      ├─ a tenth of the 1,412: human.jsonl, right captions                          ─► fine-tunes the filter
      └─ the others: web/captions.jsonl, three captions in ten exchanged            ─► pre-trains BLIP, and is filtered

    python -m experiments.capfilt_emoji --data ../shared/data/emoji               everything, seed 0
    python -m experiments.capfilt_emoji --data ... --work FOLDER                  goes on with what is in the folder
    python -m experiments.capfilt_emoji --table                                   print what is stored

Measured: ROC AUC of P(belongs) against the hidden labels, with the middle 95 % of 1,000 bootstrap resamples.
"""

import argparse
import json
from pathlib import Path
from random import Random

NOISE, HUMAN = 0.3, 0.1


def make(data: Path, folder: Path, seed: int) -> list[bool]:
    """Write `folder`/web/captions.jsonl and `folder`/human.jsonl; whether the caption of each line of the web was exchanged."""
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
    return [i in set(wrong) for i in range(len(web))]


def exchange(captions: list[str], rng: Random) -> list[str]:
    """The same captions in another order, in which none stands where it stood."""
    moved = captions[:]
    while any(a == b for a, b in zip(captions, moved)):
        rng.shuffle(moved)
    return moved


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
