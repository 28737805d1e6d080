"""How instruction data are made: what a teacher is told, what its replies must be like, and that nothing gets lost."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from nanovlm.data import formats
from nanovlm.errors import UserError
from nanovlm.making import instruct, symbols
from nanovlm.making.instruct import BRIEF, DETAILED, EXAMPLES, SYSTEM, main, messages, synthesise, turns
from nanovlm.making.symbols import Symbols, balanced, from_text, noun_phrases
from nanovlm.making.teachers import rules
from nanovlm.world.say import captions
from nanovlm.world.scene import HELD_OUT, SEEN, boxes, random_scene

TOLD = Symbols("7", Path("a/7.png"), ("a dog chases a red ball.", "a dog on grass."),
               (("dog", (0.1, 0.2, 0.5, 0.9)), ("sports ball", (0.75, 0.75, 0.85, 0.85))))
CLASS = Symbols("8", Path("a/8.png"), ("a photo of a hat",), label="hat", labels=("dress", "hat", "shirt"))
GOOD = "Question:\nWhat is it?\n===\nAnswer:\nA dog.\n===\nQuestion:\nWhere?\n===\nAnswer:\nOn grass."
SETTINGS = {"seed": 0}


# --- what is told ---

def test_symbols_as_text_and_back():
    assert TOLD.as_text() == ("a dog chases a red ball.\na dog on grass.\n\ndog: [0.10, 0.20, 0.50, 0.90]\n"
                              "sports ball: [0.75, 0.75, 0.85, 0.85]")
    assert CLASS.as_text() == "a photo of a hat\n\nclass: hat; of: dress; hat; shirt"
    for told in (TOLD, CLASS):
        again = from_text(told.as_text())
        assert (again.captions, again.boxes, again.label, again.labels) == (told.captions, told.boxes, told.label, told.labels)


def test_the_lists_are_as_long_as_the_papers():
    """Tables 11 and 12; examples: 2 for conversations, of captions only, and 3 each for the others."""
    assert (len(set(BRIEF)), len(set(DETAILED))) == (11, 16)
    assert {kind: len(examples) for kind, examples in EXAMPLES.items()} == {"conversation": 2, "detail": 3, "reasoning": 3}
    assert set(SYSTEM) == set(EXAMPLES) == set(instruct.KINDS) - {"brief"}
    for kind, examples in EXAMPLES.items():
        assert all(bool(from_text(seen).boxes) == (kind != "conversation") for seen, _ in examples)
        assert all(turns(kind, reply, Random(0)) for _, reply in examples), "our own examples have the right form"


def test_messages_are_system_examples_and_the_picture():
    said = messages("reasoning", TOLD)
    assert [m["role"] for m in said] == ["system", *["user", "assistant"] * 3, "user"]
    assert said[-1]["content"] == TOLD.as_text()
    assert said[0]["content"].endswith("What is wanted: reasoning")


# --- what is said ---

def test_a_reply_becomes_turns():
    assert turns("conversation", GOOD, Random(0)) == [("What is it?", "A dog."), ("Where?", "On grass.")]
    (asked, said), = turns("detail", "A dog runs over the grass.", Random(0))
    assert asked in DETAILED and said == "A dog runs over the grass."


@pytest.mark.parametrize(("kind", "reply", "why"), [
    ("conversation", "", "empty"), ("conversation", "A dog.", 'part 1 is not "Question:"'),
    ("conversation", "Question:\nWhat?", "no answer"), ("conversation", "Question:\nWhat?\n===\nAnswer:\n", "part 2 is not"),
    ("conversation", "Question:\na\n===\nQuestion:\nb", 'part 2 is not "Answer:"'), ("reasoning", GOOD, "one question"),
    ("conversation", GOOD.replace("dog", "caption"), "'caption'"), ("detail", "The bounding boxes show a dog.", "'bounding boxes'"),
    ("detail", "A dog at [0.10, 0.2] there.", "gives away"), ("detail", "<image> a dog runs", "'<image>'"),
    ("detail", "Dog.", "running text"), ("detail", GOOD, "running text")])
def test_a_reply_of_the_wrong_form(kind, reply, why):
    with pytest.raises(ValueError, match=why):
        turns(kind, reply, Random(0))


ODD = ("Cars in view: [0.10, 0.20, 0.30, 0.40]", "class: a hat; of: a hat; a shoe", "a page says <image> and .5, [.5, .25]")


@pytest.mark.parametrize("odd", ODD)
def test_a_caption_may_look_like_a_box_or_a_class_or_a_mark(tmp_path, odd):
    """The rules take it for a caption, and a reply may say what stands in it; what stands in another is refused still."""
    told = replace(TOLD, captions=(odd, "a dog on grass."))
    again = from_text(told.as_text())
    assert (again.captions, again.boxes, again.label) == (told.captions, told.boxes, "")
    assert from_text(replace(CLASS, captions=(odd,)).as_text()).labels == CLASS.labels
    (first, *_), detail = (turns(kind, rules(messages(kind, told)), Random(0), told.captions) for kind in ("conversation", "detail"))
    assert first[1].lower().startswith(odd.lower()) and odd.lower() in detail[0][1].lower()
    others = [other for other in ODD if other != odd and not other.startswith("class")]
    for other in others:
        with pytest.raises(ValueError, match="gives away"):
            turns("detail", f"The board says {other}.", Random(0), told.captions)
    told = [replace(told, id=str(i), image=tmp_path / "a.png") for i in range(4)]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    reply = f"Question:\nWhere is {odd}?\n===\nAnswer:\n{odd}"
    for name, teacher in (("rules", rules), ("quotes", lambda said: reply)):
        seen = synthesise(told, teacher, ["conversation", "brief"], tmp_path / f"{name}.json", SETTINGS)
        assert seen["made"] == 8 and not formats.scan(tmp_path / f"{name}.json").problems


def test_half_a_character_is_no_reply():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        turns("detail", "a dog with a smile \ud83d runs", Random(0))


def test_rules_say_what_is_true():
    """Of pictures that the world knows all of: every number, place and comparison is looked up in the boxes."""
    met = Counter()
    for seed in range(100):
        told = scene_symbols(seed)
        counts = Counter(name for name, _ in told.boxes)
        where = {name.removeprefix("the "): ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for name, b in told.boxes}
        for question, answer in turns("conversation", rules(messages("conversation", told)), Random(0)):
            if question.startswith("How many"):
                name = question.removeprefix("How many things of the kind ").removesuffix(" are there?")
                n = counts.get(name) or counts[f"the {name}"]
                assert answer == f"There {'is' if n == 1 else 'are'} {('no', 'one', 'two')[n]}."
            elif question.startswith("Where is"):
                x, y = where[question.removeprefix("Where is the ").removesuffix("?")]
                assert ("left" in answer, "right" in answer) == (x < 1 / 3, x > 2 / 3)
                assert ("upper" in answer, "lower" in answer) == (y < 1 / 3, y > 2 / 3)
            elif question.startswith("Which is further"):
                right, left = question.removeprefix("Which is further to the left, the ").removesuffix("?").split(" or the ")
                assert where[left][0] < where[right][0] and answer == f"The {left} is further to the left."
            elif question.startswith("Is there"):
                assert answer.startswith("No") and question.split()[-1][:-1] not in told.as_text()
        ((question, answer),) = turns("reasoning", rules(messages("reasoning", told)), Random(0))
        lost = answer.rsplit("So ", 1)[1]
        met["half of the picture" in question] += 1
        if "half of the picture" in question:
            side = "left" if "left half" in question else "right"
            for name, (x, _) in where.items():
                assert (f"the {name}" in lost) == ((x < 0.5) == (side == "left"))
        else:
            areas = {name: (b[2] - b[0]) * (b[3] - b[1]) for name, b in told.boxes}
            assert max(areas, key=areas.get).removeprefix("the ") in lost
    assert min(met.values()) > 5


def scene_symbols(seed: int) -> Symbols:
    scene = random_scene(Random(seed), SEEN)
    return Symbols(str(seed), Path("x.png"), captions(scene)[:5], tuple(boxes(scene)))


def test_rules_about_a_class():
    said = {}
    for number in range(30):  # each picture is asked about once, or one answer would give away the next
        told = replace(CLASS, captions=(f"a photo of hat {number}",))
        pairs = turns("conversation", rules(messages("conversation", told)), Random(0))
        assert len(pairs) == 1
        said.update({q.split(":")[0].split(" a ")[0]: (q, a) for q, a in pairs})
    assert len(said) == 3
    said = dict(said.values())
    assert said.pop("What is it?") == "hat"
    (which, right), = [(q, a) for q, a in said.items() if q.startswith("Which of these")]
    assert right == "hat" and all(label in which for label in CLASS.labels)
    (is_it, yes), = [(q, a) for q, a in said.items() if q.startswith("Is it")]
    assert yes == ("yes" if "hat" in is_it else "no")
    assert rules(messages("detail", CLASS)) == "What is to be seen here: a photo of a hat."


# --- stage 1's choice ---

def test_noun_phrases_lie_between_function_words():
    assert noun_phrases("A black dog sleeps on the red sofa, beside two pillows.") == {
        "black dog sleeps", "red sofa", "pillows"}


def test_captions_are_chosen_from_the_rarest_phrase_upward():
    """2 are too rare, 3 are kept, of 150 there are 100; a picture with a rare phrase is kept whatever else it has."""
    texts = ["an owl"] * 2 + ["a fox"] * 3 + ["a dog"] * 150 + ["a dog and a fox"]
    told = [Symbols(str(i), Path(), (text,)) for i, text in enumerate(texts)]
    kept = Counter(s.captions[0] for s in balanced(told))
    assert kept["an owl"] == 0 and kept["a fox"] == 3 and kept["a dog and a fox"] == 1
    assert kept["a dog"] + kept["a dog and a fox"] in (100, 101)
    assert balanced(told) == balanced(told) != balanced(told, seed=1)


# --- the work ---

def written(out: Path) -> list[dict]:
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("image_first", [True, False])
def test_what_is_written_is_llavas_json(tmp_path, image_first):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "7.png")
    told = [Symbols(str(i), tmp_path / "7.png", TOLD.captions, TOLD.boxes, split="val" if i == 3 else "train") for i in range(20)]
    seen = synthesise(told, rules, ["conversation", "brief"], tmp_path / "made.json", SETTINGS, image_first)
    assert seen == {"made": 40, "refused replies": 0}
    firsts = Counter()
    for record in written(tmp_path / "made.json"):
        first = record["conversations"][0]["value"]
        firsts[first.startswith("<image>\n")] += 1
        assert first.count("<image>") == 1 and first.endswith("\n<image>") != first.startswith("<image>\n")
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(record["conversations"]) // 2)
    assert firsts[False] == 0 if image_first else min(firsts[True], firsts[False]) > 10, "Eq. 2: both orders"
    found = formats.scan(tmp_path / "made.json")
    assert not found.problems and Counter(found.splits) == {"train": 38, "val": 2}
    assert found.samples[0].caption == TOLD.captions[0], "not the first answer"


def test_kinds_of_a_class_arrive_in_the_table(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"image": "a.png", "caption": f"a {name}", "label": name}) + "\n"
                                              for name in ("hat", "shoe", "shirt", "dress", "skirt", "coat")))
    assert main([str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "made.json"), "--kinds", "conversation"]) == 0
    found = formats.scan(tmp_path / "made.json")
    assert {turn.kind for sample in found.samples for turn in sample.turns} == {"class", "existence"}


def test_names_are_classes_of_their_own(tmp_path):
    """Emoji have no labels: a short caption is a name, and some others' names are told with it."""
    names = [f"thing {i}" for i in range(30)]
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "caption": name}) + "\n"
                                              for i, name in enumerate(names)))
    for told in symbols.read(str(tmp_path / "c.jsonl")):
        assert told.label == told.captions[0] and told.label in told.labels and len(set(told.labels)) == 8


