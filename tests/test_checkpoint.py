"""Whatever happens while a checkpoint is written, a whole one is there; and going on from it changes no bit."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_fakes as fakes

from nanovlm.errors import UserError
from nanovlm.runs import checkpoint, folder, run, watch
from nanovlm.runs.checkpoint import SaveFailed
from nanovlm.runs.run import Options
from nanovlm.training import randomness

FAKES = Path(fakes.__file__)


def launch(out: Path, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A run in a process of its own."""
    env = {**os.environ, "NANOVLM_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(FAKES), "--recipe", "fake/tiny", "--out", str(out), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def world(monkeypatch, tmp_path):
    fakes.install(monkeypatch.setattr)
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def stop_after(monkeypatch, stage: str, step: int, number: int = signal.SIGINT) -> None:
    """Ctrl-C after that step: the real handler, by a real signal."""
    real = watch.Watch.after

    def after(self, report):
        real(self, report)
        if self.stage.name == stage and report.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(watch.Watch, "after", after)


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("see", "align", "tune"):
        first, second = checkpoint.load(a / f"{name}.pt"), checkpoint.load(b / f"{name}.pt")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    logs = [[{k: v for k, v in json.loads(line).items() if k != "samples_per_s"}
             for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (a, b)]
    assert logs[0] == logs[1]
    stages = [[{k: v for k, v in stage.items() if k not in ("seconds", "cached", "warnings")}
               for stage in json.loads((path / "summary.json").read_text())["stages"]] for path in (a, b)]
    assert stages[0][1:] == stages[1][1:]


# ---- resume


@pytest.mark.parametrize(("stage", "step"), [("see", 3), ("align", 1), ("tune", 10)])
def test_ten_steps_and_resume_equal_twenty_steps_bit_for_bit(world, monkeypatch, stage, step):
    run.run("fake/tiny", Options(out=str(world / "whole"), cache=False))
    with monkeypatch.context() as patch:
        stop_after(patch, stage, step)
        with pytest.raises(KeyboardInterrupt, match=f"step {step} of stage {stage}"):
            run.run("fake/tiny", Options(out=str(world / "parts"), cache=False))
    state = checkpoint.load(world / "parts/last.pt")
    assert (state["stage"], state["step"]) == (stage, step)
    assert not (world / "parts/summary.json").exists()
    run.run("fake/tiny", Options(out=str(world / "parts"), cache=False, resume=True))
    assert_same_run(world / "whole", world / "parts")


def test_kill_9_in_the_middle_of_saving_costs_nothing_that_was_saved(world):
    run.run("fake/tiny", Options(out=str(world / "whole"), cache=False))
    # Saves: 1 to 4 and the end of "see", 1 to 3 and the end of "align", then "tune": the 21st is that of its step 12.
    killed = launch(world / "killed", world / "cache", "--no-cache", SAVE_SECONDS="-1", KILL_IN_SAVE="21")
    assert killed.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in (world / "killed").glob("*.tmp")] == [b"half a checkpoint"]
    state = checkpoint.load(world / "killed/last.pt")
    assert (state["stage"], state["step"]) == ("tune", 11)
    run.run("fake/tiny", Options(out=str(world / "killed"), cache=False, resume=True))
    assert_same_run(world / "whole", world / "killed")
    assert not list((world / "killed").glob("*.tmp"))


def test_a_finished_run_can_be_resumed_and_only_evaluates(world, monkeypatch):
    first = run.run("fake/tiny", Options(out=str(world / "a")))
    monkeypatch.setattr(run, "train_stage", None)  # any training would fail
    again = run.run("fake/tiny", Options(out=str(world / "a"), resume=True))
    assert again["stages"] == first["stages"] and again["params"] == first["params"]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", lambda *job: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run.run("fake/tiny", Options(out=str(world / "a")))
    assert len(run.run("fake/tiny", Options(out=str(world / "a"), resume=True))["stages"]) == 3


@pytest.mark.parametrize(("changes", "field", "values"), [
    ({"seed": 4}, "--seed", ("0", "4")),
    ({"steps": 7}, "--steps", ("None", "7")),
])
def test_resume_with_another_configuration_names_the_field_and_both_values(world, changes, field, values):
    run.run("fake/tiny", Options(out=str(world / "a")))
    before = (world / "a/config.json").read_text()
    with pytest.raises(UserError) as error:
        run.run("fake/tiny", Options(out=str(world / "a"), resume=True, **changes))
    assert field in str(error.value) and all(value in str(error.value) for value in values)
    assert (world / "a/config.json").read_text() == before


def test_a_resumed_run_may_move_to_another_machine(tmp_path):
    config = {"what": folder.OURS, "seed": 1, "machine": {"device": "cuda"}}
    folder.write_json(tmp_path / "config.json", config)
    folder.check_config(tmp_path, {**config, "machine": {"device": "cpu"}})


def test_lines_logged_after_the_checkpoint_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [("see", 5), ("align", 4), ("tune", 10), ("tune", 20)]
    path.write_text("".join(json.dumps({"stage": s, "step": n}) + "\n" for s, n in entries) + '{"stage": "tu')
    folder.trim_metrics(path, {"see"}, "tune", 10)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in kept] == [("see", 5), ("tune", 10)]


# ---- random states


def test_random_states_survive_the_file(tmp_path):
    torch.manual_seed(7)
    torch.randn(5)
    checkpoint.save(tmp_path / "r.pt", randomness.random_states())
    drawn = torch.rand(2).tolist()
    randomness.set_random_states(checkpoint.load(tmp_path / "r.pt"))
    assert torch.rand(2).tolist() == drawn


def test_training_draws_from_torch_alone(world):
    """So torch's generators are all that a checkpoint needs to hold."""
    states = random.getstate(), np.random.get_state()
    run.run("fake/tiny", Options(out=str(world / "a"), cache=False))
    after = random.getstate(), np.random.get_state()
    assert after[0] == states[0] and all(np.array_equal(x, y) for x, y in zip(after[1], states[1], strict=True))
    random.seed(5), np.random.seed(6)
    run.run("fake/tiny", Options(out=str(world / "b"), cache=False))
    assert_same_run(world / "a", world / "b")


# ---- a full disk


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (checkpoint.torch, "save")), full)
    with pytest.raises(SaveFailed, match=r"last.pt could not be written \(No space left on device\).*untouched"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_run_on_a_full_disk_ends_in_one_sentence_and_goes_on_when_there_is_room(world):
    """The limit of the file size admits the weights of a stage (20 kB) but not the full state (60 kB)."""
    run.run("fake/tiny", Options(out=str(world / "whole"), cache=False))
    failed = launch(world / "a", world / "cache", "--no-cache", FILE_LIMIT="40000", SAVE_SECONDS="-1")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "last.pt could not be written" in failed.stderr
    assert not list((world / "a").glob("*.tmp"))
    run.run("fake/tiny", Options(out=str(world / "a"), cache=False, resume=True))
    assert_same_run(world / "whole", world / "a")


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(Exception, match="pickle") as error:
        checkpoint.save(tmp_path / "a.pt", {"function": lambda: None})
    assert not isinstance(error.value, SaveFailed) and os.listdir(tmp_path) == []


# ---- loading


def test_a_file_that_could_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_a_broken_and_a_missing_checkpoint_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="a.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(UserError, match="b.pt does not exist"):
        checkpoint.load(tmp_path / "b.pt")
