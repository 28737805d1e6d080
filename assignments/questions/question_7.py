"""Question of assignment 7: has it learned what a dax is, or only that names follow pictures?

Pages of pictures with made-up names, other ones on every page: only the page tells which picture is a dax. The shipped Flamingo is
asked after 1, 2, 4, 8 examples, with the right pictures, with exchanged ones, with blank ones, and once with words that look at all
images so far. No model can do better than the share of pages on which the class that is asked for was shown: 1 − (3/4)^shots.
Then the gates: with all of them shut it must be the language model, bit for bit; how far has training opened them?

Prints the numbers, and writes question_7.png.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from matplotlib.figure import Figure

from nanovlm import recipes
from nanovlm.data.sample import CONTROLS
from nanovlm.evaluate.pupil import Pupil, permuted
from nanovlm.runs.run import trained_model
from nanovlm.world import pages
from nanovlm.world.datasets import Scenes

SHOTS, PAGES = (1, 2, 4, 8), 200


def accuracy(pupil: Pupil, samples: Sequence) -> float:
    said = pupil.answer(samples, room=8)
    return sum(answer == sample.turns[-1].answer for answer, sample in zip(said, samples)) / len(samples)


def measured(pupil: Pupil) -> dict[str, list[float]]:
    """{"right pictures": accuracy with 1, 2, 4, 8 shots, …}"""
    world, config = Scenes(), pupil.model.config
    episodes = [pages.examined(world, i) for i in range(PAGES)]
    ways = {"right pictures": list, "exchanged pictures": permuted, "blank pictures": lambda those: [*map(CONTROLS["no images"], those)]}
    found = {name: [accuracy(pupil, change([pages.last(page, shots) for page in episodes])) for shots in SHOTS] for name, change in ways.items()}
    pupil.model.config = replace(config, all_previous=True)  # the same weights, which have never read like that
    found["all images so far"] = [accuracy(pupil, [pages.last(page, shots) for page in episodes]) for shots in SHOTS]
    pupil.model.config = config
    return found


@torch.no_grad()
def is_the_language_model(pupil: Pupil) -> bool:
    """With every gate at 0."""
    shut = deepcopy(pupil.model)
    for block in shut.gated_xattn.values():
        block.attention_gate.zero_()
        block.dense_gate.zero_()
    batch = pupil.read([pages.last(pages.examined(Scenes(), i), 4) for i in range(4)])
    bare = shut.language(inputs_embeds=shut.embed(batch["input_ids"]), attention_mask=batch["attention_mask"])
    return torch.equal(shut.read(batch), bare)


def gates(model: torch.nn.Module) -> dict[str, list[float]]:
    """tanh of α and of β, from the first gated layer to the last."""
    blocks = model.gated_xattn.values()
    return {"attention, tanh α": [block.attention_gate.tanh().item() for block in blocks],
            "feed-forward, tanh β": [block.dense_gate.tanh().item() for block in blocks]}


def draw(found: dict[str, list[float]], opened: dict[str, list[float]], path: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in found.items():
        left.plot(range(len(SHOTS)), values, marker="o", label=name)
    left.plot(range(len(SHOTS)), [1 - 0.75 ** shots for shots in SHOTS], "k--", label="no model can do better")
    left.set_xticks(range(len(SHOTS)), [str(shots) for shots in SHOTS])
    left.set(title="made-up names: right answers", xlabel="shots", ylim=(0, 1))
    left.legend()
    layers = range(len(next(iter(opened.values()))))
    for name, values in opened.items():
        right.plot(layers, values, marker="o", label=name)
    right.axhline(0, color="k", linewidth=0.5)
    right.set_xticks(layers)
    right.set(title="how far the gates are open", xlabel="gated layer")
    right.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    began, recipe = time.monotonic(), recipes.get("flamingo/tiny")
    model, tokenizer = trained_model("flamingo/tiny")
    pupil = Pupil(model, recipe, recipe.stage(None), tokenizer, "cpu")
    found, opened = measured(pupil), gates(model)
    print(f"{'shots':20}" + "".join(f"{shots:8}" for shots in SHOTS))
    print(f"{'ceiling':20}" + "".join(f"{1 - 0.75 ** shots:8.2f}" for shots in SHOTS))
    for name, values in found.items():
        print(f"{name:20}" + "".join(f"{value:8.2f}" for value in values))
    for name, values in opened.items():
        print(f"{name:20}" + "".join(f"{value:8.2f}" for value in values))
    same = is_the_language_model(pupil)
    print(f"with its gates shut it is {'the language model, bit for bit' if same else 'NOT the language model'}; "
          f"{PAGES} pages, {time.monotonic() - began:.0f} s")
    draw(found, opened, "question_7.png")


if __name__ == "__main__":
    main()
