"""Records that were read from files, in the views that training asks for.

Idea: whatever the files looked like, a record is some images, a caption with its references, perhaps a conversation or a document.
The interface is that of the embedded world (source.py), so the loop does not know whether the world is real.

    records ─► train │ val ─► entries of each view ─► sample(view, split, index)      views.py; a stage says which it reads: Stage.real
                           └─ leave_out: what a stage cannot read, too long for instance, before it trains
       └─ no "split" given: a tenth is held out, chosen by a hash; records that share a picture or a frame stay on one side

Pictures of a small set are decoded once, made small and kept; those of a large set are decoded whenever asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from random import Random

from PIL import Image
from tqdm import tqdm

from nanovlm.data.clips import Picture, files, load
from nanovlm.data.order import shuffled
from nanovlm.data.sample import IMAGE, REAL, Sample, choosing
from nanovlm.data.source import ASKED_IN, Exam, caption_exam, exam_of, exam_view, task_exam
from nanovlm.data.templates import instruction
from nanovlm.data.views import PAGES, QUESTIONS, Longest, as_view, ever_shorter, met_as, seen_in
from nanovlm.errors import UserError

SPLITS = ("train", "val")
KEPT_PICTURES, KEPT_BYTES = 20_000, 1 << 30  # a set beyond either is decoded anew in every epoch
TASKS = 200  # held-out records that a task is judged by
ENOUGH_TRAIN, ENOUGH_VAL = 500, 200  # below, a figure says more about luck than about the model


class Records:
    def __init__(
        self, name: str, samples: Sequence[Sample], splits: Sequence[str], skipped: Sequence[tuple[str, str]] = (),
        on_missing: str = "error", cache_side: int = 64, left_out: Sequence[str] = (), held_out: bool = False, keep: bool = True,
    ):
        """samples: with paths for images. splits: "train", "val" or "" for each. skipped: what was left out before.

        left_out: pictures that were not fit for their pages, and why. held_out: nothing is learned from it, see split_records.
        keep: pictures, if the set is small.
        """
        self.name = name
        self.skipped = list(skipped)
        self._skip = on_missing == "skip"
        self._side = cache_side
        self.left_out = list(left_out)
        self._pictures: dict[object, Picture] = {}
        self._blank = Image.new("RGB", (cache_side, cache_side))  # stands for a picture that is not in memory
        paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
        many = sum(len(files(path)) for path in paths)
        self.in_memory = keep and many <= KEPT_PICTURES and many * 3 * cache_side**2 <= KEPT_BYTES
        if self.in_memory:
            samples, splits = self._decode_all(paths, samples, splits)
        if len(samples) < (1 if held_out else 2):
            wanted = "one is needed, to be asked" if held_out else "two are needed, one to train on and one held out"
            raise UserError(f"{name}: it has {len(samples)} usable records; at least {wanted}.")
        sides = split_records(name, samples, splits, [] if held_out or "val" in splits else self.known_by(samples), held_out)
        self._records = {split: [s for s, side in zip(samples, sides) if side == split] for split in SPLITS}
        self.labels = _classes(samples)
        self.few = len(self._records["train"]) < ENOUGH_TRAIN and not held_out or len(self._records["val"]) < ENOUGH_VAL
        self._entries = {(view, split): self._list_entries(view, split) for view in REAL for split in SPLITS}

    # ---- the interface that Scenes has too

    def texts(self) -> list[str]:
        """Every text of the train split: what a tokenizer is trained on. Nothing of the held-out side is in it."""
        return texts_of(self._records["train"])

    def listed(self, split: str) -> list[Sample]:
        """The records of a split that have one picture, with its path; a document or a clip of several files is none."""
        return [record for record in self._records[split]
                if len(record.images) == 1 and record.format != PAGES and not isinstance(record.images[0], tuple)]

    def size(self, view: str, split: str) -> int:
        if (view, split) not in self._entries:
            raise UserError(f"{self.name}: there is no view {view!r} of split {split!r}; "
                            f"the views are {', '.join(REAL)}, the splits {', '.join(SPLITS)}.")
        return len(self._entries[view, split])

    def sample(self, view: str, split: str, index: int) -> Sample:
        """The same sample for the same index; where a picture proves broken only now, the next record stands in."""
        size = self.size(view, split)
        for step in range(size):
            record, caption = self._entries[view, split][(index + step) % size]
            try:
                images = () if view == "texts" else tuple(self._picture(path, view) for path in record.images)
            except UserError as error:
                if not self._skip:
                    raise UserError(f"{record.id}: {error}") from error
                self._note_skipped([(record.id, str(error))])
                continue
            return as_view(replace(record, images=images), caption, view, Random(index))
        raise UserError(f"{self.name}: no usable record of split {split} fits the view {view}.")

    def order(self, view: str, key: str) -> Sequence[int]:
        """The training samples in the order of the epoch that has this key."""
        return shuffled(self.size(view, "train"), key)

    def captions(self, view: str) -> Iterator[tuple[int, str]]:
        """(index, caption) of training samples."""
        return enumerate(caption for _, caption in self._entries[view, "train"])

    def entries(self, view: str, split: str) -> list[tuple[Sample, str]]:
        """(record, caption) of each sample, by index; the record has paths for images."""
        return self._entries[view, split]

    def known_by(self, records: Sequence[Sample]) -> list[set]:
        """By what the pictures of each record, and the frames of its clips, are known again: their files, whatever the path to them,
        and where they are in memory also their content, which a copy in another folder has too. In clips a frame of one colour tells
        nothing: many begin with a black one.
        """
        known = {}
        for entry in dict.fromkeys(entry for record in records for entry in record.images):
            shown = files(self._pictures.get(entry, ()))
            telling = [frame for frame in shown if len(shown) == 1 or frame.getcolors(1) is None]
            content = [blake2b(frame.tobytes(), digest_size=8).digest() for frame in telling]
            known[entry] = {path.resolve() for path in files(entry)}.union(content)
        return [set().union(*(known[entry] for entry in record.images)) for record in records]

    def held_pictures(self) -> set:
        """By what the pictures of the held-out side are known (known_by)."""
        return set().union(*self.known_by(self._records["val"]))

    def hold_out(self, pictures: set) -> None:
        """Records that show one of these pictures (known_by) are held out too, as another set of a mixture holds it out."""
        train = self._records["train"]
        shown = [not pictures.isdisjoint(known) for known in self.known_by(train)]
        self._records["val"] += [record for record, found in zip(train, shown) if found]
        self._records["train"] = [record for record, found in zip(train, shown) if not found]
        self._entries = {(view, split): self._list_entries(view, split) for view, split in self._entries}

    def leave_out(self, view: str, why: Callable[[Sample], str | None], splits: Sequence[str] = SPLITS) -> None:
        """Drop from a view what `why` has a reason against, as Collate.problem has; `.skipped` says which records, and why.

        A caption that is told in its picture's place is halved until it fits.
        """
        for split in splits:
            kept, noted = [], []
            for record, caption in self._entries[view, split]:
                images = () if view == "texts" else tuple(seen_in(view, self._pictures.get(path, self._blank)) for path in record.images)
                for shorter in ever_shorter(caption) if view == "texts" else (caption,):
                    reason = why(as_view(replace(record, images=images), shorter, view, Longest()))
                    if reason is None:
                        kept.append((record, shorter))
                        break
                else:
                    noted.append((record.id, reason.removeprefix(f"{record.id}: ")))
            self._note_skipped(noted)
            if noted and not kept and split == "train":
                raise UserError(f"{self.name}: no record can be used (view {view}); {noted[0][0]}: {noted[0][1]}")
            self._entries[view, split] = kept

    def lengths(self, view: str) -> list[int]:
        """Words of each training sample, below zero where there is no picture: what LLaVA-1.5 groups its batches by."""
        found = []
        for record, caption in self._entries[view, "train"]:
            words = sum(len(f"{turn.question} {turn.answer}".split()) for turn in as_view(record, caption, view, Random(0)).turns)
            found.append(words if record.images else -words)
        return found

    def noisy(self) -> list[Sample]:
        return []  # whether a person's texts are right nobody has told

    def galleries(self, n: int = 1000) -> list[list[Sample]]:
        """Held-out pictures with a caption each, to be found again; none where a few captions are classes.

        No caption stands twice in a gallery: where three artists drew the same things, that makes three of them.
        """
        rows: list[list[Sample]] = []
        met: Counter[str] = Counter()
        for index in range(0 if self.labels else self.size("captions", "val")):
            sample = self.sample("captions", "val", index)
            if met[sample.caption] == len(rows):
                rows.append([])
            rows[met[sample.caption]].append(sample)
            met[sample.caption] += 1
        return [row[:n] for row in rows if len(row) >= max(2, len(rows[0]) // 2)]

    def look(self, diet: dict[str, float], real: str, n: int) -> list[Sample]:
        return [self.sample(real, "val", i) for i in range(min(n, self.size(real, "val")))]

    def exam(self, n: int = 1000, view: str = "conversations") -> list[Sample]:
        """Up to n held-out samples, spread evenly, each to be judged by the answer of its last turn."""
        size, samples = self.size(view, "val"), []
        for i in range(min(n, size)):
            sample = self.sample(view, "val", i * size // min(n, size))
            # A conversation ends now with an early, now with a late turn, and holds the pictures up to there.
            turns = sample.turns[: 1 + i % len(sample.turns)]
            marks = sum(turn.question.count(IMAGE) for turn in turns)
            right = sample.references or (turns[-1].answer,) if view == "instructions" else sample.references
            samples.append(replace(sample, turns=turns, images=sample.images[:marks], references=right))
        return samples

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        """answers, mixture, science: an exam for each kind of question. captions, two: all captions. classes: one of `labels`.
        tasks: all instructions.
        """
        if "tasks" in names:
            return [task_exam(False, self.name, samples)] if (samples := self.exam(n or TASKS, "instructions")) else []
        view = real_view(names)
        by_kind: dict[str, list[Sample]] = {}
        for sample in self.exam(n or 1000, view):
            by_kind.setdefault(sample.turns[-1].kind, []).append(sample)
        captioned, found = by_kind.pop("caption", []), []
        if set(ASKED_IN) & set(names):
            found += [exam_of(kind, samples) for kind, samples in by_kind.items()]
        if captioned and {"captions", "two"} & set(names):
            found.append(caption_exam(captioned))
        if captioned and "classes" in names and self.labels:
            found.append(Exam("class", [choosing(sample, self.labels) for sample in captioned], ("class",), ranked=True))
        return found

    def notes(self, figures: dict[str, dict[str, float]] | None) -> list[str]:
        said, (train, val) = [], (self.size("captions", split) or self.size("pages", split) for split in SPLITS)
        if self.left_out:
            said.append(f"{len(self.left_out)} pictures were taken out of their pages; the first is {self.left_out[0]}.")
        if self.few and figures is not None:
            what = "pictures" if self.size("captions", "train" if train else "val") else "records"
            said.append(f"{f'{train} training and ' if train else ''}{val} held-out {what} are too few to judge by: the figures above may be luck.")
        exact = (figures or {}).get("caption_exact")
        if exact and not self.labels:
            said.append(f"{train} pictures teach naming only so far: {exact['value']:.1%} of the held-out captions are exactly "
                        f"right ({exact['shuffled']:.1%} with the images permuted).")
        return said

    # ---- pictures

    def _decode_all(
        self, paths: list, samples: Sequence[Sample], splits: Sequence[str]
    ) -> tuple[list[Sample], list[str]]:
        """Decode every picture once; records with a broken one are an error or left out."""
        broken: dict[object, str] = {}
        for path in tqdm(paths, desc=f"reading {self.name}", unit=" pictures", leave=False, disable=None):
            try:
                self._pictures[path] = load(path, self._side)
            except UserError as error:
                if not self._skip:
                    raise
                broken[path] = str(error)
        why = [next((broken[path] for path in sample.images if path in broken), None) for sample in samples]
        self._note_skipped([(sample.id, reason) for sample, reason in zip(samples, why) if reason])
        return ([sample for sample, reason in zip(samples, why) if not reason],
                [split for split, reason in zip(splits, why) if not reason])

    def _picture(self, path: object, view: str) -> Picture:
        return seen_in(view, self._pictures[path] if path in self._pictures else load(path, self._side))

    def _note_skipped(self, records: Sequence[tuple[str, str]]) -> None:
        self.skipped = list(dict.fromkeys([*self.skipped, *records]))  # each once, however often it is met

    # ---- views

    def _list_entries(self, view: str, split: str) -> list[tuple[Sample, str]]:
        """(record, caption) for each index."""
        return [(record, caption) for record in self._records[split] for caption in met_as(record, view, split)]


def texts_of(samples: Iterable[Sample]) -> list[str]:
    """Every text of training records, and the questions that are asked about pictures with captions."""
    texts = list(QUESTIONS)
    for i, sample in enumerate(samples):
        texts += sample.references if not sample.turns or sample.task.group else ()
        turns = instruction(sample, Random(i))[0] if sample.task.group else sample.turns
        texts += [text for turn in turns for text in (turn.question.replace(IMAGE, ""), turn.answer) if text]
    return texts


def real_view(exams: Sequence[str]) -> str:
    """How exams of these names ask about records."""
    return "instructions" if "tasks" in exams else "prompted" if exam_view(exams) == "mixture" else "conversations"


def _classes(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The captions to choose from, where the set is one of classes: few captions, each of many pictures."""
    captions = sorted({sample.caption for sample in samples})
    if any(sample.turns or len(sample.references) > 1 for sample in samples) or len(captions) < 2:
        return ()
    labelled = all(sample.label for sample in samples)
    one_each = labelled and len(captions) == len({sample.label for sample in samples})
    often = len(captions) <= 50 and len(samples) >= 5 * len(captions)
    return tuple(captions) if one_each or often else ()


