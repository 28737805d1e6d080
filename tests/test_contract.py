"""The contract held to: every paper's model has what it promises, a batch made by its `reads` is all it needs, nobody probes it."""

import ast
import copy
import importlib
import inspect
from dataclasses import fields, replace
from random import Random

import pytest
import torch
from source import PACKAGE, imports, relative, tree
from torch import Tensor, nn

from nanovlm import generation, recipes
from nanovlm.attention import KVCache
from nanovlm.contract import KINDS, Paper, Reads, alone
from nanovlm.data.conversation import answer_ids, stop_ids
from nanovlm.data.sample import Sample
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage, within
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import make_collate
from nanovlm.world.datasets import Scenes

ANSWERS = ("prefill", "step", "generate")


def models_of_papers() -> set[type]:
    """The classes of nanovlm/papers that learn."""
    found = set()
    for path in (PACKAGE / "papers").glob("[a-z]*.py"):
        module = importlib.import_module(f"nanovlm.papers.{path.stem}")
        found |= {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, nn.Module)
                  and kind.__module__ == module.__name__ and hasattr(kind, "losses")}
    return found


def tiny_stages() -> dict[str, tuple[Recipe, Stage]]:
    return {f"{name}@{stage.name}": (recipes.get(name), stage) for name in recipes.names() if "/tiny" in name
            for stage in recipes.get(name).stages}


every_stage = pytest.mark.parametrize("name", tiny_stages())


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


# --- what a model has ---

def test_every_papers_model_is_a_tiny_stages():
    """So that whoever adds a paper is held to the contract below."""
    built = {stage.builds or recipe.model for recipe, stage in tiny_stages().values()}
    assert built == models_of_papers() and len(built) >= 5


@every_stage
def test_a_model_has_what_the_contract_promises(name):
    """Whoever answers has all three of ANSWERS; a model that compares pictures with texts may have none, and then scores; one that
    reads masked texts fills them, and writes nothing, nor does one that judges statements.
    """
    recipe, stage = tiny_stages()[name]
    with torch.device("meta"):
        model = recipe.build(stage)
    reads = model.reads
    assert type(reads) is Reads and reads.kind in KINDS
    for field in fields(Reads):
        assert isinstance(getattr(reads, field.name), field.type), field.name
    assert type(model.whole_batch) is bool and type(model.whole_weights) is bool
    assert type(model.unheard) is tuple
    for part in model.unheard:
        assert any(within(name, part) for name in model.state_dict()), part
    for method in ("losses", *ANSWERS):
        if method == "losses" or hasattr(model, method):
            assert parameters(getattr(model, method)) == parameters(getattr(Paper, method)), method
    assert inspect.signature(model.losses).parameters["gather"].default is alone
    answers = [hasattr(model, method) for method in ANSWERS]
    assert sum(answers) in {"pairs": (0, 3), "masked": (1,), "statements": (1,)}.get(reads.kind, (3,)) and (reads.kind == "pairs" or answers[-1])
    assert (reads.kind == "pairs") == model.whole_batch <= hasattr(model, "score")
    assert reads.matches <= hasattr(model, "match")


def test_pictures_take_places_only_where_they_stand_among_words():
    got = {}
    for name, (recipe, stage) in tiny_stages().items():
        with torch.device("meta"):
            reads = recipe.build(stage).reads
        got[name] = reads.kind, reads.image_tokens, reads.tiling is not None, reads.question, reads.matches, reads.wrong_captions
    pairs, talk = ("pairs", 0, False, False), ("conversations", 16, False, False, False, False)
    assert got["clip/tiny@clip"] == got["nfnet-clip/tiny@nfnet"] == (*pairs, False, True)
    assert got["blip2/tiny@stage1"] == got["blip2/tiny-retrieval@retrieval"] == (*pairs, True, False)
    assert got["blip2/tiny@stage2"] == got["blip2/tiny-caption@caption"] == ("conversations", 0, *[False] * 4)
    assert got["blip2/tiny-vqa@vqa"] == got["instructblip/tiny@tune"] == ("conversations", 0, False, 64, False, False)
    assert got["llava/tiny@align"] == got["llava/tiny@tune"] == got["llava15/tiny@tune"] == talk
    assert got["llava15/tiny-hd@hd"] == ("conversations", 16, True, False, False, False)
    assert got["blip/tiny@pretrain"] == got["blip/tiny@filter"] == got["blip/tiny@retrain"] == (*pairs, True, False)
    assert got["blip/tiny@captioner"] == ("conversations", 0, *[False] * 4)
    assert got["blip/tiny-vqa@vqa"] == got["blip/tiny-caption@caption"] == ("conversations", 0, *[False] * 4)
    assert got["blip/tiny-nlvr2@nlvr2"] == ("statements", 0, *[False] * 4)
    assert got["flamingo/tiny@pages"] == got["flamingo/tiny-vqa@vqa"] == ("pages", 1, *[False] * 4)
    assert got["bert/tiny@bert"] == ("masked", 0, *[False] * 4)
    assert got["lm/tiny@lm"] == got["lm/tiny-t5@lm-t5"] == ("texts", 0, *[False] * 4)


