"""Find the bug: the package with one bug in it and what is seen of it; the student names file and line.

    BUGS ──► make_bug(folder, seed) ──► folder/nanovlm/…    the package, one statement of it wrong, comments kept
                                        folder/SYMPTOM.md   what is seen, and the numbers beside those of a healthy package
                                        folder/look.py      the command that made the numbers
                                        folder/answer.txt   one line: masks.py:42
    folder ──► grade_bug(folder) ──► points, one sentence

Each row is a break of the package that a test of tests/ turns red (tests/breaks.md has them all). The numbers are stored in bugs.json:

    python -m assignments.bugs --seconds 600       makes those that are not there yet; a bug that has changed is measured again
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nanovlm import __version__
from nanovlm.errors import UserError
from nanovlm.files import replacing

HERE = Path(__file__).resolve().parent
PACKAGE, STORE, STAMP, ANSWER = HERE.parent / "nanovlm", HERE / "bugs.json", "bug.json", "answer.txt"
RIGHT, NEAR, FILE = 10.0, 5.0, 2.0  # points: the statement, its function, its file
TEMPLATE = "# One line, such as masks.py:42 or papers/llava.py:42. Which statement is wrong? Any line of it counts.\n"


@dataclass(frozen=True)
class Bug:
    paper: str
    file: str  # under nanovlm/
    old: str  # stands in it once
    new: str
    says: str  # what is wrong: told when it has been found
    symptom: str  # what is seen, and nothing of why
    look: tuple[str, str]  # what look.py measures


BUGS = (
    Bug("BLIP", "papers/blip.py",
        "return self.match_head(states[:, 0])",
        "return self.match_head(states[:, -1])",
        "the matching head reads the last place of the row, padding or not, and not [ENC]",
        "The filter of CapFilt was good yesterday. Today, with the same weights, its verdict on a text depends on which other "
        "texts are in the batch.",
        ("filter", "blip/tiny@filter")),
    Bug("BLIP", "papers/blip.py",
        "states = self.text_encoder(ids, masks.padding(attention_mask), image_tokens)",
        "states = self.text_encoder(ids, masks.padding(attention_mask))",
        "the matching head judges texts without their pictures",
        "Retrieval by cosine is as good as ever, but the filter has become blind: exchange the pictures, and its verdicts stay "
        "what they were.",
        ("filter", "blip/tiny@filter")),
    Bug("BLIP", "momentum.py",
        "weight = 1.0 if self.steps == 0 else 1 - self.config.momentum",
        "weight = 1.0 if self.steps == 0 else self.config.momentum",
        "m and 1 − m are exchanged: the slow copy is not slow",
        "Pre-training runs, and no loss is infinite. But somebody who printed the distance between the encoders and their slow "
        "copies was surprised.",
        ("queue", "blip/tiny@pretrain")),
    Bug("BLIP", "momentum.py",
        "self.place.copy_((self.place + G) % Q)",
        "self.place.copy_(self.place % Q)",
        "the place in the queue does not move on: each batch writes over the one before",
        "ITC learns more slowly than in the paper, as if there were hardly any negatives, though the queue has room for a "
        "thousand keys.",
        ("queue", "blip/tiny@pretrain")),
    Bug("Flamingo", "masks.py",
        "seen = phi[..., None] >= number if all_previous else phi[..., None] == number",
        "seen = phi[..., None] == number if all_previous else phi[..., None] >= number",
        "a word looks at all images before it, not at the last one",
        "With one example the answers are nearly as good as they were. Further examples on the page do not help, as they did.",
        ("names", "flamingo/tiny")),
    Bug("Flamingo", "gated_xattn.py",
        "return y + self.dense_gate.tanh() * self.feedforward(self.norm2(y))",
        "return y + self.attention_gate.tanh() * self.feedforward(self.norm2(y))",
        "one gate for both parts: α stands where β belongs",
        "With shut gates the model is the language model bit for bit, as it should be. With the trained gates it cannot name "
        "what it sees.",
        ("names", "flamingo/tiny")),
    Bug("Flamingo", "papers/flamingo.py",
        "flat = media.flatten(1, 2)",
        "flat = media.transpose(1, 2).flatten(1, 2)",
        "latents of different images are mixed: the mask takes them for those of one",
        "A page with one picture is answered as ever. The more pictures stand on a page, the more it is as if every word saw a little of each.",
        ("names", "flamingo/tiny")),
    Bug("BLIP-2", "papers/blip2.py",
        "states = self.qformer(image_tokens, input_ids, masks.bidirectional(Q, attention_mask))",
        "states = self.qformer(image_tokens, input_ids, masks.unimodal(Q, attention_mask))",
        "ITM under ITC's mask: queries and text never meet",
        "Of stage 1's three losses two are what they were. The third is bad, and in training it falls to a certain number and "
        "stays there: that of somebody who knows how many pairs belong, but not which.",
        ("losses", "blip2/tiny@stage1")),
    Bug("BLIP-2", "papers/blip2.py",
        "read = torch.cat([torch.full_like(ids[:, :1], self.config.decode_id), ids[:, 1:]], dim=1)",
        "read = torch.cat([torch.full_like(ids[:, :1], self.config.decode_id), ids[:, :-1]], dim=1)",
        "the words are moved by one behind [DEC]: each is to be guessed without the word before it",
        "One of stage 1's losses is much too high with weights that were trained well; captions that are generated are still "
        "good.",
        ("losses", "blip2/tiny@stage1")),
    Bug("BLIP-2", "qformer.py",
        "x = self.dropout(self.norm(torch.cat(rows, dim=1)))",
        "x = self.dropout(torch.cat(rows, dim=1))",
        "queries and words enter the first layer without their norm",
        "Every answer is a proper sentence, but it is about another picture.",
        ("answers", "blip2/tiny@stage2")),
    Bug("LLaVA", "papers/llava.py",
        "return self.vision(images, depth=depth)[:, 1:]",
        "return self.vision(images, depth=depth)[:, :-1]",
        "the class token is kept, and the last patch is lost",
        "As many image tokens as before, and answers in good English. It takes left for right and top for bottom more often "
        "than it did.",
        ("answers", "llava/tiny")),
    Bug("LLaVA", "decoder.py",
        "positions = masks.positions(seen)[:, -T:]",
        "positions = masks.positions(seen)[:, :T]",
        "new tokens get the places of the first ones in the cache",
        "The loss of whole conversations is what it was. The first token of an answer is right; what follows it is not.",
        ("answers", "llava/tiny")),
    Bug("LLaVA", "attention.py",
        "q, k = rotate(torch.cat([q, k], dim=1), rope).chunk(2, dim=1)",
        "k, q = rotate(torch.cat([q, k], dim=1), rope).chunk(2, dim=1)",
        "queries and keys are exchanged when they are turned together",
        "Everything with rotary positions talks nonsense; the image encoder, which has none, is as good as ever.",
        ("answers", "llava/tiny")),
    Bug("InstructBLIP", "qformer.py",
        "mask = None if attention_mask is None else masks.bidirectional(Q, attention_mask)",
        "mask = None if attention_mask is None else masks.unimodal(Q, attention_mask)",
        "the queries and the question do not see each other",
        "Whatever is asked about a picture, its prefix for the language model is the same. It answers, but less well than it did.",
        ("answers", "instructblip/tiny")),
    Bug("LLaVA-1.5", "tiling.py",
        "tiles = torch.cat([plane, ends], dim=1).flatten(0, 1)",
        "tiles = torch.cat([ends, plane], dim=1).flatten(0, 1)",
        "the mark that ends a row stands before it",
        "As many image tokens as there should be, and nothing fails. Pictures of several tiles are read less well than they were.",
        ("answers", "llava15/tiny-hd")),
)


def chosen(seed: int) -> Bug:
    return Random(f"bug {seed}").choice(BUGS)


def patched(bug: Bug) -> str:
    source = (PACKAGE / bug.file).read_text(encoding="utf-8")
    if source.count(bug.old) != 1:
        raise UserError(f"assignments/bugs.py: {bug.old!r} stands {source.count(bug.old)} times in {bug.file}; it must stand there once.")
    source = source.replace(bug.old, bug.new)
    ast.parse(source)
    return source


# --- to hand out ---

def make_bug(folder: Path, seed: int) -> list[Path]:
    """Write the folder → what a student reads. The seed chooses the bug; who does not know the seed cannot tell which it is."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a folder that does not exist, for a student may have worked in this one.")
    bug = chosen(seed)
    source = patched(bug)
    shutil.copytree(PACKAGE, folder / "nanovlm", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "nanovlm" / bug.file).write_text(source, encoding="utf-8")
    shutil.copyfile(HERE / "look.py", folder / "look.py")
    salt = f"{Random(f'salt {seed}').getrandbits(64):016x}"
    texts = {"SYMPTOM.md": page(bug, folder.name), ANSWER: TEMPLATE,
             STAMP: json.dumps({"nanovlm": __version__, "salt": salt, "number": number(bug, salt)}, indent=1) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in ("SYMPTOM.md", ANSWER, "look.py", "nanovlm")]


