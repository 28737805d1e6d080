"""Question of assignment 2: which fact of a caption is learned last, what do captions with one fact wrong help, and who needs positions?

A small CLIP learns from pictures of one object, three times for as many steps. Then each fact is asked for by itself: of a held-out
picture's caption and the same caption with this fact wrong, is the right one the more alike?

    with wrong captions     each picture also meets three captions with one fact wrong    your `losses` with negative_ids
    without                 only the captions of the batch
    without positions       with wrong captions, but the ViT's positions are zero and stay so
    shipped                 clip/tiny after all of its 6,000 steps, for comparison

    python -m assignments ask 2 handout      your own code; without a folder the package's
"""

import time
from dataclasses import replace
from random import Random

import torch
from matplotlib.figure import Figure

from nanovlm import recipes
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.sample import Sample
from nanovlm.data.transforms import Transform
from nanovlm.papers.clip import CLIP
from nanovlm.runs.run import trained_model
from nanovlm.world.say import negatives, say, wordings
from nanovlm.world.scene import CELLS, COLOURS, SHAPES, SIZES, random_scene, render

STEPS, BATCH, HELD_OUT = 300, 32, 200
WAYS = ("with wrong captions", "without", "without positions", "shipped")
FACTS = ("colour", "shape", "size", "left or right", "top or bottom")


def sample(rng: Random) -> Sample:
    scene = random_scene(rng, many=1, signs=0.0)
    wording = rng.choice(wordings(scene))
    return Sample("", (render(scene, 48),), say(scene, wording), negatives=negatives(scene, wording, rng))


def pairs_of(fact: str, n: int) -> list[Sample]:
    """Pictures, their captions, and one caption each in which this fact is wrong."""
    rng, found = Random(f"held out {fact}"), []
    values = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}
    for _ in range(n):
        scene = random_scene(rng, many=1, signs=0.0)
        thing, = scene.objects
        if fact in values:
            other = replace(thing, **{fact: rng.choice([value for value in values[fact] if value != getattr(thing, fact)])})
        else:
            row, column = divmod(CELLS.index(thing.cell), 2)
            other = replace(thing, cell=CELLS[2 * row + 1 - column if fact == "left or right" else 2 * (1 - row) + column])
        wording = rng.choice(wordings(scene))
        found.append(Sample("", (render(scene, 48),), say(scene, wording), negatives=(say(replace(scene, objects=(other,)), wording),)))
    return found


@torch.no_grad()
def right(model: CLIP, collate: Collate, samples: list[Sample]) -> float:
    """How often the right caption is the more alike of the two; 0.5 is a coin."""
    batch = collate.pairs(samples, Random(0))
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["input_ids"], batch["attention_mask"])
    wrong = model.encode_text(batch["negative_ids"][:, 0], batch["negative_mask"][:, 0])
    return ((image * text).sum(dim=1) > (image * wrong).sum(dim=1)).float().mean().item()


def train(way: str, collate: Collate) -> CLIP:
    torch.manual_seed(0)
    model, rng = CLIP(recipes.get("clip/tiny").config), Random(1)
    if way == "without positions":
        model.vision.positions.requires_grad_(False).zero_()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    for _ in range(STEPS):
        batch = collate.pairs([sample(rng) for _ in range(BATCH)], rng)
        total, count = model.losses(batch)["itc"]
        optimiser.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def draw(found: dict[str, list[float]], path: str) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for n, way in enumerate(WAYS):
        axes.bar([place + 0.2 * (n - 1.5) for place in range(len(FACTS))], found[way], 0.18, label=way)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_xticks(range(len(FACTS)), FACTS)
    axes.set(ylabel="the right caption is preferred", ylim=(0.3, 1.02))
    axes.legend(ncols=2)
    figure.savefig(path, dpi=90)


def main() -> None:
    shipped, words = trained_model("clip/tiny")
    collate = {way: Collate(words, "plain", Transform(48), Reads("pairs", wrong_captions=way != "without"), 64) for way in WAYS}
    exams, found = {fact: pairs_of(fact, HELD_OUT) for fact in FACTS}, {}
    for way in WAYS:
        began = time.monotonic()
        model = shipped if way == "shipped" else train(way, collate[way])
        found[way] = [right(model, collate[WAYS[0]], exams[fact]) for fact in FACTS]
        print(f"{way:20}", *(f"{fact} {share:.2f} " for fact, share in zip(FACTS, found[way])), f"({time.monotonic() - began:.0f} s)", flush=True)
    draw(found, "question_2.png")


if __name__ == "__main__":
    main()
