"""Does a run start on data that are too many for memory, and does it go on after a kill as if nothing had happened?

    665,000 conversations      made up, as a LLaVA-style .json ─► data.check --lines ─► a run's start up to the first batch of its last stage,
                               in a process of its own: the first time, when the index is made, and the second time
    emoji and recipes          as 18 tar shards ─► two processes (gloo) train each model; the same again, where both are killed (SIGKILL) after
                               a checkpoint in the middle of the last stage, and resumed: losses of all steps, and weights, bit for bit

    python -m experiments.data_at_scale --start                            the first, with 2 GB of temporary files
    python -m experiments.data_at_scale --kill ../shared/data llava blip2 flamingo       the second, five minutes a model
    python -m experiments.data_at_scale --table                            print what is stored
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from random import Random

import torch
from PIL import Image
from tqdm import tqdm

import train_tiny
from experiments.seeds import RESULTS, machine
from nanovlm import recipes
from nanovlm.data import check
from nanovlm.files import replacing
from nanovlm.recipes.stage import resolve
from nanovlm.runs import checkpoint, watch
from nanovlm.runs.run import versions
from nanovlm.runs.setting import Job, Setting, leave_out_unfit, plan, read_source
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.training.batches import MicroBatches, make_collate

STORED = RESULTS / "data_at_scale.json"
RECORDS, PICTURES, RECIPE = 665_000, 20_000, "llava15/tiny"
SHARDS = {"emoji": 16, "recipes": 2}
STEPS, SAVED_EVERY = 12, 1.0  # steps of a stage; seconds between checkpoints


# ---- 665,000 conversations

def conversations(n: int) -> Iterator[dict]:
    """As many words as mix665k.json has of bytes, about 1,200 a record; every 17th is without a picture."""
    rng, words = Random(0), [f"word{i}" for i in range(3000)]
    for i in tqdm(range(n), desc="making records", leave=False, disable=None):
        turns = [message for _ in range(rng.randint(1, 7)) for message in (
            {"from": "human", "value": " ".join(rng.choices(words, k=rng.randint(5, 20)))},
            {"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randint(1, 50)))})]
        shown = {}
        if i % 17:
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            shown = {"image": f"images/{rng.randrange(PICTURES)}.png"}
        yield {"id": str(i), **shown, "conversations": turns}


def make_set(folder: Path) -> Path:
    """mix.json and its pictures, of which 100 are different; the others are further names of these."""
    (folder / "images").mkdir()
    for i in range(PICTURES):
        file = folder / "images" / f"{i}.png"
        if i < 100:
            Image.effect_noise((320, 240), 30).convert("RGB").save(file)
        else:
            os.link(folder / "images" / f"{i % 100}.png", file)
    with (folder / "mix.json").open("w") as out:
        for i, record in enumerate(conversations(RECORDS)):
            out.write(("," if i else "[") + json.dumps(record) + "\n")
        out.write("]")
    return folder / "mix.json"


def start(data: str) -> dict:
    """What a run of RECIPE does before its first step, in this process."""
    began = time.monotonic()
    recipe = resolve(recipes.get(RECIPE), real=True)
    source = read_source(recipe, data, "error", 0)
    read = time.monotonic()
    setting = Setting(recipe, 0, torch.device("cpu"), source, find_tokenizer(recipe, source, 0, real=True))
    job = Job(recipe, recipe.stages[-1])
    leave_out_unfit(plan(job, setting), setting)
    with torch.device("meta"):
        reads = recipe.build(job.stage).reads
    batches = MicroBatches(setting.samples(job, {}), job.stage, 0, make_collate(recipe, job.stage, setting.tokenizer, reads))
    batches[0]
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {"records": source.size("texts", "train"), "seconds": round(time.monotonic() - began, 1), "reading": round(read - began, 1),
            "core_seconds": round(time.process_time(), 1), "peak_mib": int(status["VmHWM"].split()[0]) // 1024}


def starts() -> dict:
    with tempfile.TemporaryDirectory() as name:
        table = make_set(Path(name))
        lines = table.with_suffix(".jsonl")
        assert check.main([str(table)]) == 2, "so large a list is refused"
        assert check.main([str(table), "--lines", str(lines)]) == 0
        command = [sys.executable, "-m", "experiments.data_at_scale", "--start-on", str(lines)]
        found = {f"start {i}": json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for i in (1, 2)}
        return {"mib": lines.stat().st_size >> 20, "index_mib": lines.with_name(f"{lines.name}.index.npy").stat().st_size >> 20, **found}


# ---- killed and resumed

def make_shards(data: Path, folder: Path) -> Path:
    """The emoji as pairs, the recipes as documents; what is held out stays so."""
    emoji, pages = ([json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
                    for name in ("emoji/captions.jsonl", "recipes/documents.jsonl"))
    folder.mkdir()
    for number in range(SHARDS["emoji"]):
        with tarfile.open(folder / f"emoji-{number:03d}.tar", "w") as tar:
            for i, row in enumerate(emoji[number::SHARDS["emoji"]]):
                add(tar, f"{i:05d}.png", (data / "emoji" / row["image"]).read_bytes())
                add(tar, f"{i:05d}.json", json.dumps({"caption": row["caption"], "split": row["split"]}).encode())
    for number in range(SHARDS["recipes"]):
        with tarfile.open(folder / f"recipes-{number:03d}.tar", "w") as tar:
            for row in pages[number::SHARDS["recipes"]]:
                names = [image and f"{row['id']}.{i}.jpg" for i, image in enumerate(row["images"])]
                for name, image in zip(names, row["images"], strict=True):
                    if image:
                        add(tar, name, (data / "recipes" / image).read_bytes())
                add(tar, f"{row['id']}.json", json.dumps({**row, "images": names}).encode())
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def train(arguments: list[str]) -> int:
    """train_tiny.py in one of several processes, with every step in metrics.jsonl and checkpoints often enough to be killed after one."""
    watch.LOG_STEPS, watch.SAVE_SECONDS, watch.FIRST_SAMPLE = 1, SAVED_EVERY, 1e9
    Path(f"{arguments[arguments.index('--out') + 1]}.pid{os.environ['RANK']}").write_text(str(os.getpid()))
    return train_tiny.main(arguments)


def command(model: str, data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.data_at_scale", "--train",
            "--model", model, "--data", str(data), "--steps", str(STEPS), "--out", str(out), "--no-cache", "--device", "cpu", *more]


def killed(model: str, data: Path, out: Path) -> str:
    """Start a run and kill both of its processes after a checkpoint in the middle of the last stage → where that was."""
    torchrun, last = subprocess.Popen(command(model, data, out)), recipes.get(f"{model}/tiny").stages[-1].name
    while True:
        assert torchrun.poll() is None, f"{model}: the run ended before it could be killed"
        if (out / "last.pt").exists() and (state := checkpoint.load(out / "last.pt"))["stage"] == last and state["step"] > 1:
            break
        time.sleep(0.2)
    for rank in range(2):
        os.kill(int(Path(f"{out}.pid{rank}").read_text()), signal.SIGKILL)
    assert torchrun.wait() != 0
    state = checkpoint.load(out / "last.pt")  # it may be a later one
    return f"{state['stage']}, step {state['step']} of {STEPS}"


def left(out: Path) -> tuple[dict, str]:
    """{(stage, step): losses} and a digest of all weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {(line["stage"], line["step"]): {name: value for name, value in line.items() if name.startswith(("loss/", "grad"))} for line in lines}
    assert len(losses) == len(lines), "each step is logged once"
    summary, digest = json.loads((out / "summary.json").read_text()), hashlib.sha256()
    for stage in summary["stages"]:
        for name, tensor in sorted(checkpoint.load(out / f"{stage['name']}.pt").items()):
            digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return losses, digest.hexdigest()


