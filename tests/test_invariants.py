"""What must hold for every model, whatever it is made of. A further model adds one entry to CASES.

An example is a text with its pictures; a case knows how to build its model, what its logits are, and whether a prompt
and its answer are one sequence or two. All else is the same for all: who sees what, padding, caches, learning ten
examples by heart, frozen parts; in test_two_processes.py, two processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from tools import bite, randn
from torch import Tensor, nn

from nanovlm import generation, masks
from nanovlm.attention import KVCache
from nanovlm.bert import BertConfig
from nanovlm.decoder import llama, opt
from nanovlm.momentum import MomentumConfig
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers import blip, blip2
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.papers.blip2 import BLIP2, BLIP2Config
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA, LLaVAConfig
from nanovlm.perceiver_resampler import ResamplerConfig
from nanovlm.qformer import QFormerConfig
from nanovlm.recipes.stage import Stage
from nanovlm.t5 import T5Config
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.vit import clip_vit, imagenet_vit

PAD, STOP, IMAGE, V = 0, 2, 3, 29
SIZE, N, QUERIES = 12, 9, 5  # pictures of 3 × 3 patches
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    stages: tuple[tuple[str, ...], ...]  # what learns, stage by stage; in the last enough to learn by heart
    inputs: tuple[str, ...]  # the names of a batch that `forward` and `generate` take
    image_places: int | None  # positions that a picture takes in the text, 0 if it stands beside it; None: the model reads no pictures
    logits: Callable[[nn.Module, dict, str], tuple[Tensor, Tensor]]  # of a batch: (B, L, V), and which are real (B, L)
    one_first: bool = False  # one picture before each text, not where a mark stands
    two: bool = False  # the prompt is read by an encoder, the answer stands in the labels alone
    pages: bool = False  # pictures stand in the row of their page: (B, M, F, 3, SIZE, SIZE)
    opens: bool = False  # the model puts a token of its own in the place of the first
    std: float = 0.3  # of the weights that bite


def build_llava() -> nn.Module:
    vision = clip_vit(image_size=SIZE, patch=4, width=26, layers=3, heads=2)
    return LLaVA(LLaVAConfig(vision, llama(V, width=40, layers=2, heads=5, ffn=44), image_token_id=IMAGE))


def llava_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    images, ids, mask = batch["images"], batch["input_ids"], batch["attention_mask"]
    return model(images, ids, mask, pad=side).logits, model.splice(ids, mask, images, pad=side)[1]


def text_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    return model(batch["input_ids"], batch["attention_mask"]).logits, batch["attention_mask"]


def blip2_config(text: int) -> BLIP2Config:
    vision = replace(clip_vit(image_size=SIZE, patch=4, width=26, layers=2, heads=2), final_norm=False)
    qformer = QFormerConfig(BertConfig(V, 24, 2, 3, 34, max_positions=text, dropout=0.0), QUERIES, 26)
    return BLIP2Config(vision, qformer, llama(V, width=40, layers=2, heads=5, ffn=44), embedding=14, decode_id=1)


T5_SIZES = T5Config(V, 40, 2, 5, 7, 44, buckets=8, max_distance=12)


def build_blip2(asks: bool = False, kind: type = BLIP2, **changes) -> nn.Module:
    return kind(replace(blip2_config(text=19 if asks else 1), asks=asks, **changes))


def blip2_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    mask, asked = batch["attention_mask"], {name: batch[name] for name in QUESTION if name in batch}
    return model(batch["images"], batch["input_ids"], mask, **asked).logits, masks.with_queries(QUERIES, mask)


def build_blip(**changes) -> nn.Module:
    """Without changes the captioner."""
    text = BertConfig(V, 40, 2, 5, 44, max_positions=19, dropout=0.0, image_width=26)
    config = BLIPConfig(imagenet_vit(SIZE, 4, 26, 2, 2), text, 14, decode_id=1, encode_id=2, tasks=("lm",), smoothing=0.0,
                        momentum=MomentumConfig(7, 0.9, ramp=2))
    return BLIP(replace(config, **changes))


def blip_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    """Padded on the right as it learns, on the left as it is asked."""
    ids, mask, tokens = batch["input_ids"], batch["attention_mask"], model.encode_image(batch["images"])
    if side == "right":
        return model.word_head.logits(model.write(tokens, ids, mask), model.text_decoder.embeddings.words), mask
    cache = KVCache()
    cache.state["context"] = tokens
    return blip.read_on(model.text_decoder, model.word_head, blip.opened(ids, mask, 1), mask, cache), mask


def answer_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    """After <start>, then after each token of the answer."""
    inputs = batch["input_ids"], batch["attention_mask"]
    if isinstance(model, (BLIP2, InstructBLIP)):
        hidden, learned = blip2.read(model.language, model.prefix_of(batch), *inputs, batch["labels"])
    else:
        hidden, learned = model.language.read(inputs[1], batch["labels"], inputs[0])
    real = learned != -100
    real[:, 0] = True
    return model.language.logits(hidden), real


def build_flamingo() -> nn.Module:
    vision = NFNetConfig(SIZE, (1, 1), widths=(8, 16), strides=(1, 2), stem=((8, 2),), group_width=4, final=0)  # 3 × 3 cells
    return Flamingo(FlamingoConfig(vision, ResamplerConfig(16, 2, 2, latents=QUERIES, frames=2), llama(V, 40, 2, 5, 44), IMAGE, STOP))


def flamingo_logits(model: nn.Module, batch: dict, side: str) -> tuple[Tensor, Tensor]:
    return model(batch["images"], batch["frames"], batch["input_ids"], batch["attention_mask"]).logits, batch["attention_mask"]


TEXT = ("input_ids", "attention_mask")
QUESTION = ("qformer_input_ids", "qformer_attention_mask")  # here always the words that the language model reads too
BRIDGE = ("vision_norm", "qformer", "projection")
WRITES = ("text_decoder", "word_head")
GATED = ("resampler", "gated_xattn", "tags")
CASES = [
    Case("llava", build_llava, (("projector",), ("projector", "language")), ("images", *TEXT), N, llava_logits),
    Case("blip2", build_blip2, (BRIDGE, (*BRIDGE, "language")), ("images", *TEXT), QUERIES, blip2_logits, one_first=True),
    Case("blip2 asked", lambda: build_blip2(asks=True), (("vision", *BRIDGE), ("vision", *BRIDGE, "language")),
         ("images", *TEXT, *QUESTION), QUERIES, blip2_logits, one_first=True, std=0.2),
    Case("instructblip", lambda: build_blip2(True, InstructBLIP), (BRIDGE, (*BRIDGE, "language")), ("images", *TEXT, *QUESTION), QUERIES, blip2_logits,
         one_first=True, std=0.2),
    Case("blip", build_blip, (WRITES, ("vision", *WRITES)), ("images", *TEXT), 0, blip_logits, one_first=True, opens=True,
         std=0.15),
    Case("flamingo", build_flamingo, (GATED, (*GATED, "vision", "language")), ("images", "frames", *TEXT), 1, flamingo_logits, pages=True,
         std=0.25),
    Case("llama", lambda: LanguageModel(llama(V, 40, 2, 5, 44)), (("language",),), TEXT, None, text_logits),
    Case("opt", lambda: LanguageModel(opt(V, 40, 2, 5, 44)), (("language",),), TEXT, None, text_logits),
    # nothing divides T5's scores: at 0.3 they are so sharp that every rounding shows
    Case("t5", lambda: LanguageModel(T5_SIZES), (("language.encoder",), ("language",)), TEXT, None, answer_logits, two=True,
         std=0.2),
    Case("blip2 on t5", lambda: build_blip2(language=T5_SIZES), (BRIDGE, (*BRIDGE, "language")), ("images", *TEXT), QUERIES,
         answer_logits, one_first=True, two=True, std=0.2),
    Case("instructblip on t5", lambda: build_blip2(True, InstructBLIP, language=T5_SIZES), (BRIDGE, (*BRIDGE, "language")),
         ("images", *TEXT, *QUESTION), QUERIES, answer_logits, one_first=True, two=True, std=0.15),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
image_cases = pytest.mark.parametrize("case", [case for case in CASES if case.image_places is not None], ids=lambda case: case.name)


# --- examples and batches ---

@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]  # IMAGE where a picture stands
    images: Tensor  # (number of pictures, 3, SIZE, SIZE)
    answer: tuple[int, ...]  # what is learned; its last token is STOP


def examples(case: Case, count: int = 10, seed: int = 0) -> list[Example]:
    """Six that ask the same and differ by the picture alone; then, in turn, two pictures and none."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, V, (n,), generator=g).tolist())

    first, second, third = words(3)
    made = []
    for i in range(count):
        ids, pictures = words(3 + i % 4), 0
        if case.one_first:
            ids, pictures = (first, second, third) if i < 6 else ids, 1
        elif case.image_places is not None and i < 6:
            ids = (first, IMAGE, second, third)
        elif case.image_places is not None and i % 2 == 0:
            ids = (ids[0], IMAGE, *ids[1:], IMAGE, first)
        images = torch.randn(pictures or ids.count(IMAGE), 3, SIZE, SIZE, generator=g)
        made.append(Example(ids, images, (*words(1 + i % 4), STOP)))
    return made


