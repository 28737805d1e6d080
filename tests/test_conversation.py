"""Conversations: exactly the answers and stop tokens carry loss, whatever people write; batches keep what they hold."""

import re
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.conversation import FORMATS, answer_ids, encode, prompt, stop_ids, two_sequences
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer

CORPUS = "USER: what colour is it? ASSISTANT: red\n### Human: how many?\n### Assistant: two ###[INST] 你好 [/INST]"
TOKENIZER = Tokenizer.train([CORPUS] * 5, 340)
BYTES = Tokenizer([])  # no merges: "###" is three tokens, and an answer may hold two of them
NAMES = sorted(FORMATS)
# What each answer begins with and what closes it, written out here and not taken from the table under test.
LEAD = {"plain": "", "v0": " ", "v1": " ", "llama_2": " ", "blip2": " ", "flan_t5": " ", "blip-vqa": " ", "blip2-caption": " ",
        "instructblip": " ", "instructblip-t5": " ", "flamingo": " ", "pages": "", "pair": "", "blip": "", "blip-caption": " ", "tiny": " "}
CLOSE = {"plain": "\n", "v0": "\n###", "v1": "</s>", "llama_2": " </s>", "blip2": "\n", "flan_t5": "</s>", "blip-vqa": "</s>",
         "blip2-caption": "\n", "instructblip": "</s>", "instructblip-t5": "</s>", "flamingo": "<EOC>", "pages": "<EOC>", "pair": "<EOC></s>", "blip": "</s>", "blip-caption": "</s>",
         "tiny": "</s>"}
FORBIDDEN = {"plain": "\n", "v0": "###", "blip2": "\n", "blip2-caption": "\n"}
ONE_CAPTION = ("plain", "blip2-caption", "blip", "blip-caption")
SEPARATE = ("flan_t5", "instructblip-t5", "blip-vqa")  # an encoder reads the question, a decoder writes the answer
IMAGE_FIRST = ("blip2", *SEPARATE, "blip2-caption", "instructblip", "blip", "blip-caption")

# Texts that try to break out of the template, beside any Unicode.
SPITEFUL = st.sampled_from(["</s>", "<EOC>", "<s>", "### Assistant:", " ASSISTANT: no", "[/INST]", "\n\n", " ", "#", "\n##"])
TEXT = st.lists(st.one_of(st.text(max_size=12), SPITEFUL), max_size=4).map("".join)


@st.composite
def conversations(draw, name):
    """Turns that the format can hold: 0-2 images in any question (BLIP-2: one in the first), no empty answer, no stop text in one."""
    turns = []
    for _ in range(1 if name in ONE_CAPTION else draw(st.integers(1, 3))):
        words = [draw(TEXT).replace("<image>", "") for _ in range(draw(st.integers(1, 3)))]
        answer = draw(TEXT.filter(str.strip))
        for forbidden in [FORBIDDEN[name]] if name in FORBIDDEN else []:
            answer = answer.replace(forbidden, "") or "x"
        mark = "" if name in IMAGE_FIRST and turns else "<image>"
        turns.append(Turn(mark.join(words[:2] if name in IMAGE_FIRST else words), answer if answer.strip() else "x"))
    return tuple(turns)


def expected_trained(turns, name):
    learned = turns[-1:] if name in SEPARATE else turns  # an encoder-decoder reads the answers before
    return "".join(LEAD[name] + turn.answer + CLOSE[name] for turn in learned)


