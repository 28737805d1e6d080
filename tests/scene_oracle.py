"""An oracle of the embedded world that shares no code with it: it reads captions and questions as a person would.

`read` turns any caption or description back into facts, and `judge` answers any question from these facts alone.
"""

import re

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
