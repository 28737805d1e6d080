"""Shipped weights: what was stored is found again, rounded once; who begins with them and who does not; and those of this repository."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import training_fakes as fakes
from source import ROOT

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.recipes.stage import resolve
from nanovlm.runs import checkpoint, shipped
from nanovlm.runs.run import Options, run, trained_model

SHIPPED = sorted((ROOT / "weights").glob("*.npz"))
MOST_BYTES = 12_000_000


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fakes in place of the real recipes; a run of them, and one of their backbone alone, finished and not shipped yet."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOVLM_SHIPPED", str(tmp_path / "weights"))
    run("fake/tiny", Options(out=str(tmp_path / "a"), cache=False, from_scratch=True))
    run("eyes/tiny", Options(out=str(tmp_path / "eyes"), cache=False, from_scratch=True))
    return tmp_path


def test_what_was_stored_is_found_again_rounded(world):
    files = shipped.export(world / "a")
    assert [file.name for file in files] == ["fake-tiny@align.npz", "fake-tiny@tune.npz"]
    recipe = recipes.get("fake/tiny")
    weights, trained = shipped.read(recipe, recipe.stage()), checkpoint.load(world / "a/tune.pt")
    assert list(weights) == list(trained)
    assert all(torch.equal(weights[name], tensor.half().float()) for name, tensor in trained.items())
    assert not all(torch.equal(weights[name], tensor) for name, tensor in trained.items()), "else rounding was never tested"
    with np.load(files[0]) as stored:
        assert {stored[name].dtype for name in stored.files} == {np.dtype(np.float16), np.dtype(np.uint8)}
    about = shipped.load(files[1])[1]
    summary = json.loads((world / "a/summary.json").read_text())
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
    shipped.export(world / "a")
    (world / "weights/tokenizer.json").write_text('{"specials": ["<pad>"], "merges": []}')
    with pytest.raises(UserError, match="another tokenizer"):
        shipped.export(world / "a")


def test_a_broken_file_is_one_sentence_and_anothers_is_left_alone(world, capsys):
    (file, *_), recipe = shipped.export(world / "a"), recipes.get("fake/tiny")
    np.savez(file, about=np.frombuffer(json.dumps({"tensors": ["eyes.weight"], "shared": {}}).encode(), np.uint8),
             **{"eyes.weight": np.zeros((3, 3), np.float16)})
    assert shipped.read(recipe, recipe.stage("align")) is None and "holds another fake/tiny" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read.*restore the file"):
        shipped.read(recipe, recipe.stage("align"))


class Malice:
    """What unpickling would run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_loading_runs_nobodys_code(world):
    file = shipped.path("fake/tiny", "align")
    file.parent.mkdir()
    np.savez(file, about=np.array([Malice(world / "trace")], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        shipped.read(recipes.get("fake/tiny"), recipes.get("fake/tiny").stage("align"))
    assert not (world / "trace").exists()
    np.load(file, allow_pickle=True)["about"]
    assert (world / "trace").exists(), "else nothing was tried"


# --- this repository's own ---

@pytest.mark.skipif(not SHIPPED, reason="weights/ is empty")
def test_all_of_it_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "weights").iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_weights_answer_as_they_did(file, monkeypatch):
    """In today's recipe. Two answers may differ: where two words are equally likely, the machine's rounding decides."""
    monkeypatch.setenv("NANOVLM_SHIPPED", str(ROOT / "weights"))
    about = shipped.load(file)[1]
    recipe = resolve(recipes.get(about["recipe"]), real=False)
    stage = recipe.stage(about["stage"])
    assert file == shipped.path(recipe.name, stage.name) and about["steps"] == stage.steps
    answers = shipped.answers(shipped.read(recipe, stage), recipe, stage, shipped.tokenizer())
    assert len(answers) == len(about["answers"]) > 10
    assert sum(now != then for now, then in zip(answers, about["answers"])) <= 2
