"""What all stages of a run share: data, tokenizer, seed, device; and which stages there are, each before whoever needs it.

    llava/tiny ──► jobs:  clip (clip/tiny) ──► lm (lm/tiny) ──► align ──► tune
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from nanovlm import published_tokenizer, recipes
from nanovlm.data import formats
from nanovlm.data.collate import Collate
from nanovlm.data.conversation import find_format, template_texts
from nanovlm.data.mixture import Mixed
from nanovlm.data.prompts import PROMPTS
from nanovlm.data.records import real_view
from nanovlm.data.sample import Sample
from nanovlm.data.source import Source
from nanovlm.errors import UserError
from nanovlm.making.bootstrap import Bootstrapped
from nanovlm.published_tokenizer import PublishedTokenizer
from nanovlm.recipes.instructblip import balanced
from nanovlm.recipes.stage import CapFilt, Diet, Recipe, Stage, resolve
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import Balanced, Epochs, Gathered, InTurn, Mixture, Samples, make_collate
from nanovlm.training.weights import needed_stages, published_folder
from nanovlm.world.datasets import Scenes


@dataclass(frozen=True)
class Job:
    """One stage to train, of the recipe that was asked for or of a backbone."""

    recipe: Recipe
    stage: Stage

    @property
    def name(self) -> tuple[str, str]:
        return self.recipe.name, self.stage.name

    @property
    def makes(self) -> dict[str, CapFilt]:
        """Of the data sets in the stage's diets those that stages before make."""
        diets = (*(lesson for _, lesson in self.stage.lessons), self.stage.data)
        return {name: made for name, made in self.recipe.makes.items() if any(name in diet for diet in diets)}


@dataclass
class Setting:
    recipe: Recipe  # as it will be run, see `resolve`
    seed: int
    device: torch.device
    source: Source  # a person's own data, or the world
    tokenizer: Tokenizer | PublishedTokenizer
    steps: float | None = None
    from_scratch: bool = False  # no shipped weights
    shard: bool = False  # each rank keeps a part of the model, see sharding.py
    of_stage: dict[str, Source] = field(default_factory=dict)  # a person's data for one stage, where it is not `source`
    work: list[Job] = field(default_factory=list)  # what this run has to train, in order
    notes: list[str] = field(default_factory=list)  # what a reader should know of how a person's records are read

    def ships(self, job: Job) -> bool:
        """Whether the job's weights may be shipped ones: a backbone's, or if all was asked for as it is shipped, the recipe's own."""
        as_shipped = not self.final(job) or (self.seed == 0 and self.steps is None)
        return as_shipped and not self.real and not self.from_scratch

    @property
    def real(self) -> bool:
        return not isinstance(self.source, Scenes)

    def data_for(self, job: Job) -> Source:
        """Scenes are drawn at the size that the job's recipe looks at: fine-tuning may look closer than its backbones."""
        return self.of_stage.get(job.stage.name, self.source) if self.real else world_of(job.recipe, self.seed)

    @property
    def sources(self) -> list[Source]:
        """Each once: `source` is that of the last stage, and of all that have none of their own."""
        return list({id(source): source for source in (*self.of_stage.values(), self.source)}.values())

    def samples(self, job: Job, made: dict[str, Bootstrapped]) -> Samples:
        """What the job's stage learns from; made: its data sets that models have made."""
        source = self.data_for(job)
        if not self.real:
            return Mixture(source, job.stage, self.seed, made)
        if isinstance(source, Mixed) and job.stage.real == "instructions":
            return Balanced(source, shares(source), job.stage, self.seed)
        own = Epochs(source, job.stage, self.seed)
        if job.stage.real == "texts":
            return InTurn(own, Mixture(world_of(self.recipe, self.seed), job.stage, self.seed))
        return Gathered(own) if job.stage.real == "pages" else own

    def job(self, recipe: str, stage: str) -> Job:
        resolved = resolve(recipes.get(recipe), self.real, self.steps)
        return Job(resolved, resolved.stage(stage))

    def final(self, job: Job) -> bool:
        return job.recipe.name == self.recipe.name


def shares(mixed: Mixed) -> Diet:
    """How often each held-in set of a mixture is drawn."""
    sizes = {name: records.size("instructions", "train") for name, records in mixed.held_in.items()}
    return balanced(sizes, mixed.sampling, mixed.factors)


