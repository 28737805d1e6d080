"""What happens between two steps of one stage: log lines, vital signs, samples and pictures, checkpoints, Ctrl-C.

    for report in train_stage(...):      ┌ every 10 steps   a line in metrics.jsonl
        watch.after(report)  ────────────┤ every 30 seconds a held-out sample printed, samples.png and curves.png drawn
                                         ├ every 60 seconds last.pt (shared out over ranks: every half hour)
                                         └ Ctrl-C           last.pt, then stop
All of it by the clock or the step, none of it with an effect on the next step.
"""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from nanovlm.evaluate.pupil import Rows
from nanovlm.plots import save_curves, save_samples
from nanovlm.recipes.stage import Stage
from nanovlm.runs.checkpoint import saving
from nanovlm.runs.folder import append_line
from nanovlm.runs.progress import Progress, say, warn
from nanovlm.training import distributed, vitals
from nanovlm.training.loop import Report
from nanovlm.training.randomness import undisturbed
from nanovlm.training.sharding import is_sharded

LOG_STEPS = 10
FIRST_SAMPLE, SAMPLE_SECONDS = 10.0, 30.0
SAVE_SECONDS, SAVE_SHARDS_SECONDS = 60.0, 1800.0


class Interrupt:
    """Whether somebody asked to stop; see `interruptible`."""

    def __init__(self):
        self.asked = False
        self.when = 0.0

    def handle(self, number: int, frame: object) -> None:
        # torchrun passes on what the terminal has sent already, so only a later Ctrl-C is a second one.
        if self.asked and number == signal.SIGINT and time.monotonic() - self.when > 2:
            raise KeyboardInterrupt
        self.asked, self.when = True, self.when or time.monotonic()


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Ctrl-C and SIGTERM raise a flag in here, so that the step is finished first. A second Ctrl-C, later, insists."""
    interrupt, old = Interrupt(), {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        old = {number: signal.signal(number, interrupt.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Watch:
    """One stage's observer.

    folder: where lines and pictures go, if anywhere. vocab: given where the weights are random, so that the first loss says
    something. save: writes last.pt. samples: asks the model held-out questions. place: which stage of how many; later: samples of
    those that come.
    """

    def __init__(self, model: nn.Module, stage: Stage, folder: Path | None, device: torch.device, first: int, vocab: int | None,
                 save: Callable[[int], None], samples: Callable[[], Rows], place: str = "", later: int = 0):
        self.model, self.stage, self.folder, self.device, self.vocab = model, stage, folder, device, vocab
        self.save, self.samples, self.first = save, samples, first
        self.sharded = is_sharded(model)
        self.progress = Progress(place + stage.name, first, stage.steps, stage.batch_size, later)
        self.saved = self.sampled = time.monotonic()
        self.shown = 0
        self.dead: set[str] | None = None  # parameters that had no gradient at any step so far
        self.warnings: list[str] = []
        self.said: set[str] = set()

    def after(self, report: Report) -> None:
        self.progress.step(report)
        last = report.step == self.stage.steps
        if report.step == self.first + 1:
            self.first_step(report)
        if report.step <= 3:
            self.check_gradients(report.step == min(3, self.stage.steps))
        if last or report.step == self.stage.steps // 2:
            self.check_images(report)
            self.note(vitals.prior_warning(report.losses), keep=last)
        if last:
            self.note(vitals.gate_warning(self.model))
        if distributed.rank() > 0:
            return
        if last or report.step % LOG_STEPS == 0 or report.step == 1:
            self.log(report)
        if time.monotonic() - self.sampled > (SAMPLE_SECONDS if self.shown else FIRST_SAMPLE) or last:
            self.show()
            self.sampled = time.monotonic()

    def is_time(self, step: int) -> bool:
        """To save; a finished stage is saved by whoever trains it."""
        every = SAVE_SHARDS_SECONDS if self.sharded else SAVE_SECONDS
        return step < self.stage.steps and time.monotonic() - self.saved > every

    def keep(self, step: int) -> None:
        """All ranks together."""
        self.save(step)
        self.saved = time.monotonic()

    def first_step(self, report: Report) -> None:
        if self.vocab is None or self.first > 0:
            return
        for name, value in report.losses.items():
            blind = vitals.guess(name, report.batch, self.vocab, distributed.world())
            if blind is not None:
                say(f"{self.stage.name}: first loss {name} {value:.3f}; a blind guess has {blind:.3f}")

    def check_gradients(self, report_now: bool) -> None:
        missing = vitals.without_gradient(self.model)
        self.dead = missing if self.dead is None else self.dead & missing
        trained = sum(p.requires_grad for p in self.model.parameters())
        if report_now:
            self.note(vitals.gradient_warning(self.dead, trained))

    def check_images(self, report: Report) -> None:
        """All ranks look, or none does: their losses may need each other."""
        [lacking] = distributed.any_rank([not vitals.can_exchange(report.batch)], self.device)
        if not lacking:
            self.note(vitals.image_warning(*vitals.image_use(self.model, report.batch)), keep=report.step == self.stage.steps)

    def note(self, warning: str | None, keep: bool = True) -> None:
        """Said once, whatever its figures; what is still true at the end of the stage is kept for the summary."""
        if warning is None:
            return
        if (words := re.sub(r"[\d.]+", "", warning)) not in self.said:
            warn(f"{self.stage.name}: {warning}")
        self.said.add(words)
        self.warnings += [f"{self.stage.name}: {warning}"] if keep else []

    def log(self, report: Report) -> None:
        losses = {f"loss/{name}": value for name, value in report.losses.items()}
        if self.folder is not None:
            append_line(self.folder / "metrics.jsonl", {
                "stage": self.stage.name, "step": report.step, **losses, "lr": report.lr, "grad_norm": report.grad_norm,
                "samples_per_s": round(self.stage.batch_size / report.seconds, 2)})

    def show(self) -> None:
        """One sample in words, all of them and the curves as pictures."""
        with undisturbed(self.model):
            rows = [] if self.sharded else self.samples()  # rank 0 alone cannot ask a model of which it has a part
        if rows:
            _, question, truth, prediction = rows[self.shown % len(rows)]
            self.shown += 1
            say(f"    {question!r}  truth: {truth!r}  model: {prediction!r}")
        if self.folder is None:
            return
        with saving(self.folder / "curves.png"):
            save_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        if rows:
            with saving(self.folder / "samples.png"):
                save_samples(rows, self.folder / "samples.png")
