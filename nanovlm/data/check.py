"""Look at a data set before an hour is spent on it: `python -m nanovlm.data.check PATH [--model llava]`.

Idea: everything that a training run would stumble over is found now, and all of it at once; and what the model will be
trained on is shown as it will be, token for token, with the trained part marked.

    PATH ─► scan (formats.py) ─► records ─► every picture opened ─► every stage: each record encoded as it reads it ─► report
                 └─ problems ─────────────────── + ─────────────────────────── + ───────────────────────────────────────┘

Of a set that stays on the disk (stored.py) every record is read, and the pictures of some are opened. A list of records that is too
large to be read whole becomes lines by `--lines OUT.jsonl`. Tokenizer, stages, formats and limits are those of a run of `--model`, made by the same code.
Exit codes: 0 fine; 1 problems were found, and are listed; 2 the path as a whole is unusable.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from nanovlm import recipes
from nanovlm.data.clips import files
from nanovlm.data.collate import Collate
from nanovlm.data.formats import Found, parts_of, read, scan, scan_entry
from nanovlm.data.lines import to_lines
from nanovlm.data.mixture import Mixed, Plan
from nanovlm.data.mixture import plan as plan_of
from nanovlm.data.records import Records
from nanovlm.data.rows import as_sample
from nanovlm.data.sample import Sample
from nanovlm.data.stored import Part, Stored
from nanovlm.data.transforms import load_image
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.published_tokenizer import PublishedTokenizer
from nanovlm.recipes.stage import Recipe, resolve
from nanovlm.runs.setting import Job, Setting, leave_out_unfit, make_tokenizer, plan, shares
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import MicroBatches, make_collate

LISTED, SHOWN, BAR, OPENED = 20, 3, 40, 2000  # problems listed, samples shown of a stage, characters of the longest bar, pictures of a large set


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nanovlm.data.check", description="Say what a data set holds and what is broken in it.",
                                     epilog="example: python -m nanovlm.data.check my_pictures --model blip2")
    parser.add_argument("path", help="a folder of pictures with a .txt beside each, a .jsonl, a .json (COCO, LLaVA, documents), or .tar shards")
    parser.add_argument("--model", default="llava", help="whose stages are to read it (default: llava), or a recipe such as llava/7b")
    parser.add_argument("--lines", metavar="OUT.jsonl", help="write the records of a large .json list there, each as a line of its own, which can "
                        "stay on the disk; pictures are then looked for beside it")
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know no Chinese
    try:
        if options.lines:
            print(f"{options.lines}: {to_lines(Path(options.path), Path(options.lines)):,} records; check them: python -m nanovlm.data.check {options.lines}")
            return 0
        recipe = resolve(recipes.get(options.model if "/" in options.model else f"{options.model}/tiny"), real=True)
        if parts := parts_of(options.path):
            return report_stored(options.path, parts, recipe)
        whole = plan_of(options.path)
        return report(scan(options.path), recipe) if whole is None else report_mixture(options.path, whole, recipe)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def report(found: Found, recipe: Recipe) -> int:
    problems, samples, splits = look_at(found)
    try:
        problems += go_through_stages(records_of(found.name, samples, splits, recipe), recipe)
    except UserError as error:
        problems.append(str(error))
    return conclude(problems)


def report_stored(path: str, parts: Sequence[Part], recipe: Recipe) -> int:
    problems = [problem for part in parts for problem in unread(part)]
    try:
        records = read(path, "skip", side_of(recipe))
        samples = list(records.some_records(OPENED))
        print(f"{records.name}: {len(parts):,} files with {sum(np.count_nonzero(part.facts['kind']) for part in parts):,} records that stay on the "
              f"disk; of {len(samples):,} of them the pictures are opened")
        copies, wrong_names, unreadable = look_at_pictures(samples)
        describe(samples, copies)
        problems += wrong_names + [f"{record}: {reason}" for record, reason in unreadable.items()] + go_through_stages(records, recipe)
    except UserError as error:
        problems.append(str(error))
    return conclude(list(dict.fromkeys(problems)))  # what is missing is found by each reader


def unread(part: Part) -> Iterator[str]:
    """What is wrong with the records of a file that stays on the disk."""
    for i in tqdm(np.flatnonzero(part.facts["kind"]), desc=f"reading {part.path.name}", unit=" records", leave=False, disable=None):
        record, row = part.row(i)
        try:
            as_sample(record, row, part.places)
        except UserError as error:
            yield f"{record}: {error}"


def report_mixture(path: str, whole: Plan, recipe: Recipe) -> int:
    """Each set as if it stood alone, then what they are together."""
    problems, sets = [], {}
    for entry in whole.entries:
        try:
            found = scan_entry(path, entry)
            own, samples, splits = look_at(found)
            problems += [f"set {entry.name}: {problem}" for problem in own]
            sets[entry.name] = records_of(found.name, samples, splits, recipe, entry.held_out)
        except UserError as error:
            problems.append(str(error))
        print()
    try:
        mixed = Mixed(whole, sets)
        print(f"{whole.name}: {len(sets)} data sets")
        for name, entry in mixed.entries.items():
            train, val = (sets[name].size("instructions", split) for split in ("train", "val"))
            drawn = f"{train:,} to train on, {shares(mixed)[name]:.1%} of the draws, " if name in mixed.held_in else ""
            print(f"  {'held in ' if drawn else 'held out'}  {name} ({entry.group}): {drawn}{val:,} held out")
        problems += go_through_stages(mixed, recipe)
    except UserError as error:
        problems.append(str(error))
    return conclude(problems)


def records_of(name: str, samples: Sequence[Sample], splits: Sequence[str], recipe: Recipe, held_out: bool = False) -> Records:
    return Records(name, samples, splits, on_missing="skip", cache_side=side_of(recipe), held_out=held_out)


def side_of(recipe: Recipe) -> int:
    return recipes.shorter_side(recipe.name) * 4 // 3


def look_at(found: Found) -> tuple[list[str], list[Sample], list[str]]:
    """Say what was found → (problems, usable records, their splits)."""
    problems = [str(problem) for problem in found.problems]
    copies, wrong_names, unreadable = look_at_pictures(found.samples)
    problems += wrong_names + [f"{record}: {reason}" for record, reason in unreadable.items()]
    usable = [(sample, split) for sample, split in zip(found.samples, found.splits) if sample.id not in unreadable]
    samples = [sample for sample, _ in usable]
    print(f"{found.name}: {found.kind}")
    describe(samples, copies)
    print_pages(samples, found.left_out)
    return problems, samples, [split for _, split in usable]


def conclude(problems: Sequence[str]) -> int:
    print(f"\nproblems: {len(problems) or 'none'}")
    for problem in problems[:LISTED]:
        print(f"  {problem}")
    if len(problems) > LISTED:
        print(f"  ... and {len(problems) - LISTED} more")
    return 1 if problems else 0


def look_at_pictures(samples: Sequence[Sample]) -> tuple[Counter, list[str], dict[str, str]]:
    """Open every picture → (how often each content occurs, misleading file names, {record: why it is unreadable})."""
    copies, wrong_names, broken = Counter(), [], {}
    paths = dict.fromkeys(path for sample in samples for entry in sample.images for path in files(entry))
    for path in tqdm(paths, desc="opening pictures", unit=" pictures", leave=False, disable=None):
        try:
            load_image(path, side=64)
            content = path.read_bytes()
            copies[blake2b(content).digest()] += 1
            wrong_names += wrong_name(path, content)
        except UserError as error:
            broken[path] = str(error)
    unreadable = {sample.id: broken[path] for sample in samples for entry in sample.images for path in files(entry) if path in broken}
    return copies, wrong_names, unreadable


def wrong_name(path: object, content: bytes) -> list[str]:
    """A complaint if the file's ending names another kind of picture than its content is."""
    with Image.open(BytesIO(content)) as image:
        actual = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with a second picture behind it
    named = Image.registered_extensions().get(path.suffix.lower(), actual)
    said = f"{path.name}: its name says {named}, its content is {actual}; it is read all the same, but rename it"
    return [said] if named != actual else []


