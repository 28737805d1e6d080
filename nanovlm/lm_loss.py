"""The language-modelling loss: how surprised is the model by each next token?

    L = − Σ_t log p(x_{t+1} | x_≤t)         summed over the positions whose next token is to be learned

    hidden (B, T, D) ─► drop what nobody learns from ─► chunks of tokens ─► head ─► cross-entropy ─► (sum, count)

It returns a sum and a count, not a mean: the training loop adds micro-batches and ranks up before it divides, so that
every trained token weighs the same. The shift by one happens here and nowhere else.

Full-size vocabularies make the logits the largest tensor of the run (32 × 2048 × 32000 fp32 = 8 GB). So only trained
positions go through the head, a chunk at a time, and a chunk's logits are computed again in the backward pass.

Legend: B batch, T tokens, D width, V vocabulary, K trained tokens.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label of −100 is not learned


@dataclass
class Output:
    """What a paper's forward gives: logits (B, T, V), and loss, the mean over trained tokens, where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


def mean_loss(losses: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Σ of the named losses, each divided by its own count (at least 1: a batch may have nothing to learn)."""
    return sum(total / count.clamp(min=1) for total, count in losses.values())


def lm_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor, chunk: int = 8192, head_bias: Tensor | None = None,
            smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token → (sum over trained tokens, their number), both scalars.

    hidden: (B, T, D), the decoder's last states. head_weight: (V, D). labels: int64 (B, T), the token that stands at each
    position (not the next one), −100 where nothing is learned. chunk: tokens whose logits are held at once. head_bias:
    (V,), BERT's head has one. smoothing: the share of the target that is spread over all V tokens (BLIP, BLIP-2: 0.1).
    The sum is fp32. Where nothing is learned it is a zero that still has a gradient, and the number is 0.
    """
    learned = labels[:, 1:] != IGNORE  # (B, T - 1): position t learns to say token t + 1
    states = hidden[:, :-1][learned]  # (K, D)
    targets = labels[:, 1:][learned]  # (K,)
    total = states.sum() * 0.0  # nothing to learn here: a zero that is still connected to the graph, never 0/0
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        inputs = (states[part], head_weight, targets[part], head_bias, smoothing)
        if len(targets) <= chunk:
            total = total + chunk_loss(*inputs)
        else:
            total = total + checkpoint(chunk_loss, *inputs, use_reentrant=False)
    return total, learned.sum()


def chunk_loss(states: Tensor, head_weight: Tensor, targets: Tensor, head_bias: Tensor | None,
               smoothing: float) -> Tensor:
    """Σ cross-entropy of some tokens, in fp32: states (K, D), targets (K,) → a scalar."""
    logits = F.linear(states, head_weight, head_bias)  # (K, V)
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
