"""Generation: from "what comes next?" to a text, in four ways that share two functions.

A model offers

    prefill() → logits (B, V), cache             reads the prompt: words, image tokens, encoder states: its own affair
    step(ids (B, T), cache) → logits (B, T, V), cache

and everything here is written on these two: greedy search, sampling (temperature, top-k, top-p), beam search, and the
scoring of given candidates. Nothing here knows what an image is.

    prefill ─► logits ─► choose ─► ids ─► step ─► logits ─► choose ─► …   until `stop` or max_new_tokens
                 cache ───────────────────┘  └───► cache (one column longer each time)

Legend: B rows of the batch, T tokens fed, V vocabulary, W beams, C candidates, R rows that a candidate is scored for, n tokens
generated so far.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.attention import KVCache

Prefill = Callable[[], tuple[Tensor, KVCache]]
Step = Callable[[Tensor, KVCache], tuple[Tensor, KVCache]]


def generate(prefill: Prefill, step: Step, max_new_tokens: int, stop: Sequence[int], pad: int = 0, beams: int = 1,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None) -> Tensor:
    """New token ids int64 (B, n ≤ max_new_tokens): each row ends with `stop` (if it came to it), then `pad`.

    stop: the token ids that end a text, in order (one id, or several such as "###"). temperature 0 is greedy; above 0
    the next token is drawn from the top_k most likely (0: all) within the smallest set of probability top_p.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
    with torch.inference_mode():  # no_grad that also drops the bookkeeping of views
        if beams > 1:
            ids = beam_search(prefill, step, max_new_tokens, stop, pad, beams)
        else:
            *_, ids = stream(prefill, step, max_new_tokens, stop, pad, temperature, top_k, top_p, generator)
    return ids.clone()  # an ordinary tensor again, which may be trained on


