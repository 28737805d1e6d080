"""What a step learns from: the batch of step s is a function of (seed, stage, s) and of nothing else.

    step s ──► B places from first + s·B on ──► indices ──► samples ──► collate ──► batch
                     │                              └ a new permutation in every epoch; an endless world is read in order
                     └ rank r of W takes places r, r + W, r + 2W, …

LLaVA-1.5's second stage groups (App. A.2): a batch is of one modality, so that talk without pictures does not wait for image
tokens, and its rows are dealt to the ranks so that all have about as many words. Which batch comes when is left to chance.
Of an endless world's texts each rank puts its rows in order of length, so that its micro-batches are of like length: a batch is as
long as its longest row, and texts with boxes, sixteen in a row in the embedded world, are twice as long as others. What a step
learns from stays the same. Whole batches of like length would save more, but each would be of one kind of question.

So a resumed run needs to know the step only, several processes share a batch without talking, and the worker processes
of a DataLoader cannot change the order. Random crops are drawn from a generator of their own for each batch.
"""

import os
from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch.utils.data import DataLoader, Dataset

from nanovlm.contract import Batch, Reads
from nanovlm.data.collate import Collate
from nanovlm.data.sample import Sample
from nanovlm.data.source import Source
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tokenizer import SPLIT, Tokenizer
from nanovlm.training import distributed

ENDLESS = 1_000_000  # a source that claims so many samples makes them up: read in order, no permutation


def make_collate(recipe: Recipe, stage: Stage, tokenizer: Tokenizer, reads: Reads) -> Collate:
    """What makes the stage's batches, for a model that reads so."""
    transform = Transform(recipe.image_size, fit=stage.fit, augment=stage.augment, tiling=reads.tiling)
    return Collate(tokenizer, stage.format, transform, reads, stage.max_length)


class MicroBatches(Dataset):
    """Item n is this rank's micro-batch n: number n % accumulate of step n // accumulate."""

    def __init__(self, source: Source, stage: Stage, seed: int, collate: Collate):
        self.source, self.stage, self.seed, self.collate = source, stage, seed, collate
        self.rank, self.world = distributed.rank(), distributed.world()
        self.size = source.size(stage.view, "train")
        self.sorts = stage.group and self.size >= ENDLESS  # an endless world's rows; of others whole epochs are grouped
        grouped = stage.group and ENDLESS > self.size >= stage.batch_size
        self.lengths = source.lengths(stage.view) if grouped else None
        self.orders: dict[int, list[int]] = {}  # of the epochs that the last batches were of
        self.made: dict[int, Sample] = {}  # this rank's rows of the last step, where they are put in order
        if self.size == 0:
            raise UserError(f"{source.name} has nothing to train stage {stage.name} on (view {stage.view!r}).")
        if stage.batch_size % (self.world * stage.accumulate):
            raise UserError(f"Stage {stage.name}: batch_size {stage.batch_size} cannot be shared evenly by "
                            f"{self.world} processes and {stage.accumulate} micro-batches; make it a multiple of both.")

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulate

    def __getitem__(self, n: int) -> Batch:
        step, micro = divmod(n, self.stage.accumulate)
        mine = self.indices(step)[self.rank::self.world]
        if self.sorts:
            mine = self.in_order(mine)
        share = len(mine) // self.stage.accumulate
        rng = Random(f"{self.seed}/{self.stage.name}/{step}/{micro}/{self.rank}")
        chosen = mine[micro * share:(micro + 1) * share]
        return self.collate([self.made.get(i) or self.draw(i) for i in chosen], rng)

    def draw(self, i: int) -> Sample:
        return self.source.sample(self.stage.view, "train", i)

    def indices(self, step: int) -> list[int]:
        """The samples of the whole global batch of `step`."""
        first = self.stage.first + step * self.stage.batch_size
        places = range(first, first + self.stage.batch_size)
        if self.size >= ENDLESS:
            return [place % self.size for place in places]
        # grouped, an epoch is of as many samples as make whole batches
        length = self.size if self.lengths is None else self.size // self.stage.batch_size * self.stage.batch_size
        numbers = range(places[0] // length, places[-1] // length + 1)
        self.orders = {number: self.orders.get(number) or self.epoch(number) for number in numbers}
        return [self.orders[place // length][place % length] for place in places]

    def in_order(self, indices: list[int]) -> list[int]:
        """From the shortest text to the longest; the samples are kept for the other micro-batches of the step."""
        if not self.made.keys() >= set(indices):
            self.made = {i: self.draw(i) for i in indices}
        return sorted(indices, key=lambda i: _length(self.made[i]))

    def epoch(self, number: int) -> list[int]:
        """The order of the samples in an epoch."""
        key = f"{self.seed}/{self.stage.name}/{number}"
        if self.lengths is None:
            return _epoch(self.size, key)
        return _grouped_epoch(self.lengths, self.stage.batch_size, self.world, key)


def _length(sample: Sample) -> int:
    """Words, marks and digits, each of which is about a token."""
    return sum(len(SPLIT.findall(turn.question + turn.answer)) for turn in sample.turns)


def _epoch(size: int, key: str) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(Random(key).getrandbits(63))).tolist()


def _grouped_epoch(lengths: Sequence[int], batch_size: int, ranks: int, key: str) -> list[int]:
    """Whole batches of one modality, in an order left to chance; what is left of both modalities comes last.

    lengths: words of each sample, below zero without a picture. differs: the released code also evens out micro-batches.
    """
    rng, batches, left = Random(key), [], []
    for wanted in (True, False):
        own = [i for i, length in enumerate(lengths) if (length > 0) == wanted]
        rng.shuffle(own)
        whole = len(own) // batch_size * batch_size
        batches += [dealt(own[start:start + batch_size], lengths, ranks) for start in range(0, whole, batch_size)]
        left += own[whole:]
    rng.shuffle(batches)
    return [i for batch in batches for i in batch] + left


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


def stream(batches: MicroBatches, first_step: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches from `first_step` on. On a GPU, worker processes draw and tokenise ahead of it."""
    cuda = device.type == "cuda"
    workers = max(1, min(8, (os.cpu_count() or 1) // distributed.world() - 1)) if cuda else 0
    order = range(first_step * batches.stage.accumulate, len(batches))
    # A generator of its own: the loader would otherwise draw from the global one and shift what a resumed run draws.
    for item in DataLoader(_Carried(batches), batch_size=None, sampler=order, num_workers=workers, pin_memory=cuda,
                           generator=torch.Generator()):
        if isinstance(item, UserError):
            raise item
        yield item
