"""Readers on literal records in each format's documented shape, on all that can be wrong, and on the real sets."""

import json
import os
import re
from pathlib import Path
from unicodedata import normalize

import pytest
from data_files import LLAVA, draw, everything, llava_set, write
from PIL import Image

from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.formats import read, scan
from nanovlm.data.sample import REAL, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


# ---- the formats, each as its documentation shows it


def test_a_folder_with_a_text_beside_each_picture(tmp_path):
    for i in range(20):
        draw(tmp_path, f"{i}.png")
        write(tmp_path / f"{i}.txt", f"  picture\nnumber {i}\n")
    source = read(tmp_path)
    assert source.name == tmp_path.name and source.few
    assert (source.size("pairs", "train"), source.size("pairs", "val")) == (18, 2)
    found = {sample.id: sample.caption for sample in everything(source, "pairs")}
    assert found == {f"{i}.png": f"picture number {i}" for i in range(20)}
    assert source.labels == ()


JSONL = (  # the two lines are those of the README of the sets in ../shared/data
    '{"image": "images/noto/1f43c.png", "caption": "panda", "caption_zh": "熊猫", "keywords": ["animal", "bamboo"], '
    '"group": "animals & nature", "artist": "noto", "split": "train"}\n\n'
    '{"image": "images/train/0000.jpg", "caption": "a photo of a pair of shorts", "label": "shorts", "split": "val"}\n'
)


@pytest.mark.parametrize("name", ["captions.jsonl", "mine.jsonl"])
def test_jsonl_by_folder_and_by_file(tmp_path, name):
    draw(tmp_path, "images/noto/1f43c.png", "images/train/0000.jpg")
    write(tmp_path / name, JSONL)
    for path in (tmp_path, tmp_path / name):
        source = read(path)
        panda, shorts = source.sample("pairs", "train", 0), source.sample("pairs", "val", 0)
        assert (panda.id, panda.caption, panda.label) == (f"{name} line 1", "panda", "")
        assert (shorts.id, shorts.caption, shorts.label) == (f"{name} line 3", "a photo of a pair of shorts", "shorts")
        assert panda.captions == ("panda",)
        assert panda.images[0].mode == "RGB" and not panda.turns


COCO = {  # layout of captions_val2014.json
    "info": {"description": "COCO 2014 Dataset", "version": "1.0", "year": 2014},
    "licenses": [{"id": 5, "name": "Attribution License"}],
    "images": [
        {"license": 5, "file_name": "COCO_val2014_000000391895.jpg", "height": 360, "width": 640, "id": 391895},
        {"license": 5, "file_name": "COCO_val2014_000000060623.jpg", "height": 427, "width": 640, "id": 60623},
        {"license": 5, "file_name": "COCO_val2014_000000000001.jpg", "height": 427, "width": 640, "id": 1},
    ],
    "annotations": [
        {"image_id": 391895, "id": 770337, "caption": "A man with a red helmet on a small moped on a dirt road. "},
        {"image_id": 391895, "id": 771687, "caption": "Man riding a motor bike on a dirt road\non the countryside."},
        {"image_id": 60623, "id": 787, "caption": "A young girl inhales with the intent of blowing out a candle."},
    ],
}


@pytest.mark.parametrize("where", ["beside", "images", "val2014", "annotations"])
def test_coco_captions_wherever_its_pictures_usually_lie(tmp_path, where):
    folder = {"beside": "", "annotations": "val2014/"}.get(where, f"{where}/")
    draw(tmp_path, *(f"{folder}{image['file_name']}" for image in COCO["images"]))
    file = write(tmp_path / ("annotations/" if where == "annotations" else "") / "captions_val2014.json", COCO)
    source = read(file)
    texts = {
        "captions_val2014.json image 391895": (
            "A man with a red helmet on a small moped on a dirt road.",
            "Man riding a motor bike on a dirt road on the countryside.",
        ),
        "captions_val2014.json image 60623": ("A young girl inhales with the intent of blowing out a candle.",),
    }
    for sample in everything(source, "captions"):
        assert sample.captions == texts[sample.id]
        assert sample.turns == (Turn("<image>", sample.caption, "caption"),)
    # on the train side every caption is met once an epoch; a held-out picture is asked about once
    for split in ("train", "val"):
        met = [source.sample("pairs", split, i) for i in range(source.size("pairs", split))]
        several = met[0].references if split == "train" else met[0].references[:1]
        assert [sample.caption for sample in met] == list(several)


