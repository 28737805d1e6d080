"""Records that stay on the disk: the source of a training run whose data are too many to be read before it begins.

    mix.jsonl (lines.py) ─┐                                ┌ train: read when it is asked for     665,000 records: 18 bytes each
    00000.tar (packed.py) ┴─► index.py: how many, where ──┤
                                                           └ val: at most HELD of them, read now, as Records: they are only asked

What is checked before training in a small set (records.py) is checked here when a record is met: one whose picture is missing or broken
(--on-missing skip) or that a stage cannot read stands aside for the next one, and is counted. A picture is decoded for each step anew.

Held out are: the records that say so ("split": "val"); if none does, of ENOUGH shards or more a tenth as a whole; of fewer shards or of
lines a tenth of the pictures, by lot, with all records that show them. A record with pictures of both sides is on neither.
Any process reads any shard, so no rank and no worker can be without one; a set is refused if it has fewer samples than a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
from PIL import Image

from nanovlm.data import index
from nanovlm.data.clips import load
from nanovlm.data.order import Windows
from nanovlm.data.places import Missing
from nanovlm.data.records import SPLITS, Records, texts_of
from nanovlm.data.rows import as_sample
from nanovlm.data.sample import REAL, Sample
from nanovlm.data.source import Exam
from nanovlm.data.views import Longest, as_view, ever_shorter, met_as, seen_in
from nanovlm.errors import UserError

HELD = 1000  # records that are kept to be asked; a tenth of a large set is more than any exam needs
ENOUGH = 10  # shards, of which some can be held out as a whole
READ = 20_000  # records whose texts a tokenizer learns from, and whose captions Flamingo's pages are made of
TRIED = 200  # records that a stage tries before it begins
IN_A_ROW = 1000  # records that stand aside before it is clear that none fits
KEPT = 64  # numberings of shards in memory


class Part(Protocol):
    """A file of records: Lines, Tar."""

    path: Path
    about: np.ndarray  # see index.py
    facts: np.ndarray
    lone: Sequence[str]
    places: object  # where its pictures lie

    def row(self, i: int) -> tuple[str, object]:
        """(record, row)."""


class Stored:
    def __init__(self, name: str, parts: Sequence[Part], on_missing: str = "error", cache_side: int = 64):
        """parts: in the order of their names. on_missing, cache_side: see formats.read."""
        self.name, self.parts, self._skip, self._side = name, list(parts), on_missing == "skip", cache_side
        about = np.array([part.about for part in self.parts])
        self._given, self._total = about[:, 4].any(), int(about[:, 3].sum())
        self._aside: dict[str, str] = {record: "no record can be made of it" for part in self.parts for record in part.lone}
        if self._aside and not self._skip:
            raise UserError(f"{name}: {next(iter(self._aside))} is no record ({len(self._aside)} in all); a picture needs a .txt or a .json "
                            "of its name: add it, or leave such files out with --on-missing skip.")
        self._whole = self._whole_parts(about)
        self._numbered: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
        self._ends = {view: np.cumsum([self._many(part, view, at) for part in range(len(self.parts))]) for at, view in enumerate(REAL, start=6)}
        self._blank = Image.new("RGB", (cache_side, cache_side))  # stands for a picture where only its place counts
        self._whys: dict[str, list[Callable[[Sample], str | None]]] = {}
        self.held = self._hold_out()
        self.labels, self.few = self.held.labels, self.held.few

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_numbered": {}}  # another process numbers what it reads

    # ---- train and held out

    def _whole_parts(self, about: np.ndarray) -> set[int]:
        """The shards that are held out as a whole: a tenth of them, or as many as have HELD records."""
        if self._given or len(self.parts) < ENOUGH:
            return set()
        by_lot = sorted(range(len(self.parts)), key=lambda part: blake2b(self.parts[part].path.name.encode()).digest())
        before = np.cumsum(about[by_lot, 3]) - about[by_lot, 3]
        return {part for part, held in zip(by_lot[:len(by_lot) // 10], before) if held < HELD}

    def _on(self, part: int, split: str) -> np.ndarray:
        """Which records of a part are on this side."""
        facts = self.parts[part].facts
        if self._given:
            held = facts["given"] == index.VAL
        elif self._whole:
            held = np.full(len(facts), part in self._whole)
        else:
            bound = index.LOTS * min(0.1, HELD / self._total)
            held = (facts["high"] if split == "val" else facts["low"]) < bound
        return held if split == "val" else ~held

    def _many(self, part: int, view: str, at: int) -> int:
        if part in self._whole:
            return 0
        return int(self.parts[part].about[at] if self._given or self._whole else index.entries(self.parts[part].facts, view)[self._on(part, "train")].sum())

    def _hold_out(self) -> Records:
        """Up to HELD records of the held-out side, spread evenly, as a source of questions."""
        numbers = [self._held_in(part) for part in range(len(self.parts))]
        ends = np.cumsum([len(of_part) for of_part in numbers])
        samples, several = [], min(HELD, int(ends[-1]))
        for place in (i * int(ends[-1]) // several for i in range(several)):
            part = int(np.searchsorted(ends, place, side="right"))
            record = self._record(part, int(numbers[part][place - ends[part]]))  # counted from the part's end
            samples += [record] if record else []
        if not samples:
            raise UserError(f'{self.name}: no record can be held out; mark some with "split": "val", or give records with other pictures.')
        if not self._ends["texts"][-1]:
            raise UserError(f'{self.name}: all records are held out; some must have the "split" "train".')
        return Records(self.name, samples, ["val"] * len(samples), on_missing="skip" if self._skip else "error", cache_side=self._side,
                       held_out=True, keep=False)

    def _held_in(self, part: int) -> np.ndarray:
        """Records of a part that are held out; the index of one that has none stays where it is."""
        if self._whole and part not in self._whole or self._given and not self.parts[part].about[4]:
            return np.empty(0, int)
        return np.flatnonzero(self._on(part, "val") & (self.parts[part].facts["kind"] != index.BLANK))

    # ---- one record

    def _place(self, view: str, number: int) -> tuple[int, int, int]:
        """Training sample → part, record, which of the record's texts."""
        part = int(np.searchsorted(self._ends[view], number, side="right"))
        records, ends = self._number(part, view)
        within = number - self._ends[view][part] + ends[-1]
        at = int(np.searchsorted(ends, within, side="right"))
        return part, int(records[at]), int(within - (ends[at - 1] if at else 0))

    def _number(self, part: int, view: str) -> tuple[np.ndarray, np.ndarray]:
        """The training records of a part, and where the samples of each end."""
        if (part, view) not in self._numbered:
            facts = self.parts[part].facts
            records = np.flatnonzero(self._on(part, "train"))
            self._numbered = dict([*self._numbered.items()][1 - KEPT:])
            self._numbered[part, view] = records.astype(np.uint32), np.cumsum(index.entries(facts, view)[records])
        return self._numbered[part, view]

    def _record(self, part: int, i: int) -> Sample | None:
        """With paths for images; None where its picture is missing and it stands aside."""
        name, row = self.parts[part].row(i)
        try:
            return as_sample(name, row, self.parts[part].places)[0]
        except Missing as error:
            return self._stand_aside(name, error)
        except UserError as error:
            raise UserError(f"{self.name}: {name}: {error}; python -m nanovlm.data.check lists all such records.") from error

    def _stand_aside(self, record: str, error: UserError) -> None:
        """A picture that is missing or broken: the end, or a note."""
        if not self._skip:
            raise UserError(f"{self.name}: {record}: {str(error).rstrip('.')}.") from error
        self._aside[record] = str(error)

    def _told(self, view: str, number: int, rng: Random, see: Callable[[object], object]) -> Sample | None:
        """The sample as the view shows it, if it can be used; see: from the path of a picture to the picture."""
        part, i, which = self._place(view, number)
        if (record := self._record(part, i)) is None:
            return None
        try:
            images = () if view == "texts" else tuple(seen_in(view, see(path)) for path in record.images)
        except UserError as error:
            return self._stand_aside(record.id, error)
        reason = "a page that has lost its only picture"
        for caption in met_as(record, view, "train")[which:which + 1]:
            for shorter in ever_shorter(caption) if view == "texts" else (caption,):
                sample = as_view(replace(record, images=images), shorter, view, rng)
                reasons = [reason for why in self._whys.get(view, ()) if (reason := why(sample)) is not None]
                if not reasons:
                    return sample
                reason = reasons[0]
        self._aside[record.id] = reason.removeprefix(f"{record.id}: ")
        return None

    # ---- the interface that Records has too

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [*self.held.skipped, *self._aside.items()]

    def texts(self) -> list[str]:
        """Of up to READ training records, spread evenly."""
        return texts_of(self.some_records(READ))

    def some_records(self, most: int) -> Iterator[Sample]:
        """Training records, with paths for images."""
        for place in dict.fromkeys(self._place("texts", number)[:2] for number in self._some("texts", most)):
            if (record := self._record(*place)) is not None:
                yield record

    def _some(self, view: str, most: int) -> Iterator[int]:
        """Numbers of training samples, spread evenly."""
        size = self.size(view, "train")
        return (i * size // min(most, size) for i in range(min(most, size)))

    @property
    def identity(self) -> list[tuple]:
        """By what the set is known again: its files, their sizes and when they were changed."""
        return [(part.path.name, *part.about.tolist()) for part in self.parts]

    def size(self, view: str, split: str) -> int:
        return int(self._ends[view][-1]) if view in self._ends and split == "train" else self.held.size(view, split)

    def sample(self, view: str, split: str, index: int) -> Sample:
        """The same sample for the same index; where a record cannot be used, the next one stands in."""
        if split != "train":
            return self.held.sample(view, split, index)
        size = self.size(view, split)
        for step in range(min(size, IN_A_ROW)):
            sample = self._told(view, (index + step) % size, Random(index), lambda path: load(path, self._side, rough=True))
            if sample is not None:
                return sample
        record, reason = list(self._aside.items())[-1]
        raise UserError(f"{self.name}: {min(size, IN_A_ROW)} records in a row cannot be used (view {view}); {record}: {reason}")

    def order(self, view: str, key: str) -> Sequence[int]:
        return Windows(np.diff(self._ends[view], prepend=0), key)

    def captions(self, view: str) -> Iterator[tuple[int, str]]:
        """(index, caption) of up to READ training samples, spread evenly."""
        for number in self._some(view, READ):
            part, i, which = self._place(view, number)
            if (record := self._record(part, i)) is not None:
                yield from ((number, caption) for caption in met_as(record, view, "train")[which:which + 1])

    def lengths(self, view: str) -> np.ndarray:
        """Words of each training sample, below zero where there is no picture."""
        found = [np.empty(0, np.int32)]
        for part in set(range(len(self.parts))) - self._whole:
            records, ends = self._number(part, view)
            found.append(np.repeat(self.parts[part].facts["words"][records], np.diff(ends, prepend=0)))
        return np.concatenate(found)

    def leave_out(self, view: str, why: Callable[[Sample], str | None], splits: Sequence[str] = SPLITS) -> None:
        """Records that `why` has a reason against stand aside when they are met; a few are tried now."""
        self.held.leave_out(view, why, [split for split in splits if split == "val"])
        if "train" not in splits or not self.size(view, "train"):
            return
        self._whys.setdefault(view, []).append(why)
        if not sum(self._told(view, number, Longest(), lambda path: self._blank) is not None for number in self._some(view, TRIED)):
            record, reason = list(self._aside.items())[-1]
            raise UserError(f"{self.name}: none of the records that were tried can be used (view {view}); {record}: {reason}")

    def look(self, diet: dict[str, float], real: str, n: int) -> list[Sample]:
        return self.held.look(diet, real, n)

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        return self.held.exams(names, n)

    def galleries(self) -> list[list[Sample]]:
        return self.held.galleries()

    def noisy(self) -> list[Sample]:
        return self.held.noisy()

    def notes(self, figures: dict[str, dict[str, float]] | None) -> list[str]:
        asked = f" {self.held.size('texts', 'val'):,} held-out records are asked." if figures is not None else ""
        few = " These are too few to judge by: the figures above may be luck." if self.few and asked else ""
        train = self.size("texts", "train")
        said = (f"{train:,} training texts stay on the disk, and their records are checked when they are met. A tokenizer of the run's own "
                f"has learned from {min(READ, train):,} of them.")
        return [said + asked + few]
