"""Whole runs: what they leave behind, and the cache of backbones, with which nothing comes out otherwise."""

import json
from dataclasses import replace

import pytest
import torch
import training_fakes as fakes
from data_files import draw, write
from PIL import Image
from test_checkpoint import stop_after

from nanovlm import recipes
from nanovlm.data.formats import read
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.recipes.stage import resolve
from nanovlm.runs import cache, checkpoint, progress
from nanovlm.runs import run as runs
from nanovlm.runs import watch as watching
from nanovlm.runs.run import Options, run, trained_model
from nanovlm.runs.setting import Job, Setting, leave_out_unfit
from nanovlm.runs.watch import Watch
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.loop import Report


@pytest.fixture
def world(monkeypatch, tmp_path):
    """The fakes in place of the real recipes, an empty cache, and the folder for runs."""
    fakes.install(monkeypatch.setattr)
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_run_leaves_what_the_design_promises(world, capsys):
    summary = run("fake/tiny", Options(out=str(world / "a")))
    written = json.loads((world / "a/summary.json").read_text())
    assert written == summary
    assert [stage["name"] for stage in summary["stages"]] == ["see", "align", "tune"]
    see, tune = (torch.load(world / f"a/{name}.pt", weights_only=True) for name in ("see", "tune"))
    assert torch.equal(see["eyes.weight"], tune["eyes.weight"]), "init must take the backbone's eyes"
    second, third = summary["stages"][1:]
    assert set(second["frozen"]) == {"eyes", "language"} and set(third["frozen"]) == {"eyes"}
    assert all(before == after for stage in (second, third) for before, after in stage["frozen"].values())
    assert third["trained"]["bridge"][0] == second["trained"]["bridge"][1], "tune goes on where align ended"
    assert summary["params"] == {"total": 4126, "trained": 4106}
    lines = [json.loads(line) for line in (world / "a/metrics.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["step"]) for e in lines] == [
        ("see", 1), ("see", 5), ("align", 1), ("align", 4), ("tune", 1), ("tune", 10), ("tune", 20)]
    assert set(lines[0]) == {"stage", "step", "loss/lm", "lr", "grad_norm", "samples_per_s"}
    first = [line for line in capsys.readouterr().out.splitlines() if "first loss" in line]
    assert first == [f"see: first loss lm {lines[0]['loss/lm']:.3f}; a blind guess has 5.598"], "ln 270, of random weights only"


def test_a_cached_backbone_gives_the_same_bits(world):
    first = run("fake/tiny", Options(out=str(world / "a")))
    second = run("fake/tiny", Options(out=str(world / "b")))
    third = run("fake/tiny", Options(out=str(world / "c"), cache=False))
    assert [s["stages"][0]["cached"] for s in (first, second, third)] == [False, True, False]
    for name in ("see", "align", "tune"):
        a, b, c = (checkpoint.load(world / folder / f"{name}.pt") for folder in "abc")
        assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in a), name
    assert first["stages"][2]["trained"] == second["stages"][2]["trained"]


def test_without_the_cache_nothing_is_written_to_it(world):
    run("fake/tiny", Options(out=str(world / "a"), cache=False))
    assert not (world / "cache").exists()


def test_the_cache_knows_everything_that_made_the_backbone(world, monkeypatch):
    def was_cached(folder, **options):
        return run("fake/tiny", Options(out=str(world / folder), **options))["stages"][0]["cached"]

    assert not was_cached("a") and was_cached("b")
    assert not was_cached("seed", seed=1)
    assert not was_cached("steps", steps=2)
    slower = replace(fakes.EYES, stages=(replace(fakes.EYES.stages[0], lr=1e-4),))
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "eyes/tiny": slower})
        assert not was_cached("lr")
    with monkeypatch.context() as patch:
        patch.setattr(fakes.FakeScenes, "texts", lambda self: ["aaaa bbbb"] * 9)
        assert not was_cached("tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "source_text", lambda *modules: "edited")
        assert not was_cached("source")
    assert was_cached("c")


def test_a_broken_cache_entry_is_trained_anew(world, capsys):
    first = run("fake/tiny", Options(out=str(world / "a")))
    entries = list((world / "cache").glob("*.pt"))  # eyes, align, tune
    assert len(entries) == 3
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-700])
    second = run("fake/tiny", Options(out=str(world / "b")))
    assert "broken" in capsys.readouterr().err
    assert not second["stages"][0]["cached"] and second["stages"][0]["trained"] == first["stages"][0]["trained"]
    assert checkpoint.load(entries[0])["model"]


