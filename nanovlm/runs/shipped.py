"""The tiny models as they were trained once, in weights/: what a run begins with, and what notebooks and chat open at once.

    weights/clip-tiny@clip.npz     every tensor in half precision, and `about`: recipe, seed, command, versions, figures, answers
    weights/llava-tiny@tune.npz    the parts that learned; of a part that stands in another file as well, that file's name
    weights/blip-tiny@filter.npz   without slow copies and queue, which begin anew; what two parts share is stored once
    weights/tokenizer.json         one for all

    python -m nanovlm.runs.shipped runs/llava     puts a finished run of seed 0 there, stage by stage

The papers begin with CLIP and Vicuna; who trains a paper's stages here begins with these. Loading never runs code: the files hold
arrays and one text. `answers` are those of the rounded weights to held-out questions; a test asks them again.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import nanovlm
from nanovlm import recipes
from nanovlm.data.source import Source
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.files import replacing
from nanovlm.published_tokenizer import PublishedTokenizer
from nanovlm.recipes.stage import Recipe, Stage, as_config, resolve, within
from nanovlm.runs import checkpoint
from nanovlm.runs.setting import make_tokenizer, world_of
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.weights import State

ASKED = 36  # questions whose answers are stored


def folder() -> Path:
    """weights/ beside the package, or $NANOVLM_SHIPPED."""
    return Path(os.environ.get("NANOVLM_SHIPPED") or Path(nanovlm.__file__).parent.parent / "weights")


def path(recipe: str, stage: str) -> Path:
    return folder() / f"{recipe.replace('/', '-')}@{stage}.npz"


def find_tokenizer(recipe: Recipe, source: Source, seed: int, real: bool = False, others: Sequence[Source] = ()) -> Tokenizer | PublishedTokenizer:
    """The shipped one goes with the shipped backbones; real: none of these is wanted, nor of published weights."""
    known = None if real or recipe.words else tokenizer()
    return known if known and len(known) <= recipe.vocab else make_tokenizer(recipe, source, seed, others)


def tokenizer() -> Tokenizer | None:
    file = folder() / "tokenizer.json"
    return Tokenizer.from_dict(json.loads(file.read_text(encoding="utf-8")), str(file)) if file.exists() else None


def read(recipe: Recipe, stage: Stage) -> State | None:
    """float32 tensors by name, or None: there is no such file, or it was made for another model of this name."""
    file = path(recipe.name, stage.name)
    if not file.exists():
        return None
    state, _ = load(file)
    model = recipe.build(stage)
    fresh = model.state_dict()
    state = {name: fresh[name] for name in unshipped(model)} | state
    wanted = {name: tensor.shape for name, tensor in fresh.items()}
    if wanted != {name: tensor.shape for name, tensor in state.items()}:
        print(f"{file.name} holds another {recipe.name} than today's recipe has: it is not used.", file=sys.stderr)
        return None
    return state


def unshipped(model: nn.Module) -> list[str]:
    """Tensors of parts that reach no loss: BLIP's slow copies and queue, which begin anew where training goes on."""
    return [name for name in model.state_dict() if any(within(name, part) for part in model.unheard)]


