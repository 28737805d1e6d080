"""Records from files: what is held out, what happens to missing and broken pictures, what each view shows."""

import json

import pytest
from data_files import draw, everything, llava_set, write
from PIL import Image

from nanovlm.contract import Reads
from nanovlm.data import clips, records
from nanovlm.data.collate import Collate
from nanovlm.data.formats import read
from nanovlm.data.prompts import SHORT
from nanovlm.data.sample import REAL, Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer


@pytest.fixture
def llava(tmp_path):
    return llava_set(tmp_path)


# ---- what is held out


def test_records_that_share_a_picture_stay_on_one_side(tmp_path):
    draw(tmp_path, *(f"{i}.png" for i in range(40)))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"image": f"{i % 20}.png", "conversations": turns} for i in range(60)]
    two = [{**turns[0], "value": "<image><image>?"}, turns[1]]
    rows += [{"image": [f"{i}.png", f"{i + 20}.png"], "conversations": two} for i in range(20)]
    for i in (*range(10), *range(20, 30)):  # a copy under another name
        (tmp_path / f"{i + 10}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    source = read(write(tmp_path / "chat.json", rows))
    sides = [{image.getpixel((0, 0)) for i in range(source.size("conversations", split))
              for image in source.sample("conversations", split, i).images} for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20
    # i, its copy i + 10, and i + 20, i + 30 through the records of two pictures: ten groups of eight records
    assert (source.size("conversations", "train"), source.size("conversations", "val")) == (72, 8)


@pytest.mark.parametrize("kept", [100, 0])
def test_clips_that_share_a_frame_stay_on_one_side(tmp_path, monkeypatch, kept):
    """Each picture is a frame of two clips, and stands alone under another path."""
    monkeypatch.setattr(records, "KEPT_PICTURES", kept)
    draw(tmp_path, *(f"{i}.png" for i in range(20)))
    (tmp_path / "again").symlink_to(tmp_path)
    asked = {"question": "What?", "answer": "hat"}
    rows = [{"frames": [f"{i}.png", f"{i + 1}.png"], **asked} for start in range(0, 20, 4) for i in range(start, start + 3)]
    rows += [{"image": f"again/{i}.png", **asked} for i in range(20)]
    source = read(write(tmp_path / "rows.json", rows))
    sides = [{path.name for record, _ in source.entries("pages", split) for entry in record.images for path in clips.files(entry)}
             for split in ("train", "val")]
    assert not sides[0] & sides[1] and list(map(len, sides)) == [16, 4], "five groups of four pictures and seven records each"


def test_the_split_does_not_depend_on_the_order_of_the_lines(tmp_path):
    draw(tmp_path, *(f"{i}.png" for i in range(30)))
    rows = [Sample(f"record {i}", (tmp_path / f"{i}.png",), f"caption {i}") for i in range(30)]
    held_out = []
    for order in (rows, rows[::-1]):
        sides = records.split_records("x", order, [""] * 30, [set(sample.images) for sample in order])
        held_out.append({sample.id for sample, side in zip(order, sides) if side == "val"})
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3


# ---- missing and broken pictures


@pytest.fixture(params=["in memory", "on disk"])
def ten(tmp_path, request, monkeypatch):
    """Ten records; picture 3 is missing, 5 is text, 7 breaks off, 8 is a PNG that is called .jpg."""
    if request.param == "on disk":
        monkeypatch.setattr(records, "KEPT_PICTURES", 3)
    draw(tmp_path, *(f"{i}.png" for i in range(10)))
    (tmp_path / "3.png").unlink()
    (tmp_path / "5.png").write_text("I am no picture")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:50])
    (tmp_path / "8.png").rename(tmp_path / "8.jpg")
    rows = [{"image": f"{i}.{'jpg' if i == 8 else 'png'}", "caption": f"number {i}"} for i in range(10)]
    write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_missing_pictures_are_an_error(ten):
    with pytest.raises(UserError, match='captions.jsonl line 4: field "image": the picture 3.png is missing'):
        read(ten)
    draw(ten, "3.png")
    with pytest.raises(UserError, match="5.png: the picture cannot be read .its content is no known picture format"):
        everything(read(ten), "pairs")


