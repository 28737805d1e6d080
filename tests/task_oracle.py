"""The oracle of InstructBLIP's tasks and Flamingo's pages, which shares no code with them: it takes a wording off and judges the rest."""

import re

from scene_oracle import CORNERS, check_conversation, in_short, judge, meant, read, seen_from

from nanovlm.data.sample import Sample, Turn

BEFORE = ("question: ", "look at the picture and say: ", "given the picture, ", 'the question is "', "q: ")
BEHIND = (" answer:", " short answer:", " answer in a word or two.", " be brief.", '" what is the answer?', " a:", " the short answer is")
WORDED = re.compile(f"(?:{'|'.join(map(re.escape, BEFORE))})?(.*?[?.])(?:{'|'.join(map(re.escape, BEHIND))})?")
FRUIT = {"red": "cherry", "green": "lime", "blue": "blueberry", "yellow": "banana", "purple": "grape", "white": "coconut"}
ANGLES = {"circle": "none", "triangle": "three", "square": "four", "diamond": "four", "star": "ten", "cross": "twelve"}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WHERE = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
NUMBERS = ("no", "one", "two", "three", "four")


def bare(question: str) -> str:
    """Without what a wording puts around it."""
    return WORDED.fullmatch(question)[1]


def check_task(sample: Sample) -> str:
    """The answer follows from what is told; returns the kind."""
    told = [read(text) for text in sample.told[0].split(" then ")]
    (turn,) = sample.turns
    assert turn.question.startswith("<image>\n") and len(sample.told) == 1
    question = turn.question.removeprefix("<image>\n")
    if turn.kind == "clips":
        return check_clip(Turn(question, turn.answer, turn.kind), told)
    (truth,) = told
    assert turn.kind == "asking" or truth == read(sample.references[0])  # of "asking" all right questions are references
    if seen := re.match(r"ocr tokens: (\w+)\. ", question):
        assert {"text": seen[1]} in truth.values(), "OCR reads what is written"
        question = question.removeprefix(seen[0])
    kind = turn.kind.removesuffix("_text")
    CHECKS[kind](question, turn.answer, truth)
    return kind


def check_clip(turn: Turn, frames: list[dict]) -> str:
    """One thing, which stands in one corner first, and from some frame on in the one beside it."""
    cells = [next(iter(frame)) for frame in frames]
    assert len(frames) == 4 and all(len(frame) == 1 for frame in frames)
    assert len({tuple(sorted(thing.items())) for frame in frames for thing in frame.values()}) == 1, "it is the same thing"
    first, last = cells[0], cells[-1]
    changes = [number for number in range(1, 4) if cells[number] != cells[number - 1]]
    assert len(changes) == 1 and first != last
    shape = frames[0][first]["shape"]
    at = {cell: (not left, not top) for (left, top), cell in CORNERS.items()}  # column, row
    moved = tuple(b - a for a, b in zip(at[first], at[last]))
    right = {f"which way does the {shape} move?": next(way for way, step in WAYS.items() if step == moved),
             f"where is the {shape} at the end?": last, f"where was the {shape} at first?": first}
    assert right[bare(turn.question)] == turn.answer
    return "clips"


def caption(question: str, answer: str, truth: dict) -> None:
    assert read(answer) == truth


def with_options(question: str, answer: str) -> str:
    """The question before the options, of which the answer is one and all differ."""
    asked, options = re.fullmatch(r"question: (.+) options: (.+)\. short answer:", question).groups()
    named = dict(re.findall(r"\(([abc])\) ([\w ]+?)(?= \(|$)", options))
    assert list(named) == list("abc")[:len(named)] and 2 <= len(set(named.values())) == len(named) and answer in named.values()
    return asked


def reasoning(question: str, answer: str, truth: dict) -> None:
    if "options:" in question:
        assert judge(with_options(question, answer), truth, None)[0] == answer
    elif found := re.search(r"the (\w+) is (left of|right of|above|below) the (\w+)\.", question):
        assert re.sub(re.escape(found[0]), "…", question) in ("is this true? …", "true of the picture? …", "… is that right?")
        assert answer == ("yes" if seen_from([found[1], found[3]], truth) == WHERE[found[2]] else "no")
    else:
        found = re.fullmatch(r"what (colour|size) is the (\w+) that is (left of|right of|above|below) the (\w+)\?", bare(question))
        assert seen_from([found[2], found[4]], truth) == WHERE[found[3]]
        assert answer == truth[meant(f"the {found[2]}", truth)][found[1]]


