"""A run's folder: which one it is, what may be overwritten, and the text files in it.

    runs/llava/   config.json    what was asked for, resolved      metrics.jsonl   one line per logged step
                  summary.json   what came out                     curves.png, samples.png
                  last.pt        where to go on                    clip.pt, lm.pt, align.pt, tune.pt: weights by stage
                  last-tune-400/ with --shard: what last.pt leaves out, by ranks (sharding.py)
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.files import replacing
from nanovlm.published_tokenizer import PublishedTokenizer, restored
from nanovlm.runs import checkpoint
from nanovlm.runs.cache import Cache
from nanovlm.runs.checkpoint import saving
from nanovlm.runs.progress import say
from nanovlm.runs.setting import Job, Setting
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import distributed
from nanovlm.training.weights import State

OURS = "nanovlm run"  # config.json says so: the mark by which --overwrite knows what it may delete


class RunFolder:
    """The first store of a run, in front of the cache: its folder. Rank 0 alone writes."""

    def __init__(self, recipe: str, out: str | None = None, resume: bool = False, overwrite: bool = False, quick: bool = False,
                 what: str = OURS):
        """quick: a shortened run, whose folder says so. what: the mark in its config.json."""
        self.began, self.resume, self.overwrite = time.monotonic(), resume, overwrite
        self.before = 0.0  # seconds of the run before it was resumed
        self.records: list[dict] = []  # of finished stages, as in summary.json
        self.state: dict | None = None  # the checkpoint to go on from
        name = recipe.removesuffix("/tiny").replace("/", "-") + "-quick" * quick
        self.path: Path = on_first(lambda: choose(out, name, resume, overwrite, what))
        if resume and (self.path / "last.pt").exists():
            self.state = checkpoint.load(self.path / "last.pt")
            self.records, self.before = self.state["records"], self.state["seconds"]

    def tokenizer(self) -> Tokenizer | PublishedTokenizer | None:
        return restored(self.state["tokenizer"]) if self.state else None

    def begin(self, setting: Setting, cache: Cache, config: dict) -> None:
        """Put down, or compare, what was asked for; a run that was stopped before its first checkpoint begins at the beginning."""
        self.setting, self.cache, self.config = setting, cache, config
        on_first(self._put_down)
        distributed.wait()
        if self.resume:
            half = self.state and self.state["stage"]
            say(f"resuming {self.path}" + (f": stage {half}, step {self.state['step']}" if half else
                                           f" after {self.records[-1]['name']}" if self.records else " from its beginning"))

    def _put_down(self) -> None:
        prepare(self.path, self.overwrite)
        if self.resume:
            check_config(self.path, self.config)
            checkpoint.remove_leftovers(self.path)
            stage, step = (self.state["stage"], self.state["step"]) if self.state else (None, 0)
            trim_metrics(self.path / "metrics.jsonl", {r["name"] for r in self.records}, stage, step)
        write_json(self.path / "config.json", self.config)

    def has(self, job: Job) -> bool:
        """Whether `read` will find it, unless a file proves broken."""
        known = job.stage.name in {record["name"] for record in self.records}
        return known or (not self.setting.final(job) and not self.half_way(job) and self.cache.has(job))

    def read(self, job: Job) -> State | None:
        """From this folder, or if it is a backbone's from the cache."""
        if job.stage.name in {record["name"] for record in self.records}:
            return self._load(job)
        if self.setting.final(job) or self.half_way(job):
            return None
        for name, store in (("shipped", self.cache.shipped), ("cached", self.cache.trained)):
            if (weights := store(job)) is not None:
                say(f"{job.stage.name}: {'shipped' if name == 'shipped' else 'from the cache'}")
                whole = recipes.get(job.recipe.name).stage(job.stage.name).steps  # a shortened run begins with these, too
                self._keep(job, weights, {"name": job.stage.name, "seconds": 0.0, "steps": whole if name == "shipped" else job.stage.steps,
                                          "cached": True, "shipped": name == "shipped", "frozen": {}, "trained": {}})
                return weights
        return None

    def write(self, job: Job, weights: State, record: dict) -> State:
        """Of a model that was shared out only rank 0 has the weights; then all ranks take them from the file."""
        self._keep(job, weights, record)
        if self.setting.shard:
            distributed.wait()
            return self._load(job)
        return self.cache.write(job, weights)

    def _load(self, job: Job) -> State:
        return checkpoint.load(self.path / f"{job.stage.name}.pt", mapped=self.setting.shard)

    def _keep(self, job: Job, weights: State, record: dict) -> None:
        """A stage is finished: its weights, and a last.pt that says so."""
        self.records.append(record)
        if distributed.rank() == 0:
            checkpoint.save(self.path / f"{job.stage.name}.pt", weights)
        self.state = None
        self.save(None, 0, {})

    def half_way(self, job: Job) -> dict | None:
        """The checkpoint of the job's stage, if the run was stopped in its midst."""
        if not self.state or self.state["stage"] != job.stage.name:
            return None
        if ("shards" in self.state) != self.setting.shard:
            raise UserError(f"--resume: {self.path} was stopped in the midst of stage {job.stage.name}, {'with' if 'shards' in self.state else 'without'} "
                            f"--shard: go on {'with' if 'shards' in self.state else 'without'} it, until the stage is finished.")
        return self.state

    def save(self, stage: str | None, step: int, training: dict) -> None:
        if distributed.rank() == 0:
            checkpoint.save(self.path / "last.pt", {
                "config": self.config, "records": self.records, "seconds": self.seconds(), "stage": stage, "step": step,
                "tokenizer": self.setting.tokenizer.to_dict(), **training})
            for old in self.path.glob("last-*"):  # a folder of shards is deleted when last.pt names another one
                if old.name != training.get("shards"):
                    shutil.rmtree(old)

    def seconds(self) -> float:
        """Of the whole run, those before it was resumed too."""
        return self.before + time.monotonic() - self.began


