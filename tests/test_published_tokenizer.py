"""Published tokenizers: small ones of the four kinds, compared with transformers' own class on the same file, and on real templates.

The oracle encodes whole texts, as the published codes do; ours go through conversation.py piece by piece.
"""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import tokenizers
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nanovlm import published_tokenizer, recipes
from nanovlm.chat import load_run
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.conversation import FORMATS, answer_ids, candidate_ids, encode, prompt, stop_ids, two_sequences
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.published_tokenizer import PublishedTokenizer, restored
from nanovlm.recipes.stage import Recipe
from nanovlm.runs import shipped
from nanovlm.runs.run import Options, run
from nanovlm.runs.setting import make_tokenizer
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.weights import PUBLISHED, find_published
from nanovlm.world.datasets import Scenes

CORPUS = [f"{f.system}{f.first}what colour is it? The red hat, the blue hat and 2 cats.{f.reply} red and blue\n###" for f in FORMATS.values()] * 4
TEXTS = ["what colour is the red hat?", "The  hat,\nthe cat", "5 cats and 12", "naïve 🦊 hat", "say </s> and <s> and <unk>", "red", "\nred", "x "]
IMAGE_ID = 1_000
LLAMA_WAYS = ("first", "always", "prepend")


# ---- small tokenizers of the four kinds

def with_bytes() -> tuple[dict, list]:
    """The vocabulary of SentencePiece's BPE, as LLaMA's file has it: <unk>, <s>, </s>, the 256 bytes, then what was learned; and the merges."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama(way: str = "first") -> tokenizers.Tokenizer:
    """way: how the file says that "▁" stands before a text; "prepend" is that of older files."""
    vocab, merges = with_bytes()
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if way == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=way, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def opt() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    return made


def bert() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


def t5() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return made


MADE = {**{("llama", way): llama(way) for way in LLAMA_WAYS}, **{("vicuna", way): llama(way) for way in LLAMA_WAYS},
        ("opt", ""): opt(), ("bert", ""): bert(), ("t5", ""): t5()}


def ids_of(case: tuple[str, str]) -> str:
    return "-".join(filter(None, case))


def ours(kind: str, way: str = "", bridge: PublishedTokenizer | None = None, image_id: int = IMAGE_ID) -> PublishedTokenizer:
    return PublishedTokenizer(MADE[kind, way].to_str(), kind, image_id, bridge)


def theirs(kind: str, way: str = "") -> PreTrainedTokenizerFast:
    """transformers on the same file; marks in a text are marks for it."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(MADE[kind, way].to_str()))


def whole(kind: str, way: str, text: str) -> list[int]:
    return theirs(kind, way).encode(text, add_special_tokens=False)


def trained(labels: list[int]) -> list[int]:
    return [label for label in labels if label != -100]


def folder(home: Path, name: str, made: tokenizers.Tokenizer) -> None:
    (home / name).mkdir(parents=True, exist_ok=True)
    made.save(str(home / name / "tokenizer.json"))


# ---- a text alone

@pytest.mark.parametrize("case", MADE, ids=ids_of)
def test_ids_and_texts_are_those_of_transformers(case):
    tokenizer = ours(*case)
    oracle = theirs(*case)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if case[0] != "t5" or "</s>" not in text:  # for transformers, too, "</s>" is a piece of T5's model
            assert ids == oracle.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert tokenizer.decode(ids) == oracle.backend_tokenizer.decode(ids), text
    assert len(tokenizer) == len(oracle)


@pytest.mark.parametrize("case", MADE, ids=ids_of)
def test_marks_that_people_type_are_text(case):
    tokenizer = ours(*case)
    typed = "say </s>, <s>, <image>, <pad>, [CLS], [SEP] or [PAD]"
    for before in (None, "a text", tokenizer.eos_id, IMAGE_ID):
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id} & set(tokenizer.encode(typed, before=before))
    assert tokenizer.eos_id in tokenizer.encode(typed, specials=True)


@pytest.mark.parametrize("case", [case for case in MADE if case[0] in ("llama", "vicuna", "opt")], ids=ids_of)
def test_any_text_comes_back(case):
    tokenizer = ours(*case)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text), specials=True) == text


@pytest.mark.parametrize(("case", "marks"), [
    (("llama", "first"), (1, 2, 0)), (("vicuna", "first"), (2, 2, None)), (("opt", ""), (2, 2, 1)), (("bert", ""), (2, 3, 0)),
    (("t5", ""), (None, 1, 0))], ids=str)
