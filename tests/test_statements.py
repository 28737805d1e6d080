"""Statements about two pictures: true as often as false, found by reading the scenes, and batches of them."""

from collections import Counter, defaultdict
from random import Random

import pytest
import torch
from PIL import Image

from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.conversation import FORMATS, template_texts
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer
from nanovlm.world import datasets
from nanovlm.world.datasets import SETS, Scenes
from nanovlm.world.scene import COLOURS, HELD_OUT, SEEN, SHAPES, Scene

MARKS = "<image>\n<image>\n"


def true(text: str, left: Scene, right: Scene) -> bool:
    """Whether a statement holds, read word by word."""
    words = text.rstrip(".").split()
    looks = [f"{thing.colour} {thing.shape} object".split() for thing in left.objects], [
        f"{thing.colour} {thing.shape} object".split() for thing in right.objects]
    if words[:2] == ["both", "pictures"]:  # both pictures show a red circle
        return all(any(set(words[4:]) <= set(look) for look in side) for side in looks)
    if words[-3:] == ["only", "one", "picture"]:  # there is a red circle in only one picture
        return sum(any(set(words[3:-4]) <= set(look) for look in side) for side in looks) == 1
    numbers = {"left": len(left.objects), "right": len(right.objects)}  # the left picture has more objects than the right one
    assert words[2:4] == ["picture", "has"] and words[5:8] == ["objects", "than", "the"] and words[8] != words[1]
    more, less = (words[1], words[8]) if words[4] == "more" else (words[8], words[1])
    return numbers[more] > numbers[less]


@pytest.fixture
def drawn(monkeypatch) -> list[Scene]:
    """The scenes as they are rendered."""
    found: list[Scene] = []
    monkeypatch.setattr(datasets, "render", lambda scene, size: found.append(scene) or Image.new("RGB", (size, size)))
    return found


def test_what_is_said_is_so_as_often_as_not(drawn):
    """1,500 in training: half are true, of each text too. ± five standard deviations: once in a million seeds, for each of a dozen texts."""
    n, said = 1500, defaultdict(Counter)
    for index in range(n):
        sample = Scenes().draw("statements", Random(index))
        (turn,) = sample.turns
        left, right = drawn[-2:]
        assert turn.question.startswith(MARKS) and turn.kind == "statement" and len(sample.images) == 2
        text = turn.question.removeprefix(MARKS)
        assert turn.answer == ("yes" if true(text, left, right) else "no"), text
        said[text][turn.answer] += 1
    kinds = Counter(text.split()[0] + text.split()[-1] for text, votes in said.items() for _ in range(votes.total()))
    assert set(kinds) == {"bothcircle.", "bothsquare.", "bothtriangle.", "bothcross.", "bothstar.", "bothdiamond.", "bothobject.",
                          "therepicture.", "theone."}
    for votes in [sum(said.values(), Counter()), *(votes for votes in said.values() if votes.total() >= 60)]:
        assert abs(votes["yes"] - votes.total() / 2) <= 5 * votes.total() ** 0.5 / 2
    assert sum(votes.total() >= 60 for votes in said.values()) >= 4
    looked_for = {word for text in said for word in text.rstrip(".").split()}
    assert {*COLOURS, *SHAPES} <= looked_for
    assert {thing.pair for scene in drawn for thing in scene.objects} == set(SEEN)
    assert not any(f"{colour} {shape}" in text for text in said for colour, shape in HELD_OUT)


def test_one_picture_alone_does_not_tell_all(drawn):
    """Of "only one", whether the left picture shows it says nothing; of "both" it says only what cannot be."""
    found = defaultdict(Counter)
    for index in range(3000):
        sample = Scenes().draw("statements", Random(index))
        words = sample.turns[0].question.removeprefix(MARKS).rstrip(".").split()
        if words[0] in ("both", "there"):
            wanted = set(words[4:] if words[0] == "both" else words[3:-4])
            shows = any(wanted <= {thing.colour, thing.shape, "object"} for thing in drawn[-2].objects)
            found[words[0], shows][sample.turns[0].answer] += 1
    for shows in (True, False):
        votes = found["there", shows]
        assert votes.total() > 300 and abs(votes["yes"] - votes.total() / 2) <= 5 * votes.total() ** 0.5 / 2
    assert found["both", False]["yes"] == 0 and min(found["both", True].values()) > 50


