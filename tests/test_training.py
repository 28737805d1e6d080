"""The loop and what it stands on: every token weighs the same, frozen stays frozen, a batch follows from its step."""

import math
from dataclasses import replace

import pytest
import torch
import training_fakes as fakes
from torch import nn

from nanovlm.errors import UserError
from nanovlm.recipes.stage import Stage, resolve
from nanovlm.runs import checkpoint
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import randomness, vitals, weights
from nanovlm.training.batches import Epochs, InTurn, MicroBatches, Mixture, make_collate, stream
from nanovlm.training.loop import TrainingFailed, freeze, train_stage
from nanovlm.training.optim import lr_at, make_optimiser


def test_an_exponential_falls_by_the_same_factor_each_step():
    stage = fakes.stage(steps=5, warmup=0.0, schedule="exponential", lr=1.0, min_lr=1 / 16)
    assert [lr_at(step, stage) for step in range(5)] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
    with pytest.raises(ValueError, match="an exponential never reaches min_lr 0.0"):
        replace(stage, min_lr=0.0)


def test_a_part_may_be_left_undecayed():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "ab": nn.Linear(2, 5)})
    groups = make_optimiser(model, fakes.stage(weight_decay=0.1, undecayed=("a",))).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {"a.weight": 0, "a.bias": 0, "ab.weight": 0.1, "ab.bias": 0}
    with pytest.raises(ValueError, match="leaves 'resampler' undecayed, but trains no parameters of that name"):
        make_optimiser(model, fakes.stage(undecayed=("resampler",)))

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.train(fakes.FakeScenes().texts(), fakes.VOCAB)


def scenes(stage: Stage) -> Mixture:
    return Mixture(fakes.FakeScenes(), stage, 0)


def micro_batches(stage: Stage, model: nn.Module) -> list[dict]:
    batches = MicroBatches(scenes(stage), stage, 0, make_collate(fakes.recipe(), stage, TOKENIZER, model.reads))
    return [batches[n] for n in range(len(batches))]


def train(stage: Stage, model: nn.Module) -> list:
    freeze(model, stage.trains)
    return list(train_stage(model, stage, micro_batches(stage, model), make_optimiser(model, stage), CPU))


def fresh(seed: int = 3) -> fakes.FakeVLM:
    torch.manual_seed(seed)
    return fakes.FakeVLM()


def test_a_stage_is_judged_by_what_exists():
    """A misspelt evaluation would judge nothing, and say nothing."""
    with pytest.raises(ValueError, match="tune.*caption.*captions"):
        fakes.stage(evaluate=("caption",))


# ---- learning rate and optimiser