def number(bug: Bug, salt: str) -> str:
    """What the stamp says of the bug: enough to know it again, not to read it."""
    return hashlib.sha256(f"{salt} {bug.file} {bug.old} {bug.new}".encode()).hexdigest()[:16]


def page(bug: Bug, folder: str) -> str:
    stored = measured()
    healthy, sick = (stored.get(key) for key in (key_of(None, bug.look), key_of(bug, bug.look)))
    command = f"python look.py {' '.join(bug.look)}"
    lines = ["# Find the bug", "",
             f"`nanovlm/` in this folder is the package with **one** wrong statement in it. It has to do with {bug.paper}, but it may stand in "
             "any file that this paper uses. All comments and docstrings are right.", "", "## What is seen", "", bug.symptom, ""]
    if healthy and sick:
        lines += [f"`{command}`, with the shipped weights:", "", "| | this package | a healthy one |", "|---|---|---|"]
        lines += [f"| {name} | {sick.get(name, '–')} | {value} |" for name, value in healthy.items() if name != "said"]
        if "said" in healthy:
            lines += ["", "What it says, and in brackets what is right:", "", "```", *sick["said"], "```", "", "A healthy package:", "", "```",
                      *healthy["said"], "```"]
    return "\n".join([*lines, "", "## What to do", "",
                      "1. Before you read code: which parts does the symptom clear, and which are left? Write down two suspects.",
                      "2. Make an experiment that tells them apart: perturb a picture, exchange two words, print a mask, compare cached and whole. "
                      "`look.py` shows how a model with trained weights is opened.",
                      f"3. Write file and line into `{ANSWER}`, such as `masks.py:42`. Any line of the wrong statement counts.", "",
                      "```bash", f"cd {folder}", "export NANOVLM_SHIPPED=<your clone of nanovlm>/weights    # the weights are not copied",
                      command, "```", "",
                      f"The statement: {RIGHT:.0f} points; its function: {NEAR:.0f}; its file: {FILE:.0f}; one answer.", "",
                      "**An honest word.** The package is public, so `diff -r` shows the line in a second. Nobody can stop you. But a diff exists only "
                      "where a right version exists already; in your own work there is none, and what is practised here, from a number to a suspect to "
                      "a line, is all that helps there. You will be asked how you found it.", ""])


