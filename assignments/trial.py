"""One task's trial: a process of its own, the student's functions in the package, the task's tests, a verdict.

    source ─► child process ─► graft ─► pytest -k test_1_3_ ─► which passed, why not ─► pipe ─► Verdict

A crash, an endless loop, a hunger for memory or a changed module costs this task and no other. The child reports what passes
and what fails; its time, its memory and how it ended are seen from outside.
"""

import ast
import builtins
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from assignments.graft import graft
from assignments.handout import HERE, test_file
from assignments.tasks import Task

SECONDS = 30  # of computing for one task; twice that by the clock, and four times where the machine is busy
USED = ("equal", "allclose", "isclose", "zeros", "ones", "full", "tensor", "stack", "cat", "arange", "einsum", "where", "Tensor")
KILLED = (-24, -9)  # by the limit of computing time: SIGXCPU, and SIGKILL for one that does not listen
MEMORY = 4  # GB, beyond what Python and torch take themselves


@dataclass
class Verdict:
    task: Task
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # test → why
    note: str = ""  # why nothing could be tested
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> float:
        """All for all tests; half in proportion for some; nothing while the first, the oracle's, fails."""
        tests = sorted([*self.passed, *self.failed], key=lambda test: order(test, self.task))
        if self.note or not tests or tests[0] in self.failed:
            return 0.0
        oracle = [test for test in tests if order(test, self.task) == order(tests[0], self.task)]
        share = len(self.passed) / len(tests)
        return 0.0 if any(test in self.failed for test in oracle) else self.task.points * (1.0 if share == 1 else share / 2)


@dataclass
class Job:
    """What is to be judged. path: as the student knows the file."""

    task: Task
    path: str
    source: str | ast.Module
    seed: int = 0
    stop: bool = False  # at the first failure
    variants: dict | None = None
    seconds: float = SECONDS


def order(test: str, task: Task) -> int:
    """Where a test stands in its file; the first of a task is the oracle's."""
    names = re.findall(r"^def (test_\w+)", test_file(task).read_text(encoding="utf-8"), re.MULTILINE)
    return names.index(test.split("[")[0])


def fingerprint(verdict: Verdict) -> str:
    """Which tests fail, and by how much: with the public seed, the same wrong idea in other words leaves the same one."""
    return json.dumps([verdict.task.id, sorted((test, why.split("  [")[0]) for test, why in verdict.failed.items())])


def looks_like(verdict: Verdict) -> list[str]:
    """The misconceptions that leave this fingerprint (fingerprints.json, which the audit writes); the public seed's only."""
    file = HERE / "fingerprints.json"
    if not verdict.failed or not file.exists():
        return []
    return json.loads(file.read_text(encoding="utf-8")).get(fingerprint(verdict), [])


# --- in the child ---

class Collector:
    """A pytest plugin: says which test begins; outcome and first line of the reason of each."""

    def __init__(self, path: str, pipe):
        self.path, self.pipe, self.outcomes = path, pipe, {}

    def pytest_runtest_logstart(self, nodeid):
        self.pipe.send(("begins", nodeid.split("::")[-1]))

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text, file, line = (crash.message, crash.path, crash.lineno) if crash else (str(report.longrepr)[-300:], "", 0)
            own = str(file) == self.path or os.path.basename(str(file)) == os.path.basename(self.path)
            said = plain(text.split("\n")[0], own)
            self.outcomes[name] = f"{said}  [{os.path.basename(self.path)}, line {line}]" if own else said
        elif report.when == "call" and report.passed:
            self.outcomes.setdefault(name, "")


def plain(message: str, own: bool) -> str:
    """An error as one sentence. own: it was raised in the student's file."""
    stub = re.match(r"NotImplementedError: task \S+: (\w+)", message)
    if stub:
        return f"{stub[1]} is not written yet"
    lacks = re.match(r"AttributeError: '(\w+)' object has no attribute '(\w+)'", message)
    if lacks and not own:
        return f"a value of the wrong type comes back: {lacks[1]}, which has no .{lacks[2]}"
    if not own and re.match(r"TypeError: (cannot unpack|object of type|'\w+' object is not)|ValueError: .*values to unpack", message):
        return f"a value of the wrong type comes back: {message.split(': ', 1)[1]}"
    if re.search(r"can't allocate memory|not enough memory|MemoryError", message):
        return f"it asks for more than {MEMORY} GB of memory"
    if message.startswith("RecursionError"):
        return "it calls itself without end"
    return message.removeprefix("AssertionError: ").removeprefix("NotImplementedError: ")


