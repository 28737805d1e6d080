"""CapFilt: the rule, the file that grows, and the command on a person's own pictures from its beginning to its end."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
import torch
from data_files import draw, write
from PIL import Image
from test_checkpoint import stop_after

import train_tiny
from nanovlm import recipes
from nanovlm.bert import BertConfig
from nanovlm.data import formats
from nanovlm.data.sample import Sample
from nanovlm.data.transforms import Transform, load_image
from nanovlm.evaluate.pupil import Pupil
from nanovlm.making import bootstrap, capfilt
from nanovlm.making.bootstrap import Bootstrapped, Text, grow
from nanovlm.momentum import MomentumConfig
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.recipes.blip import SPECIALS
from nanovlm.runs import checkpoint, watch
from nanovlm.runs.folder import OURS
from nanovlm.runs.tuned import open_run, to_tune
from nanovlm.tokenizer import Tokenizer
from nanovlm.vit import clip_vit

WORDS = ("red", "green", "blue", "grey", "old", "new")
REAL = Pupil.belongs


# --- the rule ---

def web(count):
    return [Sample(f"p{i}", (f"{i}.png",), f"text {i}", label="swapped" if i % 3 == 0 else "") for i in range(count)]


def says(samples):
    """A captioner that has nothing to say of every fourth picture."""
    return ["" if int(sample.id[1:]) % 4 == 3 else f"new {sample.id}" for sample in samples]


def believes(samples):
    """A filter that knows the wrong texts, doubts the captioner's of every fifth picture, and is at 0.5 of the first."""
    return [0.5 if s.id == "p0" else 0.2 if s.label else 0.4 if s.caption.startswith("new") and int(s.id[1:]) % 5 == 0 else 0.9 for s in samples]


def test_both_texts_are_judged_apart_and_a_half_is_enough():
    texts = grow(None, web(11), says, believes)
    assert [(t.picture, t.source) for t in texts[:4]] == [("p0", "web"), ("p1", "web"), ("p2", "web"), ("p3", "web")]
    by = {(t.picture, t.source): t for t in texts}
    assert len(by) == 11 + 9 and ("p3", "captioner") not in by, "a captioner that says nothing adds no text"
    assert by["p0", "web"].kept and by["p0", "captioner"].kept, "P = 0.5 is kept"
    assert not by["p3", "web"].kept and by["p1", "web"].kept and by["p1", "captioner"].kept
    assert by["p5", "web"].kept and not by["p5", "captioner"].kept, "a picture may lose one text and keep the other"
    assert by["p3", "web"].noise == "swapped" and by["p6", "captioner"].noise == "", "a hidden label belongs to the web's text only"
    assert all(t.kept for t in grow(None, web(5), says, None)) and len(grow(None, web(5), None, believes)) == 5


def test_a_picture_with_several_texts_gets_one_new_one():
    samples = [replace(sample, references=("a", "b")) for sample in web(3)]
    texts = grow(None, samples, says, believes, said=lambda sample: sample.captions)
    assert Counter((t.picture, t.source) for t in texts) == {(f"p{i}", source): n for i in range(3) for source, n in (("web", 2), ("captioner", 1))}


# --- the file that grows ---

class Stopped(Exception):
    pass


def test_it_grows_by_chunks_and_goes_on_with_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 4)
    whole = grow(tmp_path / "whole.jsonl", web(11), says, believes)
    asked, done = [], []

    def tired(samples):
        asked.append([s.id for s in samples])
        if len(asked) == 3:
            raise Stopped
        return says(samples)

    path = tmp_path / "a.jsonl"
    with pytest.raises(Stopped):
        grow(path, web(11), tired, believes, done.append)
    assert asked == [["p0", "p1", "p2", "p3"], ["p4", "p5", "p6", "p7"], ["p8", "p9", "p10"]] and done == [4, 8]
    assert {t.picture for t in bootstrap.read(path)} == {f"p{i}" for i in range(8)}
    again = []
    texts = grow(path, web(11), lambda samples: again.append(len(samples)) or says(samples), believes, done.append)
    assert again == [4, 3] and done == [4, 8, 8, 11] and texts == whole
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize("cut", [1, 30, 200, 700, 0])
def test_a_torn_file_is_mended(tmp_path, monkeypatch, cut):
    """Killed while it wrote: whatever the file ends with, the rest is made again. 700 bytes leave each picture its web text."""
    monkeypatch.setattr(bootstrap, "CHUNK", 4)
    path = tmp_path / "a.jsonl"
    whole = grow(path, web(11), says, believes)
    content = path.read_bytes()
    path.write_bytes(content[:-cut] if cut else content + b'{"picture": "p1')
    assert grow(path, web(11), says, believes) == whole and path.read_bytes() == content