def test_a_cache_that_cannot_be_written_costs_time_and_not_the_run(world, monkeypatch, capsys):
    (world / "file").write_text("x")
    monkeypatch.setenv("NANOVLM_CACHE", str(world / "file"))
    summary = run("fake/tiny", Options(out=str(world / "a")))
    assert [stage["cached"] for stage in summary["stages"]] == [False] * 3
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "not cached" in line] == [
        f"The weights of stage {name} were not cached" for name in ("see", "align", "tune")]


def test_of_a_persons_own_data_only_the_backbones_are_cached(world):
    """What was trained on them stays in the run's folder; other pictures with the same texts make another backbone."""
    draw(world / "own", *(f"{name}.png" for name in "abcdefgh"))
    for name in "abcdefgh":
        write(world / "own" / f"{name}.txt", f"red {name}")
    own = [run("fake/tiny", Options(data=str(world / "own"), out=str(world / out))) for out in "ab"]
    assert len(list((world / "cache").iterdir())) == 1 and own[0]["data"] == "own"
    assert [[stage["cached"] for stage in summary["stages"]] for summary in own] == [[False] * 3, [True, False, False]]
    assert own[0]["stages"][2]["trained"] == own[1]["stages"][2]["trained"]
    for i, name in enumerate("abcdefgh"):
        Image.new("RGB", (9, 8), (i, 0, 0)).save(world / "own" / f"{name}.png")
    other = run("fake/tiny", Options(data=str(world / "own"), out=str(world / "c")))
    assert not other["stages"][0]["cached"]


def test_each_stage_is_judged_by_its_own_model(world, monkeypatch):
    """BLIP-2's stage 1 retrieves, what stage 2 cannot; the figures stand side by side."""
    whole = fakes.recipe()
    stages = tuple(replace(stage, evaluate=("answers",)) for stage in whole.stages)
    monkeypatch.setitem(recipes.RECIPES, "fake/tiny", replace(whole, stages=stages))
    judged = {}

    def judge(pupil, source):
        judged[pupil.stage.name] = {name: tensor.clone() for name, tensor in pupil.model.state_dict().items()}
        assert not pupil.model.training
        return {pupil.stage.name: {"value": 0.5, "n": 1, "chance": 0.1, "shuffled": 0.1}}

    monkeypatch.setattr(runs, "evaluate", judge)
    summary = run("fake/tiny", Options(out=str(world / "a")))
    assert list(summary["eval"]) == list(judged) == ["align", "tune"]
    for name, found in judged.items():
        kept = checkpoint.load(world / f"a/{name}.pt")
        assert all(torch.equal(found[part], kept[part]) for part in kept)
    assert not torch.equal(judged["align"]["bridge.weight"], judged["tune"]["bridge.weight"])


def test_a_trained_model_takes_any_stage_of_a_run_from_the_cache(world, monkeypatch):
    run("fake/tiny", Options(out=str(world / "a")))
    monkeypatch.setattr(runs, "train", lambda job, *rest: pytest.fail(f"{job.stage.name} was trained again"))
    for stage in ("align", "tune"):
        model, tokenizer = trained_model("fake/tiny", stage)
        kept = checkpoint.load(world / f"a/{stage}.pt")
        assert not model.training and len(tokenizer) > 0
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="fake/tiny has no stage 'see'"):
        trained_model("fake/tiny", "see")


def test_a_model_trained_for_the_cache_is_that_of_a_run_and_leaves_no_folder(world, monkeypatch):
    monkeypatch.chdir(world)
    model, _ = trained_model("fake/tiny")
    assert [path.name for path in world.iterdir()] == ["cache"]
    run("fake/tiny", Options(out=str(world / "a"), cache=False))
    kept = checkpoint.load(world / "a/tune.pt")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_ctrl_c_while_a_model_is_trained_for_the_cache_keeps_the_finished_stages(world, monkeypatch):
    monkeypatch.chdir(world)
    with monkeypatch.context() as patch:
        stop_after(patch, "tune", 5)
        with pytest.raises(KeyboardInterrupt, match="^stopped after step 5 of stage tune$"):  # there is no folder to go on with
            trained_model("fake/tiny")
    assert [path.name for path in world.iterdir()] == ["cache"] and len(list((world / "cache").iterdir())) == 2
    trained, real = [], runs.train
    monkeypatch.setattr(runs, "train", lambda job, *rest: trained.append(job.stage.name) or real(job, *rest))
    trained_model("fake/tiny")
    assert trained == ["tune"]


