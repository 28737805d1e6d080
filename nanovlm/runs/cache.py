"""Finished backbones, kept for the next run: $NANOVLM_CACHE, or the platform's cache folder.

    key = sha256(recipe, stage, data, seed, tokenizer, keys of its own backbones, source text, torch version)

Whatever could change a single bit of the weights is part of the key, so nothing needs to be invalidated by hand, and a
run with the cache equals one without (random states are set anew at every stage). "Source text" is the text of every
file of nanovlm that the training of this backbone imports, directly or through others.
"""

import ast
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

import nanovlm
from nanovlm.errors import UserError
from nanovlm.runs import checkpoint

PACKAGE = Path(nanovlm.__file__).parent


def folder() -> Path:
    if os.environ.get("NANOVLM_CACHE"):
        return Path(os.environ["NANOVLM_CACHE"])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "nanovlm"


def key(parts: dict) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(name: str) -> dict | None:
    """The weights under this key, or None. A broken entry counts as none: it is made anew."""
    path = folder() / f"{name}.pt"
    if not path.exists():
        return None
    try:
        return checkpoint.load(path)["model"]
    except (UserError, KeyError, TypeError):
        print(f"The cached weights {path} are broken; they are trained anew.", file=sys.stderr)
        return None


def write(name: str, model: dict[str, torch.Tensor]) -> None:
    """A cache that cannot be written costs time, not the run."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder() / f"{name}.pt", {"model": model})
    except (OSError, checkpoint.SaveFailed) as error:
        print(f"The backbone was not cached: {error}", file=sys.stderr)


def source_text(*modules: str) -> str:
    """sha256 of the files of nanovlm that these modules are made of, imports of imports included."""
    seen, waiting = {}, [path for module in modules if (path := _path(module))]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = path.read_bytes()
            waiting += [p for module in _imports(path) if (p := _path(module))]
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + seen[path] + b"\0")
    return digest.hexdigest()


def _path(module: str) -> Path | None:
    """nanovlm.world.datasets → its file; None for everything else, packages and names inside a module included."""
    names = module.split(".")
    path = PACKAGE.joinpath(*names[1:]).with_suffix(".py") if names[0] == "nanovlm" and len(names) > 1 else None
    return path if path is not None and path.exists() else None


def _imports(path: Path) -> list[str]:
    """What a file imports at its top."""
    found = []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def data_identity(source: object) -> str:
    """sha256 of a person's train split: every text, every picture."""
    digest = hashlib.sha256(source.name.encode())
    for view in ("pairs", "instruct", "text"):
        for index in range(source.size(view, "train")):
            sample = source.sample(view, "train", index)
            digest.update(repr((sample.caption, sample.turns, sample.negatives)).encode())
            for image in sample.images:
                digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
