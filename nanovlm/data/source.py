"""What training and evaluation ask of a source of data, be it the embedded world or somebody's own files.

    source.look(diet, real, n) ───────► a few held-out samples of what a stage learns from
    source.exams(names) ──────────────► [Exam, …] ──► evaluate.measure ──► figures, each beside its controls
    source.galleries() ───────────────► pictures and texts that are to find each other
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nanovlm.data.sample import Sample

# kinds whose answers are not compared word by word, and how they are (evaluate/judges.py)
JUDGED_BY = {"grounding": "box", "science": "letter", "science_text": "letter", "caption": "exact", "task/captions": "exact",
             "task/signs": "exact", "task/asking": "exact"}
ASKED_IN = ("answers", "mixture", "science")  # the exams that ask for answers, each in a view of its own
ONE_WORD = 8  # tokens for an answer of one word
# tokens for an answer: science's letter comes last
ROOM = {"science": 1024, "science_text": 1024, "direction": ONE_WORD, "direction_30": ONE_WORD}


@dataclass(frozen=True)
class Exam:
    """Questions of one kind; the last turn of each sample is to be judged."""

    name: str  # stands in the figure's name, vqa_accuracy/colour; "" where there is one figure only
    samples: Sequence[Sample]
    judges: tuple[str, ...] = ("answer",)  # see evaluate/judges.py
    ranked: bool = False  # a turn that has `options` is answered with the likeliest of them
    room: int = 64  # tokens of an answer


def exam_view(names: Sequence[str]) -> str:
    """How a stage's exams ask, whatever it learns from."""
    return next((name for name in names if name in ASKED_IN), "answers")


def exam_of(kind: str, samples: Sequence[Sample]) -> Exam:
    return Exam(kind, samples, (JUDGED_BY.get(kind, "answer"),), room=ROOM.get(kind, Exam.room))


def task_exam(held_out: bool, group: str, samples: Sequence[Sample]) -> Exam:
    """One of InstructBLIP's groups of tasks (§2.2); where there are answers to choose from, the likeliest is taken (§2.5)."""
    return Exam(f"held_{'out' if held_out else 'in'}/{group}", samples, ("task",), ranked=True)


def caption_exam(samples: Sequence[Sample]) -> Exam:
    return Exam("", samples, ("exact", "cider"))


class Source(Protocol):
    name: str
    skipped: list[tuple[str, str]]  # records that were left out, and why

    def texts(self) -> list[str]:
        """What a tokenizer is trained on."""

    def look(self, diet: dict[str, float], real: str, n: int) -> list[Sample]:
        """Up to n held-out samples of what a stage learns from: of the world's data sets by weight, or of a person's records."""

    def exams(self, names: Sequence[str], n: int = 0) -> list[Exam]:
        """What a stage is judged by (Stage.evaluate), n questions of a kind, or as many as there should be."""

    def galleries(self) -> list[list[Sample]]:
        """Lists of held-out pictures with a caption each, to be found again among their like."""

    def noisy(self) -> list[Sample]:
        """Held-out pictures with texts of which some are wrong, and what is wrong as label; () where nobody knows."""

    def notes(self, figures: dict[str, dict[str, float]] | None) -> list[str]:
        """What a reader should know before believing the figures, in whole sentences; None: nothing was asked about this source."""
