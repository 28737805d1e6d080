"""BERT against transformers: states, words, gradients; with cross-attention and a cache, as BLIP's text decoder has it."""

import pytest
import torch
import transformers
from oracles import BERT, hf_bert, ours
from tools import bite, close, moved_by_breaking, pad_mask, randn, random_ids

from nanovlm import masks
from nanovlm.attention import KVCache
from nanovlm.bert import Bert, BertConfig
from nanovlm.errors import UserError
from nanovlm.hub.names import BERT as BERT_NAMES
from nanovlm.hub.names import translate

B, T, N, IMAGE_WIDTH = 4, 9, 6, 22
LENGTHS = [9, 5, 1, 7]


def test_words_states_and_gradients():
    hf = hf_bert(1)
    model = ours(hf)
    ids, mask = random_ids(B, T, 1), pad_mask(LENGTHS, "right", T)
    want = hf(ids, attention_mask=mask.long(), output_hidden_states=True)
    got = model(ids, mask).logits
    assert want.logits[mask].std() > 0.1
    close(got[mask], want.logits[mask])
    close(model.bert(ids, masks.padding(mask))[mask], want.hidden_states[-1][mask])
    close(model(ids).logits, hf(ids).logits)
    weights = randn(*got.shape, seed=2) * mask[:, :, None]
    (got * weights).sum().backward()
    (want.logits * weights).sum().backward()
    theirs = transformers.BertForMaskedLM(hf.config)
    theirs.load_state_dict({name: p.grad for name, p in hf.named_parameters()}, strict=False)
    for (name, p), (same, gradient) in zip(model.named_parameters(), ours(theirs).named_parameters(), strict=True):
        assert name == same and p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, gradient.data, rtol=1e-4, atol=1e-4)


def test_attention_maps():
    hf = hf_bert(2)
    hf.set_attn_implementation("eager")
    ids, maps = random_ids(B, T, 2), []
    with torch.no_grad():
        ours(hf).bert(ids, maps=maps)
        want = hf(ids, output_attentions=True).attentions
    for got, theirs in zip(maps, want, strict=True):
        close(got, theirs)


def test_the_weights_of_the_parity_test_bite():
    moved = moved_by_breaking(ours(hf_bert(1)), lambda m: m(random_ids(B, T, 1)).logits)
    idle = [name for name, far in moved.items() if far < 1e-3]
    assert not idle, moved


def test_a_bert_alone_and_one_with_a_pooler():
    hf = hf_bert(3)
    ids = random_ids(B, T, 3)
    with torch.no_grad():
        want = hf.bert(ids).last_hidden_state
        for with_pooler in (True, False):
            alone = transformers.BertModel(hf.config, add_pooling_layer=with_pooler)
            alone.load_state_dict(hf.bert.state_dict(), strict=False)
            model = ours(alone)
            assert type(model) is Bert
            close(model.eval()(ids), want)


# --- as a decoder that sees a picture: transformers' BERT with cross-attention ---

CROSS = {"crossattention.self.query": "cross_attention.query", "crossattention.self.key": "cross_attention.key",
         "crossattention.self.value": "cross_attention.value", "crossattention.output.dense": "cross_attention.out",
         "crossattention.output.LayerNorm": "cross_residual.norm"}


def decoder_pair(seed: int) -> tuple[torch.nn.Module, Bert]:
    """Theirs cross-attends to tokens of its own width only, so the picture's are as wide as the text here."""
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    hf = bite(transformers.BertModel(config, add_pooling_layer=False), seed)
    names = {**BERT_NAMES, **{f"encoder.layer.{{i}}.{k}": f"layers.{{i}}.{v}" for k, v in CROSS.items()}}
    model = Bert(BertConfig(53, 30, 3, 5, 44, max_positions=23, segments=2, image_width=30, dropout=0.0))
    model.load_state_dict({translate(name, names): tensor for name, tensor in hf.state_dict().items()})
    return hf, model.eval()


def test_cross_attention_and_causality():
    hf, model = decoder_pair(4)
    ids, mask, image_tokens = random_ids(B, T, 4), pad_mask(LENGTHS, "right", T), randn(B, N, 30, seed=5)
    with torch.no_grad():
        want = hf(ids, attention_mask=mask.long(), encoder_hidden_states=image_tokens).last_hidden_state
        close(model(ids, masks.causal_with_padding(mask, T), image_tokens)[mask], want[mask])
        without = model(ids, masks.causal_with_padding(mask, T))
    assert (without - want)[mask].abs().max() > 0.1, "without a picture the cross-attention is skipped"


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9])
def test_cached_equals_whole(chunks):
    model = bite(Bert(BertConfig(53, 30, 3, 5, 44, max_positions=23, image_width=IMAGE_WIDTH)), 6)
    ids, image_tokens = random_ids(B, T, 6), randn(B, N, IMAGE_WIDTH, seed=6)
    with torch.no_grad():
        whole, cache, parts, first = model(ids, masks.causal(T), image_tokens), KVCache(), [], 0
        for length in chunks:
            rows = masks.causal(length, first + length)
            parts.append(model(ids[:, first:first + length], rows, image_tokens, cache=cache, first=first))
            first += length
    close(torch.cat(parts, dim=1), whole)


def test_dropout_acts_in_training_only():
    model = Bert(BertConfig(53, 30, 2, 5, 44, dropout=0.5))
    ids = random_ids(B, T, 7)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_a_text_longer_than_the_positions_is_refused():
    model = Bert(BertConfig(53, 30, 3, 5, 44, max_positions=23))
    model(torch.zeros(1, 23, dtype=torch.int64))
    with pytest.raises(UserError, match="24 tokens does not fit into the 23 positions.*max_length"):
        model(torch.zeros(1, 24, dtype=torch.int64))
