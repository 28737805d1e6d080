"""CapFilt on a person's own pictures: `python -m nanovlm.making.capfilt --data noisy/ --human clean.jsonl --model runs/blip --out clean/`

BLIP (2201.12086) §3.3, Fig. 3. The steps before and behind it are runs of train_tiny.py:

    train_tiny.py --model blip --data noisy/ ─► runs/blip: pretrain
                                                   ├─► captioner  LM loss          ┐ fine-tuned here, apart, on the texts of --human
                                                   └─► filter     ITC + ITM losses ┘
    every picture that noisy/ trains on: its texts and a new one by the captioner ─► filter ─► those that belong (bootstrap.py)
        + the human pairs, not filtered + the held-out records of noisy/, as they are ─► clean/captions.jsonl
    train_tiny.py --model blip --data clean/        a new model, from the beginning

clean/ is made like the folder of a run: --resume goes on with it, --overwrite deletes it.
    captions.jsonl      {"image": "../noisy/a.jpg", "caption": "a hat", "source": "web", "belongs": 0.97, "split": "train"}, a line for each
                        text; source: web, captioner or human. The pictures stay where they are; paths count from this folder.
    texts.jsonl         every text that was judged, dropped ones too         report.png    some that were kept, rewritten, dropped
    captioner.pt, filter.pt, and what else a run has

Who is held out stays held out: of noisy/ those that its "split" names or, if it names none, those that train_tiny.py chose. A picture
that is in both sets is on the side that noisy/ says, and where it is held out nothing learns from it.
A run on other data than noisy/ is taken, with a warning: its captioner knows few of the words. The shipped models have seen scenes only.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from nanovlm import plots, recipes
from nanovlm.data.check import look_at_pictures
from nanovlm.data.records import Records, content, on_one_side
from nanovlm.data.sample import Sample
from nanovlm.data.transforms import load_image
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil, permuted
from nanovlm.files import replacing
from nanovlm.making.bootstrap import SOURCES, Text, grow
from nanovlm.runs.capfilt import writer
from nanovlm.runs.checkpoint import SaveFailed, saving
from nanovlm.runs.progress import say, warn
from nanovlm.runs.run import Options
from nanovlm.runs.setting import read_source
from nanovlm.runs.tuned import EPOCHS, open_run, prepare, tune
from nanovlm.training.loop import TrainingFailed

SAID_EVERY, DRAWN = 500, 8  # pictures: between two lines of progress; in a block of the report


def capfilt(run: Path, human_path: str | None, beams: int, options: Options) -> None:
    """From the command line to captions.jsonl."""
    if beams < 1:
        raise UserError(f"--beams {beams}: give 1, for sampling, or more.")
    if not human_path:
        raise UserError("--human is missing: captioner and filter must learn from texts that one can trust (BLIP's: COCO), or they copy the web's noise.")
    trained_on, recipe, made = open_run(run, beams)
    web, human = (read_source(recipe, path, options.on_missing, options.seed, whole=True) for path in (options.data, human_path))
    samples, held = to_filter(web, Path(options.data), options.on_missing == "skip"), web.listed("val")
    placed = on_one_side(human, web)
    apart = {record.id for record, side in placed if side == "val"}
    setting, keep = prepare(run, recipe, made, human, lambda record: "its picture is held out" if record.id in apart else None, options)
    check_human(human, [record for record, _ in placed if record.id not in apart])
    say(f"{len(samples):,} pictures to caption and filter, {len(held):,} held-out records to copy, {human.size('pairs', 'train'):,} human pairs to learn from")
    for name, skipped in ((records.name, records.skipped) for records in (web, human) if records.skipped):
        say(f"{name}: {len(skipped):,} records are left out; the first is {': '.join(skipped[0])}")
    if trained_on != str(Path(options.data).resolve()):
        warn(f"{run} was trained on {trained_on}, not on {options.data}; its captioner writes in the words that it knows")
    said = repr([(sample.id, sample.captions) for sample in (*samples, *human.listed("train"))]).encode()
    captioner, judge = tune(run, setting, keep, options, {
        "--human": str(Path(human_path).resolve()), "--beams": beams, "what both sets hold": blake2b(said, digest_size=6).hexdigest()})
    examine(judge, human)
    side, write = recipes.shorter_side(recipe.name) * 4 // 3, writer(captioner, made, f"{options.seed}/{recipe.name}")
    texts = grow(keep.path / "texts.jsonl", samples, lambda some: write(shown(some, side)), lambda some: judge.belongs(shown(some, side)),
                 lambda done: done % SAID_EVERY or say(f"captioned and filtered: {done:,} of {len(samples):,}"), lambda sample: sample.captions)
    write_out(texts, {sample.id: sample.images[0] for sample in samples}, placed, held, keep.path)


# --- what it begins with ---

def to_filter(web: Records, data: Path, skip: bool) -> list[Sample]:
    """A sample for each picture that is trained on, with all its texts; named from where the data are, whatever --out is."""
    found: dict[Path, Sample] = {}
    for record in web.listed("train"):
        path = record.images[0]
        texts = dict.fromkeys((*(found[path].captions if path in found else ()), *record.captions))
        found[path] = Sample(way(path, data if data.is_dir() else data.parent), record.images, record.caption, tuple(texts))
    broken = {} if web.in_memory else look_at_pictures(list(found.values()))[2]  # else nobody has opened them yet
    if broken and not skip:
        raise UserError(next(iter(broken.values())))
    web.skipped += broken.items()
    return [sample for sample in found.values() if sample.id not in broken]


def check_human(human: Records, left: Sequence[Sample]) -> None:
    kinds = len(set(map(content, left))), len({text for record in left for text in record.captions})
    if min(kinds) < 2:
        raise UserError(f"--human {human.name} has {kinds[0]} different pictures, {kinds[1]} different texts to learn from: wrong pairs need two of each.")


def way(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


# --- the work ---

def examine(judge: Pupil, human: Records) -> None:
    """What the filter says where the truth is known."""
    known = [human.sample("pairs", "val", i) for i in range(min(500, human.size("pairs", "val")))]
    right, wrong = (sum(belief >= 0.5 for belief in judge.belongs(those)) for those in (known, permuted(known)))
    say(f"of {len(known)} held-out human pairs the filter takes {right} for right; with their pictures exchanged, {wrong}")


def shown(samples: Sequence[Sample], side: int) -> list[Sample]:
    """With their pictures, as the stages see them."""
    return [replace(sample, images=(load_image(sample.images[0], side),)) for sample in samples]


# --- what it leaves ---

def write_out(texts: Sequence[Text], paths: dict[str, Path], placed: Sequence[tuple[Sample, str]], held: Sequence[Sample], folder: Path) -> None:
    """report.png, and last of all captions.jsonl."""
    target = folder / "captions.jsonl"
    if not any(text.kept for text in texts):
        raise UserError(f"The filter takes none of {len(texts):,} texts for right, so {target} is not written: give more human pairs or a larger --steps, with --overwrite.")
    unlike = {(text.picture, text.text): text for text in reversed(texts) if text.kept}  # what the captioner repeats is the web's
    lines = [{"image": way(paths[text.picture], folder), "caption": text.text, "source": text.source, "belongs": round(text.belongs, 4),
              "split": "train"} for text in reversed(unlike.values())]
    for record, source, split in [*((record, "human", side) for record, side in placed), *((record, "web", "val") for record in held)]:
        said = record.captions[0] if len(record.captions) == 1 else record.captions
        lines.append({"image": way(record.images[0], folder), "caption": said, "label": record.label, "source": source, "split": split})
    outcomes = by_outcome(texts)
    with saving(target), replacing(target) as beside:
        plots.save_verdicts({f"{name}: {len(found):,} pictures": [
            (load_image(paths[own[0].picture], 256), [(f"{text.source}: {text.text} ({text.belongs:.2f})", text.kept) for text in own])
            for own in found[::max(1, len(found) // DRAWN)][:DRAWN]] for name, found in outcomes.items() if found}, folder / "report.png")
        beside.write_text("".join(json.dumps({k: v for k, v in line.items() if v}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for source in SOURCES:
        n, dropped = (sum(text.source == source and not (kept and text.kept) for text in texts) for kept in (False, True))
        say(f"{source}: {n:,} texts, {dropped:,} of them dropped ({dropped / max(1, n):.0%})")
    say("pictures: " + ", ".join(f"{len(found):,} {name}" for name, found in outcomes.items()) + f"; see {folder / 'report.png'}")
    say(f"{target}: {len(unlike):,} kept texts, {len(placed):,} human and {len(held):,} held-out records; "
        f"next: python train_tiny.py --model blip --data {folder}")


def by_outcome(texts: Sequence[Text]) -> dict[str, list[list[Text]]]:
    """The texts of each picture, by what became of them; rewritten: the filter takes the captioner's alone."""
    own: dict[str, list[Text]] = {}
    for text in texts:
        own.setdefault(text.picture, []).append(text)
    outcomes: dict[str, list[list[Text]]] = {"kept": [], "rewritten": [], "dropped": []}
    for found in own.values():
        left = {text.source for text in found if text.kept}
        outcomes["kept" if "web" in left else "rewritten" if left else "dropped"].append(found)
    return outcomes


