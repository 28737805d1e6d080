"""The planner of full-size runs: its bytes and operations against real steps, real allocations and FSDP2's own shards."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nanovlm import recipes
from nanovlm.decoder import VICUNA_7B, Block
from nanovlm.plan import __main__ as command
from nanovlm.plan import stages
from nanovlm.plan.simulate import likeness, look
from nanovlm.plan.stages import (
    FREE,
    GIB,
    Machine,
    checkpointed,
    gathered_bytes,
    make_batch,
    parts_of,
    plan,
    static_bytes,
    words_of,
)
from nanovlm.training.loop import freeze

aten = torch.ops.aten
KERNEL = {  # the CPU's own, for which PyTorch's counter has no formula
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}
STEPS = [("llava/tiny", "align", True), ("llava/tiny", "tune", False), ("llava/tiny", "tune", True), ("llava15/tiny-hd", "hd", True),
         ("blip/tiny", "pretrain", False), ("blip2/tiny", "stage1", False), ("blip2/tiny", "stage2", True), ("blip2/tiny-t5", "stage2", True),
         ("blip/tiny-vqa", "vqa", False), ("blip/tiny-nlvr2", "nlvr2", False), ("instructblip/tiny", "tune", True), ("flamingo/tiny", "pages", True)]


def step(model: nn.Module, batch: dict) -> None:
    sum(total / count for total, count in model.losses(batch).values()).backward()


def flops_of(model: nn.Module, batch: dict) -> int:
    with FlopCounterMode(display=False, custom_mapping=KERNEL) as counter:
        step(model, batch)
    return counter.get_total_flops()


def saved_by(run, before: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps of a forward, each storage once, without those of the tensors `before`."""
    known, kept = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in before}, {}

    def pack(tensor):
        kept[StorageWeakRef(tensor.untyped_storage()).cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for cdata, storage in kept.items() if cdata not in known)


def allocated(model: nn.Module, batch: dict) -> int:
    """Most bytes that a step holds at a time, as the allocator says; gradients go as soon as they are whole."""
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, batch)
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def ready(name: str, stage: str, checkpointing: bool, device: str) -> tuple[nn.Module, dict]:
    recipe = recipes.get(name)
    model = recipes.build(name, device, stage)
    freeze(model, recipe.stage(stage).trains)
    return checkpointed(model, checkpointing), make_batch(model, recipe, recipe.stage(stage), 4, 30, device)


@pytest.mark.parametrize("name, stage, checkpointing", STEPS)
def test_a_look_is_a_step(name, stage, checkpointing):
    """Operations to the unit; bytes against what real tensors take on a CPU, whose attention keeps a little more or less."""
    seen = look(*ready(name, stage, checkpointing, "meta"))
    model, batch = ready(name, stage, checkpointing, "cpu")
    pictures = batch["images"].nbytes
    assert seen.flops == flops_of(model, batch)
    kept = saved_by(lambda: model.losses(batch), [*model.parameters(), *model.buffers(), *batch.values()])
    assert seen.kept - pictures == pytest.approx(kept, rel=0.1)
    assert seen.peak - pictures == pytest.approx(allocated(model, batch), rel=0.1)