def test_a_teacher_that_talks_nonsense_is_asked_again_and_then_left_out(tmp_path):
    replies = iter(["what?", GOOD, *["what?"] * 3])
    seen = synthesise([TOLD, CLASS], lambda asked: next(replies), ["conversation"], tmp_path / "made.json", SETTINGS)
    assert seen == {"made": 1, "left out": 1, "refused replies": 4}
    assert [record["id"] for record in written(tmp_path / "made.json")] == ["7/conversation"]
    with pytest.raises(UserError, match="were of no use, all 1 of them; of the last: a description is running text"):
        synthesise([TOLD], lambda asked: "what?", ["detail"], tmp_path / "none.json", SETTINGS)
    assert not (tmp_path / "none.json").exists()


def test_an_interrupted_run_goes_on(tmp_path):
    """The replies before are not asked for again, a torn line is, and the result is that of one run."""
    told, out, asked = [scene_symbols(seed) for seed in range(6)], tmp_path / "made.json", []

    def breaks(said):
        if len(asked) == 4:
            raise UserError("The server is down.")
        asked.append(said[-1]["content"])
        return rules(said)

    with pytest.raises(UserError, match=r"The server is down. What was made so far is kept in .*made.json.part"):
        synthesise(told, breaks, ["conversation"], out, SETTINGS)
    assert not out.exists()
    part = out.with_name("made.json.part")
    part.write_bytes(part.read_bytes() + '{"key": "4/conversation", "record": "é'.encode()[:-1])  # torn within a letter
    with pytest.raises(UserError, match="was begun with other settings"):
        synthesise(told, rules, ["conversation"], out, {"seed": 1})
    later = []
    synthesise(told, lambda said: later.append(said) or rules(said), ["conversation"], out, SETTINGS)
    assert len(later) == 2 and not part.exists()
    synthesise(told, rules, ["conversation"], tmp_path / "whole.json", SETTINGS)
    assert written(out) == written(tmp_path / "whole.json")