def test_missing_pictures_are_skipped_and_counted(ten):
    source = read(ten, on_missing="skip")
    samples = everything(source, "pairs")
    assert {sample.caption for sample in samples} == {f"number {i}" for i in (0, 1, 2, 4, 6, 8, 9)}
    assert {record.split()[-1] for record, _ in source.skipped} == {"4", "6", "8"}  # lines
    assert len(source.skipped) == 3  # each is counted once, however often it is asked for
    assert [sample.caption for sample in everything(source, "pairs")] == [sample.caption for sample in samples]
    assert len(source.skipped) == 3


def test_pictures_are_kept_small_and_whole(tmp_path):
    for i in range(3):
        Image.new("RGB", (300, 150), (i, 0, 0)).save(tmp_path / f"{i}.png")
        write(tmp_path / f"{i}.txt", f"number {i}")
    assert {sample.images[0].size for sample in everything(read(tmp_path, cache_side=50), "pairs")} == {(100, 50)}


# ---- the views of captioned pictures


@pytest.fixture
def classes(tmp_path):
    draw(tmp_path, *(f"{i:02}.png" for i in range(30)))
    rows = [{"image": f"{i:02}.png", "caption": ["a hat", "a shoe", "a shirt"][i % 3]} for i in range(30)]
    write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    return read(tmp_path)


def test_few_captions_for_many_pictures_are_classes(classes):
    assert classes.labels == ("a hat", "a shirt", "a shoe")
    assert classes.few


def test_each_view_says_the_same_in_its_own_way(classes):
    for i in range(classes.size("conversations", "train")):
        shown, told = classes.sample("conversations", "train", i), classes.sample("texts", "train", i)
        assert len(shown.images) == 1 and told.images == ()
        assert shown.turns[0].question.startswith("<image>\n") and shown.turns[0].answer == shown.caption
        assert told.turns == shown.turns and told.told == (shown.caption,) and shown.told == ()
        assert told.turns[0].question.count("<image>") == 1
        assert classes.sample("conversations", "train", i).turns == shown.turns  # deterministic
    assert len({sample.turns[0].question for sample in everything(classes, "conversations")}) > 1
    assert not set(classes.texts()) - {"a hat", "a shoe", "a shirt", *records.QUESTIONS}


def test_the_tokenizers_texts_hold_nothing_of_the_held_out_side(llava):
    source = read(llava)
    held_out = source.sample("conversations", "val", 0)
    kept = {turn.answer for i in range(source.size("conversations", "train"))
            for turn in source.sample("conversations", "train", i).turns}
    assert kept <= set(source.texts())
    assert {turn.answer for turn in held_out.turns} - kept
    assert not ({turn.answer for turn in held_out.turns} - kept) & set(source.texts())


def test_the_exam_cuts_conversations_and_their_pictures_alike(llava):
    rows = json.loads(llava.read_text())
    write(llava, [{**row, "split": "val" if row["id"] in (7, "c") else "train"} for row in rows])
    source = read(llava)
    assert source.size("conversations", "val") == 2
    for sample in source.exam(5):
        assert len(sample.images) == sum(turn.question.count("<image>") for turn in sample.turns)
    assert len(source.exam(1)) == 1 and len(source.exam(5)) == 2


