"""What all stages of a run share: data, tokenizer, seed, device; and which stages there are, each before whoever needs it.

    llava/tiny ──► jobs:  clip (clip/tiny) ──► lm (lm/tiny) ──► align ──► tune
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

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
        return self.source if self.real else world_of(job.recipe, self.seed)

    def samples(self, job: Job, made: dict[str, Bootstrapped]) -> Samples:
        """What the job's stage learns from; made: its data sets that models have made."""
        if not self.real:
            return Mixture(self.data_for(job), job.stage, self.seed, made)
        if isinstance(self.source, Mixed) and job.stage.real == "instructions":
            return Balanced(self.source, shares(self.source), job.stage, self.seed)
        own = Epochs(self.source, job.stage, self.seed)
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


def read_source(recipe: Recipe, data: str | None, on_missing: str, seed: int) -> Source:
    if data is None:
        return world_of(recipe, seed)
    # pictures are kept a third larger than the model sees them: room for random crops
    return formats.read(data, on_missing, recipes.shorter_side(recipe.name) * 4 // 3)


def world_of(recipe: Recipe, seed: int) -> Scenes:
    """The embedded world as this recipe is to see it."""
    return Scenes(seed, **{"size": recipe.image_size, **recipe.world})


def make_tokenizer(recipe: Recipe, source: Source, seed: int) -> Tokenizer | PublishedTokenizer:
    """Of the data; a person's few texts are joined by the embedded world's, which the language model reads as well. A recipe of
    published weights has theirs.
    """
    if recipe.words:
        return published_words(recipe)
    texts = list(source.texts())
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
        setting.source.leave_out(job.stage.real, why)
        if job.stage.evaluate:
            setting.source.leave_out(real_view(job.stage.evaluate), why, ("val",))
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
