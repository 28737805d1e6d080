"""A recipe is a model's class and sizes and a list of stages; a stage is what learns, on which data, how. Data, no loop.

    Recipe "llava/tiny"   LLaVA, LLaVAConfig(…)
      ├ Stage "align"   trains projector              data captions       init vision ← clip/tiny, language ← lm/tiny
      └ Stage "tune"    trains projector, language    data talk, drills   goes on from "align"

The same sentence for all six papers: what is frozen, what learns, on which data; training/loop.py reads it.
`data` names data sets and their weights, of a thousand samples or whatever the sum is; `lessons` come before it, each up to a
fraction of the stage, so that a shortened stage has them in the same proportions:
    lessons=((0.1, {"drills": 1}),), data={"talk": 85, "drills": 15}
`mixed` says what a weight is: of "samples" how often a set is drawn; of "losses" what its loss is multiplied with, each micro-batch
being of one set and all of them making one step (Flamingo Eq. 2); of "turns" the same, but one set a step, by turns; of "batches" how
often a set is drawn, each batch being of one set (InstructBLIP's code):
    data={"pages": 1.0, "pairs": 0.2, "clips": 0.03}, mixed="losses", accumulate=3
Names are those of the embedded world (world/datasets.py); the published stages name the sets of their papers, for the reader.
`init` names where weights come from before the stage starts:
    ("vision", "clip/tiny:vision")            module `vision` of the trained recipe clip/tiny, after its last stage
    ("qformer", "blip2/tiny@stage1:qformer")  the same after an earlier stage, behind which nothing is trained
    ("", "blip2/tiny")                        all of the model, from all of another
    ("vision", "published:openai/clip-…")     published weights in the folder $NANOVLM_WEIGHTS/openai/clip-…
    ("qformer", "published-bert:google-…")    the same, of a BERT that the module starts from (its `take_bert`)
    ("language", "published-words:lmsys/…")   the same, of a language model with fewer words: those that it lacks start at random
Entries are laid over each other: where several have a tensor the last one counts, and what none has is an error.
Modules that `init` does not name go on from the recipe's stage before, where it had a module of that name.
"""

from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from itertools import accumulate

from torch import nn

from nanovlm.errors import UserError

MIXED = ("samples", "batches", "losses", "turns")
SCHEDULES = ("cosine", "constant", "exponential")
EVALUATIONS = ("answers", "mixture", "science", "told", "pages", "captions", "two", "classes", "retrieval", "noise",
               "statements", "fewshot", "clips", "tasks")  # see evaluate/
Diet = dict[str, float]  # data set → weight


def within(name: str, part: str) -> bool:
    """Whether a tensor is a part of a model or stands in it: "qformer.queries" in "qformer"; in "" stand all."""
    return not part or name == part or name.startswith(part + ".")


