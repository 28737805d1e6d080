"""A whole run: backbones, stages, evaluation, and everything it leaves in its folder.

    llava/tiny ──► jobs:  clip (clip/tiny) ──► lm (lm/tiny) ──► align ──► tune ──► evaluate ──► summary.json
                          └─ from the cache, if all that made them is the same ─┘
`last.pt` says which jobs are finished and how far the current one is; --resume goes on from exactly there.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import nanovlm
from nanovlm import evaluate, recipes
from nanovlm.data import formats
from nanovlm.data.conversation import template_texts
from nanovlm.data.sample import TEXTS
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage, as_config, resolve
from nanovlm.runs import cache, checkpoint, folder
from nanovlm.runs.progress import report, say
from nanovlm.runs.watch import Watch, interruptible
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import distributed, randomness, vitals
from nanovlm.training.batches import MicroBatches, MixedText, make_collate, stream, world_of
from nanovlm.training.loop import TrainingFailed, freeze, train_stage
from nanovlm.training.optim import make_optimiser
from nanovlm.training.weights import State, initial_model, needed_stages


@dataclass(frozen=True)
class Options:
    """The command line's options, see `train_tiny.py --help`."""

    data: str | None = None
    on_missing: str = "error"
    device: str = "auto"
    seed: int = 0
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    cache: bool = True
    steps: float | None = None


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    stage: Stage
    final: bool  # of the recipe that was asked for, not of a backbone


def run(recipe_name: str, options: Options = Options()) -> dict:
    """Train the recipe and return the summary that summary.json holds."""
    device = distributed.choose_device(options.device)
    distributed.start(device.type)
    try:
        return Run(recipe_name, options, device).everything()
    finally:
        distributed.stop()


def trained_model(name: str, stage: str | None = None, seed: int = 0) -> tuple[nn.Module, Tokenizer]:
    """A tiny recipe's model after its last stage or after `stage`, in eval(), on the CPU; and its tokenizer.

    Trained on the embedded world: taken from the cache, where `train_tiny.py` leaves every stage of such a run, or
    trained now and then kept there.
    """
    last = recipes.stage_name(name, stage)
    with tempfile.TemporaryDirectory() as scratch:
        training = Run(name, Options(seed=seed, out=str(Path(scratch) / "run")), distributed.choose_device("auto"))
        for job in training.jobs:
            training.obtain(replace(job, final=False))
            if job.recipe.name == name and job.stage.name == last:
                break
        return training.model_after(job.stage)[0].cpu(), training.tokenizer