def test_the_exam_is_of_held_out_scenes_and_balanced(drawn):
    [exam] = Scenes().exams(("statements",), 60)
    assert exam.name == "statement" and exam.judges == ("answer",) and len(exam.samples) == 60
    scenes = list(zip(drawn[::2], drawn[1::2]))
    texts = [sample.turns[-1].question.removeprefix(MARKS) for sample in exam.samples]
    answers = [sample.turns[-1].answer for sample in exam.samples]
    assert answers == ["yes" if true(text, *pair) else "no" for text, pair in zip(texts, scenes)]
    assert Counter((text.split()[0], answer) for text, answer in zip(texts, answers)) == dict.fromkeys(
        ((first, answer) for first in ("both", "there", "the") for answer in ("yes", "no")), 10)
    assert all({thing.pair for thing in scene.objects} & set(HELD_OUT) for pair in scenes for scene in pair)
    pairs = [f"{colour} {shape}" for colour, shape in SEEN]
    assert not any(pair in text for text in texts for pair in pairs) and any("red triangle" in text for text in texts)
    assert Scenes(3).exams(("statements",), 6)[0].samples == exam.samples[:6], "the same for every seed"
    assert len({sample.id for sample in exam.samples}) == 60 and len(Scenes().exams(("statements",))[0].samples) == 600


def test_the_tokenizer_learns_nothing_new():
    """Its corpus is what it was before there were statements and BLIP's questions."""
    assert not SETS["statements"].texts and not any("both pictures" in text for text in Scenes().texts())
    assert len(template_texts()) == sum(not (layout.separate or layout.pages) for layout in FORMATS.values()) and FORMATS["blip-vqa"].separate


# --- batches ---

@pytest.fixture(scope="module")
def collate() -> Collate:
    return Collate(Tokenizer.train(["both pictures show a star. yes no"] * 9, 290), "plain", Transform(13), Reads("statements"))


def statement(text: str, answer: str, left: str, right: str) -> Sample:
    pictures = tuple(Image.new("RGB", (17, 17), colour) for colour in (left, right))
    return Sample("s/1", pictures, turns=(Turn(MARKS + text, answer, "statement"),))


def test_a_batch_of_statements(collate):
    samples = [statement("both pictures show a star.", "yes", "red", "blue"), statement("a star.", "no", "blue", "white")]
    batch = collate(samples, Random(0))
    assert set(batch) == {"images", "input_ids", "attention_mask", "choices", "truth"}
    assert batch["images"].shape == (2, 2, 3, 13, 13) and batch["truth"].tolist() == [1, 0]
    for row, sample in zip(batch["images"], samples):
        for got, picture in zip(row, sample.images):
            assert torch.equal(got, collate.transform(picture))
    texts = [collate.tokenizer.decode(ids[mask].tolist(), specials=True) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert texts == ["<s>both pictures show a star.</s>", "<s>a star.</s>"]
    assert [collate.tokenizer.decode(ids.tolist()).strip() for ids in batch["choices"]] == ["no", "yes"]
    asked = collate.ask(samples)
    assert set(asked) == set(batch) - {"truth"}, "the answer is not given away"
    assert all(torch.equal(asked[name], batch[name]) for name in asked)


@pytest.mark.parametrize("sample", [
    Sample("s/1", turns=(Turn("a star.", "yes"),)), statement("a star.", "maybe", "red", "red"),
    Sample("s/1", (Image.new("RGB", (9, 9)),) * 2)])
def test_what_is_no_statement_is_refused(collate, sample):
    assert collate.problem(sample) == "s/1: a statement needs two images, and no or yes as its answer."
    with pytest.raises(UserError, match="two images"):
        collate([sample], Random(0))
    assert collate.problem(statement("a star.", "no", "red", "red")) is None


# --- BLIP's questions ---

def test_blip_reads_a_question_and_writes_its_answer():
    tokenizer = Tokenizer.train(["what colour is it? red and where? top left"] * 9, 300)
    collate = Collate(tokenizer, "blip-vqa", Transform(13), Reads("conversations"))
    talk = (Turn("<image>\nwhat colour is it?", "red", "colour"), Turn("and where?", "top left", "follow_up"))
    picture = (Image.new("RGB", (9, 9)),)
    seen = set()
    for seed in range(20):
        batch = collate.teach([Sample("a", picture, turns=talk)], Random(seed))
        [ids], [labels] = batch["input_ids"].tolist(), batch["labels"].tolist()
        assert labels[-1] == tokenizer.eos_id and all(label >= 0 for label in labels)
        seen.add((tokenizer.decode(ids, specials=True), tokenizer.decode(labels, specials=True)))
    assert seen == {("<s>what colour is it?</s>", " red</s>"), ("<s>what colour is it? red and where?</s>", " top left</s>")}
    asked = collate.ask([Sample("a", picture, turns=talk), Sample("b", picture, turns=talk[:1])])
    assert tokenizer.decode(asked["input_ids"][0].tolist(), specials=True) == "<s>what colour is it? red and where?</s>"
    assert not asked["attention_mask"][1].all() and asked["attention_mask"][1, 0], "padded on the right"
    described = Turn("<image>\ndescribe the picture.", "a red star", "caption")
    for seed in range(20):  # a caption is a question like others: nothing of it is given
        batch = collate.teach([Sample("c", picture, turns=(described,))], Random(seed))
        assert tokenizer.decode(batch["input_ids"][0].tolist(), specials=True) == "<s>describe the picture.</s>"
        assert tokenizer.decode(batch["labels"][0].tolist(), specials=True) == " a red star</s>"
