"""What a full-size run would need, before a GPU is paid for: memory, micro-batch, operations, hours.

    recipe ─► each stage's model on the meta device ─► parameters: frozen F, learned L ─────────────┐
                       └─► simulate.look: one micro-batch forward and backward ─► activations, FLOPs ┴─► what fits, how long

Bytes on the largest of W GPUs, sharded by FSDP2 (`fully_shard`): each tensor's rows are dealt out, rank 0 has ⌈rows / W⌉ of them.

    weights       2 F + 4 L     frozen ones in bf16; of learned ones fp32, the master copy
    gradients     4 L           fp32, sharded as soon as they are whole ("Mixed Precision Training", 1710.03740; ZeRO, 1910.02054 §3)
    moments       8 L           AdamW's two, fp32 (1711.05101)
    buffers       4 B           on every GPU: BLIP's slow copies
    gathered      2 (R + 3 U) + 4 U_l     bf16 weights of the root R, which stay, and of three blocks: the one at work, the next, which
                                comes already, and the last, which goes; and the whole gradient of the largest block that learns
    activations   measured by `look`, at the longest sequence that the stage allows; bf16; recomputation and loss included

A block is a child of a ModuleList or ModuleDict, the root all that is in none (training/sharding.py); a model whose losses read weights from
outside of their modules, BLIP, is one block. Gradients count in full, as they are from the second
micro-batch on. A plan fits if a tenth of the memory stays free: CUDA's context, NCCL's buffers, holes that the allocator cannot use.

    FLOPs a step  = those of a sample of usual length, without what checkpointing does twice, × batch          ("model FLOPs")
    hours         = steps · FLOPs a step / (W · peak · MFU)                                                    (PaLM, 2204.02311, App. B)

peak: 312 TFLOP/s, bf16 on an A100, unless told. MFU: 25 % unless told; published hours of LLaVA-1.5 mean 23 to 36 %. What no recipe tells is how long
a usual text is, see USUAL, or give --words. Sequences: image tokens by the model, largest canvas where pictures are tiled. Upper bounds:
an encoder-decoder reads and writes a text each; for Flamingo all samples are pages of pictures. The bytes were compared with
PyTorch's own memory tracker (experiments/plan_simulation.py); nothing of this was checked on a GPU.
"""

from bisect import bisect
from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanovlm.contract import Batch
from nanovlm.errors import UserError
from nanovlm.plan.simulate import Look, look
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.training.loop import freeze
from nanovlm.training.sharding import bytes_unsharded, units
from nanovlm.training.weights import checkpointed

GIB = 2 ** 30
FREE = 0.1  # of the memory
MFU, PEAK = 0.25, 312e12  # FLOP/s of an A100 in bf16
USUAL = {"captions": 24, "pairs": 24, "instructions": 64, "conversations": 224, "prompted": 224, "pages": 256}  # tokens of text
TOWERS = {"vision": "vision", "language": "language", "text": "language", "text_encoder": "language", "text_decoder": "language"}


@dataclass(frozen=True)
class Machine:
    gpus: int = 8
    memory: float = 80.0  # GiB of each
    mfu: float = MFU  # share of the peak that model FLOPs reach
    peak: float = PEAK  # FLOP/s of each


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    stage: Stage
    machine: Machine
    parts: dict[str, tuple[int, int]]  # vision, bridge, language → parameters, those of them that learn
    bytes: dict[str, int]  # of the largest rank, by kind; the micro-batch's activations among them
    whole: int  # bytes of weights, gradients, moments and buffers where nothing is sharded (DDP)
    micro: int  # samples of a GPU's micro-batch
    accumulate: int
    fits: bool
    look: Look  # at one micro-batch of the longest sequences
    flops: int  # a step, model FLOPs

    @property
    def needed(self) -> int:
        return sum(self.bytes.values())

    @property
    def hours(self) -> float:
        return self.stage.steps * self.flops / (self.machine.gpus * self.machine.peak * self.machine.mfu) / 3600


# ---- what does not depend on the batch

class NothingDrawn(TorchFunctionMode):
    """No numbers for weights that have none: on meta, to draw them takes longer than to build the model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.trunc_normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def meta_model(recipe: Recipe, stage: Stage) -> nn.Module:
    """On meta and frozen as the stage trains it, in bf16, in which it computes."""
    with torch.device("meta"), NothingDrawn():
        model = recipe.build(stage).to(torch.bfloat16)
    freeze(model, stage.trains)
    return checkpointed(model, recipe.checkpointing)


def parts_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters of the vision encoder, the language model and the bridge, which is all else; and how many of them learn."""
    parts = {"vision": (0, 0), "bridge": (0, 0), "language": (0, 0)}
    for name, parameter in model.named_parameters():
        part = TOWERS.get(name.split(".")[0], "bridge")
        count, learned = parts[part]
        parts[part] = count + parameter.numel(), learned + parameter.numel() * parameter.requires_grad
    return parts