def test_the_mixture_draws_kept_texts_only():
    class World:
        def pooled(self, name, index):
            return Sample(f"scenes/{name}/{index}", (index,), "the web's own", label="cut")

    texts = [Text("scenes/web pairs/3", "a", "web", 0.1, "swapped"), Text("scenes/web pairs/3", "b", "captioner", 0.9),
             Text("scenes/web pairs/7", "c", "web", 0.5, "cut"), Text("scenes/web pairs/8", "d", "web", 0.499)]
    made = Bootstrapped(World(), "web pairs", texts)
    drawn = Counter((s.images[0], s.caption, s.label) for s in (made.draw(Random(i)) for i in range(400)))
    assert set(drawn) == {(3, "b", ""), (7, "c", "cut")}
    assert abs(drawn[3, "b", ""] - 200) < 60, "both as often; 400 coins are as far off once in 1e8"


# --- the command ---

VISION = clip_vit(image_size=16, patch=8, width=16, layers=1, heads=2)
SMALL = BLIPConfig(VISION, BertConfig(300, width=16, layers=1, heads=2, ffn=32, max_positions=64, dropout=0.0, image_width=16), embedding=8,
                   **SPECIALS, momentum=MomentumConfig(queue=16, momentum=0.9, ramp=2))
STEPS = ("--steps", "3")


@pytest.fixture
def place(monkeypatch, tmp_path):
    """noisy/, human.jsonl and a run of a tiny BLIP; the filter goes by the text alone."""
    recipe = recipes.get("blip/tiny")
    stages = tuple(replace(stage, batch_size=4) for stage in recipe.stages)
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "blip/tiny": replace(recipe, config=SMALL, stages=stages, image_size=16, vocab=300)})
    monkeypatch.setattr(watch, "save_curves", lambda *paths: None)
    monkeypatch.setattr(watch, "save_samples", lambda rows, path: None)
    monkeypatch.setattr(bootstrap, "CHUNK", 4)
    monkeypatch.setattr(Pupil, "belongs", lambda self, samples: [0.9 if good(s.caption) else 0.1 for s in samples])
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "noisy", *(f"images/{i}.png" for i in range(15)))
    rows = [{"image": f"images/{i}.png", "caption": text(i), "split": "val" if i >= 12 else "train", "label": "thing"} for i in range(15)]
    rows[1]["caption"] = [text(1), "bad second text"]
    rows.append(rows[2] | {"caption": "another line"})  # of one picture
    lines(tmp_path / "noisy/captions.jsonl", rows)
    draw(tmp_path / "checked", *(f"{i}.png" for i in range(6)))
    shutil.copy("noisy/images/5.png", "checked/copy.png")  # train there
    shutil.copy("noisy/images/13.png", "checked/held.png")  # held out there
    lines(tmp_path / "checked/human.jsonl", [{"image": f"{i}.png", "caption": f"{WORDS[i]} thing", "split": "train" if i else "val"} for i in range(6)]
          + [{"image": "copy.png", "caption": "a copy", "split": "train"}, {"image": "held.png", "caption": "a held one", "split": "train"}])
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 300)
    write(tmp_path / "runs/blip/config.json", {"what": OURS, "recipe": {"name": "blip/tiny"}, "data": str(tmp_path / "noisy"), "steps": None})
    checkpoint.save(tmp_path / "runs/blip/pretrain.pt", BLIP(SMALL).state_dict())
    checkpoint.save(tmp_path / "runs/blip/last.pt", {"tokenizer": tokenizer.to_dict()})
    return tmp_path


def good(caption):
    return "bad" not in caption and crc32(caption.encode()) % 3 > 0