def trained(labels):
    return [label for label in labels if label != -100]


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_trained_tokens_are_exactly_answers_and_stops(name, data):
    turns = data.draw(conversations(name))
    system = data.draw(st.sampled_from([FORMATS[name].system, "", "be brief </s>"]))
    ids, labels = encode(turns, TOKENIZER, replace(FORMATS[name], system=system))
    assert all(label in (-100, i) for i, label in zip(ids, labels))
    assert TOKENIZER.decode(trained(labels), specials=True) == expected_trained(turns, name)
    # What is not trained holds no word of an answer: the rest decodes to the template and the questions.
    rest = TOKENIZER.decode([i for i, label in zip(ids, labels) if label == -100], specials=True)
    everything = TOKENIZER.decode(ids, specials=True)
    assert len(rest) == len(everything) - len(expected_trained(turns, name))
    marks = sum(turn.question.count("<image>") for turn in turns)
    assert ids.count(TOKENIZER.image_id) == (0 if name in IMAGE_FIRST else marks)  # there the model puts the image first
    stops = 2 if name in SEPARATE else ("</s>" in CLOSE[name]) * len(turns)  # there what is read ends with one too
    assert ids.count(TOKENIZER.eos_id) == stops  # "</s>" that people write is no stop
    assert ids.count(TOKENIZER.token_id("<EOC>")) == ("<EOC>" in CLOSE[name]) * len(turns)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_truncation_keeps_a_prefix_and_never_cuts_an_image(name, data):
    turns, image_tokens = data.draw(conversations(name)), data.draw(st.sampled_from([1, 7]))
    ids, labels = encode(turns, TOKENIZER, name)
    lengths = [image_tokens if i == TOKENIZER.image_id else 1 for i in ids]
    limit = data.draw(st.integers(1, sum(lengths) + 3))
    fitting = max(n for n in range(len(ids) + 1) if sum(lengths[:n]) <= limit)  # the slow and obvious way
    cuts_image = TOKENIZER.image_id in ids[fitting:]
    if cuts_image or not trained(labels[:fitting]):
        with pytest.raises(UserError, match="record 7.*(image tokens|no answer is left)"):
            encode(turns, TOKENIZER, name, limit, image_tokens, "record 7")
    else:
        assert encode(turns, TOKENIZER, name, limit, image_tokens) == (ids[:fitting], labels[:fitting])
        kept = TOKENIZER.decode(trained(labels[:fitting]), specials=True).rstrip("\ufffd")
        assert expected_trained(turns, name).startswith(kept)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_the_conversation_up_to_its_last_answer_and_generation_stops_right_behind_it(name, data):
    turns, tokenizer = data.draw(conversations(name)), data.draw(st.sampled_from([TOKENIZER, BYTES]))
    asked = (*turns[:-1], replace(turns[-1], answer=""))  # the answer to come is not looked at
    ids, _ = encode(turns, tokenizer, name)
    before = prompt(asked, tokenizer, name)
    assert before + answer_ids(turns[-1].answer, tokenizer, name) == ids
    stop, answer = stop_ids(name, tokenizer), ids[len(before):]
    hits = [end for end in range(len(stop), len(answer) + 1) if answer[end - len(stop):end] == stop]
    assert hits == [len(answer)], "generation would stop before the answer ends, or never"