def test_the_schedule_has_the_values_worked_out_by_hand():
    s = fakes.stage(steps=12, lr=0.8, warmup=0.25, min_lr=0.5)  # 3 steps of warm-up, then 9 from 1 down to 1/2
    rates = [lr_at(step, s) / 0.8 for step in range(12)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[7] == pytest.approx(0.75)  # half way down the cosine: cos(π/2) = 0
    assert rates[5] == pytest.approx(0.5 + 0.25 * (1 + math.sqrt(0.5)))  # a quarter of it: cos(π/4)
    assert rates[11] == pytest.approx(0.5)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_constant_schedule_stays_where_the_warm_up_ends():
    s = fakes.stage(steps=10, lr=0.3, warmup=0.2, schedule="constant")
    assert [lr_at(step, s) for step in range(10)] == pytest.approx([0.1, 0.2] + [0.3] * 8)


def test_only_matrices_decay_and_frozen_parameters_have_no_state():
    model = fresh()
    freeze(model, ("bridge", "language.norm"))
    optimiser = make_optimiser(model, fakes.stage(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decay == {id(model.bridge.weight): 0.1, id(model.bridge.bias): 0.0,
                     id(model.language["norm"].weight): 0.0, id(model.language["norm"].bias): 0.0}


# ---- the loop


def test_accumulated_micro_batches_make_the_step_of_one_big_batch():
    whole, parts = fakes.stage(steps=3, batch_size=6), fakes.stage(steps=3, batch_size=6, accumulate=3)
    one, three = fresh(), fresh()
    counts = [int((batch["labels"] != -100).sum()) for batch in micro_batches(parts, three)]
    assert len(set(counts[:3])) > 1, "the micro-batches must be uneven, or a mean of means would pass"
    big, small = train(whole, one), train(parts, three)
    for a, b in zip(big, small):
        assert a.losses["lm"] == pytest.approx(b.losses["lm"], abs=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, abs=1e-6)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, three.state_dict()[name], rtol=0, atol=1e-6), name


def test_the_gradient_is_that_of_the_mean_over_trained_tokens():
    model, s = fresh(), fakes.stage(steps=1, lr=1e-9, clip=0)
    batch = micro_batches(s, model)[0]
    total, count = model.losses(batch)["lm"]
    expected = torch.autograd.grad(total / count, model.language["head"].weight)[0]
    train(s, model)
    assert torch.allclose(model.language["head"].weight.grad, expected, atol=1e-7)


def test_the_gradient_is_clipped_to_its_global_norm():
    model, s = fresh(), fakes.stage(steps=1, clip=0.01)
    [report] = train(s, model)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert report.grad_norm > 0.1 and norm.item() == pytest.approx(0.01, rel=1e-3)


def test_accumulation_is_refused_where_it_would_change_the_loss():
    model = fresh()
    model.whole_batch = True
    with pytest.raises(UserError, match="accumulate=2.*whole batch"):
        train(fakes.stage(accumulate=2), model)
    model = fresh()
    losses = model.losses
    model.losses = lambda batch, gather: {**losses(batch), "other": losses(batch)["lm"]}
    with pytest.raises(UserError, match="accumulate=2.*'lm', 'other'"):
        train(fakes.stage(accumulate=2), model)


def test_several_losses_are_each_divided_by_their_own_count():
    model = fresh()
    losses = model.losses
    model.losses = lambda batch, gather: {**losses(batch), "four": (model.bridge.bias.sum() * 0 + 20.0, torch.tensor(5))}
    [report] = train(fakes.stage(steps=1), model)
    assert report.losses["four"] == pytest.approx(4.0)


def test_what_is_frozen_stays_frozen_and_in_eval_mode():
    model = fresh()
    before = vitals.fingerprints(model)
    train(fakes.stage(trains=("bridge", "language.head"), steps=4), model)
    changed = {part for part, old in before.items() if vitals.fingerprints(model)[part] != old}
    assert changed == {"bridge", "language"}
    untouched = fresh()
    for name in ("embedding", "norm"):
        assert all(map(torch.equal, model.language[name].parameters(), untouched.language[name].parameters()))
    assert model.bridge.training and not model.eyes.training and not model.language["dropout"].training


def test_a_stage_that_trains_what_does_not_exist_is_a_mistake():
    with pytest.raises(ValueError, match="'brigde'"):
        freeze(fresh(), ("brigde",))


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    model, s = fresh(), fakes.stage(steps=2)
    batches = micro_batches(s, model)
    batches[1]["images"][:] = float("nan")
    freeze(model, s.trains)
    steps = train_stage(model, s, batches, make_optimiser(model, s), CPU)
    next(steps)
    before = checkpoint.cpu_state(model)
    with pytest.raises(TrainingFailed, match="lm became nan at step 2 of stage tune") as failure:
        next(steps)
    assert torch.isnan(failure.value.batches[0]["images"]).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- batches


def test_every_epoch_shows_every_sample_once_in_another_order():
    s, own = fakes.stage(batch_size=6, steps=7), fakes.FakeRecords(count=14)
    batches = MicroBatches(Epochs(own, s, 5), s, 5, lambda samples, rng: [sample.id for sample in samples])
    order = [name for step in range(7) for name in batches[step]]  # 42 places: three epochs of 14
    epochs = [order[start:start + 14] for start in (0, 14, 28)]
    assert all(sorted(epoch) == sorted(f"conversations/{i}" for i in range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Epochs(own, s, 6)[place].id for place in range(14)] != epochs[0]
    backwards = Epochs(own, s, 5)
    assert [backwards[place].id for place in reversed(range(42))] == order[::-1], "an order is a function of its epoch"
    with pytest.raises(UserError, match=r"own has nothing to train stage tune on \(it reads conversations\)"):
        Epochs(fakes.FakeRecords(count=0), s, 5)


def test_a_batch_depends_on_its_step_alone():
    s, model = replace(fakes.stage(accumulate=3, steps=4), augment=True), fresh()
    collate = make_collate(fakes.recipe(), s, TOKENIZER, model.reads)
    straight = [MicroBatches(scenes(s), s, 0, collate)[n] for n in range(12)]
    again = MicroBatches(scenes(s), s, 0, collate)[7]
    assert all(torch.equal(again[key], straight[7][key]) for key in again)


def test_ranks_and_micro_batches_share_the_global_batch_without_overlap():
    s, seen = fakes.stage(batch_size=12, accumulate=2, steps=1), []
    for rank in range(3):
        batches = MicroBatches(scenes(s), s, 0, lambda samples, rng: [sample.id for sample in samples])
        batches.rank, batches.world = rank, 3
        seen += batches[0] + batches[1]
    assert sorted(seen) == sorted(f"scenes/tune/{i}" for i in range(12))
    with pytest.raises(UserError, match="batch_size 7"):
        MicroBatches(scenes(s), fakes.stage(batch_size=7, accumulate=2), 0, None)


def test_the_stream_starts_at_any_step_and_draws_no_random_numbers_of_ours():
    s, model = fakes.stage(accumulate=2, steps=4), fresh()
    batches = MicroBatches(scenes(s), s, 0, make_collate(fakes.recipe(), s, TOKENIZER, model.reads))
    before = torch.get_rng_state()
    late = list(stream(batches, 3, CPU))
    assert torch.equal(before, torch.get_rng_state())
    assert len(late) == 2
    assert all(torch.equal(batch["input_ids"], batches[n]["input_ids"]) for batch, n in zip(late, (6, 7)))


def test_a_broken_sample_stops_the_stream_with_its_own_sentence():
    s = fakes.stage(steps=2, batch_size=4)

    def collate(samples, rng):
        raise UserError(f"{samples[0].id} is broken.")

    with pytest.raises(UserError, match="^scenes/tune/0 is broken.$"):
        next(stream(MicroBatches(scenes(s), s, 0, collate), 0, CPU))


def test_half_of_the_texts_are_the_worlds():
    s = fakes.stage(data="texts")
    own, world = Epochs(fakes.FakeRecords(3, seed=1), s, 0), Mixture(fakes.FakeScenes(seed=2), s, 0)
    samples = [InTurn(own, world)[place] for place in range(8)]
    assert samples[1::2] == [world[place] for place in (1, 3, 5, 7)], "by the places of the stage, so that lessons end where they should"
    assert samples[::2] == [own[place] for place in range(4)]
    assert {sample.id for sample in samples[:6:2]} == {f"texts/{i}" for i in range(3)}


# ---- recipes


def test_steps_on_the_command_line_and_changes_for_real_data():
    recipe = fakes.recipe(stages=(fakes.stage(steps=50, on_data={"augment": True, "steps": 80}),))
    assert resolve(recipe, real=False).stages[0] == replace(recipe.stages[0], on_data={})
    real = resolve(recipe, real=True).stages[0]
    assert (real.augment, real.steps) == (True, 80)
    assert [resolve(recipe, True, steps).stages[0].steps for steps in (0.25, 1, 7, 0.001)] == [20, 80, 7, 1]
    for wrong in (0, -3, 2.5, math.nan, math.inf):
        with pytest.raises(UserError, match="--steps"):
            resolve(recipe, False, wrong)


def test_a_backbone_may_have_more_than_the_model_but_not_less(monkeypatch):
    """BLIP-2 leaves out the encoder's last block; a part that kept its random weights would go unnoticed."""
    fakes.install(monkeypatch.setattr)
    recipe, see = fakes.recipe(), {"eyes.weight": torch.ones(5, 3), "eyes.bias": torch.ones(5), "eyes.more": torch.ones(2)}
    model = weights.initial_model(recipe, recipe.stages[0], 0, {"see": see})
    assert torch.equal(model.eyes.weight, torch.ones(5, 3))
    del see["eyes.bias"]
    with pytest.raises(ValueError, match="align.*eyes.bias"):
        weights.initial_model(recipe, recipe.stages[0], 0, {"see": see})


def test_published_weights_that_are_not_there_are_asked_for(monkeypatch):
    monkeypatch.delenv("NANOVLM_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="org/name.*NANOVLM_WEIGHTS"):
        weights.load_published(fresh(), "eyes", "published", "org/name")


# ---- vital signs


def test_a_part_without_gradient_is_named():
    model, s = fresh(), fakes.stage(data="texts", format="tiny", steps=1)  # no image: nothing reaches the bridge
    train(s, model)
    assert vitals.without_gradient(model) == {"bridge.weight", "bridge.bias"}
    assert "2 of 7" in vitals.gradient_warning({"bridge.weight", "bridge.bias"}, 7)


def test_a_model_that_ignores_its_images_is_told_from_one_that_looks():
    s = fakes.stage("align", data="captions", format="plain", steps=1, batch_size=8)
    seeing, blind = fresh(), fresh()
    nn.init.normal_(seeing.bridge.weight, std=30)
    nn.init.zeros_(blind.bridge.weight)
    batch = micro_batches(s, seeing)[0]
    assert vitals.image_warning(*vitals.image_use(seeing, batch)) is None
    assert "ignores" in vitals.image_warning(*vitals.image_use(blind, batch))
    assert vitals.can_exchange(batch) and not vitals.can_exchange({**batch, "images": batch["images"][:1]})
    assert not vitals.can_exchange({**batch, "frames": torch.zeros(8, 3)}), "pages of text alone have nothing to exchange"


def test_a_blind_guess():
    assert vitals.guess("lm", {}, 270, 1) == pytest.approx(math.log(270))
    pairs = {"images": torch.zeros(5, 3, 2, 2), "negative_ids": torch.zeros(5, 3, 7)}
    assert vitals.guess("itc", pairs, 270, 2) == pytest.approx((math.log(10) + math.log(13)) / 2)
    assert vitals.guess("unheard of", pairs, 270, 2) is None


def test_a_frozen_part_that_changed_is_a_warning():
    before, after = {"a": "1", "b": "2", "c": "3"}, {"a": "9", "b": "8", "c": "3"}
    frozen, trained, warnings = vitals.compare(before, after, ("b", "c.x"))
    assert frozen == {"a": ["1", "9"]} and trained == {"b": ["2", "8"], "c": ["3", "3"]}
    assert warnings == ["a is frozen but changed", "c should learn but did not change"]


def test_looking_at_the_model_leaves_no_trace():
    model = fakes.FakeVLM(fakes.FakeConfig(dropout=0.5))
    freeze(model, ("language",))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with randomness.undisturbed(model):
        assert not model.language.training
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected) and model.language.training and not model.eyes.training


def test_matching_that_sits_on_its_prior_is_named():
    """H(1/3) = 0.6365 is what a blind guess costs; a loss that merely passes by is no cause for alarm elsewhere."""
    assert "0.6361" in vitals.prior_warning({"itc": 2.0, "itm": 0.6361})
    assert vitals.prior_warning({"itm": 0.61}) is None and vitals.prior_warning({"lm": 0.6365}) is None
    assert vitals.guess("itm", {}, 100, 1) == pytest.approx(0.63651, abs=1e-5)


def test_a_gate_that_stays_shut_is_named():
    """Only one that should learn; one that opened the least bit, to either side, is not."""
    model = nn.Module()
    model.attention_gate, model.dense_gate, model.frozen_gate = (nn.Parameter(torch.tensor(value)) for value in (0.0, -0.002, 0.0))
    model.frozen_gate.requires_grad_(False)
    assert vitals.gate_warning(model) == "these gates are still shut (below 0.0001): attention_gate"
    nn.init.constant_(model.attention_gate, 0.002)
    assert vitals.gate_warning(model) is None and vitals.gate_warning(fresh()) is None
