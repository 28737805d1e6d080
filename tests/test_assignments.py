"""The course: its tables fit the package, a handout holds no solution, grading is fair to what is broken. assignments/tests hold the package itself.

What runs a student's code runs in processes of its own: `python -m assignments`, as a teacher types it.
"""

import ast
import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from source import ROOT, read

from assignments import audit, bugs, handout, trial
from assignments.graft import belongings, body_of, find_def, parse
from assignments.objections import objection
from assignments.same import same
from assignments.tasks import ASSIGNMENTS, CODE_POINTS, TASKS, find
from assignments.variants import VARIANTS, drawn
from nanovlm.errors import UserError

FILES = sorted({task.file for task in TASKS})


def course(*words: object, code: int = 0) -> str:
    """The command; what it prints."""
    done = subprocess.run([sys.executable, "-m", "assignments", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- the tables ---

def test_every_row_names_what_is_there_and_has_a_test():
    assert [task.id for task in TASKS] == sorted((task.id for task in TASKS), key=lambda name: [*map(int, name.split("."))])
    assert len({task.id for task in TASKS}) == len(TASKS)
    for task in TASKS:
        tree = ast.parse(handout.reference(task.file))
        for name in task.names:
            assert find_def(tree, name) is not None, f"task {task.id}: {task.file} has no {name}"
        assert f"\ndef test_{task.id.replace('.', '_')}_" in read(handout.test_file(task)), f"task {task.id} has no test"


def test_no_function_is_asked_for_twice():
    assert not [key for key, n in Counter((task.file, name) for task in TASKS for name in task.names).items() if n > 1]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_an_assignment_is_whole(assignment: str):
    assert sum(task.points for task in find(assignment)) == CODE_POINTS
    assert (handout.HERE / "texts" / f"{assignment}.md").is_file() and (handout.HERE / "questions" / f"question_{assignment}.py").is_file()
    wrong, right = (Counter(row[0] for row in audit.table(kind, assignment)) for kind in ("wrong", "right"))
    for task in find(assignment):
        assert wrong[task.id] >= 2, f"task {task.id} has {wrong[task.id]} misconceptions"
        assert right[task.id] >= 2, f"task {task.id} has {right[task.id]} other right solutions, and needs two"


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_misconception_changes_what_is_taken_of_a_student(assignment: str):
    """Its old text stands once in the file, the result can be read, and lies in the task's functions."""
    seen, trees = set(), {}
    for case in audit.cases("wrong", assignment):
        ours, theirs = trees.setdefault(case.task.file, ast.parse(handout.reference(case.task.file))), ast.parse(case.source)
        taken = [[ast.dump(find_def(tree, name) or ast.Pass()) for name in case.task.names] for tree in (ours, theirs)]
        assert taken[0] != taken[1], f"task {case.task.id}: {case.says}: no function of the task is changed"
        assert (case.task.id, case.says) not in seen, f"task {case.task.id}: {case.says} stands there twice"
        seen.add((case.task.id, case.says))


def test_survivors_have_reasons_and_tasks():
    for (task, says), why in audit.reasons().items():
        assert find(task) and says and len(why.split()) >= 3, f"{task} {says}: say why it lives"


# --- the handout ---

@pytest.mark.parametrize("file", FILES)
def test_a_starter_holds_nothing_of_the_solution(file: str):
    tasks, source = [task for task in TASKS if task.file == file], handout.reference(file)
    text = handout.starter(source, tasks)
    before, after = ast.parse(source), ast.parse(text)
    for task in tasks:
        for name in task.names:
            ours, theirs = find_def(before, name), find_def(after, name)
            assert ast.unparse(theirs.args) == ast.unparse(ours.args) and ast.get_docstring(theirs) == ast.get_docstring(ours)
            assert [type(node) for node in body_of(theirs)] == [ast.Raise], name
            ours.body = theirs.body = [ast.Pass()]
    assert ast.dump(before) == ast.dump(after), "all else stays"


def test_neither_do_the_public_tests():
    """No statement of 60 characters or more of a solution is in a test."""
    tests = "".join(ast.unparse(ast.parse(read(path))) for path in sorted((handout.HERE / "tests").glob("*.py")))
    flat = re.sub(r"\s+", " ", tests)
    for file in FILES:
        tree = ast.parse(handout.reference(file))
        for name in (name for task in TASKS if task.file == file for name in task.names):
            for text in (re.sub(r"\s+", " ", ast.unparse(node)) for node in body_of(find_def(tree, name))):
                assert len(text) < 60 or text not in flat, f"{file}, {name}: {text}"


def test_a_handout_is_complete_and_overwrites_nothing(tmp_path: Path):
    written = handout.make(tmp_path / "a", ["1"])
    names = {path.relative_to(tmp_path / "a").as_posix() for path in written}
    assert names == {"README.md", "answer.md", "handout.json", "masks.py", "attention.py", "tests/conftest.py", "tests/test_1_attention.py"}
    page = read(tmp_path / "a" / "README.md")
    assert all(task.id in page and task.title in page for task in find("1")) and "hours" in page and "question" in page
    assert "task 5.1: unimodal" in read(tmp_path / "a" / "masks.py"), "a later assignment's solution is taken out too"
    with pytest.raises(UserError, match="never overwrites"):
        handout.make(tmp_path / "a", ["1"])


def test_a_variant_is_a_sentence_in_the_docstring(tmp_path: Path):
    for variant in VARIANTS:
        task, = find(variant.task)
        text = handout.starter(handout.reference(task.file), [task], variants={task.id: variant})
        for name in variant.names:
            assert variant.says in ast.get_docstring(find_def(ast.parse(text), name))
    assert not drawn(0)
    for number in range(1, 20):
        assert {name.split(".")[0] for name in drawn(number)} == {v.task.split(".")[0] for v in VARIANTS}


# --- what a student may write ---

def test_a_slip_in_one_function_leaves_the_others_readable():
    tree, broken = parse("import torch\n\ndef a(x):\n    return x\n\n\n@torch.no_grad()\ndef b(x):\n    return (x\n\n\ndef c(x):\n    return 2\n", "f.py")
    assert find_def(tree, "a") and find_def(tree, "c").lineno == 12 and not find_def(tree, "b")
    assert len(broken) == 1 and "def b(" in broken[0][0] and broken[0][1].startswith("line 9:")
    tree, broken = parse("class A:\n    def f(self):\n        return 1\n\n    def g(self)\n        return 2\n\n    def h(self):\n        return 3\n", "f.py")
    assert find_def(tree, "A.f") and find_def(tree, "A.h").lineno == 8 and [why[:7] for _, why in broken] == ["line 5:"]


def test_only_what_a_task_uses_is_taken():
    source = ("import os\nimport math\nWEIGHT = 2\n\ndef helper(x):\n    return x * WEIGHT\n\ndef other(x):\n    return os.getcwd()\n\n"
              "def positions(attention_mask):\n    return helper(attention_mask)\n\ndef padding(attention_mask):\n    return other(attention_mask)\n")
    tree, known = ast.parse(source), {"padding", "positions", "causal"}
    task, = find("1.2")
    assert [ast.unparse(node).split("\n")[0] for node in belongings(task, tree, known)[0]] == ["WEIGHT = 2", "def helper(x):"]
    assert objection(task, tree) == "" and "os is not to be imported" in objection(find("1.1")[0], tree)


@pytest.mark.parametrize("body", [
    "exec('1')", "open('nanovlm/masks.py')", "getattr(attention_mask, 'sum')", "torch.equal = len", "torch.Tensor.tolist = len",
    "torch.sys.modules['x'].close = len", "m = torch.os", "attention_mask.__class__ = int", "from nanovlm.files import os", "import sys",
    "torch.ops.aten", "type('T', (Tensor,), {})", "torch.serialization.load('x')", "def __eq__(a, b): pass"])
def test_what_reaches_for_the_grader_is_not_run(body: str):
    tree = ast.parse(f"import torch\nfrom torch import Tensor\n\ndef positions(attention_mask):\n    {body}\n    return attention_mask\n")
    assert objection(find("1.2")[0], tree).startswith("line 5: ")
    assert objection(find("1.1")[0], tree) == "", "another task is not concerned"


def test_the_public_solution_is_recognised_under_other_names():
    task, = find("1.3")
    tree = ast.parse(re.sub(r"\bweights\b", "w", re.sub(r"\bscores\b", "s", handout.reference(task.file))))
    assert same(task, tree) == (1, 1)
    assert same(task, ast.parse(next(text for name, _, text in audit.table("right", "1") if name == "1.3"))) == (0, 1)


# --- grading, as a teacher does it ---

LOOP, WRONG_TYPE = "    while True:\n        pass\n", "    return [1, 2]\n"


def bodies(folder: Path, changes: dict[tuple[str, str], str]) -> None:
    """Write the package's solution into a handout, but for some functions, whose bodies are given."""
    for file in {file for file, _ in changes}:
        source = handout.reference(file)
        lines, tree = source.splitlines(keepends=True), ast.parse(source)
        found = [(find_def(tree, name), text) for (of, name), text in changes.items() if of == file]
        for node, text in sorted(found, key=lambda pair: -pair[0].lineno):
            lines[body_of(node)[0].lineno - 1:node.end_lineno] = [text]
        (folder / file).write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], Path]:
    """Four students of assignment 1: points.csv, and where it lies."""
    folder = tmp_path_factory.mktemp("submissions")
    for student in ("perfect", "broken", "untouched"):
        handout.make(folder / student, ["1"])
    (folder / "empty").mkdir()
    for file in ("masks.py", "attention.py"):
        (folder / "perfect" / file).write_text(handout.reference(file), encoding="utf-8")
    scaled = ast.get_source_segment(handout.reference("attention.py"), find_def(ast.parse(handout.reference("attention.py")), "attend_readable"))
    unscaled = "".join(f"{line}\n" for line in scaled.replace(" * scale", "").split("\n")[3:])  # behind signature and docstring
    bodies(folder / "broken", {
        ("masks.py", "padding"): WRONG_TYPE, ("masks.py", "causal"): WRONG_TYPE, ("masks.py", "positions"): LOOP,
        ("attention.py", "attend_readable"): unscaled, ("attention.py", "rotate"): "    return (x\n",
        ("attention.py", "KVCache.reorder"): "        import torchtext\n"})
    course("grade", folder, "--csv", folder / "points.csv", "--seconds", 4, "--same")
    with open(folder / "points.csv", encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}, folder


