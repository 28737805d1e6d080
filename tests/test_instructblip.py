"""InstructBLIP's model and batches: who is told the instruction, what reaches the language model, where labels begin, clips, ranking."""

from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from tools import bite, close, pad_mask, randn, random_ids
from torch import Tensor, nn

from nanovlm import recipes
from nanovlm.attention import KVCache
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate, spread
from nanovlm.data.sample import Sample, Turn
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.papers.instructblip import FRAMES, InstructBLIP
from nanovlm.recipes import backbones
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.loop import freeze
from nanovlm.world.datasets import Scenes

RECIPE = recipes.get("instructblip/tiny")
[STAGE] = RECIPE.stages
Q, LONG = RECIPE.config.qformer.queries, 400
FORMATS = {"decoder": "instructblip", "t5": "instructblip-t5"}
EACH = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(Scenes().texts()[:300], 700)


def sharp(kind: str = "decoder", asks: bool = True, seed: int = 1) -> InstructBLIP:
    language = {"decoder": backbones.TINY_LANGUAGE, "t5": backbones.TINY_T5}[kind]
    return bite(InstructBLIP(replace(RECIPE.config, language=language, asks=asks)), seed, 0.1)


def collate(tokenizer: Tokenizer, model: nn.Module, kind: str = "decoder") -> Collate:
    return Collate(tokenizer, FORMATS[kind], Transform(48), model.reads, LONG)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def asked(question: str, answer: str = "red", seed: int = 0, frames: int = 0) -> Sample:
    shown = tuple(picture(10 * seed + i) for i in range(frames)) if frames else picture(seed)
    return Sample(f"{question}/{seed}", (shown,), turns=(Turn(f"<image>\n{question}", answer),))


ASKED = [asked("what colour is the square in the top left?", "red", 1), asked("caption:", "a large blue star in the middle", 2),
         asked("is it true? the star is above the circle.", "no", 3)]


# --- who is told the instruction ---

def found(model: InstructBLIP, batch: dict) -> Tensor:
    with torch.no_grad():
        return model.queries(batch["images"], batch.get("qformer_input_ids"), batch.get("qformer_attention_mask"))


def test_another_instruction_brings_back_something_else_unless_nobody_tells_the_queries(tokenizer):
    """The same picture twice. Without `asks` to the bit the same, whatever the language model is asked."""
    samples = [replace(ASKED[0], images=ASKED[1].images), ASKED[1]]
    for asks in (True, False):
        model = sharp(asks=asks)
        batch = collate(tokenizer, model).teach(samples, Random(0))
        assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])
        assert {name for name in batch if "qformer" in name} == ({"qformer_input_ids", "qformer_attention_mask"} if asks else set())
        one, other = found(model, batch)
        assert (one - other).abs().max() > 0.01 if asks else torch.equal(one, other)


def test_padding_of_the_instruction_changes_nothing(tokenizer):
    model = sharp()
    batch = collate(tokenizer, model).ask(ASKED)
    ids, mask = batch["qformer_input_ids"], batch["qformer_attention_mask"]
    assert len(set(mask.sum(dim=1).tolist())) == 3
    more = {"qformer_input_ids": torch.cat([ids.masked_fill(~mask, 17), torch.full((3, 9), 23)], dim=1),
            "qformer_attention_mask": torch.cat([mask, torch.zeros(3, 9, dtype=torch.bool)], dim=1)}
    close(found(model, batch | more), found(model, batch), 1e-6)
    for b, sample in enumerate(ASKED):
        close(found(model, collate(tokenizer, model).ask([sample]))[0], found(model, batch)[b], 1e-5)


@EACH
@pytest.mark.parametrize("frames", [0, 1, 3])
def test_only_what_the_queries_say_reaches_the_language_model(tokenizer, monkeypatch, kind, frames):
    """Q places, or Q for each frame, however long the instruction is."""
    model, read = sharp(kind), []
    inner = model.language.read
    monkeypatch.setattr(model.language, "read", lambda mask, labels, inputs_embeds: read.append(inputs_embeds) or inner(mask, labels, inputs_embeds=inputs_embeds))
    for question in ("what?", "what colour is the square, and what colour is the star above it?"):
        batch = collate(tokenizer, model, kind).teach([asked(question, seed=4, frames=frames)], Random(0))
        with torch.no_grad():
            model.losses(batch)
            F = max(1, frames)
            prefix = model.prefix_of(batch)
            assert prefix.shape == (1, F * Q, model.config.language.width)
            want = torch.cat([prefix, model.language.embedding(batch["input_ids"])], dim=1)
        assert torch.equal(read[-1], want)
    short, long = read
    assert long.shape[1] > short.shape[1]