def test_galleries_hold_each_caption_once(tmp_path):
    """Two artists drew six things, a third only two of them: too few to be a gallery. Classes make none."""
    draw(tmp_path, *(f"{i}.png" for i in range(15)))
    names = [*range(6), *range(6), 0, 1]
    rows = [{"image": f"{i}.png", "caption": f"thing {name}", "split": "val"} for i, name in enumerate(names)]
    rows.append({"image": "14.png", "caption": "another", "split": "train"})
    galleries = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))).galleries()
    assert [[s.caption for s in gallery] for gallery in galleries] == [[f"thing {i}" for i in range(6)]] * 2
    assert len({s.images[0].tobytes() for gallery in galleries for s in gallery}) == 12
    rows = [{**row, "caption": ("a hat", "a shoe")[i % 2], "label": "hs"[i % 2]} for i, row in enumerate(rows)]
    assert read(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))).galleries() == []


def test_unknown_views_and_empty_ones(llava):
    source = read(llava)
    with pytest.raises(UserError, match="no view 'videos' of split 'train'.*pairs, captions, conversations, prompted, texts"):
        source.size("videos", "train")
    rows = [row for row in json.loads(llava.read_text()) if row["id"] in (7, "text")]
    write(llava, rows + [{**rows[0], "id": "more"}])
    with pytest.raises(UserError, match="no usable record of split train fits the view pairs"):
        read(llava).sample("pairs", "train", 0)


def test_what_is_read_before_is_told_in_the_picture_s_place(tmp_path):
    """A language model reads the caption where the picture will stand; LLaVA-1.5 reads the sentence about the answer as well."""
    draw(tmp_path, *(f"{i}.png" for i in range(20)))
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a hat"}]
    rows = [{"image": f"{i}.png", "conversations": turns, "caption": f"hat {i}", "form": "short"} for i in range(20)]
    source = read(write(tmp_path / "made.json", rows))
    plain, told, asked = (source.sample(view, "train", 0) for view in ("conversations", "texts", "prompted"))
    assert not told.images and told.told == (plain.caption,) and told.turns == plain.turns == (Turn("<image>\nwhat is it?", "a hat"),)
    assert asked.turns[0].question == f"{plain.turns[0].question}\n{SHORT}" and asked.turns[0].answer == "a hat" and asked.images
    ids, _ = COLLATE.encode(told)
    assert f"USER: {plain.caption}\nwhat is it? ASSISTANT:" in COLLATE.tokenizer.decode(ids, specials=True)


def test_each_picture_of_a_talk_is_told_where_it_stood(llava):
    """Of two pictures both by the one caption that there is; where there is no picture nothing is told."""
    told = {sample.id.split("(id ")[1][:-1]: sample for sample in everything(read(llava), "texts")}
    assert told["7"].told == ("a hat", "a hat") and told["text"].told == ()
    assert [turn.question for turn in told["7"].turns] == ["<image>\nwhat is it?", "and <image>?"]


# ---- what a stage cannot read

LONG = " ".join(f"word{i}" for i in range(480))
LIMIT = 200
COLLATE = Collate(Tokenizer([]), "tiny", Transform(8), Reads(image_tokens=16), LIMIT)  # a byte is a token


@pytest.fixture(params=["in memory", "on disk"])
def long_texts(tmp_path, request, monkeypatch):
    """Thirty pictures; the captions of every fifth, the questions of 1, 11 and 21 are long."""
    if request.param == "on disk":
        monkeypatch.setattr(records, "KEPT_PICTURES", 3)
    draw(tmp_path, *(f"{i}.png" for i in range(30)))
    rows = [{"image": f"{i}.png", "caption": f"{i} {LONG}" if i % 5 == 0 else f"thing {i}"} for i in range(30)]
    for i in (1, 11, 21):
        rows[i]["conversations"] = [{"from": "human", "value": f"<image>\n{LONG}"}, {"from": "gpt", "value": "yes"}]
    return read(write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows)))