# --- what a model is given ---

@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(Scenes().texts()[:300], 700)


def samples_of(recipe: Recipe, stage: Stage) -> list[Sample]:
    world = Scenes(0, **{"size": recipe.image_size, **recipe.world})
    return world.look(recipe.worldly(stage.data), stage.real, 4)


@every_stage
def test_a_batch_made_by_what_it_reads_is_all_that_a_model_learns_from(tokenizer, name):
    """And every name in it is one that the contract or `reads` knows; `gather` is used by those who need the whole batch."""
    recipe, stage = tiny_stages()[name]
    torch.manual_seed(0)
    model = recipe.build(stage)
    batch = make_collate(recipe, stage, tokenizer, model.reads)(samples_of(recipe, stage), Random(0))
    allowed = {"input_ids", "attention_mask"} | ({"images"} if model.reads.kind != "masked" else set())
    allowed |= {"text_group", "image_group"} if model.reads.kind == "pairs" else \
        {"choices", "truth"} if model.reads.kind == "statements" else {"labels"}
    allowed |= {"frames", "backwards"} if model.reads.kind == "pages" else set()
    allowed |= {"image_sizes"} if model.reads.tiling else set()
    allowed |= {"qformer_input_ids", "qformer_attention_mask"} if model.reads.question else set()
    allowed |= {"negative_ids", "negative_mask"} if model.reads.wrong_captions else set()
    assert batch.keys() == allowed
    asked = []

    def gather(rows: Tensor) -> Tensor:
        asked.append(rows)
        return rows

    twin = copy.deepcopy(model)  # a queue remembers the batch
    torch.manual_seed(1)
    losses = model.losses(batch, gather)
    torch.manual_seed(1)
    again = twin.losses(batch)
    compares = {"clip/tiny@clip": {"itc"}, "nfnet-clip/tiny@nfnet": {"itc"}, "blip/tiny@filter": {"itc", "itm"}, "blip/tiny-retrieval@retrieval": {"itc", "itm"},
                "blip/tiny@pretrain": {"itc", "itm", "lm"}, "blip/tiny@retrain": {"itc", "itm", "lm"}}
    assert set(losses) == (compares.get(name, {"itc", "itm", "itg"}) if model.whole_batch else
                           {{"masked": "mlm", "statements": "truth"}.get(model.reads.kind, "lm")})
    for key, (total, count) in losses.items():
        assert total.shape == count.shape == () and total.requires_grad and not count.requires_grad
        assert total > 0 and count > 0 and torch.equal(total, again[key][0])
    assert any(rows.requires_grad for rows in asked) == model.whole_batch  # of other rows numbers may be asked, how long clips are say


