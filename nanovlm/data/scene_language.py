"""What can be said about a scene: captions that name every fact, captions with one fact wrong, and descriptions.

    scene         large red circle, top left · small blue square, top right

    caption       thing first    a large red circle in the top left and a small blue square in the top right.
                  cell first     in the top left a large red circle and in the top right a small blue square.
                  headline       large red circle top left, small blue square top right.
                  relation       a large red circle in the top left, left of a small blue square in the top right.
                                 (two objects side by side or one above the other; each style also backwards)

    negative      a large red circle in the top left and a small green square in the top right.

    description   top right: small blue square. top left: large red circle.            (what stands where a picture
                  blue square small top right; red circle large top left.               would stand, when the language
                                                                                        model reads without pictures)

A caption leaves no fact out, so two scenes that share a caption are the same scene up to jitter.
"""

from collections.abc import Iterable
from dataclasses import replace
from random import Random

from nanovlm.data.scene_world import CELLS, COLOURS, DIGITS, PAIRS, SHAPES, SIZES, WORDS, Object, Scene, Sign, side

Wording = tuple[str, bool]  # the style, and whether things are named in reading order or backwards
STYLES = ("thing first", "cell first", "headline")
SIDE_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def captions(scene: Scene) -> tuple[str, ...]:
    """Every caption that the grammar can give this scene: three to eight."""
    return tuple(dict.fromkeys(say(scene, wording) for wording in wordings(scene)))


def caption(scene: Scene, rng: Random) -> str:
    """One of `captions(scene)`."""
    return say(scene, rng.choice(wordings(scene)))


def wordings(scene: Scene) -> list[Wording]:
    styles = STYLES
    if len(scene.objects) == 2 and scene.sign is None and side(*scene.objects):
        styles += ("relation",)
    return [(style, backwards) for style in styles for backwards in (False, True)]


def say(scene: Scene, wording: Wording) -> str:
    """The scene in one sentence."""
    style, backwards = wording
    things = scene.things[::-1] if backwards else scene.things
    if style == "relation":
        first, second = things
        relation = SIDE_WORDS[side(first, second)]
        return f"{_phrase(first)} in the {first.cell}, {relation} {_phrase(second)} in the {second.cell}."
    if style == "headline":
        return ", ".join(f"{_short(thing)} {thing.cell}" for thing in things) + "."
    if style == "cell first":
        parts = [f"in the {thing.cell} {_phrase(thing)}" for thing in things]
    else:
        parts = [f"{_phrase(thing)} in the {thing.cell}" for thing in things]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) + "."


def _phrase(thing: Object | Sign) -> str:
    return f"{'the' if isinstance(thing, Sign) else 'a'} {_short(thing)}"


def _short(thing: Object | Sign) -> str:
    if isinstance(thing, Sign):
        return f"{thing.type} {thing.text}"
    return f"{thing.size} {thing.colour} {thing.shape}"


def description(scene: Scene, rng: Random) -> str:
    """The scene for a reader without eyes, in one of three styles and in any order."""
    style = rng.choice(("cell: thing", "notes", "caption"))
    if style == "caption":
        return caption(scene, rng)
    things = rng.sample(scene.things, len(scene.things))
    if style == "cell: thing":
        return " ".join(f"{thing.cell}: {_short(thing)}." for thing in things)
    notes = [
        f"{_short(thing)} {thing.cell}"
        if isinstance(thing, Sign)
        else f"{thing.colour} {thing.shape} {thing.size} {thing.cell}"
        for thing in things
    ]
    return "; ".join(notes) + "."


def negatives(scene: Scene, wording: Wording, rng: Random, k: int = 3, pairs: tuple = PAIRS) -> tuple[str, ...]:
    """k different captions in the given wording, each with one fact wrong, mentioning no pair outside `pairs`."""
    true, found = say(scene, wording), []
    while len(found) < k:
        false = _one_fact_wrong(scene, rng)
        named = {thing.pair for thing in false.objects}
        # The false caption must be one that another scene could have: otherwise its look alone gives it away.
        if len(named) < len(false.objects) or not named.issubset(pairs) or wording not in wordings(false):
            continue
        text = say(false, wording)
        if text != true and text not in found:
            found.append(text)
    return tuple(found)


def _one_fact_wrong(scene: Scene, rng: Random) -> Scene:
    """The scene after one change; the same scene where the change finds nothing to work on."""
    change = rng.choice(("colour", "shape", "size", "text", "move", "swap cells", "swap colours"))
    if change in ("colour", "shape", "size"):
        thing = rng.choice(scene.objects)
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[change]
        return _with(scene, {thing: replace(thing, **{change: _another(values, getattr(thing, change), rng)})})
    if change == "text" and scene.sign:
        texts = DIGITS if scene.sign.type == "digit" else WORDS
        return _with(scene, {scene.sign: replace(scene.sign, text=_another(texts, scene.sign.text, rng))})
    if change == "move" and (free := [cell for cell in CELLS if all(cell != thing.cell for thing in scene.things)]):
        thing = rng.choice(scene.things)
        return _with(scene, {thing: replace(thing, cell=rng.choice(free))})
    if change == "swap cells" and len(scene.things) > 1:
        one, two = rng.sample(scene.things, 2)
        return _with(scene, {one: replace(one, cell=two.cell), two: replace(two, cell=one.cell)})
    if change == "swap colours" and len(scene.objects) > 1:
        one, two = rng.sample(scene.objects, 2)
        return _with(scene, {one: replace(one, colour=two.colour), two: replace(two, colour=one.colour)})
    return scene


def _another(values: Iterable[str], value: str, rng: Random) -> str:
    return rng.choice([other for other in values if other != value])


def _with(scene: Scene, changed: dict) -> Scene:
    return Scene(tuple(changed.get(thing, thing) for thing in scene.objects), changed.get(scene.sign, scene.sign))