def describe(samples: Sequence[Sample], copies: Counter) -> None:
    """How much there is, and how long what there is to learn is: answers of conversations, references of captioned pictures."""
    texts = Counter(text for sample in samples for text in ([turn.answer for turn in sample.turns] or sample.references) if text)
    print(f"  records   {len(samples):,} usable, {sum(not sample.images for sample in samples):,} without a picture")
    print(f"  pictures  {copies.total():,} files, {len(copies):,} different")
    print(f"  texts     {texts.total():,}, {len(texts):,} different")
    for text, times in texts.most_common(1):
        print(f"            most frequent, {times:,} times: {text[:80]!r}")
        for unit, length in (("words", lambda text: len(text.split())), ("characters", len)):
            print(f"\nlength of captions and answers in {unit}")
            print_histogram(map(length, texts.elements()))


def print_pages(samples: Sequence[Sample], left_out: Sequence[str]) -> None:
    """Of documents and clips how many pictures and frames they have."""
    pages = [sample for sample in samples if sample.format == "pages"]
    lengths = [len(entry) for sample in samples for entry in sample.images if isinstance(entry, tuple)]
    if pages:
        print(f"  documents {len(pages):,}, with {sum(len(page.images) for page in pages):,} pictures, {sum(not page.images for page in pages):,} without any")
    if lengths:
        print(f"  clips     {len(lengths):,}, of {min(lengths)} to {max(lengths)} frames")
    for said in left_out[:1]:
        print(f"  left out  {len(left_out):,} pictures of pages; the first is {said}")


