"""LLaVA-1.5's batches: of one modality, shared out evenly, every sample once, the same for every rank and after a resume."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from data_files import draw, write

from nanovlm import recipes
from nanovlm.data import formats
from nanovlm.data.order import shuffled
from nanovlm.data.records import Records
from nanovlm.data.sample import Sample, Turn
from nanovlm.recipes.stage import resolve
from nanovlm.runs.setting import Job, Setting, plan
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import batches as training_batches
from nanovlm.training import distributed
from nanovlm.training.batches import Epochs, InTurn, MicroBatches, Mixture, dealt, make_collate
from nanovlm.training.loop import train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.world.datasets import Scenes

STAGE = replace(recipes.get("llava15/7b").stages[1], batch_size=8, steps=100)


class Talks:
    """70 conversations with a picture, 29 without, of 5 to 300 words."""

    name = "talks"

    def __init__(self):
        rng = Random(0)
        self.words = [rng.randint(5, 300) * (1 if i < 70 else -1) for i in range(99)]

    def size(self, real: str, split: str) -> int:
        return 99

    def lengths(self, real: str) -> list[int]:
        return self.words

    def order(self, real: str, key: str) -> torch.Tensor:
        return shuffled(99, key)

    def sample(self, real: str, split: str, index: int) -> int:
        return index


def batches(source: Talks, world: int = 1, monkeypatch=None, **changes) -> list[list[int]]:
    stage = replace(STAGE, **changes)
    if monkeypatch:
        monkeypatch.setattr(distributed, "world", lambda: world)
    epochs, B = Epochs(source, stage, 0), stage.batch_size
    return [[epochs[place] for place in range(step * B, step * B + B)] for step in range(24)]


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
def test_ranks_have_about_as_many_words(world, monkeypatch):
    source = Talks()

    def spread(batch: list[int]) -> int:
        words = [sum(abs(source.words[i]) for i in batch[rank::world]) for rank in range(world)]
        return max(words) - min(words)

    grouped = batches(source, world, monkeypatch)
    assert sum(map(spread, grouped[:11])) < 0.5 * sum(map(spread, batches(source, world, monkeypatch, group=False)[:11]))


def test_two_ranks_share_each_batch_between_them(monkeypatch):
    """Every item is a function of its number: in any order, as after a resume, and each rank gets its own rows."""
    source, made, stage = Talks(), {}, replace(STAGE, accumulate=2)
    alone = batches(source, 2, monkeypatch)
    monkeypatch.setattr(training_batches, "_length", abs)
    for rank in range(2):
        stream = MicroBatches(Epochs(source, stage, 0), stage, 0, collate=lambda rows, rng: rows)
        stream.world, stream.rank = 2, rank
        made[rank] = {n: stream[n] for n in (31, 0, 30, 1, 24, 25)}
        assert all(len(rows) == 2 for rows in made[rank].values())
    for step in (0, 12, 15):
        rows = [i for rank in range(2) for n in (2 * step, 2 * step + 1) for i in made[rank][n]]
        assert sorted(rows) == sorted(alone[step]) and len(set(rows)) == 8


class Counted:
    """Samples without an end, of which number i has 0 to 88 words, told or asked; it counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __getitem__(self, place: int) -> Sample:
        self.asked += 1
        text = "x " * words(place)
        if place % 2:
            return Sample(str(place), told=(text,), turns=(Turn("<image>", "y"),))
        return Sample(str(place), turns=(Turn(text, "y"),))


def words(index: int) -> int:
    return index * 37 % 89


def test_rows_of_an_endless_world_are_put_in_order_within_their_batch():
    """Each rank's, so that its micro-batches are of like length; what a step learns from is what it would be without."""
    source, stage = Counted(), replace(STAGE, accumulate=2)
    stream = MicroBatches(source, stage, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
    made = [stream[n] for n in range(20)]
    assert source.asked == 80, "each sample is made once"
    for step in range(10):
        short, long = made[2 * step:2 * step + 2]
        assert len(short) == len(long) == 4 and sorted(short + long) == list(range(8 * step, 8 * step + 8))
        assert max(map(words, short)) <= min(map(words, long)) + 3  # a mark is three pieces
    again = MicroBatches(Counted(), stage, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
    assert [again[n] for n in (17, 3, 16, 4)] == [made[n] for n in (17, 3, 16, 4)], "as after a resume"
    shares = []
    for rank in range(2):
        alone = Counted()
        shared = MicroBatches(alone, stage, 0, collate=lambda rows, rng: [int(row.id) for row in rows])
        shared.world, shared.rank = 2, rank
        shares.append([shared[10], shared[11]])
        assert alone.asked == 4, "a rank makes its own rows only"
        assert max(map(words, shares[-1][0])) <= min(map(words, shares[-1][1])) + 3
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(40, 48))
    assert all(len(rows) == 2 for share in shares for rows in share)


def test_what_a_step_learns_from_long_and_short_rows_is_the_same_together_and_apart():
    recipe, step = recipes.get("lm/tiny"), 2900  # behind the lessons
    world, tokenizer, gradients = Scenes(0), Tokenizer.train(Scenes(0).texts()[:200], recipe.vocab), []
    for changes in ({"group": False, "accumulate": 1}, {}):
        stage = replace(recipe.stages[0], steps=3000, **changes)
        torch.manual_seed(0)
        model = recipe.build(stage)
        stream = MicroBatches(Mixture(world, stage, 0), stage, 0, make_collate(recipe, stage, tokenizer, model.reads))
        first = step * stage.accumulate
        batches = [stream[n] for n in range(first, first + stage.accumulate)]
        next(train_stage(model, stage, iter(batches), make_optimiser(model, stage), torch.device("cpu"), step))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        places = [batch["input_ids"].numel() for batch in batches]
        assert len(places) == stage.accumulate
        gradients[-1]["places"] = torch.tensor(float(sum(places)))
    together, apart = gradients
    assert apart.pop("places") < 0.8 * together.pop("places"), "and that with less padding"
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-7)


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
    assert sorted(records.lengths("prompted")) == [-5, -5]


def test_a_language_model_reads_a_persons_texts_and_the_worlds(tmp_path):
    """What has pictures is the person's alone."""
    draw(tmp_path / "own", "a.png", "b.png", "c.png")
    lines = [json.dumps({"image": f"own/{name}.png", "caption": f"letter {name}"}) for name in "abc"]
    write(tmp_path / "own.jsonl", "\n".join(lines))
    recipe = resolve(recipes.get("llava15/tiny"), real=True)
    setting = Setting(recipe, 0, torch.device("cpu"), formats.read(tmp_path / "own.jsonl"), Tokenizer([]))
    jobs = plan(Job(recipe, recipe.stages[-1]), setting)
    read = {job.stage.name: type(setting.samples(job, {})) for job in jobs}
    assert read == {"clip": Epochs, "lm": InTurn, "align": Epochs, "tune": Epochs}