class Blocks(nn.Module):
    """Two of Vicuna-7B's blocks, for a size that no test can allocate."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(VICUNA_7B) for _ in range(2))

    def losses(self, batch, gather=None):
        x = batch["images"]
        for block in self.blocks:
            x = block(x, batch["bias"], None)
        return {"sum": (x.sum(), torch.ones(()))}


def test_blocks_of_full_size_keep_what_fake_tensors_keep():
    shape = {"images": (16, 800, 4096), "bias": (16, 1, 800, 800)}
    with torch.device("meta"):
        seen = look(Blocks(), {name: torch.zeros(size) for name, size in shape.items()})
    with FakeTensorMode():
        model, batch = Blocks(), {name: torch.zeros(size) for name, size in shape.items()}
        kept = saved_by(lambda: model.losses(batch), [*model.parameters()])
    pictures = batch["images"].nbytes
    assert kept > 2 * GIB
    assert seen.kept - pictures == pytest.approx(kept - pictures, rel=0.1)


def test_what_is_asked_once_is_alike_in_shapes_and_types():
    x = torch.zeros(2, 3)
    assert likeness((x, 1, [x])) == likeness((x + 1, 1, [x]))
    others = [(x, 1.0, [x]), (x, True, [x]), (x.double(), 1, [x]), (x.t(), 1, [x]), (torch.zeros(3, 2).t(), 1, [x]), (x, 1, [x, x]), (x, 1, [1])]
    assert not [other for other in others if likeness(other) == likeness((x, 1, [x]))]


def test_a_look_leaves_nothing_behind():
    """A real step after it has numbers, not shapes, in its kernels and caches."""
    look(*ready("llava/tiny", "tune", True, "meta"))
    model, batch = ready("llava/tiny", "tune", True, "cpu")
    step(model, batch)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- parameters ---

def learns(name: str, model: nn.Module, trains: tuple[str, ...]) -> bool:
    def inside(parts):
        return any(f"{name}.".startswith(f"{part}.") for part in parts)
    return inside(trains) and not inside(model.unheard)


def test_parameter_bytes_of_all_published_stages(monkeypatch):
    """Each learned number 16 bytes, each frozen one 2: rank 0 has the first of the chunks of the rows."""
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, *_, **__: tensor)  # nobody looks at values
    seen = set()
    for recipe in command.published():
        for stage in recipe.stages:
            key = repr((recipe.model, recipe.config, stage.builds, stage.sizes, stage.trains))
            if key in seen:
                continue
            seen.add(key)
            model = recipes.build(recipe.name, stage=stage.name)
            freeze(model, stage.trains)
            frozen, learned = [0, 0], [0, 0]  # whole, on the largest of 8 ranks
            heard = {parameter for name, parameter in model.named_parameters(remove_duplicate=False) if learns(name, model, stage.trains)}
            for parameter in model.parameters():
                sizes = learned if parameter in heard else frozen
                sizes[0] += parameter.numel()
                sizes[1] += parameter.reshape(-1, *parameter.shape[1:]).chunk(8)[0].numel()
            for gpus, place in ((1, 0), (8, 1)):
                found = static_bytes(model, gpus)
                assert found["weights"] == 2 * frozen[place] + 4 * learned[place], (recipe.name, stage.name)
                assert (found["gradients"], found["moments"]) == (4 * learned[place], 8 * learned[place])
            counts = parts_of(model).values()
            assert (sum(count for count, _ in counts), sum(trained for _, trained in counts)) == (frozen[0] + learned[0], learned[0])
    assert len(seen) > 30


def test_parts_of_llava():
    """The paper's sizes: CLIP-L 303.5 M, two maps of 1024 → 4096 → 4096 with biases, Vicuna-7B 6,738,415,616."""
    model = recipes.build("llava15/7b", stage="align")
    freeze(model, ("projector",))
    parts, bridge = parts_of(model), 1025 * 4096 + 4097 * 4096
    assert parts["bridge"] == (bridge, bridge) and parts["language"] == (6_738_415_616, 0)
    assert parts["vision"][0] == pytest.approx(303.5e6, rel=1e-3) and parts["vision"][1] == 0


def test_rows_are_dealt_out_as_by_fully_shard():
    model = recipes.build("llava/tiny", "cpu", "tune")
    freeze(model, ("projector", "language"))
    expected = static_bytes(model, 7)["weights"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=7)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (7,)))
        local = {learned: sum(p.to_local().numel() for p in model.parameters() if p.requires_grad is learned) for learned in (True, False)}
    finally:
        dist.destroy_process_group()
    assert expected == 4 * local[True] + 2 * local[False]


def test_what_is_gathered():
    """LLaVA-1.5 7B, tune: the largest block is one of Vicuna's; embedding, head, norms and projector are the root."""
    model = recipes.build("llava15/7b", stage="tune")
    freeze(model, ("projector", "language"))
    block = 4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096
    eyes = 24 * (12 * 1024 ** 2 + 13 * 1024)  # 24 blocks of CLIP-L
    root = sum(p.numel() for p in model.parameters()) - 32 * block - eyes
    assert gathered_bytes(model) == 2 * (root + 3 * block) + 4 * block


def test_what_cannot_be_split_is_gathered_whole():
    """BLIP's losses read weights from outside of their modules: all of them in fp32, and their gradients."""
    model = recipes.build("blip/tiny", stage="pretrain")
    freeze(model, recipes.get("blip/tiny").stage("pretrain").trains)
    counts = [p.numel() for p in model.parameters()]
    assert all(p.requires_grad for p in model.parameters()) and gathered_bytes(model) == 8 * sum(counts)


