"""Shipped weights: what was stored is found again, rounded once; who begins with them and who does not; and those of this repository."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import training_fakes as fakes
from data_files import draw, write
from source import ROOT

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.recipes.stage import as_config, resolve
from nanovlm.runs import checkpoint, shipped
from nanovlm.runs import run as runs
from nanovlm.runs.cache import Cache
from nanovlm.runs.run import Options, run, trained_model
from nanovlm.runs.setting import Job, Setting, plan
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.datasets import Scenes

SHIPPED = sorted((ROOT / "weights").glob("*.npz"))
MOST_BYTES = 37_000_000


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fakes in place of the real recipes; a run of them, and one of their backbone alone, finished and not shipped yet."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOVLM_SHIPPED", str(tmp_path / "weights"))
    run("fake/tiny", Options(out=str(tmp_path / "a"), cache=False, from_scratch=True))
    run("eyes/tiny", Options(out=str(tmp_path / "eyes"), cache=False, from_scratch=True))
    return tmp_path


def test_what_was_stored_is_found_again_rounded(world, monkeypatch):
    asked, answers = [], shipped.answers
    monkeypatch.setattr(shipped, "answers", lambda weights, *rest: asked.append(weights) or answers(weights, *rest))
    files = shipped.export(world / "a")
    assert [file.name for file in files] == ["fake-tiny@align.npz", "fake-tiny@tune.npz"]
    recipe = recipes.get("fake/tiny")
    weights, trained = shipped.read(recipe, recipe.stage()), checkpoint.load(world / "a/tune.pt")
    assert list(weights) == list(trained)
    assert all(torch.equal(weights[name], tensor.half().float()) for name, tensor in trained.items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in trained.items()), "else rounding was never tested"
    with np.load(files[0]) as stored:
        assert {stored[name].dtype for name in stored.files} == {np.dtype(np.float16), np.dtype(np.uint8)}
    assert all(torch.equal(weights[name], tensor) for name, tensor in asked[1].items()), "the stored answers are those of what is stored"
    about = shipped.load(files[1])[1]
    summary = json.loads((world / "a/summary.json").read_text())
    assert (about["recipe"], about["stage"], about["model"], about["sizes"]) == ("fake/tiny", "tune", "FakeVLM", {"dropout": 0.1})
    assert about["command"] == "python train_tiny.py --recipe fake/tiny --from-scratch"
    rows = [list(row) for row in zip(about["questions"], about["answers"], strict=True)]
    assert rows == answers(weights, recipe, recipe.stage(), shipped.tokenizer()) and len(rows) == 36
    assert about["figures"] == summary["eval"] and about["seed"] == 0 and about["versions"] == summary["versions"]
    assert shipped.seconds("fake/tiny", replace(recipe.stage(), steps=2 * recipe.stage().steps)) == 2 * about["seconds"]


def test_a_frozen_part_is_stored_once(world):
    shipped.export(world / "a")
    align, tune = (np.load(world / "weights" / f"fake-tiny@{name}.npz") for name in ("align", "tune"))
    assert any(name.startswith("eyes.") for name in align.files) and not any(name.startswith("eyes.") for name in tune.files)
    assert json.loads(tune["about"].tobytes())["shared"] == {"eyes": "fake-tiny@align.npz"}


def test_a_run_begins_with_the_shipped_backbone_and_its_tokenizer(world, capsys):
    shipped.export(world / "eyes")
    again, other, scratch = (run("fake/tiny", Options(out=str(world / name), seed=seed, from_scratch=from_scratch, steps=2))
                             for name, seed, from_scratch in (("b", 0, False), ("c", 1, False), ("d", 0, True)))
    assert [summary["stages"][0].get("shipped", False) for summary in (again, other, scratch)] == [True, True, False]
    recipe = recipes.get("eyes/tiny")
    rounded = shipped.read(recipe, recipe.stage())
    assert all(torch.equal(checkpoint.load(world / "b/tune.pt")[name], rounded[name]) for name in rounded if name.startswith("eyes"))
    assert "plan: align 2 steps, tune 2 steps, evaluation" in capsys.readouterr().out


def test_neither_the_cache_nor_a_seed_keeps_a_run_from_the_shipped_backbone(world, monkeypatch):
    """Its tokenizer is the shipped one then, whatever this seed's texts would make."""
    shipped.export(world / "eyes")
    monkeypatch.setattr(fakes.FakeScenes, "texts", lambda self: ["aaaa bbbb"] * 9)
    summary = run("fake/tiny", Options(out=str(world / "b"), cache=False, seed=1, steps=2))
    assert summary["stages"][0]["shipped"] and summary["stages"][0]["steps"] == 5 and not (world / "cache").exists()
    assert checkpoint.load(world / "b/last.pt")["tokenizer"] == shipped.tokenizer().to_dict()
    run("fake/tiny", Options(out=str(world / "c"), from_scratch=True, steps=2))
    assert checkpoint.load(world / "c/last.pt")["tokenizer"] != shipped.tokenizer().to_dict()