def print_histogram(values: Iterable[int]) -> None:
    """Bars over 0-1, 2-3, 4-7, 8-15, ...: lengths spread over powers of two."""
    counts = Counter(max(1, value.bit_length()) for value in values)
    for bits in range(min(counts), max(counts) + 1):
        low, high = (1 << bits - 1 if bits > 1 else 0), (1 << bits) - 1
        bar = printable("█", "#") * round(BAR * counts[bits] / max(counts.values()))
        print(f"  {f'{low}-{high}':>9} {counts[bits]:>8,} {bar}".rstrip())


def printable(text: str, plain: str) -> str:
    """The text, or a plainer one where the console cannot print it."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return plain
    return text


# ---- as a run would read it

def words_of(recipe: Recipe, records: Records | Mixed | Stored) -> Tokenizer | PublishedTokenizer:
    """The run's tokenizer; data may be looked at before published weights are there."""
    try:
        return make_tokenizer(recipe, records, seed=0)
    except UserError as error:
        print(f"\nnote: {error} Here tokens are counted by a tokenizer that is learned from these data.")
        return make_tokenizer(replace(recipe, words={}), records, seed=0)


def go_through_stages(records: Records | Mixed | Stored, recipe: Recipe) -> list[str]:
    """What each stage has to train on, and its first samples; returns what no stage could read."""
    setting = Setting(recipe, 0, torch.device("cpu"), records, words_of(recipe, records))
    problems, shown = [], []
    print(f"\nthe stages of {recipe.name}")
    for job in plan(Job(recipe, recipe.stages[-1]), setting):
        stage, reads = job.stage, recipes.build(job.recipe.name, stage=job.stage.name).reads
        collate = make_collate(job.recipe, stage, setting.tokenizer, reads)
        shown += [(stage, collate)] if reads.kind in ("conversations", "texts") else []  # in no format
        try:
            leave_out_unfit([job], setting)
            MicroBatches(setting.samples(job, {}), stage, setting.seed, collate)
        except UserError as error:
            problems.append(str(error))
        train, val = (records.size(stage.real, split) for split in ("train", "val"))
        judged = "" if val or stage.real == "texts" else "; with none held out it will not be judged"
        print(f"  {stage.name:<9} {stage.real:<13} {train:,} to train on, {val:,} held out{judged}")
    if records.labels:
        print(f"  classes   {len(records.labels)}: {', '.join(records.labels)}")
    if records.few:
        print("  note      these are too few to judge a model by: the figures will be luck as much as learning")
    for note in setting.notes:
        print(f"  note      {note}")
    for stage, collate in shown:
        print(f"\nthe first samples as stage {stage.name} reads them, in format {stage.format}; what is trained stands in "
              f"{'green' if sys.stdout.isatty() else ' '.join(marks())}")
        for i in first_ones(records, stage.real):
            sample = records.sample(stage.real, "train", i)
            print(f"  {sample.id}\n    {marked(sample, collate)}")
    return problems + [f"{record}: {reason}" for record, reason in records.skipped]


def first_ones(records: Records | Mixed | Stored, view: str) -> Iterable[int]:
    """The places of the samples to show: the first ones, of a mixture the first one of each set."""
    if not isinstance(records, Mixed):
        return range(min(SHOWN, records.size(view, "train")))
    sets = [name for name, _ in records.places(view, "train")]
    return [sets.index(name) for name in dict.fromkeys(sets)]


def marks() -> tuple[str, str]:
    return ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else tuple(printable("⟦⟧", "[]"))


def marked(sample: Sample, collate: Collate) -> str:
    """One line of the tokens' text, the trained runs between marks."""
    ids, labels = collate.encode(sample)
    (before, after), line, start = marks(), "", 0
    for end in range(1, len(ids) + 1):
        trained = labels[start] != IGNORE
        if end == len(ids) or (labels[end] != IGNORE) != trained:
            text = collate.tokenizer.decode(ids[start:end], specials=True).replace("\n", "\\n")
            line += f"{before}{text}{after}" if trained else text
            start = end
    return line


if __name__ == "__main__":
    sys.exit(main())
