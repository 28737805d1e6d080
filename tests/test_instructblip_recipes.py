"""InstructBLIP's recipes: how the sets are balanced, the paper's schedule, and where the weights come from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import hf_blip2_retrieval, hf_blip2_t5, hf_llama, ours

from nanovlm import recipes
from nanovlm.papers.blip2 import BLIP2
from nanovlm.recipes.instructblip import HELD_IN, balanced
from nanovlm.recipes.stage import Recipe
from nanovlm.training.weights import initial_model, needed_stages

PUBLISHED = {"flan-t5-xl": 192, "flan-t5-xxl": 64, "vicuna-7b": 128, "vicuna-13b": 64}  # §2.6: batches of 60,000 steps
TEXT_HALF = ("qformer.embeddings.", ".feedforward.", ".residual2.")


# --- how often which set is drawn ---

@pytest.mark.parametrize(("by", "power"), [("proportional", 1), ("sqrt", 0.5), ("uniform", 0)])
def test_shares_are_the_formulas(by, power):
    """§2.4, to 1e-12; a factor counts before all are made 1 in sum."""
    got = balanced({"a": 400, "b": 25, "c": 3}, by)
    whole = 400 ** power + 25 ** power + 3 ** power
    for name, size in (("a", 400), ("b", 25), ("c", 3)):
        assert got[name] == pytest.approx(size ** power / whole, abs=1e-12)
    by_hand = balanced({"a": 400, "b": 25}, factors={"b": 0.5})
    assert by_hand == pytest.approx({"a": 20 / 22.5, "b": 2.5 / 22.5}, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("instructblip/")])
def test_a_mixture_is_drawn_by_the_roots_of_its_sizes_whatever_the_size_of_the_model(name):
    assert recipes.get(name).stage().real == "instructions", "which is what Setting.samples draws as Balanced"


def test_the_worked_example():
    """The ten sets that ask for no question, by the sizes of Table 4, in percent; of 11.52 million draws how often each is seen."""
    ten = {name: size for name, size in HELD_IN.items() if not name.endswith("questions")}
    want = {"Web CapFilt": (59.9, 0.49), "OCR-VQA": (14.3, 2.1), "COCO Caption": (4.58, 6.4), "VQAv2": (4.58, 6.4), "LLaVA reasoning": (4.44, 6.6),
            "LLaVA conversation": (3.85, 7.6), "LLaVA detail": (2.43, 12), "TextCaps": (2.32, 13), "A-OKVQA": (2.09, 14), "OKVQA": (1.52, 19)}
    shares = balanced(ten)
    assert shares.keys() == want.keys() and len(HELD_IN) == 13
    for name, (percent, epochs) in want.items():
        assert 100 * shares[name] == pytest.approx(percent, abs=0.05), name
        assert shares[name] * 60_000 * 192 / (1000 * ten[name]) == pytest.approx(epochs, rel=0.04), name
    for name in ("VQAv2", "OKVQA", "A-OKVQA"):
        assert HELD_IN[f"{name} questions"] == HELD_IN[name], "as large as the set that is reversed"


# --- the schedule ---

@pytest.mark.parametrize("name", PUBLISHED)
def test_the_schedule_is_the_papers(name):
    recipe = recipes.get(f"instructblip/{name}")
    stage = recipe.stages[-1]
    assert (stage.steps, stage.batch_size, stage.lr, stage.schedule, stage.min_lr) == (60_000, PUBLISHED[name], 1e-5, "cosine", 0.0)
    assert (stage.betas, stage.weight_decay, stage.augment, stage.layer_decay) == ((0.9, 0.999), 0.05, True, 1.0)
    assert round(stage.warmup * stage.steps) == 1_000 and recipe.image_size == 224
    assert (stage.mixed, stage.real) == ("batches", "instructions")
    assert stage.data == balanced(HELD_IN) and stage.trains == ("vision_norm", "qformer", "projection")
    assert (stage.format, recipe.vocab) == (("instructblip-t5", 32_128) if "t5" in name else ("instructblip", 32_001))
    assert [s.builds for s in recipe.stages] == ([None] if "t5" in name else [BLIP2, None])
    if "vicuna" in name:
        assert recipe.stages[0].data == recipes.get("blip2/vit-g-opt-2.7b").stage("stage2").data


def test_the_small_one_begins_with_both_stages_of_small_blip2():
    assert needed_stages(recipes.get("instructblip/small").stage()) == [("blip2/small", "stage1"), ("blip2/small", "stage2")]


# --- where weights come from: small checkpoints under the published names ---

@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of published weights, and each model as ours."""
    home = tmp_path_factory.mktemp("weights")
    files = {"Salesforce/blip2-itm-vit-g": hf_blip2_retrieval(1), "Salesforce/blip2-flan-t5-xl": hf_blip2_t5(2), "lmsys/vicuna-7b-v1.1": hf_llama(3)}
    for name, hf in files.items():
        hf.save_pretrained(home / name)
    return home, {name.rpartition("/")[2]: ours(hf) for name, hf in files.items()}