def text(i):
    return f"{'bad' if i % 4 == 0 else 'good'} {WORDS[i % 6]} thing {i}"


def lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def command(*more, out="clean", human="checked/human.jsonl", model="runs/blip", data="noisy"):
    return capfilt.main(["--data", data, "--model", model, "--out", out, *(("--human", human) if human else ()), *STEPS, *more])


def test_the_command_from_beginning_to_end(place, capsys):
    assert command() == 0
    said, made = capsys.readouterr().out, [json.loads(line) for line in (place / "clean/captions.jsonl").read_text().splitlines()]
    assert "plan: captioner 3 steps of 4 pairs, filter 3 steps of 4 pairs" in said and "12 pictures to caption and filter, 3 held-out records to copy, " in said
    assert "next: python train_tiny.py --model blip --data clean" in said
    texts = [json.loads(line) for line in (place / "clean/texts.jsonl").read_text().splitlines()]
    for row in made:
        assert (place / "clean" / row["image"]).resolve().exists() and row["image"].startswith("../"), "no copy, and the right way"
    kept = {(row["image"].removeprefix("../noisy/"), row["caption"]) for row in made if "belongs" in row}
    assert kept == {(t["picture"], t["text"]) for t in texts if good(t["text"])} and len(kept) < len(texts)
    by_web = {(t["picture"], t["text"]) for t in texts if t["source"] == "web"}
    assert by_web == {(f"images/{i}.png", text(i)) for i in range(12)} | {("images/1.png", "bad second text"), ("images/2.png", "another line")}
    assert max(Counter(t["picture"] for t in texts if t["source"] == "captioner").values()) == 1
    held = [row for row in made if row["source"] == "web" and row["split"] == "val"]
    assert held == [{"image": f"../noisy/images/{i}.png", "caption": text(i), "label": "thing", "source": "web", "split": "val"} for i in (12, 13, 14)]
    human = {row["image"]: row["split"] for row in made if row["source"] == "human"}
    assert human == {f"../checked/{i}.png": "train" if i else "val" for i in range(6)} | {"../checked/copy.png": "train", "../checked/held.png": "val"}
    assert "6 human pairs to learn from" in said, "of seven the one that is held out in noisy/ is left out"
    assert (place / "clean/report.png").exists() and not list((place / "clean").glob("*.tmp"))
    # a normal data set, in which no picture is on both sides
    records = formats.read(place / "clean")
    sides = {split: {records.sample("pairs", split, i).images[0].tobytes() for i in range(records.size("pairs", split))} for split in ("train", "val")}
    assert not sides["train"] & sides["val"] and records.size("pairs", "train") == len([r for r in made if r["split"] == "train"])
    assert train_tiny.main(["--model", "blip", "--data", "clean", "--out", "x", "--steps", "nan"]) == 2  # read as any other


