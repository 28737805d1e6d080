"""Question of assignment 3: what does a model learn first, if the loss is divided by tokens, and what, if means are averaged?

A small decoder learns two things by heart of each of 72 objects. Every step sees a micro-batch of either kind:

    price of the small red star?     9                                               1 token and the end
    story of the small red star?     cross yellow 4 green circle … diamond           30 words, about 40 tokens, and the end

    by tokens      (sum of all losses) / (number of all tokens)            each token weighs the same
    mean of means  (mean of the short ones + mean of the long ones) / 2    a token of a short answer weighs nearly ten times as much

    python -m assignments ask 3 handout      your own code; without a folder the package's
"""

import time
from random import Random

import torch
from matplotlib.figure import Figure

import nanovlm.lm_loss as objective
from nanovlm import generation
from nanovlm.decoder import Decoder, llama
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.scene import COLOURS, DIGITS, SHAPES, SIZES

STEPS, BATCH, LOOK, LONG = 280, 24, 40, 30
WAYS = ("by tokens", "mean of means")
KINDS = ("short", "long")


def to_learn(rng: Random) -> dict[str, list[tuple[str, str]]]:
    """kind → (question, answer) of each object; answers are left to chance, so that only learning by heart helps."""
    things = [f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
    words = [*SIZES, *COLOURS, *SHAPES, *DIGITS]
    return {"short": [(f"price of the {thing}?", f" {rng.choice(words)}") for thing in things],
            "long": [(f"story of the {thing}?", "".join(f" {rng.choice(words)}" for _ in range(LONG))) for thing in things]}


def batch_of(pairs: list[tuple[str, str]], words: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, and labels at the answers alone; both padded on the right, where nothing is learned."""
    rows = []
    for asked, answer in pairs:
        before, said = [words.bos_id, *words.encode(asked)], [*words.encode(answer), words.eos_id]
        rows.append((before + said, [objective.IGNORE] * len(before) + said))
    longest = max(len(ids) for ids, _ in rows)
    return tuple(torch.tensor([row[which] + [fill] * (longest - len(row[which])) for row in rows])
                 for which, fill in ((0, words.pad_id), (1, objective.IGNORE)))


def right(model: Decoder, pairs: list[tuple[str, str]], words: Tokenizer) -> float:
    """Of the words of the answers the share that the model says in their places."""
    rows = [[words.bos_id, *words.encode(asked)] for asked, _ in pairs]
    longest = max(map(len, rows))
    ids = torch.tensor([[words.pad_id] * (longest - len(row)) + row for row in rows])  # on the left: it goes on from the last
    said = generation.generate(lambda: model.prefill(ids != words.pad_id, ids), model.step, LONG + 1, [words.eos_id], words.pad_id)
    hits = [mine == theirs for row, (_, answer) in zip(said.tolist(), pairs)
            for mine, theirs in zip(words.decode(row).split() + [""] * LONG, answer.split())]
    return sum(hits) / len(hits)


def train(way: str, known: dict[str, list[tuple[str, str]]], words: Tokenizer) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = Decoder(llama(len(words), 64, 2, 4, 128, 128))
    optimiser, rng, curves = torch.optim.AdamW(model.parameters(), 2e-3), Random(1), {kind: [] for kind in KINDS}
    for step in range(1, STEPS + 1):
        sums = []
        for kind in KINDS:
            ids, labels = batch_of(rng.sample(known[kind], BATCH), words)
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
                curves[kind].append(right(model, known[kind], words))
    return curves


def draw(found: dict[str, dict[str, list[float]]], path: str) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS):
        for way in WAYS:
            axes.plot(range(LOOK, STEPS + 1, LOOK), found[way][kind], marker="o", label=way)
        axes.set(title=f"{kind} answers", xlabel="step", ylim=(-0.03, 1.03))
        axes.legend()
    figure.axes[0].set_ylabel("words that are right")
    figure.savefig(path, dpi=90)


def main() -> None:
    known, found = to_learn(Random(0)), {}
    words = Tokenizer.train([asked + answer for kind in KINDS for asked, answer in known[kind] * 2], 400)
    for kind in KINDS:
        _, labels = batch_of(known[kind], words)
        print(f"{kind} answers: {(labels != objective.IGNORE).sum().item() / len(labels):.1f} tokens are learned of each")
    for way in WAYS:
        began = time.monotonic()
        found[way] = train(way, known, words)
        for kind in KINDS:
            print(f"{way:14}{kind:6}", *(f"{share:.2f}" for share in found[way][kind]))
        print(f"{'':14}({time.monotonic() - began:.0f} s)", flush=True)
    draw(found, "question_3.png")


if __name__ == "__main__":
    main()
