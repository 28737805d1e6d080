"""Records that stay on the disk as lines: what the reader of small sets makes of the same file, no more and no less."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import draw, write
from PIL import Image

from nanovlm import recipes
from nanovlm.data import check, formats, index, lines, stored
from nanovlm.data.lines import Lines, array_of, to_lines
from nanovlm.data.records import Records
from nanovlm.data.sample import REAL, Sample
from nanovlm.data.stored import Stored
from nanovlm.errors import UserError
from nanovlm.runs.cache import data_identity
from nanovlm.training import batches
from nanovlm.training.batches import Epochs, Gathered

STAGE = replace(recipes.get("llava15/7b").stages[1], batch_size=8, steps=100, group=False, real="conversations")


def talk(picture: str, answer: str, **more) -> dict:
    return {"image": picture, "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": answer}], **more}


def rows(n: int = 40) -> list[dict]:
    """Of every kind that a table can hold, some held out."""
    several = [
        lambda i: {"image": f"{i}.png", "caption": f"a hat {i}", "label": "hat"},
        lambda i: {"image": f"{i}.png", "caption": [f"red {i}", f"a red thing {i}", "größer"]},
        lambda i: talk(f"{i}.png", f"it is {i}. Second sentence."),
        lambda i: {"conversations": [{"from": "human", "value": f"{i} + 2?"}, {"from": "gpt", "value": "no\nidea"}]},
        lambda i: {"image": f"{i}.png", "question": "which?", "answer": [str(i), "it"]},
        lambda i: {"texts": [f"title {i}", None, "end"], "images": [None, f"{i}.png", None]},
        lambda i: {"texts": [f"alone {i}"], "images": [None]},
        lambda i: {"frames": [f"{i}.png", "0.png"], "caption": f"a clip {i}"}]
    return [{**several[i % 8](i), "split": "val" if i % 5 == 2 else "train"} for i in range(n)]


def table(folder: Path, records: list[dict], name: str = "set.jsonl", pictures: int = 40) -> Path:
    """With a mark at its beginning, blank lines, ends of both kinds, and none behind the last line."""
    for i in range(pictures):
        (folder / f"{i}.png").parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 66), (i, 99, 7 * i % 256)).save(folder / f"{i}.png")
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(records))
    return write(folder / name, text)


def kept(source: Records | Stored, view: str) -> list[tuple]:
    return [as_plain(source.sample(view, "train", i)) for i in range(source.size(view, "train"))]


def as_plain(sample: Sample) -> tuple:
    pixels = [[frame.tobytes() for frame in (image if isinstance(image, tuple) else (image,))] for image in sample.images]
    return sample.id, pixels, sample.caption, sample.references, sample.turns, sample.told, sample.format, sample.form, sample.task


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return table(tmp_path_factory.mktemp("lines"), rows())


def test_each_line_lies_where_a_naive_reader_finds_it(file):
    parts, content = Lines(file), file.read_bytes()
    naive = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n")), len(content)]
    assert parts.starts.tolist() == naive
    given = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    assert [parts.row(i)[1] for i in np.flatnonzero(parts.facts["kind"])] == given
    assert parts.row(2)[0] == "set.jsonl line 3"


@pytest.mark.parametrize("view", REAL)
def test_every_view_is_that_of_the_reader_of_small_sets(file, view):
    whole, disk = formats.read(file, cache_side=400), Stored("set", [Lines(file)], cache_side=400)
    assert isinstance(whole, Records) and disk.size(view, "train") == whole.size(view, "train") > 0
    assert kept(disk, view) == kept(whole, view)
    assert disk.size(view, "val") == whole.size(view, "val") > 0
    assert [as_plain(disk.sample(view, "val", i)) for i in range(disk.size(view, "val"))] == [
        as_plain(whole.sample(view, "val", i)) for i in range(whole.size(view, "val"))]
    assert list(disk.captions(view)) == list(whole.captions(view))
    if view != "pairs":  # has no turns, whose words are counted
        assert [length > 0 for length in disk.lengths(view)] == [length > 0 for length in whole.lengths(view)]
    with pytest.raises(UserError, match="there is no view 'poems'"):
        disk.size("poems", "train")


def test_texts_and_exams_are_those_of_the_reader_of_small_sets(file, monkeypatch):
    whole, disk = formats.read(file), Stored("set", [Lines(file)])
    assert disk.texts() == whole.texts()
    assert [exam.name for exam in disk.exams(("answers",))] == [exam.name for exam in whole.exams(("answers",))]
    assert [s.caption for row in disk.galleries() for s in row] == [s.caption for row in whole.galleries() for s in row]
    monkeypatch.setattr(stored, "READ", 5)
    few = [record.id for record in disk.some_records(5)]
    assert len(few) == len(set(few)) == 5 and len(list(disk.captions("pairs"))) == 5
    assert set(disk.texts()) < set(whole.texts())


def test_a_picture_is_on_one_side_with_all_that_show_it(tmp_path):
    made = [talk(f"{i % 25}.png", f"answer {i}") for i in range(100)]
    made += [{**talk(f"{i}.png", f"both {i}"), "image": [f"{i}.png", f"{i + 1}.png"]} for i in range(24)]
    for row in made[100:]:
        row["conversations"][0]["value"] = "<image> <image>"
    disk = Stored("set", [Lines(table(tmp_path, made))])
    shown = {split: {path for i in range(disk.size("texts", split)) for path in names(disk, split, i)} for split in ("train", "val")}
    assert shown["train"] and shown["val"] and not shown["train"] & shown["val"]
    assert disk.size("texts", "train") + disk.size("texts", "val") < 124, "a record with pictures of both sides is on neither"
    other = Stored("set", [Lines(table(tmp_path / "b", made[::-1]))])
    assert {path for i in range(other.size("texts", "val")) for path in names(other, "val", i)} == shown["val"], "in any order of lines"


def names(disk: Stored, split: str, i: int) -> list[str]:
    record = disk._record(*disk._place("texts", i)[:2]) if split == "train" else disk.held.entries("texts", "val")[i][0]
    return [path.name for path in record.images]


# ---- the index


def test_an_index_is_made_once_and_again_when_the_file_is_another(file, tmp_path, monkeypatch):
    mine = write(tmp_path / "set.jsonl", file.read_text("utf-8"))
    Lines(mine)
    stored_at = index.path_of(mine).stat().st_mtime_ns
    assert Lines(mine).starts[-1] == mine.stat().st_size and index.path_of(mine).stat().st_mtime_ns == stored_at

    mine.write_text(mine.read_text("utf-8") + "\n" + json.dumps(rows()[0]), "utf-8")  # another size
    assert len(Lines(mine).facts) == 80

    other = mine.read_text("utf-8").replace("a hat 0", "hats 00")  # the same size, another time
    mine.write_text(other.replace("\n\n", " \n", 1), "utf-8")
    os.utime(mine, ns=(1, 2))
    assert np.count_nonzero(Lines(mine).facts["kind"] == index.BLANK) == 38

    index.path_of(mine).write_bytes(index.path_of(mine).read_bytes()[:90])  # torn
    assert len(Lines(mine).facts) == 79
    monkeypatch.setattr(index, "FORM", 2)
    assert Lines(mine).about[0] == 2, "a later version does not read the index of an earlier one"


def test_an_index_that_cannot_be_written_is_one_sentence(file, tmp_path, monkeypatch):
    mine = write(tmp_path / "set.jsonl", file.read_text("utf-8"))
    index.path_of(mine).mkdir()
    with pytest.raises(UserError, match=r"set.jsonl.index.npy: the index of set.jsonl cannot be written .*: make the folder writable"):
        Lines(mine)
    index.path_of(mine).rmdir()
    whole, saved = np.save, []

    def full(file: object, array: np.ndarray) -> None:
        saved.append(array)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        whole(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        Lines(mine)
    assert [path.name for path in tmp_path.iterdir()] == ["set.jsonl"], "nothing half-written stays"


@pytest.mark.parametrize("line, said", [
    ('{"image": "0.png", "caption": }', "this is no JSON"), ("[1]", "the record is no JSON object"),
    ('{"image": "0.png", "caption": "a", "split": "test"}', 'field "split" is \'test\''), ('{"image": "0.png"}', 'field "caption" is missing'),
    ('{"caption": "a"}', 'field "image" is missing'), ('{"image": "0.png", "conversations": []}', '"conversations" must be a list'),
    ('{"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]}', '1 "<image>" marks'),
    ('{"texts": ["a"], "images": []}', "lists of the same length")])
def test_a_line_that_is_no_record_is_named(tmp_path, line, said):
    file = write(tmp_path / "set.jsonl", "\n".join(map(json.dumps, rows())) + f"\n{line}\n{json.dumps(rows()[0])}\n")
    with pytest.raises(UserError) as error:
        Lines(file)
    assert str(error.value).startswith(f"{file}: set.jsonl line 41: ") and said in str(error.value) and "breaks off" not in str(error.value)
    assert not index.path_of(file).exists()


def test_a_torn_last_line_is_told_as_what_it_is(tmp_path):
    whole = "\n".join(map(json.dumps, rows()))
    with pytest.raises(UserError, match="set.jsonl line 40: this is no JSON .*; it is the last line and breaks off: fetch the file again"):
        Lines(write(tmp_path / "set.jsonl", whole[:-9]))


# ---- which sets stay on the disk


def test_large_sets_stay_on_the_disk_and_small_ones_do_not(tmp_path, monkeypatch):
    file = table(tmp_path, rows(), "captions.jsonl")
    assert isinstance(formats.read(tmp_path), Records) and not index.path_of(file).exists()
    monkeypatch.setattr(formats, "MANY_LINES", 39)
    for path in (file, tmp_path):
        disk = formats.read(path)
        assert isinstance(disk, Stored) and disk.name == tmp_path.name
    assert isinstance(formats.read(file, whole=True), Records)
    monkeypatch.setattr(formats, "MANY_LINES", 100)
    assert isinstance(formats.read(file), Records)
    monkeypatch.setattr(formats, "LARGE", 1000)
    assert isinstance(formats.read(file), Stored)
    coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(40)], "annotations": [{"image_id": i, "caption": "a"} for i in range(40)]}
    assert isinstance(formats.read(write(tmp_path / "coco.json", coco)), Records), "it is no table of lines"
    assert isinstance(formats.read(write(tmp_path / "lines.json", file.read_text("utf-8-sig"))), Stored)


def test_a_list_too_large_to_be_read_whole_becomes_lines(tmp_path, monkeypatch, capsys):
    file = write(table(tmp_path, rows()).with_name("mix.json"), json.dumps(rows(), indent=1))
    monkeypatch.setattr(formats, "LARGE", 1000)
    with pytest.raises(UserError, match=r"mix.json: a list of 0 MiB is too large .* python -m nanovlm.data.check \S*mix.json --lines \S*mix.jsonl\."):
        formats.read(file)
    out = tmp_path / "mix.jsonl"
    assert check.main([str(file), "--lines", str(out)]) == 0 and "40 records" in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == rows()
    assert isinstance(formats.read(out), Stored)
    assert check.main([str(file), "--lines", str(out)]) == 2 and "there is such a file already" in capsys.readouterr().err


@pytest.mark.parametrize("buffer", [1, 2, 7, 64, 1 << 20])
def test_a_list_is_read_a_buffer_at_a_time(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(lines, "BUFFER", buffer)
    for text in (json.dumps(rows(9)), json.dumps(rows(9), indent=2), "[]", "[12, 345, \"a]\\\"[\", {}]", json.dumps(rows(3), ensure_ascii=False)):
        assert list(array_of(write(tmp_path / "a.json", text))) == json.loads(text)
    with pytest.raises(UserError, match="a.json record 2: this is no JSON"):
        list(array_of(write(tmp_path / "a.json", json.dumps(rows(3))[:-2])))
    with pytest.raises(UserError, match="it is no list of records"):
        to_lines(write(tmp_path / "a.json", "{}"), tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


# ---- what stands aside


def test_a_missing_picture_stands_aside_or_stops(file, tmp_path):
    mine = table(tmp_path, rows())
    (tmp_path / "8.png").unlink()
    write(tmp_path / "16.png", "no picture")
    strict, lenient = Stored("set", [Lines(mine)]), Stored("set", [Lines(mine)], on_missing="skip")
    with pytest.raises(UserError, match=r"set: set.jsonl line 17: field \"image\": the picture 8.png is missing\."):
        kept(strict, "pages")
    captions = [sample[2] for sample in kept(lenient, "pages")]
    assert not {"a hat 8", "a hat 16"} & set(captions) and len(captions) == lenient.size("pages", "train"), "the next ones stand in"
    assert [record for record, _ in lenient.skipped] == ["set.jsonl line 17", "set.jsonl line 33"]


def test_what_a_stage_cannot_read_stands_aside(file):
    disk = Stored("set", [Lines(file)])
    disk.leave_out("conversations", lambda sample: "it is a hat" if "hat" in sample.caption else None)
    assert not any("hat" in sample[2] for sample in kept(disk, "conversations"))
    assert ("set.jsonl line 1", "it is a hat") in disk.skipped and any("hat" in sample[2] for sample in kept(disk, "captions"))
    with pytest.raises(UserError, match="set: none of the records that were tried can be used .view pairs.*no"):
        disk.leave_out("pairs", lambda sample: "no", ("train",))


# ---- an epoch


class Many:
    """1.2 million captions that nobody has written down."""

    path, lone = Path("many.jsonl"), ()

    def __init__(self, n: int):
        self.facts = np.zeros(n, index.FACTS)
        self.facts["images"] = self.facts["captions"] = 1
        self.facts["kind"], self.facts["low"] = index.CAPTIONED, np.arange(n) % 997 * (index.LOTS // 997)
        self.facts["high"] = self.facts["low"]
        self.about = np.array([1, 0, 0, n, 0, 0, *[n] * len(REAL)])
        self.places = SimpleNamespace(find=Path)  # the view of texts opens none

    def row(self, i: int) -> tuple[str, dict]:
        return f"record {i}", {"image": "a.png", "caption": str(i)}


def test_a_set_of_more_than_a_million_is_shuffled():
    many = Many(1_200_000)
    disk = Stored("many", [many])
    epochs = Epochs(disk, replace(STAGE, real="texts"), 0)
    first = [epochs[place].caption for place in range(8)]
    size = disk.size("texts", "train")
    assert 1_190_000 < size < 1_200_000 and len(set(first)) == 8
    assert sorted(map(int, first)) != list(map(int, first)) and max(map(int, first)) > 100_000
    order, another = (disk.order("texts", f"0/x/{epoch}") for epoch in range(2))
    assert len(order) == size and np.array_equal(np.sort(order.window(0)), np.arange(size))
    assert [order[place] for place in range(99)] != [another[place] for place in range(99)]


def test_an_order_takes_eight_bytes_a_sample():
    order = formats.Records.order(SimpleNamespace(size=lambda view, split: 1000), "texts", "key")
    assert isinstance(order, torch.Tensor) and order.nbytes == 8000 and sorted(order.tolist()) == list(range(1000))
    grouped = batches._grouped_epoch([5, -3, 7] * 100, 8, 2, "key")
    assert isinstance(grouped, np.ndarray) and sorted(grouped.tolist()) == list(range(300))


def test_batches_are_grouped_by_modality(file):
    stage = replace(STAGE, group=True, batch_size=4)
    disk = Stored("set", [Lines(file)])
    epochs = Epochs(disk, stage, 0)
    size = disk.size("conversations", "train") // 4
    seen = [[epochs[place] for place in range(step * 4, step * 4 + 4)] for step in range(size)]
    mixed = [batch for batch in seen if len({bool(sample.images) for sample in batch}) > 1]
    assert len(mixed) <= 1 and len({sample.id + sample.caption for batch in seen for sample in batch}) == size * 4


def test_pages_are_gathered_of_the_captions_that_are_known(file, monkeypatch):
    whole, disk = formats.read(file, cache_side=400), Stored("set", [Lines(file)], cache_side=400)
    stage = replace(STAGE, real="pages")
    assert Gathered(Epochs(disk, stage, 0)).alike == Gathered(Epochs(whole, stage, 0)).alike
    monkeypatch.setattr(stored, "READ", 3)
    few = Gathered(Epochs(disk, stage, 0))
    assert len(few.captions) == 3 and all(few[place].turns for place in range(40))


def test_another_process_reads_the_same(file):
    disk = Stored("set", [Lines(file)], cache_side=400)
    kept(disk, "pairs")
    other = pickle.loads(pickle.dumps(disk))
    assert other.parts[0].facts is not disk.parts[0].facts and isinstance(other.parts[0].facts, np.memmap)
    assert kept(other, "pairs") == kept(disk, "pairs")


def test_workers_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(batches.distributed, "world", lambda: 16)  # on two machines
    for ranks, workers in (("8", 1), ("4", 3), ("1", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert batches.workers_of_rank() == workers


def test_a_set_on_the_disk_is_known_again_by_its_files(file, tmp_path):
    mine = table(tmp_path, rows(), pictures=40)
    first = data_identity(Stored("set", [Lines(mine)]))
    assert data_identity(Stored("set", [Lines(mine)])) == first
    os.utime(mine, ns=(1, 2))
    assert data_identity(Stored("set", [Lines(mine)])) != first


def test_check_reads_every_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "MANY_LINES", 10)
    made = [{"image": f"{i}.png", "caption": f"a thing {i}", "split": "val" if i % 9 == 0 else "train"} for i in range(80)]
    file = table(tmp_path, made, pictures=80)
    assert check.main([str(file), "--model", "clip/tiny"]) == 0
    printed = capsys.readouterr().out
    assert "set: 1 files with 80 records that stay on the disk" in printed and "problems: none" in printed
    (tmp_path / "7.png").unlink()
    made[30]["caption"] = " "
    table(tmp_path / "b", made, pictures=80)
    (tmp_path / "b/7.png").unlink()
    assert check.main([str(tmp_path / "b/set.jsonl"), "--model", "clip/tiny"]) == 1
    printed = capsys.readouterr().out
    assert "set.jsonl line 15: field \"image\": the picture 7.png is missing" in printed and 'line 61: field "caption" is empty' in printed


def test_a_set_needs_something_to_learn_and_something_to_ask(tmp_path):
    all_held = [{**row, "split": "val"} for row in rows()]
    with pytest.raises(UserError, match='set: all records are held out; some must have the "split" "train"'):
        Stored("set", [Lines(table(tmp_path, all_held))])
    one = [{"image": "0.png", "caption": str(i)} for i in range(9)]
    draw(tmp_path, "0.png")
    with pytest.raises(UserError, match="set: no record can be held out"):
        Stored("set", [Lines(table(tmp_path / "one", one))])
