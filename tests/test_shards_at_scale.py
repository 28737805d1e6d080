"""Tar shards that stay on the disk: what they hold, in which order, and the same for any number of ranks and workers."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from data_files import tar
from PIL import Image
from test_lines import as_plain, kept

from nanovlm import recipes
from nanovlm.data import check, formats, index, order
from nanovlm.data.order import KEPT, WINDOW, Windows
from nanovlm.data.packed import Tar
from nanovlm.data.records import Records
from nanovlm.data.sample import REAL, Sample
from nanovlm.data.stored import ENOUGH, Stored
from nanovlm.errors import UserError
from nanovlm.training import distributed
from nanovlm.training.batches import Epochs, MicroBatches, stream

STAGE = replace(recipes.get("clip/tiny").stages[0], batch_size=8, steps=17, accumulate=2, real="captions")


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (70, 66), (number % 256, number // 256, 9)).save(out, "PNG")
    return out.getvalue()


def pairs(shard: int, count: int, **more) -> dict[str, bytes]:
    """Members of one shard; a name comes again in each shard, and the order is not that of the names."""
    made = {}
    for i in Random(shard).sample(range(count), count):
        text = f"thing {shard}/{i}"
        made[f"{i:03d}.png"] = picture(100 * shard + i)
        made |= {f"{i:03d}.json": json.dumps({"caption": text, **more}).encode()} if i % 2 else {f"{i:03d}.txt": text.encode()}
    return made


def folder(path: Path, counts: list[int], **more) -> Path:
    for shard, count in enumerate(counts):
        tar(path / f"{shard:05d}.tar", pairs(shard, count, **more))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("shards"), [7, 5, 9, 3, 8, 6, 7, 4, 5, 6, 8, 5])


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> Path:
    """Pairs, conversations and documents, nine shards, with splits."""
    path = tmp_path_factory.mktemp("kinds")
    for shard in range(9):
        split = "val" if shard % 4 == 1 else "train"
        talk = {"image": "deep/b.png", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f"it is {shard}"}]}
        page = {"texts": ["größe", None, f"end {shard}"], "images": [None, "ö.1.png", None]}
        tar(path / f"{shard}.tar", {
            **pairs(shard, 3, split=split), "deep/b.png": picture(10 * shard), "talk.json": json.dumps({**talk, "split": split}).encode(),
            "ö.1.png": picture(10 * shard + 1), "page.json": json.dumps({**page, "split": split}, ensure_ascii=False).encode(),
            "several.png": picture(10 * shard + 2), "several.json": json.dumps({"caption": ["one", f"two {shard}"], "split": split}).encode()})
    return path


def test_members_lie_where_tarfile_finds_them(shards):
    part = Tar(shards / "00002.tar")
    assert len(part.facts) == 9 and part.about[:3].tolist() == index.stamp(shards / "00002.tar")
    for name, content in pairs(2, 9).items():
        assert part.places.find(name).read_bytes() == content
    assert [part.row(i)[1]["caption"] for i in range(9)] == [f"thing 2/{i}" for i in Random(2).sample(range(9), 9)], "in the shard's order"
    assert part.places.members.get("no.png") is None and part.places.members.get("zzz") is None and part.places.members.get("") is None


@pytest.mark.parametrize("view", REAL)
def test_every_view_is_that_of_the_reader_of_small_sets(every_kind, view):
    whole, disk = formats.read(every_kind, cache_side=400, whole=True), formats.read(every_kind, cache_side=400)
    assert isinstance(whole, Records) and isinstance(disk, Stored) and disk.size(view, "train") == whole.size(view, "train") > 0
    ours, theirs = ([sample[1:] for sample in kept(source, view)] for source in (disk, whole))
    if view in ("pairs", "captions", "pages"):  # no chance in what is asked, so that order does not matter
        assert sorted(ours, key=str) == sorted(theirs, key=str)
    assert {sample[2] for sample in kept(disk, view)} == {sample[2] for sample in kept(whole, view)}
    assert {as_plain(disk.sample(view, "val", i))[2] for i in range(disk.size(view, "val"))} == {
        as_plain(whole.sample(view, "val", i))[2] for i in range(whole.size(view, "val"))}


def test_a_small_set_of_shards_is_read_whole(shards, tmp_path, monkeypatch):
    few = folder(tmp_path / "few", [40, 40])
    assert isinstance(formats.read(few), Records) and not list(few.glob("*.npy"))
    assert isinstance(formats.read(shards), Stored) and len(list(shards.glob("*.index.npy"))) == 12
    monkeypatch.setattr(formats, "LARGE", 1000)
    assert isinstance(formats.read(few), Stored)
    assert isinstance(formats.read(few / "00000.tar"), Stored), "a single one, too"


# ---- train and held out


def test_whole_shards_are_held_out_where_there_are_enough(shards):
    disk = formats.read(shards)
    assert len(disk.parts) >= ENOUGH and len(disk._whole) == 1, "a tenth of twelve"
    held, = disk._whole
    of_shard = {f"thing {held}/{i}" for i in range(len(disk.parts[held].facts))}
    assert {disk.sample("captions", "val", i).caption for i in range(disk.size("captions", "val"))} == of_shard
    train = [disk.sample("captions", "train", i).caption for i in range(disk.size("captions", "train"))]
    assert len(set(train)) == len(train) == 73 - len(of_shard) and not of_shard & set(train)


def test_of_few_shards_a_tenth_of_the_records_is_held_out(tmp_path):
    disk = formats.read(folder(tmp_path, [60] * 8))
    sides = [{disk.sample("captions", split, i).caption for i in range(disk.size("captions", split))} for split in ("train", "val")]
    assert not disk._whole and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 480
    assert 20 < len(sides[1]) < 80  # 48 are expected, with a standard deviation of 6.6: four of them on either side


# ---- the order


@pytest.mark.parametrize("sizes", [[7], [5, 0, 9, 3, 0, 0, 8, 6, 7, 4, 0], [1] * 9, [0, 4]])
def test_each_sample_comes_once_an_epoch(sizes):
    total = sum(sizes)
    first, second = Windows(sizes, "0/a/0"), Windows(sizes, "0/a/1")
    order = [first[place] for place in range(total)]
    assert sorted(order) == list(range(total)) and len(first) == total
    assert total < 9 or order != [second[place] for place in range(total)]
    places = Random(0).choices(range(total), k=50)
    assert [Windows(sizes, "0/a/0")[place] for place in places] == [order[place] for place in places], "from any place on"


def test_only_a_window_of_shards_is_in_use():
    sizes, windows = [100] * 23, Windows([100] * 23, "key")
    order = [windows[place] for place in range(2300)]
    shards = [{sample // 100 for sample in order[start:start + 400]} for start in range(0, 2300, 400)]
    assert [len(window) for window in shards] == [WINDOW] * 5 + [3] and len(set.union(*shards)) == 23
    assert shards[0] != set(range(4)), "shards are permuted"
    assert len({sample // 100 for sample in order[:20]}) == WINDOW, "a window is mixed"
    assert len(windows.kept) == KEPT and sum(map(len, windows.kept.values())) < sum(sizes)


def captions(samples: list[Sample], rng: Random) -> list[str]:
    return [sample.caption for sample in samples]


def share(path: Path, rank: int, world: int, workers: int, first: int = 0) -> list[list[str]]:
    """What a rank reads from step `first` on, as a run has it after a start of its own."""
    batches = MicroBatches(Epochs(formats.read(path), STAGE, 3), STAGE, 3, captions)
    batches.rank, batches.world = rank, world
    return list(stream(batches, first, distributed.choose_device("cpu"), workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_global_batch_for_any_number_of_ranks_and_workers(shards, world, workers):
    epochs = Epochs(formats.read(shards), STAGE, 3)
    ranks = [share(shards, rank, world, workers) for rank in range(world)]
    for step in range(STAGE.steps):
        mine = [[name for batch in rank[2 * step:2 * step + 2] for name in batch] for rank in ranks]
        assert [mine[place % world][place // world] for place in range(8)] == [epochs[8 * step + place].caption for place in range(8)]
    seen = [epochs[place].caption for place in range(epochs.size)]
    assert len(set(seen)) == epochs.size < 8 * STAGE.steps, "more than one epoch was read"


@pytest.mark.parametrize("first", [1, 8, 9, 16])
def test_a_run_goes_on_at_any_step(shards, first):
    assert share(shards, 1, 2, 0, first) == share(shards, 1, 2, 0)[2 * first:]


# ---- what is refused


def test_too_few_shards_are_refused(shards):
    disk = formats.read(shards)
    size = disk.size("captions", "train")
    Epochs(disk, replace(STAGE, batch_size=size), 0)
    with pytest.raises(UserError, match=f"12 files with {size} training samples are too few for stage clip, whose steps are of {size + 1} samples"):
        Epochs(disk, replace(STAGE, batch_size=size + 1), 0)


def test_what_is_wrong_with_a_shard_is_named(tmp_path):
    path = folder(tmp_path, [4] * 8)
    whole = (path / "00003.tar").read_bytes()
    (path / "00003.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match=r"00003.tar: 00003.tar: the shard .*; fetch it again\."):
        formats.read(path)
    tar(path / "00003.tar", {"notes.txt": b"nothing"} | {f"{i}.png": picture(i) for i in range(3)})
    with pytest.raises(UserError, match=r"00003.tar: the shard holds no record; remove it\."):
        formats.read(path)
    tar(path / "00003.tar", {"a.png": picture(1), "a.json": b'{"caption": '})
    with pytest.raises(UserError, match="00003.tar: 00003.tar/a: a.json is no JSON"):
        formats.read(path)
    tar(path / "00003.tar", {"a.png": picture(1), "a.json": b'{"caption": " "}'})
    with pytest.raises(UserError, match='00003.tar/a.json: field "caption" is empty'):
        kept(formats.read(path), "captions")
    tar(path / "00003.tar", {"a.png": picture(1), "a.json": b'{"caption": "a", "split": "test"}'})
    with pytest.raises(UserError, match='00003.tar/a: field "split" is \'test\''):
        formats.read(path)


def test_what_is_no_record_and_broken_pictures_stop_or_stand_aside(tmp_path):
    path = folder(tmp_path, [4] * 8)
    tar(path / "00002.tar", {"a.png": picture(1), "a.txt": b"one", "b.png": b"no picture", "b.txt": b"two", "lone.png": picture(2)})
    with pytest.raises(UserError, match="00002.tar/lone is no record .1 in all.; a picture needs a .txt or a .json of its name"):
        formats.read(path)
    disk = formats.read(path, on_missing="skip")
    told = [sample[2] for sample in kept(disk, "captions")] + [disk.sample("captions", "val", i).caption for i in range(disk.size("captions", "val"))]
    assert "one" in told and "two" not in told
    assert {record for record, _ in disk.skipped} == {"00002.tar/lone", "00002.tar/b.png"}
    tar(path / "00002.tar", {"a.png": picture(1), "a.txt": b"one", "b.png": b"no picture", "b.txt": b"two"})
    with pytest.raises(UserError, match="00002.tar/b.png: .*the picture cannot be read .its content is no known picture format"):
        disk = formats.read(path)
        for split in ("train", "val"):
            [disk.sample("captions", split, i) for i in range(disk.size("captions", split))]


def test_a_shard_that_was_changed_is_read_anew(tmp_path):
    path = folder(tmp_path, [4] * 8)
    formats.read(path)
    tar(path / "00005.tar", pairs(5, 6))
    disk = formats.read(path)
    assert len(disk.parts[5].facts) == 6


# ---- memory


def test_another_process_reads_the_same_and_is_sent_no_index(shards):
    disk = formats.read(shards)
    before = kept(disk, "captions")
    other = pickle.loads(pickle.dumps(disk))
    assert kept(other, "captions") == before and len(pickle.dumps(disk.parts)) < 2000


def test_one_pass_of_tarfile_and_none_at_the_next_start(shards, monkeypatch):
    formats.read(shards)
    monkeypatch.setattr("tarfile.open", None)
    Tar(shards / "00000.tar")


def test_a_thousand_shards_hold_no_files_open(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    path = folder(tmp_path, [2] * 60)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, before[1]))
    try:
        disk = formats.read(path)
        assert len({disk.sample("captions", "train", i).caption for i in range(disk.size("captions", "train"))}) == 108
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert index.loaded.cache_info().currsize <= index.LOADED


def test_check_reads_shards(shards, capsys):
    assert check.main([str(shards), "--model", "clip/tiny"]) == 0
    printed = capsys.readouterr().out
    assert "12 files with 73 records that stay on the disk" in printed and "problems: none" in printed


def test_windows_are_as_many_shards_as_told(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 2)
    windows = Windows([10] * 6, "key")
    assert [len({windows[place] // 10 for place in range(start, start + 20)}) for start in (0, 20, 40)] == [2, 2, 2]
