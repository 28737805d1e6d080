"""The source of this repository as data, for test_style.py and test_readme.py: files, trees, who imports whom."""

import ast
import io
import json
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovlm"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py"), *(ROOT / ".ci").glob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
COURSE = sorted((ROOT / "assignments").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(read(path), str(path))


def imports(node: ast.AST) -> set[str]:
    """Every module that is imported in here, in full: `from nanovlm import masks` is nanovlm.masks."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports are written in full, from nanovlm…"
            found |= {module_or_name(child.module, alias.name) for alias in child.names}
    return found


def module_or_name(module: str, name: str) -> str:
    """from a import b: a.b where that is a module of ours, else a."""
    inside = ROOT.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inside.is_dir() or inside.with_suffix(".py").exists() else module


@cache
def own_imports(path: Path) -> list[tuple[str, ...]]:
    """("papers", "clip") for nanovlm.papers.clip; the bare package (its version, its folder) is no dependency."""
    names = [name.split(".") for name in sorted(imports(tree(path)))]
    return [tuple(name[1:]) for name in names if name[0] == "nanovlm" and len(name) > 1]


@cache
def file_of(name: tuple[str, ...]) -> Path:
    """("papers", "clip") → nanovlm/papers/clip.py; ("hub",) → nanovlm/hub/__init__.py."""
    path = PACKAGE.joinpath(*name)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def closure(path: Path) -> set[Path]:
    """The files of the package that one must read to have read this one whole, itself included."""
    seen, waiting = set(), [path]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [file_of(name) for name in own_imports(path)]
    return seen


@cache
def code_lines(text: str) -> int:
    """Lines of code: no blanks, no comments, no docstrings."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in nothing
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(read(path))["cells"] if cell["cell_type"] == "code"]


def notebook_tree(path: Path) -> ast.Module:
    """The Python of a notebook; lines for IPython itself (%matplotlib, !ls) are left out."""
    lines = "\n".join("".join(cell["source"]) for cell in code_cells(path)).split("\n")
    return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))), str(path))