def test_the_package_gets_all_points_and_an_empty_handout_none(graded):
    rows, folder = graded
    assert float(rows["perfect"]["sum"]) == CODE_POINTS and "1.3:1/1" in rows["perfect"]["same as public"]
    for student, sentence in (("untouched", "not begun"), ("empty", "masks.py is not there")):
        assert float(rows[student]["sum"]) == 0
        assert sentence in read(folder / "feedback" / f"{student}.txt") and "Traceback" not in read(folder / "feedback" / f"{student}.txt")


def test_each_mistake_has_a_sentence_and_costs_no_other_task(graded):
    rows, folder = graded
    told = read(folder / "feedback" / "broken.txt")
    for sentence in ("a value of the wrong type comes back", 'not done after 4 s in the test "real tokens are counted": is there a loop that never ends?',
                     "This is what comes out when: not scaled", "attention.py cannot be read, line ", "torchtext is not to be imported"):
        assert sentence in told, f"{sentence}\n{told}"
    assert float(rows["broken"]["1.4"]) == 20, "what is right in the same file keeps its points"
    assert {float(rows["broken"][name]) for name in ("1.1", "1.2", "1.3", "1.5", "1.6")} == {0}


def test_missing_absent_hungry_and_of_another_version(tmp_path: Path):
    handout.make(tmp_path / "h", ["1"])
    (tmp_path / "h" / "masks.py").write_text("import torch\nfrom nanovlm.masks import gone\n\ndef positions(attention_mask):\n    return gone\n\n"
                                             "def padding(attention_mask):\n    return attention_mask[:, None, :]\n\ndef causal(T, S=None, device=None):\n"
                                             "    return torch.ones(10 ** 12)\n", encoding="utf-8")
    stamp = json.loads(read(tmp_path / "h" / "handout.json"))
    stamp["signatures"]["1.3"], stamp["nanovlm"] = "000000000000", "0.0.1"
    (tmp_path / "h" / "handout.json").write_text(json.dumps(stamp), encoding="utf-8")
    course("grade", tmp_path / "h", "--task", "1.1", "1.2", "1.3", "--json", tmp_path / "results.json", code=1)
    results = {test["name"][:3]: test for test in json.loads(read(tmp_path / "results.json"))["tests"]}
    assert "it asks for more than" in results["1.1"]["output"] and "masks.py has no causal_with_padding" in results["1.1"]["output"]
    assert "cannot import name 'gone'" in results["1.2"]["output"]
    assert "this handout is of another version (0.0.1; today " in results["1.3"]["output"]
    assert all(test["score"] == 0 and test["max_score"] > 0 for test in results.values())


