"""A run whose model is shared out: saved by ranks, resumed on as many or on others, killed, exported; and what goes wrong in one sentence."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_fakes as fakes
from test_invariants import CASES, CPU
from test_two_processes import share
from tools import bite, close, together
from torch import nn

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.runs import checkpoint, learner
from nanovlm.runs import run as run_module
from nanovlm.runs.run import Options, accumulated, run
from nanovlm.runs.setting import Job
from nanovlm.training import distributed, sharding
from nanovlm.training.loop import TrainingFailed, freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.sharding import shard, whole_state

FAKES = Path(fakes.__file__)
SIX = fakes.stage(trains=CASES[0].stages[-1], steps=6, batch_size=8, lr=1e-3)


# ---- saved on two ranks, gone on with on one, two and four

def steps(rank: int, ranks: int, folder: Path, first: int) -> tuple[list, dict]:
    """LLaVA from step `first`, which lies in `folder`, on; saved there after step 3."""
    model, trains, batches = share(CASES[0], rank, ranks, pairs=4)
    freeze(bite(model, 5), trains)
    if first:  # whoever goes on has other weights until it has read the right ones
        bite(model.projector, 6)
        bite(model.language, 6)
    scalars = shard(model, CPU)
    optimiser = make_optimiser(model, SIX)
    if first:
        sharding.load(folder / "half", model, optimiser)
    found = []
    for report in train_stage(model, SIX, batches * 2, optimiser, CPU, first):
        found.append([*report.losses.values(), report.grad_norm])
        if report.step == 3 and first == 0:
            sharding.save(folder / "half", model, optimiser)
    return found, whole_state(model, scalars)


def halves(rank: int, ranks: int, folder: str, first: int) -> None:
    found = steps(rank, ranks, Path(folder), first)
    if rank == 0:
        torch.save(found, f"{folder}/{ranks} from {first}.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    together(2, halves, 2, str(folder), 0)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_two_ranks_saved_goes_on_on_any_number(saved, ranks):
    together(ranks, halves, ranks, str(saved), 3)
    whole, weights = torch.load(saved / "2 from 0.pt", weights_only=True)
    again, theirs = torch.load(saved / f"{ranks} from 3.pt", weights_only=True)
    if ranks == 2:
        assert again == whole[3:] and all(torch.equal(weights[name], theirs[name]) for name in weights)
    for mine, other in zip(whole[3:], again, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    for name, tensor in weights.items():
        close(theirs[name], tensor, 1e-5)


def test_frozen_weights_are_not_saved(saved):
    index = sharding.Reader(str(saved / "half")).read_metadata().state_dict_metadata
    assert not any("vision" in name for name in index) and {"model.projector.first.weight", "exp_avg.projector.first.weight"} <= index.keys()


def test_an_index_that_would_run_code_is_refused(tmp_path, saved):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="system.*not ours"):
        sharding.Reader(str(tmp_path)).read_metadata()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("lost", "word"), [("__1_0.distcp", "__1_0.distcp"), (".metadata", ".metadata"), ("", ".metadata")])
def test_a_checkpoint_without_a_part_is_told_with_the_part(tmp_path, saved, lost, word, caplog):
    (half := tmp_path / "half").mkdir()
    for file in (saved / "half").iterdir() if lost else ():
        if file.name != lost:
            (half / file.name).symlink_to(file)
    model, trains, _ = share(CASES[0], 0, 1, pairs=4)
    freeze(model, trains)
    with pytest.raises(UserError, match=f"half is not a whole checkpoint .FileNotFoundError.*{word}"):
        sharding.load(half, model, make_optimiser(model, SIX))
    assert "metadata is not found" not in caplog.text  # as torch tells of it, with a traceback


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_goes_on_with_its_own_random_numbers(monkeypatch, ranks):
    """Saved by two; a third rank has none of its own, so all begin with new ones."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({"torch": torch.get_rng_state(), "cuda": []})
    monkeypatch.setattr(distributed, "world", lambda: ranks)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    stage, model = fakes.stage(), fakes.FakeVLM()
    freeze(model, stage.trains)
    half = {"model": model.state_dict(), "optimiser": make_optimiser(model, stage).state_dict(), "random": states, "step": 7}
    learner.Learner(Job(fakes.recipe(), stage), model, make_optimiser(model, stage), None).go_on(None, half, 0)
    own = torch.equal(torch.get_rng_state(), states[1]["torch"])
    assert own == (ranks == 2) and not torch.equal(torch.get_rng_state(), states[0]["torch"])


# ---- whole runs, as torchrun starts them