def test_llava_conversations(tmp_path):
    source = read(llava_set(tmp_path))
    seen = {sample.id.split("(id ")[1][:-1]: sample for sample in everything(source, "conversations")}
    assert set(seen) == {LLAVA[0]["id"], "text", "7", "c"}
    assert seen["7"].turns == (Turn("<image>\nwhat is it?", "a hat"), Turn("and <image>?", "a shoe"))
    assert [image.getpixel((0, 0)) for image in seen["7"].images] == [
        Image.open(tmp_path / name).getpixel((0, 0)) for name in ("a.png", "b.png")
    ]
    assert seen["text"].images == () and seen["c"].turns[0].question == "what?\n<image>"
    # pairs and captions hold one picture each; the caption of a conversation is its first answer's first sentence
    pairs = {sample.caption for sample in everything(source, "pairs")}
    assert pairs == {"a beautiful painting of chernobyl by nekro.", "a shoe"}
    assert pairs == {sample.turns[0].answer for sample in everything(source, "captions")}
    # to the language model, a caption stands where the picture would
    told = {(sample.turns[0].question, sample.told) for sample in everything(source, "texts")}
    assert {("2 + 2?", ()), ("<image>\nwhat is it?", ("a hat", "a hat")), ("what?\n<image>", ("a shoe",))} < told
    assert not any(sample.images for sample in everything(source, "texts"))


def conversation(*values, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(("turns", "caption"), [
    (("Hello!", "Hello.", "<image>\nWhat is this?", "Thing 3. It is old."), "Thing 3."),
    (("<image>\nWhat is this?", "Thing 3.", "And this? <image>", "Thing 4."), "Thing 3."),
    (("Hello!", "Hello.", "And you?", "Fine."), "Hello."),
])
def test_a_caption_is_said_of_the_first_picture(tmp_path, turns, caption):
    draw(tmp_path, "a.png", "b.png")
    images = ["a.png", "b.png"][:sum(turn.count("<image>") for turn in turns)]
    file = write(tmp_path / "chat.json", [{"image": images, "conversations": conversation(*turns)}])
    assert scan(file).samples[0].caption == caption


TAG = "the tag <image> ends with </s>, [DEC] and ###"


@pytest.mark.parametrize("kind", ["jsonl", "folder", "coco", "answers", "several"])
def test_tags_in_captions_and_answers_are_text(tmp_path, kind):
    """In every view there are as many marks as pictures and no other special id; what is learned is as it was written."""
    draw(tmp_path, *(f"{i}.png" for i in range(12)))
    if kind == "folder":
        for i in range(12):
            write(tmp_path / f"{i}.txt", f"{i} {TAG}")
    elif kind == "coco":
        write(tmp_path / "captions.json", {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(12)],
                                           "annotations": [{"image_id": i, "caption": f"{i} {TAG}"} for i in range(12)]})
    else:
        rows = [{"image": f"{i}.png"} | ({"conversations": conversation("<image>\nwhat?", f"{i} {TAG}")} if kind == "answers"
                                         else {"caption": [f"{i} {TAG}", TAG] if kind == "several" else f"{i} {TAG}"})
                for i in range(12)]
        write(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, rows)))
    source, tokenizer = read(tmp_path), Tokenizer([])
    collate = Collate(tokenizer, "tiny", Transform(8), Reads())
    for view in [view for view in REAL if view != "pages"]:  # a format of its own: test_documents.py
        samples = everything(source, view)
        assert len(samples) >= 12 and all(TAG in sample.caption for sample in samples)
        for sample in samples if view != "pairs" else ():
            ids, labels = collate.encode(sample)
            assert ids.count(tokenizer.image_id) == len(sample.images) == (view != "texts")
            assert sample.told == (sample.caption,) * (view == "texts")
            assert [i for i in ids if i < len(tokenizer.specials) and i != tokenizer.image_id] == [tokenizer.bos_id, tokenizer.eos_id]
            assert f" {sample.caption}</s>" == tokenizer.decode([i for i in labels if i >= 0], specials=True)


def test_several_captions_are_references_of_one_another(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    rows = [{"image": "a.png", "caption": ["a hat", " a red\nhat"]},
            {"image": "b.png", "caption": ["a shoe", "footwear"], "conversations": conversation("<image>?", "yes")}]
    hat, shoe = scan(write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))).samples
    assert (hat.caption, hat.references) == ("a hat", ("a hat", "a red hat"))
    assert (shoe.caption, shoe.references) == ("a shoe", ("a shoe", "footwear"))