def test_what_compares_tensors_may_not_be_changed(tmp_path: Path):
    """By another name, so that nothing speaks against it beforehand."""
    handout.make(tmp_path / "h", ["1"])
    (tmp_path / "h" / "masks.py").write_text("from torch import Tensor as T\n\ndef positions(attention_mask):\n    T.tolist = lambda self: []\n"
                                             "    return attention_mask.cumsum(dim=1)\n", encoding="utf-8")
    said = course("grade", tmp_path / "h", "--task", "1.2", code=1)
    assert "tolist of tensors is not what it was" in said and "0.0 of 5 points" in said


def test_hidden_numbers_are_shown_after_the_due_date(tmp_path: Path):
    handout.make(tmp_path / "h", ["1"])
    (tmp_path / "h" / "masks.py").write_text(handout.reference("masks.py"), encoding="utf-8")
    said = course("grade", tmp_path / "h", "--task", "1.2", "--seed", 20260901, "--json", tmp_path / "results.json")
    results = json.loads(read(tmp_path / "results.json"))
    assert "5.0 of 5 points" in said and "after the due date" in results["output"]
    assert [(test["visibility"], test.get("score")) for test in results["tests"]] == [("visible", None), ("after_due_date", 5)]


def test_a_variant_in_the_stamp_refuses_the_public_solution(tmp_path: Path):
    number = next(n for n in range(1, 99) if "1.2" in drawn(n))
    handout.make(tmp_path / "h", ["1"], variant=number)
    (tmp_path / "h" / "masks.py").write_text(handout.reference("masks.py"), encoding="utf-8")
    assert " 0.0 of  5" in course("grade", tmp_path / "h", "--task", "1.2", code=1)
    (tmp_path / "h" / "masks.py").write_text("def positions(attention_mask):\n    return attention_mask.cumsum(dim=1)\n", encoding="utf-8")
    assert " 5.0 of  5" in course("grade", tmp_path / "h", "--task", "1.2")


