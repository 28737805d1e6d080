"""Is the plan right? Its bytes beside those that PyTorch's own tracker counts while eight ranks train, without a GPU.

    python -m experiments.plan_simulation                some minutes on two cores
    python -m experiments.plan_simulation --table        print what is stored

    nanovlm.plan:  shapes on the meta device, our own count of storages, formulas for what FSDP2 holds     ─┐
    here:          fake tensors, a fake process group of 8 ranks, `fully_shard`, AdamW, `FSDPMemTracker`   ─┴─► side by side

Both see the recipe's own modules at full size. The forward passes are written out below once more, because a fake tensor has no numbers
to look at: every text has one picture at its beginning, and every word is learned. What the tracker calls by name is compared by name:
    weights       sharded parameters: fp32 where they learn, bf16 where they are frozen; both must agree to the byte
    moments       AdamW's two
    peak          all that rank 0 holds at the worst moment of a second micro-batch, when gradients stay from the first
    activations   those that are kept, those that come and go, and the pictures, at that moment; the plan takes the most of any moment
PyTorch before 2.13 counts optimiser states several times; this needs 2.13 or later.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from experiments.seeds import RESULTS
from nanovlm import attention, recipes
from nanovlm.papers.llava import LLaVA
from nanovlm.plan.simulate import look
from nanovlm.plan.stages import GIB, gathered_bytes, make_batch, meta_model, static_bytes
from nanovlm.recipes.stage import Recipe
from nanovlm.runs.run import versions
from nanovlm.training import sharding
from nanovlm.training.loop import freeze
from nanovlm.training.weights import checkpointed

CHUNK = 8192  # words whose scores are held at a time, as in lm_loss
RANKS = 8
KINDS = {"weights": ("Sharded Param",), "gradients": ("Sharded Grad",), "moments": ("OptState",), "buffers": ("Buffer",),
         "gathered": ("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"), "activations": ("Activation", "Temp", "Inputs"),
         "peak": ("Total",)}  # ours → the tracker's


@dataclass(frozen=True)
class Case:
    recipe: str
    stage: str
    forward: Callable  # (model, images, ids) → the sum of losses
    samples: int  # of a rank's micro-batch
    words: int  # of each, all of which are learned


# ---- three forward passes without a look at any number

def surprise(hidden: Tensor, head: Tensor, words: Tensor) -> Tensor:
    """hidden (B, L, D) of sequences that end with their words (B, K) → the sum of their surprises; the first is learned if anything stands before."""
    learned = min(words.shape[1], hidden.shape[1] - 1)
    states = hidden[:, -learned - 1:-1].reshape(-1, hidden.shape[-1])  # (B·K, D)
    total = states.sum() * 0.0
    for part, targets in zip(states.split(CHUNK), words[:, -learned:].reshape(-1).split(CHUNK)):
        inputs = (part, head, targets)
        total = total + (chunk(*inputs) if len(states) <= CHUNK else checkpoint(chunk, *inputs, use_reentrant=False))
    return total


def chunk(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="sum")


def all_real(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def llava(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    x = torch.cat([model.image_prefix(images), model.language.embedding(ids)], dim=1)
    return surprise(model.language(inputs_embeds=x, attention_mask=all_real(x)), model.language.head_weight, ids)


def flamingo(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    """images (B, M, F, 3, h, w): pages of M pictures, each before a part of the text."""
    B, M = images.shape[:2]
    media = model.encode_image(images.flatten(0, 1)).unflatten(0, (B, M))
    phi = torch.arange(1, M + 1).repeat_interleave(-(-ids.shape[1] // M))[:ids.shape[1]].expand(B, -1)
    x = model.embed(ids)
    hidden = model.language(inputs_embeds=x, attention_mask=all_real(x),
                            before_block=model.before_block(media, torch.ones(B, M, dtype=torch.bool), phi))
    return surprise(hidden, model.head_weight, ids)


# at the longest texts and the micro-batches of the plan for 8 GPUs of 80 GiB; BLIP-2's prefix stands where LLaVA's image tokens do
CASES = (Case("llava15/7b", "tune", llava, 16, 1472), Case("blip2/vit-g-opt-2.7b", "stage2", llava, 240, 32),
         Case("flamingo/3b", "pages", flamingo, 42, 256))


# ---- eight ranks, of which only rank 0 is simulated

class Door(nn.Module):
    """The root: what it calls runs inside its forward, where FSDP2 has gathered what the root holds."""

    def __init__(self, model: nn.Module, forward: Callable):
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.run(self.model, images, ids)


def shard(model: nn.Module, forward: Callable, mesh: DeviceMesh) -> Door:
    """LLaVA reads its eyes before their last block. The tracker stumbles over a unit that is never called: this one counts as the root's."""
    idle = model.vision.blocks[-1] if type(model) is LLaVA else None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    for part in model.modules():  # fully_shard deals out rows, and a number alone has none
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 0:
                setattr(part, name, nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for unit in sharding.units(model):
        if unit is not idle:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    return fully_shard(Door(model, forward), mesh=mesh, mp_policy=policy)


@contextmanager
def ranks(world: int) -> Iterator[DeviceMesh]:
    """A process group in which nobody else is."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    attention.signed_frequencies.cache_clear()
    try:
        mesh = dist.init_device_mesh("cpu", (world,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield mesh
    finally:
        attention.signed_frequencies.cache_clear()  # it holds fake tensors now
        dist.destroy_process_group()


def tracked(recipe: Recipe, case: Case) -> dict[str, int]:
    """Bytes of rank 0 by the tracker's names, at the peak of a second micro-batch; the optimiser has taken a step before it."""
    stage = recipe.stage(case.stage)
    with ranks(RANKS) as mesh:
        model = recipe.build(stage)
        freeze(model, stage.trains)
        door = shard(checkpointed(model, recipe.checkpointing), case.forward, mesh)
        optimiser = torch.optim.AdamW([p for p in door.parameters() if p.requires_grad], foreach=True)
        tracker = FSDPMemTracker(door, optimiser)
        few, many = (inputs(model, recipe, case, samples) for samples in (1, case.samples))
        with tracker:
            door(*few).backward()
            optimiser.step()
        tracker.reset_mod_stats()
        tracker.track_inputs(many)
        with tracker:
            door(*many).backward()
        peak, = tracker.get_tracker_snapshot("peak").values()
    return {name: sum(size for kind, size in peak.items() if kind in kinds) for name, kinds in KINDS.items()}


def inputs(model: nn.Module, recipe: Recipe, case: Case, samples: int) -> tuple[Tensor, Tensor]:
    shape = (samples, model.reads.most_images, 1) if model.reads.kind == "pages" else (samples,)
    return torch.zeros(*shape, 3, recipe.image_size, recipe.image_size, dtype=torch.bfloat16), torch.zeros(samples, case.words, dtype=torch.int64)


# ---- beside the plan

def compare(case: Case, recipe: Recipe) -> dict:
    """Bytes of both, by kind."""
    began, stage = time.monotonic(), recipe.stage(case.stage)
    model = meta_model(recipe, stage)
    planned = static_bytes(model, RANKS) | {"gathered": gathered_bytes(model)}
    planned["activations"] = look(model, make_batch(model, recipe, stage, case.samples, case.words), RANKS).peak
    planned["peak"] = sum(planned.values())
    found = tracked(recipe, case)
    return {"recipe": recipe.name, "stage": stage.name, "samples": case.samples, "words": case.words, "planned": planned, "tracked": found,
            "seconds": round(time.monotonic() - began)}


def table(result: dict) -> str:
    lines = ["| recipe | stage | a rank's samples × words | GiB of weights | moments | activations: plan | tracker | | peak: plan | tracker | |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for run in result["runs"]:
        plan, seen = run["planned"], run["tracked"]
        assert plan["weights"] == seen["weights"]
        pairs = [f"{plan[kind] / GIB:.2f} | {seen[kind] / GIB:.2f} | {plan[kind] / seen[kind] - 1:+.1%}" for kind in ("activations", "peak")]
        lines.append(f"| `{run['recipe']}` | {run['stage']} | {run['samples']} × {run['words']} | {seen['weights'] / GIB:.2f} | "
                     f"{seen['moments'] / GIB:.2f} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def main() -> None:
    path = RESULTS / "plan_simulation.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what is stored")
    if not parser.parse_args().table:
        runs = []
        for case in CASES:
            runs.append(compare(case, recipes.get(case.recipe)))
            print(f"{case.recipe}: {runs[-1]['seconds']} s", flush=True)
        path.write_text(json.dumps({"ranks": RANKS, "versions": versions(), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
