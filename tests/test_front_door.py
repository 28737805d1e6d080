"""What the first page promises: the six papers' figures, its commands, one public address, notebooks that open in Colab."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source import NOTEBOOKS, ROOT, code_cells, read
from test_readme import README, blocks

import train_tiny
from experiments.tiny_runs import RESULTS, SUMMARY
from nanovlm import chat
from nanovlm.making import capfilt, instruct
from nanovlm.runs import shipped

PARSERS = {"train_tiny.py": train_tiny.make_parser, "nanovlm.chat": chat.make_parser, "nanovlm.making.capfilt": capfilt.make_parser,
           "nanovlm.making.instruct": instruct.make_parser}
PUBLIC = re.search(r'^Repository = "https://github\.com/(.+?)"', read(ROOT / "pyproject.toml"), re.MULTILINE)[1]  # OWNER/nanovlm
BADGE = "https://colab.research.google.com/github/{}/blob/main/notebooks/{}"


@pytest.fixture(autouse=True)
def as_shipped(nothing_is_shipped, monkeypatch):  # conftest.py's goes first
    """Here weights/ is what a reader finds in it."""
    monkeypatch.delenv("NANOVLM_SHIPPED")


# --- the six papers ---

def reached() -> dict[str, tuple[str, str]]:
    """{"blip2": (what it gets right, minutes)} of the table of six papers."""
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in README.split("\n") if line.startswith("|")]
    six = [row for row in rows if len(row) == 7][2:]
    return {row[0].lower().replace("-1.5", "15").replace("-", ""): (row[5], row[6]) for row in six}


def test_what_the_six_reach_is_what_is_stored():
    assert set(reached()) == {"blip", "flamingo", "blip2", "llava", "instructblip", "llava15"}
    for paper, (right, minutes) in reached().items():
        name = f"{paper}_tiny_scenes"
        if not (RESULTS / f"{name}.json").is_file():
            assert right == minutes == "–", f"{paper}: no result is stored"
            continue
        runs = [run for run in json.loads(read(RESULTS / f"{name}.json"))["runs"] if run["seed"] == 0]  # which is shipped
        stored = [[sum(run["eval"][metric][of] for run in runs) / len(runs) for of in ("value", "chance")]
                  for result, metric, _ in SUMMARY if result == name]
        said = re.search(r": (\d\.\d\d) \((\d\.\d\d)\)$", right)
        assert said and list(said.groups()) in [[f"{figure:.2f}" for figure in pair] for pair in stored], f"{paper}: {right}"
        assert minutes == f"{sum(run['seconds'] for run in runs) / len(runs) / 60:.0f}", paper


# --- the commands ---

def ours() -> list[tuple[str, list[str]]]:
    """(program, arguments) of the README's commands that have a parser here."""
    parts = [shlex.split(part, comments=True) for block in blocks("bash") for line in block.split("\n") for part in line.split("&&")]
    programs = [(words[2:] if words[1] == "-m" else words[1:]) for words in parts if words[:1] == ["python"]]
    return [(words[0], words[1:]) for words in programs if words[0] in PARSERS]


@pytest.mark.parametrize(("program", "words"), ours(), ids=str)
def test_the_commands_are_understood(program: str, words: list[str]):
    options = PARSERS[program]().parse_args(words)
    if program == "train_tiny.py":
        assert options.model in train_tiny.MODELS
        trained = re.search(r"^for model in (.+); do$", read(ROOT / ".ci" / "run"), re.MULTILINE)[1].split()
        assert set(trained) == set(reached()), ".ci/run trains every paper for a few steps"
    if program == "nanovlm.chat":
        assert options.run.startswith("runs/") or list(shipped.folder().glob(f"{options.run}-tiny@*.npz")), "not shipped"


def test_the_first_command_answers(capsys: pytest.CaptureFixture):
    words = next(words for program, words in ours() if program == "nanovlm.chat")
    assert chat.main(words) == 0
    assert len(capsys.readouterr().out.split()) > 5


# --- the public address ---

def test_there_is_one_public_address():
    """Whoever publishes this repository changes all of them at once."""
    texts = {path.name: read(path) for path in (ROOT / "README.md", ROOT / "README_zh.md", *NOTEBOOKS)}
    for name, text in texts.items():
        said = set(re.findall(r"github(?:\.com)?/([\w.-]+/nanovlm)\b", text))
        assert said == {PUBLIC}, f"{name}: {said}, and pyproject.toml says {PUBLIC}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab(path: Path):
    link = f"]({BADGE.format(PUBLIC, path.name)})"
    first = json.loads(read(path))["cells"][0]
    assert first["cell_type"] == "markdown" and link in "".join(first["source"]), f"{path.name}: its first cell needs {link}"
    for name in ("README.md", "README_zh.md"):
        assert link in read(ROOT / name), f"{name}: the table of notebooks needs {link}"


def first_code(path: Path) -> str:
    return "".join(code_cells(path)[0]["source"])


def test_all_notebooks_begin_alike():
    assert len({first_code(path) for path in NOTEBOOKS}) == 1


def begin(folder: Path, colab: bool, env: dict[str, str] | None = None) -> str:
    """Run the notebooks' first cell twice, as a reader may, and import the package. → where we are then, and where it is."""
    pretend = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n" if colab else ""
    program = pretend + 2 * (first_code(NOTEBOOKS[0]) + "\n") + "import nanovlm\nprint(os.getcwd(), nanovlm.__file__)"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env={**os.environ, **(env or {})}, check=True, text=True,
                          capture_output=True).stdout.split("\n")[-2]


def test_in_colab_the_first_cell_fetches_the_repository(tmp_path: Path):
    """git is told to find the public address in a folder: a small repository with nothing to install."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    public, content = tmp_path / "public", tmp_path / "content"
    for file in ("nanovlm/__init__.py", "notebooks/a.ipynb", "requirements.txt"):
        (public / file).parent.mkdir(parents=True, exist_ok=True)
        (public / file).touch()
    content.mkdir()
    as_somebody = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*as_somebody, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=public, check=True)
    there = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{public.as_uri()}.insteadOf",
             "GIT_CONFIG_VALUE_0": f"https://github.com/{PUBLIC}"}
    clone = content / "nanovlm"
    assert begin(content, colab=True, env=there) == f"{clone / 'notebooks'} {clone / 'notebooks' / '..' / 'nanovlm' / '__init__.py'}"


def test_elsewhere_the_first_cell_does_nothing(tmp_path: Path):
    """In the root of a clone and in its notebooks/."""
    for folder in ("nanovlm", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "nanovlm" / "__init__.py").touch()
    for folder in (tmp_path, tmp_path / "notebooks"):
        assert begin(folder, colab=False).startswith(f"{folder} ")
    assert sorted(path.name for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == ["__init__.py", "nanovlm", "notebooks"]