def limits(seconds: float) -> None:
    """Of computing time and memory, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # Windows: the clock outside must do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY * 2 ** 30,) * 2)


def state() -> dict[tuple[str, str], int]:
    """What a student's file must not change: tensors, what compares them, the graders, Python's own names.

    Of torch itself only functions that the graders use: torch replaces some of its own (manual_seed) while it works.
    """
    import torch

    from assignments import draw

    parts = {"torch": torch, "tensors": torch.Tensor, "torch.nn.functional": torch.nn.functional, "the graders": draw, "Python": builtins}
    return {(says, name): id(value) for says, part in parts.items() for name, value in list(vars(part).items())
            if part is not torch or name in USED}


def child(job: Job, pipe) -> None:
    import pytest

    os.environ["NANOVLM_SEED"] = str(job.seed)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no plugin of the machine shuffles, and a start takes 0.4 s, not 2.6
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    limits(job.seconds)
    collector, note, before = Collector(job.path, pipe), "", state()
    try:
        graft(job.task, job.path, job.source, job.variants)
    except BaseException as error:  # noqa: BLE001  whatever the student's file does on its way in is the student's
        note = f"{type(error).__name__}: {error}"
    if not note:
        code = pytest.main([str(test_file(job.task)), "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--tb=short",
                            "-W", "ignore", "-k", f"test_{job.task.id.replace('.', '_')}_", *(["-x"] if job.stop else [])], plugins=[collector])
        note = "" if code in (0, 1) else f"pytest ended with {code}"
        after = state()
        changed = [key for key in before | after if before.get(key) != after.get(key)]  # what a tensor inherits is changed by adding it
        if changed:
            note = f"{changed[0][1]} of {changed[0][0]} is not what it was: a task changes nothing but its own functions"
    pipe.send(("ends", collector.outcomes, note))
    pipe.close()
    os._exit(0)  # nothing that a student registered for the end is run


# --- outside ---

def context():
    """fork where there is one: torch has been imported once, for all."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class Trial:
    """A child at work, and what it has said so far."""

    def __init__(self, job: Job):
        self.job, self.began, self.test, self.verdict = job, time.monotonic(), "", None
        self.pipe, theirs = context().Pipe(duplex=False)
        self.process = context().Process(target=child, args=(job, theirs))
        self.process.start()
        theirs.close()

    def hear(self) -> None:
        """One message; the last one, or the silence after an end, makes the verdict."""
        verdict = Verdict(self.job.task)
        try:
            said = self.pipe.recv()
            if said[0] == "begins":
                self.test = said[1]
                return
            _, outcomes, verdict.note = said
            verdict.passed = [test for test, why in outcomes.items() if not why]
            verdict.failed = {test: why for test, why in outcomes.items() if why}
        except (EOFError, OSError):
            self.process.join()
            verdict.note = self.too_long() if self.process.exitcode in KILLED else (
                f"the process died (exit code {self.process.exitcode}){self.during()}")
        self.end(verdict)

    def during(self) -> str:
        return f" in the test \"{words(self.test)}\"" if self.test else " before the first test"

    def too_long(self) -> str:
        return f"not done after {self.job.seconds:.0f} s{self.during()}: is there a loop that never ends?"

    def late(self) -> bool:
        return time.monotonic() - self.began > 4 * self.job.seconds

    def end(self, verdict: Verdict) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        verdict.seconds, self.verdict = time.monotonic() - self.began, verdict


def words(test: str) -> str:
    """test_1_3_equals_a_loop[True] → "equals a loop[True]"."""
    return re.sub(r"^test_\d+_\d+_", "", test).replace("_", " ")


def judge_all(jobs: Iterable[Job], workers: int = 1) -> Iterator[tuple[int, Verdict]]:
    """(number of the job, verdict) as they come, `workers` at a time."""
    waiting, running = iter(enumerate(jobs)), {}
    while True:
        while len(running) < workers and (following := next(waiting, None)) is not None:
            running[following[0]] = Trial(following[1])
        if not running:
            return
        ready = wait([trial.pipe for trial in running.values()], timeout=1.0)
        for number, trial in list(running.items()):
            if trial.pipe in ready:
                trial.hear()
            elif trial.late():
                trial.end(Verdict(trial.job.task, note=trial.too_long()))
            if trial.verdict is not None:
                yield number, running.pop(number).verdict


def judge(task: Task, path: str, source: str | ast.Module, seed: int = 0, stop: bool = False, seconds: float = SECONDS,
          variants: dict | None = None) -> Verdict:
    """Run the task's tests on `source`."""
    return next(judge_all([Job(task, path, source, seed, stop, variants, seconds)]))[1]


def prepare() -> None:
    """Import once what every child needs, and never look through it again."""
    import gc

    import pytest  # noqa: F401
    import torch
    import torch.utils.checkpoint

    import assignments.draw  # noqa: F401

    torch.set_num_threads(1)
    with torch.device("meta"):  # torch loads what it needs for this the first time: 5 s that each child would take
        torch.ones(2, 2).tril().masked_fill(torch.ones(2, 2) > 0, 1.0).softmax(-1)
    gc.collect()
    gc.freeze()
