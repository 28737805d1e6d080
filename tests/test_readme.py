"""The README, the notebooks and .ci/run say what is there, and what they say can be done."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from oracles import hf_llava
from source import MODULES, NOTEBOOKS, ROOT, closure, code_cells, read, relative

from experiments import (
    backbones,
    blip2_stage1,
    blip_capfilt,
    capfilt_emoji,
    data_at_scale,
    flamingo_ablations,
    flamingo_emoji,
    flamingo_recipes,
    instructblip_ablations,
    instructblip_mixture,
    llava15_ladder,
    llava15_tiles,
    llava_data_mix,
    plan_published,
    plan_simulation,
    small_recipes,
    tiny_runs,
)

README, MEASURED = read(ROOT / "README.md"), read(ROOT / "experiments" / "README.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```(?:{language})\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# --- the tree ---

def listed(block: str) -> dict[str, str]:
    """{path: sentence} of a drawn tree: folders end with "/", indentation says what lies in what."""
    found, above = {}, []  # above: (column, path) of the folders around
    for line in block.rstrip().split("\n"):
        match = re.match(r"([\s│├└─]*)(\S+)(?:\s+(?:#\s*)?(.*))?$", line)
        column = len(match[1])
        above = [(c, folder) for c, folder in above if c < column]
        path = (above[-1][1] if above else "") + match[2]
        found[path] = match[3] or ""
        if path.endswith("/"):
            above.append((column, path))
    return found


def test_the_tree_in_the_readme_is_the_tree():
    trees = [block for block in blocks("text") if block.startswith("nanovlm/")]
    assert len(trees) == 1, "the README needs one ```text block whose first line begins with nanovlm/"
    said = listed(trees[0])
    for path, sentence in said.items():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), f"{path} does not exist"
        assert len(sentence.split()) >= 2, f"{path}: say in a few words what it is"
    there = {relative(path) for path in [*(p for p in MODULES if p.name != "__init__.py"), *NOTEBOOKS]}
    there |= {relative(path) for path in [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]}
    assert not (missing := sorted(there - set(said))), f"missing in the tree of the README: {missing}"


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@@\w*|TODO|FIXME|XXX", README + MEASURED)


def headings_of(text: str) -> set[str]:
    """As links name them."""
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.split("\n") if line.startswith("#")}


def test_what_is_linked_is_there():
    """Files and pictures beside each README, and its own headings."""
    course = read(ROOT / "assignments" / "README.md")
    for folder, text in ((ROOT, README), (ROOT, read(ROOT / "README_zh.md")), (ROOT / "experiments", MEASURED), (ROOT / "assignments", course)):
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        headings = headings_of(text)
        assert links or text is course
        for link in links:
            file, _, heading = link.partition("#")
            assert (folder / file).is_file() if file else heading in headings, f"{folder}: {link} leads nowhere"
            assert not file.startswith("experiments/README") or heading in ("", *headings_of(MEASURED)), f"{link} leads nowhere"


@pytest.mark.parametrize("block", [
    "nanovlm/        # the package\n  a.py        # first\n  papers/\n    b.py      # second\ntests/  # third\n",
    "nanovlm/      the package\n├── a.py      first\n├── papers/\n│   └── b.py  second\ntests/        third\n",
])
def test_trees_are_read_right(block: str):
    assert listed(block) == {"nanovlm/": "the package", "nanovlm/a.py": "first", "nanovlm/papers/": "",
                             "nanovlm/papers/b.py": "second", "tests/": "third"}


# --- the commands ---

def commands() -> list[list[str]]:
    """The shell commands of the README, word by word; && joins several, NAME=value before is dropped."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in blocks("bash|sh|shell|console")
             for line in block.replace("\\\n", " ").split("\n")]
    parts = [part.split() for line in lines for part in re.split(r"&&|;", line.removeprefix("$ "))]
    return [words[next(i for i, word in enumerate(words) if "=" not in word):] for words in parts if words]