@dataclass(frozen=True)
class Stage:
    """One phase of training: whatever `trains` does not name is frozen and in eval()."""

    name: str  # unique among all stages of a run, backbones' too: it names the checkpoint
    trains: tuple[str, ...]  # modules or parameters of the model, by name: ("projector",)
    data: Diet  # what it learns from
    _: KW_ONLY

    # what learns: the model, where it is not the recipe's own, and where its weights come from
    builds: type | None = None  # a class in the place of Recipe.model
    sizes: dict[str, object] = field(default_factory=dict)  # fields of the config that are others in this stage
    init: tuple[tuple[str, str], ...] = ()
    anew: bool = False  # a new model, of which nothing goes on from the stage before

    # on what
    mixed: str = "samples"  # one of MIXED
    portions: dict[str, int] = field(default_factory=dict)  # of mixed losses the samples of each set in a step; {}: equally many
    lessons: tuple[tuple[float, Diet], ...] = ()  # what comes first, each up to this fraction of the stage
    real: str = "conversations"  # what it reads of --data, of sample.REAL
    format: str = "plain"  # conversation format; pairs need none
    augment: bool = False  # random crops and flips
    fit: str = "crop"  # how a picture becomes a square: "crop" | "pad" | "stretch", see data/transforms.py
    group: bool = False  # of --data batches of one modality, of the world micro-batches of like length, see training/batches.py
    max_length: int = 0  # of a sequence, image tokens included; 0 = no limit

    # how
    steps: int
    batch_size: int  # of one optimiser step, over all ranks and micro-batches together
    lr: float  # the highest, reached after the warm-up
    schedule: str = "cosine"  # one of SCHEDULES
    min_lr: float = 0.0  # where it ends, as a fraction of lr
    warmup: float = 0.03  # fraction of the steps
    weight_decay: float = 0.0  # on matrices only
    undecayed: tuple[str, ...] = ()  # parts without weight decay
    layer_decay: float = 1.0  # below 1 the encoder's early layers learn slower, see optim.py
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    adaptive_clip: dict[str, float] = field(default_factory=dict)  # part → λ, clipped unit by unit instead, see optim.py
    accumulate: int = 1  # micro-batches per optimiser step: less memory, the same gradient

    # judged by
    evaluate: tuple[str, ...] = ()  # of EVALUATIONS

    # fields replaced with --data, where few real pictures need augmentation; None: no such stage then
    on_data: dict[str, object] | None = field(default_factory=dict)

    def __post_init__(self):
        for field_name, values, known in (("schedule", (self.schedule,), SCHEDULES), ("mixed", (self.mixed,), MIXED),
                                          ("evaluate", self.evaluate, EVALUATIONS)):
            if not set(values) <= set(known):
                raise ValueError(f"Stage {self.name}: {field_name} is {values}, but there are only {known}.")
        if self.schedule == "exponential" and self.min_lr <= 0:
            raise ValueError(f"Stage {self.name}: an exponential never reaches min_lr {self.min_lr}; give a fraction above 0.")
        if self.mixed != "samples" and self.group:
            raise ValueError(f"Stage {self.name}: mixed={self.mixed!r} gives each data set its micro-batches, and group would sort samples "
                             "into others; leave one of the two out.")

    def diet(self, place: int) -> Diet:
        """What the sample at this place of the stage is drawn from; its first sample stands at place 0."""
        step, within_batch = divmod(place, self.batch_size)
        if self.mixed in ("samples", "batches"):
            return self._whole_diet(place if self.mixed == "samples" else step * self.batch_size)
        micro = sum(within_batch >= end for end in self.ends())
        return {self.parts(step)[micro][0]: 1}

    def ends(self) -> list[int]:
        """How many of a step's samples there are up to the end of each micro-batch."""
        share = self.batch_size / self.accumulate
        return list(accumulate(self.portions.values())) if self.portions else [round((i + 1) * share) for i in range(self.accumulate)]

    def _whole_diet(self, place: int) -> Diet:
        fraction = place / (self.steps * self.batch_size)
        return next((lesson for end, lesson in self.lessons if fraction < end), self.data)

    def parts(self, step: int) -> list[tuple[str, float]]:
        """Of each micro-batch of a step the data set, "" where they are mixed, and the weight of its losses."""
        if self.mixed in ("samples", "batches"):
            return [("", 1.0)] * self.accumulate
        sets = list(self._whole_diet(step * self.batch_size).items())
        if self.mixed == "turns":
            return [sets[step % len(sets)]] * self.accumulate
        if self.accumulate % len(sets):
            raise UserError(f"Stage {self.name} mixes the losses of {len(sets)} data sets but has {self.accumulate} micro-batches "
                            "(accumulate); make it a multiple.")
        if self.portions and (list(self.portions) != [name for name, _ in sets] or self.ends()[-1] != self.batch_size
                              or len(sets) != self.accumulate):
            raise UserError(f"Stage {self.name}: portions must name the data sets in their order, one micro-batch each, and add up to "
                            f"batch_size {self.batch_size}.")
        return sets * (self.accumulate // len(sets))


@dataclass(frozen=True)
class CapFilt:
    """A data set that finished stages of the recipe make of another one (BLIP §3.3); later diets name it.

    Each picture of `web` keeps its own text and gets one from the captioner; of both only those stay that the filter takes
    for the picture's.
    """

    web: str
    captioner: str = "captioner"  # a stage, and so is the filter
    filter: str = "filter"
    top_p: float = 0.9  # nucleus sampling (§4.3), where there are no beams
    beams: int = 1
    room: int = 40  # tokens of a text


@dataclass(frozen=True)
class Recipe:
    """The tiny ones train on the spot, the published ones are to be read and built."""

    name: str
    model: type
    config: object  # the sizes, what `model` is made with
    stages: tuple[Stage, ...]
    image_size: int
    vocab: int
    makes: dict[str, CapFilt] = field(default_factory=dict)  # data sets that its own stages make, by name
    world: dict[str, object] = field(default_factory=dict)  # how the embedded world is drawn, where not as the encoder looks at it
    # published tokenizers: of its "text", and of a "bridge" that reads other words, the folder below $NANOVLM_WEIGHTS and its kind, see
    # published_tokenizer.py; {}: one is learned
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    checkpointing: bool = False  # of the language model's activations: less memory, more compute

    def stage(self, name: str | None = None) -> Stage:
        """The stage of this name, the last one unless told."""
        found = [stage for stage in self.stages if name in (None, stage.name)]
        if not found:
            raise UserError(f"Recipe {self.name} has no stage {name!r}; its stages are {', '.join(s.name for s in self.stages)}.")
        return found[-1]

    def worldly(self, diet: Diet) -> Diet:
        """The diet before models made anything: their data sets exchanged for those that they are made of."""
        return {self.makes[name].web if name in self.makes else name: weight for name, weight in diet.items()}

    def build(self, stage: Stage) -> nn.Module:
        """The stage's model, with fresh weights."""
        return (stage.builds or self.model)(replace(self.config, **stage.sizes))


def resolve(recipe: Recipe, real: bool, steps: float | None = None) -> Recipe:
    """The recipe as it will be run: `on_data` applied if the data are `real`, and --steps applied to every stage.

    steps: at most 1 is a fraction of each stage's steps, above 1 the number of steps of every stage.
    """
    stages = tuple(_resolve_stage(stage, real, steps) for stage in recipe.stages if not real or stage.on_data is not None)
    return replace(recipe, stages=stages, makes={} if real else recipe.makes)


def _resolve_stage(stage: Stage, real: bool, steps: float | None) -> Stage:
    stage = replace(stage, **((stage.on_data or {}) if real else {}), on_data={})
    if steps is None:
        return stage
    if not 0 < steps < float("inf") or (steps > 1 and steps != int(steps)):
        raise UserError(f"--steps {steps} is neither a fraction up to 1 nor a whole number of steps; try 0.1 or 200.")
    return replace(stage, steps=int(steps) if steps > 1 else max(1, round(stage.steps * steps)))


def as_config(value: object) -> object:
    """A recipe, or what it is made of, as plain values: classes by name, tuples as lists, so that JSON gives back the same."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_config(getattr(value, f.name)) for f in fields(value) if f.name != "on_data"}
    if isinstance(value, dict):
        return {key: as_config(v) for key, v in value.items()}
    if isinstance(value, type):
        return value.__name__
    return [as_config(v) for v in value] if isinstance(value, (list, tuple)) else value