# --- plans ---

def test_published_hours():
    """LLaVA-1.5 7B: its README says 3.5 + 10 hours on 8 A100; BLIP-2 with FlanT5-XXL §3.4: less than 6 + 3 days on 16."""
    recipe = recipes.get("llava15/7b")
    align, tune = (plan(recipe, stage) for stage in recipe.stages)
    assert align.hours == pytest.approx(4.1, abs=0.1) and tune.hours == pytest.approx(9.7, abs=0.1)
    assert (align.micro, align.accumulate, tune.micro, tune.accumulate) == (32, 1, 16, 1)  # as its scripts have it
    assert tune.fits and tune.whole / GIB > 80  # sharded, not whole
    recipe = recipes.get("blip2/vit-g-flan-t5-xxl")
    days = [plan(recipe, stage, Machine(16, 40)).hours / 24 for stage in recipe.stages]
    assert 1 < days[0] < 6 and 1 < days[1] < 3


def test_the_largest_micro_batch_that_fits():
    recipe = recipes.get("llava/tiny")
    tune = recipe.stage("tune")
    largest = plan(recipe, tune, Machine(2, 80))
    assert (largest.micro, largest.accumulate, largest.fits) == (16, 1, True)
    enough = largest.needed / GIB / (1 - FREE)
    assert plan(recipe, tune, Machine(2, enough * 1.001)).micro == 16
    less = plan(recipe, tune, Machine(2, enough * 0.999))
    assert (less.micro, less.accumulate, less.fits) == (8, 2, True)
    least = plan(recipe, tune, Machine(2, enough / 1000))
    assert (least.micro, least.accumulate, least.fits) == (1, 16, False)


def test_a_plan_takes_few_looks(monkeypatch):
    """Each takes seconds at full size: the largest that there is comes first, then what memory has room for."""
    looked = []
    monkeypatch.setattr(stages, "look", lambda model, batch, ranks: looked.append(len(batch["input_ids"])) or look(model, batch, ranks))
    recipe = recipes.get("llava/tiny")
    tune = recipe.stage("tune")
    largest = plan(recipe, tune, Machine(1))
    assert looked == [32, 1]  # the second for the time
    looked.clear()
    static = largest.needed - largest.bytes["activations"]
    memory = (static + largest.bytes["activations"] / 3.5) / GIB / (1 - FREE)
    assert plan(recipe, tune, Machine(1, memory)).micro == 8
    assert looked == [32, 8, 16, 1]  # 9 would fit, 16 shows that no more do


def test_time_and_flops():
    recipe = recipes.get("llava/tiny")
    tune = recipe.stage("tune")
    one, four = plan(recipe, tune, Machine(1)), plan(recipe, tune, Machine(4, mfu=0.5))
    assert one.flops == four.flops and one.hours == pytest.approx(8 * four.hours)
    assert one.hours == pytest.approx(tune.steps * one.flops / (312e12 * 0.25) / 3600)
    checkpoints = plan(replace(recipe, checkpointing=True), tune)
    assert checkpoints.flops == one.flops  # model FLOPs count nothing twice
    assert checkpoints.look.kept < plan(recipe, tune).look.kept / 2
    assert plan(recipe, tune, usual=10).flops < one.flops
    assert plan(recipe, tune, Machine(1, peak=156e12)).hours == pytest.approx(2 * one.hours)


def test_a_contrastive_batch_is_not_split():
    recipe = recipes.get("blip2/tiny")
    stage = recipe.stage("stage1")
    assert [plan(recipe, stage, Machine(gpus, 1e-3)).micro for gpus in (1, 4)] == [32, 8]
    model, batch = ready("blip2/tiny", "stage1", False, "meta")
    assert look(model, batch, ranks=8).kept > look(model, batch, ranks=1).kept  # all ranks' features are gathered


@pytest.mark.parametrize("name, longest", [("llava15/7b", 2048 - 576), ("llava/7b", 2048 - 256), ("blip2/vit-g-opt-2.7b", 32), ("flamingo/3b", 256),
                                           ("llava15/7b-hd", 4096 - 16 ** 2 - 6 * 16 * (16 + 1))])
