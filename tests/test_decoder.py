"""The decoder against transformers' LLaMA and OPT: states, gradients and generated tokens, padded on either side."""

import math

import pytest
import torch
from oracles import hf_llama, hf_opt, ours, scores
from tools import close, moved_by_breaking, pad_mask, randn, random_ids
from torch.nn.functional import cross_entropy

from nanovlm.attention import KVCache
from nanovlm.decoder import Decoder, clip_text, llama, opt

BOTH = pytest.mark.parametrize("build", [hf_llama, hf_opt], ids=["llama", "opt"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
B, T = 4, 9
LENGTHS = [9, 5, 1, 7]


@BOTH
@SIDES
def test_logits_of_every_real_token(build, side):
    """A left-padded row must give what it gives alone: its first real token stands at position 0."""
    hf = build(1)
    model = ours(hf)
    ids, mask = random_ids(B, T, 1), pad_mask(LENGTHS, side, T)
    with torch.no_grad():
        want = hf(ids, attention_mask=mask.long()).logits
        got = model(ids, mask).logits
        assert want[mask].std() > 0.1
        close(got[mask], want[mask])
        close(model(ids).logits, hf(ids).logits)  # no mask: all real
        states = hf(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-1]
        close(model.language(ids, attention_mask=mask)[mask], states[mask])  # after the final norm


@BOTH
def test_attention_maps(build):
    hf = build(2)
    hf.set_attn_implementation("eager")
    ids, mask, maps = random_ids(B, T, 2), pad_mask(LENGTHS, "left", T), []
    with torch.no_grad():
        ours(hf).language(ids, attention_mask=mask, maps=maps)
        want = hf(ids, attention_mask=mask.long(), output_attentions=True).attentions
    for got, theirs in zip(maps, want, strict=True):
        close(got.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask])


@BOTH
def test_the_weights_of_the_parity_tests_bite(build):
    model = ours(build(1))
    moved = moved_by_breaking(model, lambda m: m(random_ids(B, T, 1)).logits)
    if "language.positions.weight" in moved:  # only the rows that the text does not reach (37 + 2) may be idle
        assert len(model.language.positions.weight) == 39
    assert min(moved.values()) > 1e-3, moved


@BOTH
def test_loss_and_gradients(build):
    """Every parameter's gradient, tied ones included, under right padding and −100 labels."""
    hf = build(3)
    model = ours(hf)
    ids, mask = random_ids(B, T, 3), pad_mask(LENGTHS, "right", T)
    labels = torch.where(mask & (randn(B, T) > -0.5), ids, -100)
    want = hf(ids, attention_mask=mask.long(), labels=labels)
    want.loss.backward()
    got = model(ids, mask, labels)
    close(got.loss, want.loss)
    got.loss.backward()
    theirs = type(hf)(hf.config)
    theirs.load_state_dict({name: p.grad for name, p in hf.named_parameters()}, strict=False)
    gradients = ours(theirs)  # their gradients under our names
    for (name, p), (same, want_grad) in zip(model.named_parameters(), gradients.named_parameters(), strict=True):
        assert name == same
        assert p.grad.abs().max() > 0
        close(p.grad, want_grad.data)


@BOTH
def test_embeddings_instead_of_ids(build):
    model = ours(build(4)).language
    ids, mask = random_ids(B, T, 4), pad_mask(LENGTHS, "left", T)
    close(model(inputs_embeds=model.embedding(ids), attention_mask=mask), model(ids, attention_mask=mask), 0)


@BOTH
@pytest.mark.parametrize("chunks", [[3, 1, 1, 4], [8, 1], [2, 7]])
def test_cache_equals_no_cache(build, chunks):
    """Under left padding, whatever the sizes of the pieces."""
    model = ours(build(5)).language
    ids, mask = random_ids(B, T, 5), pad_mask(LENGTHS, "left", T)
    cache, seen, parts = KVCache(), 0, []
    with torch.no_grad():
        for n in chunks:
            new = slice(seen, seen + n)
            seen += n
            parts.append(model(ids[:, new], attention_mask=mask[:, new], cache=cache))
        close(torch.cat(parts, dim=1)[mask], model(ids, attention_mask=mask)[mask], 2e-6)
    assert torch.equal(cache.mask, mask)


# --- generated tokens ---

def generate_both(build, seed: int, beams: int, side: str = "left"):
    """(ours, theirs, stop): the stop is a token that they would have said, so that rows end at different times."""
    hf = build(seed)
    ids, mask = random_ids(B, T, seed), pad_mask(LENGTHS, side, T)
    shared = {"input_ids": ids, "attention_mask": mask.long(), "do_sample": False, "num_beams": beams,
              "max_new_tokens": 11, "pad_token_id": 0}
    free = hf.generate(**shared, eos_token_id=None)[:, T:]
    stop = int(free[seed % B, 4])
    want = hf.generate(**shared, eos_token_id=stop)[:, T:]
    ended = (want == stop).cumsum(dim=1) - (want == stop).long() > 0
    want = want.masked_fill(ended, 0)  # their beam search fills up with the stop where the pad's id is 0
    got = ours(hf).generate({"input_ids": ids, "attention_mask": mask}, 11, [stop], beams=beams)
    return got, want, stop


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_generated_tokens(build, beams, seed):
    got, want, stop = generate_both(build, seed, beams)
    assert got.tolist() == want.tolist()
    assert (want == stop).any()  # somebody stopped
    assert len(set(map(tuple, want.tolist()))) > 1  # the rows say different things


@BOTH
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_where_many_stop(build, beams):
    """Forty texts, and the stop is what they say most: beams finish, are replaced from the reserve and outlive others."""
    hf, rows, new = build(12), 40, 8
    ids = random_ids(rows, 5, 12)
    shared = {"do_sample": False, "num_beams": beams, "max_new_tokens": new, "pad_token_id": 0}
    said = hf.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **shared)[:, 5:]
    stop = int(said.flatten().bincount().argmax())
    want = hf.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=stop, **shared)[:, 5:]
    got = ours(hf).generate({"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}, new, [stop], beams=beams)
    lengths = 1 + (want != stop).sum(dim=1)
    assert [row[:n].tolist() for row, n in zip(got, lengths, strict=True)] == [
        row[:n].tolist() for row, n in zip(want, lengths, strict=True)]
    assert len(set(lengths.tolist())) >= 4


@BOTH
def test_beams_differ_from_greedy(build):
    """Else the beam tests above would be greedy tests."""
    assert any(not torch.equal(generate_both(build, seed, 1)[0], generate_both(build, seed, 3)[0]) for seed in range(3))


@BOTH
def test_batch_equals_single(build):
    """Left-padded rows generate what each of them generates alone."""
    model = ours(build(6))
    batch = {"input_ids": random_ids(B, T, 6), "attention_mask": pad_mask(LENGTHS, "left", T)}
    together = model.generate(batch, 6, [])
    for row, length in enumerate(LENGTHS):
        alone = model.generate({name: tensor[row:row + 1, T - length:] for name, tensor in batch.items()}, 6, [])
        assert alone[0].tolist() == together[row].tolist()


@BOTH
def test_scores_are_sums_of_log_probabilities(build):
    hf = build(7)
    ids, mask = random_ids(B, T, 7), pad_mask(LENGTHS, "left", T)
    candidates = [[5], [7, 8, 9], [11, 5]]
    got = scores(ours(hf), {"input_ids": ids, "attention_mask": mask}, candidates)
    with torch.no_grad():
        for c, candidate in enumerate(candidates):
            tail = torch.tensor(candidate).expand(B, -1)
            whole = torch.cat([mask, torch.ones(B, len(candidate), dtype=torch.bool)], dim=1)
            log_p = hf(torch.cat([ids, tail], dim=1), attention_mask=whole.long()).logits.log_softmax(-1)
            want = sum(log_p[:, T - 1 + i, token] for i, token in enumerate(candidate))
            close(got[:, c], want)


# --- what the papers need of it ---

@BOTH
def test_before_block_inserts_without_touching(build):
    """The hook sees block number, input and cache; what it returns is what the block reads. Here: embeddings, moved."""
    model = ours(build(8)).language
    ids, added, seen = random_ids(B, T, 8), randn(36), []  # a constant would vanish in a LayerNorm
    cache = KVCache()

    def hook(i, x, given):
        seen.append((i, given is cache))
        return x + added if i == 0 else x

    hidden = model(ids, cache=cache, before_block=hook)
    assert seen == [(0, True), (1, True)]
    close(hidden, model(inputs_embeds=model.embedding(ids) + added))
    assert (hidden - model(ids)).abs().max() > 1e-3
    close(model(ids, before_block=lambda i, x, given: x), model(ids), 0)


@BOTH
def test_checkpointing_changes_memory_only(build):
    ids, mask = random_ids(B, T, 9), pad_mask(LENGTHS, "right", T)
    results = []
    for checkpointing in (False, True):
        model = ours(build(9)).train()
        model.language.checkpointing = checkpointing
        loss = model(ids, mask, labels=ids).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        close(again, plain, 1e-6)


@BOTH
def test_the_order_of_earlier_tokens_matters(build):
    model = ours(build(10)).language
    ids = random_ids(1, T, 10)
    swapped = ids[:, [1, 0, *range(2, T)]]
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-3


def test_prefill_and_step_are_the_forward():
    model = ours(hf_llama(11))
    ids, mask = random_ids(B, T, 11), pad_mask(LENGTHS, "left", T)
    with torch.no_grad():
        first, cache = model.language.prefill(mask[:, :5], ids[:, :5])
        rest, cache = model.language.step(ids[:, 5:], cache)
        whole_mask = torch.cat([mask[:, :5], torch.ones(B, T - 5, dtype=torch.bool)], dim=1)  # new tokens are real
        want = model(ids, whole_mask).logits
    close(first[mask[:, 4]], want[:, 4][mask[:, 4]], 5e-6)
    close(rest, want[:, 5:], 5e-6)


def test_initialisation():
    """Maps keep variance 1, those that write into the residual stream start √(2L) smaller; biases 0; loss ln V."""
    torch.manual_seed(0)
    V, L = 211, 8
    for config in (llama(V, 96, L, 4, 131), opt(V, 96, L, 4, 131), clip_text(V, 96, L, 4)):
        decoder = Decoder(config)
        for name, p in decoder.named_parameters():
            if name.endswith("bias"):
                assert not p.any()
            elif p.ndim == 2 and name.startswith("blocks"):
                writes = name.endswith(("attention.out.weight", "feedforward.down.weight"))
                gain = p.std().item() * p.shape[1] ** 0.5
                assert gain == pytest.approx((2 * L) ** -0.5 if writes else 1, rel=0.1), name
        with torch.no_grad():
            logits = decoder.logits(decoder(random_ids(8, 20, 0, high=V)))
        loss = cross_entropy(logits.flatten(0, 1), random_ids(8, 20, 1, high=V).flatten())
        assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_words_share_a_direction_only_where_nothing_else_gives_positions():
    """Heads without biases look for places by what all words have in common; OPT and CLIP have learned positions."""
    for config, shared in ((llama(50, 32, 2, 4, 64), 4), (opt(50, 32, 2, 4, 64), 0), (clip_text(50, 32, 2, 4), 0)):
        words = Decoder(config).embedding.weight
        assert int((words == 1).all(dim=0).sum()) == shared
        assert words[:, shared:].std(dim=0).min() > 0.005
