"""A model that will be shared out is built without a whole copy of what files have, and read without one."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_contract import tiny_stages
from test_instructblip_recipes import shrunk, theirs  # noqa: F401
from tools import together
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from nanovlm import recipes
from nanovlm.decoder import Decoder, llama
from nanovlm.papers.llava import LLaVA, LLaVAConfig
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.runs import checkpoint
from nanovlm.training import sharding
from nanovlm.training.loop import freeze
from nanovlm.training.optim import make_optimiser
from nanovlm.training.weights import initial_model, needed_stages, shapes_only
from nanovlm.vit import clip_vit

CPU = torch.device("cpu")
MB = 2 ** 20


@pytest.mark.parametrize(("name", "stage"), [("instructblip/flan-t5-xl", "tune"), ("instructblip/vicuna-7b", "stage2"), ("instructblip/vicuna-7b", "tune")])
def test_a_lean_start_has_the_weights_of_a_whole_one(theirs, monkeypatch, name, stage):  # noqa: F811
    home, models = theirs
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(home))
    recipe = shrunk(name, models)
    before = {each.name: recipe.build(each).state_dict() for each in recipe.stages[:-1]}
    whole, lean = (initial_model(recipe, recipe.stage(stage), 0, before, lean=lean) for lean in (False, True))
    ours, others = whole.state_dict(), lean.state_dict()
    words = {"language.embedding.weight", "language.head.weight"} if "vicuna" in name else set()
    drawn = {key for key in ours if key.startswith("projection.")} if stage == "stage2" else set()
    assert ours.keys() == others.keys() and not any(tensor.is_meta for tensor in others.values())
    for key, tensor in ours.items():
        if key in words:
            assert torch.equal(tensor[:53], others[key][:53]) and others[key][53:].abs().max() > 0
        elif key not in drawn:
            assert torch.equal(tensor, others[key]), key
    assert [p.requires_grad for p in lean.parameters()] == [p.requires_grad for p in whole.parameters()]


@pytest.mark.parametrize("name", tiny_stages())
def test_every_tiny_stage_can_begin_leanly(name):
    """BLIP has a slow copy of its encoder, of which no file knows: were it made of shapes too, nothing would fill it."""
    recipe, stage = tiny_stages()[name]
    needed = [recipes.get(other).stage(of) for other, of in needed_stages(stage)]
    finished = {each.name: recipes.get(other).build(each).state_dict() for (other, _), each in zip(needed_stages(stage), needed, strict=True)}
    finished |= {each.name: recipe.build(each).state_dict() for each in recipe.stages}
    model = initial_model(recipe, stage, 0, finished, lean=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

def test_the_stage_before_lends_its_tensors_themselves():
    recipe = recipes.get("llava/tiny")
    before = {"align": recipe.build(recipe.stage("align")).state_dict()}
    lean = initial_model(recipe, recipe.stage("tune"), 0, before, lean=True)
    lent = [name for name, tensor in lean.state_dict().items() if tensor.data_ptr() == before["align"][name].data_ptr()]
    assert {name for name in before["align"] if name.startswith(("vision.", "language."))} <= set(lent)


def test_what_no_file_fills_is_named():
    recipe = recipes.get("llava/tiny")
    align = replace(recipe.stage("align"), init=())
    with shapes_only([Decoder]), pytest.raises(ValueError, match="nothing that init names has language.blocks.0.attention"):
        initial_model(replace(recipe, stages=(align, recipe.stage("tune"))), align, 0, {})


def test_shapes_only_ends_with_its_block():
    usual = Decoder.__init__
    with shapes_only([Decoder]):
        assert all(p.is_meta for p in Decoder(llama(9, 8, 1, 2, 8)).parameters())
    assert Decoder.__init__ is usual and not any(p.is_meta for p in Decoder(llama(9, 8, 1, 2, 8)).parameters())


# ---- memory, as the system counts it

LARGE = LLaVAConfig(clip_vit(24, 8, 64, 2, 2), llama(8192, 1024, 6, 8, 2816), image_token_id=3)
TRAINS = ("projector", "language")
RECIPE = Recipe("large/tiny", LLaVA, LARGE, tuple(Stage(name, TRAINS, {"talk": 1}, steps=1, batch_size=2, lr=1e-3) for name in ("align", "tune")),
                image_size=24, vocab=8192)


def anonymous() -> int:
    """Bytes that this process has for itself; pages of mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Peak:
    """The most of `anonymous` at any operation of PyTorch or call of Python in here, above what it was before."""

    def __enter__(self):
        import threading

        self.before = self.most = anonymous()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_):
        self.most = max(self.most, anonymous())
        self.done.set()
        self.watcher.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def memory_work(rank: int, folder: str) -> None:
    stage = RECIPE.stage("tune")
    with Peak() as loading:
        before = {"align": checkpoint.load(Path(folder) / "align.pt", mapped=True)}
        model = initial_model(RECIPE, stage, 0, before, lean=True)
        freeze(model, stage.trains)
        sharding.shard(model, CPU)
        del before
    optimiser = make_optimiser(model, stage)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    optimiser.step()
    optimiser.zero_grad()
    sharding.save(Path(folder) / "half", model, optimiser)
    again = make_optimiser(model, stage)  # without moments, which `load` makes
    optimiser.state.clear()
    with Peak() as resuming:
        sharding.load(Path(folder) / "half", model, again)
    found = {"loading": loading.bytes, "resuming": resuming.bytes, "size": sum(p.numel() * 4 for p in model.parameters()),
             "tensor": max(p.numel() * 4 for p in model.parameters())}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process has for itself")
def test_a_rank_needs_its_share_and_one_tensor(tmp_path):
    """A file of some 400 MB on two ranks, then a checkpoint of shards three times as large, moments and all."""
    torch.manual_seed(0)
    torch.save(RECIPE.build(RECIPE.stage("align")).state_dict(), tmp_path / "align.pt")
    together(2, memory_work, str(tmp_path))
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 350 * MB < found["size"] < 450 * MB
        assert found["loading"] < found["size"] / 2 + found["tensor"] + 16 * MB, found
        assert found["resuming"] < found["size"] + found["tensor"] + 16 * MB, found  # the moments' share is new, the weights' was there


def stand_in(folder: Path, published: nn.Module) -> None:
    """A published folder with zeros for weights, none of which takes room on the disk: a file may have holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**published.config.to_dict(), "architectures": [type(published).__name__]}))
    head, at = {}, 0
    for name, tensor in published.state_dict().items():
        head[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = json.dumps(head).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process has for itself")
def test_seven_billion_parameters_begin_in_200_mb(tmp_path, monkeypatch):
    """LLaVA-1.5 7B, first stage: CLIP and Vicuna stay on the disk, the projector's 21 million are drawn."""
    vicuna = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         max_position_embeddings=2048, rms_norm_eps=1e-5)
    clip = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
    with torch.device("meta"):
        stand_in(tmp_path / "lmsys/vicuna-7b-v1.5", LlamaForCausalLM(vicuna))
        stand_in(tmp_path / "openai/clip-vit-large-patch14-336", CLIPVisionModel(clip))
    monkeypatch.setenv("NANOVLM_WEIGHTS", str(tmp_path))
    recipe = recipes.get("llava15/7b")
    with Peak() as peak:
        model = initial_model(recipe, recipe.stage("align"), 0, {}, lean=True)
    assert sum(p.numel() for p in model.parameters()) == 7_062_902_784
    assert peak.bytes < 200 * MB
