"""A sample: what every source of data hands out, whatever it was read from or drawn as.

    Sample("scenes/train/7", images=(picture,), turns=(Turn("<image>\\nwhat colour is the square?", "red", "colour"),))

A mark "<image>" in a question stands for a picture, and the pictures come in the order of their marks. A pair for contrastive
learning is a sample with one picture and a caption; a text without pictures is a sample with turns alone.
"""

from dataclasses import dataclass

IMAGE = "<image>"
VIEWS = ("pairs", "captions", "described", "instruct", "mixture", "science", "text", "told")  # how a source shows itself
TALKS = ("instruct", "mixture", "science")  # the views whose samples are conversations about pictures, as exams are
TEXTS = ("text", "told")  # the views without pictures, which a language model reads before it sees


def unmarked(text: str) -> str:
    """A text to be put into a question: an "<image>" that somebody wrote in it stands for no picture."""
    return text.replace(IMAGE, "< image>")


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `question` may hold "<image>" marks, `kind` names the kind of question."""

    question: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """What a source hands out, whatever it was read from; `id` names the record in messages."""

    id: str
    images: tuple = ()  # PIL images (RGB) or paths, in the order of the "<image>" marks
    caption: str = ""
    references: tuple[str, ...] = ()  # all captions that count as right
    negatives: tuple[str, ...] = ()  # captions that are wrong in one point
    turns: tuple[Turn, ...] = ()
    label: str = ""
    format: str = ""  # of its conversation, where it is not the stage's
    form: str = ""  # "short": its answers are of a word or two, and in a mixture that has to be said

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that count as right."""
        return self.references or (self.caption,)