TWO_TURNS = (Turn("<image>\nwhat colour?", "red"), Turn("sure?", "yes"))
Q1 = "<image>\nwhat colour?"
LAYOUTS = {  # hand-written from the published templates, with the system text S
    "v0": "<s>S\n\n### Human: <image>\nwhat colour?\n### Assistant: red\n### Human: sure?\n### Assistant: yes\n###",
    "v1": "<s>S USER: <image>\nwhat colour? ASSISTANT: red</s>USER: sure? ASSISTANT: yes</s>",
    "tiny": "<s>S USER: <image>\nwhat colour? ASSISTANT: red</s>USER: sure? ASSISTANT: yes</s>",
    "llama_2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n" + Q1 + " [/INST] red </s><s>[INST] sure? [/INST] yes </s>",
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_layout_is_the_published_one(name):
    ids, _ = encode(TWO_TURNS, TOKENIZER, replace(FORMATS[name], system="S"))
    assert TOKENIZER.decode(ids, specials=True) == LAYOUTS[name]
    assert ids.count(TOKENIZER.image_id) == 1
    assert ids.count(TOKENIZER.bos_id) == (2 if name == "llama_2" else 1)


def test_an_empty_system_prompt_leaves_nothing_behind():
    start = {"v0": "<s>### Human: ", "v1": "<s>USER: ", "tiny": "<s>USER: ", "llama_2": "<s>[INST] "}
    for name, text in start.items():
        ids, _ = encode(TWO_TURNS, TOKENIZER, replace(FORMATS[name], system=""))
        assert TOKENIZER.decode(ids, specials=True).startswith(text + "<image>")


def test_generation_stops_at_the_end_token_alone_or_else_at_the_closing_text():
    for name in ("v1", "tiny", "llama_2"):  # llama_2 writes a blank before it, which a model may leave out
        assert stop_ids(name, TOKENIZER) == [TOKENIZER.eos_id]
    assert stop_ids("instructblip", TOKENIZER) == [TOKENIZER.eos_id] != stop_ids("flamingo", TOKENIZER) == [TOKENIZER.token_id("<EOC>")]
    assert BYTES.decode(stop_ids("v0", BYTES)) == "\n###" and BYTES.decode(stop_ids("plain", BYTES)) == "\n"


def test_plain_keeps_the_images_and_throws_the_question_away():
    ids, labels = encode((Turn("describe it\n<image> and <image>", "a red hat"),), TOKENIZER, "plain")
    assert TOKENIZER.decode(ids, specials=True) == "<s><image><image>a red hat\n"
    assert TOKENIZER.decode(trained(labels), specials=True) == "a red hat\n"


def test_blip2_writes_no_image_mark_and_asks_for_no_caption():
    """The model puts the image first."""
    cases = [
        (TWO_TURNS, "<s>Question: what colour? Answer: red\nQuestion: sure? Answer: yes\n", " red\n yes\n"),
        ((Turn("<image>", "a hat", "caption"),), "<s> a hat\n", " a hat\n"),
        ((Turn("<image>\ndescribe it.", "a hat", "caption"),), "<s> a hat\n", " a hat\n"),
    ]
    for turns, whole, learned in cases:
        ids, labels = encode(turns, TOKENIZER, "blip2")
        assert TOKENIZER.decode(ids, specials=True) == whole
        assert TOKENIZER.decode(trained(labels), specials=True) == learned
    # fine-tuned for captions (§4.2): one prompt before all of them, which is not learned, and no question even if asked
    for question in ("<image>", "<image>\ndescribe it."):
        ids, labels = encode((Turn(question, "a hat"),), TOKENIZER, "blip2-caption")
        assert TOKENIZER.decode(ids, specials=True) == "<s>a photo of a hat\n"
        assert TOKENIZER.decode(trained(labels), specials=True) == " a hat\n"


@pytest.mark.parametrize(("turns", "read", "written"), [
    (TWO_TURNS, "Question: what colour? Short answer: red Question: sure? Short answer:</s>", " yes</s>"),
    ((Turn("<image>\ndescribe it.", "a hat", "caption"),), "</s>", " a hat</s>"),
])
def test_flan_t5_reads_all_but_the_last_answer(turns, read, written):
    """BLIP-2 §4.1's prompt. A prompt is exactly what is read."""
    ids, answer = two_sequences(*encode(turns, TOKENIZER, "flan_t5"))
    assert TOKENIZER.decode(ids, specials=True) == read and TOKENIZER.decode(answer, specials=True) == written
    assert ids == prompt(turns, TOKENIZER, "flan_t5") and answer == answer_ids(turns[-1].answer, TOKENIZER, "flan_t5")
    assert stop_ids("flan_t5", TOKENIZER) == [TOKENIZER.eos_id]


# ---- words in the pictures' places

SAID = ("A red hat.", "two shoes")
BOTH = (Turn("<image>\nwhat colour?", "red"), Turn("and <image> too?", "yes"))
ASKED = (Turn("<image>\nwhat colour?", "red"), Turn("sure?", "yes"))
CAPTIONED = (Turn("<image>", "a hat", "caption"),)
# format → turns, and the pieces of text between which no token reaches, written by hand; the words stand where the mark would
TOLD = [
    ("plain", (Turn("<image><image> which?", "a hat"),), ["<s>", "A red hat.two shoes", "a hat", "\n"]),
    ("v0", BOTH, ["<s>", "### Human: A red hat.\nwhat colour?\n### Assistant:", " red", "\n###",
                  " Human: and two shoes too?\n### Assistant:", " yes", "\n###"]),
    *((name, BOTH, ["<s>", "USER: A red hat.\nwhat colour? ASSISTANT:", " red", "</s>", "USER: and two shoes too? ASSISTANT:", " yes", "</s>"])
      for name in ("v1", "tiny")),
    ("llama_2", BOTH, ["<s>", "[INST] A red hat.\nwhat colour? [/INST]", " red", " ", "</s>", "<s>", "[INST] and two shoes too? [/INST]",
                       " yes", " ", "</s>"]),
    ("blip2", ASKED, ["A red hat.", "<s>", "Question: what colour? Answer:", " red", "\n", "Question: sure? Answer:", " yes", "\n"]),
    ("blip2", CAPTIONED, ["A red hat.", "<s>", " a hat", "\n"]),
    ("blip2-caption", CAPTIONED, ["A red hat.", "<s>", "a photo of", " a hat", "\n"]),
    ("blip", CAPTIONED, ["A red hat.", "<s>", "a hat", "</s>"]),
    ("blip-caption", CAPTIONED, ["A red hat.", "<s>", "a picture of", " a hat", "</s>"]),
    ("flan_t5", ASKED, ["A red hat.Question: what colour? Short answer: red Question: sure? Short answer:", "</s>", " yes", "</s>"]),
    ("flan_t5", CAPTIONED, ["A red hat.", "</s>", " a hat", "</s>"]),
    ("blip-vqa", ASKED, ["A red hat.", "<s>", "what colour? red sure?", "</s>", " yes", "</s>"]),
    ("blip-vqa", CAPTIONED, ["A red hat.", "<s>", "</s>", " a hat", "</s>"]),
    ("instructblip-t5", ASKED, ["A red hat.what colour? red sure?", "</s>", " yes", "</s>"]),
    ("instructblip", ASKED, ["A red hat.", "<s>", "what colour?", " red", "</s>", "\nsure?", " yes", "</s>"]),
    ("flamingo", (Turn("<image>what colour?", "red"), Turn("and <image> too?", "yes")),
     ["<s>", "A red hat.Question: what colour? Answer:", " red", "<EOC>", "two shoesQuestion: and  too? Answer:", " yes", "<EOC>"]),
    ("flamingo", (Turn("<image>", "dax"), Turn("<image>", "wug")),
     ["<s>", "A red hat.Output:", " dax", "<EOC>", "two shoesOutput:", " wug", "<EOC>"]),
    ("pages", (Turn("", "hats"), Turn("<image>", " a hat"), Turn("<image>", "shoes")),
     ["<s>", "hats", "<EOC>", "A red hat.", " a hat", "<EOC>", "two shoes", "shoes", "<EOC>"]),
    ("pair", CAPTIONED, ["<s>", "A red hat.", "a hat", "<EOC>", "</s>"]),
]


@pytest.mark.parametrize(("name", "turns", "pieces"), TOLD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_told_stands_where_the_mark_would(name, turns, pieces):
    """Token for token; what is said around it and what is learned is the same as beside a picture."""
    marks = sum(turn.question.count("<image>") for turn in turns)
    layout = replace(FORMATS[name], system="")
    ids, labels = encode(turns, TOKENIZER, layout, told=SAID[:marks])
    assert ids == [i for piece in pieces for i in TOKENIZER.encode(piece, specials=piece in TOKENIZER.specials)]
    assert prompt(turns, TOKENIZER, layout, told=SAID[:marks]) == ids[:-len(answer_ids(turns[-1].answer, TOKENIZER, name))]
    shown, of_shown = encode(turns, TOKENIZER, layout)
    assert trained(labels) == trained(of_shown) and TOKENIZER.image_id not in ids
    assert shown.count(TOKENIZER.image_id) == (0 if name in IMAGE_FIRST else marks)
    text, words = TOKENIZER.decode(shown, specials=True), iter(SAID)
    assert TOKENIZER.decode(ids, specials=True) == ("".join(SAID[:1]) * (name in IMAGE_FIRST)
                                                    + "".join(next(words) if part == "<image>" else part for part in re.split("(<image>)", text)))


def test_every_format_has_been_told():
    assert {name for name, *_ in TOLD} == set(FORMATS)


def test_tags_that_are_told_are_text():
    ids, _ = encode((Turn("<image>\nwhat?", "x"),), TOKENIZER, "tiny", told=("</s> <image> <EOC>",))
    assert [i for i in ids if i < len(TOKENIZER.specials)] == [TOKENIZER.bos_id, TOKENIZER.eos_id]


def test_a_sample_that_is_told_is_taught_asked_and_counted_like_one_that_is_shown():
    """In its own format, but for an encoder-decoder; marks without words and words without marks are refused."""
    told = Sample("a", turns=BOTH, told=SAID)
    ids, labels = encode(BOTH, TOKENIZER, "v1", told=SAID)
    batch = collate("v1", 5).teach([told], Random(0))
    assert batch["input_ids"][0].tolist() == ids and batch["labels"][0].tolist() == labels and len(batch["images"]) == 0
    assert collate("v1", 5).ask([told])["input_ids"][0].tolist() == prompt(BOTH, TOKENIZER, "v1", told=SAID)
    page = replace(told, turns=(Turn("<image>", "dax"), Turn("<image>", "wug")), format="flamingo")
    assert collate("v1", 5).encode(page)[0] == encode(page.turns, TOKENIZER, "flamingo", told=SAID)[0]
    one = Sample("b", turns=ASKED, told=SAID[:1], format="instructblip")
    assert collate("flan_t5", 0).encode(one)[0] == encode(ASKED, TOKENIZER, "flan_t5", told=SAID[:1])[0]
    for broken in (replace(told, told=SAID[:1]), replace(one, told=())):
        with pytest.raises(UserError, match=f'^{broken.id}: . "<image>" marks in its questions but'):
            collate("v1", 5).teach([broken], Random(0))


@pytest.mark.parametrize(("turns", "name", "whole"), [
    (ASKED, "instructblip", "<s>what colour? red</s>\nsure? yes</s>"),
    ((Turn("<image>a short description:", "a hat", "caption"),), "instructblip", "<s>a short description: a hat</s>"),
    ((Turn("<image>what colour?", "red"), Turn("<image>sure?", "yes")), "flamingo",
     "<s><image>Question: what colour? Answer: red<EOC><image>Question: sure? Answer: yes<EOC>"),
    ((Turn("<image>", "a hat", "caption"), Turn("<image>", "two")), "flamingo", "<s><image>Output: a hat<EOC><image>Output: two<EOC>"),
    ((Turn("sure?", "yes"),), "flamingo", "<s>Question: sure? Answer: yes<EOC>"),
])
def test_the_layouts_of_instructblip_and_flamingo(turns, name, whole):
    """InstructBLIP §2.3: instruction, response, and nothing around them. Flamingo App. A.2, B.1: a picture before each question."""
    ids, labels = encode(turns, TOKENIZER, name)
    assert TOKENIZER.decode(ids, specials=True) == whole
    assert TOKENIZER.decode(trained(labels), specials=True) == "".join(f" {turn.answer}{CLOSE[name]}" for turn in turns)


def test_an_answer_is_the_same_tokens_as_inside_a_sentence():
    ids, labels = encode((Turn("what colour is it?", "red"),), TOKENIZER, "v1")
    assert trained(labels) == [*TOKENIZER.encode(" red"), TOKENIZER.eos_id]
    # template and question are cut into tokens as one text too: "USER: what" has no lone blank in the middle
    before = TOKENIZER.encode("USER: what colour is it? ASSISTANT:")
    assert ids[-len(before) - len(trained(labels)):-len(trained(labels))] == before


@pytest.mark.parametrize(
    ("turns", "name", "said"),
    [
        ((Turn("hi", " \n"),), "v1", "picture 3: the answer of turn 1 is empty"),
        ((Turn("hi", "a"), Turn("hi", "")), "v1", "picture 3: the answer of turn 2 is empty"),
        ((), "v1", "picture 3: it has no turns"),
        ((Turn("hi", "use ### here"),), "v0", "picture 3: the answer of turn 1 holds '###'"),
        ((Turn("<image>", "two\nlines"),), "plain", "holds '.n'"),
        ((Turn("<image>", "a"), Turn("b", "c")), "plain", "picture 3: this format holds one caption, not 2 turns"),
        ((Turn("<image><image>", "a"),), "blip2", "picture 3: in this format one image stands before everything"),
        ((Turn("hi", "a"), Turn("<image>", "c")), "blip2", "picture 3: in this format one image stands"),
        ((Turn("hi", "a"),), "v9", "Unknown conversation format 'v9'.*v1, llama_2, blip2, flan_t5, instructblip, instructblip-t5, flamingo, pages, pair, blip2-caption, blip, blip-caption, blip-vqa, tiny"),
    ],
)
def test_what_cannot_be_encoded_is_said_in_one_sentence(turns, name, said):
    with pytest.raises(UserError, match=said):
        encode(turns, TOKENIZER, name, name="picture 3")


def test_a_prompt_that_does_not_fit_is_an_error_and_counts_image_tokens():
    turns = (Turn("<image>\nwhat?", ""),)
    length = len(prompt(turns, TOKENIZER, "tiny")) + 12  # one id of it becomes 13 embeddings
    assert prompt(turns, TOKENIZER, "tiny", length, 13)
    with pytest.raises(UserError, match=f"record 7: the question does not fit into {length - 1} tokens"):
        prompt(turns, TOKENIZER, "tiny", length - 1, 13, "record 7")


# ---- batches


def plain_picture(value: int) -> Image.Image:
    return Image.new("RGB", (11, 11), (value, value, value))


TRANSFORM = Transform(11, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def collate(format: str, image_tokens: int, max_length: int = 0) -> Collate:
    return Collate(TOKENIZER, format, TRANSFORM, Reads("conversations", image_tokens), max_length)


def pairs_of(max_length: int) -> Collate:
    return Collate(TOKENIZER, "plain", TRANSFORM, Reads("pairs", wrong_captions=True), max_length)


TWO_IMAGES = Sample("a", (plain_picture(10), plain_picture(20)), turns=(Turn("<image> or <image>?", "the first"),))
NO_IMAGE = Sample("b", turns=(Turn("how are you?", "well, and ready for a longer answer"),))
LATE_IMAGE = Sample("c", (plain_picture(30),), turns=(Turn("hi", "hello"), Turn("what is this <image>", "grey")))


def test_a_batch_of_conversations_holds_all_images_in_the_order_of_their_marks():
    samples = [TWO_IMAGES, NO_IMAGE, LATE_IMAGE]
    batch = collate("v1", 5, 0).teach(samples, Random(0))
    assert batch["images"].shape == (3, 3, 11, 11)
    assert [round(image.mean().item() * 255) for image in batch["images"]] == [10, 20, 30]
    for row, sample in enumerate(samples):
        ids, labels = encode(sample.turns, TOKENIZER, "v1")
        mask = batch["attention_mask"][row]
        assert mask.tolist() == [True] * len(ids) + [False] * (len(mask) - len(ids))  # right padding
        assert batch["input_ids"][row, mask].tolist() == ids
        assert batch["labels"][row, mask].tolist() == labels
        assert (batch["labels"][row, ~mask] == -100).all()
        assert (batch["input_ids"][row, ~mask] == TOKENIZER.pad_id).all()


def test_a_batch_without_images_has_an_empty_stack_of_the_right_shape():
    batch = collate("tiny", 5, 0).teach([NO_IMAGE], Random(0))
    assert batch["images"].shape == (0, 3, 11, 11)


def test_what_an_encoder_decoder_reads_and_what_it_writes():
    """Any turn may be the last, and a caption begins anywhere in its first half; both from the generator alone.

    3,000 draws: a frequency further off than 5 standard deviations comes once in a million.
    """
    turns = (Turn("<image>\nhow many?", "two"), Turn("what?", "red hats"), Turn("where?", "left"))
    talk = Sample("a", (plain_picture(10),), turns=turns)
    words = "a red hat and one blue coat"
    told = Sample("b", (plain_picture(20),), turns=(Turn("<image>", words, "caption"),), format="blip2")
    batch = collate("flan_t5", 0, 0).teach([talk, told] * 3000, Random(0))
    again = collate("flan_t5", 0, 0).teach([talk, told], Random(0))
    assert batch["images"].shape == (6000, 3, 11, 11) and batch["labels"].shape[1] < batch["input_ids"].shape[1]
    rows = [(TOKENIZER.decode(ids[mask].tolist(), specials=True), trained(labels.tolist()))
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])]
    for (read, written), mask, ids, labels in zip(rows[:2], again["attention_mask"], again["input_ids"], again["labels"]):
        assert TOKENIZER.decode(ids[mask].tolist(), specials=True) == read and trained(labels.tolist()) == written
    history = "Question: how many? Short answer: two"
    prompts = {f"{history[:-4]}</s>": " two</s>", f"{history} Question: what? Short answer:</s>": " red hats</s>",
               f"{history} Question: what? Short answer: red hats Question: where? Short answer:</s>": " left</s>"}
    assert {read: TOKENIZER.decode(written, specials=True) for read, written in rows[::2]} == prompts
    asked = Counter(read for read, _ in rows[::2])
    assert all(abs(times - 1000) <= 5 * (3000 * 2 / 9) ** 0.5 for times in asked.values())
    whole = TOKENIZER.encode(" " + words) + [TOKENIZER.eos_id]
    given = Counter(len(whole) - len(written) for _, written in rows[1::2])
    p = 1 / ((len(whole) - 1) // 2 + 1)
    assert set(given) == set(range((len(whole) - 1) // 2 + 1)) and len(given) > 4
    assert all(abs(times - 3000 * p) <= 5 * (3000 * p * (1 - p)) ** 0.5 for times in given.values())
    for read, written in rows[1::2]:
        assert written == whole[-len(written):]
        assert read == TOKENIZER.decode([*whole[:-len(written)], TOKENIZER.eos_id], specials=True)


def test_marks_and_images_must_match():
    for broken in (replace(TWO_IMAGES, images=TWO_IMAGES.images[:1]), replace(NO_IMAGE, images=TWO_IMAGES.images)):
        with pytest.raises(UserError, match=f'^{broken.id}: (2|0) "<image>" marks in its questions but'):
            collate("v1", 5, 0).teach([broken], Random(0))


def test_truncation_in_a_batch_counts_image_tokens_and_names_the_sample():
    with pytest.raises(UserError, match="^c: cutting it to 40 tokens would cut image tokens"):
        collate("tiny", 200, 40).teach([NO_IMAGE, LATE_IMAGE], Random(0))


def pair(name, caption, value, negatives=()):
    return Sample(name, (plain_picture(value),), caption=caption, negatives=negatives)


def test_pairs_know_which_texts_and_images_are_the_same():
    samples = [pair("a", "red", 1), pair("b", "blue", 2), pair("c", "red", 3), pair("d", "green", 2)]
    batch = pairs_of(13).pairs(samples, Random(0))
    text, image = batch["text_group"].tolist(), batch["image_group"].tolist()
    assert [[x == y for y in text] for x in text] == [[x == y for y in "rbrg"] for x in "rbrg"]
    assert [[x == y for y in image] for x in image] == [[x == y for y in "1232"] for x in "1232"]
    assert batch["text_group"].dtype == torch.int64 and "negative_ids" not in batch
    for row, sample in enumerate(samples):
        ids = batch["input_ids"][row, batch["attention_mask"][row]].tolist()
        assert TOKENIZER.decode(ids, specials=True) == f"<s>{sample.caption}</s>"
    again = pairs_of(13).pairs(samples[:1], Random(5))
    assert again["text_group"][0] == text[0] and again["image_group"][0] == image[0]  # the same in any batch and run


def test_negatives_are_as_many_as_every_sample_has_and_long_texts_keep_their_end_token():
    three = ("blue", "green", "a very very very long negative caption")
    samples = [pair("a", "red", 1, three), pair("b", "x", 2, ("y", "z"))]
    batch = pairs_of(9).pairs(samples, Random(0))
    assert batch["negative_ids"].shape == (2, 2, batch["input_ids"].shape[1])
    assert batch["input_ids"].shape[1] <= 9
    for row, sample in enumerate(samples):
        texts = set()
        for ids, mask in zip(batch["negative_ids"][row], batch["negative_mask"][row]):
            assert ids[mask][-1] == TOKENIZER.eos_id and ids[mask][0] == TOKENIZER.bos_id
            texts.add(TOKENIZER.decode(ids[mask].tolist()))
        assert len(texts) == 2  # no negative twice
        assert all(text and any(negative.startswith(text) for negative in sample.negatives) for text in texts)


def test_pairs_need_an_image_and_a_text():
    for broken in (Sample("e", (), caption="a hat"), Sample("e", (plain_picture(1),), caption=" ")):
        with pytest.raises(UserError, match="^e: a pair needs one image and a caption"):
            pairs_of(9).pairs([broken], Random(0))


def test_prompts_are_padded_where_the_answer_does_not_begin():
    """A decoder's on the left; an encoder's on the right, as in training."""
    samples = [Sample("a", turns=(Turn("how are you?", "well"),)), Sample("b", turns=(Turn("hi", "ho"),))]
    for format, side in (("tiny", "left"), ("flan_t5", "right")):
        batch = collate(format, 0).ask(samples)
        for ids, mask, sample in zip(batch["input_ids"], batch["attention_mask"], samples):
            want = prompt(sample.turns, TOKENIZER, format)
            padding = [False] * (len(mask) - len(want))
            assert ids[mask].tolist() == want
            assert mask.tolist() == ([*padding, *[True] * len(want)] if side == "left" else [*[True] * len(want), *padding])
        assert not batch["attention_mask"].all() and "labels" not in batch
