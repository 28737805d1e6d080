"""LLaVA-1.5's batches: of one modality, shared out evenly, every sample once, the same for every rank and after a resume."""

from dataclasses import replace
from random import Random

import pytest
from training_fakes import FakeScenes

from nanovlm import recipes
from nanovlm.data.conversation import Sample, Turn
from nanovlm.data.records import Records
from nanovlm.training.batches import MicroBatches, dealt

STAGE = replace(recipes.get("llava15/7b").stages[1], batch_size=8, steps=100)


class Talks(FakeScenes):
    """70 conversations with a picture, 29 without, of 5 to 300 words."""

    name = "talks"

    def __init__(self):
        rng = Random(0)
        self.words = [rng.randint(5, 300) * (1 if i < 70 else -1) for i in range(99)]

    def size(self, view: str, split: str) -> int:
        return 99

    def lengths(self, view: str) -> list[int]:
        return self.words


def batches(source: Talks, world: int = 1, **changes) -> list[list[int]]:
    stream = MicroBatches(source, replace(STAGE, **changes), 0, collate=None)
    stream.world = world
    return [stream.indices(step) for step in range(24)]


def test_a_batch_is_of_one_modality_and_an_epoch_has_each_sample_once():
    source = Talks()
    made = batches(source)
    first, second = made[:12], made[12:]
    for epoch in (first, second):
        seen = [i for batch in epoch for i in batch]
        assert len(seen) == len(set(seen)) == 96  # three are left out, others the next time
        mixed = [batch for batch in epoch if len({source.words[i] > 0 for i in batch}) == 2]
        assert len(mixed) <= 1, "what is left of both"
    assert first != second
    assert sum(source.words[batch[0]] < 0 for batch in first[:-1]) == 3 and made == batches(Talks())
    kinds = [source.words[batch[0]] < 0 for batch in first[:-1]]
    assert kinds != sorted(kinds), "one modality after the other would be forgotten"
    plain = batches(source, group=False)
    assert sum(len({source.words[i] > 0 for i in batch}) == 2 for batch in plain) > 12


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_about_as_many_words(world):
    source = Talks()

    def spread(batch: list[int]) -> int:
        words = [sum(abs(source.words[i]) for i in batch[rank::world]) for rank in range(world)]
        return max(words) - min(words)

    assert sum(map(spread, batches(source, world)[:11])) < 0.5 * sum(map(spread, batches(source, world, group=False)[:11]))


def test_two_ranks_share_each_batch_between_them(monkeypatch):
    """Every item is a function of its number: in any order, as after a resume, and each rank gets its own rows."""
    source, made = Talks(), {}
    monkeypatch.setattr(source, "sample", lambda view, split, index: index)
    for rank in range(2):
        stream = MicroBatches(source, replace(STAGE, accumulate=2), 0, collate=lambda rows, rng: rows)
        stream.world, stream.rank = 2, rank
        made[rank] = {n: stream[n] for n in (31, 0, 30, 1, 24, 25)}
        assert all(len(rows) == 2 for rows in made[rank].values())
    alone = batches(source, 2)
    for step in (0, 12, 15):
        rows = [i for rank in range(2) for n in (2 * step, 2 * step + 1) for i in made[rank][n]]
        assert sorted(rows) == sorted(alone[step]) and len(set(rows)) == 8


def test_dealing_by_hand():
    """9 | 7, then 4 to the shorter, 9 | 7 + 4, and 3 to the other; 9 + 3 | 7 + 4 + 1, and 0 where there is room."""
    assert dealt([0, 1, 2, 3], [9, -7, 4, 3], 2) == [0, 1, 3, 2]
    rows = dealt([0, 1, 2, 3, 4, 5], [1, 9, 3, 7, 4, 0], 2)
    assert rows[0::2] == [1, 2, 5] and rows[1::2] == [3, 4, 0]


def test_a_small_set_is_not_grouped():
    """Of fewer samples than a batch there is no whole batch."""
    source = Talks()
    made = batches(source, batch_size=128)
    assert sorted(made[0][:99]) == list(range(99))


def test_records_know_their_lengths():
    samples = [Sample("a", turns=(Turn("how are you", "very well"),)), Sample("b", turns=(Turn("one", "two three"), Turn("four", "five")))]
    records = Records("talk", [*samples, Sample("c", turns=(Turn("x", "y"),))], ["train", "train", "val"])
    assert sorted(records.lengths("mixture")) == [-5, -5]