def shrunk(name: str, models: dict) -> Recipe:
    """The published recipe in the sizes of the checkpoints; Vicuna's vocabulary is one word larger than its file's."""
    small = models["blip2-flan-t5-xl"].config
    language = small.language if "t5" in name else replace(models["vicuna-7b-v1.1"].language.config, vocab=54)
    return replace(recipes.get(name), config=replace(small, language=language, asks=True))


def of_stage_1(name: str) -> bool:
    return any(part in name for part in TEXT_HALF) and name.startswith("qformer.")


def test_published_stage_2_is_laid_over_published_stage_1(theirs, monkeypatch):
    """The text half is stage 1's, and nothing else: both files have the query half, in other numbers."""
    home, models = theirs
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(home))
    recipe = shrunk("instructblip/flan-t5-xl", models)
    found = initial_model(recipe, recipe.stage(), 0, {}).state_dict()
    first, second = models["blip2-itm-vit-g"].state_dict(), models["blip2-flan-t5-xl"].state_dict()
    half = {name for name in found if of_stage_1(name)}
    assert found.keys() - half == second.keys() and half < first.keys() and len(half) == 2 + 3 * 6
    for name, tensor in found.items():
        assert torch.equal(tensor, (first if name in half else second)[name]), name
        assert name in half or name not in first or not torch.equal(tensor, first[name]) or name.endswith("norm.bias"), name


@pytest.mark.parametrize("name", ["instructblip/flan-t5-xl", "instructblip/vicuna-7b"])
def test_without_stage_1_the_missing_text_half_is_an_error(theirs, monkeypatch, name):
    """No silent random start: the tensors are named."""
    home, models = theirs
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(home))
    recipe = shrunk(name, models)
    finished = {stage.name: recipe.build(stage).state_dict() for stage in recipe.stages[:-1]}
    stage = replace(recipe.stage(), init=recipe.stage().init[1:])
    with pytest.raises(ValueError, match="Stage tune: nothing that init names has qformer.embeddings.positions.weight, qformer.embeddings.words.weight, qf"):
        initial_model(replace(recipe, stages=(*recipe.stages[:-1], stage)), stage, 0, finished)


def test_vicuna_runs_stage_2_first_and_gets_its_text_half_from_stage_1(theirs, monkeypatch):
    home, models = theirs
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(home))
    recipe, first = shrunk("instructblip/vicuna-7b", models), models["blip2-itm-vit-g"].state_dict()
    begun = initial_model(recipe, recipe.stage("stage2"), 0, {})
    assert type(begun) is BLIP2 and begun.reads.question == 0
    state, vicuna = begun.state_dict(), models["vicuna-7b-v1.1"].state_dict()
    for name, tensor in state.items():
        if name.startswith(("vision.", "vision_norm.", "qformer.")):
            assert torch.equal(tensor, first[name]), name
        elif name.startswith("language."):
            assert torch.equal(tensor[:len(vicuna[name])], vicuna[name]) and len(tensor) - len(vicuna[name]) == (len(vicuna[name]) == 53), name
            assert tensor[-1].abs().max() > 0, "the word that was added"
    finished = {name: tensor + 1 for name, tensor in state.items()}
    tuned = initial_model(recipe, recipe.stage("tune"), 0, {"stage2": finished}).state_dict()
    assert needed_stages(recipes.get("instructblip/vicuna-7b").stage("tune")) == [("instructblip/vicuna-7b", "stage2")]
    for name, tensor in tuned.items():
        assert torch.equal(tensor, first[name] if of_stage_1(name) else finished[name]), name
    assert any(map(of_stage_1, tuned))


# --- fine-tuning ---

def test_fine_tuned_on_one_set_it_goes_on_from_the_whole_model():
    """§3.5: what learns is what learned before, 188M of it; the eyes stay frozen at 224 pixels."""
    tuned = [recipes.get(name) for name in recipes.names() if name.startswith("instructblip/") and recipes.get(name).stage().name == "one-set"]
    assert len(tuned) == 1 + 2 * 3
    for recipe in tuned:
        stage, base = recipe.stage(), recipes.get(dict(recipe.stage().init)[""])
        assert stage.init == (("", base.name),) and stage.trains == base.stage().trains and recipe.image_size == base.image_size
        (name,) = stage.data
        assert name in base.stage().data and stage.mixed == "samples"
        if "tiny" not in base.name:
            assert stage.steps * stage.batch_size == pytest.approx(5_000 * HELD_IN[name], rel=0.01), "five epochs"
