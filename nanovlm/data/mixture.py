"""Several data sets of somebody's own, mixed for instruction tuning: a JSON file that says which, and the source that they make.

"InstructBLIP" (2305.06500) §2.2 and §2.4: some sets are learned from, others only asked about; small ones come more often than by size.

    {"mixture": {"OKVQA": {"data": "okvqa", "factor": 2},
                 "emoji": {"data": "emoji/captions.jsonl", "group": "captioning"},
                 "kinds": {"data": "emoji/captions.jsonl", "group": "image QA", "question": "What kind of thing is it?", "answer": "group"},
                 "clothes": {"data": "clothes/captions.jsonl", "group": "classification", "held_out": true}},
     "sampling": "sqrt"}

    data               any file or folder that formats.py reads, relative to the mixture's folder
    group              one of the eleven, which tells how a record is asked (templates.py); the paper's 26 sets have theirs (datasets.py)
    held_out           it is not learned from, only asked: all of its records, or where "split" is "val" in some, these alone;
                       not given: as the paper has it, sets of one's own are learned from
    factor             by hand, on top of the weight that its size gives
    question, answer   a question about every record, and the record's field that answers it: a text, or a list of all that is right
    templates          wordings in the place of the group's
    ocr                a table of the words in the pictures, {"data": [{"image_id": …, "ocr_tokens": […]}]}

    held-in sets ─► train splits, drawn by weight (training/batches.py: Balanced)      exams held_in/<name>, held_out/<name>
                └─► pairs, captions, texts for the stages before: whatever has a caption of its own, each picture and caption once
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanovlm.data.datasets import SETS, rows_of
from nanovlm.data.order import shuffled
from nanovlm.data.records import SPLITS, TASKS, Records
from nanovlm.data.sample import Sample
from nanovlm.data.source import Exam, task_exam
from nanovlm.data.templates import CAPTIONING, GROUPS, LLAVA, check_template, filled
from nanovlm.errors import UserError

SAMPLING = ("proportional", "sqrt", "uniform")
KEYS = {"data": (str,), "group": (str,), "held_out": (bool,), "factor": (int, float), "question": (str,), "answer": (str,), "templates": (list,),
        "ocr": (str,)}
LARGEST = 1 << 20  # bytes of a mixture file; larger tables are not read twice
CLASSES = "What is it?"  # of a set of classes the question, where it gives none


@dataclass(frozen=True)
class Entry:
    """One set of a mixture, as the file describes it."""

    name: str
    data: Path
    group: str
    held_out: bool = False
    factor: float = 1.0
    question: str = ""
    answer: str = ""
    templates: tuple[str, ...] = ()
    ocr: dict[str, list[str]] = field(default_factory=dict)

    @property
    def read(self) -> Callable[[dict], list[dict]] | None:
        return SETS[self.name].read if self.name in SETS else None

    def rows(self, row: object) -> list[dict]:
        """A row of the file becomes those that this set asks about."""
        if not isinstance(row, dict):
            return [row]  # whoever makes a sample of it complains
        row = row | ({"ocr": self.ocr[str(row["image_id"])]} if str(row.get("image_id")) in self.ocr else {})
        return [self._asked(one) for one in (rows_of(self.read, row) if self.read else [row])]

    def _asked(self, row: dict) -> dict:
        rest = {key: value for key, value in row.items() if key != "conversations"}
        if self.answer:
            if row.get(self.answer) in (None, "", []):
                raise UserError(f'field "{self.answer}" is missing or empty, which answers "{self.question}" in the set {self.name}')
            return rest | {"question": self.question, "answer": row[self.answer]}
        if self.group in (*CAPTIONING, LLAVA) or {"question", "conversations"} & set(row):
            return row
        if self.group == "classification" and (row.get("label") or row.get("caption")):
            return rest | {"question": self.question or CLASSES, "answer": row.get("label") or row["caption"]}
        raise UserError(f'it has no question, which the group {self.group} needs; give the set {self.name} a "question" and, as "answer", '
                        "the name of the field that answers it")

    def finished(self, samples: Iterable[Sample]) -> list[Sample]:
        """Its samples, told how they are asked; where it is ranked and they bring none, all answers of the set are to choose from."""
        samples = [replace(sample, task=replace(sample.task, group=self.group, templates=self.templates)) for sample in samples]
        if self.ocr and not any("ocr" in dict(sample.task.fields) for sample in samples):
            raise UserError('the table that field "ocr" names has words for none of its records; a record\'s "image_id" must stand in it')
        for sample in samples if self.templates else ():
            known = dict(sample.task.fields) | ({"question": "?", "answer": "."} if sample.turns else {})
            for template in self.templates:
                try:
                    filled(template, known)
                except UserError as error:
                    raise UserError(f"{sample.id}: {error}") from error
        if not (self.name in SETS and SETS[self.name].ranked or self.group == "classification"):
            return samples
        answers = tuple(sorted({turn.answer for sample in samples for turn in sample.turns if not turn.options}))
        if len(answers) == 1:
            raise UserError(f'all of its records have the answer "{answers[0]}", so there are no candidates to rank; add other classes')
        return [replace(sample, turns=tuple(replace(turn, options=turn.options or answers) for turn in sample.turns)) for sample in samples]


@dataclass(frozen=True)
class Plan:
    """What a mixture file says."""

    name: str
    entries: tuple[Entry, ...]
    sampling: str


def plan(path: str | Path) -> Plan | None:
    """None where the path is no mixture."""
    path = Path(path)
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > LARGEST:
        return None
    twice: list[str] = []

    def once(pairs: list[tuple[str, object]]) -> dict:
        twice.extend(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        return dict(pairs)

    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError):
        return None  # whoever reads tables complains
    if not isinstance(table, dict) or "mixture" not in table:
        return None
    if twice:
        raise UserError(f'{path}: the name "{twice[0]}" stands twice in one place, and only one of the two would be read; rename or remove one.')
    if unknown := [name for name in table if name not in ("mixture", "sampling")]:
        raise UserError(f'{path}: there is no field "{unknown[0]}"; the fields are mixture, sampling.')
    sets, sampling = table["mixture"], table.get("sampling", "sqrt")
    if not isinstance(sets, dict) or not sets:
        raise UserError(f'{path}: field "mixture" holds no data set; write {{"mixture": {{"COCO Caption": {{"data": "coco/captions.json"}}}}}}.')
    if sampling not in SAMPLING:
        raise UserError(f'{path}: field "sampling" is {sampling!r}; it must be one of {", ".join(SAMPLING)}.')
    entries = tuple(_entry(path, name, said) for name, said in sets.items())
    if all(entry.held_out for entry in entries):
        raise UserError(f'{path}: all of its data sets are held out, so there is nothing to learn from; add one that is not.')
    return Plan(path.stem, entries, sampling)


def _entry(file: Path, name: str, said: object) -> Entry:
    where, known = f"{file}, set {name}", SETS.get(name)
    if "/" in name or not name.strip():
        raise UserError(f'{where}: a set\'s name must not be empty, nor hold "/", which divides the names of figures; rename it.')
    if not isinstance(said, dict) or not isinstance(said.get("data"), str):
        raise UserError(f'{where}: field "data" is missing; write {{"data": "folder or file"}}.')
    for key, value in said.items():
        if key not in KEYS:
            raise UserError(f'{where}: there is no field "{key}"; the fields are {", ".join(KEYS)}.')
        if type(value) not in KEYS[key]:  # to isinstance, true is a number
            raise UserError(f'{where}: field "{key}" is {value!r}, which is not what stands there; see nanovlm/data/mixture.py.')
    if known is None and "group" not in said:
        raise UserError(f'{where}: it is none of the paper\'s data sets ({", ".join(SETS)}), so its "group" is needed: one of {", ".join(GROUPS)}.')
    group, factor = said.get("group", known and known.group), said.get("factor", 1)
    if group not in GROUPS:
        raise UserError(f'{where}: field "group" is {group!r}; it must be one of {", ".join(GROUPS)}.')
    if not 0 < factor < float("inf"):
        raise UserError(f'{where}: field "factor" is {factor!r}; it must be a number above 0.')
    if "answer" in said and "question" not in said:
        raise UserError(f'{where}: field "answer" names what answers a question, and there is no field "question".')
    if said.get("question") and not said.get("answer") and group != "classification":
        raise UserError(f'{where}: field "question" asks about every record; name in field "answer" what answers it.')
    _check_templates(where, group, said.get("templates"))
    return Entry(name, file.parent / said["data"], group, said.get("held_out", known is not None and known.held_out), factor,
                 said.get("question", ""), said.get("answer", ""), tuple(said.get("templates", ())), _read_words(file.parent, where, said.get("ocr")))


def _check_templates(where: str, group: str, templates: list | None) -> None:
    if templates is None:
        return
    if not templates or not all(isinstance(template, str) and template.strip() for template in templates):
        raise UserError(f'{where}: field "templates" must be a list of texts, none of them empty.')
    if group == LLAVA:
        raise UserError(f'{where}: the group {LLAVA} is asked as it is written, without templates; remove field "templates".')
    try:
        for template in templates:
            check_template(template, group)
    except UserError as error:
        raise UserError(f"{where}: {error}.") from error


def _read_words(folder: Path, where: str, name: str | None) -> dict[str, list[str]]:
    """Picture → the words in it."""
    if name is None:
        return {}
    try:
        table = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        found = {str(one["image_id"]): one["ocr_tokens"] for one in table["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: field "ocr" names {name}, which cannot be read as {{"data": [{{"image_id", "ocr_tokens"}}]}} ({error}).') from error
    for picture, words in found.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{where}: field "ocr" names {name}, where "ocr_tokens" of {picture} is no list of texts.')
    return found


class Mixed:
    """A source of several sets, with the interface of Records; what one set holds out, no other learns from."""

    def __init__(self, plan: Plan, sets: dict[str, Records]):
        """sets: of each entry of the plan, by name."""
        self.name, self.sampling, self.labels = plan.name, plan.sampling, ()
        self.sets, self.entries = sets, {entry.name: entry for entry in plan.entries if entry.name in sets}
        self.factors = {name: entry.factor for name, entry in self.entries.items()}
        self.held_in = {name: sets[name] for name, entry in self.entries.items() if not entry.held_out}
        self._hold_out()
        self._found: dict[tuple[str, str], list[tuple[str, int]]] = {}

    def _hold_out(self) -> None:
        """Again and again, for a record that is moved to the held-out side may show other pictures too."""
        known, asked = set(), set().union(*(records.held_pictures() for records in self.sets.values()))
        while asked != known:
            known = asked
            for records in self.held_in.values():
                records.hold_out(known)
            asked = known.union(*(records.held_pictures() for records in self.held_in.values()))
        for name, records in self.held_in.items():
            if not records.size("instructions", "train"):
                raise UserError(f'{self.name}, set {name}: nothing is left to learn from, as its pictures are all held out, by other sets '
                                'too; give those other pictures, or mark with "split": "val" which of their records are to be asked.')

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [(f"{name}, {record}", reason) for name, records in self.sets.items() for record, reason in records.skipped]

    @property
    def few(self) -> bool:
        return any(records.few for records in self.sets.values())

    def texts(self) -> list[str]:
        return [text for records in self.held_in.values() for text in records.texts()]

    # ---- all held-in sets as one, in the views of the stages before

    def places(self, view: str, split: str) -> list[tuple[str, int]]:
        """(set, index) of each sample. Pairs and captions are those of pictures that have one of their own, where there are any."""
        if (view, split) not in self._found:
            every = [(name, i) for name, records in self.held_in.items() for i in range(records.size(view, split))]
            self._found[view, split] = self._captioned(view, split) or every if view in ("pairs", "captions", "pages") else every
        return self._found[view, split]

    def _captioned(self, view: str, split: str) -> list[tuple[str, int]]:
        found, met = [], set()
        for name, records in self.held_in.items():
            entries = records.entries(view, split)
            for i, ((record, caption), known) in enumerate(zip(entries, records.known_by([record for record, _ in entries]))):
                own = bool(record.references) or not record.turns
                if own and (frozenset(known), caption) not in met:
                    met.add((frozenset(known), caption))
                    found.append((name, i))
        return found

    def size(self, view: str, split: str) -> int:
        return len(self.places(view, split))

    def sample(self, view: str, split: str, index: int) -> Sample:
        name, place = self.places(view, split)[index]
        return self.of(name, view, split, place)

    def of(self, name: str, view: str, split: str, index: int) -> Sample:
        """A sample of one set; an index beyond its size comes back to the same records, asked in other words."""
        sample = self.sets[name].sample(view, split, index)
        return replace(sample, id=f"{name}, {sample.id}")

    def order(self, view: str, key: str) -> Sequence[int]:
        return shuffled(self.size(view, "train"), key)

    def captions(self, view: str) -> Iterator[tuple[int, str]]:
        return enumerate(self.sets[name].entries(view, "train")[i][1] for name, i in self.places(view, "train"))

    def lengths(self, view: str) -> list[int]:
        every = {name: records.lengths(view) for name, records in self.held_in.items()}
        return [every[name][i] for name, i in self.places(view, "train")]

    def listed(self, split: str) -> list[Sample]:
        return [record for records in self.held_in.values() for record in records.listed(split)]

    def leave_out(self, view: str, why: Callable[[Sample], str | None], splits: Sequence[str] = SPLITS) -> None:
        for name, records in self.sets.items():
            held_out = name not in self.held_in  # of which only the exams are read
            if not held_out or view == "instructions" and "val" in splits:
                records.leave_out(view, why, ("val",) if held_out else splits)
        self._found.clear()

    # ---- what is asked

    def look(self, diet: dict[str, float], real: str, n: int) -> list[Sample]:
        return [self.sample(real, "val", i) for i in range(min(n, self.size(real, "val")))]

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        """tasks: one of each set, held in or held out. All others are asked of the held-in sets, under their names."""
        if "tasks" in names:
            asked = {name: records.exam(n or TASKS, "instructions") for name, records in self.sets.items()}
            return [task_exam(name not in self.held_in, name, samples) for name, samples in asked.items() if samples]
        return [replace(exam, name=f"{name}/{exam.name}".rstrip("/")) for name, records in self.held_in.items() for exam in records.exams(names, n)]

    def galleries(self) -> list[list[Sample]]:
        return [row for name, records in self.held_in.items() if self.entries[name].group in CAPTIONING for row in records.galleries()]

    def noisy(self) -> list[Sample]:
        return []

    def notes(self, figures: dict[str, dict[str, float]] | None) -> list[str]:
        return [f"{name}: {note}" for name, records in self.sets.items() for note in records.notes(None if figures is None else {})]
