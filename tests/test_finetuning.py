"""Fine-tuning: weights from a stage in the middle, laid over each other; layers that learn slower; BLIP-2's three tasks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_fakes as fakes
from oracles import QUERIES, hf_instructblip, scores
from tools import close, pad_mask, randn, random_ids
from torch import nn

from nanovlm import hub, recipes
from nanovlm.attention import KVCache
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.evaluate import judges
from nanovlm.evaluate.pupil import Pupil
from nanovlm.hub import configs, names
from nanovlm.papers.blip2 import BLIP2, BLIP2Stage1
from nanovlm.recipes.stage import Recipe
from nanovlm.runs import checkpoint, watch
from nanovlm.runs.cache import Cache
from nanovlm.runs.run import Options, run
from nanovlm.runs.setting import Job, Setting, plan
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import weights
from nanovlm.training.batches import make_collate
from nanovlm.training.loop import freeze
from nanovlm.training.optim import layer_of, make_optimiser, set_lr
from nanovlm.world.datasets import Scenes

MIDDLE, END = ("", "fake/tiny@align"), ("", "fake/tiny")


def more(*init: tuple[str, str], name: str = "more", size: int = 6) -> Recipe:
    return replace(fakes.recipe("more/tiny", (fakes.stage(name, ("bridge",), steps=2, init=init),)), image_size=size)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fakes in place of the real recipes, an empty cache, and the folder for runs."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.setitem(recipes.RECIPES, "more/tiny", more(MIDDLE))
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


# --- where weights come from ---

def jobs_of(recipe: Recipe) -> tuple[list[Job], Setting]:
    """All stages of a run, and what they share."""
    setting = Setting(recipe, 0, torch.device("cpu"), fakes.FakeScenes(size=recipe.image_size), Tokenizer([]))
    return plan(Job(recipe, recipe.stages[-1]), setting), setting


@pytest.mark.parametrize(("init", "want"), [
    ((MIDDLE,), ["see", "align", "more"]),
    ((END,), ["see", "align", "tune", "more"]),
    ((MIDDLE, END), ["see", "align", "tune", "more"]),
    ((END, MIDDLE), ["see", "align", "tune", "more"]),
    ((("eyes", "eyes/tiny:eyes"), MIDDLE), ["see", "align", "more"])])
def test_only_what_is_needed_is_trained_and_once(world, init, want):
    jobs, setting = jobs_of(more(*init))
    assert [job.stage.name for job in jobs] == want
    assert [setting.final(job) for job in jobs] == [False] * (len(want) - 1) + [True]


def test_stages_that_are_not_there_or_not_told_apart_are_refused(world):
    with pytest.raises(UserError, match="fake/tiny has no stage 'algin'; its stages are align, tune"):
        jobs_of(more(("", "fake/tiny@algin")))
    with pytest.raises(ValueError, match="same name.*see, align, align"):
        jobs_of(more(MIDDLE, name="align"))


def test_entries_are_laid_over_each_other_tensor_by_tensor(world):
    """The first has all, the second the bridge's weight only: the bias is the first's still."""
    whole = {name: torch.full_like(tensor, 1.0) for name, tensor in fakes.FakeVLM().state_dict().items()}
    part = {"bridge.weight": torch.full((7, 5), 2.0), "unheard.of": torch.zeros(1)}
    finished = {"align": whole, "tune": part}
    recipe = more(MIDDLE, END)
    model = weights.initial_model(recipe, recipe.stages[0], 0, finished).state_dict()
    assert {name: float(t.flatten()[0]) for name, t in model.items()} == {
        name: 2.0 if name == "bridge.weight" else 1.0 for name in whole}
    recipe = more(END, MIDDLE)
    model = weights.initial_model(recipe, recipe.stages[0], 0, finished).state_dict()
    assert all(tensor.eq(1).all() for tensor in model.values()), "the later one wins"
    recipe = more(("bridge", "fake/tiny:bridge"))
    with pytest.raises(ValueError, match="more.*nothing.*bridge.bias"):
        weights.initial_model(recipe, recipe.stages[0], 0, finished)


def test_a_stage_in_the_middle_is_shared_with_the_whole_run(world):
    """The cache knows it whether or not something is trained behind it, and what follows begins with its weights."""
    run("fake/tiny", Options(out=str(world / "whole")))
    summary = run("more/tiny", Options(out=str(world / "more")))
    assert [(s["name"], s["cached"]) for s in summary["stages"]] == [("align", True), ("more", False)], "what is cached needs nothing"
    align, new = (checkpoint.load(world / f"more/{name}.pt") for name in ("align", "more"))
    assert torch.equal(align["eyes.weight"], new["eyes.weight"])
    assert not torch.equal(align["bridge.weight"], new["bridge.weight"])
    run("more/tiny", Options(out=str(world / "again"), cache=False))
    assert all(torch.equal(tensor, new[name]) for name, tensor in checkpoint.load(world / "again/more.pt").items())


def test_what_made_a_stage_is_in_its_key(world, monkeypatch):
    def key(stage: str) -> str:
        jobs, setting = jobs_of(recipes.get("more/tiny"))
        return Cache(setting).key(next(job for job in jobs if job.stage.name == stage))

    before = {name: key(name) for name in ("align", "more")}
    align, tune = fakes.recipe().stages
    for changed, same in (((align, replace(tune, lr=1.0)), True), ((replace(align, lr=1.0), tune), False)):
        monkeypatch.setitem(recipes.RECIPES, "fake/tiny", replace(fakes.recipe(), stages=changed))
        assert [key(name) == before[name] for name in ("align", "more")] == [same, same]


def test_every_recipe_of_a_run_sees_pictures_of_its_own_size(world):
    """Fine-tuning looks closer than what it starts from; the backbones are those of any other run all the same."""
    jobs, setting = jobs_of(recipes.get("more/tiny"))
    assert [(job.stage.name, setting.data_for(job).image_size) for job in jobs] == [("see", 4), ("align", 4), ("more", 6)]


# --- layers that learn slower ---

def test_the_earlier_a_layer_the_smaller_its_step():
    """AdamW's first step is the learning rate itself, whatever the gradient: three blocks, halved from each to the one before."""
    model = recipes.build("blip2/tiny-retrieval", "cpu")
    freeze(model, ("vision", "vision_norm", "temperature"))
    stage = fakes.stage(layer_decay=0.5, weight_decay=0.0, steps=3)
    optimiser = make_optimiser(model, stage)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    set_lr(optimiser, 0.16)
    optimiser.step()
    want = {"vision.patch_embedding": 0.01, "vision.class_token": 0.01, "vision.positions": 0.01, "vision.pre_norm": 0.01,
            "vision.blocks.0": 0.02, "vision.blocks.1": 0.04, "vision.blocks.2": 0.08,
            "vision_norm": 0.16, "temperature": 0.16}
    steps = {name: float((before[name] - p.detach()).mean()) for name, p in model.named_parameters()}
    for name, step in steps.items():
        expected = next((lr for part, lr in want.items() if name == part or name.startswith(part + ".")), 0.0)
        assert step == pytest.approx(expected, abs=1e-5), name
    resumed = make_optimiser(model, stage)
    resumed.load_state_dict(optimiser.state_dict())
    set_lr(resumed, 1.6)
    assert sorted({group["lr"] for group in resumed.param_groups}) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])


