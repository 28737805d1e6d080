"""What a paper's model promises: what it reads, which losses it has, how it answers. A batch is made as `reads` says.

    Collate(…, model.reads) ─► batch ─► losses(batch, gather)            to learn
                                    └─► prefill(batch) ─► step ─► …      to answer: generate(batch, room, stop)

A batch is a dict. Of conversations and texts it holds input_ids, attention_mask and, to learn, labels; of pairs input_ids,
attention_mask, text_group and image_group; images where there are any, and what else `reads` asks for. A model of masked
texts writes nothing: it has no prefill and no step, and its generate fills the places that the batch names in `masked`. A model that
judges statements about two pictures writes nothing either: its generate takes one of the words (false, true) in the batch's `choices`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nanovlm.attention import KVCache
from nanovlm.tiling import Tiling

Batch = dict[str, Tensor]
Gather = Callable[[Tensor], Tensor]  # this process's rows → the rows of all, with gradient

KINDS = ("texts", "masked", "pairs", "conversations", "statements", "pages")


@dataclass(frozen=True)
class Reads:
    """What a model wants to find in a batch."""

    kind: str = "conversations"  # one of KINDS; texts have no pictures, of masked ones some words are hidden, statements have two,
    # pages any number and clips: images (B, M, F, 3, h, w), and frames (B, M), how many each has, 0 where there is none
    image_tokens: int = 0  # places that one view of a picture takes in the text
    tiling: Tiling | None = None  # pictures come as several views, and image_sizes with them
    question: int = 0  # the bridge reads so many tokens of the question too, the last ones: qformer_input_ids
    frames: int = 0  # a picture may be a clip, of which so many frames are read: images (B, F, 3, h, w), frames bool (B, F)
    matches: bool = False  # it also says whether a picture and a text belong together: match(image tokens, ids, mask)
    wrong_captions: bool = False  # pairs bring captions that are wrong in one point: negative_ids
    most_images: int = 0  # of a page, to learn from; 0: all
    p_next: float = 0.0  # how often the texts of a page are taken for those of the images behind them: backwards (B,)


class Paper(Protocol):
    reads: Reads
    whole_batch: bool  # the negatives are the batch, so that it can't be split into micro-batches
    whole_weights: bool  # its losses read weights outside of the modules that own them, so that those cannot be gathered one by one
    unheard: tuple[str, ...]  # parts that reach no loss

    def losses(self, batch: Batch, gather: Gather) -> dict[str, tuple[Tensor, Tensor]]:
        """name → (sum, count): the loop adds up both over micro-batches and ranks, then divides."""

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts and their pictures: next-token logits (B, V), cache."""

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further ids (B, T): logits (B, T, V), cache."""

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n ≤ room); `how` is handed on to generation.generate."""


def alone(rows: Tensor) -> Tensor:
    """The gather of one process, which has the whole batch already."""
    return rows