# ---- names and endings that promise something else

def captioned(names):
    return [{"image": name, "caption": f"thing {i}"} for i, name in enumerate(names)]


@pytest.mark.parametrize("rows", [1, 3])
def test_the_content_says_what_a_table_is_not_its_ending(tmp_path, rows):
    """JSON lines in a .json, a JSON list in a .jsonl, COCO in a .jsonl; a .jsonl of one line stays one."""
    names = [f"{i}.png" for i in range(rows)]
    draw(tmp_path, *names, *(image["file_name"] for image in COCO["images"]))
    lines = "\n".join(map(json.dumps, captioned(names)))
    assert [s.caption for s in scan(write(tmp_path / "a.jsonl", lines)).samples] == [f"thing {i}" for i in range(rows)]
    assert scan(write(tmp_path / "a.jsonl", json.dumps(captioned(names), indent=1))).samples[0].id == "a.jsonl record 0"
    assert len(scan(write(tmp_path / "c.jsonl", json.dumps(COCO, indent=1))).samples) == 2
    if rows > 1:
        found = scan(write(tmp_path / "b.json", lines + '\n{"image": '))
        assert [sample.id for sample in found.samples] == [f"b.json line {i + 1}" for i in range(rows)]
        assert str(found.problems[0]).startswith("b.json line 4: this is no JSON")


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_with_accents_are_found_however_they_are_written(tmp_path, written, on_disk):
    written, on_disk = normalize(written, "café"), normalize(on_disk, "café")
    draw(tmp_path, f"{on_disk}.png", f"f/{on_disk}.png")
    found = scan(write(tmp_path / "a.jsonl", json.dumps(captioned([f"{written}.png"])[0])))
    assert found.samples[0].images[0].is_file() and not found.problems
    write(tmp_path / "f" / f"{written}.txt", "a café")
    found = scan(tmp_path / "f")
    assert [sample.caption for sample in found.samples] == ["a café"] and not found.problems


NO_PICTURE = {  # name → what is said of it
    "photos/../x.png": "the picture photos/../x.png is missing$",
    "below.png": "the picture below.png is missing; write photos/below.png, where one lies$",
    "https://example.org/a.png": r"holds a picture's data or address \(https://example.org/a.png\), not its path",
    "data:image/png;base64," + 5000 * "iVBO": r"holds a picture's data or address \(data:image/png;base64,(iVBO){4}iV\), not its path",
    5000 * "x": "the picture x{80} is missing$",
    "a\0.png": "is missing$",
}


@pytest.mark.parametrize("name", NO_PICTURE, ids=range(len(NO_PICTURE)))
def test_what_is_no_path_of_a_picture_is_said_and_skipped(tmp_path, name):
    draw(tmp_path, "a.png", "b.png", "photos/below.png")
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, captioned(["a.png", name, "b.png"]))))
    with pytest.raises(UserError, match="a.jsonl line 2: "):
        read(file)
    source = read(file, on_missing="skip")
    ((record, reason),) = source.skipped
    assert record == "a.jsonl line 2" and re.search(NO_PICTURE[name], reason) and len(everything(source, "pairs")) == 2


def test_videos_are_no_letters(tmp_path):
    """Refused, or skipped and counted; talk about the tag itself is talk."""
    draw(tmp_path, "a.png", "b.png")
    rows = [*captioned(["a.png", "b.png"]), {"video": "a.mp4", "conversations": conversation("what happens?", "a clip")},
            {"video": "a.mp4", "caption": "a clip"}, {"conversations": conversation("<video>\nwhat happens?", "a clip")},
            {"conversations": conversation("hi", "hello", "and here?\n<video>", "a clip")},
            {"conversations": conversation("is <video> right?", "yes", "<video>\n<source>\n</video>\nand this?", "no")}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r'a.jsonl line 3: field "video": videos are not read.*3 more'):
        read(file)
    source = read(file, on_missing="skip")
    assert [record for record, _ in source.skipped] == [f"a.jsonl line {i}" for i in (3, 4, 5, 6)]
    assert {sample.id for sample in everything(source, "conversations")} == {f"a.jsonl line {i}" for i in (1, 2, 7)}


