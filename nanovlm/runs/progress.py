"""What the person at the keyboard sees: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from nanovlm.training import distributed
from nanovlm.training.loop import Report

EVERY = 10.0  # seconds between two plain lines


def say(text: str = "") -> None:
    """One line from rank 0, without tearing the bar."""
    if distributed.rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    say(f"WARNING: {text}.")


class Progress:
    """One stage's bar, or its plain lines. later: samples of the stages that come, for the time that the whole run has left."""

    def __init__(self, stage: str, first: int, steps: int, batch_size: int, later: int = 0):
        self.stage, self.first, self.steps, self.batch_size, self.later = stage, first, steps, batch_size, later
        self.began = self.last = time.monotonic()
        show = sys.stderr.isatty() and distributed.rank() == 0
        self.bar = tqdm(total=steps, initial=first, desc=stage, leave=True, dynamic_ncols=True) if show else None

    def step(self, report: Report) -> None:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
        now = time.monotonic()
        each = (now - self.began) / (report.step - self.first)
        left = each * (self.steps - report.step)
        whole = f", all stages: {minutes(left + each * self.later / self.batch_size)}" if self.later else ""
        speed = f"{self.batch_size / report.seconds:.0f} samples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{losses}, {speed}{whole}", refresh=False)
            self.bar.update()
            return
        if now - self.last < EVERY and report.step != self.steps:
            return
        self.last = now
        say(f"{self.stage} {report.step}/{self.steps}  {losses}  {speed}  {left:.0f} s left{whole}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def report(summary: dict, path: Path) -> None:
    """The table at the end."""
    if summary["eval"]:
        wide = max(28, *(len(name) + 1 for name in summary["eval"]))
        say(f"\n{'held-out':<{wide}}{'value':>8}{'chance':>8}{'shuffled':>10}{'n':>7}")
    for name, result in summary["eval"].items():
        say(f"{name:<{wide}}{result['value']:>8.3f}{result['chance']:>8.3f}{result['shuffled']:>10.3f}{result['n']:>7}")
    for note in summary["notes"]:
        say(note)
    for warning in (w for stage in summary["stages"] for w in stage.get("warnings", [])):
        warn(warning)
    say(f"{summary['recipe']}: {summary['seconds']:.0f} s; everything is in {path}")
