"""What a step learns from: the batch of step s is a function of (seed, stage, s) and of nothing else.

    step s ──► places s·B … s·B + B - 1 ──► samples ──► collate ──► batch
                     │                         ├ Mixture: a data set of the stage's diet, then a sample of it, by (seed, stage, place)
                     │                         ├ Epochs: a person's records, in a new permutation in every epoch
                     │                         ├ Balanced: a person's mixture, a set by its weight and then a record of it, by (seed, stage, place)
                     │                         ├ Gathered: the same as Flamingo's pages, some of which are made of pairs
                     │                         └ InTurn: what a language model reads with --data, both by turns
                     └ rank r of W takes places r, r + W, r + 2W, …

LLaVA-1.5's second stage groups (App. A.2): a batch is of one modality, so that talk without pictures does not wait for image
tokens, and its rows are dealt to the ranks so that all have about as many words. Which batch comes when is left to chance.
Of a stage that groups each rank puts its rows in order of length, so that its micro-batches are of like length: a batch is as
long as its longest row, and texts with boxes are twice as long as others. What a step learns from stays the same.

So a resumed run needs to know the step only, several processes share a batch without talking, and the worker processes
of a DataLoader cannot change the order. Random crops are drawn from a generator of their own for each batch.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.contract import Batch, Reads
from nanovlm.data.collate import Collate
from nanovlm.data.mixture import Mixed
from nanovlm.data.records import Records
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.stored import Stored
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.making.bootstrap import Bootstrapped
from nanovlm.recipes.stage import Diet, Recipe, Stage
from nanovlm.tokenizer import SPLIT, Tokenizer
from nanovlm.training import distributed
from nanovlm.world.datasets import Scenes


def make_collate(recipe: Recipe, stage: Stage, tokenizer: Tokenizer, reads: Reads) -> Collate:
    """What makes the stage's batches, for a model that reads so."""
    transform = Transform(recipe.image_size, fit=stage.fit, augment=stage.augment, tiling=reads.tiling)
    return Collate(tokenizer, stage.format, transform, reads, stage.max_length)


class Mixture:
    """The samples of a stage, drawn from the embedded world, or from what models made of it, by the stage's diet."""

    def __init__(self, world: Scenes, stage: Stage, seed: int, made: Mapping[str, Bootstrapped] = MappingProxyType({})):
        self.world, self.stage, self.seed, self.made = world, stage, seed, made

    def __getitem__(self, place: int) -> Sample:
        name, rng = drawn(self.stage, self.seed, place, self.stage.diet(place))
        sample = self.made[name].draw(rng) if name in self.made else self.world.draw(name, rng)
        return replace(sample, id=sample.id or f"scenes/{self.stage.name}/{place}")  # one of a pool is known by its index there


def drawn(stage: Stage, seed: int, place: int, diet: Diet) -> tuple[str, Random]:
    """The data set of this place, by weight, and what to draw from it with; of a stage that mixes batches all of a step has one set.

    Both depend on seed, stage.name and place (of `mixed` "batches" the set on the step) and on nothing else.
    """
    rng = Random(f"{seed}/{stage.name}/{place}")
    by = Random(f"{seed}/{stage.name}/batch {place // stage.batch_size}") if stage.mixed == "batches" else rng
    return by.choices(tuple(diet), diet.values())[0], rng


class Balanced:
    """Instructions from several sets, small ones more often than their size would have it (InstructBLIP §2.4)."""

    def __init__(self, source: Mixed, diet: Diet, stage: Stage, seed: int):
        """diet: how often each set is drawn, see recipes/instructblip.py."""
        self.source, self.diet, self.stage, self.seed = source, diet, stage, seed

    def __getitem__(self, place: int) -> Sample:
        """source.of(set, stage.real, "train", index): the set as `drawn` says, and any index below 2⁴⁸, one as likely as another."""
        name, rng = drawn(self.stage, self.seed, place, self.diet)
        # beyond its size a set begins again; so a record that is met again is asked in other words
        return self.source.of(name, self.stage.real, "train", rng.getrandbits(48))


