"""What stands in an encoder's patch tokens? A linear probe for each fact of the embedded world.

    picture ─► vision, up to the block that LLaVA reads, class token dropped ─► 4 × 4 tokens ─► 4 cells of 2 × 2 tokens
    or an NFNet's last stage, as Flamingo reads it                           ─► 6 × 6 tokens ─► 4 cells of 3 × 3 tokens
                                                                                                 │
    colour  shape  size  place  sign  tens  ones  ◄── softmax of one linear map each ◄── cell (4·D) ─ the same maps for all cells

A bridge of one linear map (LLaVA's) passes on what a linear probe can read. Place: is the cell empty, or is an object or a sign in it?
Sign: which digit or word; a number of two digits counts as read if both of its digits are.

Probes learn from scenes of SEEN pairs and are judged on held-out scenes: colour, shape and size of the objects with a HELD_OUT pair,
place in all cells, signs where there is one. `shuffled`: the same questions, put to the cells that other questions are about.

Legend: S scenes, D width of the encoder, n cells with this fact.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import isqrt
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.data.sample import Sample
from nanovlm.evaluate.pupil import Pupil, chunks
from nanovlm.nfnet import NFNet
from nanovlm.recipes.llava import TINY as LLAVA
from nanovlm.vit import ViT
from nanovlm.world.scene import (
    CELLS,
    COLOURS,
    DIGITS,
    HELD_OUT,
    NUMBERS,
    PAIRS,
    SEEN,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Sign,
    random_scene,
    render,
)

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "place": ("nothing", "object", "sign"), "sign": DIGITS + WORDS,
          "tens": DIGITS, "ones": DIGITS}
READINGS = {**{fact: (fact,) for fact in ("colour", "shape", "size", "place", "sign")}, "number": ("tens", "ones")}  # what has to be right
SCENES = (250, 1000, 4000)  # that a probe learns from
HELD_OUT_SCENES = 1000
WEIGHT_DECAY = 1e-4


def facts(scene: Scene, pairs: Sequence = PAIRS) -> list[dict[str, str]]:
    """What is true of each cell; of objects whose pair is not among `pairs` only that there is one."""
    there = {thing.cell: thing for thing in scene.things}
    found = []
    for cell in CELLS:
        thing = there.get(cell)
        if thing is None:
            found.append({"place": "nothing"})
        elif isinstance(thing, Sign):
            said = dict(zip(("tens", "ones"), thing.text)) if thing.type == "number" else {"sign": thing.text}
            found.append({"place": "sign", **said})
        else:
            look = {"colour": thing.colour, "shape": thing.shape, "size": thing.size}
            found.append({"place": "object", **(look if thing.pair in pairs else {})})
    return found


def labels(scenes: Sequence[Scene], pairs: Sequence = PAIRS) -> dict[str, Tensor]:
    """fact → int64 (S, 4): which of its VALUES holds in each cell, −1 where there is none."""
    cells = [facts(scene, pairs) for scene in scenes]
    return {fact: torch.tensor([[values.index(cell[fact]) if fact in cell else -1 for cell in row] for row in cells])
            for fact, values in VALUES.items()}


def seen_scenes(n: int, seed: int) -> list[Scene]:
    """Drawn as the encoder's own training draws them ("vague pairs"): half of them with a sign, half of the signs numbers."""
    return [random_scene(Random(f"{seed}/probe/{i}"), SEEN, signs=0.5, texts=6 * (DIGITS + WORDS) + NUMBERS) for i in range(n)]


def held_out_scenes(n: int) -> list[Scene]:
    """Those of world/datasets.py."""
    return [random_scene(Random(f"val/{i}"), PAIRS, including=HELD_OUT) for i in range(n)]


def held_out_numbers(n: int) -> list[Scene]:
    """Held-out scenes whose signs are numbers."""
    return [random_scene(Random(f"val/number/{i}"), PAIRS, including=HELD_OUT, signs=1.0, texts=NUMBERS) for i in range(n)]


