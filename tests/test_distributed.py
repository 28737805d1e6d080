"""Two gloo processes take exactly the steps of one, whatever the share of each."""

import os
from pathlib import Path
from random import Random

import pytest
import torch
import training_fakes as fakes
from test_training import CPU, TOKENIZER, fresh
from tools import together

from nanovlm.contract import Reads, alone
from nanovlm.errors import UserError
from nanovlm.runs.folder import RunFolder
from nanovlm.runs.run import Options, run
from nanovlm.training import distributed
from nanovlm.training.batches import MicroBatches, Mixture, make_collate
from nanovlm.training.loop import freeze, train_stage
from nanovlm.training.optim import make_optimiser


class TextOnOddRanks:
    """Every odd sample, and so everything that rank 1 of 2 gets, is text without a picture."""

    def __getitem__(self, place):
        return fakes.FakeScenes().draw("texts" if place % 2 else "captions", Random(place))


class Contrast(torch.nn.Module):
    """Each row against all rows of all ranks, as contrastive losses have it."""

    reads = Reads("pairs")
    whole_batch, whole_weights = True, False
    unheard = ()

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(3, 5), torch.nn.Embedding(fakes.VOCAB, 5)

    def losses(self, batch, gather=alone):
        image = self.image(batch["images"].mean((2, 3)))  # (B, 5)
        # Words only. Not the padding, which depends on the batch; and not <s>, which all texts share: its gradient is
        # rounding noise around 0, and Adam makes a full step of any noise.
        text = (self.text(batch["input_ids"]) * (batch["input_ids"] > 3)[:, :, None]).sum(1)  # (B, 5)
        own, everyone = gather(batch["text_group"]), gather(text)
        target = (batch["text_group"][:, None] == own).float()
        target = target / target.sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(image @ everyone.T, target, reduction="sum")
        return {"itc": (loss, torch.tensor(len(image)))}


CASES = {
    "mixed": (fakes.stage(steps=5, batch_size=8), None, None),
    "text only on one rank": (fakes.stage(steps=5, batch_size=8), TextOnOddRanks(), None),
    "accumulated": (fakes.stage(steps=4, batch_size=8, accumulate=2), TextOnOddRanks(), None),
    "contrastive": (fakes.stage("pairs", ("image", "text"), "pairs", steps=5, batch_size=8, lr=0.1), None, Contrast),
}


def train(case: str) -> tuple[dict, list[tuple[float, float]]]:
    stage, samples, build = CASES[case]
    torch.manual_seed(3)
    model = build() if build else fresh()
    freeze(model, stage.trains)
    samples = samples or Mixture(fakes.FakeScenes(), stage, 0)
    batches = MicroBatches(samples, stage, 0, make_collate(fakes.recipe(), stage, TOKENIZER, model.reads))
    stream = (batches[n] for n in range(len(batches)))
    reports = list(train_stage(model, stage, stream, make_optimiser(model, stage), CPU))
    return model.state_dict(), [(next(iter(r.losses.values())), r.grad_norm) for r in reports]


def worker(rank: int, folder: str) -> None:
    results = {case: train(case) for case in CASES}
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    everyone = distributed.all_gather(rows)
    (everyone * torch.arange(1.0, 5.0)[:, None] * (rank + 1)).sum().backward()
    try:
        refused = RunFolder("fake/tiny", out=__file__).path
    except UserError as error:
        refused = str(error)
    torch.save({"results": results, "refused": refused, "gathered": everyone.detach(), "gradient": rows.grad,
                "any": distributed.any_rank([rank == 1, False], CPU), "first": distributed.from_first(f"rank {rank}")},
               Path(folder) / f"{rank}.pt")


def whole_run(rank: int, folder: str) -> None:
    os.environ["NANOVLM_CACHE"] = f"{folder}/cache"
    fakes.install()
    run("fake/tiny", Options(out=f"{folder}/run"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes computed, and then a whole run of two; once for all tests, since importing torch takes most of the time."""
    folder = tmp_path_factory.mktemp("two")
    together(2, worker, str(folder))
    together(2, whole_run, str(folder))
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two, case):
    weights, reports = train(case)
    for other_weights, other_reports in (rank["results"][case] for rank in two[1]):
        for mine, theirs in zip(reports, other_reports, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-5)
        for name, tensor in weights.items():
            assert torch.allclose(tensor, other_weights[name], rtol=0, atol=2e-6), name


def test_the_ranks_shares_are_uneven():
    """Otherwise a mean of the ranks' means would pass, too."""
    stage, samples, _ = CASES["text only on one rank"]
    collate = make_collate(fakes.recipe(), stage, TOKENIZER, fresh().reads)
    counts = []
    for rank in (0, 1):
        batches = MicroBatches(samples, stage, 0, collate)
        batches.rank, batches.world = rank, 2
        counts.append(int((batches[0]["labels"] != -100).sum()))
        assert len(batches[0]["images"]) == (4, 0)[rank]
    assert counts[0] != counts[1]


def test_gathered_rows_carry_everybodys_gradient_home(two):
    for rank, saved in enumerate(two[1]):
        assert saved["gathered"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
        # Rank r weighs row i by (i + 1)(r + 1); summed over ranks that is 3 (i + 1), for the two rows of each rank.
        assert saved["gradient"][:, 0].tolist() == [3.0 * (2 * rank + 1), 3.0 * (2 * rank + 2)]


def test_decisions_are_the_same_on_all_ranks(two):
    assert [saved["any"] for saved in two[1]] == [[True, False]] * 2
    assert [saved["first"] for saved in two[1]] == ["rank 0", "rank 0"]


def test_what_is_wrong_with_the_folder_is_heard_by_all_ranks(two):
    """Rank 0 alone looks at it; the others would wait for it for ever."""
    assert [saved["refused"] for saved in two[1]] == [f"--out {__file__} is a file; name a folder."] * 2


def test_a_whole_run_of_two_processes_writes_one_folder(two):
    names = {path.name for path in (two[0] / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "last.pt", "see.pt", "align.pt", "tune.pt"} <= names
    lines = (two[0] / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 7, "only rank 0 writes"


def test_one_process_needs_no_group():
    assert (distributed.world(), distributed.rank()) == (1, 0)
    rows = torch.rand(2, 3)
    assert distributed.all_gather(rows) is rows
    assert distributed.any_rank([True, False], CPU) == [True, False]
