"""An oracle of the embedded world that shares no code with it: it reads captions and questions as a person would.

`read` turns any caption or description back into facts, and `judge` answers any question from these facts alone; `check_sample`
judges a sample of any data set of talk, shown or told. Tasks and pages: task_oracle.py.
"""

import re
from dataclasses import replace

from nanovlm.data.prompts import CAPTION, GROUNDING, LETTER, PROMPTS, REGION, SHORT
from nanovlm.data.sample import Sample, Turn
from nanovlm.world.mixture import SENTENCE
from nanovlm.world.scene import CELLS, COLOURS, DIGITS, HELD_OUT, NUMBERS, SHAPES, SIZES, WORDS, Scene

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
HELD_OUT_NAMES = [f"{colour} {shape}" for colour, shape in HELD_OUT]


def read(text: str, told: frozenset = frozenset({"size", "colour", "shape"})) -> dict[str, dict[str, str]]:
    """Any caption or description -> {cell: facts of the thing there}, by looking at the words only.

    told: the facts of an object that this text tells.
    """
    found, waiting = {}, []  # a cell may be named before its thing or after it
    thing: dict[str, str] = {}
    for word in re.findall(r"top left|top right|bottom left|bottom right|left of|right of|\w+", text):
        if word in CELLS:
            waiting.append(word)
        for field, values in {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "text": DIGITS + WORDS + NUMBERS}.items():
            if word in values:
                assert field not in thing, f"{field} twice in {text!r}"
                thing[field] = word
        if waiting and set(thing) in (told, {"text"}):
            cell = waiting.pop()
            assert cell not in found, f"{cell} twice in {text!r}"
            found[cell], thing = thing, {}
    assert not waiting and not thing, f"something is left over in {text!r}"
    return found


def facts(scene: Scene) -> dict[str, dict[str, str]]:
    truth = {thing.cell: {"size": thing.size, "colour": thing.colour, "shape": thing.shape} for thing in scene.objects}
    return truth | ({scene.sign.cell: {"text": scene.sign.text}} if scene.sign else {})


def meant(name: str, truth: dict) -> str:
    """The one cell that "the red circle", "the circle", "the red object", "the word" ... can mean."""
    words = name.split()[1:]
    if words[:3] == ["object", "in", "the"]:
        fits = [cell for cell, thing in truth.items() if cell == " ".join(words[3:]) and "shape" in thing]
    elif words in (["word"], ["digit"], ["number"]):
        like = {"word": r"[A-Z]+", "digit": r"\d", "number": r"[1-9]\d"}[words[0]]
        fits = [cell for cell, thing in truth.items() if re.fullmatch(like, thing.get("text", ""))]
    else:
        wanted = [word for word in words if word != "object"]
        fits = [cell for cell, thing in truth.items() if "shape" in thing and all(w in thing.values() for w in wanted)]
    assert len(fits) == 1, f"{name!r} means {fits} in {truth}"
    return fits[0]


