"""Vital signs: the bugs that let the loss fall all the same.

    at the first step     loss beside that of a blind guess     ln V for "lm", "mlm", "itg", ln of the candidates for "itc",
                                                                H(1/3) for "itm", ln 2 for "truth"
    at steps 1 to 3       a part that should learn has no gradient
    at half time, end     the loss with the pictures exchanged = the loss with the right ones: the model ignores them
                          itm still costs what a blind guess costs
    at the end            a tanh gate is still shut             its value
                          a frozen part changed                 sha256 of every part, before and after
    always                a loss that is no number stops the run (loop.py)

A far too high first loss means a wrong initialisation; far too low, that the answer leaks into the input.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from nanovlm.training import distributed
from nanovlm.training.randomness import undisturbed
from nanovlm.training.sharding import is_sharded, own_rows, whole

PRIOR = math.log(3) - 2 / 3 * math.log(2)  # H(1/3) = 0.6365: one pair that belongs to two that do not
SHUT = 1e-4  # a tanh gate below this has not opened: Adam moves it by about the learning rate a step
SAME = 0.002  # relative difference of two losses below which they count as equal


def guess(name: str, batch: dict, vocab: int, world: int) -> float | None:
    """The loss of a model that knows nothing, as it should be at a random initialisation; None where we cannot say."""
    name = name.split("/")[0]  # "lm/pages"
    if name in ("lm", "mlm", "itg"):
        return math.log(vocab)
    if name == "itm":
        return PRIOR
    if name == "truth":
        return math.log(2)
    if name == "itc":
        pairs = len(batch["images"]) * world
        own = batch["negative_ids"].shape[1] if "negative_ids" in batch else 0
        return (math.log(pairs) + math.log(pairs + own)) / 2  # text → images, and image → texts and its hard negatives
    return None


def without_gradient(model: nn.Module) -> set[str]:
    """Names of trained parameters whose gradient is missing or exactly zero."""
    return {name for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.any())}


def gradient_warning(names: set[str], trained: int) -> str | None:
    if not names:
        return None
    few = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)} of {trained} parameters that should learn have no gradient: {few}"


def can_exchange(batch: dict) -> bool:
    """Whether the batch has two images; pages of text alone have none."""
    images, sizes = batch.get("images"), batch.get("image_sizes")
    return images is not None and len(images if sizes is None else sizes) > 1 and ("frames" not in batch or bool(batch["frames"].any()))


def image_use(model: nn.Module, batch: dict) -> tuple[float, float]:
    """The loss with the right images and with every image in its neighbour's place; all ranks ask together."""
    images, sizes = batch["images"], batch.get("image_sizes")
    exchanged = batch | {name: torch.roll(batch[name], 1, dims=0) for name in ("images", "frames") if name in batch}
    if sizes is not None:  # views stay with their picture
        own = images.split([model.reads.tiling.views(tuple(size)) for size in sizes.tolist()])
        exchanged |= {"images": torch.cat([own[-1], *own[:-1]]), "image_sizes": torch.roll(sizes, 1, dims=0)}
    with undisturbed(model):
        return tuple(_total(model.losses(which, distributed.all_gather)) for which in (batch, exchanged))


def _total(losses: dict[str, tuple[Tensor, Tensor]]) -> float:
    return sum((total / count.clamp(min=1)).item() for total, count in losses.values())


def image_warning(right: float, exchanged: float) -> str | None:
    if abs(exchanged - right) > SAME * abs(right):
        return None
    return (f"the loss with exchanged images ({exchanged:.4f}) equals that with the right ones ({right:.4f}): "
            "the model ignores them")


def prior_warning(losses: dict[str, float]) -> str | None:
    """Matching that has not begun to tell pairs apart still has a loss that looks fine."""
    itm = losses.get("itm")
    if itm is None or abs(itm - PRIOR) > 0.01:
        return None
    return f"itm is {itm:.4f}, where a blind guess has {PRIOR:.4f}: it does not tell which text belongs to which picture"


def gate_warning(model: nn.Module) -> str | None:
    """A tanh gate starts at 0: where it stays there, what it lets through was never used, whatever the loss did."""
    shut = [name for name, p in model.named_parameters()
            if p.requires_grad and name.endswith("_gate") and whole(p.detach()).abs().max() < SHUT]
    return f"these gates are still shut (below {SHUT}): {', '.join(shut)}" if shut else None


def fingerprints(model: nn.Module) -> dict[str, str]:
    """sha256 of every top-level part of the model, parameters and buffers, by name. Of a model that is shared out each rank takes its own
    rows, so that the same weights on another number of ranks have others.
    """
    hashes = {}
    for name, tensor in model.state_dict().items():
        part = hashes.setdefault(name.split(".")[0], hashlib.sha256())
        part.update(name.encode())
        part.update(own_rows(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())
    found = {part: digest.hexdigest() for part, digest in hashes.items()}
    if not is_sharded(model):
        return found
    every = distributed.from_all(found)
    return {part: hashlib.sha256("".join(each[part] for each in every).encode()).hexdigest() for part in found}


def compare(before: dict[str, str], after: dict[str, str], trains: tuple[str, ...]) -> tuple[dict, dict, list[str]]:
    """→ frozen {part: [before, after]}, trained {part: [before, after]}, warnings."""
    frozen, trained, warnings = {}, {}, []
    learning = {name.split(".")[0] for name in trains}
    for part, old in before.items():
        (trained if part in learning else frozen)[part] = [old, after[part]]
        if part in learning and old == after[part]:
            warnings.append(f"{part} should learn but did not change")
        if part not in learning and old != after[part]:
            warnings.append(f"{part} is frozen but changed")
    return frozen, trained, warnings
