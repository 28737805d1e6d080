"""Lists of samples become batches: pictures, ids, masks and labels of one length. Training and evaluation use the same.

    samples ──► teach   images, input_ids, attention_mask, labels                     padded on the right, to learn
            │           (an encoder-decoder's labels are sequences of their own)
            ├─► ask     images, input_ids, attention_mask                             padded on the left, to answer
            │                                                                         (on the right for an encoder)
            ├─► pairs   images, input_ids, attention_mask, who is equal to whom, wrong captions
            ├─► films   images (B, F, …) and frames (B, F), in the place of images, where somebody shows a clip
            ├─► pages   images (B, M, F, …), frames (B, M), input_ids, attention_mask, labels, backwards
            ├─► statements  images (B, 2, …), input_ids, attention_mask, the words to choose from, truth
            ├─► masked  input_ids with words hidden, attention_mask, labels           see masking.py
            └─► blanks  input_ids with the last answer hidden, attention_mask, masked

What a model wants besides, it says in `reads` (contract.py): views of tiled pictures with their sizes, the question for a
bridge that reads.

Legend: B batch, T text tokens, T' tokens of answers, K negatives per pair, n images in the batch, M images or clips of a page,
F frames of a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from nanovlm.contract import Batch, Reads
from nanovlm.data.clips import still
from nanovlm.data.conversation import Format, encode, find_format, prompt, two_sequences
from nanovlm.data.masking import hide, written
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.transforms import Transform, load_image
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer

TRUTH = ("no", "yes")  # the answers to a statement: false, true
PAIR_LENGTH = 64  # longest text of a pair or question of a bridge, where a stage gives no other


@dataclass(frozen=True)
class Collate:
    """Makes the batches of one stage; max_length counts image tokens, 0 is no limit."""

    tokenizer: Tokenizer
    format: str | Format
    transform: Transform
    reads: Reads
    max_length: int = 0

    def __call__(self, samples: Sequence[Sample], rng: Random) -> Batch:
        """What the model learns from."""
        makers = {"pairs": self.pairs, "masked": self.masked, "statements": self.statements, "pages": self.pages}
        return makers.get(self.reads.kind, self.teach)(samples, rng)

    # ---- conversations and texts

    def teach(self, samples: Sequence[Sample], rng: Random) -> Batch:
        """images (n, 3, H, W) in the order of their marks, input_ids (B, T), attention_mask (B, T), labels (B, T).

        In a `separate` format labels are (B, T'), the answers alone, and samples that name another format are in this one
        all the same: an encoder-decoder reads no other.
        """
        layout, rows, labels, told = find_format(self.format), [], [], []
        for sample in samples:
            turns = sample.turns[:rng.randint(1, len(sample.turns))] if layout.separate and sample.turns else sample.turns
            row, row_labels = self.encode(replace(sample, turns=turns))
            if layout.separate:
                given = _given(turns[-1], row_labels, rng) if layout.unasked is not None else 0
                row, row_labels = two_sequences(row, row_labels, given)
            rows.append(row)
            labels.append(row_labels)
            told.append(replace(sample, turns=turns))
        batch = _pad_right(rows, self.tokenizer.pad_id)
        batch["labels"] = _pad_right(labels, IGNORE)["input_ids"]
        return {**batch, **self.images(samples, rng), **self.questions(told)}

    def encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation as this stage learns it."""
        marks = sum(turn.question.count(IMAGE) for turn in sample.turns)
        if marks != len(sample.images) + len(sample.told):
            raise UserError(f'{sample.id}: {marks} "{IMAGE}" marks in its questions but {len(sample.images)} images; '
                            "there must be one mark for each image.")
        if self.reads.kind == "pages":  # cut later, see `window`
            return encode(sample.turns, self.tokenizer, self.layout(sample), None, 1, sample.id, sample.told)
        try:
            counts = [self.transform.places(as_picture(still(image)), self.reads.image_tokens) for image in sample.images]
        except UserError as error:  # too thin to be tiled
            raise UserError(f"{sample.id}: {error}") from error
        return encode(sample.turns, self.tokenizer, self.layout(sample), self.max_length or None, counts, sample.id, sample.told)

    def layout(self, sample: Sample) -> str | Format:
        """The stage's format or the sample's own; an encoder-decoder reads no other than the stage's."""
        return self.format if find_format(self.format).separate else sample.format or self.format

    def problem(self, sample: Sample) -> str | None:
        """Why this stage cannot learn from the sample; None where it can. Pairs' captions and masked texts are cut, and always fit."""
        if self.reads.kind in ("pairs", "masked"):
            return None
        try:
            if self.reads.kind == "conversations" and find_format(self.format).image_first and len(sample.images) != 1:
                raise UserError(f"it has {len(sample.images)} pictures, and this model reads one before each text")
            (self.said if self.reads.kind == "statements" else self.encode)(sample)
        except UserError as error:
            return str(error)
        return None

    def loses_beginning(self, sample: Sample) -> bool:
        """Whether it is asked in more tokens than the language model (Format.asked) or the bridge (Reads.question) reads, the last ones."""
        layout = find_format(self.layout(sample))
        if self.reads.question and len(self.tokenizer.bridge.encode(_asked(sample))) > self.reads.question - 2:  # "<s>" and "</s>" are two
            return True
        if not layout.asked:
            return False
        whole, cut = (encode(sample.turns, self.tokenizer, one, name=sample.id)[0] for one in (replace(layout, asked=0), layout))
        return len(cut) < len(whole)

    def ask(self, samples: Sequence[Sample]) -> Batch:
        """images, input_ids and attention_mask (B, T) up to where the last answer would begin: there every row ends."""
        if self.reads.kind == "masked":
            return self.blanks(samples)
        if self.reads.kind == "statements":
            return {name: tensor for name, tensor in self.statements(samples).items() if name != "truth"}
        prompts = [prompt(sample.turns, self.tokenizer, self.layout(sample), name=sample.id, told=sample.told) for sample in samples]
        if find_format(self.format).separate:  # the answer begins elsewhere
            batch = _pad_right(prompts, self.tokenizer.pad_id)
        else:
            turned = _pad_right([ids[::-1] for ids in prompts], self.tokenizer.pad_id)
            batch = {name: tensor.flip(1) for name, tensor in turned.items()}
        if self.reads.kind == "pages":
            return {**batch, **self.clips([sample.images for sample in samples])}
        return {**batch, **self.images(samples), **self.questions(samples)}

    def images(self, samples: Sequence[Sample], rng: Random | None = None) -> Batch:
        """images float32 (n, 3, H, W), n ≥ 0; tiled, all views of all pictures, and image_sizes int64 (pictures, 2).

        Where one of them is a clip and the model reads clips: images (n, F, 3, H, W), and frames bool (n, F).
        """
        if self.reads.frames and any(isinstance(image, tuple) for sample in samples for image in sample.images):
            return self.films([image for sample in samples for image in sample.images], rng)
        pictures = [as_picture(image) for sample in samples for image in sample.images]
        views = [self.transform.views(picture, rng) for picture in pictures]
        size = self.transform.size
        batch = {"images": torch.cat(views) if views else torch.zeros(0, 3, size, size)}
        if self.reads.tiling is not None:
            sizes = [(picture.height, picture.width) for picture in pictures]
            batch["image_sizes"] = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
        return batch

    def films(self, shown: Sequence, rng: Random | None = None) -> Batch:
        """Frames evenly spread (InstructBLIP §2.5), at most as many as the model reads; missing ones are zeros before the first,
        so that the last one stands next to the text.
        """
        clips = [spread(image if isinstance(image, tuple) else (image,), self.reads.frames) for image in shown]
        F, size = max(map(len, clips)), self.transform.size
        images, frames = torch.zeros(len(clips), F, 3, size, size), torch.zeros(len(clips), F, dtype=torch.bool)
        for n, clip in enumerate(clips):
            frames[n, F - len(clip):] = True
            images[n, F - len(clip):] = self.filmed(clip, rng)
        return {"images": images, "frames": frames}

    def filmed(self, clip: Sequence, rng: Random | None) -> Tensor:
        """(F, 3, H, W); all frames of a clip are cropped and flipped alike."""
        seed = rng and rng.random()
        return torch.stack([self.transform(as_picture(frame), rng and Random(seed)) for frame in clip])

    def questions(self, samples: Sequence[Sample]) -> Batch:
        """For a bridge that reads: qformer_input_ids and qformer_attention_mask (B, T_q), "<s> question </s>".

        There is one bridge output for a whole conversation, so it reads all of its questions, without marks, with a blank between them; of
        too many tokens the last ones, which are answered next. In an exam nothing follows the question that is to be answered.
        """
        if not self.reads.question:
            return {}
        rows, words = [], self.tokenizer.bridge
        for sample in samples:
            rows.append([words.bos_id, *words.encode(_asked(sample))[2 - self.reads.question:], words.eos_id])
        return {f"qformer_{name}": tensor for name, tensor in _pad_right(rows, words.pad_id).items()}

    # ---- pages

    def pages(self, samples: Sequence[Sample], rng: Random) -> Batch:
        """images (B, M, F, 3, H, W), frames (B, M), input_ids, attention_mask and labels (B, T), backwards bool (B,).

        Of each page a window of max_length tokens and its first images. backwards: a page's texts belong to the images behind them.
        """
        rows, labels, shown = [], [], []
        for sample in samples:
            row, row_labels, images = window(*self.encode(sample), sample.images, self.tokenizer.image_id, self.max_length,
                                             self.reads.most_images, rng if self.layout(sample) == "pages" else None)
            rows.append(row)
            labels.append(row_labels)
            shown.append(images)
        batch = _pad_right(rows, self.tokenizer.pad_id)
        batch["labels"] = _pad_right(labels, IGNORE)["input_ids"]
        chance = [self.reads.p_next * (self.layout(sample) == "pages") for sample in samples]
        batch["backwards"] = torch.tensor([rng.random() < p for p in chance])
        return {**batch, **self.clips(shown, rng)}

    def clips(self, shown: Sequence[Sequence], rng: Random | None = None) -> Batch:
        """images float32 (B, M, F, 3, H, W) and frames int64 (B, M): how many frames a clip has, 0 where there is none."""
        films = [[image if isinstance(image, tuple) else (image,) for image in images] for images in shown]
        M, F = max(1, *map(len, films)), max((len(film) for page in films for film in page), default=1)
        images = torch.zeros(len(films), M, F, 3, self.transform.size, self.transform.size)
        counts = torch.zeros(len(films), M, dtype=torch.int64)
        for b, page in enumerate(films):
            for m, film in enumerate(page):
                counts[b, m] = len(film)
                images[b, m, :len(film)] = self.filmed(film, rng)
        return {"images": images, "frames": counts}

    # ---- masked texts

    def masked(self, samples: Sequence[Sample], rng: Random) -> Batch:
        """input_ids (B, T), "<s> text </s>", some words hidden; attention_mask; labels (B, T): what stood there, or −100."""
        room = self.max_length - 2 if self.max_length else None
        rows = [[ids[:room] for ids in hide(written(sample, self.tokenizer), self.tokenizer, rng)] for sample in samples]
        batch = _pad_right([self.framed(ids) for ids, _ in rows], self.tokenizer.pad_id)
        batch["labels"] = _pad_right([[IGNORE, *labels, IGNORE] for _, labels in rows], IGNORE)["input_ids"]
        return batch

    def blanks(self, samples: Sequence[Sample]) -> Batch:
        """input_ids (B, T), "<s> text </s>", with a [MASK] for each token of the last answer; attention_mask; masked (B, T)."""
        blank = self.tokenizer.token_id("[MASK]")
        texts = [written(sample, self.tokenizer) for sample in samples]
        rows = [[*chain(*before), *[blank] * len(answer)] for *before, answer in texts]
        batch = _pad_right([self.framed(ids) for ids in rows], self.tokenizer.pad_id)
        return {**batch, "masked": batch["input_ids"] == blank}

    def framed(self, ids: Sequence[int]) -> list[int]:
        """"<s>" stands for BERT's [CLS], "</s>" for its [SEP]."""
        return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]

    # ---- statements

    def statements(self, samples: Sequence[Sample], rng: Random | None = None) -> Batch:
        """images (B, 2, 3, H, W), input_ids and attention_mask (B, T), "<s> statement </s>", truth int64 (B,), 1 = true.

        choices (2, n): the ids of the words for false and for true.
        """
        said = [self.said(sample) for sample in samples]
        images = self.images(samples, rng)["images"].unflatten(0, (-1, 2))
        choices = _pad_right([self.tokenizer.encode(f" {word}") for word in TRUTH], self.tokenizer.pad_id)["input_ids"]
        return {"images": images, **self.texts([text for text, _ in said]), "choices": choices,
                "truth": torch.tensor([TRUTH.index(answer) for _, answer in said])}

    def said(self, sample: Sample) -> tuple[str, str]:
        """The statement of a sample, and one of TRUTH."""
        if len(sample.images) != 2 or not sample.turns or sample.turns[-1].answer not in TRUTH:
            raise UserError(f"{sample.id}: a statement needs two images, and {' or '.join(TRUTH)} as its answer.")
        return sample.turns[-1].question.replace(IMAGE, "").strip(), sample.turns[-1].answer

    # ---- pairs

    def pairs(self, samples: Sequence[Sample], rng: Random) -> Batch:
        """One image and one text each, "<s> caption </s>", for contrastive learning; captions and negatives share T.

        text_group, image_group: int64 (B,), equal where the texts or the images are, which are no negatives of each other.
        Where the model wants wrong captions: negative_ids, negative_mask (B, K, T), as many for each image as all have.
        """
        for sample in samples:
            if len(sample.images) != 1 or not sample.caption.strip():
                raise UserError(f"{sample.id}: a pair needs one image and a caption.")
        B, K = len(samples), min(len(sample.negatives) for sample in samples) * self.reads.wrong_captions
        captions = [sample.caption for sample in samples]
        wrong = [text for sample in samples for text in rng.sample(sample.negatives, K)]
        texts = self.texts(captions + wrong)
        pictures = [as_picture(sample.images[0]) for sample in samples]
        batch = {
            "images": torch.stack([self.transform(picture, rng) for picture in pictures]),
            "text_group": torch.tensor([_number(text.encode()) for text in captions]),
            "image_group": torch.tensor([_number(picture.tobytes()) for picture in pictures]),
            **{name: tensor[:B] for name, tensor in texts.items()},
        }
        if K > 0:
            batch["negative_ids"] = texts["input_ids"][B:].view(B, K, -1)
            batch["negative_mask"] = texts["attention_mask"][B:].view(B, K, -1)
        return batch

    def texts(self, texts: Sequence[str]) -> Batch:
        """Each text alone, "<s> text </s>": input_ids and attention_mask (B, T).

        A text that is too long loses its end but keeps "</s>", where CLIP reads the sentence off.
        """
        words = self.tokenizer.bridge  # who compares texts with pictures is the bridge, or a model without another tokenizer
        rows = [[words.bos_id, *words.encode(text)] for text in texts]
        last = (self.max_length or PAIR_LENGTH) - 1
        return _pad_right([ids[:last] + [words.eos_id] for ids in rows], words.pad_id)


