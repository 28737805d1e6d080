"""Two gloo processes take the steps of one, whatever the model: what must be gathered is gathered, and in the same order."""

from pathlib import Path

import pytest
import torch
from test_invariants import CASES, CPU, SIZE, Case, V, blip2_config, build_blip, collate, examples, image_cases
from tools import bite, close, randn, together
from torch import nn

from nanovlm import recipes
from nanovlm.bert import BertConfig
from nanovlm.decoder import clip_text
from nanovlm.papers.blip2 import BLIP2Stage1
from nanovlm.papers.clip import CLIP, CLIPConfig
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.recipes.stage import Stage
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.sharding import shard, whole_state
from nanovlm.training.weights import checkpointed
from nanovlm.vit import clip_vit


def build_clip() -> nn.Module:
    return CLIP(CLIPConfig(clip_vit(SIZE, 4, 26, 2, 2), clip_text(V, 18, 2, 3, max_positions=19), 14))


def clip_batch(rows: list[int]) -> dict:
    """Pairs by number; 1 and 4 share a text, 2 and 3 a picture, so that positives lie on different ranks."""
    texts, images = [0, 1, 2, 3, 1, 5], [0, 1, 2, 2, 4, 5]
    tokens = [torch.randint(4, V, (7,), generator=torch.Generator().manual_seed(texts[row])) for row in rows]
    return {"images": torch.stack([randn(3, SIZE, SIZE, seed=images[row]) for row in rows]),
            "input_ids": torch.stack(tokens), "attention_mask": torch.ones(len(rows), 7, dtype=torch.bool),
            "negative_ids": torch.stack([t.roll(k) for t in tokens for k in (1, 2)]).view(-1, 2, 7),
            "negative_mask": torch.ones(len(rows), 2, 7, dtype=torch.bool),
            "text_group": torch.tensor([texts[row] for row in rows]),
            "image_group": torch.tensor([images[row] for row in rows])}


def stage1_batch(rows: list[int]) -> dict:
    """Pairs by number, such that each has one possible negative, and drawing it is no matter of luck: 0 and 1, 2 and 3."""
    texts, images = [0, 1, 1, 0], [0, 1, 0, 1]
    ids = torch.stack([torch.randint(4, V, (7,), generator=torch.Generator().manual_seed(texts[row])) for row in rows])
    return {"images": torch.stack([randn(3, SIZE, SIZE, seed=images[row]) for row in rows]), "input_ids": ids,
            "attention_mask": torch.ones(len(rows), 7, dtype=torch.bool),
            "text_group": torch.tensor([texts[row] for row in rows]),
            "image_group": torch.tensor([images[row] for row in rows])}


def blip_batch(rows: list[int]) -> dict:
    """The same in the order in which two ranks bring them, for in this order their keys stand in the queue."""
    return stage1_batch(sorted(rows, key=lambda row: row % 2))


def masked_batch(rows: list[int]) -> dict:
    """Texts by number, each with other words hidden and more of them: ranks have different numbers."""
    ids, hidden = randn(6, 9)[rows].abs().mul(9).long() % (V - 4) + 4, torch.arange(9) <= torch.tensor(rows)[:, None]
    return {"input_ids": ids.masked_fill(hidden, 1), "attention_mask": ids > 0, "labels": ids.masked_fill(~hidden, -100)}


def page_batches(rows: list[int]) -> list[dict]:
    """Two micro-batches, of pages and of pairs by number; of pages the even ones have two pictures, the odd ones none."""
    made = examples(FLAMINGO, 12, seed=6)
    return [collate(FLAMINGO, [made[first + row] for row in rows], "right") for first in (6, 0)]


