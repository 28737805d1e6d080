"""Find the bug: every row fits the package, every answer gets one sentence."""

import ast
import json
import re

import pytest

from assignments import bugs
from assignments.bugs import ANSWER, BUGS, FILE, NEAR, PACKAGE, RIGHT, STAMP, grade_bug, make_bug, patched, places
from assignments.look import LOOKS
from nanovlm.errors import UserError


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}: {bug.says[:40]}")
def test_a_row_fits_the_package(bug):
    """Old text once, the new one once, it parses, the comments are as they were, and the symptom does not tell the place."""
    source = (PACKAGE / bug.file).read_text(encoding="utf-8")
    assert source.count(bug.old) == 1 and bug.new not in source and bug.old != bug.new
    text = patched(bug)
    assert text.count(bug.new) == 1
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)), "only the words of a comment are changed"
    assert re.findall("#.*", text) == re.findall("#.*", source), "comments stay"
    statement, function = places(bug)
    first = source[:source.index(bug.old)].count("\n") + 1
    assert first in statement and set(statement) <= set(function) and len(statement) <= 6
    assert ".py" not in bug.symptom and bug.says not in bug.symptom and bug.file.split("/")[-1].removesuffix(".py") not in bug.symptom.split()
    assert bug.look[0] in LOOKS and bug.symptom.endswith(".")


def test_all_six_papers():
    assert {bug.paper for bug in BUGS} == {"BLIP", "Flamingo", "BLIP-2", "LLaVA", "InstructBLIP", "LLaVA-1.5"} and len(BUGS) >= 12
    assert len({(bug.file, bug.new) for bug in BUGS}) == len(BUGS)


def test_stored_numbers_are_of_these_bugs():
    """No figure of a bug that is no more; and where both are there, what is seen differs."""
    stored, wanted = bugs.measured(), {}
    for bug in BUGS:
        healthy, sick = bugs.key_of(None, bug.look), bugs.key_of(bug, bug.look)
        wanted |= {healthy: bug, sick: bug}
        if healthy in stored and sick in stored:
            assert stored[healthy] != stored[sick], f"{bug.says}: nothing is seen of it"
    assert set(stored) <= set(wanted)


@pytest.fixture
def handed_out(tmp_path):
    """A folder, and its bug."""
    seed = 3
    make_bug(tmp_path / "bug", seed)
    return tmp_path / "bug", bugs.chosen(seed)


def test_the_folder_holds_the_package_with_one_change(handed_out):
    folder, bug = handed_out
    ours = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    theirs = {path.relative_to(folder / "nanovlm"): path.read_text(encoding="utf-8") for path in (folder / "nanovlm").rglob("*.py")}
    assert ours.keys() == theirs.keys()
    changed = [path.as_posix() for path in ours if ours[path] != theirs[path]]
    assert changed == [bug.file] and theirs[next(p for p in ours if p.as_posix() == bug.file)] == patched(bug)
    page = (folder / "SYMPTOM.md").read_text(encoding="utf-8")
    assert bug.symptom in page and "diff" in page and bug.says not in page and bug.new not in page
    assert bug.file not in (folder / STAMP).read_text(encoding="utf-8")
    assert grade_bug(folder)[0] == 0.0, "nothing is answered yet"


def test_a_seed_is_a_bug_and_all_of_them_come():
    assert bugs.chosen(5) is bugs.chosen(5)
    assert {bugs.chosen(seed) for seed in range(300)} == set(BUGS)


def test_a_folder_with_work_in_it_is_left_alone(handed_out):
    folder, _ = handed_out
    with pytest.raises(UserError, match="is there already"):
        make_bug(folder, 4)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}: {bug.says[:40]}")
def test_right_near_and_wrong_lines(bug, tmp_path):
    """Any line of the statement counts; another one of the function is near; another function is the file."""
    (tmp_path / STAMP).write_text(json.dumps({"salt": "s", "number": bugs.number(bug, "s")}), encoding="utf-8")
    statement, function = places(bug)

    def graded(text: str) -> tuple[float, str]:
        (tmp_path / ANSWER).write_text(text, encoding="utf-8")
        return grade_bug(tmp_path)
    for line in statement:
        points, said = graded(f"# mine\n{bug.file}:{line}\n")
        assert points == RIGHT and bug.says in said
    near = next(line for line in function if line not in statement)
    assert graded(f"{bug.file}:{near}")[0] == NEAR
    assert graded(f"nanovlm/{bug.file}:1")[0] == FILE
    assert graded(f"{'vit.py' if bug.file != 'vit.py' else 'masks.py'}:{statement.start}")[0] == 0.0
    lines = patched(bug).splitlines()
    assert any(bug.new.split("\n")[0][:30] in lines[line - 1] for line in statement), "the lines counted are those of the file handed out"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "masks", "masks.py", "line 12", "masks.py:twelve", "masks.py:12\nvit.py:13", "nowhere.py:12",
                                  "../../etc/passwd.py:1", "masks.py:-3", "\x00", "masks.py:" + "9" * 400, bugs.TEMPLATE])
def test_what_is_no_answer_gets_one_sentence(handed_out, text):
    folder, _ = handed_out
    (folder / ANSWER).write_text(text, encoding="utf-8")
    points, said = grade_bug(folder)
    assert points == 0.0 and said.endswith(".") and "\n" not in said and len(said) < 250


@pytest.mark.parametrize("way", ["masks.py:{n}", "nanovlm/masks.py:{n}", "masks.py, line {n}", "masks.py {n}", "bug/nanovlm/masks.py:{n}", "  masks.py : {n}  ", "nanovlm\\masks.py:{n}"])
def test_an_answer_may_be_written_in_several_ways(way, tmp_path):
    bug = next(bug for bug in BUGS if bug.file == "masks.py")
    (tmp_path / STAMP).write_text(json.dumps({"salt": "s", "number": bugs.number(bug, "s")}), encoding="utf-8")
    (tmp_path / ANSWER).write_text(way.format(n=places(bug)[0].start), encoding="utf-8")
    assert grade_bug(tmp_path)[0] == RIGHT


@pytest.mark.parametrize("break_it", ["no answer", "bytes", "no stamp", "torn stamp", "another version", "no folder"])
def test_what_is_missing_or_broken_gets_one_sentence(handed_out, break_it):
    folder, bug = handed_out
    (folder / ANSWER).write_text(f"{bug.file}:{places(bug)[0].start}", encoding="utf-8")
    assert grade_bug(folder)[0] == RIGHT
    if break_it == "no answer":
        (folder / ANSWER).unlink()
    elif break_it == "bytes":
        (folder / ANSWER).write_bytes(b"\xff\xfe\x00")
    elif break_it == "no stamp":
        (folder / STAMP).unlink()
    elif break_it == "torn stamp":
        (folder / STAMP).write_text('{"salt": ', encoding="utf-8")
    elif break_it == "another version":
        (folder / STAMP).write_text('{"salt": "s", "number": "0"}', encoding="utf-8")
    points, said = grade_bug(folder if break_it != "no folder" else folder / "elsewhere")
    assert points == 0.0 and said.endswith(".") and "\n" not in said