# --- the command ---

def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know no Chinese
    try:
        capfilt(Path(options.model), options.human, options.beams, Options(
            data=options.data, on_missing=options.on_missing, device=options.device, seed=options.seed, out=options.out,
            resume=options.resume, overwrite=options.overwrite, steps=options.steps))
        return 0
    except (UserError, TrainingFailed, SaveFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as error:
        print(f"Interrupted: {str(error) or 'the same command with --resume goes on'}.", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.making.capfilt", description="Filter noisy captions and write new ones, as BLIP does (CapFilt).",
        epilog="example: python -m nanovlm.making.capfilt --data noisy/ --human clean.jsonl --model runs/blip --out clean/")
    parser.add_argument("--data", required=True, metavar="PATH", help="the noisy set, in any form that train_tiny.py --data takes")
    parser.add_argument("--human", metavar="PATH", help="pictures with texts that somebody has checked: captioner and filter learn from them")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a run of train_tiny.py --model blip --data with the noisy set")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, which is a data set for --data")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beam search; default: sampling from the nucleus, p = 0.9")
    parser.add_argument("--steps", type=float, metavar="X", help=f"of each of the two models: up to 1 a fraction of {EPOCHS} epochs, above 1 a number")
    parser.add_argument("--on-missing", choices=("error", "skip"), default="error", help="what to do about a missing or broken picture")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--overwrite", action="store_true", help="delete what is in --out first")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: CUDA, else CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
