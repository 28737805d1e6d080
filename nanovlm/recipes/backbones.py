"""The backbones that the tiny recipes freeze: eyes that have seen captions, and a language model that has read.

    clip/tiny     48-pixel pictures, 16 image tokens; captions with hard negatives       → module `vision`
    nfnet-clip/tiny   the same by convolutions, 36 image tokens: Flamingo's eyes         → module `vision`
    lm/tiny       scenes that are told, and all that the six papers will ask about them  → module `language`
    lm/tiny-pages the same, and then pages on which things are given names: Flamingo's   → module `language`
    lm/tiny-t5    the same, read by an encoder and answered by a decoder                 → module `language`
    bert/tiny     captions and the same texts, of which words are hidden                 → modules `bert`, `word_head`

Trained once and shipped (weights/): the papers begin with such encoders and language models, too. With --data they are trained on
the spot, on that data. lm/tiny-t5 has learned lookups of places badly, and bert/tiny so little that it is not shipped
(experiments/README.md): BLIP's words begin at random.
"""

from dataclasses import replace

from nanovlm.bert import BERT_BASE, BertConfig
from nanovlm.decoder import clip_text, llama
from nanovlm.nfnet import NFNetConfig, nfnet_f
from nanovlm.papers.clip import CLIP, CLIPConfig
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.t5 import T5Config
from nanovlm.vit import clip_vit

TINY_VOCAB = 1024
TINY_VISION = clip_vit(image_size=48, patch=12, width=128, layers=4, heads=4)  # 16 image tokens
TINY_NFNET = NFNetConfig(image_size=48, depths=(1, 2), widths=(64, 128), strides=(1, 2), stem=((16, 2), (16, 1), (32, 2)),
                         group_width=32, final=256)  # 36 image tokens
TINY_LANGUAGE = llama(TINY_VOCAB, width=128, layers=4, heads=8, ffn=352, max_positions=512)
TINY_T5 = T5Config(TINY_VOCAB, width=96, layers=3, heads=6, head_dim=16, ffn=264, activation="geglu")

SMALL_VOCAB = 16384
SMALL_VISION = clip_vit(image_size=224, patch=16, width=384, layers=12, heads=6)  # 196 image tokens
SMALL_LANGUAGE = llama(SMALL_VOCAB, width=768, layers=12, heads=12, ffn=2048, max_positions=2048)

CLIP_PARTS = ("vision", "text", "image_projection", "text_projection", "temperature")

CLIP_TINY = Recipe(
    "clip/tiny", CLIP, CLIPConfig(TINY_VISION, clip_text(TINY_VOCAB, 64, 2, 4, max_positions=64), 96), image_size=48,
    vocab=TINY_VOCAB,
    stages=(Stage("clip", CLIP_PARTS, {"vague pairs": 1}, real="pairs", steps=6000, batch_size=64, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98),
                  max_length=64, on_data={"augment": True, "steps": 1500, "weight_decay": 0.1}),))

# As Flamingo has it (§B.1.3): both encoders mean-pooled, label smoothing, and a clip by units on the NFNet. Flamingo's λ is 0.01 too.
NFNET_TINY = Recipe(
    "nfnet-clip/tiny", CLIP,
    CLIPConfig(TINY_NFNET, BertConfig(TINY_VOCAB, width=64, layers=2, heads=4, ffn=256, max_positions=64, dropout=0.0), 96, pool="mean",
               smoothing=0.1),
    image_size=48, vocab=TINY_VOCAB,
    stages=(replace(CLIP_TINY.stages[0], name="nfnet", steps=3500, adaptive_clip={"vision": 0.01}),))

# What a language model reads before it sees: scenes that are told, and all that the six papers will ask of it about pictures.
LESSONS = ((0.03, {"told/repeat": 1}), (0.26, {"told/drills": 1}))
TOLD = {"told/talk": 30, "told/drills": 10, "told/captions": 8, "told/short": 6, "told/sentences on demand": 3, "told/letters": 7,
        "told/letter drills": 5, "told/box drills": 2, "told/captions on demand": 2, "told/regions": 2, "told/grounding": 2,
        "science texts": 2, "told/tasks": 18, "names": 8, "shots": 3}
ALONE = {name: weight for name, weight in TOLD.items() if name not in ("names", "shots")}  # without pages

LM_TINY = Recipe(
    "lm/tiny", LanguageModel, TINY_LANGUAGE, image_size=48, vocab=TINY_VOCAB,
    stages=(Stage("lm", ("language",), TOLD, lessons=LESSONS, real="texts", format="tiny", group=True, steps=11_000, batch_size=32,
                  accumulate=4, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), max_length=256, evaluate=("told", "pages"),
                  on_data={"steps": 800}),))