def test_a_persons_own_data_take_nothing_that_is_shipped(world):
    shipped.export(world / "eyes")
    draw(world / "own", *(f"{name}.png" for name in "abcdefgh"))
    for name in "abcdefgh":
        write(world / "own" / f"{name}.txt", f"red {name}")
    summary = run("fake/tiny", Options(data=str(world / "own"), out=str(world / "b"), steps=2))
    assert not any(stage["shipped"] for stage in summary["stages"])
    assert checkpoint.load(world / "b/last.pt")["tokenizer"] != shipped.tokenizer().to_dict()


def setting_of(name: str, **options) -> Setting:
    return Setting(recipes.get(name), 0, torch.device("cpu"), fakes.FakeScenes(), shipped.tokenizer(), **options)


def test_what_is_trained_on_a_shipped_backbone_is_kept_under_its_file(world):
    """Other weights in it, or none of them, and what stands on it is another model."""
    shipped.export(world / "eyes")
    recipe, keys, file = recipes.get("fake/tiny"), [], shipped.path("eyes/tiny", "see")
    for value in (0.0, 1.0):
        state, about = shipped.load(file)
        shipped.write({name: tensor + value for name, tensor in state.items()}, about, file)
        setting = setting_of("fake/tiny")
        keys += [Cache(setting).key(Job(recipe, recipe.stage())), Cache(setting).key(Job(recipe, recipe.stage()))]
    keys.append(Cache(setting_of("fake/tiny", from_scratch=True)).key(Job(recipe, recipe.stage())))
    assert keys[0] == keys[1] != keys[2] == keys[3] and len(set(keys)) == 3


def test_behind_what_is_shipped_nothing_is_planned(world, monkeypatch):
    """A stage on top of fake/tiny needs neither its first stage nor its eyes, once fake/tiny is shipped."""
    more = fakes.recipe("more/tiny", stages=(fakes.stage("more", steps=2, init=(("", "fake/tiny"),)),))
    monkeypatch.setitem(recipes.RECIPES, "more/tiny", more)
    setting = setting_of("more/tiny") if shipped.export(world / "a", ["tune"]) else None
    assert [job.stage.name for job in plan(Job(more, more.stage()), setting)] == ["see", "align", "tune", "more"]
    assert [job.stage.name for job in plan(Job(more, more.stage()), setting, Cache(setting).has)] == ["more"]


def test_of_another_seed_a_models_own_stages_are_not_shipped(world, monkeypatch):
    shipped.export(world / "eyes")
    shipped.export(world / "a")
    trained, real = [], runs.train
    monkeypatch.setattr(runs, "train", lambda job, *rest: trained.append(job.stage.name) or real(job, *rest))
    trained_model("fake/tiny", seed=1)
    assert trained == ["align", "tune"]


def test_a_model_that_nobody_trained_here_is_opened_as_it_is_shipped(world, monkeypatch):
    shipped.export(world / "eyes")
    shipped.export(world / "a")
    model, tokenizer = trained_model("fake/tiny")
    weights = shipped.read(recipes.get("fake/tiny"), recipes.get("fake/tiny").stage())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.to_dict() == shipped.tokenizer().to_dict()
    assert list((world / "cache").glob("*")) == [], "nothing was trained"