def test_words_beside_the_picture(name, longest):
    """Tiled, of all canvases the one of most places: six tiles below each other, and a row's end behind each of their rows."""
    found, usual = words_of(recipes.build(name), recipes.get(name).stages[-1])
    assert found == longest and usual <= found


# --- the command ---

def test_a_plan_in_words(capsys):
    assert command.main(["--recipe", "llava/tiny", "--gpus", "2", "--memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "stage align: 100 steps of 64 = 2 GPUs × 32 × 1" in out and "stage tune" in out
    assert "of 24: fits" in out and "GPU-hours" in out and "DOES NOT" not in out


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.endswith("/small") and name not in recipes.BACKBONES])
def test_small_recipes_fit_on_one_gpu_of_24_gb(name, capsys):
    assert command.main(["--recipe", name, "--gpus", "1", "--memory", "24"]) == 0
    out = capsys.readouterr().out
    assert out.count("of 24: fits") == len(recipes.get(name).stages) and "DOES NOT" not in out


def test_the_table(capsys, monkeypatch):
    """A stage that so many GPUs cannot share has a sentence for a row, and the others their own."""
    monkeypatch.setattr(command, "published", lambda: [recipes.get("flamingo/tiny"), recipes.get("blip2/tiny")])
    assert command.main(["--all", "--gpus", "8", "--memory", "1"]) == 0
    head, flamingo, stage1, stage2 = capsys.readouterr().out.strip().split("\n")
    assert "GPU-hours" in head and "cannot share" in flamingo and "pages" in flamingo
    assert stage1.split()[:2] == ["blip2/tiny", "stage1"] and stage2.split()[:2] == ["blip2/tiny", "stage2"]


def test_what_to_download(capsys):
    """Weights and tokenizers, each once; those of the recipes that it goes on from, too; nothing where nothing is published."""
    clip, bert, opt = "openai/clip-vit-large-patch14", "google-bert/bert-base-uncased", "facebook/opt-2.7b"
    assert command.downloads(recipes.get("blip2/vit-l-retrieval")) == [
        (clip, "vision"), (bert, "qformer"), (opt, "the tokenizer"), (bert, "the bridge's tokenizer")]  # stage 1 has no language model
    assert ("lmsys/vicuna-7b-v1.5", "language") in command.downloads(recipes.get("llava15/7b"))
    assert command.downloads(recipes.get("blip/vit-b-caption")) == command.downloads(recipes.get("blip/vit-b"))
    assert command.downloads(recipes.get("flamingo/3b")) == command.downloads(recipes.get("llava/small")) == []


def test_published_recipes_are_of_all_papers():
    names = [recipe.name for recipe in command.published()]
    assert {name.split("/")[0] for name in names} == {"blip", "blip2", "flamingo", "instructblip", "llava", "llava15"}
    assert {"llava15/7b", "flamingo/80b", "blip/vit-l"} < set(names) and not any("tiny" in name or "small" in name for name in names)


@pytest.mark.parametrize("arguments, sentence", [
    ([], "Give either --recipe"),
    (["--recipe", "llava15/7b", "--all"], "Give either --recipe"),
    (["--recipe", "llava15/8b"], "There is no recipe 'llava15/8b'"),
    (["--recipe", "clip/tiny"], "is a backbone"),
    (["--recipe", "llava/tiny", "--gpus", "0"], "--gpus 0:"),
    (["--recipe", "llava/tiny", "--gpus", "7"], "7 GPUs"),
    (["--recipe", "llava/tiny", "--memory", "-1"], "--memory -1:"),
    (["--recipe", "llava/tiny", "--memory", "nan"], "--memory nan:"),
    (["--recipe", "llava/tiny", "--mfu", "25"], "--mfu 25:"),
    (["--recipe", "llava/tiny", "--words", "0"], "--words 0:"),
    (["--recipe", "llava/tiny", "--peak", "0"], "--peak 0:"),
])
def test_bad_options_are_one_sentence(arguments, sentence, capsys):
    assert command.main(arguments) == 2
    out, error = capsys.readouterr()
    assert sentence in error and error.count("\n") == 1 and not out


def test_an_option_that_is_no_number(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--recipe", "llava/tiny", "--gpus", "many"])
    assert stopped.value.code == 2 and "--gpus" in capsys.readouterr().err
