"""BLIP's recipes: pre-training on the web, a captioner and a filter, and pre-training anew on what they made of the web.

                 ViT, learns            text transformer     web texts              human texts       steps × batch
    tiny         clip/tiny, 17 tokens   random, 4 × 128      10,600, 40 % wrong     1,600             1,400 × 32
    small        clip/small, 197        6 × 384              yours                  yours             50k × 256
    vit-b        DeiT-B/16, 197         BERT-base            129M                   1.34M, COCO, VG   20 epochs, 2,880
    vit-l        ViT-L/16, in21k, 197   BERT-base            129M                   the same          20 epochs, 2,400

    pretrain ──► captioner   LM loss, on human texts      ┐ each from `pretrain`: "decoupled"       (§3.3, Table 4)
         └─────► filter      ITC + ITM, on human texts    ┘
                    └─► makes "bootstrapped": per picture the web's text and the captioner's, those that the filter keeps
    retrain      a new model, as pretrain, on human texts and bootstrapped ones                      (§3.3, Table 13)

What scale changes: sizes, steps, the queue, ImageNet's ViT and BERT to begin with (here CLIP's eyes). What it does not: the three
losses, what is shared, CapFilt. Hyper-parameters of the published ones: §4.1, and the released configs where the paper is silent
(warm-up of 3,000 steps). differs: the rate falls by a cosine (paper: by 0.85 in every epoch); the tiny text transformer begins at
random, as bert/tiny proved a worse start (experiments/README.md); of the tiny ones' pictures some are in colours without names, as
BLIP-2's are (see world/datasets.py).

Steps of the published ones: an epoch is 14M pictures and a fifth of LAION's 115M (§4.1), one text of each.
differs: retrain takes as many steps as pretrain (paper: with CapFilt an epoch of the 14M has 1.6 times as many texts, Table 12).
With --data there are no human texts: `pretrain` alone is trained; see `python -m nanovlm.making.capfilt --help` for the rest.
"""

from dataclasses import replace

from nanovlm.bert import BERT_BASE, BertConfig
from nanovlm.momentum import MomentumConfig
from nanovlm.papers.blip import BLIP, BLIPConfig
from nanovlm.recipes import backbones
from nanovlm.recipes.stage import CapFilt, Recipe, Stage
from nanovlm.tokenizer import Tokenizer
from nanovlm.vit import VIT_B_16, VIT_L_16, ViTConfig

COMPARES = ("vision", "text_encoder", "image_projection", "text_projection", "match_head", "temperature")
WRITES = ("vision", "text_decoder", "word_head")
ALL = (*COMPARES, "text_decoder", "word_head")
CAPTIONER, FILTER = {"tasks": ("lm",)}, {"tasks": ("itc", "itm")}

# --- tiny ---

TINY_TEXT = BertConfig(backbones.TINY_VOCAB, width=128, layers=4, heads=4, ffn=512, max_positions=256, dropout=0.0,
                       image_width=backbones.TINY_VISION.width)
TINY_START = (("vision", "clip/tiny:vision"),)
SPECIALS = {f"{name}_id": Tokenizer.SPECIALS.index(mark) for name, mark in (("encode", "[ENC]"), ("decode", "[DEC]"))}
LEARNS = {"format": "blip", "real": "pairs", "batch_size": 32, "weight_decay": 0.05, "betas": (0.9, 0.98), "max_length": 48}

# human texts a fifth of all; the last quarter shows colours with names only
WEB, PLAIN_WEB = {"web pairs": 60, "unnamed web pairs": 20, "human pairs": 16, "unnamed human pairs": 5}, {"web pairs": 60, "human pairs": 16}
CLEANED = {"web pairs": "bootstrapped", "unnamed web pairs": "unnamed bootstrapped"}  # what CapFilt makes of each
MADE, PLAIN_MADE = ({CLEANED.get(name, name): weight for name, weight in diet.items()} for diet in (WEB, PLAIN_WEB))
HUMAN_TEXTS = {"human pairs": 3, "unnamed human pairs": 1}
JUDGED = ("retrieval", "two")

PRETRAIN = Stage("pretrain", ALL, PLAIN_WEB, lessons=((0.75, WEB),), init=TINY_START, steps=1400, lr=1e-3, evaluate=(),
                 on_data={"augment": True, "steps": 2000, "evaluate": ("retrieval", "captions")}, **LEARNS)