def judge(question: str, truth: dict, it: str | None) -> tuple[str, str | None]:
    """The right answer, and the cell of the object that "it" means from now on."""
    objects = {cell: thing for cell, thing in truth.items() if "shape" in thing}
    name = r"(the [\w ]+)"
    if found := re.fullmatch(r"and (?:what )?(colour|shape|size|where) is it\?", question):
        assert it is not None, "follow-up with nothing to follow"
        return (it if found[1] == "where" else truth[it][found[1]]), it
    if found := re.fullmatch(rf"what (colour|shape|size) is {name}\?|what is the (colour|shape) of {name}\?", question):
        cell = meant(found[2] or found[4], truth)
        return truth[cell][found[1] or found[3]], cell
    if found := re.fullmatch(rf"how big is {name}\?", question):
        cell = meant(found[1], truth)
        return truth[cell]["size"], cell
    if found := re.fullmatch(rf"(?:where is|in which corner is) {name}\?", question):
        cell = meant(found[1], truth)
        return cell, cell if cell in objects else None
    if found := re.fullmatch(r"how many (\w+ objects|\w+) are there\?", question):
        wanted = found[1].removesuffix("objects").strip()
        wanted = {"crosses": "cross"}.get(wanted, wanted.removesuffix("s"))
        return NUMBER_WORDS[sum(not wanted or wanted in thing.values() for thing in objects.values())], None
    if found := re.fullmatch(rf"on which side of {name} is {name}\?|seen from {name}, where is {name}\?", question):
        (landmark_row, landmark_column), (row, column) = (meant(n, truth).split() for n in found.groups() if n)
        assert (row == landmark_row) != (column == landmark_column), "two answers would be right"
        return (column if row == landmark_row else {"top": "above", "bottom": "below"}[row]), None
    if found := re.fullmatch(r"(?:is there|do you see) a ([\w ]+)\?", question):
        words = [word for word in found[1].split() if word != "object"]
        there = [cell for cell, thing in objects.items() if all(word in thing.values() for word in words)]
        return "yes" if there else "no", there[0] if len(there) == 1 else None
    if found := re.fullmatch(rf"(?:describe|tell me about) {name}\.", question):
        cell = meant(found[1], truth)
        thing = truth[cell]
        return f"{thing['size']} {thing['colour']} {thing['shape']}, {cell}", None
    if found := re.fullmatch(r"count ([\w ,]+)\.", question):
        looks = found[1].split(", ")
        fits = [sum(all(word in thing.values() for word in look.split()) for thing in objects.values()) for look in looks]
        return ", ".join(f"{look} {NUMBER_WORDS.get(n, 'none')}" for look, n in zip(looks, fits)) + ".", None
    if found := re.fullmatch(r"find ([\w ,]+)\.", question):
        cells = [f"{look} {meant(f'the {look}', truth)}" for look in found[1].split(", ")]
        return ", ".join(cells) + ".", None
    if found := re.fullmatch(r"sides of ([\w ,]+)\.", question):
        return ", ".join(f"{couple} {seen_from(couple.split(), truth)}" for couple in found[1].split(", ")) + ".", None
    if found := re.fullmatch(r"(colour|shape|size|position) of ([\w ,]+)\.((?:\n[A-D]\. [\w ]+)+)", question):
        named = dict(line.split(". ") for line in found[3].strip().split("\n"))
        assert len(set(named.values())) == len(named) and list(named) == list("ABCD")[:len(named)]
        cells = [(look, meant(f"the {look}", truth)) for look in found[2].split(", ")]
        values = [cell if found[1] == "position" else truth[cell][found[1]] for _, cell in cells]
        assert not any(value in look.split() for (look, _), value in zip(cells, values)), "the name gives it away"
        letters = {value: letter for letter, value in named.items()}
        return ", ".join(f"{look} {letters[value]}" for (look, _), value in zip(cells, values)) + ".", None
    if found := re.fullmatch(rf"which is (larger|smaller), {name} or {name}\?", question):
        sizes = {thing: truth[meant(thing, truth)]["size"] for thing in found.groups()[1:]}
        assert set(sizes.values()) == {"large", "small"}
        right = [thing for thing, size in sizes.items() if (size == "large") == (found[1] == "larger")]
        return right[0].removeprefix("the "), None
    assert question in ("what is written?", "what does the sign say?"), f"no person would understand {question!r}"
    return next(thing["text"] for thing in truth.values() if "text" in thing), None


def seen_from(words: list[str], truth: dict) -> str:
    """Of "red blue" or "red circle blue star": on which side of the second the first one is."""
    half = len(words) // 2
    (row, column), (other_row, other_column) = (meant(f"the {' '.join(w)}", truth).split() for w in (words[:half], words[half:]))
    assert (row == other_row) != (column == other_column), "two answers would be right"
    return column if row == other_row else {"top": "above", "bottom": "below"}[row]


def check_conversation(turns, truth: dict) -> str | None:
    """Every answer is right; returns the cell of the object that the last turn is about, if it is about one."""
    it = None
    for turn in turns:
        if turn.question == "take notes, colours aside.":
            without = {cell: {f: v for f, v in thing.items() if f != "colour"} for cell, thing in truth.items()}
            assert read(turn.answer, frozenset({"size", "shape"})) == without
            it = None
            continue
        if turn.kind in ("caption", "notes", "repeat"):
            assert read(turn.answer) == truth
            it = None
            continue
        answer, it = judge(turn.question, truth, it)
        assert turn.answer == answer, f"{turn} in {truth}"
    return it


# --- all ways to ask ---

SAID = {  # sentence → the short answer in it
    r"Yes, there is\.": "yes", r"No, there is not\.": "no", r"It is on this side: (\w+)\.": None, r"The sign says (\w+)\.": None,
    r"There (?:is|are) (\w+)\.": None, r"It is in the (top|bottom) (left|right)\.": None,
    r"It is a (large|small) (\w+ \w+) in the (\w+ \w+)\.": None, r"It is the (.+)\.": None, r"It is a (\w+)\.": None,
    r"It is (\w+)\.": None}
CORNERS = {(True, True): "top left", (False, True): "top right", (True, False): "bottom left", (False, False): "bottom right"}
LISTS = {"notes", "census", "places", "sides"}


def in_short(sentence: str) -> str:
    for pattern, answer in SAID.items():
        if found := re.fullmatch(pattern, sentence):
            if answer:
                return answer
            return ", ".join((" ".join(found.groups()[:2]), found[3])) if len(found.groups()) == 3 else " ".join(found.groups())
    raise AssertionError(f"{sentence!r} is no sentence of ours")


def boxed(box: str, truth: dict) -> dict[str, str]:
    """The thing in the cell where the box has its middle; the box is as large as it should be."""
    left, top, right, bottom = (float(x) for x in re.findall(r"\d\.\d\d", box))
    thing = truth[CORNERS[(left + right) / 2 < 0.5, (top + bottom) / 2 < 0.5]]
    assert 0 <= left < right <= 1 and (right - left > 0.36) == (thing["size"] == "large")
    return thing


