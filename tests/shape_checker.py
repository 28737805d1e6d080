"""Shape comments, executed: `x = f(y)  # (B, T, D // H)` is held against x.shape each time the line has run.

    with ShapeChecker(paths) as checker:            comments found in the source by `shape_comments`
        model(…)                                    checked while it runs, by sys.settrace
    checker.wrong, checker.executed                 one sentence per mistake; (path, line) of all that ran

A letter means the frame's own integer of that name (`B, T, _ = x.shape`), else `self.heads` or `self.head_dim` for H
and d, else whatever it met first in this call of the function, and must mean the same until the call ends. `2W`, `B·W`,
`1 + N`, `T - 1` are calculated; one unknown letter is solved for, with two (`h / patch`) the dimension is left alone.
`return y  # (B, T)` is held against what is returned; of a batch, a dict, each tensor is.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

COMMENT = re.compile(r"# \(((?:[^(),]+,)+[^(),]*|[^(),]+,)\)(?=$|[,;:.]? )")
LETTER = re.compile(r"[A-Za-z_]\w*")
OF_SELF = {"H": "heads", "d": "head_dim"}


@dataclass
class Statement:
    """An assignment or a return that says what shape it makes."""

    first: int
    last: int
    names: list[str] | None  # what is assigned; None for a return
    dims: list[str]


def shape_comments(path: Path) -> dict[int, Statement]:
    """{line: statement}, for every line of every statement that has a shape comment."""
    with tokenize.open(path) as file:
        shapes = {token.start[0]: match[1] for token in tokenize.generate_tokens(file.readline)
                  if token.type == tokenize.COMMENT and (match := COMMENT.match(token.string))}
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)):
            lines = range(node.lineno, node.end_lineno + 1)
            for shape in [shapes[line] for line in lines if line in shapes][-1:]:
                targets = [] if isinstance(node, ast.Return) else getattr(node, "targets", None) or [node.target]
                parts = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
                names = [ast.unparse(part) for part in parts] or None
                dims = [dim.strip() for dim in shape.split(",") if dim.strip()]
                found |= dict.fromkeys(lines, Statement(lines[0], lines[-1], names, dims))
    return found


def calculate(dim: str, known: dict[str, int]) -> float:
    """2W, B·W, D // H, 1 + N: the number."""
    expression = re.sub(r"(?<=\d)\s*(?=[A-Za-z])", "*", dim.replace("·", "*").replace("−", "-"))
    return eval(expression, {"__builtins__": {}}, known)


def fits(dim: str, size: int, known: dict[str, int], letters: dict[str, int]) -> bool:
    """Can this dimension be `size`? A letter that is met for the first time is written into `letters`."""
    unknown = sorted(set(LETTER.findall(dim)) - set(known))
    if not unknown:
        return calculate(dim, known) == size
    if len(unknown) > 1:
        return True
    values = [v for v in range(8 * size + 8) if v and calculate(dim, known | {unknown[0]: v}) == size]
    if dim == unknown[0]:
        values = [size]
    if len(values) == 1:
        letters[unknown[0]] = known[unknown[0]] = values[0]
    return bool(values)


class ShapeChecker:
    def __init__(self, paths: Sequence[Path]):
        self.comments = {str(path): shape_comments(path) for path in paths}
        self.executed: set[tuple[str, int]] = set()
        self.wrong: set[str] = set()
        self.calls: dict[FrameType, tuple[Statement | None, dict[str, int]]] = {}  # what runs now, letters

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, value: object):
        code = frame.f_code
        if code.co_filename not in self.comments or code.co_name.startswith("<"):
            return None  # not ours, or a comprehension, which shares its line with the statement around it
        running, letters = self.calls.get(frame, (None, {}))
        if event == "exception":
            running = None  # the statement did not get done
        elif running is not None and not (event == "line" and running.first <= frame.f_lineno <= running.last):
            if running.names is not None:
                for name in running.names:
                    self.check(frame, running, name, frame.f_locals, letters)
            elif event == "return":
                for returned in value if isinstance(value, tuple) else [value]:
                    self.check(frame, running, "returned", {"returned": returned}, letters)
            running = None
        if event == "line":
            running = running or self.comments[code.co_filename].get(frame.f_lineno)
        self.calls[frame] = (running, letters)
        if event == "return":
            del self.calls[frame]
        return self.trace

    def check(self, frame: FrameType, statement: Statement, name: str, values: dict, letters: dict[str, int]) -> None:
        value = eval(name, {}, values)
        if isinstance(value, dict):  # a batch
            for key in value:
                self.check(frame, statement, f"{name}[{key!r}]", values, letters)
        shape = getattr(value, "shape", None)
        if shape is None:
            return
        path, local, dims = frame.f_code.co_filename, frame.f_locals, statement.dims
        self.executed.add((path, statement.first))
        own = {letter: getattr(local.get("self"), field, None) for letter, field in OF_SELF.items()}
        known = letters | {k: v for k, v in (own | local).items() if type(v) is int}
        right = [fits(dim, size, known, letters) for dim, size in zip(dims, shape)]
        if not all(right) or len(dims) != len(shape):
            said, place = ", ".join(dims), f"{path}:{statement.first}"
            meant = ", ".join(f"{k} = {known[k]}" for k in sorted(set(LETTER.findall(said)) & set(known)))
            self.wrong.add(f"{place}: {name} is {tuple(shape)}, the comment says ({said}) with {meant}")
