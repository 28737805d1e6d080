"""A training step that is looked at and not taken: its operations and its memory, of a model of any size, without a GPU.

    model on the meta device (shapes, no numbers) ─┐
    batch: ids and masks real, pictures meta ──────┴─► model.losses ──► backward ──► FLOPs, bytes kept, bytes at the peak

What runs is the paper's own `losses`, so nothing here knows a paper. Three things make that possible, and fast:
- Whole numbers and truth values stay real, on the CPU, as long as they are small: `losses` looks where the images stand and which
  tokens are learned. All else is of shapes alone. `Shapes` sees each operation of PyTorch on its way, backward and checkpoints' second
  forward too, and sends it to the one side or the other.
- What an operation makes of given shapes is asked of PyTorch once: a model's blocks are alike, and so are samples.
- Attention by the fused kernel that training uses on a GPU. On the meta device PyTorch would take the path that keeps all (T, S) weights.

Memory is counted as PyTorch's own tracker does: a storage counts from the operation that makes it until nobody holds it. Parameters
and buffers do not count here, see stages.py. The gradient of a parameter counts until it is whole: then FSDP2 would take it away.
FLOPs: those of matrix products, convolutions and attention (torch.utils.flop_counter), 2 for a multiplication and an addition.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from nanovlm import attention
from nanovlm.contract import Batch

SMALL = 2 ** 20  # entries: no larger tensor is looked into by any model
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default,
            torch.ops.aten._index_put_impl_.default)


@dataclass(frozen=True)
class Look:
    """What one micro-batch costs one GPU."""

    flops: int  # forward, backward, and what checkpointing does twice
    kept: int  # bytes alive between forward and backward, the pictures among them
    peak: int  # the most bytes alive at any time
    logits: int  # bytes of the largest log-softmax, of which a loss takes one chunk after the other


class Shapes(TorchDispatchMode):
    """Small whole numbers for real, all else on meta; `live` bytes of storages on meta, their `peak`, and FLOPs."""

    def __init__(self, before: list[Tensor]):
        super().__init__()
        self.flops = self.logits = self.live = self.peak = 0
        self.shapes = {}  # operation and what it is given → shape, strides and dtype of what it makes, FLOPs
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in before})  # each storage counts once

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_meta = [value.is_meta for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(on_meta):
            if operation in INDEXING:  # a mask has as many places as it has True in it, which shapes do not tell
                args = (args[0], [place for mask in args[1] for place in places(mask)], *args[2:])
            if not all(on_meta):
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        elif "device" in kwargs and not (kwargs.get("dtype") or torch.int64).is_floating_point:
            kwargs["device"] = torch.device("cpu")
        made, flops = self.remembered(operation, args, kwargs) if any(on_meta) else run(operation, args, kwargs)
        self.flops += flops
        if operation is torch.ops.aten._log_softmax.default:
            self.logits = max(self.logits, made.nbytes)
        return self.noted(made) if isinstance(made, Tensor) else tree_map_only(Tensor, self.noted, made)

    def remembered(self, operation, args: tuple, kwargs: dict) -> tuple[object, int]:
        """A model's blocks are alike: what an operation has made of such shapes before it makes again, without asking PyTorch."""
        key = operation, likeness((args, kwargs))
        if key in self.shapes:
            shape, stride, dtype, flops = self.shapes[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta"), flops
        made, flops = run(operation, args, kwargs)
        if isinstance(made, Tensor) and made.is_meta and not any(same_storage(made, value) for value in tree_leaves((args, kwargs))):
            self.shapes[key] = made.shape, made.stride(), made.dtype, flops
        return made, flops

    def noted(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta and (tensor.is_floating_point() or tensor.numel() > SMALL):
            tensor = tensor.to("meta")
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage not in self.known:
            self.known[storage] = True
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())
        return tensor

    def change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def run(operation, args: tuple, kwargs: dict) -> tuple[object, int]:
    """What it makes, and its FLOPs. differs from FlopCounterMode, which also tells modules apart: for that it holds tensors longer than
    training does.
    """
    made, formula = operation(*args, **kwargs), flop_registry.get(operation._overloadpacket)
    return made, formula(*args, **kwargs, out_val=made) if formula else 0


def likeness(value: object) -> object:
    """Equal for arguments of which an operation makes the same shapes; 1 and 1.0 are not alike."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(likeness, value))
    return tuple((name, likeness(inner)) for name, inner in value.items()) if isinstance(value, dict) else (type(value), value)


def same_storage(tensor: Tensor, value: object) -> bool:
    """Whether they are two views of the same bytes."""
    return isinstance(value, Tensor) and value.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def places(mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the places of what is True in it, an axis each; what is no mask that can be read as it is."""
    if mask is None or mask.dtype != torch.bool or mask.is_meta:
        return (mask,)
    return mask.nonzero(as_tuple=True)


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """F.scaled_dot_product_attention by the kernel that a GPU takes where there is a mask; flash keeps as much."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(q.device).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, scale=scale)[0]


def look(model: nn.Module, batch: Batch, ranks: int = 1) -> Look:
    """model: on meta, frozen as its stage freezes it, in the dtype it computes in. batch: floats on meta, all else on the CPU.

    ranks: from how many a loss that compares the whole batch gathers.
    """
    use_real_counters(model)
    handles = [p.register_post_accumulate_grad_hook(drop_gradient) for p in model.parameters() if p.requires_grad]
    usual, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        with Shapes([*model.parameters(), *model.buffers()]) as shapes:
            for tensor in batch.values():
                shapes.noted(tensor)
            losses = model.losses(batch, lambda rows: torch.cat([rows] * ranks))
            kept = shapes.live
            sum(total / count for total, count in losses.values()).backward()
    finally:
        F.scaled_dot_product_attention = usual
        attention.signed_frequencies.cache_clear()  # it holds tensors without numbers now
        for handle in handles:
            handle.remove()
    return Look(shapes.flops, kept, shapes.peak, shapes.logits)


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def use_real_counters(model: nn.Module) -> None:
    """Buffers of whole numbers, the place in a queue say, become zeros that can be read: models look into them."""
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_floating_point():
                part.register_buffer(name, torch.zeros_like(buffer, device="cpu"))