def torchrun(ranks: int, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "NANOVLM_CACHE": str(out.parent / "cache"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(FAKES), "--recipe", "fake/tiny",
               "--out", str(out), "--shard", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """whole: two ranks, from end to end. killed: both killed while they save step 12 of its last stage."""
    home = tmp_path_factory.mktemp("runs")
    done = torchrun(2, home / "whole")
    assert done.returncode == 0, done.stderr
    assert "plan: see 5 steps, align 4 steps, tune 20 steps\n" in done.stdout  # no evaluation
    killed = torchrun(2, home / "killed", SAVE_SECONDS="-1", KILL_IN_SAVE="21")
    assert killed.returncode != 0
    return home


def test_killed_in_the_middle_of_saving_and_resumed_bit_for_bit(runs):
    state = checkpoint.load(runs / "killed/last.pt")
    assert (state["stage"], state["step"], state["shards"]) == ("tune", 11, "last-tune-11")
    assert "model" not in state and (runs / "killed/last-tune-11/.metadata").exists()
    again = torchrun(2, runs / "killed", "--resume")
    assert again.returncode == 0, again.stderr
    for name in ("see", "align", "tune"):
        first, second = (checkpoint.load(runs / f"{run}/{name}.pt") for run in ("whole", "killed"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    assert not list((runs / "killed").glob("last-*")), "shards of a finished run"
    logs = [[{k: v for k, v in json.loads(line).items() if k != "samples_per_s"} for line in (runs / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_killed_while_shards_are_written_and_resumed(runs, tmp_path):
    """What was half written is a folder here."""
    out = tmp_path / "half"
    killed = torchrun(2, out, SAVE_SECONDS="-1", KILL_IN_SAVE="3")
    assert killed.returncode != 0
    (out / "last-see-3").rename(out / "last-see-3.tmp")
    (out / "last-see-3.tmp/.metadata").unlink()
    again = torchrun(2, out, "--resume")
    assert again.returncode == 0, again.stderr
    assert not list(out.glob("*.tmp")) and torch.equal(*(checkpoint.load(run / "tune.pt")["bridge.weight"] for run in (out, runs / "whole")))


def test_a_disk_that_is_full_while_shards_are_written_ends_in_a_sentence(tmp_path):
    """The limit of the file size admits no rank's rows. torchrun may end the second rank before it has spoken."""
    failed = torchrun(2, tmp_path / "full", SAVE_SECONDS="-1", FILE_LIMIT="3000")
    ours = [line for line in failed.stderr.splitlines() if line.startswith("train_tiny.py: ")]
    assert ours and all("last-see-1 could not be written (File too large): free some space" in line for line in ours)
    assert "CheckpointException" not in failed.stderr


def test_a_finished_run_is_judged_by_one_process(runs, monkeypatch):
    summary = json.loads((runs / "whole/summary.json").read_text())
    assert summary["eval"] == {} and "--resume" in " ".join(summary["notes"])
    fakes.install(monkeypatch.setattr)
    monkeypatch.setattr(run_module, "foresee", None)  # what has learned on eight GPUs is judged on one, where it could not learn
    judged = run("fake/tiny", Options(out=str(runs / "whole"), resume=True, cache=False))
    assert judged["stages"] == summary["stages"] and not any("Not judged" in note for note in judged["notes"])


def test_a_stage_that_was_stopped_in_shards_goes_on_in_shards(runs, monkeypatch, tmp_path):
    fakes.install(monkeypatch.setattr)
    out = tmp_path / "half"
    killed = torchrun(2, out, SAVE_SECONDS="-1", KILL_IN_SAVE="3")
    assert killed.returncode != 0 and checkpoint.load(out / "last.pt")["shards"] == "last-see-2"
    with pytest.raises(UserError, match="with --shard: go on with it"):
        run("fake/tiny", Options(out=str(out), resume=True, cache=False))


def test_a_process_that_dies_ends_the_others_with_a_sentence(tmp_path):
    """Without torchrun, which would end them itself."""
    env = {**os.environ, "NANOVLM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533",
           "WORLD_SIZE": "2", "SAVE_SECONDS": "-1"}
    command = [sys.executable, str(FAKES), "--recipe", "fake/tiny", "--out", str(tmp_path / "run"), "--shard", "--steps", "2000"]
    both = [subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    both[1].send_signal(signal.SIGKILL)
    _, said = both[0].communicate(timeout=120)
    both[1].communicate()
    assert both[0].returncode == 1, said
    assert "Another process of this run has ended" in said and "Traceback" not in said


# ---- bad input

def test_shard_without_torchrun(tmp_path):
    with pytest.raises(UserError, match="torchrun --nproc-per-node"):
        run("llava/tiny", Options(out=str(tmp_path / "a"), shard=True))


def test_accumulate_is_a_number_of_micro_batches():
    recipe = recipes.get("llava/tiny")
    assert [stage.accumulate for stage in accumulated(recipe, 3).stages] == [3, 3] and accumulated(recipe, None) is recipe
    with pytest.raises(UserError, match="--accumulate 0"):
        accumulated(recipe, 0)


def test_a_full_memory_names_the_plan(monkeypatch, tmp_path):
    fakes.install(monkeypatch.setattr)

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(TrainingFailed, match="nanovlm.plan --recipe fake/tiny --gpus 1.*--accumulate 2.*--shard"):
        run("fake/tiny", Options(out=str(tmp_path / "a"), cache=False))


def test_what_cannot_fit_whole_is_refused_before_it_is_built(monkeypatch):
    """LLaVA-7B's second stage needs 101.6 GiB on each GPU (fullsize.md §6), its first 26.3."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Gpu", (), {"total_memory": 80 * 2 ** 30}))
    recipe = recipes.get("llava/7b")
    learner.foresee(recipe, recipe.stage("align"), torch.device("cuda"), shard=False)
    with pytest.raises(UserError, match="needs 102 GiB on each GPU.*has 80.*--shard"):
        learner.foresee(recipe, recipe.stage("tune"), torch.device("cuda"), shard=False)
    learner.foresee(recipe, recipe.stage("tune"), torch.device("cpu"), shard=False)
    learner.foresee(recipe, recipe.stage("tune"), torch.device("cuda"), shard=True)


@pytest.mark.parametrize(("name", "micro_batches", "sentence"), [
    ("llava/tiny", 64, "Stage tune: batch_size 32 cannot be shared evenly by 1 processes and 64 micro-batches; make it a multiple of 64"),
    ("blip2/tiny", 2, "Stage stage1 has accumulate=2.*whole batch"), ("flamingo/tiny", 2, "mixes the losses of 4 data sets but has 2 micro-batches")])
def test_what_a_later_stage_cannot_do_is_said_before_the_first_one(tmp_path, name, micro_batches, sentence):
    with pytest.raises(UserError, match=sentence):
        run(name, Options(out=str(tmp_path / "a"), accumulate=micro_batches))
    assert not (tmp_path / "a").exists()