def on_first(work: Callable[[], object]) -> object:
    """What rank 0 makes of it, on all ranks; whatever is wrong with it, all ranks hear of it."""
    outcome = None
    if distributed.rank() == 0:
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = distributed.from_first(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def choose(out: str | None, name: str, resume: bool, overwrite: bool, what: str = OURS) -> Path:
    """The folder to write into, not made yet; every way in which that could destroy something is a UserError."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it: give one of them.")
    folder = Path(out) if out else _by_name(Path("runs"), name, resume)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder.")
    filled = folder.is_dir() and any(folder.iterdir())
    if resume and not is_run(folder, what):
        raise UserError(f"--resume: {folder} holds no run (no config.json of ours); leave --resume out to start one.")
    if filled and not resume and not overwrite:
        raise UserError(f"--out {folder} is not empty: give --resume to go on with it, --overwrite to delete it, "
                        "or another name.")
    if filled and overwrite and not is_run(folder, what):
        raise UserError(f"--overwrite: {folder} does not look like a run (no config.json of ours), "
                        "so it is not deleted; choose another --out.")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written to ({error.strerror}); name another folder.") from error
    return folder


def prepare(folder: Path, overwrite: bool) -> None:
    """The folder made, and emptied; not before all else is known to be right."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _by_name(runs: Path, name: str, resume: bool) -> Path:
    """runs/llava, runs/llava-2, …: the first free one, or with `resume` the last one taken."""
    number, latest = 1, None
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            break
        latest, number = folder, number + 1
    if resume and latest is None:
        raise UserError(f"--resume: there is no {folder} to go on with; name the run with --out.")
    return latest if resume else folder


def is_run(folder: Path, what: str = OURS) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("what") == what


def write_json(path: Path, value: dict) -> None:
    with saving(path), replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_config(folder: Path, config: dict) -> None:
    """A run goes on only with the configuration it began with; the machine may differ."""
    old, new = (_flat(value) for value in (json.loads((folder / "config.json").read_text(encoding="utf-8")), config))
    asked = [field for field in ("steps", "seed", "data", "on_missing", "from_scratch") if field in new]  # what a person gave comes first
    for field in dict.fromkeys([*asked, *sorted(old.keys() | new.keys())]):
        if not field.startswith("machine.") and old.get(field) != new.get(field):
            name = f"--{field.replace('_', '-')}" if field in asked else field
            raise UserError(f"--resume: {folder} was started with {name} = {old.get(field)!r}, now it is "
                            f"{new.get(field)!r}; use the same settings, or another --out for a new run.")


def _flat(value: object, name: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} → {"a.b": 1}; entries of a list that have a name go by it. --data stays whole: one path may stand against one for each stage."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        value = {v["name"]: v for v in value}
    if not isinstance(value, dict) or name == "data":
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".strip(".")).items()}


def append_line(path: Path, value: dict) -> None:
    with saving(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def trim_metrics(path: Path, done: set[str], stage: str | None, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps are run again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] in done or (entry["stage"] == stage and entry["step"] <= step):
            kept.append(line + "\n")
    with saving(path), replacing(path) as beside:
        beside.write_text("".join(kept), encoding="utf-8")
