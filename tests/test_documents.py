"""Documents in their published layouts, in tables and in tar shards, and all that can be wrong with them."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import everything, tar, write
from PIL import Image

from nanovlm import masks
from nanovlm.data.check import main
from nanovlm.data.clips import in_folder
from nanovlm.data.conversation import encode
from nanovlm.data.formats import read, scan
from nanovlm.data.sample import IMAGE, Turn, page_turns
from nanovlm.data.shards import Shard
from nanovlm.errors import UserError
from nanovlm.recipes import flamingo
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import Epochs, Gathered

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def photo(file: Path, colour: int = 0, size: tuple[int, int] = (80, 70)) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 99)).save(file)
    return file.read_bytes()


def lines(file: Path, *rows: object) -> Path:
    return write(file, "\n".join(json.dumps(row) for row in rows))


OBELICS = {  # layout of a row of HuggingFaceM4/OBELICS: texts and images of one length
    "images": ["a.png", None, None, "b.png", None],
    "texts": [None, "The title", "Below it", None, "What b shows\non two lines"],
    "metadata": "[{}, null, null, {}, null]", "general_metadata": "{}",
}
MMC4 = {  # layout of a line of allenai/mmc4's docs_shard_*.jsonl
    "url": "http://example.com/page", "text_list": ["One sentence.", "Another.", "A third."],
    "image_info": [{"image_name": "b.png", "raw_url": "http://x/b.png", "matched_text_index": 2, "matched_sim": 0.29},
                   {"image_name": "a.png", "raw_url": "http://x/a.png", "matched_text_index": 0, "matched_sim": 0.31}],
    "similarity_matrix": [[0.1, 0.2, 0.29], [0.31, 0.1, 0.2]], "could_have_url_duplicate": 0,
}
OF_OBELICS = (Turn(IMAGE, "The title\nBelow it"), Turn(IMAGE, "What b shows\non two lines"))
OF_MMC4 = (Turn(IMAGE, "One sentence. Another."), Turn(IMAGE, "A third."))


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.json"])
def test_both_layouts_in_a_table(tmp_path, name):
    photo(tmp_path / "a.png", 1), photo(tmp_path / "b.png", 2)
    rows = [OBELICS, MMC4, {"id": "plain", "texts": ["Words only", "and more"], "images": [None, None]}]
    file = lines(tmp_path / name, *rows) if name.endswith("l") else write(tmp_path / name, rows)
    found = scan(file)
    assert found.kind == "documents" and not found.problems and not found.left_out
    one, two, plain = found.samples
    assert one.turns == OF_OBELICS and two.turns == OF_MMC4 and plain.turns == (Turn("", "Words only\nand more"),)
    assert [path.name for path in one.images] == ["a.png", "b.png"] == [path.name for path in two.images] and plain.images == ()
    assert two.id.endswith("(id http://example.com/page)") and plain.id.endswith("(id plain)")
    assert {sample.format for sample in found.samples} == {"pages"}


def test_the_pieces_of_a_page():
    """A picture opens a piece and texts join it; only a title stands before all pictures."""
    assert page_turns(["a", None, "b", "c", None, None, "d"]) == (Turn("", "a"), Turn(IMAGE, "b\nc"), Turn(IMAGE, ""), Turn(IMAGE, "d"))
    assert page_turns([None, "a", "b"], " ") == (Turn(IMAGE, "a b"),) and page_turns([]) == ()


WRONG = [
    ({"texts": ["a", None], "images": [None]}, 'fields "texts" and "images" must be lists of the same length'),
    ({"texts": ["a"]}, 'fields "texts" and "images" must be lists'),
    ({"texts": ["a", None], "images": [None, None]}, 'field "texts".1. and "images".1. are both null'),
    ({"texts": ["a", "b"], "images": [None, "a.png"]}, 'field "texts".1. and "images".1. are both given'),
    ({"texts": [3], "images": [None]}, 'field "texts".0. must be a text or null'),
    ({"texts": [None], "images": [{}]}, 'field "images".0. must be a path or null'),
    ({"texts": [], "images": []}, "the page is empty: it has neither a text nor a picture"),
    ({"texts": [" "], "images": [None]}, "the page is empty"),
    ({"texts": [None], "images": ["a.png"]}, "the page has pictures but no text to learn from"),
    ({"text_list": "a"}, 'field "text_list" must be a list of texts'),
    ({"text_list": ["a"], "image_info": ["a.png"]}, 'field "image_info" must be a list of'),
    ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, 'field "image_info".0.: "image_name" must be the path'),
    ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
     'field "image_info".0.: "matched_text_index" is 1; it must be the number of one of the 1 texts'),
    ({"texts": ["a"], "images": [None], "split": "test"}, 'field "split" is \'test\''),
]


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_wrong_page_is_named_with_its_field(tmp_path, row, said):
    photo(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"pages.jsonl line 2: {said}"):
        read(lines(tmp_path / "pages.jsonl", {"text_list": ["fine"]}, row))


def test_a_page_whose_picture_is_missing_is_left_out_as_elsewhere(tmp_path):
    photo(tmp_path / "a.png", 1)
    rows = [{"text_list": [f"text {i}"], "image_info": []} for i in range(4)]
    rows += [OBELICS, {"texts": [None, "shown"], "images": ["a.png", None]}]
    file = lines(tmp_path / "pages.jsonl", *rows)
    with pytest.raises(UserError, match='line 5: field "image": the picture b.png is missing'):
        read(file)
    source = read(file, on_missing="skip")
    assert len(everything(source, "pages")) == 5 and [record for record, _ in source.skipped] == ["pages.jsonl line 5"]
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    source = read(file, on_missing="skip")
    assert len(everything(source, "pages")) == 4 and len(source.skipped) == 2


def test_pictures_that_m3w_would_not_have_are_taken_out_and_counted(tmp_path):
    """A side below 64 pixels, or more than three times as long as the other; the bounds themselves may stay."""
    for name, size in {"small": (63, 90), "thin": (64, 193), "least": (64, 64), "longest": (64, 192)}.items():
        photo(tmp_path / f"{name}.png", len(name), size)
    names = ["small", "least", "thin", "longest"]
    row = {"texts": [text for name in names for text in (None, f"after {name}")], "images": [x for name in names for x in (f"{name}.png", None)]}
    found = scan(lines(tmp_path / "pages.jsonl", row, *({"text_list": [text]} for text in "xy")))
    page = found.samples[0]
    assert [path.stem for path in page.images] == ["least", "longest"] and found.problems == []
    assert page.turns == (Turn("", "after small"), Turn(IMAGE, "after least\nafter thin"), Turn(IMAGE, "after longest"))
    assert [said.split(": ", 1)[1] for said in found.left_out] == [
        "small.png is 63 × 90 pixels, smaller than 64", "thin.png is 64 × 193 pixels, thinner than 1 to 3"]
    assert "2 pictures were taken out of their pages; the first is pages.jsonl line 1: small.png" in read(tmp_path).notes({})[0]


# ---- views


@pytest.fixture
def mixed(tmp_path):
    """Documents, pairs and a conversation in one table."""
    for i in range(8):
        photo(tmp_path / f"{i}.png", 20 * i)
    talk = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a hat"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"id": "page", "texts": ["title", None, "text", None], "images": [None, "0.png", None, "1.png"], "split": "train"},
            {"id": "plain", "texts": ["held out"], "images": [None], "split": "val"},
            {"id": "talk", "image": "2.png", "conversations": talk, "split": "train"},
            *({"image": f"{i}.png", "caption": f"thing {i}", "split": "train"} for i in range(3, 8))]
    return read(lines(tmp_path / "mixed.jsonl", *rows))


def test_every_record_can_be_read_as_a_page(mixed):
    pages = [mixed.sample("pages", "train", i) for i in range(mixed.size("pages", "train"))]
    assert [page.format for page in pages] == ["pages", "pages", *["pair"] * 5]
    assert all(len(page.images) == sum(turn.question == IMAGE for turn in page.turns) for page in pages)
    assert {turn.question for page in pages for turn in page.turns} == {"", IMAGE}
    assert pages[0].turns == (Turn("", "title"), Turn(IMAGE, "text"), Turn(IMAGE, ""))
    assert pages[1].turns == (Turn(IMAGE, "what is it? a hat"), Turn("", "sure? yes"))
    captions = [mixed.sample("pages", "train", i).turns[0].answer for i in range(2, 2 + 7 * 40, 7)]
    assert {captions[0].strip()} == {caption.strip() for caption in captions} and len(set(captions)) == 2, "half open with a blank"
    assert mixed.sample("pages", "train", 2).turns == mixed.sample("pages", "train", 2).turns


def test_pairs_stand_together_every_second_time_and_documents_never(mixed):
    stage = replace(flamingo.TINY.stages[0], mixed="samples", portions={}, accumulate=1, batch_size=7)
    pages = Gathered(Epochs(mixed, stage, 0))
    found = [pages[place] for place in range(28)]
    assert found == [pages[place] for place in range(28)]
    assert {page.format for page in found[::2]} == {"pages", "pair"} and {page.format for page in found[1::2]} == {"pages", "flamingo"}
    for page in found[1::2]:
        if page.format == "flamingo":
            assert 2 <= len(page.images) == len(page.turns) <= 5
            names = [turn.answer for turn in page.turns]
            assert max(map(names.count, names)) > 1, "the first one stands there twice"
            colour = {f"thing {i}": 20 * i for i in range(3, 8)}
            assert [image.getpixel((0, 0))[0] for image in page.images] == [colour[name] for name in names]


def test_a_language_model_reads_a_document_without_its_pictures(mixed):
    page = mixed.sample("texts", "train", 0)
    assert page.turns == (Turn("", "title\ntext"),) and page.images == page.told == () and page.format == "pages"
    assert {"title", "text"} <= set(mixed.texts()) and "held out" not in mixed.texts() and "" not in mixed.texts()
    for view in ("pairs", "captions", "conversations", "prompted"):
        assert all(sample.format != "pages" for sample in everything(mixed, view))
    assert mixed.size("conversations", "train") == 6 and mixed.exams(("answers",)) == []
    mixed.leave_out("texts", lambda sample: None)
    assert mixed.size("texts", "train") == 7
    assert {len(record.images) for record in mixed.listed("train")} == {1}


def test_documents_that_share_a_picture_stay_on_one_side(tmp_path):
    for i in range(10):
        photo(tmp_path / f"{i}.png", 9 * i)
    rows = [{"texts": [None, f"text {i}"], "images": [f"{i % 10}.png", None]} for i in range(40)] + [{"text_list": [f"plain {i}"]} for i in range(20)]
    source = read(lines(tmp_path / "pages.jsonl", *rows))
    sides = [{page.images[0].tobytes() for i in range(source.size("pages", split)) for page in [source.sample("pages", split, i)] if page.images}
             for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[1]) == 1
    assert source.size("pages", "val") == 4 + 2


def test_check_counts_documents_their_pictures_and_clips(tmp_path, capsys):
    for i in range(4):
        photo(tmp_path / f"{i}.png", 30 * i, (80, 70 - 5 * i))
    rows = [{"texts": ["title", None], "images": [None, f"{i}.png"]} for i in range(4)] + [{"text_list": [f"text {i}"]} for i in range(3)]
    rows += [{"frames": ["0.png", "1.png"], "caption": f"it moves {i}"} for i in range(3)] + [{"texts": [], "images": []}]
    assert main([str(lines(tmp_path / "pages.jsonl", *rows)), "--model", "clip"]) == 1
    printed = capsys.readouterr().out
    assert "pages: documents" in printed and "documents 7, with 2 pictures, 5 without any" in printed
    assert "clips     3, of 2 to 2 frames" in printed and "left out  2 pictures of pages; the first is pages.jsonl line 3: 2.png" in printed
    assert "pages.jsonl line 11: the page is empty" in printed


# ---- shards


@pytest.fixture
def shards(tmp_path):
    """Two shards: pairs with a text or a JSON; documents with their pictures, one of them in a folder of the shard."""
    png = {i: photo(tmp_path / "made" / f"{i}.png", 30 * i) for i in range(6)}
    tar(tmp_path / "set" / "00000.tar", {
        "000.png": png[0], "000.txt": b"a hat", "001.png": png[1], "001.json": b'{"caption": "a shoe", "split": "train", "width": 80}',
        "deep/002.0.x.png": png[2], "deep/003.PNG": png[2], "deep/003.txt": "ein Schuh, größer".encode(), ".hidden": b"x"})
    tar(tmp_path / "set" / "00001.tar", {
        "a.png": png[3], "b.png": png[4], "one.json": json.dumps(OBELICS).encode(), "two.json": json.dumps(MMC4).encode()})
    return tmp_path / "set"


def test_shards_are_read_where_they_lie(shards):
    with pytest.raises(UserError, match="set: 00000.tar/deep/002: of deep/002.0.x.png no record can be made"):
        read(shards)
    before = sorted(shards.rglob("*"))
    source = read(shards, on_missing="skip")
    pages = {page.id: page for page in everything(source, "pages")}
    assert {page.id.split(" ")[0] for page in pages.values()} == {
        "00000.tar/000", "00000.tar/001", "00000.tar/deep/003", "00001.tar/one.json", "00001.tar/two.json"}
    assert pages["00001.tar/one.json"].turns == OF_OBELICS
    assert [image.getpixel((0, 0))[0] for image in pages["00001.tar/one.json"].images] == [90, 120]
    assert {page.caption for page in pages.values()} == {"a hat", "a shoe", "ein Schuh, größer", "The title", "One sentence."}
    assert sorted(shards.rglob("*")) == before, "nothing is unpacked"
    only = scan(shards / "00001.tar")
    assert (only.name, only.kind, len(only.samples), only.problems) == ("00001", "documents", 2, [])


def test_a_shard_of_a_whole_folder_is_read(tmp_path):
    """`tar -cf a.tar -C folder .` writes ./ before every name."""
    png = photo(tmp_path / "a.png", 90)
    row = {"texts": ["one", None, "two"], "images": [None, "a.png", None]}
    found = scan(tar(tmp_path / "x.tar", {"./a.png": png, "./one.json": json.dumps(row).encode()}))
    assert not found.problems and [str(sample.images[0]) for sample in found.samples] == [f"{tmp_path}/x.tar/a.png"]


def test_a_large_set_of_shards_is_decoded_when_it_is_asked_for(shards, monkeypatch):
    monkeypatch.setattr("nanovlm.data.records.KEPT_PICTURES", 1)
    source = read(shards, on_missing="skip")
    assert not source.in_memory and {image.size for page in everything(source, "pages") for image in page.images} == {(73, 64)}


@pytest.mark.parametrize(("damage", "said"), [
    ("cut in a member", "cannot be read as a tar file"), ("cut between members", "breaks off or is damaged behind 1 members"),
    ("header", "breaks off or is damaged behind 1 members"), ("no tar", "cannot be read as a tar file"), ("empty", "cannot be read as a tar file")])
def test_a_damaged_shard_is_one_sentence(tmp_path, damage, said):
    file = tar(tmp_path / "x.tar", {"a.txt": b"a" * 700, "b.txt": b"b" * 700})
    whole = file.read_bytes()
    file.write_bytes({"cut in a member": whole[:2300], "cut between members": whole[:1536], "no tar": b"no tar" * 300, "empty": b"",
                      "header": whole[:1536] + b"?" * 512 + whole[2048:]}[damage])
    with pytest.raises(UserError, match=f"x.tar: x.tar: the shard {said}.*; fetch it again"):
        read(file)


@pytest.mark.parametrize(("members", "said"), [
    ({"a.json": b"{"}, "a: a.json is no JSON"), ({"a.json": b"[]"}, "a: a.json is no JSON object"),
    ({"a.png": b"", "a.txt": b"\xff"}, "a: a.txt cannot be read as UTF-8"), ({"a.png": b"", "a.txt": b" "}, 'a: field "caption" is empty'),
    ({"a.json": json.dumps({"texts": ["x", None], "images": [None, "../b.png"]}).encode()}, "the picture ../b.png is missing in the shard"),
    ({"a.json": json.dumps({"texts": ["x", None], "images": [None, "/etc/hostname"]}).encode()}, "the picture /etc/hostname is missing in the shard")])
def test_what_is_wrong_in_a_shard_is_named(tmp_path, members, said):
    photo(tmp_path / "b.png")  # above the shard: no name leads there
    with pytest.raises(UserError, match=f"x.tar: x.tar/{said}" if said[1] == ":" else said):
        read(tar(tmp_path / "shards" / "x.tar", members))


def test_links_in_a_shard_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
        out.addfile(info)
    assert Shard(tmp_path / "x.tar").members == {}


def test_a_broken_picture_in_a_shard_is_named_with_its_shard(tmp_path):
    with pytest.raises(UserError, match="x.tar/a.png: the picture cannot be read .its content is no known picture format"):
        read(tar(tmp_path / "x.tar", {"a.png": b"no picture", "a.txt": b"a hat"}))


# ---- frames of a clip in a table; the rest is in test_clips.py


def test_clips_in_a_table(tmp_path):
    for i in (1, 2, 10):
        photo(tmp_path / "run" / f"{i}.png", i)
    photo(tmp_path / "a.png")
    (tmp_path / "void").mkdir()
    rows = [{"clip": "run", "caption": "it runs"}, {"frames": ["run/2.png", "run/1.png"], "caption": "backwards"},
            {"clip": "run", "conversations": [{"from": "human", "value": "<image> which way?"}, {"from": "gpt", "value": "left"}]},
            {"image": "a.png", "caption": "still"}]
    found = scan(lines(tmp_path / "clips.jsonl", *rows))
    assert [[path.name for path in sample.images[0]] for sample in found.samples[:3]] == [["1.png", "2.png", "10.png"], ["2.png", "1.png"],
                                                                                        ["1.png", "2.png", "10.png"]]
    source = read(tmp_path / "clips.jsonl")
    shown = {page.turns[0].answer.strip(): page.images[0] for page in everything(source, "pages")}
    assert [image.getpixel((0, 0))[0] for image in shown["it runs"]] == [1, 2, 10] and len(shown["which way? left"]) == 3
    assert {type(image) for sample in everything(source, "pairs") for image in sample.images} == {Image.Image}, "elsewhere the first frame"
    assert [record.caption for split in ("train", "val") for record in source.listed(split)] == ["still"], "a clip of several files is no picture"
    for row, said in (({"clip": "void", "caption": "x"}, "the clip void has no frame"), ({"frames": [], "caption": "x"}, "the clip has no frame"),
                      ({"frames": "a.png", "caption": "x"}, "the clip has no frame"), ({"clip": "gone", "caption": "x"}, "the picture gone is missing")):
        with pytest.raises(UserError, match=said):
            read(lines(tmp_path / "wrong.jsonl", row))
    with pytest.raises(UserError, match="the clip void has no frame: the folder holds no picture"):
        in_folder(tmp_path / "void")


# ---- the real set


@pytest.mark.skipif(not (SHARED / "recipes").is_dir(), reason="../shared/data/recipes is not on this machine")
def test_recipes():
    found = scan(SHARED / "recipes")
    assert (found.name, found.kind, found.problems, found.left_out) == ("recipes", "documents", [], [])
    assert (found.splits.count("train"), found.splits.count("val")) == (167, 30)
    rows = [json.loads(line) for line in (SHARED / "recipes/documents.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, page in zip(rows, found.samples, strict=True):
        assert [path.name for path in page.images] == [Path(name).name for name in row["images"] if name]
        assert "\n".join(turn.answer for turn in page.turns if turn.answer) == "\n".join(text for text in row["texts"] if text)
    source = read(SHARED / "recipes")
    assert (source.size("pages", "train"), source.size("pages", "val")) == (167, 30) == (source.size("texts", "train"), source.size("texts", "val"))
    assert (source.size("pairs", "train"), source.size("pairs", "val"), source.size("conversations", "train")) == (101, 20, 0)
    assert "Apple Pie" in {pair.caption for pair in everything(source, "pairs")}
    pages = everything(source, "pages")
    assert sum(not page.images for page in pages) == 60 and sum(len(page.images) for page in pages) == 161
    assert {"½", "°", "🍔"} <= set("".join(turn.answer for page in pages for turn in page.turns))


@pytest.mark.skipif(not (SHARED / "recipes").is_dir(), reason="../shared/data/recipes is not on this machine")
def test_every_token_of_a_recipe_sees_the_image_before_it():
    """The tokens that see image n say what stands in the document between image n and the next one, to the letter."""
    rows = [json.loads(line) for line in (SHARED / "recipes/documents.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer([])
    for row, page in zip(rows, scan(SHARED / "recipes").samples, strict=True):
        texts = [[]]
        for text, image in zip(row["texts"], row["images"], strict=True):
            texts += [[]] if image else []
            texts[-1] += [text] if text else []
        ids, _ = encode(page.turns, tokenizer, "pages", image_tokens=1)
        phi = masks.last_image(torch.tensor([ids]) == tokenizer.image_id)[0].tolist()
        said = [tokenizer.decode([i for i, p in zip(ids, phi) if p == n and i >= len(tokenizer.specials)]) for n in range(len(texts))]
        assert said == ["\n".join(those) for those in texts] and len(page.images) == max(phi) == len(texts) - 1