def load(file: Path) -> tuple[State, dict]:
    """The tensors, those that stand in other files too, and what is told about them."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        about = json.loads(arrays.pop("about").tobytes())
        arrays |= {name: arrays[other] for name, other in about.get("tied", {}).items()}
        others = {part: load(folder() / other)[0] for part, other in about["shared"].items()}
        arrays |= {name: others[name.split(".")[0]][name].numpy() for name in about["tensors"] if name not in arrays}
        return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in about["tensors"]}, about
    except Exception as error:  # numpy and zipfile raise half a dozen types for a broken file
        raise UserError(f"The shipped weights {file} cannot be read ({error}): restore the file, or train with --from-scratch.") from error


def seconds(recipe: str, stage: Stage) -> float | None:
    """How long so many steps took when the weights were made; None where they are not shipped."""
    file = path(recipe, stage.name)
    about = load(file)[1] if file.exists() else {"seconds": None}
    return about["seconds"] and about["seconds"] * stage.steps / about["steps"]


def write(weights: State, about: dict, file: Path) -> None:
    """Half precision; a part whose every tensor stands in another file of the folder is named, not stored."""
    arrays = {name: tensor.numpy().astype(np.float16) for name, tensor in weights.items()}
    shared = {}
    for part in dict.fromkeys(name.split(".")[0] for name in arrays):
        names = [name for name in arrays if name.split(".")[0] == part]
        if other := next((other for other in sorted(folder().glob("*.npz")) if other != file and _has(other, arrays, names)), None):
            shared[part] = other.name
    own = {name: array for name, array in arrays.items() if name.split(".")[0] not in shared}
    first: dict[bytes, str] = {}  # content → the name that it is stored under
    tied = {name: stored for name, array in own.items() if (stored := first.setdefault(repr(array.shape).encode() + array.tobytes(), name)) != name}
    about = {**about, "tensors": list(arrays), "shared": shared, "tied": tied}
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    stored = {name: array for name, array in own.items() if name not in tied}
    with replacing(file) as beside, open(beside, "wb") as out:
        np.savez_compressed(out, about=text, **stored)


def _has(other: Path, arrays: dict[str, np.ndarray], names: list[str]) -> bool:
    with np.load(other, allow_pickle=False) as stored:  # of the file itself: no chains of references
        return set(names) <= set(stored.files) and all(np.array_equal(stored[name], arrays[name]) for name in names)


def answers(weights: State, recipe: Recipe, stage: Stage, words: Tokenizer) -> list[list[str]]:
    """[question, answer] of ASKED held-out questions; of a model that compares, the captions that it likes best."""
    model = recipe.build(stage)
    model.load_state_dict({**model.state_dict(), **weights})
    with torch.inference_mode():
        return [[asked, answer] for _, asked, _, answer in Pupil(model, recipe, stage, words, "cpu").examples(world_of(recipe, 0), ASKED)]


def export(run: Path, stages: Sequence[str] = ()) -> list[Path]:
    """The stages of a finished run, all of its own unless named."""
    config, summary = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("config.json", "summary.json"))
    recipe = resolve(recipes.get(config["recipe"]["name"]), real=False)
    if (config["data"], config["steps"], config["seed"]) != ("scenes", None, 0):
        raise UserError(f"{run} is no full run of seed 0 on the embedded world: only such a run is shipped.")
    folder().mkdir(parents=True, exist_ok=True)
    words = Tokenizer.from_dict(checkpoint.load(run / "last.pt")["tokenizer"])
    known = tokenizer()
    if known is None:
        with replacing(folder() / "tokenizer.json") as beside:
            beside.write_text(json.dumps(words.to_dict()) + "\n", encoding="utf-8")
    elif known.to_dict() != words.to_dict():
        raise UserError(f"{run} has another tokenizer than {folder()}: train it on the shipped backbones.")
    seconds = {record["name"]: record["seconds"] for record in summary["stages"]}
    started = f"torchrun --nproc-per-node {n}" if (n := config["machine"]["processes"]) > 1 else "python"
    chosen = [recipe.stage(name) for name in stages] or recipe.stages
    for stage in chosen:
        left_out = set(unshipped(recipe.build(stage)))
        weights = {name: tensor.half().float() for name, tensor in checkpoint.load(run / f"{stage.name}.pt").items() if name not in left_out}
        rows = answers(weights, recipe, stage, words)
        write(weights, {
            "recipe": recipe.name, "stage": stage.name, "seed": 0, "steps": stage.steps, "versions": summary["versions"],
            "model": (stage.builds or recipe.model).__name__, "sizes": as_config(replace(recipe.config, **stage.sizes)),
            "command": f"{started} train_tiny.py --recipe {recipe.name}" + " --from-scratch" * config["from_scratch"],
            "seconds": seconds[stage.name], "figures": summary["eval"] if stage.evaluate else {},
            "questions": [asked for asked, _ in rows], "answers": [said for _, said in rows]}, path(recipe.name, stage.name))
    return [path(recipe.name, stage.name) for stage in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nanovlm.runs.shipped", description="Put a finished run's weights into weights/.")
    parser.add_argument("run", type=Path, help="the folder of a finished run, such as runs/llava")
    parser.add_argument("--stages", nargs="+", default=(), metavar="STAGE", help="which of its stages (default: all of its own)")
    options = parser.parse_args(argv)
    try:
        for file in export(options.run, options.stages):
            print(f"{file}: {file.stat().st_size:,} bytes")
        return 0
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