FLAMINGO = next(case for case in CASES if case.name == "flamingo")
TWO_SETS = {"data": {"pages": 1.0, "pairs": 0.2}, "mixed": "losses", "accumulate": 2}
BLIP_LEARNS = ("vision", "text_encoder", "image_projection", "text_projection", "match_head", "temperature", "text_decoder", "word_head")
# build, what learns, batch by the numbers of its rows, how many rows; pairs of the first two meet across ranks
OTHERS = {
    "clip": (build_clip, ("vision", "text", "image_projection", "text_projection", "temperature"), clip_batch, 6),
    "blip2 stage 1": (lambda: BLIP2Stage1(blip2_config(text=19)), recipes.blip2.BRIDGE_1, stage1_batch, 4),
    "blip, all three": (lambda: build_blip(tasks=("itc", "itm", "lm")), BLIP_LEARNS, blip_batch, 4),
    "bert": (lambda: MaskedLanguageModel(BertConfig(V, 24, 2, 3, 34, max_positions=19, dropout=0.0)), ("bert", "word_head"), masked_batch, 6),
    "flamingo, two sets": (FLAMINGO.build, FLAMINGO.stages[0], page_batches, 6),
}


def share(case: Case | str, rank: int, world: int, pairs: int = 3) -> tuple[nn.Module, tuple[str, ...], list[dict]]:
    """(model, what learns, this rank's batches of three steps); of a case of the invariants 2 · pairs rows are dealt out."""
    torch.manual_seed(4)
    if case in OTHERS:
        build, trains, batch, count = OTHERS[case]
        made = batch(list(range(count))[rank::world])
        return build(), trains, (made if isinstance(made, list) else [made]) * 3
    # the even ones have pictures and long answers, the odd ones none: rank 1 of 2 reads text only
    rows = examples(case, 4 * pairs, seed=4)
    mixed = [row for pair in zip(rows[0:2 * pairs:2], rows[2 * pairs + 1::2], strict=True) for row in pair]
    return case.build(), case.stages[-1], [collate(case, mixed[rank::world], "right")] * 3


def trained(case: Case | str, rank: int, world: int, pairs: int = 3, sharded: bool = False) -> tuple[dict, list[dict]]:
    model, trains, batches = share(case, rank, world, pairs)
    checkpointed(bite(model, 5), sharded)
    freeze(model, trains)
    scalars = shard(model, CPU) if sharded else None
    how = TWO_SETS if len(batches) > 3 else {"data": {"talk": 1}}
    stage = Stage("both", trains, **how, steps=3, batch_size=2 * pairs, lr=0.3, clip=1.0)
    # not AdamW: it takes a step of full size where a gradient is nothing but rounding
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    reports = list(train_stage(model, stage, batches, optimiser, CPU))
    return whole_state(model, scalars) if sharded else model.state_dict(), [report.losses for report in reports]


def worker(rank: int, folder: str) -> None:
    torch.save([trained(case, rank, 2) for case in (*CASES, *OTHERS)], Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[list]:
    folder = tmp_path_factory.mktemp("two")
    together(2, worker, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=lambda case: case if case in OTHERS else case.name)
def test_two_processes_equal_one(case, two_processes):
    """Same losses, same weights, though one rank has only text and the other longer answers."""
    weights, losses = trained(case, 0, 1)
    start = bite(share(case, 0, 1)[0], 5).state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-2  # they learned something
    for results in two_processes:
        theirs, their_losses = results[[*CASES, *OTHERS].index(case)]
        for mine, other in zip(losses, their_losses, strict=True):
            assert other == pytest.approx(mine, rel=3e-5)  # sums in another order, over three steps of Adam
        for name, tensor in weights.items():
            close(theirs[name], tensor, 3e-6)


@image_cases
def test_one_rank_has_only_text_where_the_model_reads_that(case):
    shares = [share(case, rank, 2)[2][0] for rank in (0, 1)]
    seen = [int((batch["frames"] > 0).sum()) if case.pages else len(batch["images"]) for batch in shares]
    assert seen == [3, 3 if case.one_first else 0]
    counts = [int((batch["labels"] != -100).sum()) for batch in shares]
    assert counts[0] != counts[1]  # else a mean of means would pass too