def test_the_key_covers_imports_of_imports(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("import os\nfrom nanovlm import b\n")
    (tmp_path / "b.py").write_text("from nanovlm.c import thing\n")
    (tmp_path / "c.py").write_text("thing = 1\n")
    (tmp_path / "d.py").write_text("unrelated = 1\n")
    before = cache.source_text("nanovlm.a")
    (tmp_path / "d.py").write_text("unrelated = 2\n")
    assert cache.source_text("nanovlm.a") == before
    (tmp_path / "c.py").write_text('"""What a student has written down."""\n\n# and here\nthing = 1\n')
    assert cache.source_text("nanovlm.a") == before, "a comment retrains nothing"
    (tmp_path / "c.py").write_text("thing = 2\n")
    assert cache.source_text("nanovlm.a") != before


def test_a_comment_trains_nothing_anew(monkeypatch, tmp_path):
    """Nor does a docstring, or an empty line; a constant does, wherever it stands."""
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    code = 'x = 1\n\nclass A:\n    y = 2\n\n    def f(self):\n        return "z"\n'
    said = ('"""Module."""\n\nx = 1  # one\nclass A:\n    """Class."""\n\n    y = 2\n    def f(self):\n'
            '        """Function."""\n        # why\n        return "z"\n')

    def key(text: str) -> str:
        (tmp_path / "a.py").write_text(text)
        return cache.source_text("nanovlm.a")

    assert key(code) == key(said)
    assert len({key(code), *(key(said.replace(old, new)) for old, new in (("= 1", "= 3"), ("= 2", "= 3"), ('"z"', '"w"')))}) == 4


def test_the_identity_of_data_follows_texts_and_pictures():
    def identity(**changes):
        source = fakes.FakeRecords(**{"seed": 1, "count": 4, **changes})
        return cache.data_identity(source)

    assert identity() == identity()
    assert len({identity(), identity(seed=2), identity(count=5), identity(size=5)}) == 4


# ---- before the first step, and between two of them


def test_what_a_stage_cannot_learn_from_is_left_out_before_the_first_step(world, monkeypatch):
    """Of that stage; the summary counts it. Where nothing is left no stage begins."""
    draw(world, *(f"{name}.png" for name in "abcdefgh"))
    asked = {name: "what is it?" + " really?" * 100 * (name == "c") for name in "abcdefgh"}
    data = write(world / "own.json", [{"image": f"{name}.png", "split": "val" if name == "h" else "train", "conversations": [
        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"red {name}"}]} for name, question in asked.items()])
    whole = fakes.recipe()

    def of_length(longest: int, out: str, **options) -> dict:
        stages = (whole.stages[0], replace(whole.stages[1], max_length=longest))
        monkeypatch.setitem(recipes.RECIPES, "fake/tiny", replace(whole, stages=stages))
        return run("fake/tiny", Options(data=str(data), out=str(world / out), **options))

    summary = of_length(150, "a")
    assert summary["notes"][0].startswith("Records that were left out: 1. The first is own.json record 2: ")
    assert [stage["name"] for stage in summary["stages"]] == ["see", "align", "tune"]
    monkeypatch.setattr(runs, "train", lambda job, *rest: pytest.fail(f"{job.stage.name} was trained"))
    with pytest.raises(UserError, match=r"^own: no record can be used \(view conversations\); own.json record 0: "):
        of_length(2, "b")
    assert not (world / "b").exists(), "an empty folder would take a name"
    kept = (world / "a/summary.json").read_bytes()
    with pytest.raises(UserError, match="no record can be used"):
        of_length(2, "a", overwrite=True)
    assert (world / "a/summary.json").read_bytes() == kept, "the old run goes when the new one can begin"


def test_what_an_exam_cannot_ask_is_left_out_too(world):
    """BLIP-2 learns from captions and is asked in conversations: of two pictures, or too long, they ended a run at its end."""
    asked = {"a": "<image>what?", "b": "<image>what?", "c": "<image>what?", "d": f"<image>{'why ' * 900}?", "e": "<image><image>same?"}
    draw(world, *(f"{name}.png" for name in "abcdef"))
    data = write(world / "talk.json", [{"image": ["e.png", "f.png"] if name == "e" else f"{name}.png",
                                        "split": "train" if name in "ab" else "val", "conversations": [
        {"from": "human", "value": question}, {"from": "gpt", "value": f"red {name}"}]} for name, question in asked.items()])
    recipe = resolve(recipes.get("blip2/tiny"), real=True)
    source = read(data)
    setting = Setting(recipe, 0, torch.device("cpu"), source, Tokenizer.train(source.texts(), 300))
    assert source.size("conversations", "val") == 3
    leave_out_unfit([Job(recipe, recipe.stages[-1])], setting)
    pupil = Pupil(recipe.build(recipe.stages[-1]), recipe, recipe.stages[-1], setting.tokenizer, "cpu")
    [exam] = source.exams(recipe.stages[-1].evaluate)
    assert [sample.turns[-1].answer for sample in exam.samples] == ["red c"] and len(pupil.answer(exam.samples, 2)) == 1
    assert [record for record, _ in source.skipped] == ["talk.json record 3", "talk.json record 4"]
    assert source.size("conversations", "train") == 2


