"""The Q-Former: who sees whom in each of the three objectives, what is copied, what it takes from BERT."""

import pytest
import torch
from oracles import hf_bert, ours
from tools import bite, close, pad_mask, randn, random_ids

from nanovlm import masks
from nanovlm.attention import KVCache
from nanovlm.bert import BertConfig
from nanovlm.qformer import QFormer, QFormerConfig

B, Q, T, N = 4, 5, 7, 9
CONFIG = QFormerConfig(BertConfig(vocab=53, width=24, layers=3, heads=3, ffn=34, max_positions=23, dropout=0.0), Q, 22)
LENGTHS = [7, 3, 1, 5]


@pytest.fixture
def qformer() -> QFormer:
    return bite(QFormer(CONFIG), 1)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(B, N, 22, seed=2), random_ids(B, T, 3), pad_mask(LENGTHS, "right", T)


# --- masks, as literal matrices (two queries, three words of which the last is padding) ---

@pytest.mark.parametrize(("make", "want"), [
    (masks.bidirectional, ["11110"] * 5),
    (masks.multimodal_causal, ["11000", "11000", "11100", "11110", "11110"]),
    (masks.unimodal, ["11000", "11000", "00110", "00110", "00110"]),
])
def test_the_three_masks(make, want):
    got = make(2, torch.tensor([[True, True, False]])).expand(1, 5, 5)
    assert [[str(int(cell)) for cell in row] for row in got[0]] == [list(row) for row in want]


# --- who sees whom, by perturbation ---

def states(qformer, image_tokens, ids, mask):
    with torch.no_grad():
        return qformer(image_tokens, ids, mask)


def touched(qformer, inputs, make_mask, change) -> torch.Tensor:
    """Which of Q + T rows move when `change` alters the inputs → bool (Q + T,), for the first pair, which has no padding."""
    image_tokens, ids, mask = inputs
    before = states(qformer, image_tokens, ids, make_mask(Q, mask))
    after = states(qformer, *change(image_tokens.clone(), ids.clone()), make_mask(Q, mask))
    return (after - before)[0].abs().amax(dim=-1) > 0


def other_picture(image_tokens, ids):
    image_tokens[0] += randn(N, 22, seed=9)
    return image_tokens, ids


def other_word(image_tokens, ids):
    ids[0, 4] = 4 + (ids[0, 4] - 3) % 40
    return image_tokens, ids


@pytest.mark.parametrize(("mask", "change", "want"), [
    (masks.bidirectional, other_word, "11111 1111111"),
    (masks.multimodal_causal, other_word, "00000 0000111"),
    (masks.unimodal, other_word, "00000 1111111"),
    (masks.bidirectional, other_picture, "11111 1111111"),
    (masks.multimodal_causal, other_picture, "11111 1111111"),
    (masks.unimodal, other_picture, "11111 0000000"),
])
def test_who_notices_what(qformer, inputs, mask, change, want):
    assert touched(qformer, inputs, mask, change).tolist() == [c == "1" for c in want.replace(" ", "")]


def test_padding_does_not_matter(qformer, inputs):
    image_tokens, ids, mask = inputs
    noise = ids.masked_fill(~mask, 17)
    for make in (masks.bidirectional, masks.multimodal_causal, masks.unimodal):
        real = masks.with_queries(Q, mask)
        one, other = (states(qformer, image_tokens, x, make(Q, mask)) for x in (ids, noise))
        assert torch.equal(one[real], other[real])


# --- one pass under a mask = two passes ---

def test_contrast_in_one_pass_equals_two(qformer, inputs):
    image_tokens, ids, mask = inputs
    with torch.no_grad():
        together = qformer(image_tokens, ids, masks.unimodal(Q, mask))
        close(together[:, :Q], qformer(image_tokens))
        close(together[:, Q:][mask], qformer(input_ids=ids, mask=masks.padding(mask))[mask])


def test_text_over_cached_queries_equals_one_pass(qformer, inputs):
    """ITG: the queries' keys and values serve the text, and carry its gradient back to the queries."""
    image_tokens, ids, mask = inputs
    allowed, cache = masks.multimodal_causal(Q, mask), KVCache()
    whole = qformer(image_tokens, ids, allowed)
    queries = qformer(image_tokens, cache=cache)
    text = qformer(input_ids=ids, mask=allowed[:, Q:], cache=cache)
    close(queries, whole[:, :Q])
    close(text[mask], whole[:, Q:][mask])
    weights = randn(*text.shape, seed=4) * mask[:, :, None]
    one = torch.autograd.grad((whole[:, Q:] * weights).sum(), [qformer.queries, qformer.layers[0].cross_attention.key.weight])
    two = torch.autograd.grad((text * weights).sum(), [qformer.queries, qformer.layers[0].cross_attention.key.weight])
    for a, b in zip(one, two, strict=True):
        assert a.abs().max() > 0.01
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


# --- structure ---

def test_queries_are_a_set(qformer, inputs):
    """They have no positions: in another order they bring back the same, in that order."""
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = qformer(inputs[0])
        qformer.queries.copy_(qformer.queries[order].clone())
        close(qformer(inputs[0]), before[:, order])


def test_every_second_layer_looks_at_the_picture(qformer, inputs):
    maps, looks = [], []
    qformer(*inputs[:2], maps=maps, looks=looks)
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True]
    assert [m.shape for m in looks] == [(B, 3, Q, N)] * 2 and [m.shape for m in maps] == [(B, 3, Q + T, Q + T)] * 3


def test_query_feedforwards_start_as_copies():
    for layer in QFormer(CONFIG).layers:
        for mine, theirs in ((layer.query_feedforward, layer.feedforward), (layer.query_residual, layer.residual2)):
            for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
                assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name


def test_pruned_is_the_same_without_text(inputs):
    full = bite(QFormer(CONFIG), 5)
    pruned = QFormer(QFormerConfig(CONFIG.text, Q, 22, reads=False))
    mine = pruned.state_dict()
    pruned.load_state_dict({name: full.state_dict()[name] for name in mine})
    assert not any("embeddings" in name or ".feedforward" in name or "residual2" in name for name in mine)
    with torch.no_grad():
        assert torch.equal(pruned.eval()(inputs[0]), full(inputs[0]))


def test_from_bert():
    """As a text encoder it then is that BERT (with its first segment's embedding left out); queries and text share it."""
    hf = hf_bert(6)
    hf.bert.embeddings.token_type_embeddings.weight.data.zero_()
    qformer = QFormer(QFormerConfig(BertConfig(54, 30, 3, 5, 44, max_positions=23), Q, 22)).eval()
    last = qformer.embeddings.words.weight[53].clone()
    qformer.take_bert(ours(hf).bert)
    ids, mask = random_ids(B, T, 6), pad_mask(LENGTHS, "right", T)
    with torch.no_grad():
        want = hf.bert(ids, attention_mask=mask.long()).last_hidden_state
        close(qformer(input_ids=ids, mask=masks.padding(mask))[mask], want[mask])
    assert torch.equal(qformer.embeddings.words.weight[53], last), "[DEC] is no word of BERT's"
    for layer in qformer.layers:
        assert torch.equal(layer.query_feedforward.up.weight, layer.feedforward.up.weight)
        assert torch.equal(layer.query_residual.norm.bias, layer.residual2.norm.bias)
