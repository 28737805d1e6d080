"""A run's folder: which one it is, what may be overwritten, and the text files in it.

    runs/llava/   config.json    what was asked for, resolved      metrics.jsonl   one line per logged step
                  summary.json   what came out                     curves.png, samples.png
                  last.pt        where to go on                    clip.pt, lm.pt, align.pt, tune.pt: weights by stage
"""

import json
import os
import shutil
from pathlib import Path

from nanovlm.errors import UserError
from nanovlm.runs.checkpoint import TEMPORARY, saving

OURS = "nanovlm run"  # config.json says so: the mark by which --overwrite knows what it may delete


def choose(out: str | None, name: str, resume: bool, overwrite: bool) -> Path:
    """The folder to write into, made; every way in which that could destroy something is a UserError."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it: give one of them.")
    folder = Path(out) if out else _by_name(Path("runs"), name, resume)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder.")
    filled = folder.is_dir() and any(folder.iterdir())
    if resume and not is_run(folder):
        raise UserError(f"--resume: {folder} holds no run (no config.json of ours); leave --resume out to start one.")
    if filled and not resume and not overwrite:
        raise UserError(f"--out {folder} is not empty: give --resume to go on with it, --overwrite to delete it, "
                        "or another name.")
    if filled and overwrite:
        if not is_run(folder):
            raise UserError(f"--overwrite: {folder} does not look like a run (no config.json of ours), "
                            "so it is not deleted; choose another --out.")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}.") from error
    return folder


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


def is_run(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("what") == OURS
    except (OSError, ValueError, AttributeError):
        return False


def write_json(path: Path, value: dict) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with saving(path):
            beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_config(folder: Path, config: dict) -> None:
    """A run goes on only with the configuration it began with; the machine may differ."""
    old = _flat(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    new = _flat(config)
    for field in sorted(old.keys() | new.keys()):
        if not field.startswith("machine.") and old.get(field) != new.get(field):
            raise UserError(f"--resume: {folder} was started with {field} = {old.get(field)!r}, now it is "
                            f"{new.get(field)!r}; use the same settings, or another --out for a new run.")


def _flat(value: object, name: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} → {"a.b": 1}; entries of a list that have a name go by it."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        value = {v["name"]: v for v in value}
    if not isinstance(value, dict):
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
    beside = path.with_name(path.name + TEMPORARY)
    with saving(path):
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, path)