def test_what_was_left_out_is_asked_for_again(tmp_path):
    """After the server's address was mended, say."""
    def breaks(said):
        if said[-1]["content"] == CLASS.as_text():
            raise UserError("Gone.")
        return "nonsense"

    with pytest.raises(UserError, match="Gone"):
        synthesise([TOLD, CLASS], breaks, ["conversation"], tmp_path / "made.json", SETTINGS)
    assert synthesise([TOLD, CLASS], rules, ["conversation"], tmp_path / "made.json", SETTINGS)["made"] == 2


def test_rules_leave_out_what_they_cannot_say(tmp_path):
    """A caption of one word, or one that speaks of captions, is no reason to stop."""
    told = [replace(TOLD, boxes=(), captions=("a hat.",)), replace(TOLD, id="8", boxes=(), captions=("a cat with a caption.",)), TOLD]
    seen = synthesise(told, rules, ["detail"], tmp_path / "made.json", SETTINGS)
    assert (seen["made"], seen["left out"]) == (1, 2)


def test_short_answers_are_marked_only_where_all_are(tmp_path):
    """A server may answer in sentences though a class is known."""
    for reply, kinds, form in ((GOOD, {""}, ""), ("Question:\nWhat?\n===\nAnswer:\nhat", {"class"}, "short")):
        out = tmp_path / f"{form}.json"
        synthesise([CLASS], lambda said, reply=reply: reply, ["conversation"], out, SETTINGS)
        (record,) = written(out)
        assert {turn.get("kind", "") for turn in record["conversations"]} - {""} == kinds - {""}
        assert record.get("form", "") == form


