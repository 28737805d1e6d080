"""Question of assignment 4: does it look? The loss of held-out answers with the right pictures, and with exchanged ones.

    after align (shipped)                            only the projector has learned, on captions
    tuned for some steps, answers are learned        your `encode` and `splice`
    tuned for as many, questions are learned too     the same, but every word is a label
    after all of tune (shipped)                      where it ends

A model that looks loses a lot when the pictures are exchanged. Prints the numbers and writes question_4.png.
"""

import sys
import time
from random import Random

import torch
from matplotlib.figure import Figure

from nanovlm import recipes
from nanovlm.lm_loss import IGNORE
from nanovlm.papers.llava import LLaVA
from nanovlm.runs.run import trained_model
from nanovlm.training.batches import make_collate
from nanovlm.world.datasets import Scenes

STEPS, BATCH, HELD_OUT = int(sys.argv[1]) if len(sys.argv) > 1 else 150, 32, 96
RECIPE = recipes.get("llava/tiny")
WAYS = ("answers are learned", "questions are learned too")


def losses(model: LLaVA, collate, samples: list) -> tuple[float, float]:
    """Nats a token of the answers: (right pictures, those of the next conversation)."""
    batch, found = collate.teach(samples, Random(0)), []
    with torch.no_grad():
        for images in (batch["images"], batch["images"].roll(1, dims=0)):
            total, count = model.losses({**batch, "images": images})["lm"]
            found.append((total / count).item())
    return found[0], found[1]


def tune(way: str, steps: int) -> tuple[LLaVA, list[float]]:
    """Projector and language model learn, from the shipped align; "talk" is the world's conversations."""
    torch.manual_seed(0)
    model, tokenizer = trained_model("llava/tiny", "align")
    stage, world, rng = RECIPE.stage("tune"), Scenes(), Random(1)
    collate, curve = make_collate(RECIPE, stage, tokenizer, model.reads), []
    learns = [p for part in (model.projector, model.language) for p in part.parameters()]
    optimiser = torch.optim.AdamW(learns, 5e-4, betas=stage.betas, weight_decay=0.0)
    for _ in range(steps):
        batch = collate.teach([world.draw("talk", rng) for _ in range(BATCH)], rng)
        if way == WAYS[1]:
            batch["labels"] = batch["input_ids"].masked_fill(~batch["attention_mask"] | (batch["input_ids"] == tokenizer.image_id), IGNORE)
        total, count = model.train().losses(batch)["lm"]
        optimiser.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimiser.step()
        curve.append((total / count).item())
    return model.eval(), curve


def draw(found: dict[str, tuple[float, float]], path: str) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(found)).numpy()
    for n, (says, shift) in enumerate((("right pictures", -0.2), ("exchanged pictures", 0.2))):
        axes.barh(places + shift, [pair[n] for pair in found.values()], 0.35, label=says)
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    axes.set(xlabel="nats a token of the answers", title="does it look?")
    axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    stage, world, found = RECIPE.stage("tune"), Scenes(), {}
    samples = [world.held_out("talk", i) for i in range(HELD_OUT)]
    for name in ("after align", *WAYS, "after all of tune"):
        began = time.monotonic()
        model, tokenizer = trained_model("llava/tiny", name.split()[-1] if name not in WAYS else "align")
        if name in WAYS:
            model, curve = tune(name, STEPS)
            print(f"{name}: the loss of training, {sum(curve[-20:]) / len(curve[-20:]):.2f} at the end")
        found[name] = losses(model, make_collate(RECIPE, stage, tokenizer, model.reads), samples)
        right, exchanged = found[name]
        print(f"{name}: right pictures {right:.2f}, exchanged {exchanged:.2f} nats a token  ({time.monotonic() - began:.0f} s)", flush=True)
    draw(found, "question_4.png")


if __name__ == "__main__":
    main()
