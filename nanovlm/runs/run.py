"""A whole run: backbones, stages, evaluation, and everything it leaves in its folder.

    weights after a stage:  in the run's folder?  ──► in the cache? ──► or train it, from the weights after what it needs
                                  └──────────────────────┴───────────────────── and keep them in both

    llava/tiny@tune ──► llava/tiny@align ──► clip/tiny, lm/tiny          then evaluate ──► summary.json
`last.pt` says which stages are finished and how far the current one is; --resume goes on from exactly there.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import nanovlm
from nanovlm import recipes
from nanovlm.data import formats
from nanovlm.errors import UserError
from nanovlm.evaluate.judges import evaluate
from nanovlm.evaluate.pupil import Pupil, Rows
from nanovlm.recipes.stage import Recipe, as_config, resolve
from nanovlm.runs import checkpoint, shipped
from nanovlm.runs.cache import Cache
from nanovlm.runs.capfilt import made_for
from nanovlm.runs.folder import OURS, RunFolder, on_first, write_json
from nanovlm.runs.learner import Learner, begin, foresee
from nanovlm.runs.progress import minutes, report, say
from nanovlm.runs.setting import Job, Setting, leave_out_unfit, needs, plan, read_source
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.runs.watch import Watch, interruptible
from nanovlm.tokenizer import Tokenizer
from nanovlm.training import distributed, vitals
from nanovlm.training.batches import MicroBatches, make_collate, stream
from nanovlm.training.loop import TrainingFailed, freeze, train_stage
from nanovlm.training.randomness import undisturbed
from nanovlm.training.weights import State, find_published


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line's options, see `train_tiny.py --help`."""

    data: str | None = None
    stage_data: dict[str, str] = field(default_factory=dict)  # of every stage, where they differ; `data` is then the last one's
    on_missing: str = "error"
    device: str = "auto"
    seed: int = 0
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    cache: bool = True
    steps: float | None = None
    from_scratch: bool = False
    shard: bool = False
    accumulate: int | None = None  # micro-batches of a step, in place of each stage's own


def run(recipe_name: str, options: Options = Options()) -> dict:
    """Train the recipe and return the summary that summary.json holds."""
    device = distributed.choose_device(options.device)
    distributed.start(device)
    try:
        return _run(recipe_name, options, device)
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(f"The memory of {device} is full ({str(error).splitlines()[0]}). What fits where says python -m nanovlm.plan --recipe "
                             f"{recipe_name} --gpus {distributed.world()}; --accumulate 2 halves the batch in memory, --shard shares the "
                             "model out.", []) from error
    except RuntimeError as error:
        if not distributed.lost(error):
            raise
        raise distributed.PeerLost("Another process of this run has ended, or no longer answers; its own message says why. Go on with "
                                   "--resume.") from error
    finally:
        distributed.stop()


def _run(recipe_name: str, options: Options, device: torch.device) -> dict:
    recipe = accumulated(resolve(recipes.get(recipe_name), options.data is not None, options.steps), options.accumulate)
    if options.shard and not dist.is_initialized():
        raise UserError("--shard shares a model out over the processes of torchrun: start it as torchrun --nproc-per-node N train_tiny.py …")
    find_published(recipe, recipe.stages[-1].name)
    paths = {options.data, *options.stage_data.values()}
    on_first(lambda: sum(len(formats.parts_of(path)) for path in paths if path))  # one rank makes the indexes of a large set, all read them
    read = {path: read_source(recipe, path, options.on_missing, options.seed) for path in sorted(paths, key=str)}
    source, of_stage = read[options.data], {stage: read[path] for stage, path in options.stage_data.items()}
    keep = RunFolder(recipe.name, options.out, options.resume, options.overwrite, quick=options.steps is not None)
    tokenizer = keep.tokenizer() or find_tokenizer(recipe, source, options.seed, options.from_scratch or options.data is not None,
                                                      [one for one in read.values() if one is not source])
    setting = Setting(recipe, options.seed, device, source, tokenizer, options.steps, options.from_scratch, options.shard, of_stage)
    job = Job(recipe, recipe.stages[-1])
    finished = {record["name"] for record in keep.records}
    for stage in recipe.stages:
        if stage.name not in finished:
            foresee(recipe, stage, device, options.shard)
    if setting.real:
        leave_out_unfit(plan(job, setting), setting)
    keep.begin(setting, Cache(setting, options.cache and not options.shard), config_of(setting, options, plan(job, setting)))
    say(f"{recipe.name} on {names_of(setting)}, seed {options.seed}, {device}, into {keep.path}")
    setting.work = plan(job, setting, keep.has)
    announce(setting)
    weights_after(job, setting, keep)
    return finish(setting, keep)