def collate(case: Case, rows: list[Example], side: str) -> dict:
    """Prompts and answers, padded on one side; only answers are learned."""
    if case.two:
        prompt = collate(replace(case, two=False), prompts(rows), side)
        longest = max(len(row.answer) for row in rows)
        answers = [[*row.answer, *[-100] * (longest - len(row.answer))] for row in rows]
        return {**prompt, "labels": torch.tensor(answers, dtype=torch.long)}
    longest = max(len(row.ids) + len(row.answer) for row in rows)
    ids, labels = torch.full((len(rows), longest), PAD), torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        text = torch.tensor(row.ids + row.answer)
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[i, place], mask[i, place] = text, True
        labels[i, place] = text.masked_fill(torch.arange(len(text)) < len(row.ids), -100)
    batch = {**pictures(case, rows), "input_ids": ids, "attention_mask": mask, "labels": labels}
    if QUESTION[0] in case.inputs:
        longest = max(len(row.ids) for row in rows)
        asked = torch.tensor([[*row.ids, *[PAD] * (longest - len(row.ids))] for row in rows])
        batch |= dict(zip(QUESTION, (asked, asked != PAD), strict=True))
    return batch


def pictures(case: Case, rows: list[Example]) -> dict:
    if not case.pages:
        return {"images": torch.cat([row.images for row in rows])}
    frames = torch.tensor([[int(m < len(row.images)) for m in range(2)] for row in rows])
    images = torch.zeros(len(rows), 2, 1, 3, SIZE, SIZE)
    images[frames > 0] = torch.cat([row.images for row in rows])[:, None]
    return {"images": images, "frames": frames}


