"""LLaVA-1.5's batches: of one modality, shared out evenly, every sample once, the same for every rank and after a resume."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from data_files import draw, write
from training_fakes import FakeScenes

from nanovlm import recipes
from nanovlm.data.conversation import Sample, Turn
from nanovlm.data.records import Records
from nanovlm.data.scenes import Scenes
from nanovlm.training.batches import WINDOW, MicroBatches, MixedText, dealt
from nanovlm.training.run import Options, Run

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


class Counted(FakeScenes):
    """An endless world whose sample i has 1 to 90 words, and which counts how often it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def size(self, view: str, split: str) -> int:
        return 1_000_000

    def sample(self, view: str, split: str, index: int) -> Sample:
        self.asked += 1
        return Sample(str(index), turns=(Turn("x " * (index * 37 % 89), "y"),))


def test_an_endless_world_is_put_in_order_of_length_a_window_at_a_time():
    source, window = Counted(), WINDOW * 8
    stream = MicroBatches(source, STAGE, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
    made = [stream[n] for n in range(3 * WINDOW)]
    assert source.asked == 3 * window, "each sample is made once"
    for number in range(3):
        batches = made[number * WINDOW:(number + 1) * WINDOW]
        assert sorted(i for batch in batches for i in batch) == list(range(number * window, (number + 1) * window))
        spans = [(min(i * 37 % 89 for i in batch), max(i * 37 % 89 for i in batch)) for batch in batches]
        ordered = sorted(spans)
        assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(ordered)) and spans != ordered
    again = MicroBatches(Counted(), STAGE, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
    assert [again[n] for n in (17, 3, 16, 4)] == [made[n] for n in (17, 3, 16, 4)], "as after a resume"
    halves = []
    for rank in range(2):
        shared = MicroBatches(Counted(), STAGE, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
        shared.world, shared.rank = 2, rank
        halves.append(shared[5])
    assert len(halves[0]) == len(halves[1]) == 4 and sorted(halves[0] + halves[1]) == sorted(made[5])


def test_a_told_world_grouped_is_mostly_short():
    """A batch costs as many places as its longest row has, in every row."""
    lengths = {}
    for group in (False, True):
        stage = replace(recipes.get("lm/tiny-told").stages[0], group=group, steps=WINDOW)
        stream = MicroBatches(Scenes(0), stage, 0, lambda rows, rng: max(
            len(re.findall(r"\w+|\W", turn.question + turn.answer)) for row in rows for turn in row.turns[:1]))
        lengths[group] = [stream[n + 625 * WINDOW] for n in range(WINDOW)]  # behind the first lessons
    assert sum(lengths[True]) < 0.75 * sum(lengths[False])


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


def test_a_language_model_reads_a_persons_texts_and_the_worlds(tmp_path):
    """Whichever way it is shown texts; what has pictures is the person's alone."""
    draw(tmp_path / "own", "a.png", "b.png", "c.png")
    lines = [json.dumps({"image": f"own/{name}.png", "caption": f"letter {name}"}) for name in "abc"]
    write(tmp_path / "own.jsonl", "\n".join(lines))
    jobs = Run("llava15/tiny", Options(data=str(tmp_path / "own.jsonl"), out=str(tmp_path / "run")), torch.device("cpu"))
    mixed = {job.stage.name: isinstance(jobs.data_for(job), MixedText) for job in jobs.jobs}
    assert mixed == {"clip": False, "lm-told": True, "align": False, "tune": False}
