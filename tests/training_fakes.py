"""A model, a world and recipes so small that a whole run takes a second; as a script it is train_tiny.py with these.

The fake has every part that the loop cares about: something frozen, a bridge, a language model with dropout (so that
random states matter), uneven token counts, batches without images, and a backbone recipe to take weights from.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from nanovlm import recipes
from nanovlm.contract import Reads, alone
from nanovlm.data.order import shuffled
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.source import Exam
from nanovlm.plots import save_samples
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs import checkpoint, setting, watch
from nanovlm.training import distributed

VOCAB = 270
WORDS = ("red", "green", "blue", "big", "small", "square", "circle")


@dataclass(frozen=True)
class FakeConfig:
    dropout: float = 0.0


class FakeVLM(nn.Module):
    """eyes: mean colour → 5; bridge: 5 → 7; language: embeddings plus picture → logits."""

    reads = Reads("conversations", image_tokens=1)
    whole_batch = whole_weights = False
    unheard = ()

    def __init__(self, config: FakeConfig = FakeConfig()):
        super().__init__()
        dropout = config.dropout
        self.eyes = nn.Linear(3, 5)
        self.bridge = nn.Linear(5, 7)
        self.language = nn.ModuleDict({"embedding": nn.Embedding(VOCAB, 7), "norm": nn.LayerNorm(7),
                                       "dropout": nn.Dropout(dropout), "head": nn.Linear(7, VOCAB)})

    def logits(self, batch):
        ids = batch["input_ids"]
        hidden = self.language["embedding"](ids.clamp(max=VOCAB - 1))  # (B, T, 7)
        images = batch.get("images", torch.zeros(0, 3, 2, 2))
        seen = self.bridge(self.eyes(images.mean((2, 3))))  # (n, 7)
        rows = torch.arange(len(ids)).repeat_interleave((ids == 3).sum(1))
        hidden = hidden + torch.zeros(len(ids), 7).index_add(0, rows, seen)[:, None]
        return self.language["head"](self.language["dropout"](self.language["norm"](hidden)))

    def losses(self, batch, gather=alone):
        logits, targets = self.logits(batch), batch["labels"][:, 1:].reshape(-1)
        total = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets, ignore_index=-100, reduction="sum")
        return {"lm": (total, (targets != -100).sum())}

    def generate(self, batch, room, stop, **how):
        return self.logits(batch)[:, -1:].argmax(-1)


class FakeScenes:
    """Pictures of one colour, in data sets "talk", of which about a third has no picture, "captions" and "texts"."""

    name = "scenes"
    skipped = ()

    def __init__(self, seed=0, size=4, small_print=False):
        self.seed, self.image_size = seed, size

    def texts(self):
        return [" ".join(WORDS)] * 3

    def draw(self, name, rng):
        return fake_sample("", rng, self.image_size, name == "texts" or (name == "talk" and rng.random() < 1 / 3))

    def held_out(self, name, index):
        return replace(self.draw(name, Random(f"val/{name}/{index}")), id=f"val/{index}")

    def look(self, diet, real, n):
        return [self.held_out(max(diet, key=diet.get), i) for i in range(n)]

    def exams(self, names, n=0):
        return [Exam(name, [self.held_out("talk", i) for i in range(n or 4)]) for name in names]

    def galleries(self):
        return []

    def notes(self, figures):
        return []


class FakeRecords:
    """As many samples as one likes; to be met in epochs."""

    name = "own"

    def __init__(self, count, seed=0, size=4):
        self.count, self.seed, self.image_size = count, seed, size

    def size(self, real, split):
        return self.count

    def lengths(self, real):
        return [1] * self.count

    def order(self, real, key):
        return shuffled(self.count, key)

    def sample(self, real, split, index):
        return fake_sample(f"{real}/{index}", Random(f"{self.seed}/{real}/{split}/{index}"), self.image_size, real == "texts")


def fake_sample(name, rng, size, blind):
    """An answer of 1 to 6 words."""
    picture = Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3)))
    answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
    if blind:
        return Sample(name, caption=answer, turns=(Turn("what?", answer),))
    return Sample(name, (picture,), caption=answer, turns=(Turn("<image>\nwhat?", answer),))


READ = {"talk": "conversations"}  # what is read of a person's records in the place of a data set; else of the same name


def stage(name="tune", trains=("bridge", "language"), data="talk", format="tiny", steps=20, batch_size=6, lr=1e-2, **more):
    return Stage(name, trains, {data: 1}, real=READ.get(data, data), format=format, steps=steps, batch_size=batch_size, lr=lr, **more)


def recipe(name="fake/tiny", stages=None, dropout=0.1):
    align = stage("align", ("bridge",), "captions", "plain", steps=4, init=(("eyes", "eyes/tiny:eyes"),))
    stages = stages or (align, stage())
    return Recipe(name, FakeVLM, FakeConfig(dropout), stages, image_size=4, vocab=VOCAB)


EYES = recipe("eyes/tiny", (stage("see", ("eyes", "language"), "captions", "plain", steps=5),))


def install(patch=setattr):
    """Put the fakes where a run looks for the real ones; `patch` may be a monkeypatch's setattr."""
    patch(recipes, "RECIPES", {**recipes.RECIPES, "eyes/tiny": EYES, "fake/tiny": recipe()})
    patch(setting, "Scenes", FakeScenes)
    patch(setting, "template_texts", list)  # these would take all of so small a vocabulary
    patch(setting, "PROMPTS", ())
    patch(watch, "save_curves", lambda *paths: None)  # drawing takes longer than all else here
    patch(watch, "save_samples", lambda rows, path: save_samples(rows[:1], path))


def kill_in_save(number: int) -> None:
    """kill -9 in the middle of writing last.pt for the number-th time."""
    real, seen = torch.save, []

    def save(state, file, **how):
        name = getattr(file, "name", "")  # shards go through memory
        seen.append(name)
        if sum("last.pt" in name for name in seen) == number and "last.pt" in name:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), 9)
        real(state, file, **how)

    checkpoint.torch.save = save


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    watch.SAVE_SECONDS = watch.SAVE_SHARDS_SECONDS = float(os.environ.get("SAVE_SECONDS", "60"))
    if "KILL_IN_SAVE" in os.environ:
        kill_in_save(int(os.environ["KILL_IN_SAVE"]))
    if "FILE_LIMIT" in os.environ:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_LIMIT"]),) * 2)
    import train_tiny

    distributed.leave(train_tiny.main())