class Epochs:
    """The samples of a stage, of a person's records: all of them, in an order left to chance, and again."""

    def __init__(self, records: Records | Mixed | Stored, stage: Stage, seed: int):
        self.records, self.stage, self.seed = records, stage, seed
        self.size = records.size(stage.real, "train")
        self.lengths = records.lengths(stage.real) if stage.group and self.size >= stage.batch_size else None
        self.orders: dict[int, Sequence[int]] = {}  # of the last epochs
        if self.size == 0:
            raise UserError(f"{records.name} has nothing to train stage {stage.name} on (it reads {stage.real}).")
        if isinstance(records, Stored) and self.size < stage.batch_size:  # a small set comes several times in one step, a large one does not
            raise UserError(f"{records.name}: {len(records.parts)} files with {self.size} training samples are too few for stage {stage.name}, "
                            f"whose steps are of {stage.batch_size} samples each; give more of them, or a smaller batch_size.")

    def __getitem__(self, place: int) -> Sample:
        # grouped, an epoch is of as many samples as make whole batches
        length = self.size if self.lengths is None else self.size // self.stage.batch_size * self.stage.batch_size
        number, within = divmod(place, length)
        if number not in self.orders:
            self.orders = {n: order for n, order in self.orders.items() if n == number - 1} | {number: self.epoch(number)}
        again = number * self.size if self.stage.real == "instructions" else 0  # in an epoch to come it is asked in other words
        return self.records.sample(self.stage.real, "train", int(self.orders[number][within]) + again)

    def epoch(self, number: int) -> Sequence[int]:
        """The order of the samples in an epoch."""
        key = f"{self.seed}/{self.stage.name}/{number}"
        if self.lengths is None:
            return self.records.order(self.stage.real, key)
        return _grouped_epoch(self.lengths, self.stage.batch_size, distributed.world(), key)