def test_the_last_norm_of_an_encoder_is_behind_its_layers():
    names = ("vision.norm.weight", "vision_norm.weight", "vision.pre_norm.weight", "language.blocks.3.norm1.weight")
    assert [layer_of(name) for name in names] == [None, None, 0, None]
    assert layer_of("vision.blocks.11.norm1.weight") == 12


# --- the question enters the Q-Former ---

B, T_Q = 4, 6


@pytest.fixture(scope="module")
def asking() -> tuple:
    """InstructBLIP's model of transformers, and ours with its weights."""
    hf = hf_instructblip(1)
    model = BLIP2(configs.instructblip(hf.config.to_dict()))
    assert hub.fill(model, hub.as_ours(hf.state_dict(), key_bias=False), names.INSTRUCTBLIP, {}) == []
    return hf, model.eval()


def questions() -> dict[str, torch.Tensor]:
    return {"qformer_input_ids": random_ids(B, T_Q, 5), "qformer_attention_mask": pad_mask([6, 3, 1, 4], "right", T_Q)}


def test_the_prefix_is_that_of_instructblip(asking):
    hf, model = asking
    images, asked = randn(B, 3, 20, 20, seed=1), questions()
    with torch.no_grad():
        want = hf.get_image_features(images, asked["qformer_input_ids"], asked["qformer_attention_mask"].long(),
                                     return_dict=True).pooler_output
        got = model.image_prefix(images, **asked)
        assert want.std() > 0.1 and got.shape == (B, QUERIES, 36)
        close(got, want)
        other = {**asked, "qformer_input_ids": asked["qformer_input_ids"].roll(1, dims=0)}
        assert (model.image_prefix(images, **other) - got).abs().amax(dim=(1, 2)).min() > 1e-2, "each row asks its own"
        noise = {**asked, "qformer_input_ids": asked["qformer_input_ids"].masked_fill(~asked["qformer_attention_mask"], 17)}
        assert torch.equal(model.image_prefix(images, **noise), got), "padding is not read"