def test_what_is_too_long_is_left_out_and_counted_before_it_is_met(long_texts):
    """Both sides, in the view that it is too long for; a caption is cut where it is told and where it is learned."""
    for view in ("pairs", "captions"):
        before = [long_texts.size(view, split) for split in ("train", "val")]
        long_texts.leave_out(view, COLLATE.problem if view == "captions" else lambda sample: None)
        assert [long_texts.size(view, split) for split in ("train", "val")] == before and long_texts.skipped == []
    for view in ("texts", "conversations", "texts"):
        long_texts.leave_out(view, COLLATE.problem)
        samples = everything(long_texts, view)
        assert {sample.id for sample in samples} == {f"a.jsonl line {i + 1}" for i in range(30) if i not in (1, 11, 21)}
        for index, sample in enumerate(samples):
            ids, labels = COLLATE.encode(sample)
            assert sum(label >= 0 for label in labels) > 1 and len(ids) <= LIMIT
            if view == "texts":  # what is told and what is learned is the same, and of a long caption its beginning
                assert sample.told == (sample.caption,) and sample.turns[0].question.startswith("<image>\n")
                assert len(sample.caption) > 40 or "thing" in sample.caption, index
                assert sample.turns[0].answer == sample.caption and (sample.caption + " ") in f"{sample.references[0]} "
    reason = "cut to 200 tokens, no answer is left to learn from; raise the maximum length or shorten the question."
    assert sorted(long_texts.skipped) == sorted((f"a.jsonl line {i}", reason) for i in (2, 12, 22))  # once each
    assert long_texts.size("prompted", "train") + long_texts.size("prompted", "val") == 30


def test_no_question_of_those_that_may_be_asked_makes_it_too_long(tmp_path):
    """Which question is asked depends on the place; what fits must fit with the longest of them."""
    draw(tmp_path, *(f"{i}.png" for i in range(40)))
    rows = [{"image": f"{i}.png", "caption": f"{i:02} " + "x" * (47 + i // 2)} for i in range(40)]
    source = read(write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows)))
    tight = Collate(COLLATE.tokenizer, "tiny", Transform(8), Reads(), max_length=105)
    source.leave_out("texts", tight.problem)
    assert len({sample.caption for sample in everything(source, "texts")}) > 20
    for index in range(source.size("texts", "train") * 5):
        tight.encode(source.sample("texts", "train", index))


def test_where_nothing_is_left_it_is_said(long_texts):
    with pytest.raises(UserError, match=r"^a: no record can be used \(view conversations\); a.jsonl line \d+: too green$"):
        long_texts.leave_out("conversations", lambda sample: "too green")
    long_texts.leave_out("captions", lambda sample: None if "thing" in sample.caption else "no thing")
    assert all("thing" in sample.caption for sample in everything(long_texts, "captions"))
    assert ("a.jsonl line 1", "no thing") in long_texts.skipped


@pytest.mark.parametrize("held_out", ["text only", "two pictures"])
def test_without_a_picture_to_judge_by_there_are_no_exams_of_pictures(tmp_path, held_out):
    draw(tmp_path, *(f"{i}.png" for i in range(10)))
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a hat"}]
    rows = [{"image": f"{i}.png", "conversations": turns, "split": "train"} for i in range(8)]
    if held_out == "text only":
        rows.append({"conversations": [{"from": "human", "value": "2 + 2?"}, turns[1]], "split": "val"})
    else:
        two = {"from": "human", "value": "<image><image>\nwhat are they?"}
        rows.append({"image": ["8.png", "9.png"], "conversations": [two, turns[1]], "split": "val"})
    source = read(write(tmp_path / "chat.json", rows))
    for view in ("pairs", "captions"):
        assert source.size(view, "val") == 0 and source.exam(view=view) == []
        with pytest.raises(UserError, match=f"chat: no usable record of split val fits the view {view}"):
            source.sample(view, "val", 0)
    assert source.galleries() == [] and source.exams(("captions", "classes")) == []
    assert all(source.size(view, "val") == 1 for view in REAL if view not in ("pairs", "captions"))
    assert [exam.samples[0].turns[-1] for exam in source.exams(("answers",))] == [
        Turn({"text only": "2 + 2?"}.get(held_out, "<image><image>\nwhat are they?"), "a hat")]