def check_talk(name: str, turns: tuple[Turn, ...], truth: dict) -> str | None:
    """Every answer of this data set's talk is right, in the form that is asked for; no mark stands in the turns. As `check_conversation`."""
    first, *others = turns
    if name == "talk":
        return check_conversation(turns, truth)
    if name in ("short", "signs"):
        assert first.question.endswith(f"\n{SHORT}")
        return check_conversation([replace(first, question=first.question.removesuffix(f"\n{SHORT}")), *others], truth)
    if name == "sentences on demand":
        first, *others = turns
        assert first.question.endswith(f"\n{SENTENCE}") and not any(SENTENCE in turn.question for turn in others)
        name, turns = "sentences", [replace(first, question=first.question.removesuffix(f"\n{SENTENCE}")), *others]
    if name == "sentences":
        assert not any(prompt in turn.question for turn in turns for prompt in PROMPTS)
        return check_conversation([replace(turn, answer=in_short(turn.answer)) for turn in turns], truth)
    assert not others, "a batch is as long as its longest row"
    if name == "captions on demand":
        assert first.question == CAPTION and read(first.answer) == truth
    elif name in ("captions", "repeat"):
        assert first.question == {"captions": "", "repeat": "say it again."}[name] and read(first.answer) == truth
    elif name == "letters":
        asked, *choices, last = first.question.split("\n")
        named = dict(choice.split(". ") for choice in choices)
        assert last == LETTER and first.kind == "option" and list(named) == list("ABCD")[:len(named)]
        assert len(set(named.values())) == len(named) >= 2 and named[first.answer] == judge(asked, truth, None)[0]
    elif name in ("regions", "grounding"):
        asked, last = first.question.split("\n")
        box, phrase = (asked, first.answer) if name == "regions" else (first.answer, asked)
        thing = boxed(box, truth)
        assert last == {"regions": REGION, "grounding": GROUNDING}[name] and phrase == f"{thing['size']} {thing['colour']} {thing['shape']}"
    elif name == "box drills":
        looks = first.question.removeprefix("boxes of ").rstrip(".").split(", ")
        for look, (said, box) in zip(looks, re.findall(r"([a-z ,]+) (\[.*?\])", first.answer), strict=True):
            assert said.strip(", ") == look and set(look.split()) <= set(boxed(box, truth).values())
    elif name == "science":
        check_science(first, truth)
    else:  # a scene in which every name gives the answer away has no list of letters
        assert first.kind in {"drills": LISTS, "letter drills": LISTS | {"letters"}, "unnamed drills": {"notes"}}[name]
        check_conversation([first], truth)
    return None


def check_science(turn: Turn, truth: dict) -> None:
    """The reason names the right thing, the letter the right answer, and a context tells the scene."""
    question, context, options = turn.question.split("\n")
    assert context == "Context: N/A" or read(context.removeprefix("Context: ")) == truth
    size, colour, shape, cell, letter = re.fullmatch(
        r"There is a (\w+) (\w+) (\w+) in the (\w+ \w+)\. The answer is ([A-C])\.", turn.answer).groups()
    assert {"size": size, "colour": colour, "shape": shape}.items() <= truth[cell].items()
    named = dict(re.findall(r"\(([A-C])\) ([a-z ]+?)(?= \(|$)", options))
    assert named[letter] == judge(question, truth, None)[0] and named[letter] in (size, colour, shape, cell)


def read_told(text: str) -> tuple[dict, list[str]]:
    """What is told of one scene, and the boxes in it."""
    return read(re.sub(r" \[.*?\]", "", text)), re.findall(r"\[.*?\]", text)


def unmarked(sample: Sample) -> tuple[Turn, ...]:
    """The turns, of which only the first has a mark, on a line of its own before the question."""
    first, *others = sample.turns
    assert first.question.startswith("<image>\n") and not any("<image>" in turn.question for turn in others)
    assert len(sample.images) + len(sample.told) == first.question.count("<image>") == 1
    return replace(first, question=first.question.removeprefix("<image>\n")), *others


def check_sample(name: str, sample: Sample) -> str | None:
    """A sample of a data set of talk, shown or told: what is told is the truth, and the talk is right."""
    truth, turns = read(sample.references[0]), unmarked(sample)
    if sample.told:
        told, boxes = read_told(sample.told[0])
        asked = re.findall(r"\[.*?\]", " ".join(f"{turn.question} {turn.answer}" for turn in turns))
        objects = {cell: thing for cell, thing in truth.items() if "shape" in thing}
        assert told == (objects if boxes else truth) and set(asked) <= set(boxes), "boxes are told where boxes are asked for"
        assert len(boxes) in (0, len(objects))
    return check_talk(name.removeprefix("told/"), turns, truth)