def accumulated(recipe: Recipe, micro_batches: int | None) -> Recipe:
    """The recipe with so many micro-batches a step: less memory, and the same gradient."""
    if micro_batches is None:
        return recipe
    if micro_batches < 1:
        raise UserError(f"--accumulate {micro_batches}: a step has 1 micro-batch or more.")
    return replace(recipe, stages=tuple(replace(stage, accumulate=micro_batches) for stage in recipe.stages))


def announce(setting: Setting) -> None:
    """What will be done, and how long it took where the shipped weights were made."""
    known = [shipped.seconds(job.recipe.name, job.stage) for job in setting.work]
    about = "" if not known or None in known or setting.real else f"; about {minutes(sum(known))} of training where the shipped weights were made"
    judged = "" if setting.shard else ", evaluation"
    say(f"plan: {', '.join(f'{job.stage.name} {job.stage.steps:,} steps' for job in setting.work) or 'nothing to train'}{judged}{about}")
    if setting.steps is not None:
        say(shortened(setting.steps))


def shortened(steps: float) -> str:
    return f"This is a shortened run (--steps {steps:g}): a look at how it works, not at how good it gets."


def trained_model(name: str, stage: str | None = None, seed: int = 0) -> tuple[nn.Module, Tokenizer]:
    """A tiny recipe's model after its last stage or after `stage`, in eval(), on the CPU; and its tokenizer.

    Trained on the embedded world: taken from the cache, where `train_tiny.py` leaves every stage of such a run, or as it is
    shipped (seed 0), or trained now and then kept.
    """
    recipe = resolve(recipes.get(name), real=False)
    source = read_source(recipe, None, "error", seed)
    setting = Setting(recipe, seed, distributed.choose_device("auto"), source, find_tokenizer(recipe, source, seed))
    job = Job(recipe, recipe.stage(stage))
    return model_of(job, weights_after(job, setting, Cache(setting))), setting.tokenizer


def weights_after(job: Job, setting: Setting, keep: RunFolder | Cache) -> State:
    """The weights that a stage leaves: kept ones, or trained from those that it needs."""
    found = keep.read(job)
    if found is not None:
        return found
    before = {other.stage.name: weights_after(other, setting, keep) for other in needs(job, setting)}
    return keep.write(job, *train(job, setting, before, keep if isinstance(keep, RunFolder) else None))


def train(job: Job, setting: Setting, before: dict[str, State], keep: RunFolder | None) -> tuple[State, dict]:
    """One stage from its start, or from where the folder's checkpoint stands; its weights, and its record for summary.json."""
    recipe, stage, began = job.recipe, job.stage, time.monotonic()
    made = made_for(job, setting, before, keep.path if keep else None)
    learner = begin(job, setting, before)
    model = learner.model
    first, prints, seconds = 0, vitals.fingerprints(model), 0.0  # a run that goes on begins the stage with the same weights
    collate = make_collate(recipe, stage, setting.tokenizer, model.reads)
    batches = MicroBatches(setting.samples(job, made), stage, setting.seed, collate)
    half = keep.half_way(job) if keep else None
    if half:
        learner.go_on(keep, half, setting.seed)
        first, seconds = half["step"], half["stage_seconds"]

    def save(step: int) -> None:
        if keep:
            learner.save(keep, step, seconds + time.monotonic() - began)

    blank = not stage.init and stage == recipe.stages[0]
    place = setting.work.index(job) if job in setting.work else 0
    later = sum(other.stage.steps * other.stage.batch_size for other in setting.work[place + 1:])
    watch = Watch(model, stage, keep.path if keep else None, setting.device, first, recipe.vocab if blank else None, save,
                  sampler(model, job, setting), f"[{place + 1}/{len(setting.work)}] " if setting.work else "", later)
    take_steps(learner, batches, first, watch)
    frozen, trained, changed = vitals.compare(prints, vitals.fingerprints(model), (*stage.trains, *model.unheard))
    for warning in changed:
        watch.note(warning)
    return learner.weights(), {
        "name": stage.name, "seconds": round(seconds + time.monotonic() - began, 1), "steps": stage.steps,
        "cached": False, "shipped": False, "frozen": frozen, "trained": trained, "warnings": watch.warnings}