def by_stage(recipe: Recipe, given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """--data, as it is given: PATH is for all stages that no STAGE=PATH names. → the last stage's path, and those of all, where they differ."""
    stages = [stage.name for stage in resolve(recipe, real=True).stages]
    named, rest = {}, []
    for one in given:
        name, _, path = one.partition("=")
        if name in stages and path:
            if name in named:
                raise UserError(f"--data {name}= is given twice: for each stage one.")
            named[name] = path
        else:
            rest.append(one)
    if unknown := [one for one in rest if not one or ("=" in one and not Path(one).exists())]:
        raise UserError(f"--data {unknown[0]!r} is neither a path nor STAGE=PATH; {recipe.name} learns from yours in {', '.join(stages)}.")
    if len(rest) > 1:
        raise UserError(f"--data {rest[-1]}: of several --data each but one names its stage, as in --data {stages[0]}=PATH; "
                        f"{recipe.name} learns from yours in {', '.join(stages)}.")
    lacking = [name for name in stages if name not in named]
    if rest and not lacking:
        raise UserError(f"--data {rest[0]}: all stages of {recipe.name} have data by name; leave it out.")
    if named and lacking and not rest:
        raise UserError(f"--data: stage {lacking[0]} of {recipe.name} has no data; add --data {lacking[0]}=PATH, or one --data PATH for all others.")
    paths = {name: named.get(name, *rest) for name in stages} if named else {}
    if len({Path(path).resolve() for path in paths.values()}) > 1:
        return paths[stages[-1]], paths
    return next(iter(paths.values()), rest[0] if rest else None), {}


def read_source(recipe: Recipe, data: str | None, on_missing: str, seed: int, whole: bool = False) -> Source:
    """whole: see formats.read."""
    if data is None:
        return world_of(recipe, seed)
    # pictures are kept a third larger than the model sees them: room for random crops
    return formats.read(data, on_missing, recipes.shorter_side(recipe.name) * 4 // 3, whole)


def world_of(recipe: Recipe, seed: int) -> Scenes:
    """The embedded world as this recipe is to see it."""
    return Scenes(seed, **{"size": recipe.image_size, **recipe.world})


def make_tokenizer(recipe: Recipe, source: Source, seed: int, others: Sequence[Source] = ()) -> Tokenizer | PublishedTokenizer:
    """Of the data, of all stages' where each has its own; a person's few texts are joined by the embedded world's, which the language
    model reads as well. A recipe of published weights has theirs.
    """
    if recipe.words:
        return published_words(recipe)
    texts = [text for one in (source, *others) for text in one.texts()]
    if not isinstance(source, Scenes):
        texts += world_of(recipe, seed).texts()
    return Tokenizer.train(texts + 1000 * [*template_texts(), *PROMPTS], recipe.vocab)


def published_words(recipe: Recipe) -> PublishedTokenizer:
    """The recipe's published tokenizer, and in it that of a bridge that reads other words."""
    bridge = None
    if "bridge" in recipe.words:
        name, kind = recipe.words["bridge"]
        bridge = published_tokenizer.read(published_folder("the bridge's words", name), kind, recipe.config.qformer.text.vocab)
    name, kind = recipe.words["text"]
    return published_tokenizer.read(published_folder("the words", name), kind, recipe.vocab, bridge)


def needs(job: Job, setting: Setting) -> list[Job]:
    """The jobs whose weights this one starts from: the recipe's stage before it, what its `init` names, and who makes its data."""
    before = [] if job.stage.anew else job.recipe.stages[:job.recipe.stages.index(job.stage)][-1:]
    makers = [job.recipe.stage(name) for made in job.makes.values() for name in (made.captioner, made.filter)]
    found = [Job(job.recipe, stage) for stage in (*before, *makers)] + [setting.job(*origin) for origin in needed_stages(job.stage)]
    return [other for place, other in enumerate(found) if other not in found[:place]]


def plan(job: Job, setting: Setting, kept: Callable[[Job], bool] = lambda job: False) -> list[Job]:
    """The job, and before it all that it needs, directly or through others; nothing for what is kept."""
    if kept(job):
        return []
    found: list[Job] = []
    for other in needs(job, setting):
        found += [more for more in plan(other, setting, kept) if more not in found]
    found.append(job)
    names = [each.stage.name for each in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Two stages of one run have the same name, which their checkpoints bear: {', '.join(names)}.")
    return found


def leave_out_unfit(jobs: Sequence[Job], setting: Setting) -> None:
    """Of a person's records those that a stage cannot read are left out and counted, before any stage begins.

    Out of what it learns from, and out of what it is asked, which may be another view of them.
    """
    for job in jobs:
        with torch.device("meta"):
            reads = job.recipe.build(job.stage).reads
        cut: set[tuple[str, str]] = set()
        why = partial(problem, make_collate(job.recipe, job.stage, setting.tokenizer, reads), cut)
        source = setting.data_for(job)
        source.leave_out(job.stage.real, why)
        if job.stage.evaluate:
            source.leave_out(real_view(job.stage.evaluate), why, ("val",))
        if cut:
            limits = {"language model": find_format(job.stage.format).asked, "Q-Former": reads.question}
            room = ", ".join(f"{limit} in the {reader}" for reader, limit in limits.items() if limit)
            setting.notes.append(f"{len(cut)} instructions of stage {job.stage.name} can be longer than the tokens that there is room for "
                                 f"({room}), and then lose their beginning.")


def problem(collate: Collate, cut: set[tuple[str, str]], sample: Sample) -> str | None:
    """Why the stage cannot read the sample; one that it can read but for the beginning is noted in `cut`."""
    reason = collate.problem(sample)
    if reason is None and collate.loses_beginning(sample):
        cut.add((sample.task.group, sample.id))
    return reason