def plan(recipe: Recipe, real: bool, steps: float | None, final: bool = True, last: str = "") -> list[Job]:
    """All stages in the order in which they must be trained, each backbone right before it is needed first.

    last: the stage behind which none is trained, where another recipe takes its weights.
    """
    jobs: list[Job] = []
    recipe = resolve(recipe, real, steps)
    for stage in recipe.stages:
        for name, needed in needed_stages(stage):
            jobs += [job for job in plan(recipes.get(name), real, steps, False, needed) if job not in jobs]
        jobs.append(Job(recipe, stage, final))
        if stage.name == last:
            break
    names = [job.stage.name for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two stages of one run have the same name, which their checkpoints bear: {', '.join(names)}.")
    return jobs


class Run:
    def __init__(self, recipe_name: str, options: Options, device: torch.device):
        self.options, self.device, self.began = options, device, time.monotonic()
        recipe = recipes.get(recipe_name)
        self.jobs = plan(recipe, options.data is not None, options.steps)
        self.recipe = self.jobs[-1].recipe
        self.world = world_of(recipe, options.seed)
        self.source = self.world
        if options.data:  # pictures are kept a third larger than the model sees them: room for random crops
            self.source = formats.read(options.data, options.on_missing, recipes.shorter_side(recipe) * 4 // 3)
        self.config = self.make_config()
        self.folder = self.open_folder()
        self.finished: dict[str, State] = {}  # stage → its weights
        self.records: list[dict] = []  # of finished stages, as in summary.json
        self.state: dict | None = None  # the checkpoint to go on from
        self.seconds_before = 0.0
        self.identity = "scenes" if self.source is self.world else ""  # of the data, for the cache
        if options.resume:
            self.recall()
        self.tokenizer = Tokenizer.from_dict(self.state["tokenizer"]) if self.state else self.make_tokenizer()

    # ---- before training

    def make_config(self) -> dict:
        backbones = {job.recipe.name: as_config(job.recipe) for job in self.jobs if not job.final}
        return {
            "what": folder.OURS, "recipe": as_config(self.recipe), "backbones": list(backbones.values()),
            "seed": self.options.seed,
            "data": str(Path(self.options.data).resolve()) if self.options.data else "scenes",
            "on_missing": self.options.on_missing,
            "machine": {"device": str(self.device), "processes": distributed.world(), **versions()},
        }

    def open_folder(self) -> Path:
        """Rank 0 decides and makes it; whatever is wrong with it, all ranks hear of it."""
        name = self.recipe.name.removesuffix("/tiny").replace("/", "-")
        outcome = None
        if distributed.rank() == 0:
            try:
                outcome = folder.choose(self.options.out, name, self.options.resume, self.options.overwrite)
                if self.options.resume:
                    folder.check_config(outcome, self.config)
                    checkpoint.remove_leftovers(outcome)
                folder.write_json(outcome / "config.json", self.config)
            except UserError as error:
                outcome = error
        outcome = distributed.from_first(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def make_tokenizer(self) -> Tokenizer:
        say("learning the vocabulary")
        texts = list(self.source.texts())
        if self.source is not self.world:
            texts += self.world.texts()
        return Tokenizer.train(texts + 1000 * [*template_texts(), *self.recipe.phrases], self.recipe.vocab)

    def recall(self) -> None:
        """Read last.pt; a run that was stopped before its first checkpoint begins at the beginning."""
        path = self.folder / "last.pt"
        stage, step = None, 0
        if path.exists():
            self.state = checkpoint.load(path)
            self.records, self.seconds_before = self.state["records"], self.state["seconds"]
            stage, step = self.state["stage"], self.state["step"]
        if distributed.rank() == 0:
            folder.trim_metrics(self.folder / "metrics.jsonl", {r["name"] for r in self.records}, stage, step)
        distributed.wait()
        say(f"resuming {self.folder}" + (f": stage {stage}, step {step}" if stage else " from its beginning"))

    # ---- the stages

    def everything(self) -> dict:
        say(f"{self.recipe.name} on {self.source.name}, seed {self.options.seed}, {self.device}, into {self.folder}")
        for job in self.jobs:
            self.obtain(job)
        return self.finish(*self.model_after(self.jobs[-1].stage))

    def obtain(self, job: Job) -> None:
        """A stage's weights: from this folder if they are there, from the cache if it is a backbone's, or by training."""
        if job.stage.name in {record["name"] for record in self.records}:
            self.finished[job.stage.name] = checkpoint.load(self.folder / f"{job.stage.name}.pt")
        elif job.final or not self.from_cache(job):
            self.train(job)

    def source_for(self, job: Job) -> object:
        """Scenes are drawn at the size that the job's recipe looks at: fine-tuning may look closer than its backbones."""
        return world_of(job.recipe, self.options.seed) if self.source is self.world else self.source

    def data_for(self, job: Job) -> object:
        real = self.source is not self.world
        return MixedText(self.source, self.world) if real and job.stage.view in TEXTS else self.source_for(job)

    def cache_key(self, job: Job) -> str:
        """Stages behind this one play no part, so that whoever needs this one only finds it too."""
        self.identity = self.identity or cache.data_identity(self.source)
        build, stages = job.recipe.build, job.recipe.stages
        recipe = replace(job.recipe, stages=stages[:stages.index(job.stage) + 1])
        modules = [getattr(build, "func", build).__module__, type(self.source).__module__, type(self.world).__module__,
                   "nanovlm.training.loop", "nanovlm.training.batches", "nanovlm.training.weights"]
        needed = {origin for stage in recipe.stages for origin in needed_stages(stage)}
        return cache.key({
            "recipe": as_config(recipe), "sizes": repr(getattr(build, "args", ())), "stage": job.stage.name,
            "backbones": [self.cache_key(other) for other in self.jobs
                          if (other.recipe.name, other.stage.name) in needed],
            "data": self.identity, "seed": self.options.seed, "tokenizer": self.tokenizer.to_dict(),
            "source": cache.source_text(*modules), "device": self.device.type, "processes": distributed.world(),
            "torch": ".".join(torch.__version__.split(".")[:2]),
        })

    def from_cache(self, job: Job) -> bool:
        """Take a backbone's stage from the cache, if it is there."""
        half_way = self.state is not None and self.state["stage"] == job.stage.name
        weights = None
        if self.options.cache and not half_way and distributed.rank() == 0:
            weights = cache.read(self.cache_key(job))
        weights = distributed.from_first(weights)
        if weights is None:
            return False
        say(f"{job.stage.name}: from the cache")
        self.keep(job, weights, {"name": job.stage.name, "seconds": 0.0, "steps": job.stage.steps, "cached": True,
                                 "frozen": {}, "trained": {}})
        self.write_last(None, 0, {})
        return True

    def train(self, job: Job) -> None:
        """One stage from its start, or from where the checkpoint stands."""
        recipe, stage, began = job.recipe, job.stage, time.monotonic()
        model = initial_model(recipe, stage, self.options.seed, self.finished).to(self.device)
        freeze(model, stage.trains)
        optimiser = make_optimiser(model, stage)
        first, before, seconds = 0, vitals.fingerprints(model), 0.0
        batches = MicroBatches(self.data_for(job), stage, self.options.seed,
                               make_collate(recipe, stage, self.tokenizer, model))
        if self.state is not None and self.state["stage"] == stage.name:
            first, before, seconds = self.state["step"], self.state["before"], self.state["stage_seconds"]
            model.load_state_dict(self.state["model"])
            optimiser.load_state_dict(self.state["optimiser"])
            randomness.set_random_states(self.state["random"])
        self.state = None

        def save(step: int) -> None:
            self.write_last(stage.name, step, {
                "model": model.state_dict(), "optimiser": optimiser.state_dict(), "before": before,
                "random": randomness.random_states(), "stage_seconds": seconds + time.monotonic() - began})

        random = not stage.init and stage == recipe.stages[0]
        watch = Watch(model, stage, self.folder, self.device, first, recipe.vocab if random else None, save,
                      self.sampler(model, job))
        self.steps(model, stage, batches, optimiser, first, watch)
        frozen, trained, changed = vitals.compare(before, vitals.fingerprints(model), stage.trains)
        for warning in changed:
            watch.note(warning)
        record = {"name": stage.name, "seconds": round(seconds + time.monotonic() - began, 1), "steps": stage.steps,
                  "cached": False, "frozen": frozen, "trained": trained, "warnings": watch.warnings}
        self.keep(job, checkpoint.cpu_state(model), record)
        save(stage.steps)
        # Of a person's own data only the backbones are kept: a whole run stands in its folder.
        if distributed.rank() == 0 and self.options.cache and (not job.final or self.source is self.world):
            cache.write(self.cache_key(job), self.finished[stage.name])

    def steps(self, model: nn.Module, stage: Stage, batches: MicroBatches, optimiser: torch.optim.Optimizer, first: int,
              watch: Watch) -> None:
        """The loop itself, with what ends it early: Ctrl-C and numbers that are none."""
        try:
            with interruptible() as interrupt:
                micro = stream(batches, first, self.device)
                for report in train_stage(model, stage, micro, optimiser, self.device, first):
                    watch.after(report)
                    if distributed.any_rank(interrupt.asked, self.device):
                        watch.save(report.step)
                        raise KeyboardInterrupt(f"stopped after step {report.step} of stage {stage.name}; "
                                                f"go on with --resume --out {self.folder}")
        except TrainingFailed as error:
            path = self.folder / f"bad_batch{distributed.rank() or ''}.pt"
            checkpoint.save(path, {"batches": error.batches})
            raise TrainingFailed(f"{error}; the batch that did it is in {path}.", error.batches) from None
        finally:
            watch.progress.close()

    def sampler(self, model: nn.Module, job: Job) -> Callable | None:
        """What asks the model held-out questions now and then; None where it cannot answer."""
        if not job.stage.evaluate and not hasattr(model, "score"):
            return None
        return lambda: evaluate.examples(model, job.recipe, job.stage, self.source_for(job), self.tokenizer,
                                         self.device)

    def keep(self, job: Job, weights: State, record: dict) -> None:
        """A stage is finished: its weights for the stages after it and for the folder."""
        self.finished[job.stage.name] = weights
        self.records.append(record)
        if distributed.rank() == 0:
            checkpoint.save(self.folder / f"{job.stage.name}.pt", weights)

    def write_last(self, stage: str | None, step: int, training: dict) -> None:
        if distributed.rank() == 0:
            checkpoint.save(self.folder / "last.pt", {
                "config": self.config, "records": self.records, "seconds": self.seconds(), "stage": stage, "step": step,
                "tokenizer": self.tokenizer.to_dict(), **training})

    # ---- after training

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def model_after(self, stage: Stage) -> tuple[nn.Module, int]:
        """The recipe's model as the stage left it, and how many parameters learnt."""
        model = self.recipe.build(stage.name)
        model.load_state_dict(self.finished[stage.name])
        trained = freeze(model, stage.trains)
        count = sum(p.numel() for name, p in model.named_parameters() if name in trained)
        return model.to(self.device).eval(), count

    def finish(self, model: nn.Module, trained: int) -> dict:
        summary = {
            "recipe": self.recipe.name, "seed": self.options.seed, "device": str(self.device), "seconds": 0.0,
            "data": self.source.name, "stages": self.records,
            "params": {"total": sum(p.numel() for p in model.parameters()), "trained": trained},
            "eval": {}, "notes": [], "versions": versions(),
        }
        if distributed.rank() == 0:
            self.judge(model, summary)
            summary["seconds"] = round(self.seconds(), 1)
            folder.write_json(self.folder / "summary.json", summary)
            report(summary, self.folder)
        distributed.wait()
        return summary

    def judge(self, model: nn.Module, summary: dict) -> None:
        """Each stage's model by what that stage is to be judged by: what only an earlier one can do counts too."""
        skipped = getattr(self.source, "skipped", ())
        if skipped:
            record, reason = skipped[0]
            summary["notes"].append(f"{len(skipped)} records were left out (--on-missing skip), the first of them "
                                    f"{record}: {reason}.")
        for stage in self.recipe.stages:
            if not stage.evaluate:
                continue
            say(f"evaluating {stage.name} on held-out data")
            judged = model if stage == self.jobs[-1].stage else self.model_after(stage)[0]
            with randomness.undisturbed(judged):
                summary["eval"] |= evaluate.evaluate(judged, self.recipe, stage, self.source, self.tokenizer, self.device)
        summary["notes"] += evaluate.notes(summary["eval"], self.source)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "nanovlm": nanovlm.__version__}
