"""Flamingo's recipes: one stage, in which all that is new learns, between a frozen image encoder and a frozen language model.

                 vision (frozen)           resampler             gated layers          LM (frozen)
    tiny         nfnet-clip/tiny, 36       2 × 128, 8 latents    4, before each        lm/tiny-pages, 4 layers of 128
    small        nfnet-clip/small, 49      4 × 1536, 32          6, before every 2nd   lm/small
    3b           NFNet-F6, 100             6 × 1536, 64          24, before each       24 × 2048
    9b           the same                  the same              8, before every 4th   32 × 4096, see below
    80b          the same                  the same              12, before every 7th  80 × 8192

What scale changes: sizes, and how often the LM is interrupted. What it does not: what is frozen, the one loss, and that it is the
weighted sum of the losses on pages, pairs and clips.

Hyper-parameters of the published ones: App. B.1.2, Tables 4 and 5. The sizes of the last runs' batches were never told; here they
are those of the ablations (App. B.3.1): 256 pages, 512 and 512 pairs, 64 clips.

**9b.** The paper contradicts itself: Table 4 has 40 LM layers and 10 gated ones, which makes 8.9 + 2.0 G parameters, but Table 5
has 7.1 + 1.6 G. With 32 and 8 layers, counted as the paper counts, all three figures of Table 5 come out (LM 7.1, gated 1.6, total
9.3 G), so we take those.

**The language model.** Chinchilla has relative positions (Transformer-XL), which cost one more D × D map a layer; rotary ones,
which take their place here, cost nothing: 12·D²·L in place of 13·D²·L. And keys and values of the gated layers read 1,536-wide media here, which the paper seems to count
as D wide. So ours have 3.0, 8.6 and 73.6 G parameters, where 3.2, 9.3 and 80 are printed. The weights were never released.
"""

from dataclasses import replace

from nanovlm.decoder import DecoderConfig
from nanovlm.nfnet import nfnet_f
from nanovlm.papers.flamingo import Flamingo, FlamingoConfig
from nanovlm.perceiver_resampler import ResamplerConfig
from nanovlm.recipes import backbones
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tokenizer import Tokenizer

NEW = ("resampler", "gated_xattn", "tags")
TAGS = tuple(map(Tokenizer.SPECIALS.index, ("<image>", "<EOC>")))

TINY = Recipe(
    "flamingo/tiny", Flamingo,
    FlamingoConfig(backbones.TINY_NFNET, ResamplerConfig(128, layers=2, heads=4, latents=8), backbones.TINY_LANGUAGE, *TAGS),
    image_size=48, vocab=backbones.TINY_VOCAB,
    stages=(
        Stage("pages", NEW, {"named pages": 1.0, "web pages": 0.2, "page pairs": 1.0, "clips": 0.2}, mixed="losses", real="pages",
              format="pages", steps=1000, batch_size=40, accumulate=4,
              portions={"named pages": 16, "web pages": 4, "page pairs": 16, "clips": 4}, lr=1e-3, warmup=0.05,
              weight_decay=0.1, undecayed=("resampler",), max_length=128, evaluate=("fewshot", "clips"),
              init=(("vision", "nfnet-clip/tiny:vision"), ("language", "lm/tiny-pages:language")),
              on_data={"augment": True, "mixed": "samples", "accumulate": 1, "portions": {}, "batch_size": 16, "max_length": 256}),))

SMALL = Recipe(
    "flamingo/small", Flamingo,
    FlamingoConfig(nfnet_f(0, 224), ResamplerConfig(1536, layers=4, latents=32), backbones.SMALL_LANGUAGE, *TAGS, every=2),
    image_size=224, vocab=backbones.SMALL_VOCAB,
    stages=(replace(
        TINY.stages[0], steps=50_000, portions={}, batch_size=256, accumulate=8, lr=2e-4, schedule="constant", max_length=256, augment=True,
        init=(("vision", "nfnet-clip/small:vision"), ("language", "lm/small:language"))),))


def chinchilla(width: int, layers: int, heads: int) -> DecoderConfig:
    """GELU four times as wide, RMSNorm, one table for embedding and head; rotary positions for relative ones."""
    return DecoderConfig(32_000, width, layers, heads, 4 * width, 2048, activation="gelu", tied=True)


STAGE = Stage(
    "pages", NEW, {"M3W": 1.0, "ALIGN": 0.2, "LTIP": 0.2, "VTP": 0.03}, mixed="losses", real="pages", format="pages", augment=True,
    fit="pad", steps=500_000, portions={"M3W": 256, "ALIGN": 512, "LTIP": 512, "VTP": 64}, batch_size=1344, accumulate=4,
    lr=1e-4, schedule="constant", warmup=0.01, weight_decay=0.1, undecayed=("resampler",), max_length=256, evaluate=("fewshot",))


def published(name: str, language: DecoderConfig, every: int) -> Recipe:
    config = FlamingoConfig(nfnet_f(6, 320), ResamplerConfig(1536), language, language.vocab, language.vocab + 1, every)
    return Recipe(name, Flamingo, config, (STAGE,), image_size=320, vocab=language.vocab, checkpointing=True)


def tuned(base: Recipe, image_size: int, stage: Stage) -> Recipe:
    """App. B.2.2: on one task, the eyes learn too, and look closer; the language model stays frozen."""
    stage = replace(stage, trains=(*NEW, "vision.stem", "vision.blocks"), init=(*stage.init, ("", base.name)))
    return replace(base, name=f"{base.name}-vqa", image_size=image_size, stages=(stage,))


# lr, batch and steps were chosen for each task, from 3e-8 to 1e-5, and 8 or 16
VQA = Stage("vqa", NEW, {"VQAv2": 83}, format="flamingo", augment=True, fit="pad", steps=50_000, batch_size=16, lr=1e-6, schedule="exponential",
            min_lr=0.1, max_length=256, evaluate=("answers",))

PUBLISHED = (published("flamingo/3b", chinchilla(2048, 24, 16), every=1), published("flamingo/9b", chinchilla(4096, 32, 32), every=4),
             published("flamingo/80b", chinchilla(8192, 80, 64), every=7))
RECIPES = (TINY, SMALL, *PUBLISHED,
           tuned(TINY, 72, replace(VQA, data={"short": 1}, steps=600, batch_size=32, lr=3e-4, max_length=256, augment=False, fit="crop")),
           *(tuned(base, 480, VQA) for base in PUBLISHED))