@every_stage
def test_a_prompt_made_by_what_it_reads_is_all_that_a_model_answers_to(tokenizer, name):
    recipe, stage = tiny_stages()[name]
    torch.manual_seed(0)
    model = recipe.build(stage).eval()
    if not hasattr(model, "generate") or name in ("blip/tiny@filter", "blip/tiny-retrieval@retrieval"):  # BLIP without its decoder
        assert model.reads.kind == "pairs"
        return
    collate = make_collate(recipe, replace(stage, format="plain") if model.reads.kind == "pairs" else stage, tokenizer, model.reads)
    batch = collate.ask(samples_of(recipe, stage))
    said = model.generate(batch, 3, stop_ids(stage.format, tokenizer), temperature=0.0)
    assert said.dtype == torch.int64 and len(said) == 4 and 1 <= said.shape[1] <= 3
    if model.reads.kind in ("masked", "statements"):
        return
    with torch.no_grad():
        logits, cache = model.prefill(batch)
        assert isinstance(cache, KVCache) and logits.shape == (4, recipe.vocab)
        further, cache = model.step(said[:, :1], cache)
        assert isinstance(cache, KVCache) and further.shape == (4, 1, recipe.vocab)
        assert logits.argmax(dim=-1).tolist() == said[:, 0].tolist()
    among = [answer_ids(text, tokenizer, stage.format) for text in ("red", "top left")]
    scores = generation.score_candidates(lambda: model.prefill(batch), model.step, among)
    assert scores.shape == (4, 2) and (scores < 0).all()


def test_a_batch_that_lacks_what_is_read_is_refused(tokenizer):
    """A bridge that reads the question is not asked without, nor one that does not read it with."""
    recipe, stage = tiny_stages()["blip2/tiny-vqa@vqa"]
    model, samples = recipe.build(stage), samples_of(recipe, stage)
    batch = make_collate(recipe, stage, tokenizer, replace(model.reads, question=False))(samples, Random(0))
    with pytest.raises(UserError, match="reads the question too"):
        model.losses(batch)


# --- nobody asks a model what it is ---

CALLERS = sorted([*(PACKAGE / "training").glob("*.py"), *(PACKAGE / "runs").glob("*.py"), *(PACKAGE / "evaluate").glob("*.py"),
                  PACKAGE / "data/collate.py", PACKAGE / "chat.py"])


def names(node: ast.AST) -> set[str]:
    """Of all that is spoken of in here: x.model.reads has x, model and reads."""
    return {part.id if isinstance(part, ast.Name) else part.attr for part in ast.walk(node) if isinstance(part, (ast.Name, ast.Attribute))}


def probes(module: ast.Module) -> list[str]:
    """Where a thing is asked at run time whether it has something, or whose class it is of: `line 3: hasattr`."""
    found = [(0, name) for name in imports(module) if name.startswith("nanovlm.papers")]
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id in ("getattr", "hasattr", "vars", "dir"):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Try) and any("AttributeError" in names(handler.type) for handler in node.handlers if handler.type):
            found += [(node.lineno, "AttributeError")] * any("model" in names(statement) for statement in node.body)
        elif isinstance(node, ast.Attribute) and node.attr in ("__dict__", "__class__", "signature"):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and names(node.func) & {"isinstance", "issubclass"} and "model" in names(node.args[0]):
            found.append((node.lineno, "isinstance"))
    return [f"line {line}: {what}" for line, what in sorted(found)]


def test_no_probe_of_a_model_stands_where_models_are_used():
    """They go by `reads`, `whole_batch` and `unheard` (contract.py): a model is never asked whether it happens to have a method."""
    assert len(CALLERS) >= 15
    wrong = {relative(path): probes(tree(path)) for path in CALLERS if probes(tree(path))}
    assert not wrong


@pytest.mark.parametrize(("code", "found"), [
    ("tokens = getattr(model, 'image_tokens', 0)", 1), ("if hasattr(self.model, 'tiling'): pass", 1),
    ("try:\n    model.gather = f\nexcept AttributeError:\n    pass", 1), ("a = model.__dict__", 1),
    ("from nanovlm.papers.clip import CLIP", 1), ("from nanovlm.papers import clip", 1), ("if isinstance(self.model, CLIP): pass", 1),
    ("import inspect\na = inspect.signature(model.score)", 1), ("a = hasattr\nb = vars(model)", 2),
    ("a = model.reads.image_tokens\nb = isinstance(keep, RunFolder)", 0),
    ("try:\n    a = config['what'].strip()\nexcept (KeyError, AttributeError):\n    pass", 0)])
def test_probes_are_found(code, found):
    assert len(probes(ast.parse(code))) == found
