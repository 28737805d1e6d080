"""In which order an epoch meets its samples: a function of its key and of nothing else, so that a resumed run needs the step only.

A set in memory is shuffled as a whole. A set in shards is shuffled twice, as a whole permutation of 129 million is too much to hold:

    shards            0 1 2 3 4 5 6 7          permuted by the epoch's key
    windows of four   [5 2 7 0] [6 1 4 3]      the samples of a window are permuted; those of the window in use are in memory
    place ─► window ─► its permutation ─► sample

So each sample comes once an epoch, any rank may ask for any place, and neighbours of one shard are spread over a window.
"""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch

WINDOW = 4  # shards that are mixed with each other
KEPT = 2  # windows: a batch may begin in one and end in the next


def shuffled(size: int, key: str) -> torch.Tensor:
    """A permutation of 0 … size - 1; eight bytes each, where a list has forty."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(Random(key).getrandbits(63)))


class Windows:
    """The order of samples that lie in shards; item n is the number of a sample, counted through the shards as they are given."""

    def __init__(self, sizes: Sequence[int], key: str):
        """sizes: samples of each shard."""
        self.key, self.sizes = key, np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.shards = shuffled(len(sizes), f"{key}/shards").numpy()
        self.firsts = np.arange(0, len(sizes), WINDOW)
        self.ends = np.cumsum(np.add.reduceat(self.sizes[self.shards], self.firsts))
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, place: int) -> int:
        window = int(np.searchsorted(self.ends, place, side="right"))
        if window not in self.kept:
            self.kept = dict([*self.kept.items()][-(KEPT - 1):]) | {window: self.window(window)}
        return int(self.kept[window][place - self.ends[window]])  # counted from the window's end

    def window(self, number: int) -> np.ndarray:
        shards = self.shards[self.firsts[number]:self.firsts[number] + WINDOW]
        samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard] + self.sizes[shard]) for shard in shards])
        return samples[shuffled(len(samples), f"{self.key}/{number}").numpy()]
