"""The command line: every wrong call is one sentence on stderr and exit code 2; Ctrl-C is 130; nothing is destroyed."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_fakes as fakes
from data_files import draw, write
from matplotlib.figure import Figure
from test_checkpoint import FAKES, stop_after

import train_tiny
from nanovlm import recipes
from nanovlm.runs import checkpoint, folder, run, shipped
from nanovlm.tokenizer import Tokenizer


@pytest.fixture
def world(monkeypatch, tmp_path):
    fakes.install(monkeypatch.setattr)
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, code: int, *arguments: str) -> str:
    """The one sentence with which the call fails."""
    assert train_tiny.main(list(arguments)) == code
    sentence = capsys.readouterr().err
    assert sentence.startswith("train_tiny.py: ") and sentence.count("\n") == 1 and "Traceback" not in sentence
    return sentence


def test_an_unknown_value_is_answered_with_the_valid_ones(world, capsys):
    sentence = fails(capsys, 2, "--model", "lava")
    assert "'lava'" in sentence and all(f"'{name}'" in sentence for name in train_tiny.MODELS)
    assert "llava" in train_tiny.MODELS and "clip" not in train_tiny.MODELS
    sentence = fails(capsys, 2, "--recipe", "llava/huge")
    assert "'llava/huge'" in sentence and "'llava/tiny'" in sentence
    assert "'skip'" in fails(capsys, 2, "--model", "llava", "--on-missing", "ignore")
    assert "'mps'" in fails(capsys, 2, "--model", "llava", "--device", "gpu")


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "--model"),
    (("--model", "llava", "--recipe", "fake/tiny"), "Give one of"),
    (("--recipe", "fake/tiny", "--stpes", "3"), "--stpes"),
    (("--recipe", "fake/tiny", "--seed", "one"), "--seed"),
    (("--recipe", "fake/tiny", "--steps", "0"), "--steps"),
    (("--recipe", "fake/tiny", "--steps", "2.5"), "--steps"),
    (("--recipe", "fake/tiny", "--data", "nowhere"), "nowhere"),
    (("--recipe", "fake/tiny", "--data", "one", "--data", "two"), "--data align=PATH"),
    (("--recipe", "fake/tiny", "--data", "one", "--data", "aling=two"), "--data 'aling=two' is neither a path"),
    (("--recipe", "fake/tiny", "--data", "aling=one", "--data", "two"), "--data 'aling=one' is neither a path nor STAGE=PATH"),
    (("--recipe", "fake/tiny", "--data", "aling=one"), "learns from yours in align, tune"),
    (("--recipe", "fake/tiny", "--data", "align=", "--data", "tune=two"), "--data 'align=' is neither a path"),
    (("--recipe", "fake/tiny", "--data", ""), "--data '' is neither a path"),
    (("--recipe", "fake/tiny", "--data", "align=one", "--data", "align=two"), "--data align= is given twice"),
    (("--recipe", "fake/tiny", "--data", "align=one"), "--data tune=PATH"),
    (("--recipe", "fake/tiny", "--data", "align=one", "--data", "two", "--data", "tune=three"), "--data two"),
    (("--recipe", "fake/tiny", "--data", "align=nowhere", "--data", "tune=nowhere"), "nowhere"),
    (("--recipe", "fake/tiny", "--resume", "--overwrite"), "--resume"),
    (("--recipe", "fake/tiny", "--resume"), "runs/fake"),
    (("--recipe", "fake/tiny", "--resume", "--out", "nowhere"), "nowhere"),
])
def test_bad_usage_is_one_sentence(world, capsys, arguments, words):
    assert words in fails(capsys, 2, *arguments)
    assert not (world / "runs").exists() and not (world / "nowhere").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(world, capsys):
    assert "--device cuda" in fails(capsys, 2, "--recipe", "fake/tiny", "--device", "cuda")


def test_help_has_an_example_of_each_use(capsys):
    with pytest.raises(SystemExit) as end:
        train_tiny.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    options = [action.option_strings[-1] for action in train_tiny.make_parser()._actions if action.dest != "help"]
    examples = text[text.index("examples:"):]
    assert [option for option in options if option not in examples] == []


def test_runs_are_numbered_and_filled_folders_are_safe(world, capsys):
    quick = ("--recipe", "fake/tiny", "--steps", "1")
    assert [train_tiny.main([*quick, "--steps", "2"]) for _ in range(2)] == [0, 0]
    assert sorted(os.listdir("runs")) == ["fake-quick", "fake-quick-2"], "a shortened run is not the model"
    assert train_tiny.main([*quick, "--steps", "2", "--resume"]) == 0, "without --out the last run is meant"
    assert "runs/fake-quick-2" in capsys.readouterr().out.splitlines()[-1]

    os.mkdir("mine")
    with open("mine/thesis.txt", "w") as file:
        file.write("irreplaceable")
    assert "not empty" in fails(capsys, 2, *quick, "--out", "mine")
    assert "does not look like a run" in fails(capsys, 2, *quick, "--out", "mine", "--overwrite")
    assert "no run" in fails(capsys, 2, *quick, "--out", "mine", "--resume")
    assert "is a file" in fails(capsys, 2, *quick, "--out", "mine/thesis.txt")
    assert "cannot be written to (Not a directory)" in fails(capsys, 2, *quick, "--out", "mine/thesis.txt/run")
    assert os.listdir("mine") == ["thesis.txt"]

    (world / "runs/fake-quick/old.txt").write_text("x")
    assert train_tiny.main([*quick, "--steps", "2", "--out", "runs/fake-quick", "--overwrite"]) == 0
    assert not (world / "runs/fake-quick/old.txt").exists()


def test_a_run_says_first_what_it_will_do(world, capsys, monkeypatch):
    """How long it takes, once all that it trains was shipped; what is found is not counted among the stages."""
    monkeypatch.setenv("NANOVLM_SHIPPED", str(world / "weights"))

    def said(*arguments: str) -> list[str]:
        assert train_tiny.main(["--recipe", "fake/tiny", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    def stages(lines: list[str]) -> list[str]:
        return [" ".join(line.split()[:3]) for line in lines if line.startswith("[")]

    lines = said("--out", "a")
    assert lines[1] == "plan: see 5 steps, align 4 steps, tune 20 steps, evaluation"
    assert stages(lines) == ["[1/3] see 5/5", "[2/3] align 4/4", "[3/3] tune 20/20"]
    assert not any("shortened" in line for line in lines)
    monkeypatch.setattr(shipped, "seconds", lambda recipe, stage: {"align": 100.0, "tune": 9.0 * stage.steps}.get(stage.name))
    lines = said("--out", "b")
    assert lines[1] == "plan: align 4 steps, tune 20 steps, evaluation; about 5 min of training where the shipped weights were made"
    assert stages(lines) == ["[1/2] align 4/4", "[2/2] tune 20/20"]
    assert said("--out", "b", "--resume")[2] == "plan: nothing to train, evaluation"
    scratch = said("--out", "c", "--from-scratch", "--no-cache", "--steps", "2")
    assert scratch[1] == "plan: see 2 steps, align 2 steps, tune 2 steps, evaluation"
    sentence = "This is a shortened run (--steps 2): a look at how it works, not at how good it gets."
    assert scratch[2] == sentence and scratch.count(sentence) == 2, "at the start and at the end"
    assert "--from-scratch = True, now it is False" in fails(capsys, 2, "--recipe", "fake/tiny", "--out", "c", "--resume", "--steps", "2")


def test_each_stage_may_learn_from_its_own_data(world, capsys, monkeypatch):
    """LLaVA's 558K pairs and 665K conversations are two files. A backbone, which no name reaches, learns from the last stage's."""
    for folder_name, colour in (("pairs", "green"), ("talk", "blue")):
        draw(world / folder_name, *(f"{name}.png" for name in "abcdefgh"))
        for name in "abcdefgh":
            write(world / folder_name / f"{name}.txt", f"{colour} {name}")
    met, learned_words, train, train_words = {}, [], run.train, Tokenizer.train
    *before, last = fakes.recipe().stages
    monkeypatch.setitem(recipes.RECIPES, "fake/tiny", fakes.recipe(stages=(*before, replace(last, evaluate=("answers",)))))
    monkeypatch.setattr(run, "evaluate", lambda pupil, source: {f"vqa_accuracy/{source.name}": {"value": 0.5, "chance": 0.5, "shuffled": 0.5, "n": 1}})
    monkeypatch.setattr(run, "train", lambda job, setting, *rest: met.update(
        {job.stage.name: setting.samples(job, {}).records.name}) or train(job, setting, *rest))
    monkeypatch.setattr(Tokenizer, "train", lambda texts, vocab: learned_words.extend(texts) or train_words(texts, vocab))
    call = ("--recipe", "fake/tiny", "--out", "a")
    assert train_tiny.main([*call, "--data", "align=pairs", "--data", "tune=talk"]) == 0
    assert met == {"see": "talk", "align": "pairs", "tune": "talk"} and {"green a", "blue a"} <= set(learned_words)
    summary = json.loads((world / "a/summary.json").read_text())
    assert summary["data"] == "align: pairs, tune: talk" and any("Each stage learned from its own data" in note for note in summary["notes"])
    assert [note.partition(":")[0] for note in summary["notes"] if "figures above" in note] == ["talk"] and [*summary["eval"]] == ["vqa_accuracy/talk"]
    assert train_tiny.main([*call, "--data", "talk", "--data", "align=pairs", "--resume"]) == 0, "the same, said otherwise"
    for other in (("--data", "pairs", "--data", "align=talk"), ("--data", "talk"), ()):
        assert f"--data = {{'align': '{world}/pairs', 'tune': '{world}/talk'}}, now it is" in fails(capsys, 2, *call, *other, "--resume")
    assert train_tiny.main([*call, "--data", "align=talk/", "--data", "tune=talk", "--overwrite"]) == 0
    assert json.loads((world / "a/config.json").read_text())["data"] == str(world / "talk"), "one for all is one"


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_made(world, capsys, monkeypatch):
    """As on a disk that is mounted read-only, where making the folder may succeed because it is there."""
    def read_only(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.mkdir("there")
    monkeypatch.setattr(folder, "TemporaryFile", read_only)
    monkeypatch.setattr(shipped, "make_tokenizer", lambda *inputs: pytest.fail("it goes on"))
    assert "--out there cannot be written to (Read-only file system)" in fails(capsys, 2, "--recipe", "fake/tiny", "--out", "there")


def test_the_table_at_the_end_has_the_controls(world, capsys, monkeypatch):
    asked = fakes.recipe()
    last = replace(asked.stages[-1], evaluate=("answers",))
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "fake/tiny": replace(
        asked, stages=(*asked.stages[:-1], last))})
    rows = [(None, "what colour?", "red", "blue")]
    monkeypatch.setattr(run.Pupil, "examples", lambda *arguments: rows)
    monkeypatch.setattr(run, "evaluate", lambda *arguments: {
        "vqa_accuracy": {"value": 0.875, "chance": 0.25, "shuffled": 0.3125, "n": 617}})
    monkeypatch.setattr(fakes.FakeScenes, "notes", lambda self, figures: [f"{len(figures)} figure is too few to judge by."])
    assert train_tiny.main(["--recipe", "fake/tiny", "--out", "a"]) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("vqa_accuracy")]
    assert line.split()[1:] == ["0.875", "0.250", "0.312", "617"]
    assert "1 figure is too few to judge by." in out and "'what colour?'  truth: 'red'  model: 'blue'" in out
    assert (world / "a/samples.png").stat().st_size > 1000


def test_a_loss_that_is_no_number_exits_with_1_and_keeps_the_batch(world, capsys, monkeypatch):
    losses = fakes.FakeVLM.losses
    calls = []

    def broken(self, batch, *gather):
        calls.extend([batch] * torch.is_grad_enabled())  # the vital signs look without gradient
        [(total, count)] = losses(self, batch, *gather).values()
        return {"lm": (total * float("nan") if len(calls) == 4 else total, count)}

    monkeypatch.setattr(fakes.FakeVLM, "losses", broken)
    sentence = fails(capsys, 1, "--recipe", "fake/tiny", "--out", "a", "--no-cache")
    assert "nan" in sentence and "stage see" in sentence and "a/bad_batch.pt" in sentence
    [batch] = checkpoint.load(world / "a/bad_batch.pt")["batches"]
    assert any(torch.equal(batch["input_ids"], call["input_ids"]) for call in calls)


def test_a_full_disk_while_a_picture_is_drawn_exits_with_1_and_says_how_to_go_on(world, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        sentence = fails(capsys, 1, "--recipe", "fake/tiny", "--out", "a")
    assert "a/samples.png could not be written (No space left on device)" in sentence and "--resume" in sentence
    assert train_tiny.main(["--recipe", "fake/tiny", "--out", "a", "--resume"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_exits_with_130_and_says_how_to_go_on(world, capsys, monkeypatch, number):
    with monkeypatch.context() as patch:
        stop_after(patch, "tune", 3, number)
        sentence = fails(capsys, 130, "--recipe", "fake/tiny", "--out", "a")
    assert "--resume" in sentence and checkpoint.load(world / "a/last.pt")["step"] == 3
    assert train_tiny.main(["--recipe", "fake/tiny", "--out", "a", "--resume"]) == 0


def test_ctrl_c_from_outside_ends_the_process_cleanly(world):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SAVE_SECONDS": "-1"}
    process = subprocess.Popen([sys.executable, str(FAKES), "--recipe", "fake/tiny", "--out", "a", "--steps", "100000"],
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if os.path.exists("a/last.pt"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, sentence = process.communicate(timeout=60)
    assert process.returncode == 130 and sentence.count("\n") == 1 and "--resume" in sentence
    state = checkpoint.load(world / "a/last.pt")
    assert state["stage"] == "see" and state["step"] >= 1


@pytest.mark.parametrize("users", [None, "7"])
def test_threads_soon_sleep_unless_the_user_wants_otherwise(users):
    """Read by OpenMP when torch is loaded, so importing nanovlm must come to that first, and does not load torch."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    code = "import os, sys, nanovlm; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment | ({"GOMP_SPINCOUNT": users} if users else {}),
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (users or "2000")
    imports = [line for line in Path(train_tiny.__file__).read_text(encoding="utf-8").splitlines() if " import " in line]
    assert imports[0].startswith("from nanovlm")
