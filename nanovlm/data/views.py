"""The views in which a stage reads a person's records (Stage.real): one record, said in the way that the stage asks for.

                                       images        text
    pairs          for contrast        one           the caption
    captions       for alignment       one           "<image>" → the caption
    conversations  for instruction     any number    the conversation, or "<image>\\nwhat is in the picture?" → the caption
    prompted       the same            any number    the same, and how to answer, see prompts.py
    texts          for the LM          none          the same, with the caption told where the image would stand
    pages          for Flamingo        any number    a document; a conversation as one text; a picture before its caption
    instructions   for InstructBLIP    any number    the record in one of the wordings of its group of tasks, see templates.py

Documents are not read as conversations: whoever is asked nothing cannot answer. One with a single picture is a pair, too, of which its
first line is the caption. Only pages and instructions show a whole clip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from nanovlm.data.clips import Picture, still
from nanovlm.data.prompts import CAPTION, SHORT, prompted
from nanovlm.data.sample import IMAGE, Sample, Turn, page_turns
from nanovlm.data.templates import instruction

QUESTIONS = ("what is in the picture?", "what does the picture show?", "what do you see?", "describe the picture.")
PAGES = "pages"  # the view, and the format of documents


def as_view(record: Sample, caption: str, view: str, rng: Random) -> Sample:
    """The record as one of the views shows it, with `caption` for its text where it is no conversation."""
    if view == "pages" or (view == "texts" and record.format == PAGES):
        return replace(record, caption=caption, turns=_page(record, caption, view, rng), format=PAGES if record.turns else "pair")
    references = record.references
    if view == "instructions":
        turns, references = instruction(record, rng)
        caption = caption if record.turns else turns[0].answer
    elif view == "texts" and record.task.group:  # what is told is what is learned
        turns, _ = instruction(record if record.turns else replace(record, references=(caption,)), rng)
    elif view == "pairs":
        turns = ()
    elif view == "captions":
        turns = (Turn(IMAGE, caption, "caption"),)
    else:
        turns = record.turns or (Turn(f"{IMAGE}\n{rng.choice(QUESTIONS)}", caption, "caption"),)
    if view == "prompted":
        turns = prompted(turns, CAPTION if not record.turns else SHORT if record.form == "short" else "")
    told = (caption,) * sum(turn.question.count(IMAGE) for turn in turns) if view == "texts" else ()
    return replace(record, caption=caption, references=references, turns=turns, told=told, format="" if record.format == PAGES else record.format)


def _page(record: Sample, caption: str, view: str, rng: Random) -> tuple[Turn, ...]:
    """What stands on the page; without pictures, what is left of a document. Flamingo App. A.3: half of the captions open with a blank."""
    if record.format == PAGES:
        return record.turns if view == "pages" else page_turns(turn.answer for turn in record.turns if turn.answer)
    if not record.turns:
        return (Turn(IMAGE, rng.choice(("", " ")) + caption, "caption"),)
    return tuple(Turn(IMAGE * turn.question.count(IMAGE), f"{turn.question.replace(IMAGE, '').strip()} {turn.answer}".strip(), turn.kind)
                 for turn in record.turns)


def met_as(record: Sample, view: str, split: str) -> tuple[str, ...]:
    """The texts with which a view meets the record in an epoch: a picture with five captions five times, in val once; () for none of it."""
    asks = view in ("conversations", "prompted", "instructions")
    if view in ("pairs", "captions") and len(record.images) != 1 or asks and record.format == PAGES:
        return ()
    # an instruction takes any of the captions, by chance: the size of its set is that of its records
    return record.references if split == "train" and not record.turns and view != "instructions" else (record.caption,)


def seen_in(view: str, picture: Picture) -> Picture:
    """Pages and instructions show a clip, all other views its first frame."""
    return picture if view in (PAGES, "instructions") else still(picture)


class Longest(Random):
    """Of several questions about a picture the longest, so that what fits now fits whatever is asked later."""

    def choice(self, options: Sequence) -> object:
        return max(options, key=lambda option: len(str(option)))


def ever_shorter(text: str) -> Iterator[str]:
    """The text, half of it, a quarter, …, cut between words where it has several."""
    yield text
    while len(text) > 1:
        half = text[:len(text) // 2]
        text = half.rpartition(" ")[0] or half
        yield text