def test_scenes_are_drawn_without_held_out_pairs(tmp_path, capsys):
    assert main(["scenes:30", "--out", str(tmp_path / "made.json"), "--limit", "25"]) == 0
    assert "75 conversations about 25 pictures" in capsys.readouterr().out
    text = (tmp_path / "made.json").read_text()
    assert not [pair for pair in HELD_OUT if " ".join(pair) in text]
    assert len(formats.scan(tmp_path / "made.json").samples) == 75


# --- boxes ---

@pytest.fixture
def coco(tmp_path):
    """(captions file, instances file, write(bbox)): one picture of 100 × 50 with a dog."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "images" / "7.png")
    captioned, instances = tmp_path / "captions.json", tmp_path / "instances.json"
    images = [{"id": 7, "file_name": "7.png", "width": 100, "height": 50}]
    captioned.write_text(json.dumps({"images": images, "annotations": [{"image_id": 7, "caption": "a dog"}]}))

    def write(bbox: object, crowd: int = 0) -> None:
        instances.write_text(json.dumps({"images": images, "categories": [{"id": 18, "name": "dog"}], "annotations": [
            {"id": 5, "image_id": 7, "category_id": 18, "bbox": bbox, "iscrowd": crowd}]}))
    return str(captioned), str(instances), write


def test_coco_boxes_become_fractions(coco):
    captioned, instances, write = coco
    write([10, 5, 50, 40])
    (told,) = symbols.read(captioned, instances)
    assert told.boxes == (("dog", (0.1, 0.1, 0.6, 0.9)),)


def test_crowds_and_empty_boxes_are_no_things(coco):
    """COCO's own files have both: annotation 918 of 2017 is 0 pixels high."""
    captioned, instances, write = coco
    for bbox, crowd in (([10, 5, 50, 40], 1), ([10.0, 5.0, 1.03, 0.0], 0)):
        write(bbox, crowd)
        assert symbols.read(captioned, instances)[0].boxes == ()


@pytest.mark.parametrize("bbox", [[90, 5, 50, 40], [-9, 5, 20, 40], [10, 5, -3, 40], [10, 5, 20, 60], [1, 2, 3], "1 2 3 4"])
def test_a_box_outside_of_its_picture(coco, bbox):
    captioned, instances, write = coco
    write(bbox)
    with pytest.raises(UserError, match='instances.json annotation 5: field "bbox"'):
        symbols.read(captioned, instances)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["scenes:x"], "scenes:x: say how many scenes"), (["scenes:2", "--kinds", "poem"], "--kinds: 'poem' is none; there are brief"),
    (["scenes:2", "--teacher", "http://x"], "--teacher and --model go together"),
    (["scenes:2", "--teacher", "http://x", "--model", "m", "--key-from", "NO_SUCH"], "The environment variable NO_SUCH"),
    (["nowhere.jsonl"], "nowhere.jsonl")])
def test_what_cannot_be_made(arguments, complaint, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "made.json")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "made.json").exists()


def test_a_disk_that_is_full_is_said(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["scenes:2", "--out", str(tmp_path / "made.json")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.json.part", "made_pictures"]  # what was said is kept


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "made.json").write_text("mine")
    assert main(["scenes:2", "--out", str(tmp_path / "made.json")]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "made.json").read_text() == "mine"