def questions(question: str, answer: str, truth: dict) -> None:
    assert judge(bare(question), truth, None)[0] == answer


def knowledge(question: str, answer: str, truth: dict) -> None:
    asked = with_options(question, answer) if "options:" in question else bare(question)
    found = re.fullmatch(r"how many corners has (the [\w ]+)\?|which fruit has the colour of (the [\w ]+)\?", asked)
    thing = truth[meant(found[1] or found[2], truth)]
    assert answer == (ANGLES[thing["shape"]] if found[1] else FRUIT[thing["colour"]])
    assert thing["shape" if found[1] else "colour"] not in asked, "the name gives it away"


def asking(question: str, answer: str, truth: dict) -> None:
    """The answer is a question, which has the answer that is given."""
    given = re.fullmatch(r"answer: (.+)\. ask for it\.|ask a question about the picture whose answer is: (.+)|"
                         r'which question has the answer (.+)\?|the answer is "(.+)"\. what was the question\?|'
                         r"make a question that (.+) answers\.|question for the answer (.+):", question)
    assert judge(answer, truth, None)[0] == next(filter(None, given.groups()))


def dialogue(question: str, answer: str, truth: dict) -> None:
    asked, said, then = re.fullmatch(r"dialogue: (.+\?) (.+)\. question: (.+)", question).groups()
    check_conversation([Turn(asked, said), Turn(then, answer, "follow_up")], truth)
    assert answer not in f"{asked} {said}"


def classes(question: str, answer: str, truth: dict) -> None:
    text = re.fullmatch(r"on it is written: (.+) is that so\?|a picture with the text: (.+) do they fit\?", question)
    ((cell, thing),) = read(text[1] or text[2]).items()
    assert answer == ("yes" if truth.get(cell) == thing else "no")


def llava(question: str, answer: str, truth: dict) -> None:
    if question == "tell me all about the picture.":
        assert read(answer) == truth
    elif question == "are there more large or more small objects?":
        large, small = (sum(thing.get("size") == size for thing in truth.values()) for size in ("large", "small"))
        parts = (f"{NUMBERS[n]} {size} object{'' if n == 1 else 's'}" for n, size in ((large, "large"), (small, "small")))
        end = "There are as many of both." if large == small else f"More are {'large' if large > small else 'small'}."
        assert answer == f"{' and '.join(parts)}. {end}"
    else:
        assert judge(question.removeprefix("in a sentence, "), truth, None)[0] == in_short(answer) and question.startswith("in a sentence, ")


CHECKS = {"caption": caption, "reasoning": reasoning, "questions": questions, "knowledge": knowledge, "reading": questions,
          "asking": asking, "dialogue": dialogue, "classes": classes, "llava": llava}


def check_names(sample: Sample) -> dict[str, str]:
    """On a page each thing has one name and each name one thing; returns what each means."""
    assert all(turn.question == "<image>" for turn in sample.turns) and len(sample.told) == len(sample.turns)
    meant_here: dict[str, str] = {}
    for thing, turn in zip(sample.told, sample.turns):
        assert meant_here.setdefault(thing, turn.answer) == turn.answer, "a name changes on its page"
    assert len(set(meant_here.values())) == len(meant_here), "two things of one name"
    return meant_here


def check_shots(sample: Sample) -> str:
    """Each question is answered by what is told in its own place; returns the kind."""
    assert len(sample.told) == len(sample.turns)
    for text, turn in zip(sample.told, sample.turns):
        truth, question = read(text), turn.question.removeprefix("<image>")
        assert turn.question.startswith("<image>") and "<image>" not in question
        assert bool(question) == (turn.kind != "caption")
        check_conversation([Turn(question, turn.answer, turn.kind)], truth)
    return sample.turns[-1].kind