def test_a_shortened_run_and_another_tokenizer_are_not_shipped(world):
    run("fake/tiny", Options(out=str(world / "short"), steps=2))
    with pytest.raises(UserError, match="no full run"):
        shipped.export(world / "short")
    run("eyes/tiny", Options(out=str(world / "other"), seed=1))
    with pytest.raises(UserError, match="no full run of seed 0"):
        shipped.export(world / "other")
    shipped.export(world / "a")
    (world / "weights/tokenizer.json").write_text('{"specials": ["<pad>"], "merges": []}')
    with pytest.raises(UserError, match="another tokenizer"):
        shipped.export(world / "a")


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_broken_file_is_one_sentence_and_anothers_is_left_alone(world, capsys):
    (file, *_), recipe = shipped.export(world / "a"), recipes.get("fake/tiny")
    np.savez(file, about=np.frombuffer(json.dumps({"tensors": ["eyes.weight"], "shared": {}}).encode(), np.uint8),
             **{"eyes.weight": np.zeros((3, 3), np.float16)})
    assert shipped.read(recipe, recipe.stage("align")) is None and "holds another fake/tiny" in capsys.readouterr().err
    whole = file.read_bytes()
    np.savez(world / "pickled.npz", about=np.array([Evil(world / "owned")], dtype=object), allow_pickle=True)
    np.savez(world / "list.npz", about=np.frombuffer(b"[1, 2]", np.uint8))
    middle = len(whole) // 2
    for content in (whole[:100], b"", b"text", whole[:middle] + b"damage" + whole[middle + 6:],
                    (world / "pickled.npz").read_bytes(), (world / "list.npz").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read.*restore the file"):
            shipped.read(recipe, recipe.stage("align"))
    assert not (world / "owned").exists(), "a file that is opened runs no code"


def test_a_backbone_of_another_size_is_named_once_and_trained(world, monkeypatch, capsys):
    """And the plan says so."""
    (file,) = shipped.export(world / "eyes")
    state, about = shipped.load(file)
    shipped.write({**state, "eyes.weight": torch.zeros(6, 3)}, about, file)
    summary = run("fake/tiny", Options(out=str(world / "b"), cache=False))
    out, err = capsys.readouterr()
    assert not any(stage["shipped"] for stage in summary["stages"]) and "plan: see 5 steps, align 4 steps, tune 20 steps" in out
    assert err.count("eyes-tiny@see.npz holds another eyes/tiny than today's recipe has: it is not used.") == 1


def test_the_command_says_what_it_wrote(world, capsys):
    assert shipped.main([str(world / "a"), "--stages", "tune"]) == 0
    file = world / "weights/fake-tiny@tune.npz"
    assert capsys.readouterr().out == f"{file}: {file.stat().st_size:,} bytes\n"
    assert shipped.main([str(world / "a"), "--stages", "see"]) == 2 and "has no stage 'see'" in capsys.readouterr().err
    assert shipped.main([str(world / "nowhere")]) == 2 and capsys.readouterr().err.count("\n") == 1


# --- this repository's own ---

@pytest.mark.skipif(not SHIPPED, reason="weights/ is empty")
def test_all_of_it_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "weights").iterdir()) <= MOST_BYTES


@pytest.mark.skipif(not SHIPPED, reason="weights/ is empty")
def test_the_shipped_tokenizer_fits_todays_world(world_tokenizer):
    """It was trained on the texts of its day: today's need hardly more tokens than with one that is trained on them."""
    kept = Tokenizer.from_dict(json.loads((ROOT / "weights/tokenizer.json").read_text(encoding="utf-8")))
    assert kept.specials == world_tokenizer.specials
    texts = Scenes(0).texts()[::10]
    lengths = [sum(len(tokenizer.encode(text)) for text in texts) for tokenizer in (kept, world_tokenizer)]
    assert lengths[0] < 1.01 * lengths[1]


def completed(then: dict, now: dict) -> dict:
    """Sizes as they were stored, with what they did not know yet as it is now."""
    return {**now, **{name: completed(value, now.get(name, {})) if isinstance(value, dict) else value for name, value in then.items()}}


def test_stored_sizes_are_compared_field_by_field():
    now = {"width": 64, "vision": {"patch": 12, "pool": "token"}}
    assert completed({"vision": {"patch": 12}}, now) == now
    assert completed({"vision": {"patch": 16}}, now) != now and completed({"gone": {"by": 1}}, now) != now


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_weights_answer_as_they_did(file, monkeypatch):
    """In today's recipe. Two answers may differ: where two words are equally likely, the machine's rounding decides."""
    monkeypatch.setenv("NANOVLM_SHIPPED", str(ROOT / "weights"))
    about = shipped.load(file)[1]
    recipe = resolve(recipes.get(about["recipe"]), real=False)
    stage = recipe.stage(about["stage"])
    assert file == shipped.path(recipe.name, stage.name) and about["steps"] == stage.steps
    sizes = as_config(replace(recipe.config, **stage.sizes))
    asked, answers = zip(*shipped.answers(shipped.read(recipe, stage), recipe, stage, shipped.tokenizer()))
    # the first files to be shipped tell neither, and fields that a config got since are not in theirs
    assert completed(about.get("sizes", {}), sizes) == sizes and about.get("questions", list(asked)) == list(asked)
    assert len(answers) == len(about["answers"]) > 10
    assert sum(now != then for now, then in zip(answers, about["answers"])) <= 2