@pytest.mark.parametrize(("words", "sentence"), [
    (("grade", "nowhere"), "is not a folder"), (("make", "1"), "--out"), (("make", "99", "--out", "x"), "invalid choice"),
    (("grade", "notebooks", "--task", "9.9"), "There is no task '9.9'"), (("run", "notebooks"), "is not a handout")])
def test_bad_usage_is_one_sentence(words: tuple, sentence: str):
    said = course(*words, code=2)
    assert sentence in said and said.count("\n") == 1


def test_a_bug_is_handed_out_and_graded(tmp_path: Path):
    course("make", "bug", "--seed", 3, "--out", tmp_path / "hunts" / "ada")
    course("make", "bug", "--seed", 4, "--out", tmp_path / "hunts" / "bob")
    bug = bugs.chosen(3)
    (tmp_path / "hunts" / "ada" / bugs.ANSWER).write_text(f"{bug.file}:{bugs.places(bug)[0].start}\n", encoding="utf-8")
    said = course("grade", tmp_path / "hunts", "--csv", tmp_path / "points.csv")
    assert f"ada: 10.0 of 10  {bug.file}" in said and "bob: 0.0 of 10" in said
    with open(tmp_path / "points.csv", encoding="utf-8") as file:
        assert [row["bug"] for row in csv.DictReader(file)] == ["10.0", "0.0"]
    course("grade", tmp_path / "hunts" / "bob", code=1)


