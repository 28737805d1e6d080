"""Checkpoints: whatever happens while one is written, a whole one is on the disk.

    state ──► files.replacing(last.pt)      a kill, a full disk or a power cut leaves the old file

A checkpoint holds tensors and plain containers only, so it is loaded with weights_only=True: opening a stranger's file
can run no code. It holds all that the next step depends on: weights, optimiser, step, random states. The data need no
position of their own: the batch of step s is a function of (seed, stage, s), see batches.py.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanovlm.errors import UserError
from nanovlm.files import TEMPORARY, replacing

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveFailed(Exception):
    """A file could not be written, most often because the disk is full; what was there before is untouched."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write into one sentence."""
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:
        # torch.save and plots.py hide the disk's error behind one of their own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        mend = "free some space" if cause.errno in NO_ROOM else "make its folder one that can be written to"
        raise SaveFailed(f"{path} could not be written ({cause.strerror or cause}): {mend}, then go on with "
                         "--resume; what was saved before is untouched.") from error


def save(path: Path, state: dict) -> None:
    with saving(path), replacing(path) as beside, open(beside, "wb") as file:
        torch.save(state, file)


def load(path: Path, mapped: bool = False) -> dict:
    """A checkpoint on the CPU; UserError if it is none. mapped: its tensors stay on the disk until they are read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # torch raises half a dozen types for a broken file
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}); delete it, "
                        "or start again with --overwrite.") from error


def remove_leftovers(folder: Path) -> None:
    """Half-written files of a run that was killed while saving, and folders of shards."""
    for path in Path(folder).glob("*" + TEMPORARY):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def cpu_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are now, on the CPU; a copy, so that further training does not change them."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