# ---- train and held out


def split_records(
    name: str, samples: Sequence[Sample], given: Sequence[str], known: Sequence[set], held_out: bool = False
) -> list[str]:
    """"train" or "val" for each record: as given, or a tenth held out (at least one record with a picture). known: see Records.known_by.

    Of a set that is held out as a whole all are "val", unless it says of some that they are: then those alone are asked.
    """
    if held_out and "val" not in given:
        return ["val"] * len(samples)
    if "val" in given:
        if all(split == "val" for split in given) and not held_out:
            raise UserError(f'{name}: field "split" is "val" in every record; some must be "train".')
        return ["val" if split == "val" else "train" for split in given]
    sides = ["train"] * len(samples)
    groups = _groups(known)
    for has_picture in (True, False):
        # A hash of the records' names: the choice depends on neither the order nor the machine.
        some = [group for group in groups if bool(samples[group[0]].images) == has_picture]
        some.sort(key=lambda group: blake2b(min(samples[i].id for i in group).encode()).digest())
        wanted = min(2000, max(1, round(sum(map(len, some)) / 10)))
        for group in some[:-1]:
            if wanted <= 0:
                break
            wanted -= len(group)
            for i in group:
                sides[i] = "val"
    if "val" not in sides:
        raise UserError(f"{name}: all records share one picture, so none can be held out; add other pictures.")
    return sides


def on_one_side(records: Records, other: Records) -> list[tuple[Sample, str]]:
    """Those with one picture, each on the side on which `other` has that picture, if it has it: copies under two names are one."""
    known = {content(record): split for split in SPLITS for record in other.listed(split)}
    return [(record, known.get(content(record), split)) for split in SPLITS for record in records.listed(split)]


def content(record: Sample) -> bytes:
    return blake2b(record.images[0].read_bytes(), digest_size=16).digest()


def _groups(known: Sequence[set]) -> list[list[int]]:
    """Numbers of the records that are linked by a picture, directly or through others (union-find)."""
    leader = list(range(len(known)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first_with: dict[object, int] = {}
    for i, pictures in enumerate(known):
        for picture in pictures:
            leader[find(i)] = find(first_with.setdefault(picture, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(known)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())