def test_the_handouts_own_pytest_runs_its_functions(tmp_path: Path):
    handout.make(tmp_path / "h", ["1"])
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "1_2", str(tmp_path / "h" / "tests")]
    stub = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "2 failed" in stub.stdout and "task 1.2: positions" in stub.stdout
    (tmp_path / "h" / "masks.py").write_text("def positions(attention_mask):\n    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)\n", encoding="utf-8")
    assert "2 passed" in subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False).stdout


# --- the audit ---

SMOKE = """
from assignments import audit, trial
from assignments.tasks import ASSIGNMENTS
trial.prepare()
cases = [case for name in ASSIGNMENTS for kind in ("wrong", "right") for case in list(audit.cases(kind, name))[::40]]
jobs = [trial.Job(case.task, case.task.file, case.source) for case in cases]
for number, verdict in trial.judge_all(jobs, 2):
    case = cases[number]
    if not audit.as_it_should(case, audit.kept(verdict)):
        print(case.kind, case.task.id, case.says, verdict.note, verdict.failed)
print(len(cases), "tried")
"""


def test_a_few_misconceptions_and_other_right_solutions_of_each_assignment():
    done = subprocess.run([sys.executable, "-c", SMOKE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+ tried\n", done.stdout), done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 2 * len(ASSIGNMENTS)


def test_the_stored_audit_is_what_the_readme_says():
    stored, page = json.loads(read(audit.SUMMARY)), read(audit.PAGE)
    assert page.split(audit.BEGIN)[1].split(audit.END)[0] == audit.in_a_table(stored)
    for assignment, figures in stored.items():
        for kind in {*figures} & {*audit.KINDS} - {"mutants"}:
            assert figures[kind][0] == figures[kind][1] > 0, f"assignment {assignment}: {kind}"
        assert figures["wrong"][1] == len(audit.table("wrong", assignment)), "audit again: python -m assignments audit --write"


def test_points_need_the_oracle():
    """All for all; half in proportion for some; nothing while the first test fails, in any of its cases."""
    task, = find("1.1")
    tests = [name for name in re.findall(r"^def (test_1_1_\w+)", read(handout.test_file(task)), re.MULTILINE)]
    assert trial.Verdict(task, passed=tests).points == 10
    assert trial.Verdict(task, passed=tests[:2], failed={name: "off" for name in tests[2:]}).points == 10 * 2 / len(tests) / 2
    assert trial.Verdict(task, passed=tests[1:], failed={tests[0]: "off"}).points == 0
    assert trial.Verdict(task, passed=[f"{tests[0]}[a]"], failed={f"{tests[0]}[b]": "off"}).points == 0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_nothing_speaks_against_the_packages_own_answer(task):
    """Else the reference would not get full marks."""
    assert objection(task, ast.parse(handout.reference(task.file))) == ""
