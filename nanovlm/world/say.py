"""What can be said about a scene: captions that name every fact, captions with one fact wrong, descriptions, notes.

    scene         large red circle, top left · small blue square, top right

    caption       thing first    a large red circle in the top left and a small blue square in the top right.
                  cell first     in the top left a large red circle and in the top right a small blue square.
                  headline       large red circle top left, small blue square top right.
                  relation       a large red circle in the top left, left of a small blue square in the top right.
                                 (two objects side by side or one above the other; each style also backwards)

    negative      a large red circle in the top left and a small green square in the top right.

    description   top right: small blue square. top left: large red circle.            (what stands where a picture
                  small top right square blue; red circle large top left.               would stand, when the language
                  (these are notes: facts in any order)                                 model reads without pictures)

A caption leaves no fact out, so two scenes that share a caption are the same scene up to jitter.
"""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import NamedTuple

from nanovlm.world.scene import (
    CELLS,
    COLOURS,
    DIGITS,
    NUMBERS,
    PAIRS,
    SHAPES,
    SIZES,
    WORDS,
    Object,
    Scene,
    Sign,
    side,
)


class Wording(NamedTuple):
    """One way to say a scene."""

    style: str
    backwards: bool  # things in reading order, or the last one first
    left_out: frozenset[str] = frozenset()  # "colour", "shape", "size": not told of any object


# How often each fact is the wrong one: what is hard to see is asked for more often.
CHANGES = {"colour": 1, "shape": 4, "size": 1, "text": 4, "move": 1, "swap cells": 1, "swap colours": 1}
STYLES = ("thing first", "cell first", "headline")
SIDE_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def captions(scene: Scene, left_out: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Every caption that the grammar can give this scene: three to eight."""
    return tuple(dict.fromkeys(say(scene, wording) for wording in wordings(scene, left_out)))


def caption(scene: Scene, rng: Random, left_out: frozenset[str] = frozenset()) -> str:
    """One of `captions(scene, left_out)`."""
    return say(scene, rng.choice(wordings(scene, left_out)))


def wordings(scene: Scene, left_out: frozenset[str] = frozenset()) -> list[Wording]:
    styles = (*STYLES, "relation") if _relatable(scene) else STYLES
    return [Wording(style, backwards, left_out) for style in styles for backwards in (False, True)]


def _relatable(scene: Scene) -> bool:
    return len(scene.objects) == 2 and scene.sign is None and side(*scene.objects) is not None


# What of all objects a caption does not tell, and how often of twenty times. Most often the colour: the picture is then drawn in
# colours without names, so that shapes are met in all colours and become a fact of their own instead of a part of thirty pairs.
LEFT_OUT = {(): 6, ("colour",): 10, ("shape",): 1, ("size",): 1, ("colour", "size"): 2}


def vaguer(wording: Wording, rng: Random) -> Wording:
    """The same wording with none, one or two of the objects' attributes left out, as people do.

    "a circle in the top left" is said of circles of all colours. An image encoder that only ever hears "red circle" and
    "green circle" learns thirty stickers, and takes a blue circle, which it has never seen, for something else.
    """
    return wording._replace(left_out=frozenset(rng.choices(tuple(LEFT_OUT), LEFT_OUT.values())[0]))


def say(scene: Scene, wording: Wording) -> str:
    """The scene in one sentence."""
    style, backwards, left_out = wording
    things = scene.things[::-1] if backwards else scene.things
    if style == "relation":
        first, second = things
        one, two = _phrase(first, left_out), _phrase(second, left_out)
        return f"{one} in the {first.cell}, {SIDE_WORDS[side(first, second)]} {two} in the {second.cell}."
    if style == "headline":
        return ", ".join(f"{_short(thing, left_out)} {thing.cell}" for thing in things) + "."
    if style == "cell first":
        parts = [f"in the {thing.cell} {_phrase(thing, left_out)}" for thing in things]
    else:
        parts = [f"{_phrase(thing, left_out)} in the {thing.cell}" for thing in things]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) + "."


def _phrase(thing: Object | Sign, left_out: frozenset[str]) -> str:
    return f"{'the' if isinstance(thing, Sign) else 'a'} {_short(thing, left_out)}"


def _short(thing: Object | Sign, left_out: frozenset[str] = frozenset()) -> str:
    if isinstance(thing, Sign):
        return f"{thing.type} {thing.text}"
    size = "" if "size" in left_out else f"{thing.size} "
    colour = "" if "colour" in left_out else f"{thing.colour} "
    return f"{size}{colour}{'object' if 'shape' in left_out else thing.shape}"


DESCRIPTIONS = ("cell: thing", "notes", "caption")


def description(scene: Scene, rng: Random, styles: tuple[str, ...] = DESCRIPTIONS) -> str:
    """The scene for a reader without eyes, in one of the styles and in any order."""
    style = rng.choice(styles)
    if style == "caption":
        return caption(scene, rng)
    if style == "notes":
        return notes(scene, rng)
    return " ".join(said(thing) for thing in rng.sample(scene.things, len(scene.things)))


def said(thing: Object | Sign) -> str:
    return f"{thing.cell}: {_short(thing)}."


def notes(scene: Scene, rng: Random, colours: bool = True) -> str:
    """Every fact of every thing (but its colour, if told so): things in any order, and the facts of each in any order.

    As an answer this is the densest of lessons. Whichever fact of a thing is said first, the others follow from it, but
    only for a reader who finds the thing that it belongs to: three questions with their answers in four words.
    """
    told = []
    for thing in rng.sample(scene.things, len(scene.things)):
        if isinstance(thing, Sign):
            facts = (_short(thing), thing.cell)
        else:
            facts = (thing.size, *[thing.colour] * colours, thing.shape, thing.cell)
        told.append(" ".join(rng.sample(facts, len(facts))))
    return "; ".join(told) + "."


def negatives(scene: Scene, wording: Wording, rng: Random, k: int = 3, pairs: tuple = PAIRS) -> tuple[str, ...]:
    """k different captions in the given wording, each with one fact wrong, mentioning no pair outside `pairs`."""
    true, found = say(scene, wording), []
    while len(found) < k:
        false = _one_fact_wrong(scene, rng)
        named = {thing.pair for thing in false.objects}
        # The false caption must be one that another scene could have: otherwise its look alone gives it away.
        possible = len(named) == len(false.objects) and named.issubset(pairs)
        if not possible or (wording.style == "relation" and not _relatable(false)):
            continue
        text = say(false, wording)
        if text != true and text not in found:
            found.append(text)
    return tuple(found)


def _one_fact_wrong(scene: Scene, rng: Random) -> Scene:
    """The scene after one change; the same scene where the change finds nothing to work on."""
    change = rng.choices(tuple(CHANGES), CHANGES.values())[0]
    if change in ("colour", "shape", "size"):
        thing = rng.choice(scene.objects)
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[change]
        return _with(scene, {thing: replace(thing, **{change: _another(values, getattr(thing, change), rng)})})
    if change == "text" and scene.sign:
        texts = {"digit": DIGITS, "word": WORDS, "number": _one_digit_off(scene.sign.text)}[scene.sign.type]
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


def _one_digit_off(number: str) -> list[str]:
    """The numbers of two digits that share one with this one, at its place."""
    return [other for other in NUMBERS if sum(a == b for a, b in zip(other, number)) == 1]


def _another(values: Iterable[str], value: str, rng: Random) -> str:
    return rng.choice([other for other in values if other != value])


def _with(scene: Scene, changed: dict) -> Scene:
    return Scene(tuple(changed.get(thing, thing) for thing in scene.objects), changed.get(scene.sign, scene.sign))