def test_marks_are_those_of_the_published_codes(case, marks):
    tokenizer = ours(*case)
    bos, eos, pad = marks
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, len(tokenizer) if pad is None else pad)
    assert tokenizer.token_id("</s>") == eos and tokenizer.token_id("<image>") == tokenizer.image_id == IMAGE_ID >= len(tokenizer)
    assert tokenizer.bridge is tokenizer
    text = "<image>red hat</s>"
    ids = tokenizer.encode(text, specials=True)
    assert ids[0] == IMAGE_ID and ids[-1] == eos and tokenizer.decode(ids).strip() == "red hat"
    assert tokenizer.decode(ids, specials=True).startswith("<image>red hat")
    with pytest.raises(UserError, match=r"id -100 is outside the vocabulary .*drop ignored labels"):
        tokenizer.decode([5, -100])
    with pytest.raises(UserError, match=r"no mark '<EOC>'"):
        tokenizer.token_id("<EOC>")
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a \udc9d b")


def test_a_checkpoint_holds_all_of_it():
    for tokenizer in (ours("opt", bridge=ours("bert")), ours("llama", "first"), Tokenizer([])):
        again = restored(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.to_dict() == tokenizer.to_dict() and type(again) is type(tokenizer)
        assert again.encode("the Red hat") == tokenizer.encode("the Red hat") == pickle.loads(pickle.dumps(tokenizer)).encode("the Red hat")
        assert again.bridge.encode("the Red hat") == tokenizer.bridge.encode("the Red hat")


# ---- whole conversations: LLaVA's

TURNS = (Turn("<image>\nwhat colour is the hat?", "red and blue"), Turn("how many cats?", "2"), Turn("say </s>.", "The hat"))


def between_images(way: str, text: str) -> list[int]:
    """LLaVA's tokenizer_image_token: what stands between images is encoded apart."""
    first, *others = text.split("<image>")
    ids = [1, *whole("llama", way, first)]
    for other in others:
        ids += [IMAGE_ID, *whole("llama", way, other)]
    return ids


@pytest.mark.parametrize("way", LLAMA_WAYS)
@pytest.mark.parametrize("name", ["v1", "v0", "plain", "tiny"])
def test_pieces_give_the_ids_of_the_whole_text(name, way):
    tokenizer, layout = ours("llama", way), FORMATS[name]
    turns = TURNS[:2] if name != "plain" else (Turn("<image>", "a red hat"),)
    text = layout.system + layout.around[1] if layout.system else ""
    for number, turn in enumerate(turns):
        text += f"{layout.later if number else layout.first}{turn.question}{layout.reply}{layout.lead}{turn.answer}{layout.close}"
    ids, labels = encode(turns, tokenizer, name)
    assert ids == between_images(way, text)
    learned = "".join(f"{turn.answer}{layout.close}{layout.lead}" for turn in turns).removesuffix(" ")
    assert tokenizer.decode(trained(labels), specials=True) == learned


@pytest.mark.parametrize("way", LLAMA_WAYS)
@pytest.mark.parametrize("name", ["v1", "v0"])
def test_exactly_each_answer_and_what_closes_it_is_learned(name, way):
    tokenizer = ours("llama", way)
    ids, labels = encode(TURNS, tokenizer, name)
    runs = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    stop = stop_ids(name, tokenizer)
    for said, turn in zip(filter(None, runs), TURNS, strict=True):
        assert said == answer_ids(turn.answer, tokenizer, name) and said[-len(stop):] == stop
        assert tokenizer.decode(said[:-len(stop)]) == turn.answer
        assert tokenizer.decode(stop, specials=True) == FORMATS[name].close
    assert ids.count(tokenizer.eos_id) == (3 if name == "v1" else 0)  # the one that is typed is no stop
    assert prompt(TURNS, tokenizer, name) + answer_ids(TURNS[-1].answer, tokenizer, name) == ids


@pytest.mark.parametrize(("way", "blank"), [("first", False), ("always", True), ("prepend", True)])
def test_after_a_closed_turn_the_blank_is_as_the_file_says(way, blank):
    tokenizer = ours("llama", way)
    ids, _ = encode(TURNS[:2], tokenizer, "v1")
    behind = ids[ids.index(tokenizer.eos_id) + 1:]
    assert MADE["llama", way].id_to_token(behind[0]).startswith("▁") == blank


# ---- BLIP-2 and InstructBLIP

def test_blip2_on_opt():
    """LAVIS: the prompt and the answer with its line end are one text, "</s>" before it; so is a caption, which no blank opens."""
    tokenizer = ours("opt")
    ids, labels = encode((Turn("<image>\nwhat colour is it?", "red and blue"),), tokenizer, "blip2")
    assert ids == [2, *whole("opt", "", "Question: what colour is it? Answer: red and blue\n")]
    assert trained(labels) == whole("opt", "", " red and blue\n") and tokenizer.decode(trained(labels)) == " red and blue\n"
    assert stop_ids("blip2", tokenizer) == whole("opt", "", "\n") and len(stop_ids("blip2", tokenizer)) == 1
    assert candidate_ids("red and blue", tokenizer, "blip2") == trained(labels)
    ids, labels = encode((Turn("<image>", "a red hat", kind="caption"),), tokenizer, "blip2")
    assert ids == [2, *whole("opt", "", "a red hat\n")] and trained(labels) == ids[1:]


def test_blip2_on_flan_t5():
    """What is asked ends in "</s>", which its tokenizer puts there; the answer is a text of its own."""
    tokenizer = ours("t5")
    read, written = two_sequences(*encode((Turn("<image>\nwhat colour is it?", "red and blue"),), tokenizer, "flan_t5"))
    assert read == theirs("t5").encode("Question: what colour is it? Short answer:")
    assert written == theirs("t5").encode("red and blue") == answer_ids("red and blue", tokenizer, "flan_t5")
    assert tokenizer.decode(written) == "red and blue" and stop_ids("flan_t5", tokenizer) == [1]


@pytest.mark.parametrize("way", LLAMA_WAYS)
def test_instructblip_on_vicuna(way):
    """LAVIS encodes instruction and response apart and drops the response's first mark."""
    tokenizer = ours("vicuna", way)
    ids, labels = encode((Turn("<image>\nwhat colour is it?", "red and blue"),), tokenizer, "instructblip")
    assert ids == [2, *whole("llama", way, "what colour is it?"), *whole("llama", way, "red and blue"), 2]
    assert trained(labels) == [*whole("llama", way, "red and blue"), 2] and tokenizer.decode(trained(labels)) == "red and blue"
    assert candidate_ids("red and blue", tokenizer, "instructblip") == trained(labels)[:-1]  # ranked without "</s>"


def test_the_bridge_reads_berts_words_and_the_language_model_its_own():
    tokenizer = ours("t5", bridge=ours("bert"))
    sample = Sample("a", images=(Image.new("RGB", (8, 8)),), turns=(Turn("<image>\nWhat colour is the Hat?", "red"),))
    batch = Collate(tokenizer, "instructblip-t5", Transform(8), Reads(question=64)).teach([sample], Random(0))
    assert batch["qformer_input_ids"].tolist() == [theirs("bert").encode("What colour is the Hat?")]
    assert batch["input_ids"].tolist() == [theirs("t5").encode("What colour is the Hat?")]
    assert batch["labels"].tolist() == [theirs("t5").encode("red")]
    pairs = Collate(tokenizer, "plain", Transform(8), Reads("pairs"), 32).texts(["The Hat", "a red hat and a blue cat"])
    for row, mask, text in zip(pairs["input_ids"], pairs["attention_mask"], ["The Hat", "a red hat and a blue cat"]):
        assert row[mask].tolist() == theirs("bert").encode(text) and (row[~mask] == 0).all()


def test_blip_writes_berts_words():
    tokenizer = ours("bert")
    ids, labels = encode((Turn("<image>", "a red Hat"),), tokenizer, "blip-caption")
    assert ids == theirs("bert").encode("a picture of a red hat") and tokenizer.decode(trained(labels)) == "a red hat"
    assert trained(labels)[-1] == 3


# ---- which recipe has which

def test_whatever_begins_with_published_words_reads_them():
    for name in recipes.names():
        recipe = recipes.get(name)
        origins = [origin for stage in recipe.stages for module, origin in stage.init if module != "vision"]
        assert bool(recipe.words) or not any(origin.startswith(PUBLISHED) for origin in origins), name
        assert not recipe.words or not name.endswith(("tiny", "small")), name
    words = {name: recipes.get(name).words for name in recipes.names()}
    assert words["llava15/13b-hd"] == {"text": ("lmsys/vicuna-13b-v1.5", "llama")}
    assert words["blip2/vit-g-opt-6.7b-vqa"]["text"] == ("facebook/opt-6.7b", "opt")
    assert words["instructblip/vicuna-7b-okvqa"]["text"] == ("lmsys/vicuna-7b-v1.1", "vicuna")
    assert words["blip2/vit-g-flan-t5-xxl"] == {"text": ("google/flan-t5-xxl", "t5"), "bridge": ("google-bert/bert-base-uncased", "bert")}
    assert all(len(words[name]) == 1 + name.startswith(("blip2", "instructblip")) for name in words if words[name])


def shrunk(name: str, text: int, bridge: int = 0) -> Recipe:
    """The published recipe for tokenizers of so many words."""
    recipe = recipes.get(name)
    config = recipe.config
    if bridge:
        config = replace(config, qformer=replace(config.qformer, text=replace(config.qformer.text, vocab=bridge)))
    return replace(recipe, vocab=text, config=config)


def test_a_recipe_reads_its_tokenizers_from_the_folder_of_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    folder(tmp_path, "facebook/opt-2.7b", MADE["opt", ""])
    folder(tmp_path, "google-bert/bert-base-uncased", MADE["bert", ""])
    monkeypatch.setattr(shipped, "tokenizer", lambda: Tokenizer([]))  # of bytes alone, so that it would fit
    sizes = len(ours("opt")), len(ours("bert"))
    recipe = shrunk("blip2/vit-g-opt-2.7b", sizes[0] + 7, sizes[1] + 1)
    for found in (make_tokenizer(recipe, Scenes(0), 0), find_tokenizer(recipe, Scenes(0), 0)):  # and not the shipped one
        assert (found.kind, found.bridge.kind, found.image_id) == ("opt", "bert", sizes[0] + 7)
        assert (found.encode("red"), found.bridge.encode("Red")) == (whole("opt", "", "red"), whole("bert", "", "red"))
    for wrong in (shrunk("blip2/vit-g-opt-2.7b", sizes[0] - 1, sizes[1]), shrunk("blip2/vit-g-opt-2.7b", sizes[0], sizes[1] + 65)):
        with pytest.raises(UserError, match=r"tokenizer\.json has \d+ words, but the model has a table of \d+: it is the tokenizer of another model"):
            make_tokenizer(wrong, Scenes(0), 0)


def test_vicuna_has_one_word_more_with_instructblip(tmp_path):
    folder(tmp_path, "v", MADE["llama", "first"])
    size = len(ours("llama", "first"))
    found = published_tokenizer.read(tmp_path / "v", "vicuna", size + 1)
    assert (found.pad_id, found.image_id) == (size, size + 1) and found.decode([found.pad_id], specials=True) == "[PAD]"


def test_a_run_and_whoever_opens_it_read_the_published_words(tmp_path, monkeypatch):
    """LLaVA's two stages in tiny sizes, with Vicuna's kind of tokenizer: trained, asked, stored, opened again."""
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("NANOVLM_CACHE", str(tmp_path / "cache"))
    folder(tmp_path, "lmsys/small", MADE["llama", "first"])
    size, base = len(ours("llama", "first")), recipes.get("llava/tiny")
    config = replace(base.config, language=replace(base.config.language, vocab=size), image_token_id=size)
    stages = tuple(replace(stage, init=(), max_length=512, batch_size=4, evaluate=()) for stage in base.stages)
    recipe = replace(base, name="llava/words", config=config, vocab=size, words={"text": ("lmsys/small", "llama")}, stages=stages)
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, recipe.name: recipe})
    for resume in (False, True):
        run(recipe.name, Options(steps=2, out=str(tmp_path / "run"), cache=False, device="cpu", resume=resume))
    (tmp_path / "lmsys/small/tokenizer.json").unlink()  # the run has it
    pupil = load_run(tmp_path / "run")
    assert pupil.tokenizer.to_dict() == {"file": MADE["llama", "first"].to_str(pretty=True), "kind": "llama", "image_id": size, "bridge": None}
    sample = Sample("a", images=(Image.new("RGB", (48, 48)),), turns=(Turn("<image>\nwhat is it?", ""),))
    assert pupil.read([sample])["input_ids"].tolist() == [prompt(sample.turns, ours("llama", "first", image_id=size), "tiny")]
    [best] = pupil.best([sample], ("a red hat", "two cats"))
    assert best in ("a red hat", "two cats") and len(pupil.answer([sample], room=3)) == 1


