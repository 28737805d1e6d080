"""What a stage really learns from: data sets in the proportions of its diet and its lessons, however much it is shortened."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from training_fakes import FakeRecords

from nanovlm import recipes
from nanovlm.data.sample import Sample
from nanovlm.recipes.stage import Stage, resolve
from nanovlm.runs.setting import Job, Setting
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import InTurn, MicroBatches, Mixture
from nanovlm.world.datasets import Scenes

VISITED = 12_000  # places of a stage that are looked at, or all of them
STAGES = [f"{recipe.name}@{stage.name}" for recipe in map(recipes.get, recipes.names()) if "/tiny" in recipe.name for stage in recipe.stages]


class Spied(Scenes):
    """Draws nothing, and remembers which data set it was to draw from."""

    def draw(self, name, rng):
        return Sample("", label=name)


def resolved(name: str, real: bool, steps: float) -> Stage:
    recipe, _, stage = name.partition("@")
    return resolve(recipes.get(recipe), real, steps).stage(stage)


def drawn(samples: object, stage: Stage) -> list[tuple[float, str]]:
    """(how far the stage is, data set) of every sample of some steps, evenly spread, as its micro-batches have them."""
    batches = MicroBatches(samples, stage, 0, lambda rows, rng: [(int(row.id.rsplit("/", 1)[1]), row.label) for row in rows if row.label])
    stride = max(1, stage.steps * stage.batch_size // VISITED)
    whole = stage.steps * stage.batch_size
    return [(place / whole, name) for step in range(0, stage.steps, stride)
            for micro in range(stage.accumulate) for place, name in batches[step * stage.accumulate + micro]]


def judge(found: list[tuple[float, str]], stage: Stage) -> None:
    """Within each lesson, and behind them, every data set as often as its weight has it: five standard deviations, once in a million."""
    begin = 0.0
    for end, diet in (*stage.lessons, (1.0, stage.data)):
        part = Counter(name for fraction, name in found if begin <= fraction < end)
        assert set(part) <= set(diet), f"from {begin} to {end} of {stage.name}"
        shares = stage.portions or diet  # where losses are mixed, a weight is that of a loss
        for name, weight in shares.items():
            n, p = part.total(), weight / sum(shares.values())
            assert abs(part[name] - n * p) <= 5 * (n * p * (1 - p)) ** 0.5, (name, begin, end)
            assert part[name] > 0 or n * p <= 10, name
        assert part.total() / len(found) == pytest.approx(end - begin, abs=0.01 + stage.batch_size / (stage.steps * stage.batch_size))
        begin = end


@pytest.mark.parametrize("steps", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_draws_from_its_diet(name, steps):
    stage = resolved(name, False, steps)
    found = drawn(Mixture(Spied(0), stage, 0), stage)
    assert len(found) > 150
    judge(found, stage)


@pytest.mark.parametrize("steps", [None, 0.5, 0.05])
@pytest.mark.parametrize("name", [name for name in STAGES if name.startswith("lm/")])
def test_beside_a_persons_texts_the_worlds_half_is_the_same_diet(name, steps):
    """With --data a language model's stage is shorter; every lesson still ends in time."""
    stage = resolved(name, True, steps)
    assert stage.real == "texts" and stage.steps < resolved(name, False, steps).steps
    recipe = resolve(recipes.get(name.partition("@")[0]), True, steps)
    setting = Setting(recipe, 0, torch.device("cpu"), FakeRecords(64), Tokenizer([]))
    samples = setting.samples(Job(recipe, stage), {})
    assert isinstance(samples, InTurn) and type(samples.world.world) is Scenes
    samples.world.world = Spied(0)
    own = [samples[place] for place in range(0, 128, 2)]
    assert {sample.id for sample in own} == {f"texts/{i}" for i in range(64)} and not any(sample.label for sample in own)
    world = type("World", (), {"__getitem__": lambda _, place: samples[place] if place % 2 else Sample("x/0")})()
    found = drawn(world, stage)
    judge(found, stage)


def test_the_language_model_says_again_then_drills_then_talks():
    """Its lessons by hand, at a twentieth of its length: 550 steps of 32."""
    stage = resolved("lm/tiny@lm", False, 0.05)
    assert (stage.steps, stage.batch_size) == (550, 32)
    names = [sample.label for sample in map(Mixture(Spied(0), stage, 0).__getitem__, range(550 * 32))]
    first, second = 528, 4576  # 3 and 26 of a hundred of 17,600
    assert set(names[:first]) == {"told/repeat"} and "told/repeat" not in names[first:]
    assert set(names[first:second]) == {"told/drills"}
    assert set(names[second:]) == set(stage.data) and len(stage.data) == 15


def test_no_colourless_captions_in_the_last_fifth_of_stage_2():
    """Who is silent on colours without a name would else be silent on all that is unfamiliar."""
    stage = resolved("blip2/tiny@stage2", False, 0.1)
    names = [sample.label for sample in map(Mixture(Spied(0), stage, 0).__getitem__, range(stage.steps * stage.batch_size))]
    last = len(names) - names[::-1].index("unnamed captions")
    assert 0.77 < last / len(names) <= 0.78 and set(names[last:]) == {"captions"}
    assert abs(names[:last].count("unnamed captions") / last - 0.25) < 5 * (0.25 * 0.75 / last) ** 0.5


def test_a_sample_is_a_function_of_seed_stage_and_place():
    """Another stage with the same diet, and another seed, meet other samples; a place is the same in any order."""
    stage, world = resolved("llava/tiny@tune", False, 0.05), Scenes(0)
    samples = Mixture(world, stage, 0)
    ten = [samples[place] for place in range(10)]
    assert [samples[place] for place in reversed(range(10))] == ten[::-1]
    assert [sample.id for sample in ten] == [f"scenes/tune/{place}" for place in range(10)]
    for other in (Mixture(world, stage, 1), Mixture(world, replace(stage, name="more"), 0)):
        assert not {sample.turns for sample in ten} & {other[place].turns for place in range(10)}


def test_a_lesson_is_over_where_its_fraction_is():
    """A place that is the fraction itself belongs to what comes next."""
    stage = replace(resolved("llava/tiny@tune", False, 1.0), steps=10, batch_size=10, lessons=((0.1, {"a": 1}), (0.3, {"b": 1})), data={"c": 1})
    assert "".join(next(iter(stage.diet(place))) for place in range(100)) == "a" * 10 + "b" * 20 + "c" * 70