def test_whoever_answers_has_heard_the_question(asking):
    """Loss, logits, score and generation read the same prefix, which the question has part in."""
    _, model = asking
    images, ids, mask, asked = randn(B, 3, 20, 20, seed=1), random_ids(B, 5, 2), pad_mask([5] * B, "left", 5), questions()
    other = {**asked, "qformer_input_ids": asked["qformer_input_ids"].roll(1, dims=1)}
    with torch.no_grad():
        logits = model(images, ids, mask, ids, **asked)
        total, count = model.losses({"images": images, "input_ids": ids, "attention_mask": mask, "labels": ids, **asked})["lm"]
        close(total / count, logits.loss)
        assert (model(images, ids, mask, ids, **other).loss - logits.loss).abs() > 1e-3
        last = logits.logits[:, -1].log_softmax(dim=-1)
    batch = {"images": images, "input_ids": ids, "attention_mask": mask, **asked}
    close(scores(model, batch, [[7], [9]]), last[:, [7, 9]])
    assert model.generate(batch, 1, [])[:, 0].tolist() == last.argmax(dim=-1).tolist()
    with pytest.raises(UserError, match="reads the question too: give qformer_input_ids"):
        model.image_prefix(images)
    pruned = recipes.build("blip2/tiny", "cpu")
    with pytest.raises(UserError, match="reads no question: leave out"):
        pruned.image_prefix(randn(B, 3, 48, 48), **asked)


def test_all_questions_of_a_conversation_are_read_and_of_too_many_the_last():
    tokenizer = Tokenizer.train(["what colour is it? sure? and the other?"] * 9, 300)
    talk = (Turn("<image>\nwhat colour is it?", "red"), Turn("sure?", "yes"))
    samples = [Sample("a", turns=talk), Sample("b", turns=talk[1:]), Sample("c", turns=(talk[0], *talk[1:] * 200))]
    asked = Collate(tokenizer, "blip2", Transform(48), Reads(question=64)).questions(samples)
    texts = [tokenizer.decode(ids[mask].tolist(), specials=True)
             for ids, mask in zip(asked["qformer_input_ids"], asked["qformer_attention_mask"])]
    assert texts[:2] == ["<s>what colour is it? sure?</s>", "<s>sure?</s>"]
    assert asked["qformer_input_ids"].shape == (3, 64) and texts[2].startswith("<s>") and texts[2].endswith(" sure?</s>")
    assert "colour" not in texts[2]


class Listener(nn.Module):
    """Says and prefers what it was asked."""

    def __init__(self, asks: bool):
        super().__init__()
        self.reads, self.heard = Reads("conversations", question=64 * asks), []

    def generate(self, batch, room, stop):
        self.heard.append(batch)
        return batch["input_ids"][:, :1]

    def prefill(self, batch):
        self.heard.append(batch)
        return torch.zeros(len(batch["input_ids"]), 500), KVCache()

    def step(self, ids, cache):
        return torch.zeros(*ids.shape, 500), cache


@pytest.mark.parametrize("asks", [True, False])
def test_in_training_and_in_an_exam_only_a_model_that_asks_is_told(asks):
    recipe, tokenizer, model = recipes.get("blip2/tiny-vqa"), Tokenizer.train(Scenes().texts()[:200], 500), Listener(asks)
    samples = [Scenes().held_out("talk", i) for i in range(3)]
    batch = make_collate(recipe, replace(recipe.stages[0], augment=False), tokenizer, model.reads)(samples, None)
    pupil = Pupil(model, recipe, recipe.stages[0], tokenizer, "cpu")
    pupil.answer(samples)
    pupil.best(samples, ["red"])
    want = Collate(tokenizer, "blip2", Transform(48), Reads(question=64)).questions(samples)
    assert len(model.heard) == 2
    for told in (batch, *model.heard):
        assert {name for name in told if name.startswith("qformer")} == (set(want) if asks else set())
        assert all(torch.equal(told[name], want[name]) for name in want if asks)


# --- who is asked for what it cannot do ---

def test_stage_2_cannot_retrieve():
    model, recipe = recipes.build("blip2/tiny", "cpu"), recipes.get("blip2/tiny")
    stage = replace(recipe.stages[1], evaluate=("retrieval",))
    with pytest.raises(UserError, match="cannot be judged by retrieval.*only stage 1"):
        judges.evaluate(Pupil(model, recipe, stage, Tokenizer.train(["a"], 270), "cpu"), Scenes())