@pytest.mark.parametrize("name", ["fake/tiny", "tuned/tiny"])
def test_published_weights_are_asked_for_before_anything_is_allocated(world, monkeypatch, name):
    """Of the recipe and of those whose weights it takes, as BLIP-2's fine-tuned ones do."""
    monkeypatch.delenv("NANOVLM_WEIGHTS", raising=False)
    whole = fakes.recipe(stages=(fakes.stage(init=(("eyes", "published:org/name"),)),))
    tuned = fakes.recipe("tuned/tiny", stages=(fakes.stage("more", init=(("", "fake/tiny"),)),))
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "fake/tiny": whole, "tuned/tiny": tuned})
    monkeypatch.setattr(fakes.FakeVLM, "__init__", lambda self, config: pytest.fail("a model was made"))
    with pytest.raises(UserError, match="org/name.*NANOVLM_WEIGHTS"):
        run(name, Options(out=str(world / "a")))
    assert not (world / "a").exists()


def test_a_warning_is_said_once_and_kept_as_it_was_at_the_end(capsys):
    """Its figures differ from step to step, which makes no other warning of it."""
    watch = Watch(fakes.FakeVLM(), fakes.stage(), None, torch.device("cpu"), 0, None, lambda step: None, list)
    for figure, last in ((0.6361, False), (0.6365, False), (0.6359, True)):
        watch.note(f"itm is {figure}, a blind guess", keep=last)
    watch.note(None)
    watch.note("bridge should learn but did not change")
    assert capsys.readouterr().out.splitlines() == [
        "WARNING: tune: itm is 0.6361, a blind guess.", "WARNING: tune: bridge should learn but did not change."]
    assert watch.warnings == ["tune: itm is 0.6359, a blind guess", "tune: bridge should learn but did not change"]


def test_a_gate_that_is_shut_when_the_stage_ends_is_a_warning():
    model = fakes.FakeVLM()
    model.side_gate = torch.nn.Parameter(torch.zeros(()))
    watch = Watch(model, fakes.stage(steps=20), None, torch.device("cpu"), 10, None, lambda step: None, list)
    for step, kept in ((19, 0), (20, 1)):
        watch.after(Report(step, {"lm": 1.0}, 0.1, 1.0, 1.0, {}))
        assert len(watch.warnings) == kept
    assert "still shut" in watch.warnings[0] and "side_gate" in watch.warnings[0]


def test_the_first_sample_comes_soon_and_then_one_every_half_minute(monkeypatch):
    clock, shown = [0.0], []
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    model = fakes.FakeVLM()
    rows = [(None, "what?", "red", "blue")]
    watch = Watch(model, fakes.stage(steps=1000), None, torch.device("cpu"), 10, None, lambda step: None,
                  lambda: shown.append(clock[0]) or rows)
    for step in range(11, 111):
        clock[0] += 1.0
        watch.after(Report(step, {"lm": 1.0}, 0.1, 1.0, 1.0, {}))
    assert shown == [11.0, 42.0, 73.0]


def test_how_long_a_stage_takes_and_all_that_come(monkeypatch, capsys):
    """In samples of this stage: 4 s for 2 steps of 6, so 60 steps more take 2 min; and 540 samples of later stages 3 min on top."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for later in (540, 0):
        shows = progress.Progress("[1/2] align", 38, 100, 6, later)
        for step in (39, 40):
            clock[0] += 2.0
            shows.last = -100.0
            shows.step(Report(step, {"lm": 0.5}, 0.1, 1.0, 1.0, {}))
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert second == "[1/2] align 40/100  lm 0.500  6 samples/s  120 s left, all stages: 5 min"
    assert fourth == "[1/2] align 40/100  lm 0.500  6 samples/s  120 s left"
    assert (progress.minutes(89.4), progress.minutes(90), progress.minutes(3541)) == ("89 s", "2 min", "59 min")


def test_a_run_whose_model_is_blind_says_so_at_half_time_and_in_the_end(world, monkeypatch, capsys):
    """Once while the stage runs; what still holds when it ends stands in the summary, and so below the last table."""
    logits = fakes.FakeVLM.logits
    monkeypatch.setattr(fakes.FakeVLM, "logits", lambda self, batch: logits(self, batch | {"images": 0 * batch["images"]}))
    summary = run("fake/tiny", Options(out=str(world / "a"), cache=False))
    during, after = capsys.readouterr().out.split("tune 20/20")
    kept = [warning for stage in summary["stages"] for warning in stage["warnings"] if "ignores them" in warning]
    assert [warning.split(":")[0] for warning in kept] == ["see", "align", "tune"]
    assert all(during.count(f"WARNING: {name}: the loss with exchanged images") == 1 for name in ("see", "align", "tune"))
    assert all(after.count(f"WARNING: {warning}.") == 1 for warning in kept)
