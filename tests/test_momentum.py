"""Momentum contrast against slow loops: the copies, the queue, the soft targets."""

import copy
import math

import pytest
import torch
from tools import close, randn
from torch import Tensor, nn
from torch.nn import functional as F

from nanovlm.contract import alone
from nanovlm.errors import UserError
from nanovlm.momentum import Momentum, MomentumConfig

B, Q, E = 4, 7, 5
TAU = torch.tensor(0.3)


def encoders(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"eye": nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, E)), "ear": nn.Embedding(11, E)}


def fresh(queue: int = Q, momentum: float = 0.9, alpha: float = 0.4, ramp: int = 0) -> Momentum:
    torch.manual_seed(1)
    return Momentum(MomentumConfig(queue, momentum, alpha, ramp), encoders(), E)


def units(rows: int, seed: int, width: int = E) -> Tensor:
    return F.normalize(randn(rows, width, seed=seed), dim=-1)


def both(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of images and of texts."""
    return units(rows, seed), units(rows, seed + 100)


def groups_of(images: list[int], texts: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(images), torch.tensor(texts)


# --- the slow copies ---

def test_the_copies_are_no_parameters_and_in_every_checkpoint():
    slow = fresh()
    assert not list(slow.parameters()) and not any(buffer.requires_grad for buffer in slow.buffers())
    kept = slow.state_dict()
    assert {f"copies.{name}.{key}" for name, encoder in encoders().items() for key in encoder.state_dict()} < set(kept)
    assert {"images", "texts", "images_group", "texts_group", "place", "steps"} < set(kept)
    other = fresh(momentum=0.5)
    slow.follow(encoders(3))
    slow.enqueue(both(B, 1), groups_of([0, 1, 2, 3], [0, 1, 2, 3]), alone)
    other.load_state_dict(slow.state_dict())
    assert other.steps == 1 and other.place == B and torch.equal(other.images, slow.images)


def test_the_first_step_copies_and_the_others_move_a_little():
    """θ_m ← m θ_m + (1 − m) θ, parameter by parameter, by hand."""
    slow, now = fresh(momentum=0.9), encoders(3)
    slow.follow(now)
    for name, encoder in now.items():
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(slow.copies[name].state_dict()[key], tensor), "to the bit"
    want = {name: copy.deepcopy(encoder.state_dict()) for name, encoder in now.items()}
    for step in range(3):
        now = encoders(4 + step)
        before = {name: copy.deepcopy(encoder.state_dict()) for name, encoder in now.items()}
        slow.follow(now)
        for name, encoder in now.items():
            for key, tensor in encoder.state_dict().items():
                want[name][key] = 0.9 * want[name][key] + 0.1 * tensor
                close(slow.copies[name].state_dict()[key], want[name][key], 1e-6)
                assert torch.equal(tensor, before[name][key]), "who is followed does not move"
    assert slow.steps == 4


def test_a_copy_is_not_the_encoder_itself():
    now = encoders()
    slow = Momentum(MomentumConfig(Q, 0.9), now, E)
    kept = copy.deepcopy(slow.copies.state_dict())
    assert [name for e in now.values() for name, _ in e.named_parameters()] == [name for e in encoders().values() for name, _ in e.named_parameters()]
    with torch.no_grad():
        for encoder in now.values():
            for parameter in encoder.parameters():
                parameter.add_(1.0)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in slow.copies.state_dict().items())


# --- the queue ---

def test_the_queue_begins_with_random_unit_vectors_that_are_nobodys():
    slow = fresh(queue=500)
    for name in ("images", "texts"):
        bank = getattr(slow, name)
        close(bank.norm(dim=1), torch.ones(500))
        assert bank.mean(dim=0).abs().max() < 0.1 and (getattr(slow, f"{name}_group") == -1).all()


def test_the_oldest_make_room_whatever_the_batch():
    """Batches that do not divide the queue, against a list; place by place, and where the next one will be written."""
    slow = fresh()
    slots, place = [None] * Q, 0
    for step, size in enumerate((3, 2, 4, 3, Q, 1)):
        keys, groups = both(size, 10 * step), groups_of([100 * step + i for i in range(size)], [1000 * step + i for i in range(size)])
        slow.enqueue(keys, groups, alone)
        for i in range(size):
            slots[place] = (keys[0][i], keys[1][i], 100 * step + i, 1000 * step + i)
            place = (place + 1) % Q
        assert slow.place == place
        for i, slot in enumerate(slots):
            if slot is not None:
                assert torch.equal(slow.images[i], slot[0]) and torch.equal(slow.texts[i], slot[1])
                assert (slow.images_group[i], slow.texts_group[i]) == slot[2:]


def test_a_queue_smaller_than_the_batch_is_refused():
    fresh().need_room(Q)
    with pytest.raises(UserError, match=rf"^The queue holds {Q} keys, but the batch has {Q + 1} pairs: make `queue`.* at least {Q + 1}"):
        fresh().need_room(Q + 1)


# --- the loss ---

def loop(slow: Momentum, queries: tuple, keys: tuple, groups: tuple, alpha: float) -> Tensor:
    """Eq. 6, pair by pair and key by key."""
    images, texts = [*keys[0], *slow.images], [*keys[1], *slow.texts]
    image_groups, text_groups = [*groups[0].tolist(), *slow.images_group.tolist()], [*groups[1].tolist(), *slow.texts_group.tolist()]
    total = torch.tensor(0.0)
    for b in range(len(queries[0])):
        right = [image_groups[b] == i or text_groups[b] == t for i, t in zip(image_groups, text_groups, strict=True)]
        for query, key, bank in ((queries[0][b], keys[0][b], texts), (queries[1][b], keys[1][b], images)):
            log_p = torch.stack([(query * other).sum() / TAU for other in bank]).log_softmax(dim=0)
            soft = torch.stack([(key * other).sum() / TAU for other in bank]).softmax(dim=0)
            for j in range(len(bank)):
                target = alpha * soft[j] + (1 - alpha) * right[j] / sum(right)
                total = total - target * log_p[j] / 2
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_soft_targets_are_a_loop(alpha):
    """Pairs 1 and 3 share a text, pair 0's picture and pair 2's text stand in the queue: all of them are right."""
    slow = fresh(alpha=alpha)
    slow.follow(encoders())
    slow.enqueue(both(3, 50), groups_of([10, 77, 78], [77, 12, 78]), alone)
    queries, keys, groups = both(B, 1), both(B, 2), groups_of([10, 11, 12, 13], [10, 11, 12, 11])
    (total, count), (i2t, t2i) = slow.contrast(queries, keys, groups, TAU, alone)
    close(total, loop(slow, queries, keys, groups, alpha))
    assert count == B
    close(i2t, queries[0] @ keys[1].T / TAU)
    close(t2i, queries[1] @ keys[0].T / TAU)


def test_equals_share_the_target_wherever_they_stand():
    """One text twice in the batch and once in the queue, and nothing else but noise: the best that can be said is a third each."""
    slow = fresh(queue=3, alpha=0.0)
    slow.images.copy_(torch.eye(5)[2:5])
    slow.texts.copy_(torch.eye(5)[2:5])
    slow.texts_group[1] = 8
    keys, groups = (torch.eye(5)[:2], torch.eye(5)[:2]), groups_of([0, 1], [8, 8])
    query = F.normalize(torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]]), dim=1).expand(2, -1)  # alike to the three that are right
    tau = torch.tensor(0.01)
    (total, _), _ = slow.contrast((query, query), keys, groups, tau, alone)
    assert (total / 2).item() == pytest.approx(math.log(3), abs=1e-4)


@pytest.mark.parametrize(("ramp", "steps", "alpha"), [(10, 1, 0.04), (10, 5, 0.2), (10, 10, 0.4), (10, 25, 0.4), (0, 1, 0.4)])
def test_the_slow_copys_opinion_counts_more_and_more(ramp, steps, alpha):
    slow = fresh(ramp=ramp)
    for _ in range(steps):
        slow.follow(encoders())
    queries, keys, groups = both(B, 3), both(B, 4), groups_of([0, 1, 2, 3], [0, 1, 2, 3])
    (total, _), _ = slow.contrast(queries, keys, groups, TAU, alone)
    close(total, loop(slow, queries, keys, groups, alpha))


def test_only_queries_and_temperature_learn():
    slow = fresh()
    slow.follow(encoders())
    queries, keys = ([vector.requires_grad_() for vector in both(B, seed)] for seed in (5, 6))
    tau = TAU.clone().requires_grad_()
    (total, _), _ = slow.contrast(queries, [key.detach() for key in keys], groups_of([0, 1, 2, 3], [0, 1, 2, 3]), tau, alone)
    total.backward()
    assert all(query.grad.any() for query in queries) and tau.grad.any()
    # the slow copy's opinion is a target: if a gradient went through it, τ's would be another
    want = TAU.clone().requires_grad_()
    fixed = [(keys[i].detach() @ torch.cat([keys[1 - i].detach(), bank]).T / TAU).softmax(dim=1) for i, bank in ((0, slow.texts), (1, slow.images))]
    hard = F.pad(torch.eye(B), (0, Q))
    logits = [queries[i].detach() @ torch.cat([keys[1 - i].detach(), bank]).T / want for i, bank in ((0, slow.texts), (1, slow.images))]
    sum(F.cross_entropy(rows, 0.4 * soft + 0.6 * hard, reduction="sum") / 2 for rows, soft in zip(logits, fixed, strict=True)).backward()
    close(tau.grad, want.grad, 1e-4)


@pytest.mark.parametrize(("width", "extra"), [(256, 0.40), (64, 1.59)])
def test_random_vectors_cost_what_they_should(width, extra):
    """ln(B + Q) + 1 / (2 E τ²), which is +0.40 at a width of 256 and +1.59 at 64. 1,024 rows of a standard deviation of 1 / (√E τ)
    have a mean within 0.06; 0.25 is four times that.
    """
    rows, queue = 512, 1535
    slow = Momentum(MomentumConfig(queue, alpha=0.0), encoders(), width)
    vectors = [units(rows, seed, width) for seed in range(4)]
    number = torch.arange(rows)
    (total, count), _ = slow.contrast(vectors[:2], vectors[2:], (number, number), torch.tensor(0.07), alone)
    assert round(1 / (2 * width * 0.07 ** 2), 2) == extra
    assert (total / count).item() == pytest.approx(math.log(rows + queue) + extra, abs=0.25)


def test_keys_in_bf16_go_into_the_queue():
    """As autocast makes them."""
    momentum = fresh()
    key = torch.ones(1, momentum.images.shape[1], dtype=torch.bfloat16)
    momentum.enqueue((key, key), (torch.tensor([5]), torch.tensor([6])), lambda rows: rows)
    assert momentum.images.dtype == torch.float32 and torch.equal(momentum.images[0], key[0].float())
