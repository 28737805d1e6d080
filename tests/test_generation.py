"""Generation on a fake model whose every probability is known: greedy, sampling, beams, stops, scoring, cache order."""

import functools
import itertools
import math

import pytest
import torch
from tools import close, randn
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from nanovlm.attention import KVCache
from nanovlm.generation import beam_search, choose, generate, keep_likely, score_candidates, stream

V, PAD = 5, 0


class Fake:
    """log p(next | text) drawn once for each text. What was fed lives in the cache alone, so a wrong order shows."""

    def __init__(self, prompts: list[int], seed: int = 0, spread: float = 1.5):
        self.prompts, self.seed, self.spread, self.steps = prompts, seed, spread, 0

    def logits(self, text: tuple[int, ...]) -> torch.Tensor:
        number = functools.reduce(lambda n, token: n * 101 + token + 1, text, self.seed)  # another for each text
        return self.spread * randn(V, seed=number % (2**31 - 1))

    def prefill(self):
        cache = KVCache()
        cache.state["text"] = torch.tensor(self.prompts)[:, None]
        return self.last(cache), cache

    def step(self, ids, cache):
        self.steps += 1
        outputs = []
        for t in range(ids.shape[1]):
            cache.state["text"] = torch.cat([cache.state["text"], ids[:, t:t + 1]], dim=1)
            outputs.append(self.last(cache))
        return torch.stack(outputs, dim=1), cache

    def last(self, cache):
        return torch.stack([self.logits(tuple(row)) for row in cache.state["text"].tolist()])

    def log_likelihood(self, prompt: int, text: tuple[int, ...]) -> float:
        whole = (prompt, *text)
        return sum(float(self.logits(whole[:i + 1]).log_softmax(-1)[token]) for i, token in enumerate(text))


def ends(text, stop) -> bool:
    return bool(stop) and text[-len(stop):] == tuple(stop)


def padded(text: tuple[int, ...], columns: int) -> list[int]:
    return [*text, *[PAD] * (columns - len(text))]


@pytest.mark.parametrize("stop", [[], [3], [2, 4]])
def test_greedy_is_a_loop(stop):
    """Rows end on their own: with the stop sequence, then padding; the whole ends with the longest row."""
    prompts = list(range(12))
    fake = Fake(prompts)
    want = []
    for prompt in prompts:
        text = ()
        while len(text) < 9 and not ends(text, stop):
            text = (*text, int(fake.logits((prompt, *text)).argmax()))
        want.append(text)
    columns = max(map(len, want))
    if stop:
        assert any(ends(text, stop) for text in want) and len(set(map(len, want))) > 1
    assert generate(fake.prefill, fake.step, 9, stop, PAD).tolist() == [padded(text, columns) for text in want]


def test_no_step_is_wasted():
    fake = Fake([1, 2])
    generate(fake.prefill, fake.step, 4, [], PAD)
    assert fake.steps == 3  # the fourth token is chosen from the third step's logits


def test_nothing_is_done_once_all_rows_have_stopped():
    """And a stream hands out what there is after each token."""
    said = generate(Fake([1]).prefill, Fake([1]).step, 9, [], PAD)[0].tolist()
    stop = said[3]
    fake, end = Fake([1]), said.index(stop) + 1
    parts = [ids.tolist() for ids in stream(fake.prefill, fake.step, 9, [stop])]
    assert parts == [[said[:n]] for n in range(1, end + 1)] and fake.steps == end - 1 < 8


def best_of_all(fake: Fake, prompt: int, stop: list[int], length: int) -> tuple[int, ...]:
    """Every text that stops, or is `length` long, scored by its mean log-likelihood."""
    def texts(text=()):
        if text and (ends(text, stop) or len(text) == length):
            yield text
        else:
            for token in range(V):
                yield from texts((*text, token))

    return max(texts(), key=lambda text: fake.log_likelihood(prompt, text) / len(text))