class InTurn:
    """A few thousand captions teach no language: every second text is one of the embedded world's."""

    def __init__(self, own: Epochs, world: Mixture):
        self.own, self.world = own, world

    def __getitem__(self, place: int) -> Sample:
        return self.world[place] if place % 2 else self.own[place // 2]


TOGETHER = 3  # further names on a page of pairs


class Gathered:
    """Pairs teach nothing of pages: every second time a few stand together, as examples do (Flamingo App. A.2), and things that
    have the same name among them, so that it pays to look back. Documents stay as they are.
    """

    def __init__(self, own: Epochs):
        self.own, self.alike, self.captions = own, defaultdict(list), []
        for index, caption in own.records.captions(own.stage.real):
            self.captions.append(caption)
            self.alike[caption].append(index)

    def __getitem__(self, place: int) -> Sample:
        first = self.own[place]
        if place % 2 == 0 or first.format != "pair":
            return first
        rng = Random(f"{self.own.seed}/{self.own.stage.name}/{place}")
        names = [first.caption, *rng.choices(self.captions, k=TOGETHER)]
        # a picture of each name, by chance: of the first one there are two then
        again = [self.own.records.sample(self.own.stage.real, "train", rng.choice(self.alike[name])) for name in names
                 if name in self.alike]  # of a large set not all are known here
        shown = rng.sample(pairs := [first, *(pair for pair in again if pair.format == "pair")], len(pairs))
        return replace(first, images=tuple(image for pair in shown for image in pair.images), format="flamingo",
                       turns=tuple(Turn(IMAGE, pair.caption, "caption") for pair in shown))


Samples = Mixture | Balanced | Epochs | InTurn | Gathered


def need_even_shares(stage: Stage) -> None:
    """Each process has as many samples of each micro-batch, or it is a UserError."""
    ranks = distributed.world()
    if any(end % ranks for end in stage.ends()) or (not stage.portions and stage.batch_size % stage.accumulate):
        mend = f"make its portions multiples of {ranks}" if stage.portions else f"make it a multiple of {ranks * stage.accumulate}"
        raise UserError(f"Stage {stage.name}: batch_size {stage.batch_size} cannot be shared evenly by {ranks} processes and {stage.accumulate} "
                        f"micro-batches; {mend}, or take another number of processes (--nproc-per-node) or of micro-batches (--accumulate).")
    stage.parts(0)


class MicroBatches(Dataset):
    """Item n is this rank's micro-batch n: number n % accumulate of step n // accumulate."""

    def __init__(self, samples: Samples, stage: Stage, seed: int, collate: Collate):
        self.samples, self.stage, self.seed, self.collate = samples, stage, seed, collate
        self.rank, self.world = distributed.rank(), distributed.world()
        self.kept: tuple[int, list[Sample]] = (-1, [])  # a step's samples, for all of its micro-batches
        need_even_shares(stage)

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulate

    def __getitem__(self, n: int) -> Batch:
        step, micro = divmod(n, self.stage.accumulate)
        if self.kept[0] != step:
            self.kept = step, self.mine(step)
        mine = self.kept[1]
        begin, end = (bound // self.world for bound in ([0, *self.stage.ends()][micro:micro + 2]))
        rng = Random(f"{self.seed}/{self.stage.name}/{step}/{micro}/{self.rank}")
        return self.collate(mine[begin:end], rng)

    def mine(self, step: int) -> list[Sample]:
        """This rank's samples of a step; from the shortest to the longest, if the stage groups."""
        first = step * self.stage.batch_size
        mine = [self.samples[place] for place in range(first + self.rank, first + self.stage.batch_size, self.world)]
        return sorted(mine, key=_length) if self.stage.group else mine


def _length(sample: Sample) -> int:
    """Words, marks and digits, each of which is about a token."""
    return sum(len(SPLIT.findall(text)) for text in (*sample.told, *(turn.question + turn.answer for turn in sample.turns)))


def _grouped_epoch(lengths: Sequence[int], batch_size: int, ranks: int, key: str) -> np.ndarray:
    """Whole batches of one modality, in an order left to chance; what is left of both modalities comes last.

    lengths: words of each sample, below zero without a picture. differs: the released code also evens out micro-batches.
    """
    rng, lengths, batches, left = Random(key), np.asarray(lengths), [], []
    for wanted in (True, False):
        own = np.flatnonzero((lengths > 0) == wanted)
        rng.shuffle(own)
        whole = len(own) // batch_size * batch_size
        batches += [dealt(own[start:start + batch_size], lengths, ranks) for start in range(0, whole, batch_size)]
        left.append(own[whole:])
    rng.shuffle(batches)
    return np.concatenate([*batches, *left])


def dealt(batch: Sequence[int], lengths: Sequence[int], ranks: int) -> list[int]:
    """The batch in the order in which ranks take it, r the places r, r + ranks, …: from the longest row down, each goes to
    the rank that has the fewest words so far and a place free.
    """
    rows: list[list[int]] = [[] for _ in range(ranks)]
    words = [0] * ranks
    for i in sorted(batch, key=lambda i: -abs(lengths[i])):
        rank = min((r for r in range(ranks) if len(rows[r]) < len(batch) // ranks), key=lambda r: words[r])
        rows[rank].append(i)
        words[rank] += abs(lengths[i])
    return [rows[r][n] for n in range(len(batch) // ranks) for r in range(ranks)]


class _Carried(Dataset):
    """A UserError becomes an item: raised in a worker process, it would arrive wrapped into a traceback."""

    def __init__(self, batches: MicroBatches):
        self.batches = batches

    def __getitem__(self, n: int) -> object:
        try:
            return self.batches[n]
        except UserError as error:
            return error


def workers_of_rank() -> int:
    """The cores of this machine are shared by its own ranks alone, however many there are on others."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def stream(batches: MicroBatches, first_step: int, device: torch.device, workers: int | None = None) -> Iterator[Batch]:
    """Micro-batches from `first_step` on. On a GPU, worker processes draw and tokenise ahead of it."""
    cuda = device.type == "cuda"
    if workers is None:
        workers = workers_of_rank() if cuda else 0
    order = range(first_step * batches.stage.accumulate, len(batches))
    # A generator of its own: the loader would otherwise draw from the global one and shift what a resumed run draws.
    for item in DataLoader(_Carried(batches), batch_size=None, sampler=order, num_workers=workers, pin_memory=cuda,
                           generator=torch.Generator()):
        if isinstance(item, UserError):
            raise item
        yield item
