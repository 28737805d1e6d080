"""What is not run at all: what would do the task for the student, or reach for the grader. Read off the source, before anything runs.

It stops the careless and the curious. A class that sets out to cheat needs a container around `grade`, see README.md.
"""

import ast

from assignments.graft import belongings, module_of
from assignments.tasks import Task

ALLOWED = {"torch", "math", "cmath", "functools", "itertools", "collections", "typing", "dataclasses", "re", "random", "heapq", "operator",
           "copy", "nanovlm", "numpy", "PIL"}
NAMES = {"exec", "eval", "compile", "open", "__import__", "globals", "locals", "vars", "setattr", "getattr", "delattr", "input", "exit",
         "quit", "breakpoint", "__builtins__", "__file__", "__loader__", "__spec__"}
ATTRIBUTES = {"os", "sys", "modules", "builtins", "importlib", "subprocess", "ctypes", "inspect", "gc", "pickle", "system", "popen",
              "testing", "load", "fromfile", "tofile", "memmap", "f_back", "f_globals", "f_locals", "gi_frame", "tb_frame", "_C", "ops"}
DUNDERS = {"__init__", "__call__", "__len__", "__getitem__", "__iter__"}
TORCHS = {"torch", "F", "nn", "Tensor", "np", "numpy", "math"}


def objection(task: Task, tree: ast.Module) -> str:
    """Why what belongs to this task is not run; "" if nothing speaks against it."""
    statements, methods = belongings(task, tree, set(vars(module_of(task.file))))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in task.names]
    for node in [*statements, *functions, *(node for nodes in methods.values() for node in nodes)]:
        for part in ast.walk(node):
            if wrong := not_to_be(part, task):
                return f"line {part.lineno}: {wrong}"
    return ""


def not_to_be(part: ast.AST, task: Task) -> str:
    if isinstance(part, (ast.Import, ast.ImportFrom)):
        modules = [alias.name for alias in part.names] if isinstance(part, ast.Import) else [part.module or ""]
        inner = [step for name in modules for step in name.split(".")[1:]] + [alias.name for alias in part.names]
        for name in modules:
            if name.split(".")[0] not in ALLOWED:
                return f"{name} is not to be imported; {', '.join(sorted(ALLOWED))} are"
        for name in inner:
            if name in task.forbidden or name in ATTRIBUTES or name in NAMES:
                return f"{name} is not to be imported in task {task.id}"
    elif isinstance(part, ast.Name):
        if part.id in NAMES or part.id in task.forbidden:
            return f"{part.id} is not to be used in task {task.id}"
    elif isinstance(part, ast.Attribute):
        if part.attr in ATTRIBUTES or part.attr in task.forbidden or part.attr.startswith("__") and part.attr not in DUNDERS:
            return f"{part.attr} is not to be used in task {task.id}"
        if not isinstance(part.ctx, ast.Load) and root(part) in TORCHS:
            return "nothing of torch is to be changed"
    elif isinstance(part, ast.FunctionDef) and part.name.startswith("__") and part.name not in DUNDERS:
        return f"{part.name} is not to be defined"
    elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "type" and len(part.args) > 1:
        return "type is not to be called with three arguments"
    return ""


def root(node: ast.expr) -> str:
    """torch.nn.x[0].y → "torch"."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