def test_a_published_retrieval_model_cannot_be_trained():
    config = replace(recipes.blip2.TINY.config, trains=False)
    model, ids = BLIP2Stage1(config), torch.ones(2, 3, dtype=torch.long)
    batch = {"images": randn(2, 3, 48, 48), "input_ids": ids, "attention_mask": ids.bool(), "text_group": ids[:, 0],
             "image_group": ids[:, 0]}
    with pytest.raises(UserError, match="no word head and no temperature.*to be trained"):
        model.losses(batch)
    with pytest.raises(UserError, match="no word head and no temperature.*to describe a picture"):
        model.generate(batch, 5, [])


# --- the recipes ---

def test_the_published_stages_are_those_of_the_tables():
    """name: steps, batch, lr, β₂, decay by layers, resolution."""
    want = {"vit-g-opt-2.7b-caption": (11_069, 256, 1e-5, 0.999, 1.0, 364), "vit-g-opt-6.7b-caption": (11_069, 256, 1e-5, 0.999, 0.95, 364),
            "vit-g-opt-2.7b-vqa": (25_707, 128, 1e-5, 0.999, 0.95, 490), "vit-g-opt-6.7b-vqa": (25_707, 128, 1e-5, 0.999, 0.9, 490),
            "vit-l-retrieval": (12_651, 224, 5e-6, 0.98, 0.95, 364), "vit-g-retrieval": (12_651, 224, 1e-5, 0.999, 0.95, 364)}
    for name, row in want.items():
        recipe = recipes.get(f"blip2/{name}")
        [stage] = recipe.stages
        assert (stage.steps, stage.batch_size, stage.lr, stage.betas[1], stage.layer_decay, recipe.image_size) == row
        assert round(stage.warmup * stage.steps) == 1000 and stage.weight_decay == 0.05 and stage.betas[0] == 0.9


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def short(name: str, runs: Path, monkeypatch) -> tuple[dict, dict]:
    """Two steps of every stage → the summary, and {stage: its weights}."""
    monkeypatch.setenv("NANOVLM_CACHE", str(runs / "cache"))
    monkeypatch.setattr(watch, "save_curves", lambda *paths: None)
    monkeypatch.setattr(watch, "save_samples", lambda *rows: None)
    exam, galleries = Scenes.exam, Scenes.galleries
    monkeypatch.setattr(Scenes, "exam", lambda self, n=1, *what, **how: exam(self, 1, *what, **how))
    monkeypatch.setattr(Scenes, "galleries", lambda self: galleries(self, 20))
    out = runs / name.replace("/", "-")
    summary = run(name, Options(out=str(out), steps=2))
    return summary, {stage["name"]: checkpoint.load(out / f"{stage['name']}.pt") for stage in summary["stages"]}


@pytest.mark.parametrize(("task", "start", "figure"), [
    ("caption", "stage2", "caption_exact"), ("vqa", "stage2", "vqa_accuracy"), ("retrieval", "stage1", "i2t_r1")])
def test_the_encoder_learns_and_the_language_model_does_not(runs, monkeypatch, task, start, figure):
    """Each tensor of what learns changes (positions that are stretched too), and no other."""
    summary, after = short(f"blip2/tiny-{task}", runs, monkeypatch)
    [stage] = recipes.get(f"blip2/tiny-{task}").stages
    finished, new = {name: state for name, state in after.items() if name != task}, after[task]
    begun = weights.initial_model(recipes.get(f"blip2/tiny-{task}"), stage, 0, finished).state_dict()
    idle = ("qformer.layers.3.feedforward.", "qformer.layers.3.residual2.") if task == "vqa" else ()
    for name, tensor in new.items():
        learns = name.split(".")[0] in stage.trains and not name.startswith(idle)
        assert torch.equal(tensor, begun[name]) != learns, name
        source = after[start] if name in after[start] else after["stage1"]
        assert torch.equal(begun[name], source[name]), name
    half = [name for name in new if name not in after[start]]
    assert bool(half) == (task == "vqa") and all("embeddings" in n or ".feedforward." in n or "residual2" in n for n in half)
    record = summary["stages"][-1]
    assert not [warning for warning in record["warnings"] if "gradient" in warning]
    assert ("language" in record["frozen"]) == (task != "retrieval") and figure in summary["eval"]
    size = recipes.get(f"blip2/tiny-{task}").image_size
    tokens = recipes.build(f"blip2/tiny-{task}", "cpu").encode_image(randn(1, 3, size, size)).shape[1]
    assert (len(new["vision.positions"]), tokens) == (17, 17 if task == "vqa" else 37), "positions are stretched"
    steps = (new["vision.positions"] - begun["vision.positions"]).abs().amax(dim=1)
    assert steps.min() > 1e-4, "and learn through that: weight decay alone is ten times smaller"