def test_the_commands_in_the_readme_exist():
    assert len(commands()) >= 3
    for words in commands():
        said = " ".join(words)
        for flag, file in pairwise(words):
            assert flag != "-r" or (ROOT / file).is_file(), f"{said}: there is no {file}"
        if words[0] in ("python", "torchrun") and words[1:]:
            at = words.index("-m") + 1 if "-m" in words else next(i for i, w in enumerate(words) if w.endswith(".py"))
            if words[at] in sys.stdlib_module_names:  # python -m venv
                continue
            module = ROOT / words[at].replace(".", "/")
            source = (module / "__main__.py" if module.is_dir() else module.with_suffix(".py")) if "-m" in words else ROOT / words[at]
            assert source.is_file(), f"{said}: there is no {relative(source)}"
            text = "".join(read(path) for path in closure(source))
            unknown = [w for w in words[at + 1:] if w.startswith("--") and f'"{w.split("=")[0]}"' not in text]
            assert not unknown, f"{said}: unknown options {unknown}"


def test_continuous_integration_does_what_the_readme_says():
    script = read(ROOT / ".ci" / "run").split("\n")
    tests = {" ".join(words) for words in commands() if "pytest" in words}
    installs = {" ".join(words) for words in commands() if words[:2] == ["pip", "install"] and "-dev" in words[-1]}
    assert len(tests) == 1 and tests <= set(script), f"{tests} is not a line of .ci/run"
    assert len(installs) == 1 and installs <= {line.replace(" -q", "") for line in script}


def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """In a folder where a (tiny) checkpoint has the name of the published one; what is printed is what is said."""
    hf_llava(seed=0).save_pretrained(tmp_path / "llava-1.5-7b-hf")
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    for snippet in blocks("python"):
        capsys.readouterr()
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
        printed = re.findall(r"^print\(.*\)\s+# (\S+?)[,.]?(?:\s|$)", snippet, re.MULTILINE)
        assert capsys.readouterr().out.split() == printed


# --- the figures ---

def test_the_figures_are_the_stored_ones():
    assert tiny_runs.summary() in README, "python -m experiments.tiny_runs --summary prints another"
    assert plan_published.summary() in README, "python -m experiments.plan_published --summary prints another"
    stored = {path.name: json.loads(read(path)) for path in (ROOT / "experiments" / "results").glob("*.json")}
    assert len(stored) >= 4
    for name, result in stored.items():
        if "runs" in result or "losses" in result:
            made_by = {"backbones.json": backbones, "blip2_stage1.json": blip2_stage1, "llava_data_mix.json": llava_data_mix,
                       "llava15_ladder.json": llava15_ladder, "llava15_tiles.json": llava15_tiles, "capfilt_emoji.json": capfilt_emoji, "flamingo_emoji.json": flamingo_emoji,
                       "flamingo_ablations.json": flamingo_ablations, "instructblip_ablations.json": instructblip_ablations, "instructblip_mixture.json": instructblip_mixture,
                       "flamingo_recipes.json": flamingo_recipes, "data_at_scale.json": data_at_scale, "plan_published.json": plan_published,
                       "plan_simulation.json": plan_simulation, "small_recipes.json": small_recipes,
                       "blip_capfilt.json": blip_capfilt}.get(name, tiny_runs)
            assert made_by.table(result) in MEASURED, f"{name}: python -m {made_by.__name__} --table prints another"
        for case in result.get("cases", []):
            row = f"| {case['name']} | {case['ratio']['median']:.2f} |"
            assert row in MEASURED, f"{name}: experiments/README.md has no row that begins with {row}"
            if case["name"].startswith("training step"):
                assert f"{case['ratio']['median']:.2f} times as long" in README


# --- notebooks ---

def test_notebooks_are_stored_as_they_ran():
    for path in NOTEBOOKS:
        name, cells = relative(path), code_cells(path)
        assert path.stat().st_size < 1_000_000, f"{name} is larger than 1 MB"
        numbered = [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert numbered and any(cell["outputs"] for cell in cells), f"python .ci/notebooks.py --save {name}"
        assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"], f"{name}: an error"
