"""Feed-forward networks and norms against their formulas and transformers; masks against loops."""

import pytest
import torch
from tools import bite, close, randn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nanovlm import masks
from nanovlm.attention import Attention
from nanovlm.feedforward import ACTIVATIONS, FeedForward, RMSNorm

B, T, D, F = 2, 5, 6, 11
THEIRS = {"relu": "relu", "gelu": "gelu", "quick_gelu": "quick_gelu", "swiglu": "silu", "geglu": "gelu",
          "squared_relu": "relu2", "geglu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_feedforward_is_its_formula(name, bias):
    layer = bite(FeedForward(D, F, name, bias), 1, 0.6)
    w = dict(layer.named_parameters())
    assert ("up.bias" in w) == bias
    assert ("gate.weight" in w) == (name in ("swiglu", "geglu", "geglu_tanh"))

    def linear(part, x):
        y = torch.einsum("btd,fd->btf", x, w[f"{part}.weight"])
        return y + w[f"{part}.bias"] if bias else y

    x, act = randn(B, T, D), ACT2FN[THEIRS[name]]
    hidden = act(linear("gate", x)) * linear("up", x) if "gate.weight" in w else act(linear("up", x))
    close(layer(x), linear("down", hidden))


def test_activations_differ_where_they_could_be_confused():
    """The parity tests could not tell them apart on a line where they agree."""
    x = torch.linspace(-4, 4, 41)
    functions = [ACTIVATIONS[name][0](x) for name in ("relu", "gelu", "quick_gelu", "swiglu", "geglu_tanh")]
    for i, a in enumerate(functions):
        for b in functions[:i]:
            assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(dtype):
    """Statistics in fp32, then the cast, then the weight: in bf16 to the bit, and another order gives other bits."""
    mine, theirs = RMSNorm(D, eps=1e-3), LlamaRMSNorm(D, eps=1e-3)
    for norm in (mine, theirs):
        bite(norm.to(dtype), 2)
    x = (3 * randn(64, T, D)).to(dtype)
    close(mine(x), theirs(x), 1e-6 if dtype == torch.float32 else 0)


def test_rms_norm_in_double_precision():
    """What is asked for in fp64, for a gradient check, is not rounded to fp32 half way."""
    torch.autograd.gradcheck(bite(RMSNorm(D).double(), 3), randn(2, D).double().requires_grad_())


# --- masks ---

def test_causal_is_a_loop():
    for rows, columns in ((4, 4), (3, 7), (1, 5)):
        mask = masks.causal(rows, columns)
        assert mask.shape == (1, rows, columns)
        for t in range(rows):
            for s in range(columns):
                assert mask[0, t, s] == (s <= columns - rows + t)  # the rows are the last ones
    assert torch.equal(masks.causal(4), masks.causal(4, 4))


ATTENTION_MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_causal_with_padding_is_a_loop():
    for rows in (5, 2):
        mask = masks.causal_with_padding(ATTENTION_MASK, rows)
        for b in range(4):
            for t in range(rows):
                for s in range(5):
                    assert mask[b, t, s] == (s <= 5 - rows + t and ATTENTION_MASK[b, s])
        bias = masks.causal_bias(ATTENTION_MASK, rows, torch.bfloat16)
        assert bias.shape == (4, 1, rows, 5)
        assert bias.dtype == torch.bfloat16
        itself = torch.eye(5, dtype=torch.bool)[5 - rows:]  # padding sees itself and what the others see
        assert torch.equal(bias[:, 0], torch.where(mask | itself, 0, float("-inf")).bfloat16())
    padding = masks.padding(ATTENTION_MASK)
    assert padding.shape == (4, 1, 5)
    assert torch.equal(padding.expand(4, 3, 5)[:, 2], ATTENTION_MASK)


def test_positions_count_real_tokens():
    want = [[0, 1, 2, 2, 2], [0, 0, 1, 2, 3], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert masks.positions(ATTENTION_MASK).tolist() == want
    assert masks.positions(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]] * 2  # never −1


def test_a_causal_token_does_not_see_what_comes():
    """Through the attention itself, to the bit: nothing of a later token or of padding leaks."""
    layer = bite(Attention(12, 3), 3, 0.4)
    x, t = randn(4, 5, 12), 2
    mask = masks.causal_with_padding(ATTENTION_MASK, 5)
    before = layer(x, mask=mask)
    changed = x.clone()
    changed[:, t + 1:] += 1
    changed[~ATTENTION_MASK] += 1
    after = layer(changed, mask=mask)
    real = ATTENTION_MASK[:, : t + 1]
    assert torch.equal(after[:, : t + 1][real], before[:, : t + 1][real])
    seen = x.clone()
    seen[:, 1] += 1
    moved = (layer(seen, mask=mask) - before).abs().amax(dim=-1) > 1e-4
    assert moved[:, 1:][ATTENTION_MASK[:, 1:] & ATTENTION_MASK[:, 1:2]].all()  # whoever may see token 1 does