def stream(prefill: Prefill, step: Step, max_new_tokens: int, stop: Sequence[int], pad: int = 0, temperature: float = 0.0,
           top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Greedy search and sampling: a token is chosen, read, and the next one chosen; after each, all so far, (B, n).

    A row that has ended with `stop` goes on with `pad`. The end: all rows have ended, or there are max_new_tokens; the last is not read.
    """
    logits, cache = prefill()  # (B, V)
    ids = torch.full((len(logits), max_new_tokens), pad, device=logits.device)  # (B, max_new_tokens)
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for n in range(max_new_tokens):
        if n > 0:
            logits, cache = step(ids[:, n - 1:n], cache)
            logits = logits[:, -1]  # (B, V)
        ids[:, n] = choose(logits, temperature, top_k, top_p, generator).masked_fill(done, pad)
        yield ids[:, :n + 1]
        if stop:  # without one no row is ever done, and there is nothing to ask
            done = done | ends_with(ids[:, :n + 1], stop)
            if done.all():
                return


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One next token per row: logits (B, V) → int64 (B,).

    At temperature 0 the likeliest; else drawn, in fp32, from softmax(logits / temperature) over what `keep_likely` leaves.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = keep_likely(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """−inf for all but the top_k tokens (0: all stay), then for all but the smallest set whose probability reaches top_p (1: all stay).

    The probability is that of what top_k has left, which sums to 1.
    """
    if top_k > 0:
        weakest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        p = ranked.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # what stands before is enough already; the first always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logits


def ends_with(ids: Tensor, stop: Sequence[int]) -> Tensor:
    """Which rows of ids (B, n) end with the whole stop sequence → bool (B,). With the empty one none does."""
    if not stop or ids.shape[1] < len(stop):
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return (ids[:, -len(stop):] == torch.tensor(list(stop), device=ids.device)).all(dim=1)


class Hypotheses:
    """The finished beams of one row, the best W of them; score = log-likelihood / length."""

    def __init__(self, beams: int):
        self.beams, self.closed = beams, False
        self.finished: list[tuple[float, Tensor]] = []

    def add(self, log_likelihood: float, ids: Tensor) -> None:
        if not self.closed:
            self.finished.append((log_likelihood / len(ids), ids))
            self.finished = sorted(self.finished, key=lambda pair: -pair[0])[:self.beams]

    def close_if_settled(self, best_running: float, length: int) -> None:
        """Closed once W beams are finished and the best open one, as long as it is now, is no better than the worst."""
        full = len(self.finished) == self.beams
        self.closed = self.closed or (full and best_running / length <= self.finished[-1][0])


def beam_search(prefill: Prefill, step: Step, max_new_tokens: int, stop: Sequence[int], pad: int, beams: int) -> Tensor:
    """The W most likely beginnings are carried along; the finished text with the best mean log-likelihood wins.

    The scoring is that of transformers' default (length penalty 1, early_stopping False), which the tests hold it to.
    """
    logits, cache = prefill()  # (B, V)
    B, V = logits.shape
    device = logits.device
    first_row = torch.arange(B, device=device)[:, None] * beams  # (B, 1)
    cache = cache.reorder(torch.arange(B, device=device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)  # (B·W, V)
    scores = torch.full((B, beams), float("-inf"), device=device)
    scores[:, 0] = 0  # all beams of a row are equal at first: let one of them speak
    ids = torch.empty(B * beams, 0, dtype=torch.long, device=device)  # (B·W, 0)
    rows = [Hypotheses(beams) for _ in range(B)]
    for length in range(1, max_new_tokens + 1):
        log_p = scores[:, :, None] + logits.float().log_softmax(dim=-1).view(B, beams, V)
        # 2W candidates, so that W go on even if the W best all stop here
        candidates, flat = log_p.view(B, beams * V).topk(min(2 * beams, beams * V))  # (B, 2W)
        parents = first_row + flat // V  # (B, 2W), rows of ids
        grown = torch.cat([ids[parents], (flat % V)[..., None]], dim=-1)  # (B, 2W, length)
        stopped = ends_with(grown.flatten(0, 1), stop).view_as(flat)
        over = stopped | (length == max_new_tokens)
        for b, rank in over[:, :beams].nonzero().tolist():  # only the W best may finish: the others are the reserve
            rows[b].add(candidates[b, rank].item(), grown[b, rank])
        if length == max_new_tokens:
            break
        scores, keep = candidates.masked_fill(stopped, float("-inf")).topk(beams)  # (B, W)
        for b, row in enumerate(rows):
            row.close_if_settled(scores[b, 0].item(), length)
        if all(row.closed for row in rows):
            break
        ids = grown.gather(1, keep[..., None].expand(-1, -1, length)).flatten(0, 1)  # (B·W, length)
        cache = cache.reorder(parents.gather(1, keep).flatten())
        logits, cache = step(ids[:, -1:], cache)
        logits = logits[:, -1]  # (B·W, V)
    best = [row.finished[0][1] for row in rows]
    longest = max(len(text) for text in best)
    return torch.stack([F.pad(text, (0, longest - len(text)), value=pad) for text in best])


@torch.no_grad()
def score_candidates(prefill: Prefill, step: Step, candidates: Sequence[Sequence[int]], shortlist: int = 0) -> Tensor:
    """log p(candidate | prompt), summed over its tokens → fp32 (B, C), C the number of candidates.

    The prompt is read once; each candidate is one further step on a copy of its cache. shortlist: of each row only so many
    candidates are read, those with the likeliest first tokens, and the others get −inf (BLIP §5.3); 0: all of them.
    A candidate of one token needs no step. One without tokens is a ValueError.
    """
    if not all(map(len, candidates)):
        raise ValueError("a candidate has no tokens: there is nothing to score")
    logits, cache = prefill()  # (B, V)
    device, C = logits.device, len(candidates)
    first = logits.float().log_softmax(dim=-1)[:, [candidate[0] for candidate in candidates]]  # (B, C)
    scores = torch.full_like(first, float("-inf"))  # (B, C)
    listed = torch.zeros_like(first, dtype=torch.bool).scatter(1, first.topk(min(shortlist or C, C)).indices, True)  # (B, C)
    for j, candidate in enumerate(candidates):
        rows = listed[:, j].nonzero()[:, 0]
        score = first[rows, j]
        if len(candidate) > 1 and len(rows) > 0:
            ids = torch.tensor(list(candidate), device=device).expand(len(rows), -1)
            rest, _ = step(ids[:, :-1], cache.reorder(rows))  # (R, T, V)
            score = score + rest.float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))
        scores[rows, j] = score
    return scores