def test_what_reaches_no_loss_has_no_gradient(tokenizer):
    """Not the frozen parts, and not what the last layer makes of the instruction; all other layers' text halves have one."""
    model = sharp()
    trained = freeze(model, STAGE.trains)
    assert not any(name.startswith(model.unheard) for name in trained)
    for part in model.unheard:  # if they were not left out by name
        model.get_submodule(part).requires_grad_(True)
    total, count = model.losses(collate(tokenizer, model).teach(ASKED, Random(0)))["lm"]
    (total / count).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    last = f"qformer.layers.{RECIPE.config.qformer.text.layers - 1}"
    halves = {name for name, _ in model.named_parameters() if ".feedforward." in name and name.startswith("qformer")}
    assert halves - reached == {name for name in halves if name.startswith(last)} and len(halves) == 16
    assert reached == set(trained) and not {name for name in reached if name.startswith(("vision.", "language."))}


# --- where labels begin ---

def test_labels_begin_where_each_instruction_ends(tokenizer):
    """<s> instruction response </s>, one straight behind the other, padding after all; only response and </s> are learned."""
    batch = collate(tokenizer, sharp()).teach(ASKED, Random(0))
    begins = []
    for b, sample in enumerate(ASKED):
        [turn] = sample.turns
        said = [*tokenizer.encode(f" {turn.answer}"), tokenizer.eos_id]
        begin = 1 + len(tokenizer.encode(turn.question.removeprefix("<image>\n")))
        end, labels = begin + len(said), batch["labels"][b]
        assert (labels != -100).nonzero()[:, 0].tolist() == list(range(begin, end))
        assert labels[begin:end].tolist() == batch["input_ids"][b, begin:end].tolist() == said
        assert batch["input_ids"][b, 0] == tokenizer.bos_id
        assert batch["attention_mask"][b].tolist() == [True] * end + [False] * (len(labels) - end)
        begins.append(begin)
    assert len(set(begins)) == 3


@EACH
def test_of_a_long_instruction_both_readers_keep_the_end(tokenizer, kind):
    """What is read on the picture stands first, and what is asked last (§2.1, App. C)."""
    question = f"ocr tokens: {' '.join(map(str, range(500)))}. what colour is the star?"
    model, sample = sharp(kind), asked(question, "blue")
    taught, prompt = collate(tokenizer, model, kind).teach([sample], Random(0)), collate(tokenizer, model, kind).ask([sample])
    said = [*tokenizer.encode(" blue"), tokenizer.eos_id]
    ids = prompt["input_ids"][0].tolist()
    assert len(ids) == 128 and taught["input_ids"][0].tolist() == (ids + said if kind == "decoder" else ids)
    assert taught["labels"][0].tolist() == ([-100] * 128 + said if kind == "decoder" else said)
    text = tokenizer.decode(ids, specials=True)
    assert text.endswith("499. what colour is the star?" + "</s>" * (kind == "t5")) and "ocr" not in text
    assert (ids[0] == tokenizer.bos_id) == (kind == "decoder")
    for batch in (taught, prompt):
        heard = batch["qformer_input_ids"][0].tolist()
        assert len(heard) == model.reads.question == 64 and (heard[0], heard[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(heard[1:-1]).endswith("499. what colour is the star?")
        assert tokenizer.encode(question)[-62:] == heard[1:-1]


# --- clips ---

@pytest.mark.parametrize("length", [1, 2, 4, 5, 9, 30])
def test_frames_are_evenly_spread(length):
    """The first and the last among them, and the steps between them differ by one at most."""
    chosen = spread(range(length), FRAMES)
    assert chosen[0] == 0 and chosen[-1] == length - 1 and len(chosen) == min(length, FRAMES)
    steps = {b - a for a, b in pairwise(chosen)}
    assert not steps or max(steps) - min(steps) <= 1 and min(steps) >= 1


@EACH
def test_pictures_and_clips_of_one_batch_are_what_each_is_alone(tokenizer, kind):
    """Losses, next words and answers; a picture is a clip of one frame."""
    model = sharp(kind)
    maker = collate(tokenizer, model, kind)
    samples = [ASKED[0], asked("which way does the star move?", "left", 5, frames=3), ASKED[1], asked("what moves?", "the star", 6, frames=2)]
    batch = maker.ask(samples)
    assert batch["images"].shape == (4, 3, 3, 48, 48)
    assert batch["frames"].tolist() == [[False, False, True], [True] * 3, [False, False, True], [False, True, True]]
    with torch.no_grad():
        together, _ = model.prefill(batch)
        sums = [model.losses(maker.teach([sample], Random(0)))["lm"] for sample in samples]
        total, count = model.losses(maker.teach(samples, Random(0)))["lm"]
        for b, sample in enumerate(samples):
            close(model.prefill(maker.ask([sample]))[0][0], together[b])
    assert together.std() > 0.1
    close(total / count, sum(each for each, _ in sums) / sum(n for _, n in sums))
    said = model.generate(batch, 5, [])
    assert said.tolist() == [model.generate(maker.ask([sample]), 5, [])[0].tolist() for sample in samples]


def test_all_frames_of_a_clip_are_cropped_and_flipped_alike(tokenizer):
    """Frames that are equal stay equal, while each time the clip is met it is another cut of them."""
    augmented = replace(collate(tokenizer, sharp()), transform=Transform(48, augment=True))
    cuts = [augmented.films([(picture(3),) * 4], Random(seed))["images"][0] for seed in range(4)]
    assert all(torch.equal(frame, cut[0]) for cut in cuts for frame in cut)
    assert not any(torch.equal(a, b) for a, b in combinations(cuts, 2))


def test_all_frames_are_looked_at_and_their_order_counts(tokenizer):
    model = sharp()
    sample = asked("which way?", "left", 7, frames=4)
    [clip] = sample.images
    shown = [clip, (*clip[:1], picture(99), *clip[2:]), clip[::-1]]
    one, changed, turned = (found(model, collate(tokenizer, model).ask([replace(sample, images=(frames,))]))[0] for frames in shown)
    same = [torch.equal(a, b) for a, b in zip(one.unflatten(0, (4, Q)), changed.unflatten(0, (4, Q)))]
    assert same == [True, False, True, True], "each frame by itself"
    close(turned.unflatten(0, (4, Q)).flip(0), one.unflatten(0, (4, Q)), 1e-5)
    assert (turned - one).abs().max() > 0.01


# --- ranking ---

AMONG = ("red", "a large blue star", "no")


@EACH
def test_a_candidates_score_is_the_log_probability_of_its_tokens(tokenizer, kind):
    """By hand, from the logits of instruction and candidate together; a T5's candidates end with </s> (LAVIS)."""
    model = sharp(kind)
    stage = replace(STAGE, format=FORMATS[kind])
    pupil = Pupil(model, replace(RECIPE, vocab=1024), stage, tokenizer, "cpu")
    scores, means = pupil.scores(ASKED, AMONG), pupil.scores(ASKED, AMONG, mean=True)
    for b, sample in enumerate(ASKED):
        batch = pupil.read([sample])
        for c, candidate in enumerate(AMONG):
            said = tokenizer.encode(f" {candidate}") + [tokenizer.eos_id] * (kind == "t5")
            rows = {"images": batch["images"], **{name: batch[name] for name in ("qformer_input_ids", "qformer_attention_mask")}}
            ids = batch["input_ids"] if kind == "t5" else torch.cat([batch["input_ids"], torch.tensor([said])], dim=1)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool),
                               labels=torch.tensor([said]) if kind == "t5" else None, **rows).logits
            log_p = (logits[0, :-1] if kind == "t5" else logits[0, -1 - len(said):-1]).log_softmax(dim=-1)
            want = sum(log_p[i, token] for i, token in enumerate(said))
            close(scores[b, c], want, 1e-4)
            close(means[b, c], want / len(said), 1e-4)
    best = [AMONG[i] for i in scores.argmax(dim=1)], [AMONG[i] for i in means.argmax(dim=1)]
    assert (pupil.best(ASKED, AMONG), pupil.best(ASKED, AMONG, mean=True)) == best