def prompts(rows: list[Example]) -> list[Example]:
    return [replace(row, answer=()) for row in rows]


def generate(case: Case, model: nn.Module, rows: list[Example], new: int, stop: list[int], **how) -> list[list[int]]:
    batch = collate(case, prompts(rows), "right" if case.two else "left")
    return model.generate({name: batch[name] for name in case.inputs}, new, stop, **how).tolist()


def sharp(case: Case, seed: int = 0) -> nn.Module:
    model = bite(case.build(), seed, case.std)
    for name, p in model.named_parameters():
        if name.endswith((".gain", "attention_gate")):  # small ones of an NFNet make all pictures alike, a gate nearly shut keeps them out
            nn.init.ones_(p)
    return model


# --- who sees what ---

def perturbations(case: Case, rows: list[Example], side: str) -> Iterator[tuple[str, dict, int, int]]:
    """(what, changed batch, row, first place of the row that may notice; none if −1)."""
    batch = collate(case, rows, side)
    for row in (0, 7):
        for t in (0, 2, len(rows[row].ids)):
            if case.two:  # a word that is read shows everywhere, the answer's first from the second state on
                where, column = ("input_ids", batch["attention_mask"][row].nonzero()[t]) if t <= 2 else ("labels", 0)
                changed = {**batch, where: batch[where].clone()}
                changed[where][row, column] = 4 + (changed[where][row, column] - 3) % (V - 4)
                yield f"word {t} of row {row}", changed, row, 0 if t <= 2 else 1
                continue
            if t < len(rows[row].ids) and rows[row].ids[t] == IMAGE:
                continue
            changed = {**batch, "input_ids": batch["input_ids"].clone()}
            column = batch["attention_mask"][row].nonzero()[t]
            changed["input_ids"][row, column] = 4 + (changed["input_ids"][row, column] - 3) % (V - 4)
            yield f"word {t} of row {row}", changed, row, -1 if case.opens and t == 0 else place(case, rows[row].ids, t)
    for row in (2, 6, 8) if case.image_places is not None else ():
        before = sum(len(other.images) for other in rows[:row])
        for k in range(len(rows[row].images)):
            changed = {**batch, "images": batch["images"].clone()}
            changed["images"][(row, k) if case.pages else before + k] += randn(3, SIZE, SIZE, seed=row)
            marks = [i for i, token in enumerate(rows[row].ids) if token == IMAGE]
            first = 0 if case.one_first else place(case, rows[row].ids, marks[k])
            yield f"picture {k} of row {row}", changed, row, first
    padding = {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], 17)}
    yield "padding", padding, 0, -1


