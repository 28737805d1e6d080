"""What a teacher without eyes is told about a picture: captions, boxes, perhaps the class it belongs to.

"Visual Instruction Tuning" (2304.08485) §3: the "symbolic representation".

    COCO captions + instances ─┐                 a dog chases a red ball.
    .jsonl with captions ──────┼─► Symbols ─►    a dog on grass.
    scenes:500 ────────────────┘   as_text       (blank)
                                                 dog: [0.10, 0.20, 0.55, 0.90]
                                                 sports ball: [0.70, 0.75, 0.80, 0.86]

Boxes are left, top, right, bottom, as fractions of the width and the height. Where every record has a `label`, or a single
caption that is no sentence but a name, there is one more line, "class: hat; of: dress; hat; shirt": who does not know what else
there might be cannot make up wrong answers.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from nanovlm.data import formats
from nanovlm.errors import UserError
from nanovlm.world.say import captions
from nanovlm.world.scene import SEEN, boxes, random_scene, render

Box = tuple[float, float, float, float]
SCENES = "scenes:"
NAME = 8  # words that a name may have
OTHERS = 7  # classes that a teacher is told besides the right one


@dataclass(frozen=True)
class Symbols:
    id: str
    image: Path
    captions: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...] = ()
    label: str = ""
    labels: tuple[str, ...] = ()  # that one and some others of the set
    split: str = ""

    def as_text(self) -> str:
        parts = ["\n".join(self.captions)]
        if self.boxes:
            parts.append("\n".join(f"{name}: [{', '.join(f'{x:.2f}' for x in box)}]" for name, box in self.boxes))
        if self.label:
            parts.append(f"class: {self.label}; of: {'; '.join(self.labels)}")
        return "\n\n".join(parts)


def from_text(text: str) -> Symbols:
    """The other way round: `as_text` without the names of record and picture. A caption may look like any of the other lines."""
    told, *blocks = text.split("\n\n")
    found, label, labels = [], "", ()
    for line in "\n".join(blocks).split("\n"):
        if box := re.fullmatch(r"(.+): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]", line):
            found.append((box[1], tuple(float(x) for x in box.groups()[1:])))
        elif named := re.fullmatch(r"class: (.+?); of: (.+)", line):
            label, labels = named[1], tuple(named[2].split("; "))
    return Symbols("", Path(), tuple(told.split("\n")), tuple(found), label, labels)


def read(source: str, instances: str | None = None, pictures: Path | None = None, seed: int = 0) -> list[Symbols]:
    """source: what `formats.scan` reads, or "scenes:N", whose pictures are then drawn into the folder `pictures`.

    instances: COCO's instances JSON, for the boxes of a set of COCO captions.
    """
    if source.startswith(SCENES):
        return _scenes(source.removeprefix(SCENES), pictures, seed)
    found = formats.scan(source)
    if found.problems:
        raise UserError(f"{found.problems[0]} ({len(found.problems)} problems in all; see python -m nanovlm.data.check "
                        f"{source}).")
    told = [Symbols(s.id, s.images[0], s.references, label=s.label, split=split)
            for s, split in zip(found.samples, found.splits) if len(s.images) == 1 and not s.turns]
    if not told:
        raise UserError(f"{source}: no record has one picture and a caption; a teacher has nothing to go by.")
    if instances:
        return _with_boxes(told, Path(instances))
    if not all(s.label for s in told) and all(_is_name(s.captions) for s in told):
        told = [replace(s, label=s.captions[0]) for s in told]
    return _with_classes(told) if all(s.label for s in told) else told


def _is_name(captions: Sequence[str]) -> bool:
    return len(captions) == 1 and len(captions[0].split()) <= NAME and not captions[0].endswith(".")


def _with_classes(told: Sequence[Symbols]) -> list[Symbols]:
    known, named = sorted({s.label for s in told}), []
    for s in told:
        rng = Random(f"classes/{s.id}")
        some = [label for label in rng.sample(known, min(OTHERS + 1, len(known))) if label != s.label][:OTHERS]
        named.append(replace(s, labels=tuple(rng.sample([s.label, *some], len(some) + 1))))
    return named


def _scenes(number: str, pictures: Path | None, seed: int) -> list[Symbols]:
    """Of pairs that training may show."""
    if not number.isdigit() or not int(number):
        raise UserError(f"{SCENES}{number}: say how many scenes, such as {SCENES}500.")
    pictures.mkdir(parents=True, exist_ok=True)
    told = []
    for i in range(int(number)):
        rng = Random(f"symbols/{seed}/{i}")
        scene, path = random_scene(rng, SEEN), pictures / f"{i:06}.png"
        render(scene, 48).save(path)
        several = rng.sample(captions(scene), min(5, len(captions(scene))))
        told.append(Symbols(f"scene-{i:06}", path, tuple(several), tuple(boxes(scene))))
    return told


def _with_boxes(told: Sequence[Symbols], file: Path) -> list[Symbols]:
    """COCO: [left, top, width, height] in pixels, found by the picture's file name."""
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
        names = {category["id"]: category["name"] for category in table["categories"]}
        sizes = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in table["images"]}
        # a crowd is one box around many, and a few published boxes have no height: neither is a thing to be counted
        rows = [(row["id"], row["image_id"], row["category_id"], row["bbox"]) for row in table["annotations"]
                if not row.get("iscrowd") and not (isinstance(row["bbox"], list) and 0 in row["bbox"][2:])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: it cannot be read as COCO instances ({type(error).__name__}: {error}); "categories", '
                        '"images" and "annotations" with "bbox" are needed.') from error
    found: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    for number, image, category, box in rows:
        if image in sizes:
            name, width, height = sizes[image]
            found[name].append((names.get(category, f"category {category}"), _fractions(f"{file} annotation {number}",
                                                                                      box, width, height)))
    return [replace(s, boxes=tuple(found.get(s.image.name, ()))) for s in told]