class Says(nn.Module):
    """Finds the answers that begin with its favourite word the likeliest."""

    def __init__(self, tokenizer: Tokenizer, favourites: dict[str, float]):
        super().__init__()
        self.reads, self.logits = Reads("conversations"), torch.zeros(1024)
        for word, logit in favourites.items():
            self.logits[tokenizer.encode(f" {word}")[0]] = logit

    def prefill(self, batch: dict) -> tuple[Tensor, KVCache]:
        return self.logits.expand(len(batch["input_ids"]), -1), KVCache()

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        return torch.zeros(*ids.shape, 1024), cache


@pytest.mark.parametrize(("favourites", "among", "best"), [
    ({"true": 9, "no": 5}, ("yes", "no"), "yes"), ({"false": 9, "yes": 5}, ("yes", "no"), "no"),
    ({"false": 9, "yes": 5}, ("no", "yes"), "no"), ({"no": 9, "true": 5}, ("yes", "no"), "no"),
    ({"true": 9, "no": 5}, ("no", "yes", "red"), "no"), ({"true": 9, "blue": 5}, ("red", "blue"), "blue")])
def test_yes_and_no_may_be_said_in_several_ways(favourites, among, best):
    """§2.5: the likelier of yes and true counts, but only where nothing else is to choose from."""
    words = Tokenizer.train(["is it? yes true no false red blue"] * 9, 400)
    pupil = Pupil(Says(words, favourites), RECIPE, STAGE, words, "cpu")
    assert pupil.best(ASKED[:1], among) == [best]


# --- a model without `asks` ---

def test_a_model_that_is_blind_to_the_instruction_is_not_told_it():
    images, ids, mask = randn(2, 3, 48, 48), random_ids(2, 5, 1), pad_mask([5, 3], "right", 5)
    with pytest.raises(UserError, match="reads the question too: give qformer_input_ids"):
        sharp()(images, ids, mask)
    with pytest.raises(UserError, match="reads no question: leave out"):
        sharp(asks=False)(images, ids, mask, qformer_input_ids=ids, qformer_attention_mask=mask)