TINY = Recipe(
    "blip/tiny", BLIP, BLIPConfig(backbones.TINY_VISION, TINY_TEXT, embedding=64, **SPECIALS,
                                  momentum=MomentumConfig(queue=1024, momentum=0.99, ramp=300)),
    image_size=48, vocab=backbones.TINY_VOCAB,
    stages=(
        PRETRAIN,
        Stage("captioner", WRITES, {"human pairs": 1}, lessons=((0.5, HUMAN_TEXTS),), sizes=CAPTIONER, anew=True, init=(("", "blip/tiny@pretrain"),),
              steps=400, lr=5e-4, on_data=None, **{**LEARNS, "real": "captions"}),
        Stage("filter", COMPARES, HUMAN_TEXTS, sizes=FILTER, anew=True, init=(("", "blip/tiny@pretrain"),), steps=300,
              lr=5e-4, evaluate=("noise",), on_data=None, **LEARNS),
        replace(PRETRAIN, name="retrain", data=PLAIN_MADE, lessons=((0.75, MADE),), anew=True, evaluate=JUDGED, on_data=None)),
    makes={cleaned: CapFilt(web) for web, cleaned in CLEANED.items()})

# For one GPU of 24 GB, at 224 pixels; steps and rates follow the paper's proportions and have not been run.
SMALL_TEXT = BertConfig(backbones.SMALL_VOCAB, width=384, layers=6, heads=6, ffn=1536, max_positions=128,
                        image_width=backbones.SMALL_VISION.width)
SMALL = Recipe(
    "blip/small", BLIP, BLIPConfig(backbones.SMALL_VISION, SMALL_TEXT, momentum=MomentumConfig(queue=16_384, ramp=5_000), **SPECIALS),
    image_size=224, vocab=backbones.SMALL_VOCAB,
    stages=(replace(PRETRAIN, steps=50_000, batch_size=256, lr=3e-4, betas=(0.9, 0.999), augment=True, max_length=30,
                    init=(("vision", "clip/small:vision"),), evaluate=("retrieval", "captions"), on_data={}),))

# --- published ---

PICTURES = 14.0 + 115 / 5  # million, of an epoch (§4.1)
HUMAN = {"COCO": 567, "Visual Genome": 769}  # thousand texts (Table 15)
NOISY = {"SBU": 860, "CC3M": 3_000, "CC12M": 10_000, "LAION": 115_000}
BOOTSTRAPPED = {f"{name}, bootstrapped": texts for name, texts in NOISY.items()}


def published(name: str, vision: ViTConfig, imagenet: str, batch_size: int, lr: float, captioner_lr: float, filter_lr: float) -> Recipe:
    """BLIP §4.1 and App. A; captioner and filter are what it fine-tunes on COCO for captioning and for retrieval."""
    weights = "google-bert/bert-base-uncased"
    bert = f"published-bert:{weights}"
    text = replace(BERT_BASE, vocab=BERT_BASE.vocab + 2, segments=0, image_width=vision.width)  # two more words, [DEC] and [ENC]
    epoch = round(PICTURES * 1e6 / batch_size)
    how = {"format": "blip", "real": "pairs", "weight_decay": 0.05, "augment": True, "fit": "stretch"}
    pretrain = Stage("pretrain", ALL, HUMAN | NOISY, steps=20 * epoch, batch_size=batch_size, lr=lr, warmup=3_000 / (20 * epoch), clip=0.0,
                     max_length=30, evaluate=("retrieval",),
                     init=(("vision", f"published:{imagenet}"), ("text_encoder", bert), ("text_decoder", bert),
                           ("word_head", bert)), **how)
    tune = {"batch_size": 256, "warmup": 0.0, **how}  # COCO's 566,747 texts, 5 epochs to caption and 6 to retrieve
    return Recipe(
        name, BLIP, BLIPConfig(vision, text, momentum=MomentumConfig(ramp=2 * epoch)), image_size=224, vocab=text.vocab,
        words={"text": (weights, "bert")}, checkpointing=True,
        stages=(
            pretrain,
            Stage("captioner", WRITES, {"COCO": 567}, sizes=CAPTIONER, anew=True, init=(("", f"{name}@pretrain"),), steps=11_069, lr=captioner_lr,
                  **{**tune, "format": "blip-caption", "real": "captions", "max_length": 40}),
            Stage("filter", COMPARES, {"COCO": 567}, sizes=FILTER, anew=True, init=(("", f"{name}@pretrain"),), steps=13_283, lr=filter_lr,
                  **{**tune, "max_length": 35}),
            replace(pretrain, name="retrain", data=HUMAN | BOOTSTRAPPED, anew=True)),
        makes={f"{web}, bootstrapped": CapFilt(web) for web in NOISY})


PUBLISHED = (published("blip/vit-b", VIT_B_16, "facebook/deit-base-patch16-224", 2_880, 3e-4, 1e-5, 1e-5),
             published("blip/vit-l", VIT_L_16, "google/vit-large-patch16-224-in21k", 2_400, 2e-4, 2e-6, 5e-6))
RECIPES = (TINY, SMALL, *PUBLISHED)
