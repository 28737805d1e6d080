"""Random states: set anew for every stage, kept in checkpoints, put back after a look at the model between two steps."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_all(*parts: object) -> None:
    """Every stage starts from random states of its own: whether the ones before were cached does not matter."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")
    torch.manual_seed(seed)


def random_states() -> dict:
    """Torch's generators, the only ones that training draws from: data have generators of their own."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Look at the model between two steps (a sample, a check) without changing what the next step will do."""
    states, modes = random_states(), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_states(states)