def test_captioner_and_filter_go_on_apart_from_the_run(place, monkeypatch):
    """The one learns to write, the other to judge; and what the filter says is P(belongs) of its own matching head."""
    monkeypatch.setattr(Pupil, "belongs", REAL)
    for i in range(15):  # one on which it matters how it is made small
        Image.frombytes("RGB", (40, 30), Random(i).randbytes(3600)).save(place / f"noisy/images/{i}.png")
    assert command("--on-missing", "skip") in (0, 2)  # it may take none for right
    start, captioner, judge = (checkpoint.load(place / f"clean/{name}.pt") for name in ("pretrain", "captioner", "filter"))
    assert set(captioner) == {name for name in start if name.split(".")[0] in ("vision", "text_decoder", "word_head")}
    assert not [name for name in judge if name.split(".")[0] in ("text_decoder", "word_head")]
    assert not torch.equal(captioner["vision.positions"], judge["vision.positions"])
    stages = {s["name"]: s for s in checkpoint.load(place / "clean/last.pt")["config"]["recipe"]["stages"]}
    assert all(stage["init"] == [["", "blip/tiny@pretrain"]] and stage["anew"] and stage["augment"] for stage in stages.values())
    model = BLIP(replace(SMALL, tasks=("itc", "itm")))
    model.load_state_dict(judge)
    tokenizer = Tokenizer.from_dict(checkpoint.load(place / "runs/blip/last.pt")["tokenizer"])
    for told in [json.loads(line) for line in (place / "clean/texts.jsonl").read_text().splitlines()][:6]:
        image = Transform(16)(load_image(place / "noisy" / told["picture"], 21))[None]
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(told["text"])[:46], tokenizer.eos_id]])
        with torch.no_grad():
            logits = model.eval().match(model.encode_image(image), ids, torch.ones_like(ids, dtype=torch.bool))
        assert told["belongs"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("where", ["captioner", "filter", "captions"])
def test_stopped_and_resumed_is_as_in_one_go(place, monkeypatch, capsys, where):
    assert command(out="whole") == 0
    with monkeypatch.context() as patch:
        if where == "captions":
            asked = []

            def tired(self, samples):
                asked.append(samples)
                if len(asked) == 4:  # the first is about human pairs, of which it is asked twice
                    raise KeyboardInterrupt
                return [0.9 if good(s.caption) else 0.1 for s in samples]

            patch.setattr(Pupil, "belongs", tired)
        else:
            stop_after(patch, where, 2)
        assert command() == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("Interrupted: ") and "--resume" in said
    assert not (place / "clean/captions.jsonl").exists(), "nothing half-made lies there"
    if where == "captions":
        with open(place / "clean/texts.jsonl", "a") as file:
            file.write('{"picture": "images/4')  # a kill in the midst of a line
    assert command() == 2 and "not empty" in capsys.readouterr().err
    assert command("--resume", "--seed", "1") == 2 and "--seed" in capsys.readouterr().err
    assert command("--resume") == 0
    for name in ("captions.jsonl", "texts.jsonl"):
        assert (place / "clean" / name).read_text() == (place / "whole" / name).read_text()
    for name in ("captioner.pt", "filter.pt"):
        a, b = (checkpoint.load(place / folder / name) for folder in ("clean", "whole"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_resumed_call_wants_the_same_sets(place, capsys):
    assert command() == 0
    rows = [json.loads(line) for line in (place / "noisy/captions.jsonl").read_text().splitlines()]
    lines(place / "noisy/captions.jsonl", [*rows[:3], rows[3] | {"caption": "changed"}, *rows[4:]])
    capsys.readouterr()
    assert command("--resume") == 2 and "what both sets hold" in capsys.readouterr().err
    assert command("--overwrite") == 0
    assert command("--overwrite", out="noisy") == 2, "a folder that is not ours is not deleted"
    assert command("--overwrite", out="runs/blip") == 2, "nor a run"
    assert command("--overwrite", out="clean", data="clean") == 2 and "holds what --data names" in capsys.readouterr().err
    assert train_tiny.main(["--model", "blip", "--data", "noisy", "--out", "clean", "--overwrite"]) == 2
    assert (place / "noisy/images/3.png").exists() and (place / "runs/blip/pretrain.pt").exists() and (place / "clean/captions.jsonl").exists()


def test_where_no_split_is_given_the_runs_own_is_kept(place):
    """train_tiny.py holds a tenth out by a hash: the same records are held out here, and afterwards."""
    rows = [json.loads(line) for line in (place / "noisy/captions.jsonl").read_text().splitlines()]
    lines(place / "noisy/captions.jsonl", [{k: row[k] for k in ("image", "caption")} for row in rows])
    before = formats.read(place / "noisy")
    held = {record.images[0].name for record in before.listed("val")}
    assert held and command() == 0
    made = [json.loads(line) for line in (place / "clean/captions.jsonl").read_text().splitlines()]
    assert {Path(row["image"]).name for row in made if row["source"] == "web" and row["split"] == "val"} == held
    assert not [row for row in made if "belongs" in row and Path(row["image"]).name in held]


def test_missing_pictures_are_an_error_or_left_out(place, capsys):
    (place / "noisy/images/3.png").unlink()
    (place / "noisy/images/6.png").write_text("no picture")
    assert command() == 2
    assert "3.png" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert command("--on-missing", "skip") == 0
    assert "2 records are left out" in capsys.readouterr().out
    texts = bootstrap.read(place / "clean/texts.jsonl")
    assert {t.picture for t in texts} == {f"images/{i}.png" for i in range(12) if i not in (3, 6)}


def test_beams_write_other_texts(place):
    assert command() == 0 and command("--beams", "3", out="beams") == 0
    a, b = ([t.text for t in bootstrap.read(place / folder / "texts.jsonl") if t.source == "captioner"] for folder in ("clean", "beams"))
    assert a != b


def test_a_filter_that_takes_nothing_leaves_nothing(place, monkeypatch, capsys):
    monkeypatch.setattr(Pupil, "belongs", lambda self, samples: [0.49] * len(samples))
    assert command() == 2
    assert "takes none of" in capsys.readouterr().err
    assert not (place / "clean/captions.jsonl").exists() and not (place / "clean/report.png").exists()


def test_what_the_captioner_repeats_is_written_once(place):
    texts = [Text("a", "good", "web", 0.7), Text("b", "bad", "web", 0.2), Text("a", "good", "captioner", 0.7), Text("b", "new", "captioner", 0.9)]
    paths = {"a": place / "noisy/images/1.png", "b": place / "noisy/images/2.png"}
    capfilt.write_out(texts, paths, [], [], place)
    made = [json.loads(line) for line in (place / "captions.jsonl").read_text().splitlines()]
    assert [(row["image"], row["caption"], row["source"]) for row in made] == [
        ("noisy/images/1.png", "good", "web"), ("noisy/images/2.png", "new", "captioner")]
    assert {name: [own[0].picture for own in found] for name, found in capfilt.by_outcome(texts).items()} == {
        "kept": ["a"], "rewritten": ["b"], "dropped": []}


def test_of_a_run_with_data_by_stage_that_of_the_captioners_start_counts(place):
    config = place / "runs/blip/config.json"
    write(config, json.loads(config.read_text()) | {"data": {"pretrain": str(place / "noisy"), "retrain": "others"}})
    assert open_run(place / "runs/blip", 1)[0] == str(place / "noisy")


def test_few_texts_are_worth_few_steps():
    class Human:
        def __init__(self, count):
            self.size = lambda view, split: count

    recipe = recipes.get("blip/tiny")
    made, batch = next(iter(recipe.makes.values())), recipe.stage("filter").batch_size
    for count, steps, wanted in ((10 * batch, None, 80), (10 * batch + 1, None, 81), (3, None, 60), (10 * batch, 0.5, 40), (3, 7, 7)):
        assert {stage.steps for stage in to_tune(recipe, made, Human(count), steps).stages} == {wanted}


@pytest.mark.parametrize(("more", "sentence"), [
    ({"human": None}, "--human is missing: captioner and filter must learn from texts that one can trust"),
    ({"model": "noisy"}, "no folder of a run"), ({"model": "blip"}, "no folder of a run"), ({"model": "runs/llava"}, "neither captioner nor filter"),
    ({"model": "runs/half"}, "not finished"), ({"data": "nothing"}, "no such file or folder"), ({"human": "nothing"}, "no such file or folder"),
    ({"human": "one.jsonl"}, "1 usable records"), ({"human": "same.jsonl"}, "1 different texts"), ({"human": "twins.jsonl"}, "1 different pictures"),
    ({"human": "held.jsonl"}, "its picture is held out")])
def test_bad_input_is_one_sentence(place, capsys, more, sentence):
    config = json.loads((place / "runs/blip/config.json").read_text())
    write(place / "runs/llava/config.json", config | {"recipe": {"name": "llava/tiny"}})
    write(place / "runs/half/config.json", config)
    a, b, c = ({"image": f"checked/{i}.png", "caption": f"{WORDS[i]} thing", "split": "train"} for i in range(3))
    lines(place / "one.jsonl", [a])
    lines(place / "same.jsonl", [row | {"caption": "a thing"} for row in (a, b, c)])
    lines(place / "twins.jsonl", [*(row | {"image": "checked/0.png"} for row in (a, b)), c | {"split": "val"}])
    lines(place / "held.jsonl", [row | {"image": f"noisy/images/{i}.png"} for i, row in zip((12, 13, 14), (a, b, c))])
    assert command(**more) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (place / "clean").exists()