# --- to grade ---

def grade_bug(folder: Path) -> tuple[float, str]:
    """Points and one sentence, whatever stands in the folder."""
    bug, why = stamped(folder)
    if bug is None:
        return 0.0, why
    try:
        text = (folder / ANSWER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return 0.0, f"{ANSWER} is not there or is no text: write one line such as masks.py:42 into it."
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if len(lines) != 1:
        return 0.0, f"{ANSWER} has {len(lines)} answers: write one line such as masks.py:42."
    match = re.fullmatch(r"(?:.*\bnanovlm[/\\])?([\w/\\]+\.py)\s*(?::|,|\s)\s*(?:line\s*)?(\d{1,6})", lines[0])
    if match is None:
        return 0.0, f"{ANSWER} says {lines[0][:60]!r}: write one line such as masks.py:42."
    file, line = match[1].replace("\\", "/"), int(match[2])
    if not (PACKAGE / file).is_file():
        return 0.0, f"There is no file {file} in nanovlm/: write its path from there, such as papers/llava.py:42."
    if file != bug.file:
        return 0.0, f"The bug is not in {file}."
    statement, function = places(bug)
    if line in statement:
        return RIGHT, f"{file}:{line} is it: {bug.says}."
    if line in function:
        return NEAR, f"{file}:{line} is near: the wrong statement stands in this function."
    return FILE, f"The bug is in {file}, but not in this function."


def stamped(folder: Path) -> tuple[Bug | None, str]:
    """Which bug the folder has, or why nobody can say."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        found = [bug for bug in BUGS if number(bug, stamp["salt"]) == stamp["number"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"{STAMP} is not there or is broken: hand in the folder that was handed out, with all that was in it."
    return (found[0], "") if found else (None, f"{STAMP} was made by another version of nanovlm: grade it with that one.")


def places(bug: Bug) -> tuple[range, range]:
    """Lines of the wrong statement (of an `if` or a loop its head alone), and of the function around it, in the file as handed out."""
    source = patched(bug)
    first = source[:source.index(bug.new)].count("\n") + 1
    last, tree = first + bug.new.rstrip("\n").count("\n"), ast.parse(source)
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= last and node.end_lineno >= first]
    functions = [node for node in around if isinstance(node, ast.FunctionDef)] or around
    inner = max(functions, key=lambda node: node.lineno)
    own = [node for node in around if node.lineno >= inner.lineno and not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    innermost = max(own, key=lambda node: (node.lineno, -node.end_lineno))
    end = innermost.body[0].lineno - 1 if isinstance(innermost, (ast.If, ast.For, ast.While, ast.With)) else innermost.end_lineno
    return range(min(innermost.lineno, first), max(end, last) + 1), range(inner.lineno, inner.end_lineno + 1)


# --- the numbers ---

def measured() -> dict[str, dict]:
    return json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}


def key_of(bug: Bug | None, look: tuple[str, str]) -> str:
    return f"{' '.join(look)}: {f'{bug.file}: {bug.new}' if bug else 'healthy'}"


def measure(bug: Bug | None, look: tuple[str, str]) -> dict:
    """What look.py prints in a folder with this bug, or with none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / "nanovlm", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        if bug:
            (folder / "nanovlm" / bug.file).write_text(patched(bug), encoding="utf-8")
        shutil.copyfile(HERE / "look.py", folder / "look.py")
        made = subprocess.run([sys.executable, "look.py", *look], cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False,
                              env={**os.environ, "NANOVLM_SHIPPED": str(HERE.parent / "weights"), "PYTHONUTF8": "1"})
    if made.returncode:
        raise UserError(f"look.py {' '.join(look)} fails{f' with the bug in {bug.file}' if bug else ''}: {made.stderr.strip().splitlines()[-1]}")
    return json.loads(made.stdout)


def main() -> int:
    parser = argparse.ArgumentParser("python -m assignments.bugs", description="Measure what is seen of each bug, into bugs.json.")
    parser.add_argument("--seconds", type=float, default=36_000, help="begin nothing new after so long; the same command goes on")
    options, began = parser.parse_args(), time.monotonic()
    wanted = {key_of(which, bug.look): (which, bug.look) for bug in BUGS for which in (None, bug)}
    for key, (bug, look) in wanted.items():
        stored = {name: figures for name, figures in measured().items() if name in wanted}
        if key in stored or time.monotonic() - began > options.seconds:
            continue
        try:
            stored[key] = measure(bug, look)
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
        with replacing(STORE) as beside:
            beside.write_text(json.dumps(stored, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        print(key, stored[key], f"{time.monotonic() - began:.0f} s so far", sep="\n  ", flush=True)
    print(f"{len(measured())} of {len(wanted)} are measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
