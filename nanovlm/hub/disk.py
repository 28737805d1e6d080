"""A checkpoint's folder: config.json, and which of the files beside it hold the tensors.

    model.safetensors                                  the whole model in one file
    model-00001-of-00002.safetensors, …                shards, and
    model.safetensors.index.json                       which tensor is in which of them

Nothing is guessed. A whole file beside an index is an error, since one of the two is left from another save; so are
shards without an index, shards that do not hold what the index says, and files under other names. Files that can run
code when they are opened (*.bin, *.pt) are never opened; that of open_flamingo, which is published in no other form, is read with
`weights_only` (open_flamingo.py), which refuses code.
"""

import json
from pathlib import Path

from torch import Tensor

from nanovlm.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}): a checkpoint's folder must have it.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again.") from error
    if type(value) is not dict:
        raise UserError(f"{path} holds a {type(value).__name__}, where an object with named fields is needed.")
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    index, whole = folder / INDEX, folder / WHOLE
    if not index.exists():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if not others:
            raise UserError(f"{folder} has no *.safetensors; if it has *.bin files, let transformers convert them: "
                            "AutoModel….from_pretrained(folder).save_pretrained(other_folder).")
        if WHOLE not in others:
            raise UserError(f"{folder} has no {WHOLE}, only {', '.join(others)}: rename the file that holds the whole model "
                            f"to {WHOLE}; if these are shards, download {INDEX}, which says which of them belong together.")
        return read_file(whole)
    where = read_json(index).get("weight_map")
    if type(where) is not dict or not all(type(file) is str for file in where.values()):
        raise UserError(f"{index}: the field weight_map (tensor: file) is missing: download it again.")
    if whole.exists() and WHOLE not in where.values():
        raise UserError(f"{folder} has both {WHOLE} and {INDEX}, so one of them is left from another save: delete the one "
                        "that you do not want, and its shards.")
    state = {}
    for file in sorted(set(where.values())):
        found = read_file(folder / file)
        if strangers := found.keys() ^ {name for name in where if where[name] == file}:
            raise UserError(f"{folder / file} and {INDEX} are not of the same save, only one of them has {min(strangers)}: "
                            "download both again.")
        state |= found
    return state


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        return load_file(path)
    except ImportError as error:
        raise UserError("Published weights are read with the package safetensors: pip install safetensors") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read ({error}): download it again.") from error
