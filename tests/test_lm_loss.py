"""The language-modelling loss against plain cross-entropy over all logits: sum, count, gradients, whatever the chunk."""

import pytest
import torch
from tools import close, randn, random_ids
from torch.nn import functional as F

from nanovlm import lm_loss as module
from nanovlm.lm_loss import IGNORE, lm_loss

B, T, D, V = 3, 7, 5, 11


def naive(hidden, weight, labels):
    """Position t says token t + 1."""
    logits = torch.einsum("btd,vd->btv", hidden, weight)
    total, count = 0.0, 0
    for b in range(B):
        for t in range(T - 1):
            if labels[b, t + 1] != -100:
                total = total - logits[b, t].log_softmax(-1)[labels[b, t + 1]]
                count += 1
    return total, count


def example(seed: int = 0):
    hidden, weight = randn(B, T, D, seed=seed).requires_grad_(), randn(V, D, seed=seed + 1).requires_grad_()
    labels = random_ids(B, T, seed, low=0, high=V)
    labels[0, :4] = IGNORE
    labels[2] = IGNORE  # a row with nothing to learn
    labels[2, 0] = 3  # the first token is nobody's next token
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 1000])
def test_sum_count_and_gradients(chunk):
    hidden, weight, labels = example()
    total, count = lm_loss(hidden, weight, labels, chunk)
    want, number = naive(hidden, weight, labels)
    assert count.item() == number == 9
    close(total, want)
    close(total / count, F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    for got, wanted in zip(torch.autograd.grad(total, [hidden, weight]), torch.autograd.grad(want, [hidden, weight]),
                           strict=True):
        close(got, wanted)


@pytest.mark.parametrize("labels", [torch.full((B, T), IGNORE), torch.full((B, 1), 2)])
def test_nothing_to_learn_is_zero_not_nan(labels):
    """And it stays in the graph: under DDP a rank without answers must still have gradients, zero ones."""
    hidden, weight, _ = example()
    hidden = hidden[:, :labels.shape[1]]
    total, count = lm_loss(hidden, weight, labels)
    assert (total.item(), count.item()) == (0.0, 0)
    (gradient,) = torch.autograd.grad(total, [hidden])
    assert not gradient.any()


def test_no_more_than_a_chunk_of_logits_at_once(monkeypatch):
    sizes = []
    original = module.chunk_loss

    def watched(states, *rest):
        sizes.append(len(states))
        return original(states, *rest)

    monkeypatch.setattr(module, "chunk_loss", watched)
    hidden, weight, labels = example()
    lm_loss(hidden, weight, labels, chunk=4)[0].backward()
    assert sorted(sizes) == [1, 1, 4, 4, 4, 4]  # forward, and again going backward


def test_bf16_states_are_summed_in_fp32():
    hidden, weight, labels = example()
    total, _ = lm_loss(hidden.bfloat16(), weight.bfloat16(), labels)
    assert total.dtype == torch.float32
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    close(total, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