# ---- bad input

def test_a_missing_tokenizer_is_told_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    for name in ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lmsys/vicuna-7b-v1.5/tokenizer.model").touch()
    recipe = recipes.get("llava15/7b")
    with pytest.raises(UserError, match=r"vicuna-7b-v1\.5 has no tokenizer\.json: .*let transformers write it"):
        find_published(recipe, "tune")
    folder(tmp_path, "lmsys/vicuna-7b-v1.5", MADE["llama", "first"])
    find_published(recipe, "tune")
    with pytest.raises(UserError, match=r"tokenizer\.json has \d+ words, but the model has a table of 32,000"):
        make_tokenizer(recipe, Scenes(0), 0)


@pytest.mark.parametrize(("text", "message"), [
    ("{", r"mine\.json is no JSON object"), ("{}", r"mine\.json is no tokenizer that the package tokenizers can read"), ("[]", r"mine\.json is no JSON object")])
def test_a_broken_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        PublishedTokenizer(text, "llama", IMAGE_ID, name="mine.json")


def test_the_tokenizer_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"mine\.json has no token '\[CLS\]', which bert needs"):
        PublishedTokenizer(MADE["opt", ""].to_str(), "bert", IMAGE_ID, name="mine.json")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    text = MADE["opt", ""].to_str()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        PublishedTokenizer(text, "opt", IMAGE_ID)