@pytest.mark.parametrize("stop", [[], [3], [2, 4]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_enough_beams_are_an_exhaustive_search(stop, seed):
    prompts = [0, 1, 2]
    fake = Fake(prompts, seed)
    want = [best_of_all(fake, prompt, stop, 3) for prompt in prompts]
    got = beam_search(fake.prefill, fake.step, 3, stop, PAD, beams=V**3)
    columns = max(map(len, want))
    assert got.tolist() == [padded(text, columns) for text in want]


def test_the_exhaustive_search_tells_means_from_sums():
    """Some best text is short and stopped, some is long: a score that forgets the length would be found out."""
    lengths = set()
    for prompt, seed in itertools.product(range(6), range(3)):
        fake = Fake([prompt], seed)
        mean = best_of_all(fake, prompt, [3], 3)
        lengths.add(len(mean))
    assert len(lengths) == 3


def test_two_beams_are_a_loop():
    """Without a stop: keep the two most likely beginnings, five times over."""
    prompts = list(range(10))
    fake = Fake(prompts, seed=4)
    want = []
    for prompt in prompts:
        beams = [()]
        for _ in range(5):
            grown = [(*text, token) for text in beams for token in range(V)]
            beams = sorted(grown, key=lambda text: -fake.log_likelihood(prompt, text))[:2]
        want.append(list(beams[0]))
    got = generate(fake.prefill, fake.step, 5, [], PAD, beams=2).tolist()
    assert got == want
    assert got != generate(fake.prefill, fake.step, 5, [], PAD).tolist()  # a beam was overtaken: caches changed rows


class Fork(Fake):
    """First 1 (0.4), 2 (0.35) or the stop 3 (0.25), then any of eight tokens alike: every longer text has a worse mean."""

    def logits(self, text: tuple[int, ...]) -> torch.Tensor:
        first = torch.tensor([1e-9, 0.4, 0.35, 0.25, 1e-9, 1e-9, 1e-9, 1e-9])
        return first.log() if len(text) == 1 else torch.zeros(8)


def test_only_the_best_w_candidates_may_finish():
    """As in transformers: with two beams the stop, third, is not taken though its mean is the best; with three it is."""
    fork = Fork([0])
    assert beam_search(fork.prefill, fork.step, 2, [3], PAD, beams=2)[0, 0] == 1
    assert beam_search(fork.prefill, fork.step, 2, [3], PAD, beams=3).tolist() == [[3]]


def test_one_beam_is_greedy():
    fake = Fake([0, 1, 2])
    greedy = generate(fake.prefill, fake.step, 6, [], PAD)
    assert torch.equal(generate(fake.prefill, fake.step, 6, [], PAD, beams=1), greedy)
    assert torch.equal(beam_search(fake.prefill, fake.step, 6, [], PAD, beams=1), greedy)


@pytest.mark.parametrize("stop", [[], [3]])
def test_rows_do_not_disturb_each_other(stop):
    prompts = [0, 1, 2, 3, 4, 5]
    fake = Fake(prompts, seed=5)
    together = generate(fake.prefill, fake.step, 5, stop, PAD, beams=3).tolist()
    for prompt, row in zip(prompts, together, strict=True):
        alone = Fake([prompt], seed=5)
        text = generate(alone.prefill, alone.step, 5, stop, PAD, beams=3)[0].tolist()
        assert row == padded(tuple(text), len(row))


# --- sampling ---

@pytest.mark.parametrize("top_k", [0, 1, 3, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
def test_filters_are_those_of_transformers(top_k, top_p):
    logits = 3 * randn(40, 17)
    want = logits.clone()
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = keep_likely(logits, top_k, top_p)
    assert torch.equal(got, want)
    assert torch.equal(got.argmax(dim=-1), logits.argmax(dim=-1))  # the first always stays


def test_top_p_is_the_smallest_set_that_reaches_p():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert keep_likely(p.log(), 0, top_p)[0].isfinite().nonzero().flatten().tolist() == kept


def test_sampled_frequencies():
    """20,000 draws. False alarm: each of 4 counts lies 5 standard deviations off, about 2 in a million."""
    n, temperature = 20_000, 1.7
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(n, V), temperature, 4, 1.0, generator)
    want = (logits[:4] / temperature).softmax(dim=0)
    counts = torch.bincount(drawn, minlength=V)
    assert counts[4] == 0  # not among the top 4
    for count, p in zip(counts, want, strict=False):
        assert abs(float(count) - n * float(p)) < 5 * math.sqrt(n * float(p) * (1 - float(p)))


def test_sampling_is_repeatable_and_follows_the_text():
    fake = Fake(list(range(50)), seed=6)

    def sample(seed, **how):
        return generate(fake.prefill, fake.step, 6, [3], PAD, temperature=1.0,
                        generator=torch.Generator().manual_seed(seed), **how)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    greedy = generate(fake.prefill, fake.step, 6, [3], PAD)
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(1, top_p=1e-6), greedy)
    cold = generate(fake.prefill, fake.step, 6, [3], PAD, temperature=1e-4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cold, greedy)


# --- scoring ---

def test_candidate_scores_are_sums():
    prompts = [0, 1, 2]
    fake = Fake(prompts, seed=7)
    candidates = [[1], [4, 2, 2], [3, 0]]
    got = score_candidates(fake.prefill, fake.step, candidates)
    want = [[fake.log_likelihood(prompt, tuple(candidate)) for candidate in candidates] for prompt in prompts]
    close(got, torch.tensor(want))
    with pytest.raises(ValueError, match="no tokens"):
        score_candidates(fake.prefill, fake.step, [[1], []])