def test_half_a_character_is_said_with_its_record(tmp_path):
    """JSON can write it, and names of files may hold bytes that are no text."""
    draw(tmp_path, "a.png", "f/b.png")
    said = r"half of a character \('\\ud83d'\); mend or remove it"
    file = write(tmp_path / "a.jsonl", '{"image": "a.png", "caption": "\\ud83d\\ude00"}\n{"image": "a.png", "caption": "\\ud83d"}')
    with pytest.raises(UserError, match=f"a.jsonl line 2: it holds {said}"):
        read(file)
    coco = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a smile \ud83d"}]}
    with pytest.raises(UserError, match=f"c.json image 1: it holds {said}"):
        read(write(tmp_path / "c.json", coco))
    if os.name == "posix":
        for ending, content in ((b".png", (tmp_path / "a.png").read_bytes()), (b".txt", b"text")):
            with open(os.fsencode(tmp_path / "f") + b"/\xff" + ending, "wb") as odd:
                odd.write(content)
        assert "half of a character" in scan(tmp_path / "f").problems[-1].reason


# ---- what is wrong with one record


GOOD = {"image": "a.png", "caption": "fine"}
BAD_RECORDS = {
    "caption missing": ({"image": "a.png"}, 'line 2: field "caption" is missing'),
    "image missing": ({"caption": "x"}, 'line 2: field "image" is missing'),
    "caption empty": ({"image": "a.png", "caption": " "}, 'line 2: field "caption" is empty'),
    "caption a number": ({"image": "a.png", "caption": 3}, 'line 2: field "caption" is empty or no text'),
    "split unknown": ({"image": "a.png", "caption": "x", "split": "dev"}, "line 2: field \"split\" is 'dev'"),
    "no object": (["a.png", "x"], "line 2: the record is no JSON object"),
    "picture missing": ({"image": "b.png", "caption": "x"}, 'line 2: field "image": the picture b.png is missing'),
    "starts with the assistant": (
        {"id": 4, "conversations": conversation("hello", "hi", first="gpt")},
        r'line 2 ?.*: the conversation starts with the assistant: field "conversations"\[0\] is from "gpt"',
    ),
    "speaks twice": (
        {"conversations": [*conversation("a", "b"), *conversation("c", first="gpt")]},
        r'line 2: field "conversations"\[2\] is from "gpt" but must be from "human"',
    ),
    "empty answer": ({"conversations": conversation("hi", "a", "hi", "")}, r'"conversations"\[3\]: the answer is empt'),
    "no answer": ({"conversations": conversation("hi", "a", "hi")}, r'"conversations"\[2\]: the last question has no'),
    "no turns": ({"conversations": []}, 'field "conversations" must be a list'),
    "no value": ({"conversations": [{"from": "human"}]}, r'"conversations"\[0\] must be'),
    "too few marks": (
        {"image": ["a.png", "a.png"], "conversations": conversation("<image>?", "a")},
        'line 2: 1 "<image>" marks in field "conversations" but 2 pictures in field "image"',
    ),
    "too many marks": (
        {"conversations": conversation("<image>?", "a")}, 'line 2: 1 "<image>" marks .* but 0 pictures'
    ),
    "image a number": ({"image": 3, "caption": "x"}, 'field "image" must be the path of one picture'),
    "image a list": ({"image": ["a.png"], "caption": "x"}, 'field "image" must be the path of one picture'),
    "captions empty": ({"image": "a.png", "caption": []}, 'field "caption" is empty or no text'),
    "one caption empty": ({"image": "a.png", "caption": ["x", " "]}, 'field "caption" is empty or no text'),
    "image no path": ({"image": 3, "conversations": conversation("<image>?", "a")}, 'field "image" must be a path'),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_bad_record_is_one_sentence_with_file_record_and_field(tmp_path, case):
    row, said = BAD_RECORDS[case]
    draw(tmp_path, "a.png", "c.png")
    rows = [GOOD, row, {"image": "c.png", "caption": "good too"}, row]
    file = write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=f"captions.jsonl.*{said}") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and f"1 more: python -m nanovlm.data.check {tmp_path}" in str(caught.value)
    assert len(scan(file).problems) == 2
    if case != "picture missing":  # skipping is for pictures; a record that is wrong in itself stays an error
        with pytest.raises(UserError, match=said):
            read(tmp_path, on_missing="skip")


def test_a_line_that_is_no_json_is_named(tmp_path):
    draw(tmp_path, "a.png")
    write(tmp_path / "captions.jsonl", json.dumps(GOOD) + '\n{"image": "a.png", ')
    with pytest.raises(UserError, match=r"captions.jsonl line 2: this is no JSON \(.*\); write one object per line"):
        read(tmp_path)