def take_steps(learner: Learner, batches: MicroBatches, first: int, watch: Watch) -> None:
    """The loop itself, with what ends it early: Ctrl-C and numbers that are none."""
    stage = learner.job.stage
    try:
        with interruptible() as interrupt:
            micro = stream(batches, first, watch.device)
            for step in train_stage(learner.model, stage, micro, learner.optimiser, watch.device, first):
                watch.after(step)
                stops, saves = distributed.any_rank([interrupt.asked, watch.is_time(step.step)], watch.device)
                if stops or saves:
                    watch.keep(step.step)
                if stops:
                    goes_on = f"; go on with --resume --out {watch.folder}" if watch.folder else ""
                    raise KeyboardInterrupt(f"stopped after step {step.step} of stage {stage.name}{goes_on}")
    except TrainingFailed as error:
        path = (watch.folder or Path()) / f"bad_batch{distributed.rank() or ''}.pt"
        checkpoint.save(path, {"batches": error.batches})
        raise TrainingFailed(f"{error}; the batch that did it is in {path}.", error.batches) from None
    finally:
        watch.progress.close()


def sampler(model: nn.Module, job: Job, setting: Setting) -> Callable[[], Rows]:
    """What asks the model held-out questions now and then."""
    pupil = Pupil(model, job.recipe, job.stage, setting.tokenizer, setting.device)
    return lambda: pupil.examples(setting.data_for(job))


# ---- after training

def model_of(job: Job, weights: State) -> nn.Module:
    """In eval(), with the tensors of `weights` themselves; what was kept in bf16 is fp32 again."""
    with torch.device("meta"):
        model = job.recipe.build(job.stage)
    model.load_state_dict(weights, assign=True)
    return model.float().eval()


def finish(setting: Setting, keep: RunFolder) -> dict:
    """Judge each stage's model by what that stage is to be judged by: what only an earlier one can do counts too."""
    recipe = setting.recipe
    with torch.device("meta"):
        model = recipe.build(recipe.stages[-1])
    learns = freeze(model, recipe.stages[-1].trains)
    summary = {
        "recipe": recipe.name, "seed": setting.seed, "device": str(setting.device), "seconds": 0.0,
        "data": names_of(setting), "stages": keep.records,
        "params": {"total": sum(p.numel() for p in model.parameters()),
                   "trained": sum(p.numel() for name, p in model.named_parameters() if name in learns)},
        "eval": {}, "notes": [], "versions": versions()}
    if distributed.rank() == 0:
        if setting.steps is not None:
            summary["notes"].append(shortened(setting.steps))
        skipped = [one for source in setting.sources for one in source.skipped]
        if skipped:
            record, reason = skipped[0]
            summary["notes"].append(f"Records that were left out: {len(skipped)}. The first is "
                                    f"{record}: {reason.rstrip('.')}.")
        if setting.shard:
            summary["notes"].append("Not judged yet, as each process had a part of the model only: the same command with --resume, and without "
                                    "torchrun and --shard, judges it.")
        figures: dict[int, dict] = {}  # of each source that a stage was asked about
        for stage in [stage for stage in recipe.stages if stage.evaluate and not setting.shard]:
            say(f"evaluating {stage.name} on held-out data")
            job, whose = Job(recipe, stage), id(setting.of_stage.get(stage.name, setting.source))
            pupil = Pupil(model_of(job, keep.read(job)).to(setting.device), recipe, stage, setting.tokenizer, setting.device)
            with undisturbed(pupil.model):
                figures[whose] = figures.get(whose, {}) | evaluate(pupil, setting.data_for(job))
            summary["eval"] |= figures[whose]
        summary["notes"] += [*setting.notes, *(f"{source.name}: {note}" if setting.of_stage else note
                                               for source in setting.sources for note in source.notes(figures.get(id(source))))]
        if setting.of_stage:
            summary["notes"].append("Each stage learned from its own data: what one holds out, another may have learned from.")
        summary["seconds"] = round(keep.seconds(), 1)
        write_json(keep.path / "summary.json", summary)
        report(summary, keep.path)
    distributed.wait()
    return summary


def names_of(setting: Setting) -> str:
    """What the data are called: of all stages, or of each."""
    return ", ".join(f"{stage}: {source.name}" for stage, source in setting.of_stage.items()) or setting.source.name


def config_of(setting: Setting, options: Options, jobs: list[Job]) -> dict:
    paths = options.stage_data or {"": options.data}
    data = {stage: str(Path(path).resolve()) if path else "scenes" for stage, path in paths.items()}
    backbones = {job.recipe.name: as_config(job.recipe) for job in jobs if not setting.final(job)}
    return {
        "what": OURS, "recipe": as_config(setting.recipe), "backbones": list(backbones.values()), "seed": setting.seed,
        "data": data if len(data) > 1 else data[""], "on_missing": options.on_missing,
        "steps": options.steps, "from_scratch": options.from_scratch,
        "machine": {"device": str(setting.device), "processes": distributed.world(), "shard": options.shard, **versions()}}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "nanovlm": nanovlm.__version__}