def _fractions(where: str, box: object, width: float, height: float) -> Box:
    """COCO's boxes reach up to a pixel beyond the edge now and then; more is a mistake somewhere."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
        raise UserError(f'{where}: field "bbox" is {box!r}; [left, top, width, height] in pixels is needed.')
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if left < -1 or top < -1 or right > width + 1 or bottom > height + 1 or right <= left or bottom <= top:
        raise UserError(f'{where}: field "bbox" {box} lies outside of its picture of {width} × {height} pixels; mend or '
                        "remove it.")
    return tuple(min(1.0, max(0.0, x)) for x in (left / width, top / height, right / width, bottom / height))


# --- stage 1's choice of captions ---

# words at which a noun phrase ends: what stands between two of them is taken for one
BETWEEN = frozenset(re.findall(r"\w+", "a an the this that these those some any and or but of in on at by for from with without "
                               "to into over under near next beside behind before after between through during is are was "
                               "were be been being has have had do does did as it its his her their he she they who which "
                               "while where when there very two three four one not no"))


def noun_phrases(caption: str) -> set[str]:
    """differs: the paper asks spaCy's parser; here runs of words between function words, which needs no package."""
    found, run = set(), []
    for word in [*re.findall(r"[\w'-]+|[^\w\s]", caption.lower()), "."]:
        if word in BETWEEN or not word[0].isalnum():
            if run:
                found.add(" ".join(run))
            run = []
        else:
            run.append(word)
    return found


def balanced(told: Sequence[Symbols], least: int = 3, most: int = 100, seed: int = 0) -> list[Symbols]:
    """LLaVA App. E, how CC3M became CC-595K: of every noun phrase that occurs `least` times or more, at most `most`
    captions, from the rarest phrase to the most frequent; a picture is kept if any of its phrases asks for it."""
    by_phrase: dict[str, list[int]] = defaultdict(list)
    for i, symbols in enumerate(told):
        for phrase in noun_phrases(symbols.captions[0]):
            by_phrase[phrase].append(i)
    counts = Counter({phrase: len(where) for phrase, where in by_phrase.items() if len(where) >= least})
    kept: set[int] = set()
    for phrase in sorted(counts, key=lambda phrase: (counts[phrase], phrase)):
        where = by_phrase[phrase]
        kept.update(where if len(where) <= most else Random(f"{seed}/{phrase}").sample(where, most))
    return [told[i] for i in sorted(kept)]
