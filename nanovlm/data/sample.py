"""A sample: what every source of data hands out, whatever it was read from or drawn as.

    Sample("scenes/train/7", images=(picture,), turns=(Turn("<image>\\nwhat colour is the square?", "red", "colour"),))

A mark "<image>" in a question stands for a picture, and the pictures come in the order of their marks. A pair for contrastive
learning is a sample with one picture and a caption; a text without pictures is a sample with turns alone. Who cannot see is told
what the pictures would show: the words in `told` stand where the pictures would.

A page ("Flamingo", 2204.14198, Fig. 7) is the sample whose turns are its pieces in reading order, in the format "pages":

    title <picture> text 1 <picture> text 2      Turn("", "title"), Turn(IMAGE, "text 1"), Turn(IMAGE, "text 2")
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from PIL import Image

IMAGE = "<image>"
REAL = ("pairs", "captions", "conversations", "prompted", "texts", "pages", "instructions")  # what a stage may read of a person's records, see records.py


def unmarked(text: str) -> str:
    """A text to be put into a question: an "<image>" that somebody wrote in it stands for no picture."""
    return text.replace(IMAGE, "< image>")


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `question` may hold "<image>" marks, `kind` names the kind of question."""

    question: str
    answer: str
    kind: str = ""
    options: tuple[str, ...] = ()  # the answers to choose from, where the best of them is to be ranked first


@dataclass(frozen=True)
class Task:
    """How a record is asked as an instruction, see templates.py."""

    group: str = ""  # of the eleven; "" where nobody has said
    templates: tuple[str, ...] = ()  # of its own data set, in the place of the group's
    answers: tuple[str, ...] = ()  # to its question: all that are right
    fields: tuple[tuple[str, str], ...] = ()  # what else may stand in a template: ("ocr", "stop, 4th") and the like


@dataclass(frozen=True)
class Sample:
    """What a source hands out, whatever it was read from; `id` names the record in messages."""

    id: str
    images: tuple = ()  # in the order of the "<image>" marks: PIL images (RGB) or paths, or tuples of them, which are the frames of a clip
    caption: str = ""
    references: tuple[str, ...] = ()  # all captions that count as right
    negatives: tuple[str, ...] = ()  # captions that are wrong in one point
    turns: tuple[Turn, ...] = ()
    told: tuple[str, ...] = ()  # instead of pictures: the words that stand in the marks' places
    label: str = ""
    format: str = ""  # of its conversation, where it is not the stage's
    form: str = ""  # "short": its answers are of a word or two, and in a mixture that has to be said
    task: Task = Task()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that count as right."""
        return self.references or (self.caption,)


def choosing(sample: Sample, options: tuple[str, ...]) -> Sample:
    """Its last turn with these answers to choose from."""
    *before, last = sample.turns
    return replace(sample, turns=(*before, replace(last, options=options)))


# ---- controls for pages of examples (Flamingo): do their pictures count, or are the words enough?

BLANK = Image.new("RGB", (48, 48), (123, 117, 104))  # the mean colour of CLIP's training pictures: zeros, once it is normalised


def without_pictures(sample: Sample) -> Sample:
    """The tags stay, and every picture and frame is blank."""
    return replace(sample, images=tuple((BLANK,) * len(image) if isinstance(image, tuple) else BLANK for image in sample.images))


def text_only(sample: Sample) -> Sample:
    """Pictures and tags are gone from all turns but the last that has any: the examples are words, the question keeps its picture."""
    marks = [turn.question.count(IMAGE) for turn in sample.turns]
    last = max((i for i, n in enumerate(marks) if n), default=0)
    turns = tuple(turn if i >= last else replace(turn, question=turn.question.replace(IMAGE, "")) for i, turn in enumerate(sample.turns))
    return replace(sample, images=sample.images[sum(marks[:last]):], turns=turns)


CONTROLS = {"no images": without_pictures, "text only": text_only}


def page_turns(parts: Iterable[str | None], joint: str = "\n") -> tuple[Turn, ...]:
    """What stands on a page, in reading order and with None for each picture, as turns.

    Texts that follow each other become one: "<EOC>" stands before pictures and at the end of the page, nowhere else.
    """
    turns: list[Turn] = []
    for part in parts:
        if part is None:
            turns.append(Turn(IMAGE, ""))
        elif turns:
            turns[-1] = replace(turns[-1], answer=joint.join(filter(None, (turns[-1].answer, part))))
        else:
            turns.append(Turn("", part))
    return tuple(turns)
