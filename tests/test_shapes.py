"""The shape comments of the package are checked while tiny models run; all dimensions differ, so a swap cannot hide."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from shape_checker import ShapeChecker, shape_comments
from torch import nn

import nanovlm
from nanovlm import masks, metrics, plots, recipes
from nanovlm.attention import Attention, KVCache
from nanovlm.bert import Bert, BertConfig
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.sample import Sample
from nanovlm.data.transforms import Transform
from nanovlm.decoder import clip_text, llama, opt
from nanovlm.evaluate import fewshot, retrieval
from nanovlm.evaluate.pupil import Pupil
from nanovlm.generation import score_candidates
from nanovlm.momentum import MomentumConfig
from nanovlm.nfnet import NFNetConfig
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.papers.blip2 import BLIP2, BLIP2Config, BLIP2Stage1
from nanovlm.papers.blip_downstream import BLIPAnswerer, BLIPReasoner
from nanovlm.papers.clip import CLIP, CLIPConfig
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA, LLaVAConfig
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.perceiver_resampler import ResamplerConfig
from nanovlm.qformer import QFormerConfig
from nanovlm.t5 import T5Config
from nanovlm.tiling import hd_tiling
from nanovlm.tokenizer import Tokenizer
from nanovlm.vit import clip_vit, imagenet_vit
from nanovlm.world.datasets import Scenes

PACKAGE = Path(nanovlm.__file__).parent
B, T, K, VOCAB = 3, 11, 5, 43
TOKENIZER = Tokenizer([])  # bytes and special tokens
VISION = clip_vit(image_size=28, patch=4, width=26, layers=3, heads=2)  # 49 image tokens
WIDE = torch.zeros(2, 3, 20, 36)  # another resolution: 5 × 9 patches


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape)


def answer(model: nn.Module, batch: dict, **how) -> None:
    """In words of its own, and by the best of two."""
    model.generate(batch, 4, [2], **how)
    score_candidates(lambda: model.prefill(batch), model.step, [[5], [6, 7, 8]])


def run_clip() -> None:
    model = CLIP(CLIPConfig(VISION, clip_text(VOCAB, width=34, layers=2, heads=2, max_positions=19), embedding=17))
    mask = torch.ones(B, T, dtype=torch.bool)
    batch = {"images": torch.randn(B, 3, 28, 28), "input_ids": ids(B, T), "attention_mask": mask,
             "text_group": torch.arange(B), "image_group": torch.arange(B), "negative_ids": ids(B, K, T),
             "negative_mask": torch.ones(B, K, T, dtype=torch.bool)}
    model.losses(batch)
    model.score(batch["images"], ids(7, T), torch.ones(7, T, dtype=torch.bool))
    CLIP(CLIPConfig(imagenet_vit(28, 4, 26, 1, 2), model.config.text, 17)).vision(WIDE, maps=[])
    nfnet = NFNetConfig(28, (1, 2), (12, 28), (1, 2), ((6, 2),), group_width=2, final=38, classes=7)
    flamingos = CLIP(CLIPConfig(nfnet, BertConfig(VOCAB, 34, 2, 2, 41), 17, pool="mean", smoothing=0.1))
    flamingos.losses(batch)
    flamingos.vision.logits(WIDE)
    flamingos.vision(WIDE)


def run_language_model() -> None:
    for config in (llama(VOCAB, width=30, layers=2, heads=3, ffn=37, max_positions=64), opt(VOCAB, 30, 2, 3, 37, 64)):
        model = LanguageModel(config)
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[0, :4] = False
        model(ids(B, T), mask, labels=ids(B, T)).loss.backward()
        model.losses({"input_ids": ids(B, T), "attention_mask": mask, "labels": ids(B, T)})
        answer(model, {"input_ids": ids(B, T), "attention_mask": mask}, beams=7)


def run_encoder_decoder() -> None:
    mask = torch.ones(B, 13, dtype=torch.bool)
    mask[0, :4] = False
    for tied in (False, True):
        model = LanguageModel(T5Config(VOCAB, 30, 2, 4, 6, 37, buckets=8, max_distance=9, tied=tied))
        model(ids(B, 13), mask, labels=ids(B, T)).loss.backward()
        model.losses({"input_ids": ids(B, 13), "attention_mask": mask, "labels": ids(B, T)})
        answer(model, {"input_ids": ids(B, 13), "attention_mask": mask}, beams=7)


def run_llava() -> None:
    language = llama(VOCAB, width=30, layers=2, heads=3, ffn=37, max_positions=256)
    model = LLaVA(LLaVAConfig(VISION, language, image_token_id=3, projector_layers=2))
    input_ids, mask = ids(B, T), torch.ones(B, T, dtype=torch.bool)
    input_ids[0, 2] = input_ids[0, 5] = input_ids[2, 7] = input_ids[2, 9] = 3
    mask[1, 6:] = False
    batch = {"images": torch.randn(4, 3, 28, 28), "input_ids": input_ids, "attention_mask": mask}
    labels = torch.where(mask, input_ids, -100)
    model(**batch, labels=labels, maps=[]).loss.backward()
    model.losses(batch | {"labels": labels})
    answer(model, batch, temperature=0.7, top_k=13, top_p=0.9)
    tiled = LLaVA(replace(model.config, tiling=hd_tiling(28)))
    sizes = torch.tensor([[20, 50], [28, 28], [90, 30], [41, 70]])
    views = sum(tiled.reads.tiling.views(size) for size in sizes.tolist())
    batch |= {"images": torch.randn(views, 3, 28, 28), "image_sizes": sizes}
    tiled(**batch, labels=labels)
    answer(tiled, batch)


def run_blip2() -> None:
    text = BertConfig(261, width=34, layers=3, heads=2, ffn=37, max_positions=64, image_width=26, segments=2)
    vision, language = replace(VISION, final_norm=False), llama(VOCAB, width=30, layers=2, heads=3, ffn=37)
    config = BLIP2Config(vision, QFormerConfig(text, queries=9, image_width=26), language, embedding=17, decode_id=1)
    first, second = BLIP2Stage1(config), BLIP2(config)
    images, input_ids, mask = torch.randn(B, 3, 28, 28), ids(B, T), torch.ones(B, T, dtype=torch.bool)
    mask[1, 6:] = False
    batch = {"images": images, "input_ids": input_ids, "attention_mask": mask, "text_group": torch.arange(B),
             "image_group": torch.arange(B)}
    sum(total for total, _ in first.losses(batch).values()).backward()
    first.score(images, ids(7, T), torch.ones(7, T, dtype=torch.bool))
    answer(first, {"images": images})
    second(images, input_ids, mask, labels=torch.where(mask, input_ids, -100)).loss.backward()
    asked = BLIP2(replace(config, asks=True))
    asked(images, input_ids, mask, input_ids, qformer_input_ids=ids(B, 5), qformer_attention_mask=mask[:, :5])
    answer(asked, batch | {"qformer_input_ids": ids(B, 5), "qformer_attention_mask": mask[:, :5]})
    on_t5 = BLIP2(replace(config, language=T5Config(VOCAB, 30, 2, 3, 10, 37, buckets=8, max_distance=12)))
    on_t5(images, input_ids, mask, labels=input_ids[:, :5]).loss.backward()
    answer(on_t5, batch)
    second.losses(batch | {"labels": input_ids})
    answer(second, batch)
    Bert(text)(input_ids, masks.causal_with_padding(mask, T), torch.randn(B, 49, 26), cache=KVCache(), maps=[])
    second.qformer(second.encode_image(images))
    first.qformer(first.encode_image(images), input_ids, masks.unimodal(9, mask))
    world = Scenes(size=28)
    world.galleries = lambda: [[world.held_out("captions", index) for index in range(19)]]
    recipe = replace(recipes.get("blip2/tiny"), image_size=28)
    retrieval.measure(Pupil(first, recipe, recipe.stage("stage1"), TOKENIZER, "cpu"), world)


def run_instructblip() -> None:
    text = BertConfig(VOCAB, width=34, layers=3, heads=2, ffn=37, max_positions=64)
    language = llama(VOCAB, width=30, layers=2, heads=3, ffn=37)
    model = InstructBLIP(BLIP2Config(replace(VISION, final_norm=False), QFormerConfig(text, queries=9, image_width=26), language, asks=True))
    frames, mask = torch.ones(B, 4, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    frames[1, :2] = mask[2, 8:] = False
    batch = {"images": torch.randn(B, 4, 3, 28, 28), "frames": frames, "input_ids": ids(B, T), "attention_mask": mask,
             "qformer_input_ids": ids(B, 5), "qformer_attention_mask": mask[:, :5]}
    model(**batch, labels=ids(B, T)).loss.backward()
    answer(model, batch)


def run_blip() -> None:
    text = BertConfig(VOCAB, width=34, layers=3, heads=2, ffn=37, max_positions=64, image_width=26)
    config = BLIPConfig(imagenet_vit(28, 4, 26, 2, 2), text, 17, decode_id=1, encode_id=2, momentum=MomentumConfig(queue=23, ramp=2))
    model, input_ids, mask = BLIP(config), ids(B, T), torch.ones(B, T, dtype=torch.bool)
    mask[1, 6:] = False
    batch = {"images": torch.randn(B, 3, 28, 28), "input_ids": input_ids, "attention_mask": mask, "text_group": torch.arange(B),
             "image_group": torch.arange(B)}
    sum(total for total, _ in model.losses(batch).values()).backward()
    model.score(batch["images"], ids(7, T), torch.ones(7, T, dtype=torch.bool))
    answer(model, batch | {"attention_mask": mask.flip(1)}, beams=5)


def run_blip_downstream() -> None:
    text = BertConfig(VOCAB, width=34, layers=3, heads=2, ffn=37, max_positions=64, image_width=26)
    config = BLIPConfig(imagenet_vit(28, 4, 26, 1, 2), text, decode_id=41, encode_id=42)
    batch = {"images": torch.randn(B, 3, 28, 28), "input_ids": ids(B, T), "attention_mask": torch.ones(B, T, dtype=torch.bool)}
    answerer, reasoner = BLIPAnswerer(config), BLIPReasoner(config)
    answerer.losses(batch | {"labels": ids(B, 5)})
    answer(answerer, batch)
    answerer.rank(batch, [[5], [6, 7, 8]], 1)
    pairs = batch | {"images": torch.randn(B, 2, 3, 28, 28), "truth": torch.tensor([0, 1, 1]), "choices": ids(2, 4)}
    reasoner.losses(pairs)
    reasoner.generate(pairs, 3, [])


def run_flamingo() -> None:
    vision = NFNetConfig(28, (1, 2), widths=(12, 24), strides=(1, 2), stem=((6, 1), (8, 2)), group_width=3, final=31, classes=7)
    config = FlamingoConfig(vision, ResamplerConfig(24, 2, 3, latents=5, frames=2), llama(VOCAB, width=30, layers=2, heads=3, ffn=37), VOCAB, VOCAB + 1)
    model, input_ids, mask = Flamingo(config), ids(B, T), torch.ones(B, T, dtype=torch.bool)
    input_ids[0, 1] = input_ids[0, 6] = input_ids[2, 3] = VOCAB
    mask[1, 8:] = False
    batch = {"images": torch.randn(B, 2, 4, 3, 28, 28), "frames": torch.tensor([[4, 1], [0, 0], [2, 0]]), "input_ids": input_ids, "attention_mask": mask}
    model.train()(**batch, labels=input_ids, backwards=torch.tensor([True, False, True]), maps=[]).loss.backward()
    model.losses(batch | {"labels": input_ids, "backwards": torch.tensor([True, False, True])})
    answer(model.eval(), batch, beams=7)
    model.vision.logits(torch.randn(B, 3, 20, 36))
    eyes = CLIP(CLIPConfig(vision, BertConfig(VOCAB, width=34, layers=2, heads=2, ffn=37, max_positions=64), 17, pool="mean"))
    eyes.score(torch.randn(B, 3, 28, 28), ids(7, T), torch.ones(7, T, dtype=torch.bool))


def run_fewshot() -> None:
    recipe, picture = recipes.get("flamingo/tiny"), Image.new("RGB", (31, 17), "red")
    pupil = Pupil(recipe.build(recipe.stages[-1]), recipe, recipe.stages[-1], Tokenizer([]), "cpu")
    samples = [Sample("still", (picture,)), Sample("clip", (picture, (picture,) * 3)), Sample("other", (picture,))]
    seen = fewshot.features(pupil, samples)
    fewshot.rices(seen[0], seen, samples, 2)


def run_masked_language_model() -> None:
    model = MaskedLanguageModel(BertConfig(VOCAB, width=34, layers=2, heads=2, ffn=37, max_positions=64))
    input_ids, mask = ids(B, T), torch.ones(B, T, dtype=torch.bool)
    mask[1, 6:] = False
    labels = input_ids.masked_fill(torch.rand(B, T) > 0.4, -100)
    model(input_ids, mask, labels).loss.backward()
    model.losses({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    model.generate({"input_ids": input_ids, "attention_mask": mask, "masked": mask & (torch.arange(T) < 3)}, 2, [])


def run_the_rest() -> None:
    mask = torch.rand(5, 7, 11) > 0.5  # of the models above none passes a mask: the decoder's is a bias
    Attention(6, 3, kv_width=13)(torch.randn(5, 7, 6), torch.randn(5, 11, 13), mask=mask)
    tokenizer = Tokenizer.train(["a red cat", "a blue dog"], vocab_size=270)
    picture = Image.new("RGB", (31, 17), "red")
    pairs = [Sample("one", (picture,), caption="a red cat", negatives=("a blue cat", "a red dog"))] * 3
    Transform(13, tiling=hd_tiling(13)).views(picture)
    Collate(tokenizer, "plain", Transform(13), Reads("pairs", wrong_captions=True), max_length=30).pairs(pairs, Random(0))
    metrics.recall_at_k(torch.randn(5, 7), torch.eye(5, 7).bool(), k=2)
    figure, ax = plt.subplots()
    plots.attention_over_image(ax, picture, torch.rand(6), (2, 3))
    plt.close(figure)


@pytest.fixture(scope="module")
def checker() -> ShapeChecker:
    with ShapeChecker(sorted(PACKAGE.rglob("*.py"))) as checker:
        run_clip()
        run_language_model()
        run_encoder_decoder()
        run_llava()
        run_blip()
        run_blip2()
        run_instructblip()
        run_blip_downstream()
        run_flamingo()
        run_fewshot()
        run_masked_language_model()
        run_the_rest()
    return checker


def test_shape_comments_are_right(checker: ShapeChecker):
    assert not checker.wrong, "\n" + "\n".join(sorted(checker.wrong))


def test_shape_comments_are_executed(checker: ShapeChecker):
    every = {(path, s.first) for path, statements in checker.comments.items() for s in statements.values()}
    print(f"{len(checker.executed)} of {len(every)} shape comments executed")
    assert len(checker.executed) >= 60
    assert checker.executed == every, f"not reached by the models above: {sorted(every - checker.executed)}"


# --- the checker itself, on mistakes made on purpose ---

def mistakes(dims: list[str]) -> Iterator[list[str]]:
    """A shape comment with two neighbours exchanged, and with its last dimension lost."""
    for i in range(len(dims) - 1):
        yield dims[:i] + [dims[i + 1], dims[i]] + dims[i + 2:]
    yield dims[:-1]


def test_wrong_comments_in_attention_are_caught():
    """Each comment of Attention.forward in turn, made wrong in every way of `mistakes`, is reported at its line."""
    path = PACKAGE / "attention.py"
    attention, x, mask = Attention(6, 3, head_dim=10), torch.randn(5, 7, 6), torch.ones(5, 7, 11, dtype=torch.bool)
    source, first = inspect.getsourcelines(Attention.forward)
    lines = [line for line in shape_comments(path) if first <= line < first + len(source)]
    assert len(lines) >= 6
    for line in lines:
        for dims in mistakes(shape_comments(path)[line].dims):
            attention(x[:, :4], cache=(cache := KVCache()[0]))  # four keys that were there before: S = 11, T = 7
            with ShapeChecker([path]) as checker:
                checker.comments[str(path)][line].dims = dims
                attention(x, mask=mask, cache=cache)
            assert any(f"attention.py:{line}:" in sentence for sentence in checker.wrong), f"line {line} as {dims}"


@pytest.mark.parametrize("comment, right", [
    ("# (B, T * 2, D)", True), ("# (B, 2T, D)", True), ("# (B, T·2, D), and a word on it", True),
    ("# (B, T + 1, D)", False), ("# (B, T, D)", False), ("# (T, 2T, D)", False), ("# (B, 2T)", False),
    ("# (B, 2W, D)", True), ("# (B, 2W + 1, D)", False), ("# (B, X, X)", False), ("# (B, rows·columns, D)", True),
])
def test_comments_are_understood(tmp_path: Path, comment: str, right: bool):
    source = ("def double(x):\n    B, T, D = x.shape\n    for _ in range(2):\n"
              f"        y = x.repeat(\n            1, 2, 1)  {comment}\n    return y  # (B, 2T, D)\n")
    path = tmp_path / "double.py"
    path.write_text(source, encoding="utf-8")
    scope: dict = {}
    exec(compile(source, str(path), "exec"), scope)  # noqa: S102
    with ShapeChecker([path]) as checker:
        scope["double"](torch.zeros(3, 5, 7))
    assert len(checker.executed) == 2
    assert (not checker.wrong) == right, checker.wrong


@pytest.mark.parametrize("comment, right", [("# (B, T)", True), ("# (T, B)", False), ("# (B, 4T)", False)])
def test_a_comment_on_a_batch_is_on_each_of_its_tensors(tmp_path: Path, comment: str, right: bool):
    path = tmp_path / "batch.py"
    path.write_text(f"def make(B, T, zeros):\n    batch = {{'ids': zeros(B, T), 'n': T, 'mask': zeros(B, T)}}  {comment}\n    return batch\n",
                    encoding="utf-8")
    scope: dict = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)  # noqa: S102
    with ShapeChecker([path]) as checker:
        scope["make"](3, 5, torch.zeros)
    assert len(checker.executed) == 1
    assert len(checker.wrong) == (0 if right else 2), checker.wrong
