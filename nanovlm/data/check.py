"""Look at a data set before an hour is spent on it: `python -m nanovlm.data.check PATH [--format v1]`.

Idea: everything that a training run would stumble over is found now, and all of it at once; and what the model will be
trained on is shown as it will be, token for token, with the trained part marked.

    PATH ─► scan (formats.py) ─► records ─► every picture opened ─► every conversation encoded ─► report
                 └─ problems ─────────────────── + ───────────────────── + ──────────────────────────┘

The tokens of the report are those of a small tokenizer trained on the set itself, as a tiny recipe does it.
Exit codes: 0 fine; 1 problems were found, and are listed; 2 the path as a whole is unusable.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image
from tqdm import tqdm

from nanovlm.data.conversation import FORMATS, encode, find_format
from nanovlm.data.formats import Found, scan
from nanovlm.data.records import Records, as_view
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.transforms import load_image
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer

LISTED, SHOWN, BAR = 20, 5, 40  # problems listed, samples shown, characters of the longest bar
VOCAB_SIZE = 512


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.data.check", description="Say what a data set holds and what is broken in it.",
        epilog="example: python -m nanovlm.data.check my_pictures --format plain",
    )
    parser.add_argument("path", help="a folder of pictures with a .txt beside each, a .jsonl, or a .json (COCO, LLaVA)")
    parser.add_argument("--format", default="v1", choices=list(FORMATS), help="conversation format (default: v1)")
    options = parser.parse_args(argv)
    try:
        return report(scan(options.path), options.format)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def report(found: Found, format: str) -> int:
    problems = [str(problem) for problem in found.problems]
    copies, wrong_names, unreadable = look_at_pictures(found.samples)
    problems += wrong_names + [f"{record}: {reason}" for record, reason in unreadable.items()]
    usable = [(sample, split) for sample, split in zip(found.samples, found.splits) if sample.id not in unreadable]
    samples = [sample for sample, _ in usable]
    print(f"{found.name}: {found.kind}")
    describe_records(samples, copies)
    try:
        describe_views(Records(found.name, samples, [split for _, split in usable], on_missing="skip"))
    except UserError as error:
        problems.append(str(error))
    if samples:
        describe_lengths(samples)
        problems += show_masks(samples, format)
    print(f"\nproblems: {len(problems) or 'none'}")
    for problem in problems[:LISTED]:
        print(f"  {problem}")
    if len(problems) > LISTED:
        print(f"  ... and {len(problems) - LISTED} more")
    return 1 if problems else 0


def look_at_pictures(samples: Sequence[Sample]) -> tuple[Counter, list[str], dict[str, str]]:
    """Open every picture → (how often each content occurs, misleading file names, {record: why it is unreadable})."""
    copies, wrong_names, broken = Counter(), [], {}
    paths = dict.fromkeys(path for sample in samples for path in sample.images)
    for path in tqdm(paths, desc="opening pictures", unit=" pictures", leave=False, disable=None):
        try:
            load_image(path, side=64)
            content = path.read_bytes()
            copies[blake2b(content).digest()] += 1
            wrong_names += wrong_name(path, content)
        except UserError as error:
            broken[path] = str(error)
    unreadable = {sample.id: broken[path] for sample in samples for path in sample.images if path in broken}
    return copies, wrong_names, unreadable


def wrong_name(path: Path, content: bytes) -> list[str]:
    """A complaint if the file's ending names another kind of picture than its content is."""
    with Image.open(BytesIO(content)) as image:
        actual = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with a second picture behind it
    named = Image.registered_extensions().get(path.suffix.lower())
    if named in (None, actual):
        return []
    return [f"{path.name}: its name says {named}, its content is {actual}; it is read all the same, but rename it"]


def describe_records(samples: Sequence[Sample], copies: Counter) -> None:
    texts = texts_of(samples)
    print(f"  records   {len(samples):,} usable, {sum(not sample.images for sample in samples):,} without a picture")
    print(f"  pictures  {copies.total():,} files, {len(copies):,} different")
    print(f"  texts     {texts.total():,}, {len(texts):,} different")
    for text, times in texts.most_common(1):
        print(f"            most frequent, {times:,} times: {text[:80]!r}")


def describe_views(records: Records) -> None:
    for view in ("pairs", "captions", "instruct"):
        train, val = (f"{records.size(view, split):,}" for split in ("train", "val"))
        print(f"  {view:<9} {train} to train on, {val} held out")
    if records.labels:
        print(f"  classes   {len(records.labels)}: {', '.join(records.labels)}")
    if records.few:
        print("  note      these are too few to judge a model by: the figures will be luck as much as learning")


def describe_lengths(samples: Sequence[Sample]) -> None:
    texts = list(texts_of(samples).elements())
    print("\nlength of captions and answers in words")
    print_histogram(len(text.split()) for text in texts)
    print("length of captions and answers in characters")
    print_histogram(len(text) for text in texts)


def texts_of(samples: Sequence[Sample]) -> Counter:
    """What there is to learn: all answers of the conversations, all references of the captioned pictures."""
    captions = (text for sample in samples if not sample.turns for text in sample.references)
    return Counter(captions) + Counter(turn.answer for sample in samples for turn in sample.turns)


def print_histogram(values: Iterable[int]) -> None:
    """Bars over 0-1, 2-3, 4-7, 8-15, ...: lengths spread over powers of two."""
    counts = Counter(max(1, value.bit_length()) for value in values)
    for bits in range(min(counts), max(counts) + 1):
        low, high = (1 << bits - 1 if bits > 1 else 0), (1 << bits) - 1
        bar = "█" * round(BAR * counts[bits] / max(counts.values()))
        print(f"  {f'{low}-{high}':>9} {counts[bits]:>8,} {bar}".rstrip())


def show_masks(samples: Sequence[Sample], format: str) -> list[str]:
    """Encode every record as it will be trained, print the first few, return what cannot be encoded."""
    view = "captions" if find_format(format).marks_only else "instruct"
    shown = [as_view(sample, sample.caption, view, Random(i)) for i, sample in enumerate(samples)]
    if view == "captions":
        shown = [sample for sample in shown if len(sample.images) == 1]  # plain is one picture and its caption
    texts = (text for s in shown for turn in s.turns for text in (turn.question.replace(IMAGE, ""), turn.answer))
    tokenizer = Tokenizer.train(texts, VOCAB_SIZE)
    marks = "green" if sys.stdout.isatty() else "⟦ ⟧"
    print(f"\nthe first samples in format {format}; what is trained stands in {marks}")
    problems = []
    for i, sample in enumerate(tqdm(shown, desc="encoding", unit=" samples", leave=False, disable=None)):
        try:
            line = marked(sample.turns, tokenizer, format, sample.id)
        except UserError as error:
            problems.append(str(error))
            continue
        if i < SHOWN:
            print(f"  {sample.id}\n    {line}")
    return problems


def marked(turns: Sequence[Turn], tokenizer: Tokenizer, format: str, name: str) -> str:
    """One line of the tokens' text, the trained runs between marks."""
    ids, labels = encode(turns, tokenizer, format, name=name)
    before, after = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    line, start = "", 0
    for end in range(1, len(ids) + 1):
        trained = labels[start] != IGNORE
        if end == len(ids) or (labels[end] != IGNORE) != trained:
            text = tokenizer.decode(ids[start:end], specials=True).replace("\n", "\\n")
            line += f"{before}{text}{after}" if trained else text
            start = end
    return line


if __name__ == "__main__":
    sys.exit(main())