def kill(data: Path, model: str) -> dict:
    with tempfile.TemporaryDirectory() as name:
        shards, one, other = make_shards(data, Path(name) / "shards"), Path(name) / "whole", Path(name) / "killed"
        subprocess.run(command(model, shards, one), check=True)
        at = killed(model, shards, other)
        subprocess.run(command(model, shards, other, "--resume"), check=True)
        (losses, weights), (again, weights_again) = left(one), left(other)
        return {"killed": at, "steps": len(losses), "stages": len({stage for stage, _ in losses}),
                "equal_steps": sum(again.get(step) == of_step for step, of_step in losses.items()), "equal_weights": weights == weights_again}


# ---- what is stored

def table(result: dict) -> str:
    runs = result["runs"]
    rows = ["| start on 665,000 conversations | seconds | of which reading | seconds of a core | peak memory of the process, MiB |", "| --- | --- | --- | --- | --- |"]
    for name, found in (("the first, which makes the index", runs["start"]["start 1"]), ("later ones", runs["start"]["start 2"])):
        rows.append(f"| {name} | {found['seconds']} | {found['reading']} | {found['core_seconds']} | {found['peak_mib']} |")
    rows += ["", "| two processes on 18 shards | killed after | steps | equal | weights equal |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {model} | {found['killed']} | {found['steps']} in {found['stages']} stages | {found['equal_steps']} | {'yes' if found['equal_weights'] else 'no'} |"
             for model, found in runs.items() if model != "start"]
    return "\n".join(rows)


def store(name: str, found: dict) -> None:
    result = json.loads(STORED.read_text()) if STORED.exists() else {"runs": {}}
    result |= {"machine": machine(), "versions": versions(), "runs": result["runs"] | {name: found}}
    with replacing(STORED) as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m experiments.data_at_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--start-on", metavar="LINES", help="what --start runs in a process of its own")
    parser.add_argument("--kill", nargs="+", metavar=("DATA", "MODEL"), help="the folder that holds emoji/ and recipes/, and what to train")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help="what --kill runs in two processes")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(argv)
    if options.train:
        return train(options.train)
    if options.start_on:
        print(json.dumps(start(options.start_on)))
    if options.start:
        store("start", starts())
    for model in options.kill[1:] if options.kill else ():
        store(model, kill(Path(options.kill[0]), model))
    if options.table:
        print(table(json.loads(STORED.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
