"""T5 against transformers' T5: memory, logits, gradients, generated tokens; what is read is padded on either side."""

import math

import pytest
import torch
from oracles import T5, hf_t5, hf_t5_exact, hf_t5_first, ours, scores
from tools import close, moved_by_breaking, pad_mask, random_ids
from torch.nn.functional import cross_entropy
from transformers.models.t5.modeling_t5 import T5Attention

from nanovlm import t5 as module
from nanovlm.attention import KVCache
from nanovlm.hub import from_hf
from nanovlm.lm_loss import lm_loss
from nanovlm.papers.language_model import LanguageModel
from nanovlm.t5 import T5Config, relative_buckets, shift_right

EACH = pytest.mark.parametrize("build", [hf_t5, hf_t5_exact, hf_t5_first], ids=["flan", "exact", "first"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
B, S, T = 4, 17, 11  # longer than the 13 of the last bucket
LENGTHS = [17, 9, 1, 14]  # of what is read
ANSWERS = [11, 2, 7, 1]


def example(seed: int, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts (B, S) with their mask, answers (B, T) padded with −100."""
    answers = random_ids(B, T, seed + 100).masked_fill(~pad_mask(ANSWERS, "right", T), -100)
    return random_ids(B, S, seed), pad_mask(LENGTHS, side, S), answers


# --- positions ---

@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (10, 13), (16, 20), (4, 3), (7, 5), (32, 512)])
@pytest.mark.parametrize("causal", [True, False])
def test_relative_buckets_are_the_published_ones(buckets, max_distance, causal):
    offset = torch.arange(-600, 601)
    want = T5Attention._relative_position_bucket(offset, not causal, buckets, max_distance)
    got = relative_buckets(offset, buckets, max_distance, causal)
    assert got.tolist() == want.tolist()
    assert got.dtype == torch.int64


def test_relative_buckets_by_hand():
    """8 buckets to distance 16. In both directions: 0, 1, [2, 6), [6, …) and, for what comes after, 4 more."""
    both = relative_buckets(torch.tensor([0, -1, -2, -5, -6, -99, 1, 2, 5, 6, 99]), 8, 16, causal=False)
    assert both.tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]
    past = relative_buckets(torch.tensor([0, -1, -2, -3, -4, -5, -6, -8, -12, -99, 1, 50]), 8, 16, causal=True)
    assert past.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 0, 0]


@pytest.mark.parametrize("decoder", [True, False])
def test_the_bias_of_new_rows_is_the_last_rows_of_all(decoder):
    stack = module.Stack(T5Config(5, 6, 1, 3, 2, 7), 1, decoder)
    whole = stack.bias(23, 23)
    for rows in (1, 2, 23):
        assert torch.equal(stack.bias(rows, 23), whole[:, :, 23 - rows:])
    hidden = torch.arange(23) > torch.arange(23)[:, None]
    assert (whole[0].isinf() == (hidden & decoder)).all()


@pytest.mark.parametrize("changes", [{"buckets": 3}, {"buckets": 32, "max_distance": 16}])
def test_impossible_buckets(changes):
    with pytest.raises(ValueError, match="buckets up to distance"):
        T5Config(5, 6, 1, 3, 2, 7, **changes)


# --- numbers ---

@EACH
@SIDES
def test_memory_and_logits(build, side):
    hf = build(1)
    model = ours(hf)
    ids, mask, answers = example(1, side)
    with torch.no_grad():
        want = hf(input_ids=ids, attention_mask=mask.long(), labels=answers)
        close(model.language.encode(ids, attention_mask=mask)[mask], want.encoder_last_hidden_state[mask])
        got = model(ids, mask, answers).logits[:, :-1]  # the last is what we would say after the answer
        assert want.logits.std() > 0.1 and got.shape == want.logits.shape
        real = answers != -100
        close(got[real], want.logits[real])
        all_real = hf(input_ids=ids, labels=answers).logits
        close(model(ids, None, answers).logits[:, :-1][real], all_real[real])


@EACH
def test_attention_maps(build):
    """Of the encoder; of the decoder, self-attention and cross-attention in turn. Padding gets no weight at all."""
    hf = build(2)
    hf.set_attn_implementation("eager")
    ids, mask, _ = example(2, "left")
    answer = random_ids(B, T, 3)
    language, reading, writing = ours(hf).language, [], []
    with torch.no_grad():
        language.decode(answer, language.encode(ids, attention_mask=mask, maps=reading), mask, maps=writing)
        want = hf(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=answer, output_attentions=True)
    for got, theirs in zip(reading, want.encoder_attentions, strict=True):
        close(got.transpose(1, 2)[mask], theirs.transpose(1, 2)[mask])
    for maps, their_maps in ((writing[::2], want.decoder_attentions), (writing[1::2], want.cross_attentions)):
        for got, theirs in zip(maps, their_maps, strict=True):
            close(got, theirs)
    assert not any(weights[~mask[:, None, None].expand_as(weights)].any() for weights in [*reading, *writing[1::2]])


@EACH
def test_the_weights_of_the_parity_tests_bite(build):
    ids, mask, answers = example(1, "left")
    moved = moved_by_breaking(ours(build(1)), lambda model: model(ids, mask, answers.clamp(min=0)).logits)
    assert min(moved.values()) > 1e-3, moved


@EACH
@SIDES
def test_loss_and_gradients(build, side):
    """Every parameter's: the embedding's is the sum over both stacks and, where it is tied, the head."""
    hf = build(3)
    model = ours(hf)
    ids, mask, answers = example(3, side)
    want = hf(input_ids=ids, attention_mask=mask.long(), labels=answers)
    want.loss.backward()
    got = model(ids, mask, answers)
    close(got.loss, want.loss)
    got.loss.backward()
    total, count = model.losses({"input_ids": ids, "attention_mask": mask, "labels": answers})["lm"]
    assert count == sum(ANSWERS)
    close(total / count, want.loss)
    theirs = from_hf(hf.config.to_dict(), {name: p.grad for name, p in hf.named_parameters()})
    for (name, p), (same, gradient) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        assert p.grad.abs().max() > 0
        close(p.grad, gradient.data)


def test_embeddings_instead_of_ids():
    model = ours(hf_t5(4))
    ids, mask, answers = example(4, "left")
    embeddings = model.language.embedding(ids)
    memory = model.language.encode(inputs_embeds=embeddings, attention_mask=mask)
    close(memory, model.language.encode(ids, attention_mask=mask), 0)
    logits, _ = model.language.prefill(mask, inputs_embeds=embeddings)
    close(logits, model(ids, mask, answers).logits[:, 0])


# --- who sees what ---

def test_the_encoder_looks_both_ways_and_the_decoder_back():
    language = ours(hf_t5(5)).language
    ids, answer = random_ids(1, S, 5), random_ids(1, T, 6)
    with torch.no_grad():
        memory = language.encode(ids)
        other = language.encode(torch.cat([ids[:, :-1], ids[:, -1:] - 1], dim=1))
        assert ((other - memory).abs().amax(dim=-1) > 1e-4).all()
        hidden = language.decode(answer, memory)
        for t in range(T):
            changed = answer.clone()
            changed[:, t] = answer[:, t] - 1
            moved = (language.decode(changed, memory) - hidden).abs().amax(dim=-1)[0]
            assert not moved[:t].any()  # to the bit
            assert (moved[t:] > 1e-4).all()


@EACH
@SIDES
def test_batch_equals_single(build, side):
    model = ours(build(6))
    ids, mask, answers = example(6, side)
    with torch.no_grad():
        together = model(ids, mask, answers).logits
        said = model.generate({"input_ids": ids, "attention_mask": mask}, 6, [])
        for row in range(B):
            alone, real = ids[row:row + 1, mask[row]], mask[row:row + 1, mask[row]]
            answer = answers[row:row + 1, :ANSWERS[row]]
            close(together[row:row + 1, :ANSWERS[row] + 1], model(alone, real, answer).logits)
            for seen in (real, None):
                again = model.generate({"input_ids": alone, "attention_mask": seen}, 6, [])
                assert again.tolist() == said[row:row + 1].tolist()


def test_a_row_with_nothing_to_read_is_an_answer_by_itself():
    """Zero from every cross-attention, never NaN: whatever stands under the padding, and in the gradients too."""
    model = ours(hf_t5(7))
    ids, mask, answers = example(7, "left")
    mask[2] = False
    model(ids, mask, answers).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        before = model(ids, mask, answers).logits
        ids[2] = random_ids(1, S, 8)
        close(model(ids, mask, answers).logits, before, 0)
        assert model.language.encode(ids, attention_mask=mask, maps=[]).isfinite().all()  # where softmax is a plain one
        for block in model.language.decoder.blocks:
            block.cross_attention.out.weight.zero_()
        after = model(ids, mask, answers).logits
        close(after[2], before[2], 0)
        assert (after[1] - before[1]).abs().max() > 1e-3


# --- step by step ---

@EACH
@pytest.mark.parametrize("chunks", [[3, 1, 1, 6], [10, 1], [4, 7]])
def test_cache_equals_no_cache(build, chunks):
    language = ours(build(8)).language
    ids, mask, _ = example(8, "left")
    answer, cache, seen, parts = random_ids(B, T, 9), KVCache(), 0, []
    with torch.no_grad():
        memory = language.encode(ids, attention_mask=mask)
        for n in chunks:
            parts.append(language.decode(answer[:, seen:seen + n], memory, mask, cache))
            seen += n
        close(torch.cat(parts, dim=1), language.decode(answer, memory, mask), 3e-6)
    assert cache.mask.shape == (B, T) and cache.mask.all()


def test_steps_read_the_memory_once_and_make_the_bias_of_new_rows_only(monkeypatch):
    language = ours(hf_t5(9)).language
    asked, bias = [], module.Stack.bias
    monkeypatch.setattr(module.Stack, "bias", lambda stack, rows, K: asked.append((rows, K)) or bias(stack, rows, K))
    ids, mask, answers = example(9, "left")
    with torch.no_grad():
        logits, cache = language.prefill(mask, ids)
        keys = [cache["cross", i].keys for i in range(2)]
        cache.state["memory"] = torch.full_like(cache.state["memory"], math.nan)
        rest, cache = language.step(random_ids(B, 2, 10), cache)
        last, cache = language.step(random_ids(B, 1, 11), cache)
    assert rest.isfinite().all() and last.isfinite().all()
    assert all(cache["cross", i].keys is keys[i] for i in range(2))
    assert asked == [(S, S), (1, 1), (2, 3), (1, 4)]  # each stack once a call, not once a block


@SIDES
def test_prefill_and_step_are_the_forward(side):
    model = ours(hf_t5(10))
    ids, mask, _ = example(10, side)
    answer = random_ids(B, T, 12)
    with torch.no_grad():
        first, cache = model.language.prefill(mask, ids)
        rows = torch.tensor([3, 0, 0, 2, 1])  # as a beam search might
        rest, _ = model.language.step(answer[rows], cache.reorder(rows))
        want = model(ids, mask, answer).logits
    close(first, want[:, 0], 3e-6)
    close(rest, want[rows, 1:], 3e-6)


def generate_both(build, seed: int, beams: int, side: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ours, theirs, stop): the stop is a token that they would have said, so that rows end at different times."""
    hf = build(seed)
    ids, mask, _ = example(seed, side)
    shared = {"input_ids": ids, "attention_mask": mask.long(), "do_sample": False, "num_beams": beams,
              "max_new_tokens": 12, "pad_token_id": 0}
    said = hf.generate(**shared, eos_token_id=None)[:, 1:]
    stop = int(said[seed % B, 4])
    want = hf.generate(**shared, eos_token_id=stop)[:, 1:]
    ended = (want == stop).cumsum(dim=1) - (want == stop).long() > 0
    got = ours(hf).generate({"input_ids": ids, "attention_mask": mask}, 12, [stop], beams=beams)
    return got, want.masked_fill(ended, 0), stop


@EACH
@SIDES
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(build, side, beams):
    got, want, stop = generate_both(build, 6, beams, side)
    assert got.tolist() == want.tolist()
    assert (want == stop).any()  # somebody stopped
    assert len(set(map(tuple, want.tolist()))) > 1  # the rows say different things


def test_beams_differ_from_greedy():
    """Else the beam tests above would be greedy tests."""
    assert not torch.equal(generate_both(hf_t5, 6, 1, "left")[0], generate_both(hf_t5, 6, 3, "left")[0])


def test_scores_are_sums_of_log_probabilities():
    hf = hf_t5(11)
    ids, mask, _ = example(11, "left")
    candidates = [[5], [7, 8, 9], [11, 5]]
    got = scores(ours(hf), {"input_ids": ids, "attention_mask": mask}, candidates)
    with torch.no_grad():
        for c, candidate in enumerate(candidates):
            answer = torch.tensor([candidate] * B)
            log_p = hf(input_ids=ids, attention_mask=mask.long(), labels=answer).logits.log_softmax(dim=-1)
            close(got[:, c], log_p.gather(-1, answer[..., None]).sum(dim=(1, 2)))


# --- training ---

def test_shift_right_by_hand():
    labels = torch.tensor([[7, 8, 2], [9, -100, -100]])
    ids, learned = shift_right(labels, start_id=3)
    assert ids.tolist() == [[3, 7, 8, 2], [3, 9, 3, 3]]
    assert learned.tolist() == [[-100, 7, 8, 2], [-100, 9, -100, -100]]
    states = torch.eye(4)[None].repeat(2, 1, 1)  # hidden state t says t: which positions are asked, and for what?
    head = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    total, count = lm_loss(states, head, learned)
    want = sum(cross_entropy(head[:, t], torch.tensor(token)) for t, token in ((0, 7), (1, 8), (2, 2), (0, 9)))
    assert count == 4
    close(total, want)


@EACH
def test_checkpointing_changes_memory_only(build, monkeypatch):
    """Every block of both stacks runs twice, and the numbers are the same."""
    ids, mask, answers = example(13, "right")
    results, runs, forward = [], [], module.Block.forward
    monkeypatch.setattr(module.Block, "forward", lambda block, *given: runs.append(block) or forward(block, *given))
    for checkpointing in (False, True):
        model = ours(build(13)).train()
        model.language.checkpointing = checkpointing
        loss = model(ids, mask, answers).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        close(again, plain, 1e-6)
    assert len(runs) == 5 + 2 * 5


def test_initialisation():
    """Scores and what the maps write have the variance that `initialise` promises; the first loss is ln V."""
    torch.manual_seed(0)
    V, d = 211, 16
    config = T5Config(V, 96, 4, 5, d, 131, decoder_layers=6)
    model = LanguageModel(config)
    for name, p in model.language.named_parameters():
        gain = p.std().item() * p.shape[-1] ** 0.5
        if "blocks" in name and p.ndim == 2:
            writers = 8 if name.startswith("encoder") else 18
            want = d ** -0.5 if name.endswith("query.weight") else 1.0
            want = writers ** -0.5 if name.endswith(("out.weight", "down.weight")) else want
            assert gain == pytest.approx(want, rel=0.1), name
    with torch.no_grad():
        for stack, places in ((model.language.encoder, [-1, 1, -2, -3]), (model.language.decoder, [0, -1, -2, -3])):
            looks = stack.bias(9, 9)[0, :, 4].softmax(dim=-1)  # (heads, 9): where the fifth of nine looks at first
            assert (looks[:4].argmax(dim=-1) - 4).tolist() == places and looks[:4].amax(dim=-1).min() > 0.8
            assert looks[4].max() < 0.6, "the fifth head is free"
        answers = random_ids(8, 20, 1, high=V)
        loss = model(random_ids(8, 20, 0, high=V), None, answers).loss
        assert loss.item() == pytest.approx(math.log(V), abs=0.05)
        attention, x = model.language.decoder.blocks[0].attention, torch.randn(500, 96)
        scores = (attention.query(x).view(500, 5, d) * attention.key(x.roll(1, dims=0)).view(500, 5, d)).sum(dim=-1)
        assert attention.scale == 1 and scores.std().item() == pytest.approx(1, rel=0.1)
        for attention in (model.language.encoder.blocks[3].attention, model.language.decoder.blocks[5].cross_attention):
            q, k = attention.query(x).view(500, 5, d), attention.key(x).view(500, 5, d)
            scores = torch.einsum("qhd,khd->hqk", q, k)  # a word's best match among 500 is itself
            assert scores.argmax(dim=-1).eq(torch.arange(500)).float().mean() > 0.4


def test_the_start_is_of_the_config():
    assert ours(hf_t5(14)).language.config.start_id == T5["decoder_start_token_id"] == 3
