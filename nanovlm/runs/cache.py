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
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

import nanovlm
from nanovlm.data.source import Source
from nanovlm.data.stored import Stored
from nanovlm.errors import UserError
from nanovlm.recipes.stage import as_config
from nanovlm.runs import checkpoint, shipped
from nanovlm.runs.setting import Job, Setting, needs
from nanovlm.training import distributed
from nanovlm.training.weights import State

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


class Cache:
    """The second store of a run: backbones as they are shipped, and stages by the key of everything that made them."""

    def __init__(self, setting: Setting, kept: bool = True):
        """kept: False neither reads nor writes the folder."""
        self.setting, self.kept = setting, kept
        self.keys: dict[tuple[str, str], str] = {}
        self.found: dict[tuple[str, str], State | None] = {}  # of what is shipped

    def read(self, job: Job) -> State | None:
        """The weights of the job, or None. Of the recipe that was asked for what was trained here comes before what is shipped."""
        stores = (self.trained, self.shipped) if self.setting.final(job) else (self.shipped, self.trained)
        return next((found for store in stores if (found := store(job)) is not None), None)

    def has(self, job: Job) -> bool:
        return self.shipped(job) is not None or (self.kept and self.path(job).exists())

    def shipped(self, job: Job) -> State | None:
        if job.name not in self.found:
            self.found[job.name] = shipped.read(job.recipe, job.stage) if self.setting.ships(job) else None
        return self.found[job.name]

    def trained(self, job: Job) -> State | None:
        """A broken entry counts as none: it is made anew."""
        return distributed.from_first(self._read(self.path(job)) if self.kept and distributed.rank() == 0 else None)

    def _read(self, path: Path) -> State | None:
        if not path.exists():
            return None
        try:
            return checkpoint.load(path)["model"]
        except (UserError, KeyError, TypeError):
            print(f"The cached weights {path} are broken; they are trained anew.", file=sys.stderr)
            return None

    def write(self, job: Job, weights: State, record: dict | None = None) -> State:
        """A cache that cannot be written costs time, not the run. Of a person's own data only the backbones are kept."""
        if self.kept and distributed.rank() == 0 and (not self.setting.real or not self.setting.final(job)):
            try:
                folder().mkdir(parents=True, exist_ok=True)
                checkpoint.save(self.path(job), {"model": weights})
            except (OSError, checkpoint.SaveFailed) as error:
                print(f"The weights of stage {job.stage.name} were not cached: {error}", file=sys.stderr)
        return weights

    def path(self, job: Job) -> Path:
        return folder() / f"{self.key(job)}.pt"

    def key(self, job: Job) -> str:
        """Stages behind this one play no part, so that whoever needs this one only finds it too."""
        if job.name not in self.keys and not self.setting.final(job) and self.shipped(job) is not None:
            self.keys[job.name] = hashlib.sha256(shipped.path(*job.name).read_bytes()).hexdigest()
        if job.name not in self.keys:
            setting, stages = self.setting, job.recipe.stages
            recipe = replace(job.recipe, stages=stages[:stages.index(job.stage) + 1])
            models = {(stage.builds or recipe.model).__module__ for stage in recipe.stages}
            parts = {
                "recipe": as_config(recipe), "backbones": [self.key(other) for other in needs(job, setting)],
                "data": self.data, "seed": setting.seed, "tokenizer": setting.tokenizer.to_dict(),
                "source": source_text(*models, type(setting.source).__module__, "nanovlm.world.datasets",
                                      "nanovlm.training.loop", "nanovlm.training.batches", "nanovlm.training.weights"),
                "device": setting.device.type, "processes": distributed.world(),
                "torch": ".".join(torch.__version__.split(".")[:2]),
            }
            self.keys[job.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self.keys[job.name]

    @cached_property
    def data(self) -> str:
        return data_identity(self.setting.source) if self.setting.real else "scenes"


def source_text(*modules: str) -> str:
    """sha256 of the files of nanovlm that these modules are made of, imports of imports included; comments and docstrings play no part."""
    seen, waiting = {}, [path for module in modules if (path := _path(module))]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = _code(path)
            waiting += [p for module in _imports(path) if (p := _path(module))]
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + seen[path].encode() + b"\0")
    return digest.hexdigest()


def _code(path: Path) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


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


def data_identity(source: Source) -> str:
    """sha256 of a person's train split: every text, every picture; of a set that stays on the disk what is known of its files."""
    digest = hashlib.sha256(source.name.encode())
    if isinstance(source, Stored):
        digest.update(repr(source.identity).encode())
        return digest.hexdigest()
    for real in ("pairs", "conversations", "texts"):
        for index in range(source.size(real, "train")):
            sample = source.sample(real, "train", index)
            digest.update(repr((sample.caption, sample.turns, sample.told, sample.negatives)).encode())
            for image in sample.images:
                digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