def _asked(sample: Sample) -> str:
    return " ".join(turn.question.replace(IMAGE, "").strip() for turn in sample.turns)


def _given(turn: Turn, labels: Sequence[int], rng: Random) -> int:
    """How many tokens of a caption an encoder-decoder is given: BLIP-2 §3.3, prefix language modelling.

    differs: from none to half of them; the authors' from one (issue 139 of LAVIS), for they ask with "a photo of". Where
    one is always given, a model learns nothing about the first, and here it is asked for whole captions.
    """
    learned = sum(label != IGNORE for label in labels) - 1  # without "</s>"
    return rng.randint(0, learned // 2) if turn.kind == "caption" else 0


def window(ids: Sequence[int], labels: Sequence[int], images: Sequence, image_id: int, length: int, most: int,
           rng: Random | None) -> tuple[Sequence[int], Sequence[int], Sequence]:
    """Of a page `length` tokens from anywhere (0: all), up to the image behind the first `most` (0: all); and the images whose marks are left.

    Without rng the first ones: a question must not lose its picture, nor an example. The first label is −100: nothing stands before it.

    Flamingo §2.4. differs: the paper drops further images but not, it seems, their texts, which would then look at the last image
    that is left; here the page ends before them.
    """
    start = rng.randrange(len(ids) - length + 1) if rng and 0 < length < len(ids) else 0
    first = ids[:start].count(image_id)
    marks = [place for place in range(start, min(len(ids), start + (length or len(ids)))) if ids[place] == image_id]
    end = marks[most] if 0 < most < len(marks) else start + (length or len(ids))
    kept = [IGNORE, *labels[start + 1:end]]
    return ids[start:end], kept, images[first:first + (min(most, len(marks)) if most else len(marks))]


def _pad_right(rows: Sequence[Sequence[int]], value: int) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)  # (B, T)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return {"input_ids": ids, "attention_mask": mask}


def as_picture(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image)


def spread(clip: Sequence, most: int) -> Sequence:
    """At most so many frames, evenly spread, the first and the last among them."""
    if len(clip) <= most:
        return clip
    return [clip[round(i * (len(clip) - 1) / max(1, most - 1))] for i in range(most)]


def _number(content: bytes) -> int:
    """63 bits of a hash: the same number on every machine and in every run, unlike Python's own hash()."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1
