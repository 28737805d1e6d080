"""Where a stage's weights come from: chance, the stage before, any other stage, or a published checkpoint.

    build (random, seeded by stage) ──► modules of the same name from the recipe's stage before ──► `init` of the stage

A model that will be shared out over several ranks is built leanly: what a file has is never drawn at random first. Such parts are made of
shapes alone, on the meta device, and then get the file's own tensors, which stay on the disk until `shard` takes each rank's rows.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm import published_tokenizer, recipes
from nanovlm.decoder import Decoder
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage, within
from nanovlm.t5 import T5
from nanovlm.training.randomness import seed_all

PUBLISHED = ("published:", "published-bert:", "published-words:")
WORDS = {"text": "the tokenizer", "bridge": "the bridge's tokenizer"}  # what a part of Recipe.words is called

State = dict[str, Tensor]


def needed_stages(stage: Stage) -> list[tuple[str, str]]:
    """(recipe, stage) whose weights `init` takes, in order, each once."""
    return list(dict.fromkeys(place(origin)[:2] for _, origin in stage.init if not origin.startswith(PUBLISHED)))


def place(origin: str) -> tuple[str, str, str]:
    """"blip2/tiny@stage1:qformer" → recipe, stage (the last one unless named), module ("": the whole model)."""
    trained, _, part = origin.partition(":")
    name, _, stage = trained.partition("@")
    return name, recipes.get(name).stage(stage or None).name, part


def initial_model(recipe: Recipe, stage: Stage, seed: int, finished: dict[str, State], lean: bool = False) -> nn.Module:
    """The model as the stage finds it; `finished` holds stage name → its weights.

    lean: without a copy of what comes from files. The rest is then drawn from other random numbers than without it.
    """
    seed_all(seed, recipe.name, stage.name)
    before = [] if stage.anew else recipe.stages[:recipe.stages.index(stage)][-1:]
    old = finished[before[0].name] if before else {}
    with shapes_only(filled_kinds(recipe, stage, old) if lean else ()):
        model = recipe.build(stage)
    checkpointed(model, recipe.checkpointing)
    take_over(model, old)
    lacking = {name for name in model.state_dict() for module, _ in stage.init if within(name, module)}
    for module, origin in stage.init:
        if origin.startswith(PUBLISHED):
            lacking -= load_published(model, module, *origin.split(":", 1))
        else:
            _, source, part = place(origin)
            lacking -= load_part(model, module, finished[source], part)
    lacking |= {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    if lacking:
        raise ValueError(f"Stage {stage.name}: nothing that init names has {', '.join(sorted(lacking)[:4])}.")
    return model


def filled_kinds(recipe: Recipe, stage: Stage, old: State) -> set[type]:
    """The classes of our own modules that files fill wholly: those of the stage before, and of `init`.

    Not one of which something stands elsewhere, too: BLIP's slow copy of its encoder is of the encoder's class, and no file has it.
    """
    with torch.device("meta"):
        model = recipe.build(stage)
    modules = dict(model.named_modules())
    whole = {name.split(".")[0] for name in old} | {name for name, origin in stage.init if not origin.startswith("published-bert:")}
    found = {type(modules[name]) for name in whole & modules.keys()}
    elsewhere = {type(module) for name, module in modules.items() if not any(within(name, part) for part in whole)}
    return {kind for kind in found - elsewhere if kind.__module__.startswith("nanovlm.")}


@contextmanager
def shapes_only(kinds: Iterable[type]) -> Iterator[None]:
    """What is built of these classes in here lies on the meta device: shapes without numbers."""
    usual = {kind: kind.__init__ for kind in kinds}

    def on_meta(kind: type) -> Callable:
        def __init__(self, *args, **named):
            with torch.device("meta"):
                usual[kind](self, *args, **named)
        return __init__

    for kind in usual:
        kind.__init__ = on_meta(kind)
    try:
        yield
    finally:
        for kind, init in usual.items():
            kind.__init__ = init


def checkpointed(model: nn.Module, wanted: bool) -> nn.Module:
    """Whether its language model keeps activations, or makes them again on the way back."""
    for part in model.modules():
        if isinstance(part, (Decoder, T5)):
            part.checkpointing = wanted
    return model


def take_over(model: nn.Module, old: State) -> None:
    """Every top-level part that `old` has too goes on with its weights; all of them, or it is an error."""
    shared = {name.split(".")[0] for name in old}
    put(model, {name: old[name] for name in model.state_dict() if name.split(".")[0] in shared})


def load_part(model: nn.Module, module: str, old: State, part: str) -> set[str]:
    """Module `module` of the model := module `part` of another, as far as both have it; the names of what was filled.

    BLIP-2 leaves out the encoder's last block: what only the other has stays behind.
    """
    weights = {name[len(part) + 1 if part else 0:]: tensor for name, tensor in old.items() if within(name, part)}
    if not weights:
        raise ValueError(f"init takes {part!r}, but the backbone has no such module.")
    return fill(model, module, weights)


def fill(model: nn.Module, module: str, weights: State) -> set[str]:
    target = model.get_submodule(module)
    shared = {name: weights[name] for name in target.state_dict() if name in weights}
    put(target, shared)
    return {f"{module}.{name}" if module else name for name in shared}


def put(module: nn.Module, weights: State) -> None:
    """Copied into the parameters that there are; where there are shapes only, the tensors themselves are taken."""
    mine = module.state_dict()
    meta = {name for name in weights if mine[name].is_meta}
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name not in meta}, strict=False)
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name in meta}, strict=False, assign=True)


def published_folder(module: str, name: str) -> Path:
    """$NANOVLM_WEIGHTS/ORG/NAME"""
    home = os.environ.get("NANOVLM_WEIGHTS")
    if not home or not (Path(home) / name).is_dir():
        raise UserError(f"The published weights {name} are needed for {module}: put their folder at {name} below a "
                        f"folder of your choice and set NANOVLM_WEIGHTS to the latter (now {home or 'not set'}).")
    return Path(home) / name


def downloads(recipe: Recipe, last: str | None = None) -> list[tuple[str, str]]:
    """(folder below $NANOVLM_WEIGHTS, for what) of all that the recipe reads up to its stage `last`, and of those that it goes on from."""
    found = []
    for stage in recipe.stages[:recipe.stages.index(recipe.stage(last)) + 1]:
        for name, needed in needed_stages(stage):
            found += downloads(recipes.get(name), needed)
        found += [(origin.split(":", 1)[1], module) for module, origin in stage.init if origin.startswith(PUBLISHED)]
    return list(dict.fromkeys(found + [(name, WORDS[part]) for part, (name, _) in recipe.words.items()]))


def find_published(recipe: Recipe, last: str) -> None:
    """All of it is there, or a UserError: asked before anything is allocated."""
    for name, use in downloads(recipe, last):
        folder = published_folder(use, name)
        if use in WORDS.values():
            published_tokenizer.find(folder)


def load_published(model: nn.Module, module: str, how: str, name: str) -> set[str]:
    """That module alone, or a model that has one of that name; returns the names of what was filled."""
    # Imported here, because hub knows every paper: editing one of them must not invalidate all cached backbones.
    from nanovlm import hub

    loaded = hub.load(published_folder(module, name))
    children = dict(loaded.named_children())
    if how == "published-bert":  # what BERT lacks starts at random
        part = "word_head" if module.endswith("word_head") else "bert"
        model.get_submodule(module).take_bert(children.get(part, loaded))
        return {name for name in model.state_dict() if within(name, module)}
    weights = children.get(module, loaded).state_dict()
    if how == "published-words":
        weights |= {name: beside(weights[name], rows) for name, rows in model.get_submodule(module).state_dict().items()
                    if name in ("embedding.weight", "head.weight")}
    return fill(model, module, weights)


def beside(rows: Tensor, mine: Tensor) -> Tensor:
    """A table of words (V, D) with the further ones of a larger table: what was added to a vocabulary, [PAD] say, starts at random,
    about as large as the others.
    """
    added = torch.randn(len(mine) - len(rows), rows.shape[1]) * rows.std()
    return torch.cat([rows, added.to(rows)])