def place(case: Case, ids: tuple[int, ...], t: int) -> int:
    """Where token t stands once the pictures before it have their places."""
    return t + (case.image_places if case.one_first else (case.image_places - 1) * ids[:t].count(IMAGE)) if case.image_places is not None else t


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_may_not_be_seen_changes_no_bit_and_what_may_be_seen_does(case, side):
    model, rows = sharp(case), examples(case)
    seen = 0
    with torch.no_grad():
        logits, real = case.logits(model, collate(case, rows, side), side)
        for what, changed, row, first in perturbations(case, rows, side):
            moved = (case.logits(model, changed, side)[0] - logits).abs().amax(dim=-1)
            may = torch.zeros_like(real)
            if first >= 0:
                may[row, real[row].nonzero()[first:, 0]] = True
            assert not moved[real & ~may].any(), f"{what} shows where it should not"
            assert (moved[may] > 1e-5).all(), f"{what} does not show where it should"
            seen += int(may.any())
    assert seen >= 6


@image_cases
def test_the_image_matters(case):
    """Another picture moves the answer's probabilities more than rounding could, by far."""
    model, rows = sharp(case), examples(case)[:6]
    batch = collate(case, rows, "right")
    with torch.no_grad():
        right, real = case.logits(model, batch, "right")
        exchanged, _ = case.logits(model, {**batch, "images": batch["images"].roll(1, dims=0)}, "right")
    first = 0 if case.two else place(case, rows[0].ids, len(rows[0].ids)) - 1
    learned = real[:, 1:] & (torch.arange(real.shape[1] - 1) >= first)
    moved = (exchanged.log_softmax(dim=-1) - right.log_softmax(dim=-1))[:, :-1][learned]
    assert moved.abs().mean() > 0.1


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(case, side):
    model, rows = sharp(case, 1), examples(case, seed=1)
    with torch.no_grad():
        together, real = case.logits(model, collate(case, rows, side), side)
        for i, row in enumerate(rows):
            alone, all_real = case.logits(model, collate(case, [row], side), side)
            assert all_real.all()
            # padding between a picture and its text moves them apart for T5, which counts by index
            apart = case.two and case.one_first and side == "left" and len(row.ids) < max(len(r.ids) for r in rows)
            assert apart != torch.allclose(together[i][real[i]], alone[0], rtol=0, atol=1e-5)
    said = generate(case, model, rows, 5, [])
    assert said == [generate(case, model, [row], 5, [])[0] for row in rows]
    assert len(set(map(tuple, said))) > 5


