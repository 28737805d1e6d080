"""A recipe is a model and a list of stages; a stage is what learns, on which data, for how long. Data, no loop.

    Recipe "llava/tiny"
      ├ Stage "align"   trains projector              view captions    init vision ← clip/tiny, language ← lm/tiny
      └ Stage "tune"    trains projector, language    view instruct    goes on from "align"

The same sentence for all six papers: what is frozen, what learns, on which data; training/loop.py reads it.
`init` names where weights come from before the stage starts:
    ("vision", "clip/tiny:vision")            module `vision` of the trained recipe clip/tiny, after its last stage
    ("qformer", "blip2/tiny@stage1:qformer")  the same after an earlier stage, behind which nothing is trained
    ("", "blip2/tiny")                        all of the model, from all of another
    ("vision", "published:openai/clip-…")     published weights in the folder $NANOVLM_WEIGHTS/openai/clip-…
Entries are laid over each other: where several have a tensor the last one counts, and what none has is an error.
Modules that `init` does not name go on from the recipe's stage before, where it had a module of that name.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

from torch import nn

from nanovlm.data.sample import VIEWS
from nanovlm.errors import UserError

SCHEDULES = ("cosine", "constant")
EVALUATIONS = ("answers", "captions", "two", "classes", "retrieval")  # see evaluate.py


def within(name: str, part: str) -> bool:
    """Whether a tensor is a part of a model or stands in it: "qformer.queries" in "qformer"; in "" stand all."""
    return not part or name == part or name.startswith(part + ".")


@dataclass(frozen=True)
class Stage:
    """One phase of training: whatever `trains` does not name is frozen and in eval()."""

    name: str  # unique among all stages of a run, backbones' too: it names the checkpoint
    trains: tuple[str, ...]  # modules or parameters of the model, by name: ("projector",)
    view: str  # how the source shows itself, one of VIEWS, see world/datasets.py
    steps: int
    batch_size: int  # of one optimiser step, over all ranks and micro-batches together
    lr: float  # the highest, reached after the warm-up
    format: str = "plain"  # conversation format; "pair": the caption alone, for contrast, as always in view "pairs"
    schedule: str = "cosine"  # or "constant"
    min_lr: float = 0.0  # where the cosine ends, as a fraction of lr
    warmup: float = 0.03  # fraction of the steps
    weight_decay: float = 0.0  # on matrices only
    layer_decay: float = 1.0  # below 1 the encoder's early layers learn slower, see optim.py
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0  # global gradient norm; 0 = no clipping
    first: int = 0  # the sample it begins with: behind those that an earlier stage has had
    accumulate: int = 1  # micro-batches per optimiser step: less memory, the same gradient
    augment: bool = False  # random crops and flips
    fit: str = "crop"  # how a picture becomes a square: "crop" | "pad" | "stretch", see data/transforms.py
    group: bool = False  # batches of one modality, or micro-batches of like length, see training/batches.py
    init: tuple[tuple[str, str], ...] = ()
    max_length: int = 0  # of a sequence, image tokens included; 0 = no limit
    evaluate: tuple[str, ...] = ()  # what its model is judged by, of EVALUATIONS
    on_data: tuple[tuple[str, object], ...] = ()  # fields replaced with --data: few real pictures need augmentation

    def __post_init__(self):
        if self.view not in VIEWS or self.schedule not in SCHEDULES:
            raise ValueError(f"Stage {self.name}: view is one of {VIEWS}, schedule one of {SCHEDULES}.")
        if not set(self.evaluate) <= set(EVALUATIONS):
            raise ValueError(f"Stage {self.name}: evaluate is {self.evaluate}, but there are only {EVALUATIONS}.")

    @property
    def pairs(self) -> bool:
        """Whether a batch is pictures and texts that belong together, rather than conversations."""
        return self.view == "pairs" or self.format == "pair"


@dataclass(frozen=True)
class Recipe:
    """A model's sizes and its stages; the tiny ones train on the spot, the published ones are to be read and built."""

    name: str
    build: Callable[[str], nn.Module]  # stage name → model
    stages: tuple[Stage, ...]
    image_size: int
    vocab: int
    picture_size: int = 0  # of the embedded world's pictures, where they are larger than what the encoder looks at
    small_print: bool = False  # their signs are numbers of two digits, half as large: what tiles are for
    phrases: tuple[str, ...] = ()  # what a tiny tokenizer is to know in few tokens, besides the data and the formats
    notes: str = ""


def resolve(recipe: Recipe, real: bool, steps: float | None = None) -> Recipe:
    """The recipe as it will be run: `on_data` applied if the data are `real`, and --steps applied to every stage.

    steps: at most 1 is a fraction of each stage's steps, above 1 the number of steps of every stage.
    """
    return replace(recipe, stages=tuple(_resolve_stage(stage, real, steps) for stage in recipe.stages))


def _resolve_stage(stage: Stage, real: bool, steps: float | None) -> Stage:
    changes = dict(stage.on_data) if real else {}
    stage = replace(stage, **changes, on_data=())
    if steps is None:
        return stage
    if steps <= 0 or (steps > 1 and steps != int(steps)):
        raise UserError(f"--steps {steps} is neither a fraction up to 1 nor a whole number of steps; try 0.1 or 200.")
    return replace(stage, steps=int(steps) if steps > 1 else max(1, round(stage.steps * steps)))


def as_config(recipe: Recipe) -> dict:
    """The recipe as plain values, for config.json; the model's own sizes live in its build function, which is code."""
    plain = {f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe) if f.name not in ("build", "stages", "notes")}
    plain["stages"] = [_plain(asdict(stage)) for stage in recipe.stages]
    return plain


def _plain(value: object) -> object:
    """Tuples become lists, as JSON has it, so that a config read back compares equal."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if key != "on_data"}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