def static_bytes(model: nn.Module, gpus: int) -> dict[str, int]:
    """Of the largest rank, before there is a batch."""
    frozen = sum(rows(p, gpus) for p in model.parameters() if not p.requires_grad)
    learned = sum(rows(p, gpus) for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return {"weights": 2 * frozen + 4 * learned, "gradients": 4 * learned, "moments": 8 * learned, "buffers": 4 * buffers}


def rows(parameter: Tensor, gpus: int) -> int:
    """Entries that rank 0 holds; a number alone is one row."""
    first, *rest = parameter.shape or (1,)
    return -(-first // gpus) * prod(rest)


def gathered_bytes(model: nn.Module) -> int:
    taken, blocks, learned = set(), [0], [0]
    for block in units(model):  # inner ones first: what is theirs is not the outer block's
        own = [p for p in block.parameters() if p not in taken]
        taken.update(own)
        blocks.append(sum(p.numel() for p in own))
        learned.append(sum(p.numel() for p in own if p.requires_grad))
    root = [p for p in model.parameters() if p not in taken]
    if model.whole_weights:  # one unit, in fp32
        return 4 * sum(p.numel() * (2 if p.requires_grad else 1) for p in root)
    return 2 * (sum(p.numel() for p in root) + 3 * max(blocks)) + 4 * max(learned)


# ---- a batch without data

def canvas(model: nn.Module) -> tuple[tuple[int, int] | None, int, int]:
    """The largest picture, where it is tiled; its views, and its places in the text."""
    tiling, places = model.reads.tiling, model.reads.image_tokens
    if tiling is None:
        return None, 1, places
    sizes = [(height * tiling.side, width * tiling.side) for height, width in tiling.grids]
    size = max(sizes, key=lambda size: tiling.tokens(size, isqrt(places)))
    return size, tiling.views(size), tiling.tokens(size, isqrt(places))


def words_of(model: nn.Module, stage: Stage, usual: int | None = None) -> tuple[int, int]:
    """Tokens of text: of the longest sample, of a usual one. A sequence's limit counts the places of its pictures, too."""
    usual = usual or USUAL[stage.real]
    longest = stage.max_length - (canvas(model)[2] if model.reads.kind == "conversations" else 0) if stage.max_length else usual
    if longest < 1:
        raise UserError(f"Stage {stage.name} has max_length {stage.max_length}, all of which a picture takes; make max_length larger.")
    return longest, min(longest, usual)


def make_batch(model: nn.Module, recipe: Recipe, stage: Stage, samples: int, words: int, device: str = "meta") -> Batch:
    """As data/collate.py would make it of samples with `words` tokens of text each, all of which are learned."""
    reads, side, dtype = model.reads, recipe.image_size, next(model.parameters()).dtype
    size, views, _ = canvas(model)
    marks = reads.most_images if reads.kind == "pages" and stage.real == "pages" else int(reads.image_tokens > 0)
    length = words + marks if reads.kind == "conversations" else words
    ids = torch.zeros(samples, length, dtype=torch.int64)
    if marks:
        ids[:, torch.arange(marks) * length // marks] = model.config.image_id if reads.kind == "pages" else model.config.image_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool), "labels": torch.zeros_like(ids)}
    shape = {"pages": (samples, marks, 1), "statements": (samples, 2)}.get(reads.kind, (samples * views,))
    batch["images"] = torch.zeros(*shape, 3, side, side, dtype=dtype, device=device)
    if size is not None:
        batch["image_sizes"] = torch.tensor([size] * samples)
    if reads.question:
        batch["qformer_input_ids"] = ids[:, :reads.question]
        batch["qformer_attention_mask"] = batch["attention_mask"][:, :reads.question]
    if reads.kind == "pages":
        batch |= {"frames": torch.ones(samples, marks, dtype=torch.int64), "backwards": torch.zeros(samples, dtype=torch.bool)}
    if reads.kind == "pairs":
        del batch["labels"]
        batch |= {"text_group": torch.arange(samples), "image_group": torch.arange(samples)}
    if reads.kind == "statements":
        batch["truth"] = torch.zeros(samples, dtype=torch.int64)
    return batch


# ---- the plan

def micro_batches(model: nn.Module, stage: Stage, gpus: int) -> list[int]:
    """Samples that a GPU may take at once, from few to many: all its micro-batches are equal, and there are as many as the stage asks for."""
    each, rest = divmod(stage.batch_size, gpus * stage.accumulate)
    if rest or not each:
        raise UserError(f"Stage {stage.name} has batch_size {stage.batch_size}, which {gpus} GPUs with {stage.accumulate} micro-batches each cannot "
                        "share equally; give another --gpus.")
    return [each] if model.whole_batch else [samples for samples in range(1, each + 1) if each % samples == 0]


def plan(recipe: Recipe, stage: Stage, machine: Machine = Machine(), usual: int | None = None) -> Plan:
    """The largest micro-batch that fits; where none does, the smallest."""
    model = meta_model(recipe, stage)
    possible = micro_batches(model, stage, machine.gpus)
    longest, usual = words_of(model, stage, usual)
    static = static_bytes(model, machine.gpus) | {"gathered": gathered_bytes(model)}
    room = machine.memory * GIB * (1 - FREE) - sum(static.values())
    looks: dict[int, Look] = {}

    def fits(samples: int) -> bool:
        looks[samples] = look(model, make_batch(model, recipe, stage, samples, longest), machine.gpus)
        return looks[samples].peak <= room

    few, many, guess = 0, len(possible), len(possible) - 1  # of `possible` the first `few` fit, those from `many` on do not
    while few < many:
        few, many = (guess + 1, many) if fits(possible[guess]) else (few, guess)
        # each look takes seconds: the next is at the largest that would fit if memory were proportional to samples
        enough = room * possible[guess] // looks[possible[guess]].peak
        guess = min(max(few, bisect(possible, enough) - 1), many - 1)
    micro = possible[max(0, few - 1)]
    samples = micro if model.whole_batch else 1
    flops = look(checkpointed(model, False), make_batch(model, recipe, stage, samples, usual), machine.gpus).flops
    return Plan(recipe, stage, machine, parts_of(model), static | {"activations": looks[micro].peak}, bytes_unsharded(model),
                micro, stage.batch_size // (machine.gpus * micro), few > 0, looks[micro], flops * stage.batch_size // samples)
