"""Question of assignment 3: what does a model learn first, if the loss is divided by tokens, and what, if means are averaged?

A small decoder reads what three things look like and is then asked one of two questions. Each step sees a micro-batch of either kind:

    red star, blue cross, blue circle, green square. how many are blue?   two                                  1 token and the end
    red star, blue cross, blue circle, green square. tell.                circle is blue, cross is blue, …     about 20 tokens

    by tokens     (sum of all losses) / (number of all tokens)          each token weighs the same
    mean of means (mean of the short ones + mean of the long ones) / 2  a token of a short answer weighs about ten times as much

    python -m assignments.questions.question_3 mine      about two minutes; without a folder on the package itself
"""

import sys
import time
from random import Random

import matplotlib
import torch

import nanovlm.lm_loss as objective
from assignments.graft import use
from assignments.tasks import find
from nanovlm import generation
from nanovlm.decoder import Decoder, llama
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.scene import COLOURS, COUNTS, SHAPES

STEPS, BATCH, LOOK, ASKED = 400, 24, 40, 64
WAYS = ("by tokens", "mean of means")
KINDS = ("short", "long")


def example(kind: str, rng: Random) -> tuple[str, str]:
    """(what is asked, the answer)."""
    shown = rng.sample(tuple(COLOURS), 3)
    things = [(shape, rng.choice(shown)) for shape in rng.sample(SHAPES, 5)]
    told = ", ".join(f"{colour} {shape}" for shape, colour in things)
    if kind == "short":
        colour = rng.choice(shown)
        return f"{told}. how many are {colour}?", f" {('none', *COUNTS, 'five')[sum(colour == other for _, other in things)]}"
    return f"{told}. tell.", "".join(f" the {shape} is {colour}." for shape, colour in sorted(things))


def batch_of(kind: str, rng: Random, words: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, and labels at the answers alone; both padded on the right, where nothing is learned."""
    rows = []
    for asked, answer in (example(kind, rng) for _ in range(BATCH)):
        before, said = [words.bos_id, *words.encode(asked)], [*words.encode(answer), words.eos_id]
        rows.append((before + said, [objective.IGNORE] * len(before) + said))
    longest = max(len(ids) for ids, _ in rows)
    return tuple(torch.tensor([row[which] + [fill] * (longest - len(row[which])) for row in rows])
                 for which, fill in ((0, words.pad_id), (1, objective.IGNORE)))


@torch.no_grad()
def right(model: Decoder, kind: str, words: Tokenizer) -> float:
    """The share of held-out questions that are answered to the letter."""
    rng, hits = Random(f"held out {kind}"), 0
    asked, answers = zip(*(example(kind, rng) for _ in range(ASKED)))
    rows = [[words.bos_id, *words.encode(text)] for text in asked]
    longest = max(map(len, rows))
    ids = torch.tensor([[words.pad_id] * (longest - len(row)) + row for row in rows])  # on the left: it goes on from the last
    said = generation.generate(lambda: model.prefill(ids != words.pad_id, ids), model.step, 40, [words.eos_id], words.pad_id)
    hits = sum(words.decode(row) == answer for row, answer in zip(said.tolist(), answers))
    return hits / ASKED


def train(way: str, words: Tokenizer) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = Decoder(llama(len(words), 64, 2, 4, 128, 128))
    optimiser, rng, curves = torch.optim.AdamW(model.parameters(), 3e-3), Random(1), {kind: [] for kind in KINDS}
    for step in range(1, STEPS + 1):
        sums = []
        for ids, labels in (batch_of(kind, rng, words) for kind in KINDS):
            sums.append(objective.lm_loss(model(ids), model.head_weight, labels))
        if way == "by tokens":
            loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
        else:
            loss = sum(total / count for total, count in sums) / len(sums)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % LOOK == 0:
            for kind in KINDS:
                curves[kind].append(right(model, kind, words))
    return curves


def draw(found: dict[str, dict[str, list[float]]], file: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, kind in zip(axes, KINDS):
        for way in WAYS:
            axis.plot(range(LOOK, STEPS + 1, LOOK), found[way][kind], marker="o", label=way)
        axis.set(title=f"{kind} answers", xlabel="step", ylabel="answered to the letter" if kind == "short" else "", ylim=(-0.03, 1.03))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    if sys.argv[1:]:
        print("on your own:", ", ".join(use(sys.argv[1], find("3"))) or "nothing yet")
    rng, found = Random(0), {}
    words = Tokenizer.train([" ".join(example(kind, rng)) for kind in KINDS for _ in range(1000)], 340)
    for kind in KINDS:
        _, labels = batch_of(kind, Random(2), words)
        print(f"{kind} answers: {(labels != objective.IGNORE).sum().item() / BATCH:.1f} tokens are learned of each")
    for way in WAYS:
        began = time.monotonic()
        found[way] = train(way, words)
        print(f"{way:14}", *(f"{kind}: {', '.join(f'{share:.2f}' for share in found[way][kind])}  " for kind in KINDS), f"{time.monotonic() - began:.0f} s", flush=True)
    draw(found, "question_3.png")
    print("question_3.png: both kinds, both ways, step by step")


if __name__ == "__main__":
    main()
