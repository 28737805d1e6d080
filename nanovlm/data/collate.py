"""Lists of samples become batches: pictures, ids, masks and labels of one length.

    samples ──► collate_conversations   images, input_ids, attention_mask, labels       padded on the right, to train
            │                           (an encoder-decoder's labels are sequences of their own)
            ├─► collate_questions       qformer_input_ids, qformer_attention_mask       the same, for a bridge that reads
            ├─► collate_pairs           images, input_ids, attention_mask, who is equal to whom, wrong captions
            └─► collate_prompts         input_ids, attention_mask                       padded on the left, to generate
                                                                                        (on the right for an encoder)

Legend: B batch, T text tokens, T' tokens of answers, K negatives per pair, n images in the batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from nanovlm.data.conversation import Format, encode, find_format, two_sequences
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.transforms import Transform, load_image
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer

PAIR_LENGTH = 64  # longest text of a pair, where a stage gives no other


def collate_conversations(
    samples: Sequence[Sample], tokenizer: Tokenizer, format: str | Format, transform: Transform,
    max_length: int | None, image_tokens: int, rng: Random, asks: bool = False,
) -> dict[str, Tensor]:
    """images (n, 3, H, W) in the order of their marks, input_ids (B, T), attention_mask (B, T), labels (B, T).

    image_tokens: of one view; max_length counts them. Where pictures are tiled, n counts views, and image_sizes (n', 2),
    the height and width of each picture, says which belong together.
    asks: also what a bridge reads that knows the question, see `collate_questions`. In a `separate` format labels are
    (B, T'), the answers alone, and samples that name another format are in this one all the same: an encoder-decoder
    reads no other.
    """
    images, rows, labels, told = [], [], [], []
    separate = find_format(format).separate
    for sample in samples:
        marks = sum(turn.question.count(IMAGE) for turn in sample.turns)
        if marks != len(sample.images):
            raise UserError(f'{sample.id}: {marks} "{IMAGE}" marks in its questions but {len(sample.images)} images; '
                            "there must be one mark for each image.")
        turns = sample.turns[:rng.randint(1, len(sample.turns))] if separate and sample.turns else sample.turns
        layout = format if separate else sample.format or format
        pictures = [_picture(image) for image in sample.images]
        try:
            counts = [transform.places(picture, image_tokens) for picture in pictures]
        except UserError as error:  # too thin to be tiled
            raise UserError(f"{sample.id}: {error}") from error
        row, row_labels = encode(turns, tokenizer, layout, max_length, counts, sample.id)
        if separate:
            row, row_labels = two_sequences(row, row_labels, _given(turns[-1], row_labels, rng))
        rows.append(row)
        labels.append(row_labels)
        told.append(replace(sample, turns=turns))
        images += pictures
    batch = _pad_right(rows, tokenizer.pad_id)
    batch["labels"] = _pad_right(labels, IGNORE)["input_ids"]
    return {**batch, **collate_images(images, transform, rng), **(collate_questions(told, tokenizer) if asks else {})}


def collate_images(pictures: Sequence[Image.Image], transform: Transform, rng: Random | None = None) -> dict[str, Tensor]:
    """images float32 (n, 3, H, W), n ≥ 0; tiled, all views of all pictures, and image_sizes int64 (pictures, 2)."""
    views = [transform.views(picture, rng) for picture in pictures]
    batch = {"images": torch.cat(views) if views else torch.zeros(0, 3, transform.size, transform.size)}
    if transform.tiling is not None:
        sizes = [(picture.height, picture.width) for picture in pictures]
        batch["image_sizes"] = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    return batch


def collate_questions(samples: Sequence[Sample], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """qformer_input_ids and qformer_attention_mask (B, T_q): "<s> question </s>", padded on the right.

    There is one bridge output for a whole conversation, so it reads all of its questions, one after the other; of too
    many the last ones, which are answered next. In an exam nothing follows the question that is to be answered.
    """
    rows = []
    for sample in samples:
        asked = " ".join(turn.question.replace(IMAGE, "").strip() for turn in sample.turns)
        rows.append([tokenizer.bos_id, *tokenizer.encode(asked)[2 - PAIR_LENGTH:], tokenizer.eos_id])
    return {f"qformer_{name}": tensor for name, tensor in _pad_right(rows, tokenizer.pad_id).items()}


def _given(turn: Turn, labels: Sequence[int], rng: Random) -> int:
    """How many tokens of a caption an encoder-decoder is given: BLIP-2 §3.3, prefix language modelling.

    differs: from none to half of them; the authors' from one (issue 139 of LAVIS), for they ask with "a photo of". Where
    one is always given, a model learns nothing about the first, and here it is asked for whole captions.
    """
    learned = sum(label != IGNORE for label in labels) - 1  # without "</s>"
    return rng.randint(0, learned // 2) if turn.kind == "caption" else 0


def collate_pairs(
    samples: Sequence[Sample], tokenizer: Tokenizer, transform: Transform, max_length: int, rng: Random,
    with_negatives: bool = True,
) -> dict[str, Tensor]:
    """One image and one text each, "<s> caption </s>", for contrastive learning; captions and negatives share T.

    with_negatives: also the captions that are wrong in one point, as many for each image as all have.
    text_group, image_group: int64 (B,), equal where the texts or the images are, which are no negatives of each other.
    """
    for sample in samples:
        if len(sample.images) != 1 or not sample.caption.strip():
            raise UserError(f"{sample.id}: a pair needs one image and a caption.")
    B, K = len(samples), min(len(sample.negatives) for sample in samples) * with_negatives
    texts = [sample.caption for sample in samples]
    wrong = [text for sample in samples for text in rng.sample(sample.negatives, K)]
    ids, mask = collate_texts(texts + wrong, tokenizer, max_length)  # (B + B * K, T)
    pictures = [_picture(sample.images[0]) for sample in samples]
    batch = {
        "images": torch.stack([transform(picture, rng) for picture in pictures]),
        "input_ids": ids[:B],
        "attention_mask": mask[:B],
        "text_group": torch.tensor([_number(text.encode()) for text in texts]),
        "image_group": torch.tensor([_number(picture.tobytes()) for picture in pictures]),
    }
    if K > 0:
        batch["negative_ids"] = ids[B:].view(B, K, -1)
        batch["negative_mask"] = mask[B:].view(B, K, -1)
    return batch


def collate_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> tuple[Tensor, Tensor]:
    """Each text alone, as contrastive learning reads it: input_ids and attention_mask (B, T)."""
    padded = _pad_right([pair_ids(text, tokenizer, max_length) for text in texts], tokenizer.pad_id)
    return padded["input_ids"], padded["attention_mask"]


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int, separate: bool = False) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, T), padded on the left: every row ends where its answer begins.

    separate: the answer begins elsewhere. Then on the right, as in training: T5 counts distances by index, and padding
    between an image and its question would move them apart.
    """
    if separate:
        return tuple(_pad_right(prompts, pad_id).values())
    turned = _pad_right([list(reversed(ids)) for ids in prompts], pad_id)
    return turned["input_ids"].flip(1), turned["attention_mask"].flip(1)


def pair_ids(text: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """"<s> text </s>"; a text that is too long loses its end but keeps "</s>", where CLIP reads the sentence off."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    return ids[: max_length - 1] + [tokenizer.eos_id]


def _pad_right(rows: Sequence[Sequence[int]], value: int) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value, dtype=torch.int64)  # (B, T)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return {"input_ids": ids, "attention_mask": mask}


def _picture(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image)


def _number(content: bytes) -> int:
    """63 bits of a hash: the same number on every machine and in every run, unlike Python's own hash()."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1