def patches(vision: ViT | NFNet) -> Callable[[Tensor], Tensor]:
    """What a bridge is given: images (B, 3, h, w) → tokens (B, N, D). Of a ViT what LLaVA reads, of an NFNet its last stage."""
    if isinstance(vision, NFNet):
        return vision
    depth = vision.config.layers + 1 + LLAVA.config.feature_layer
    return lambda images: vision(images, depth=depth)[:, 1:]


def pixels(images: Tensor) -> Tensor:
    """A probe without an encoder: each pixel is a token of width 3."""
    return images.flatten(2).transpose(1, 2)


@torch.no_grad()
def features(pupil: Pupil, scenes: Sequence[Scene], tokens_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The tokens of each cell, one after the other: (S, 4, F)."""
    found = []
    for some in chunks(scenes):
        pictures = [Sample("", (render(scene, pupil.model.config.vision.image_size),)) for scene in some]
        tokens = tokens_of(pupil.collate.images(pictures)["images"].to(pupil.device))
        B, N, D = tokens.shape
        side = isqrt(N) // 2  # of a cell, in tokens
        rows = tokens.view(B, 2, side, 2, side, D).transpose(2, 3)  # (B, 2, 2, side, side, D)
        found.append(rows.reshape(B, 4, N // 4 * D).cpu())  # (B, 4, N // 4 * D)
    return torch.cat(found)


class Probe:
    """One linear map, fitted until it no longer changes: the problem is convex, so there is one answer and no seed."""

    def __init__(self, x: Tensor, y: Tensor, classes: int):
        """x (n, F), y int64 (n,)."""
        self.mean, self.std = x.mean(dim=0), x.std(dim=0) + 1e-6
        self.map = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        scaled = self.scaled(x)
        optimiser = torch.optim.LBFGS(self.map.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(self.map(scaled), y) + WEIGHT_DECAY * self.map.weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)

    def scaled(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        return self.map(self.scaled(x)).argmax(dim=1)


def fit(x: Tensor, truth: dict[str, Tensor]) -> dict[str, Probe]:
    """A probe for each fact; x (S, 4, F), truth as `labels` gives it."""
    return {fact: Probe(x[y >= 0], y[y >= 0], len(VALUES[fact])) for fact, y in truth.items()}


def judge(probes: dict[str, Probe], reading: str, x: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """{"value", "n", "chance", "shuffled"} of one of READINGS."""
    needed = READINGS[reading]
    asked = truth[needed[0]] >= 0  # (S, 4)
    right = torch.stack([truth[fact][asked] for fact in needed], dim=1)  # (n, facts)
    said = torch.stack([probes[fact].read(x[asked]) for fact in needed], dim=1)  # (n, facts)
    n = len(right)
    other = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    value, shuffled = ((guess == right).all(dim=1).float().mean().item() for guess in (said, said[other]))
    ((_, often),) = Counter(map(tuple, right.tolist())).most_common(1)
    return {"value": value, "n": n, "chance": often / n, "shuffled": shuffled}


def measure(pupil: Pupil, seed: int, scenes: Sequence[int] = SCENES, judged: int = HELD_OUT_SCENES) -> dict[str, dict]:
    """{number of scenes learned from: {reading: figures}}, and of the most scenes the same for "pixels"."""
    seen, held_out, numbers = seen_scenes(max(scenes), seed), held_out_scenes(judged), held_out_numbers(judged // 2)
    truth, asked, asked_numbers = labels(seen), labels(held_out, HELD_OUT), labels(numbers, HELD_OUT)
    encode, found = patches(pupil.model.vision), {}
    for name, tokens_of, sizes in (("", encode, scenes), ("pixels", pixels, (max(scenes),))):
        x, cells, signs = (features(pupil, some, tokens_of) for some in (seen, held_out, numbers))
        for n in sizes:
            probes = fit(x[:n], {fact: y[:n] for fact, y in truth.items()})
            found[name or str(n)] = {reading: judge(probes, reading, signs, asked_numbers) if reading == "number"
                                     else judge(probes, reading, cells, asked) for reading in READINGS}
    return found
