"""One model shared out over the ranks: each keeps its part of every weight, of its gradient and of AdamW's moments.

    ZeRO, arXiv:1910.02054 §5, stage 3; PyTorch's own engine, FSDP2 (`fully_shard`), does the work

    block i of      rank 0  ▓▓░░ ─┐ all-gather            ┌ free ─ … ─ all-gather ─► backward ─► reduce-scatter ┐
    the model       rank 1  ░░▓▓ ─┴─► ▓▓▓▓ ─► forward ────┘            (once more)               each its rows of ┘
                                       whole for a moment                                        the gradient

Without sharding a rank holds 16 bytes for each parameter that learns (weight, gradient, two moments, all fp32): 108 GB for LLaVA-7B.
On W ranks it is a W-th of that, and two whole blocks. Frozen weights have neither gradient nor moments; they are shared out as well, in
bf16, and so handed on to the next stage: weights that learn only then begin from rounded ones.

What is gathered together is a unit: each child of a ModuleList or a ModuleDict, and all that is left, which the root keeps whole from the
beginning of `losses` to the end of the way back, since losses read the head's weights when the language model is through.
Every rank must call every unit, in the same order, at every step. Where there is nothing to see, an empty tensor passes through.

What a model changes in its own weights during `losses` is a gathered copy's and lost with it: BLIP keeps τ in bounds at each use, the stored
τ may leave them.

Models know nothing of this. DDP (distributed.py) serves whatever fits whole on each GPU, and is quicker; --shard asks for this here.
"""

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nanovlm.errors import UserError
from nanovlm.files import TEMPORARY
from nanovlm.training import distributed


def shard(model: nn.Module, device: torch.device, precision: torch.dtype | None = None) -> set[str]:
    """In place, of a model that is frozen as its stage wants it: its parameters become DTensors, each rank's rows of the first axis.

    precision: what is computed in, and what frozen weights are kept in; what learns is kept in fp32. None: all of it in fp32.
    Returns the names of the scalars, which are rows of one number from now on: a scalar has no rows to share out.
    Before an optimiser is made, and before the model is used: parameters are replaced.
    """
    scalars = {name for name, p in model.named_parameters() if p.ndim == 0}
    replace(model, lambda p: p.view(1) if p.ndim == 0 else p)
    if model.whole_weights:  # what reads them, slow copies say, reads them as they are kept
        precision = None
    mesh = init_device_mesh(device.type, (distributed.world(),))
    policy = MixedPrecisionPolicy(precision, torch.float32 if precision else None)
    for unit in (*units(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "losses")
    replace(model, lambda p: p.to(torch.float32 if p.requires_grad or precision is None else precision))
    return scalars


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, from the inmost out; none in a model whose losses read weights from outside of their modules."""
    if model.whole_weights:
        return []
    lists = [part for part in model.modules() if isinstance(part, (nn.ModuleList, nn.ModuleDict))]
    found = [child for part in lists for child in part.children() if list(child.parameters())]
    return list(dict.fromkeys(reversed(found)))  # modules() meets a list before those inside it


def replace(model: nn.Module, change: Callable[[nn.Parameter], Tensor]) -> None:
    """Each parameter exchanged for what `change` makes of it, one after the other: no second copy of the whole."""
    for part in model.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if (new := change(p)) is not p:
                setattr(part, name, nn.Parameter(new.detach(), p.requires_grad))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all ranks; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, scalars: set[str]) -> dict[str, Tensor]:
    """All weights as the plain model has them, on the first rank's CPU, gathered one after the other; {} on the other ranks."""
    state = {}
    for name, tensor in model.state_dict().items():
        rows = whole(tensor.detach())
        if distributed.rank() == 0:
            state[name] = rows.to("cpu", copy=True).view(() if name in scalars else rows.shape)
    return state


def bytes_unsharded(model: nn.Module) -> int:
    """What each rank holds before there is a batch where all of them have all of it (DDP): weights and buffers, gradients, moments, in fp32."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) + 4 * sum(b.numel() for b in model.buffers() if b.is_floating_point())


# ---- checkpoints: each rank writes its rows, and any number of ranks can read them

def save(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW) -> None:
    """What learns and its moments, and all buffers, into a folder that appears when it is complete. All ranks call it.

    Frozen weights are left out: the stage's `init` has them.
    """
    beside = folder.with_name(folder.name + TEMPORARY)
    try:
        dcp.save(dict(kept(model, optimiser)), checkpoint_id=str(beside))
    except dcp.CheckpointException as error:
        raise cause_of(error) from error
    distributed.wait()
    if distributed.rank() == 0:
        if folder.exists():  # of the same step, from before the run was resumed
            shutil.rmtree(folder)
        beside.rename(folder)
    distributed.wait()


def load(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW) -> None:
    """Put in place what `save` has written, on this or another number of ranks."""
    for p in model.parameters():
        if p.requires_grad:
            optimiser.state[p] = {"step": torch.zeros((), device=own_rows(p).device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    reader = Reader(str(folder))
    try:
        reader.read_metadata()  # if there is none, dcp.load tells of it with a traceback first
        dcp.load(dict(kept(model, optimiser)), storage_reader=reader)
    except (OSError, KeyError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        cause = cause_of(error) if isinstance(error, dcp.CheckpointException) else error
        raise UserError(f"{folder} is not a whole checkpoint ({type(cause).__name__}: {str(cause).partition(chr(10))[0][:200]}); start the run again "
                        "with --overwrite.") from error


def cause_of(error: dcp.CheckpointException) -> BaseException:
    """What failed on some rank: what the system said of a file, a full disk say, even where it stands behind torch's own words."""
    causes = [cause for failed, _ in error.failures.values() for cause in (failed, failed.__context__) if cause is not None]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


def kept(model: nn.Module, optimiser: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a checkpoint holds."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    yield from ((f"model.{name}", tensor) for name, tensor in model.state_dict().items() if name not in frozen)
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield from ((f"{key}.{name}", value) for key, value in optimiser.state[p].items())


class Reader(dcp.FileSystemReader):
    """The index of such a checkpoint is a pickle, which could run code when it is opened. This one makes nothing but an index."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = IndexOnly(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name in INDEX.get(module.split("._")[0], ()):
            return super().find_class(module, name)
        raise UserError(f"the checkpoint's .metadata asks for {module}.{name}, of which no index is made: it is not ours, do not open it")


# what an index is made of, by module
INDEX = {
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "int64", "bool"), "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",), "pathlib": ("PosixPath", "WindowsPath"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                                              "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
}