# Flamingo's, which has read pages. It goes on from lm/tiny, which hardly learned names that only the page explains. It must learn to find
# a thing again and to copy what follows it. It learns that fastest where nothing stands between the two (`plain_names`).
# Then it reads the texts of pages and of pairs. A language model that has never met them gives such texts almost no probability, and
# the gated layers learn to correct that instead of looking at the pictures.
OTHERS = {name: weight * 25 / sum(ALONE.values()) for name, weight in ALONE.items()}
LM_TINY_PAGES = replace(
    LM_TINY, name="lm/tiny-pages",
    stages=(replace(LM_TINY.stages[0], name="lm-pages", data={"names": 35, "long names": 25, "plain names": 10, "shots": 5, **OTHERS},
                    lessons=((0.35, {"plain names": 75, **OTHERS}),), init=(("language", "lm/tiny:language"),), steps=2_400, lr=1e-3),
            replace(LM_TINY.stages[0], name="lm-texts", data={"page texts": 40, "names": 30, "long names": 15, **OTHERS}, lessons=(),
                    steps=600, lr=5e-4, on_data={"steps": 300})))

# An encoder reads what is told before all else, so there are no pages; whatever it is asked, it is asked in one format.
LM_TINY_T5 = replace(
    LM_TINY, name="lm/tiny-t5", config=TINY_T5,
    stages=(replace(LM_TINY.stages[0], name="lm-t5", format="flan_t5", evaluate=("told",),
                    data=ALONE, steps=7_000, accumulate=2),))

# Captions, as BLIP and the Q-Former will read them, and all that a language model reads but pages.
HIDDEN = {"caption texts": 30, **ALONE}

BERT_TINY = Recipe(
    "bert/tiny", MaskedLanguageModel, BertConfig(TINY_VOCAB, width=128, layers=4, heads=4, ffn=512, max_positions=256, dropout=0.0),
    image_size=48, vocab=TINY_VOCAB,
    stages=(Stage("bert", ("bert", "word_head"), HIDDEN, lessons=((0.03, {"told/repeat": 1}), (0.3, {"told/drills": 4, "caption texts": 1})),
                  real="texts", group=True, steps=6000, batch_size=32, accumulate=4, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98),
                  max_length=256, evaluate=("told",), on_data={"steps": 800}),))

CLIP_SMALL = Recipe(
    "clip/small", CLIP, CLIPConfig(SMALL_VISION, clip_text(SMALL_VOCAB, 384, 6, 6), 256), image_size=224, vocab=SMALL_VOCAB,
    stages=(Stage("clip", CLIP_PARTS, {"vague pairs": 1}, real="pairs", steps=50_000, batch_size=256, lr=5e-4, weight_decay=0.2, betas=(0.9, 0.98),
                  warmup=0.04, augment=True, max_length=77),))

NFNET_SMALL = Recipe(
    "nfnet-clip/small", CLIP,
    CLIPConfig(nfnet_f(0, image_size=224), replace(BERT_BASE, vocab=SMALL_VOCAB, width=384, layers=6, heads=6, ffn=1536, segments=0), 256,
               pool="mean", smoothing=0.1),
    image_size=224, vocab=SMALL_VOCAB,
    stages=(replace(CLIP_SMALL.stages[0], name="nfnet", adaptive_clip={"vision": 0.01}, clip=10.0),))

# Flamingo's eyes (§B.1.3). Neither the size of BERT (here base) nor Adam's β are told, nor a warm-up; the lr falls to 0 in a line,
# which a cosine comes closest to. The two sets are not mixed: each update adds up the gradients of one batch of either (Table 11:
# better by 7 points of ImageNet than a merged batch). One batch of both stands for that here, at the rates of their sizes in millions.
NFNET_F6 = Recipe(
    "nfnet-clip/f6", CLIP,
    CLIPConfig(nfnet_f(6, image_size=288), replace(BERT_BASE, segments=0), 1376, pool="mean", smoothing=0.1), image_size=288, vocab=30_522,
    stages=(Stage("nfnet", CLIP_PARTS, {"ALIGN": 1800, "LTIP": 312}, real="pairs", steps=1_200_000, batch_size=16_384, lr=1e-3, warmup=0.0,
                  augment=True, clip=10.0, adaptive_clip={"vision": 0.01}),))

LM_SMALL = Recipe(
    "lm/small", LanguageModel, SMALL_LANGUAGE, image_size=224, vocab=SMALL_VOCAB,
    stages=(Stage("lm", ("language",), TOLD, lessons=LESSONS, real="texts", format="v1", steps=50_000, batch_size=64, lr=6e-4, weight_decay=0.1,
                  betas=(0.9, 0.95), min_lr=0.1, max_length=1024),))

RECIPES = (CLIP_TINY, LM_TINY, LM_TINY_PAGES, LM_TINY_T5, BERT_TINY, NFNET_TINY, CLIP_SMALL, LM_SMALL, NFNET_SMALL, NFNET_F6)