# --- generation ---

@every_case
def test_cache_equals_no_cache(case):
    """Token by token with the cache = the whole text anew for every token; rows that stop are filled up."""
    model, rows = sharp(case, 2), examples(case, seed=2)
    grown = prompts(rows)
    with torch.no_grad():
        for _ in range(6):
            side = "right" if case.two else "left"
            best = case.logits(model, collate(case, grown, side), side)[0][:, -1].argmax(dim=-1)
            grown = [replace(row, answer=(*row.answer, int(token))) for row, token in zip(grown, best, strict=True)]
    assert generate(case, model, rows, 6, []) == [list(row.answer) for row in grown]
    stop = grown[0].answer[2]
    cut = [row.answer[:row.answer.index(stop) + 1] if stop in row.answer else row.answer for row in grown]
    longest = max(map(len, cut))
    assert len(set(map(len, cut))) > 1
    assert generate(case, model, rows, 6, [stop]) == [[*text, *[PAD] * (longest - len(text))] for text in cut]


@every_case
def test_a_beam_of_one_is_greedy(case, monkeypatch):
    model, rows = sharp(case, 3), examples(case, seed=3)
    greedy = generate(case, model, rows, 6, [])
    assert generate(case, model, rows, 6, [], beams=1) == greedy
    assert generate(case, model, rows, 6, [], beams=3) != greedy

    def one_beam(prefill, step, max_new_tokens, stop, **how):
        return generation.beam_search(prefill, step, max_new_tokens, stop, PAD, beams=1)

    monkeypatch.setattr(generation, "generate", torch.no_grad()(one_beam))
    assert generate(case, model, rows, 6, []) == greedy


# --- learning ---

def train(model: nn.Module, trains: tuple[str, ...], batches: list[dict], lr: float) -> list[float]:
    """Through the package's one loop; → the losses."""
    freeze(model, trains)
    stage = Stage("heart", trains, {"talk": 1}, steps=len(batches), batch_size=10, lr=lr)
    reports = train_stage(model, stage, batches, make_optimiser(model, stage), CPU)
    return [report.losses["lm"] for report in reports]


@every_case
def test_learns_ten_examples_by_heart(case):
    """Greedy answers exact; where the same is asked of six pictures, the pictures alone tell the answers apart."""
    torch.manual_seed(0)
    model, rows = case.build(), examples(case)
    losses = train(model, case.stages[-1], [collate(case, rows, "right")] * 120, lr=5e-3)
    assert losses[-1] < 0.02 < losses[0]
    model.eval()
    longest = max(len(row.answer) for row in rows)
    answers = [[*row.answer, *[PAD] * (longest - len(row.answer))] for row in rows]
    assert generate(case, model, rows, 8, [STOP]) == answers
    if case.image_places is not None:
        wrong = [replace(row, images=other.images) for row, other in zip(rows[:6], rows[1:6] + rows[:1], strict=True)]
        assert generate(case, model, wrong, 8, [STOP]) == [answers[(i + 1) % 6][:longest] for i in range(6)]


@every_case
def test_frozen_stays_frozen(case):
    """To the bit, in every stage; whatever learns has a gradient, and moves (where its last block is read at all)."""
    torch.manual_seed(1)
    model = case.build()
    for trains in case.stages:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, trains, [collate(case, examples(case), "right")] * 3, lr=1e-2)
        for name, p in model.named_parameters():
            learns = name.startswith(trains)
            if learns and name.startswith(tuple(model.unheard)):  # in train(), but nothing comes of it
                assert not p.requires_grad and torch.equal(p, before[name])
                continue
            assert p.requires_grad == learns, name
            assert "." not in name or model.get_submodule(name.rpartition(".")[0]).training == learns, name
            assert torch.equal(p, before[name]) != learns, name