def test_coco_tables_that_do_not_fit_together(tmp_path):
    table = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2}],
        "annotations": [
            {"image_id": 9, "caption": "x"}, {"image_id": 1}, {"caption": "x"}, {"image_id": 1, "caption": ""}
        ],
    }
    draw(tmp_path, "a.png")
    problems = [str(problem) for problem in scan(write(tmp_path / "coco.json", table)).problems]
    assert problems == [
        'coco.json annotations[1]: field "caption" is missing or empty',
        'coco.json annotations[2]: field "image_id" is missing or empty',
        'coco.json annotations[3]: field "caption" is missing or empty',
        'coco.json images[1]: field "id" or "file_name" is missing',
        'coco.json: field "image_id" is 9, which "images" does not list',
    ]


# ---- what is wrong with the path


def test_unusable_paths(tmp_path):
    write(tmp_path / "notes.md", "hello")
    write(tmp_path / "odd.json", {"images": 3})
    write(tmp_path / "broken.json", "[{")
    write(tmp_path / "empty.jsonl", "")
    draw(tmp_path, "textless/a.png", "alone/a.png", "above/photos/a.png")
    write(tmp_path / "above" / "a.txt", "a hat")
    write(tmp_path / "alone" / "a.txt", "only one")
    write(tmp_path / "bytes" / "captions.jsonl", "")
    (tmp_path / "bytes" / "captions.jsonl").write_bytes(b'{"caption": "\xff"}')
    for name in ("nothing", "several"):
        (tmp_path / name).mkdir()
    write(tmp_path / "several" / "a.json", [])
    write(tmp_path / "several" / "b.json", [])
    for name, said in {
        "absent": "there is no such file or folder",
        "nothing": "the folder holds no pictures with texts",
        "several": "it holds 2 tables",
        "above": r"its pictures lie in a subfolder \(photos/a.png\); give the path of .*photos, with a .txt beside each",
        "textless": r"it holds pictures \(a.png\) but no text for any",
        "notes.md": "neither a folder nor a .json or .jsonl file",
        "odd.json": 'neither a list of records nor an object with "images" and "annotations"',
        "broken.json": "cannot be read as JSON",
        "bytes": "cannot be read as UTF-8",
        "empty.jsonl": "it has 0 usable records",
        "alone": "it has 1 usable records; at least two",
    }.items():
        with pytest.raises(UserError, match=f"{Path(name).stem}.*{said}"):
            read(tmp_path / name)


def test_on_missing_has_two_values(tmp_path):
    with pytest.raises(UserError, match="on_missing is 'ignore'; it must be error or skip"):
        read(tmp_path, on_missing="ignore")


def test_a_folder_in_which_halves_are_missing(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    write(tmp_path / "a.txt", "a hat")
    write(tmp_path / "b.txt", "a shoe")
    write(tmp_path / "d.txt", "a ghost")
    with pytest.raises(UserError, match="c.png: no text c.txt beside it"):
        read(tmp_path)
    source = read(tmp_path, on_missing="skip")
    assert {sample.caption for sample in everything(source, "pairs")} == {"a hat", "a shoe"}
    assert [record for record, _ in source.skipped] == ["c.png", "d.txt"]
    write(tmp_path / "b.txt", "\n")
    with pytest.raises(UserError, match="b.txt: the text is empty"):
        read(tmp_path, on_missing="skip")


# ---- the real sets


@pytest.mark.skipif(not (SHARED / "clothes").is_dir(), reason="../shared/data/clothes is not on this machine")
def test_clothes():
    source = read(SHARED / "clothes")
    assert (source.size("pairs", "train"), source.size("pairs", "val")) == (3068, 341)
    assert len(source.labels) == 10 and "a photo of a t-shirt" in source.labels and not source.few
    assert sum(source.sample("texts", "val", i).caption == "a photo of a t-shirt" for i in range(341)) == 81


@pytest.mark.skipif(not (SHARED / "emoji").is_dir(), reason="../shared/data/emoji is not on this machine")
def test_emoji():
    source = read(SHARED / "emoji")
    assert (source.size("captions", "train"), source.size("captions", "val")) == (4236, 450)
    assert source.labels == () and not source.few and source.skipped == []
    captions = [{source.sample("texts", split, i).caption for i in range(source.size("texts", split))}
                for split in ("train", "val")]
    assert [len(names) for names in captions] == [1412, 150] and not captions[0] & captions[1]
