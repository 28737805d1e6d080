"""Assignment 3. Oracles: BPE that counts everything afresh, loops over logarithms, models that follow a script, all subsets of a few tokens."""

import math
import re
from collections import Counter
from itertools import combinations

import pytest
import torch

from assignments.draw import close
from nanovlm import generation
from nanovlm.decoder import Decoder, llama
from nanovlm.errors import UserError
from nanovlm.generation import choose, ends_with, keep_likely, score_candidates
from nanovlm.lm_loss import lm_loss
from nanovlm.tokenizer import Tokenizer, _learn_merges, _replace_pair

# --- 3.1 learning merges ---

def merged_by_hand(ids, pair, new):
    """From left to right; what has gone into a token is gone."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
            continue
        out.append(i)
    return out


def merges_by_hand(words, counts, wanted, first_id):
    """Algorithm 1 as it is printed: for each merge all pairs of all words are counted again."""
    words, merges = [list(word) for word in words], []
    for new in range(first_id, first_id + wanted):
        seen = {}
        for word, count in zip(words, counts, strict=True):
            for k in range(len(word) - 1):
                pair = (word[k], word[k + 1])
                seen[pair] = seen.get(pair, 0) + count
        often = max(seen.values(), default=0)
        if often < 2:
            break
        best = min(pair for pair, count in seen.items() if count == often)
        words, merges = [merged_by_hand(word, best, new) for word in words], [*merges, best]
    return merges


def corpus(draw, letters, words, longest):
    """Different words of few letters, so that the same pairs stand in many of them, and how often each was met."""
    found = {}
    while len(found) < words:
        found[tuple(draw.ids(draw.random.randint(1, longest), low=3, high=3 + letters).tolist())] = draw.random.randint(1, 5)
    return [list(word) for word in found], list(found.values())


@pytest.mark.parametrize(("letters", "words", "longest"), [(2, 12, 9), (4, 30, 7), (7, 25, 5), (1, 4, 11)])
def test_3_1_equals_brute_force(draw, letters, words, longest):
    words, counts = corpus(draw, letters, words, longest)
    for wanted in (1, 6, 60):
        got = _learn_merges([list(word) for word in words], list(counts), wanted, first_id=40)
        want = merges_by_hand(words, counts, wanted, 40)
        assert [tuple(pair) for pair in got] == want, f"{differ(got, want)} of {len(want)} merges differ"


def differ(got, want):
    return sum(a != b for a, b in zip(got, want)) + abs(len(got) - len(want))


def test_3_1_every_occurrence_from_left_to_right(draw):
    """Of [a, a, a] the first two; a token that is new takes part in no further pair of the same sweep."""
    a, b, c, new = 5, 6, 7, 50
    for ids, pair, want in (([a, a, a], (a, a), [new, a]), ([a, a, a, a], (a, a), [new, new]), ([a, b, a, b], (a, b), [new, new]),
                            ([b, a], (a, b), [b, a]), ([a], (a, a), [a]), ([], (a, a), []), ([c, a, b], (a, b), [c, new]),
                            ([a, b, c], (a, b), [new, c]), ([a, a, b], (a, b), [a, new])):
        before = list(ids)
        assert list(_replace_pair(ids, pair, new)) == want, f"{ids}, {pair}"
        assert ids == before, "what came in stays as it was"
    for _ in range(40):
        ids = draw.ids(draw.random.randint(1, 12), low=3, high=6).tolist()
        pair = tuple(draw.ids(2, low=3, high=6).tolist())
        assert list(_replace_pair(ids, pair, new)) == merged_by_hand(ids, pair, new), f"{ids}, {pair}"


def test_3_1_what_is_met_once_is_not_merged(draw):
    assert _learn_merges([[3, 4], [5, 6]], [1, 1], 5, first_id=40) == []
    assert _learn_merges([[3, 4], [5, 6]], [1, 2], 5, first_id=40) == [(5, 6)]
    assert _learn_merges([[3, 4], [5, 3, 4]], [1, 1], 5, first_id=40) == [(3, 4)], "twice in different words counts too"
    assert _learn_merges([[3]], [9], 5, first_id=40) == [] == _learn_merges([], [], 5, first_id=40)
    assert _learn_merges([[3, 4]], [9], 0, first_id=40) == []


def test_3_1_of_equally_frequent_pairs_the_smaller(draw):
    """So the order in which texts are read plays no part."""
    words, counts = [[8, 9], [3, 7], [3, 5], [6, 4]], [4, 4, 4, 4]
    for _ in range(4):
        order = draw.order(4).tolist()
        got = _learn_merges([list(words[i]) for i in order], [counts[i] for i in order], 9, first_id=40)
        assert got == [(3, 5), (3, 7), (6, 4), (8, 9)]


# --- 3.2 from text to ids and back ---

def tokenizer(draw, letters="abé字", merges=12):
    """Merges that nobody learned: any two units that exist already."""
    specials = ("<pad>", "<s>", "</s>")
    units = sorted({byte + len(specials) for letter in letters for byte in letter.encode()})
    found = []
    while len(found) < merges:
        pair = tuple(draw.random.choices(units, k=2))
        if pair not in found:
            found.append(pair)
            units.append(len(specials) + 255 + len(found))
    return Tokenizer(found, specials)


def encoded_by_hand(words, piece):
    """Merge after merge, over the whole piece, in the order in which they were learned."""
    ids = [byte + len(words.specials) for byte in piece.encode()]
    for k, pair in enumerate(words.merges):
        ids = merged_by_hand(ids, pair, len(words.specials) + 256 + k)
    return ids


def test_3_2_the_earliest_merge_first(draw):
    for round in range(12):
        words = tokenizer(draw, merges=10 + 5 * round)
        for _ in range(30):
            piece = "".join(draw.random.choices("abé字", weights=(5, 5, 1, 1), k=draw.random.randint(1, 14)))
            got, want = words._encode_piece(piece), encoded_by_hand(words, piece)
            assert list(got) == want, f"{piece!a}: {len(got)} tokens {got}, wanted {len(want)} {want}"


def test_3_2_a_longer_unit_does_not_jump_the_queue(draw):
    a, b, c = (ord(letter) for letter in "abc")
    words = Tokenizer([(b, c), (a, b), (257, c)], specials=())
    assert words._encode_piece("abc") == [a, 256]
    assert words._encode_piece("abab") == [257, 257]
    assert words._encode_piece("a") == [a]


def test_3_2_a_character_may_lie_in_several_tokens(draw):
    """Bytes are joined before they are read as text."""
    text = "\U0001f600 zwei Würfel, 红色 \u00e9"
    words = Tokenizer([], ("<pad>", "<s>"))
    ids = words.encode(text)
    assert words.decode(ids) == text and words.decode(iter(ids)) == text
    assert words.decode(ids[:3]) == "\ufffd", "half of a character"
    for _ in range(5):
        words = tokenizer(draw)
        piece = "".join(draw.random.choices("abé字", k=9))
        assert words.decode(words.encode(piece)) == piece
    assert words.decode([]) == ""


def test_3_2_specials_are_told_only_when_asked_for(draw):
    words = Tokenizer([], ("<pad>", "<s>", "<image>"))
    ids = [1, 2, *words.encode("a b"), 0]
    assert words.decode(ids) == "a b"
    assert words.decode(ids, specials=True) == "<s><image>a b<pad>"
    assert words.decode([2, 3], specials=True) == "<image>\0" and words.decode([3]) == "\0", "3 is the first byte"


def test_3_2_an_id_that_does_not_exist_is_an_error(draw):
    words = tokenizer(draw, merges=4)
    last = len(words.specials) + 256 + 4 - 1
    assert len(words.decode([last, last]).encode("utf-8", "replace")) > 0
    for wrong in (-100, -1, last + 1):
        for specials in (False, True):
            with pytest.raises(UserError) as error:
                words.decode([5, wrong], specials=specials)
            named = re.findall(r"-?\d+", str(error.value).replace("..", " "))
            assert str(wrong) in named and str(last) in named, f"{error.value}: it must name {wrong} and {last}"


# --- 3.3 the loss of the next word ---

def loss_by_hand(hidden, weight, labels, bias, smoothing):
    """−log p of each next token, one number after the other, in double precision."""
    total, count, V = 0.0, 0, len(weight)
    rows = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    for b in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            if target == -100:
                continue
            scores = rows[b, t].tolist()
            top = max(scores)
            all_of_it = top + math.log(math.fsum(math.exp(score - top) for score in scores))
            even = math.fsum(all_of_it - score for score in scores) / V
            total += (1 - smoothing) * (all_of_it - scores[target]) + smoothing * even
            count += 1
    return total, count


def sentences(draw, hide=True):
    B, T, D, V = draw.sizes(4, 3, 11)
    labels = draw.ids(B, T, low=0, high=V)
    if hide:
        labels = labels.masked_fill(torch.rand(B, T, generator=draw.generator) < 0.35, -100)
        labels[0, 0], labels[0, 1], labels[-1, -1] = 1, 2, 0
    return draw.randn(B, T, D), draw.randn(V, D), labels, draw.randn(V)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_3_3_equals_a_loop(draw, with_bias, smoothing):
    hidden, weight, labels, bias = sentences(draw)
    before, bias = labels.clone(), bias if with_bias else None
    want, count = loss_by_hand(hidden, weight, labels, bias, smoothing)
    for how in ({}, *({"chunk": chunk} for chunk in (1, 2, 3, count - 1, count, count + 1))):
        total, learned = lm_loss(hidden, weight, labels, head_bias=bias, smoothing=smoothing, **how)
        assert int(learned) == count and learned.shape == (), f"{int(learned)} tokens, wanted {count}"
        close(total, torch.tensor(want), 1e-5 * want)
    assert torch.equal(labels, before), "what came in stays as it was"


@pytest.mark.parametrize("chunk", [2, 100])
def test_3_3_gradients(draw, chunk):
    """Against the same sum written with torch's log_softmax in double precision."""
    hidden, weight, labels, bias = (x.double().requires_grad_() if x.is_floating_point() else x for x in sentences(draw))
    got = torch.autograd.grad(lm_loss(hidden, weight, labels, chunk, bias, 0.1)[0], [hidden, weight, bias])
    log_p = (hidden @ weight.T + bias).log_softmax(dim=-1)
    total = sum(-0.9 * log_p[b, t, labels[b, t + 1]] - 0.1 * log_p[b, t].mean()
                for b in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[b, t + 1] != -100)
    for a, b in zip(got, torch.autograd.grad(total, [hidden, weight, bias]), strict=True):
        close(a, b, 1e-5)


def test_3_3_unequal_parts_are_the_whole(draw):
    """Sums and counts of micro-batches add up, so that every trained token weighs the same."""
    hidden, weight, labels, _ = sentences(draw)
    labels[0, 2:], labels[1:, 1] = -100, 1
    whole, count = lm_loss(hidden, weight, labels)
    parts = [lm_loss(hidden[part], weight, labels[part]) for part in (slice(0, 1), slice(1, None))]
    assert int(parts[0][1]) < int(parts[1][1]) and sum(int(n) for _, n in parts) == int(count)
    close(sum(total for total, _ in parts), whole, 1e-4)


def test_3_3_nothing_to_learn_is_a_zero_with_a_gradient(draw):
    hidden, weight, labels, _ = sentences(draw)
    nothing = torch.full_like(labels, -100)
    nothing[:, 0] = 1  # nobody comes before the first token
    for chunk in (3, 8192):
        x = hidden.clone().requires_grad_()
        total, count = lm_loss(x, weight, nothing, chunk)
        assert total.item() == 0 and int(count) == 0
        gradient, = torch.autograd.grad(total / count.clamp(min=1), x)
        assert (gradient == 0).all()


def test_3_3_no_more_logits_are_kept_than_a_chunk(draw):
    """Logits are the largest tensor of a run: of K × V of them what goes backward may remember no more than chunk × V."""
    hidden, weight, labels, _ = sentences(draw, hide=False)
    V, kept = len(weight), []
    hidden.requires_grad_()
    for chunk in (2, 1000):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            lm_loss(hidden, weight, labels, chunk)[0].backward()
        rows = sum(x.numel() // V for x in kept if x.is_floating_point() and x.ndim == 2 and x.shape[-1] == V)
        assert chunk == 1000 or rows <= chunk, f"logits of {rows} tokens are kept, {chunk} are allowed at once"


def test_3_3_half_precision_is_added_up_in_full(draw):
    """Hundreds of tokens in bf16: the sum is fp32, and close to that of the same numbers."""
    hidden, weight, labels = draw.randn(7, 60, 6).bfloat16(), draw.randn(23, 6).bfloat16(), draw.ids(7, 60, low=0, high=23)
    want, count = loss_by_hand(hidden, weight, labels, None, 0.0)
    for chunk in (50, 8192):
        total, _ = lm_loss(hidden, weight, labels, chunk)
        assert total.dtype == torch.float32
        close(total / count, torch.tensor(want / count), 2e-3)


# --- 3.4 one token after the other ---

class Script:
    """A model that says what stands in its script, row by row, and takes note of what it is given."""

    def __init__(self, draw, script, vocab=13):
        self.draw, self.script, self.vocab, self.fed, self.opened = draw, torch.tensor(script), vocab, [], 0

    def logits(self, n):
        with torch.device("cpu"):
            noise = self.draw.randn(len(self.script), self.vocab)
            return noise.scatter(1, self.script[:, n:n + 1], 9.0)

    def prefill(self):
        self.opened += 1
        return self.logits(0), ("cache", 0)

    def step(self, ids, cache):
        assert cache == ("cache", len(self.fed)), "the cache of the step before"
        assert ids.shape == (len(self.script), 1), f"one token a row, this is {tuple(ids.shape)}"
        self.fed.append(ids[:, 0].tolist())
        return self.logits(len(self.fed))[:, None], ("cache", len(self.fed))


def until_stop(script, stop, room, pad):
    """Token by token, row by row."""
    rows = []
    for said in script:
        row = []
        for token in said[:room]:
            row.append(token)
            if stop and row[-len(stop):] == list(stop):
                break
        rows.append(row)
    longest = max(map(len, rows))
    return [row + [pad] * (longest - len(row)) for row in rows]


SCRIPT = [[9, 4, 7, 9, 5, 5, 3, 6], [4, 7, 9, 3, 7, 9, 2, 2], [9, 9, 7, 7, 9, 5, 7, 9], [5, 9, 9, 3, 8, 2, 7, 9]]


@pytest.mark.parametrize("stop", [(9,), (7, 9), (9, 9), (5,), (3, 8, 2), (12,), ()])
@pytest.mark.parametrize("pad", [0, 3])
def test_3_4_says_what_the_script_says(draw, stop, pad):
    for room in (8, 5, 1):
        model = Script(draw, SCRIPT)
        got = list(generation.stream(model.prefill, model.step, room, stop, pad))
        want = until_stop(SCRIPT, stop, room, pad)
        assert [ids.shape for ids in got] == [(4, n + 1) for n in range(len(want[0]))], f"{len(got)} tokens, wanted {len(want[0])}"
        assert got[-1].dtype == torch.int64 and got[-1].tolist() == want
        assert all(ids.tolist() == [row[:n + 1] for row in want] for n, ids in enumerate(got)), "all so far"
        assert model.opened == 1 and model.fed == [list(column) for column in zip(*want)][:-1], "each token is read once, the last not at all"


def test_3_4_ends_with_the_whole_of_stop(draw):
    """Not with its last token only; a text that is shorter than stop has not ended."""
    ids = torch.tensor([[1, 7, 9], [7, 9, 9], [7, 9, 1], [9, 7, 9], [9, 9, 9]])
    for stop, want in (((9,), [1, 1, 0, 1, 1]), ((7, 9), [1, 0, 0, 1, 0]), ((9, 9), [0, 1, 0, 0, 1]), ((1, 7, 9), [1, 0, 0, 0, 0]), ((), [0] * 5),
                       ((9, 9, 9, 9), [0] * 5)):
        got = ends_with(ids, stop)
        assert got.dtype == torch.bool and got.tolist() == [bool(one) for one in want], f"stop {stop}"
    assert ends_with(ids[:, 2:], (9, 9)).tolist() == [False] * 5
    assert ends_with(ids[:, 2:], [9]).tolist() == [True, True, False, True, True]


def test_3_4_how_it_is_chosen_is_handed_on(draw):
    """top_k of 1, or a tiny top_p, draws what greedy search finds; one seed is one text, and another seed another."""
    for how in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}):
        model = Script(draw, SCRIPT)
        *_, ids = generation.stream(model.prefill, model.step, 6, (12,), **{"temperature": 50.0, **how})
        assert ids.tolist() == [row[:6] for row in SCRIPT], f"{how}"
    texts = []
    for seed in (1, 1, 2):
        model = Script(draw, SCRIPT * 3)
        model.logits = lambda n: torch.zeros(12, 13)
        *_, ids = generation.stream(model.prefill, model.step, 6, (12, 12), temperature=2.0, generator=torch.Generator().manual_seed(seed))
        texts.append(ids.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_3_4_made_where_the_logits_are(draw):
    """What is made without `device` lands on "meta" here, as on a GPU it would on the CPU, and does not go with the rest."""
    model = Script(draw, SCRIPT)
    with torch.device("meta"):
        *_, ids = generation.stream(model.prefill, model.step, 6, (7, 9))
    assert ids.device.type == "cpu" and ids.tolist() == until_stop(SCRIPT, (7, 9), 6, 0)
    with torch.device("meta"):
        assert ends_with(ids[:, :1], (7, 9)).device.type == ends_with(ids, ()).device.type == "cpu"


# --- 3.5 which token is taken ---

def likely_by_hand(logits, top_k, top_p):
    """All subsets: of those whose probability reaches top_p the smallest, and of equally small ones the likeliest → a set of tokens."""
    tokens = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k or None]
    weight = {token: math.exp(logits[token] - max(logits)) for token in tokens}
    p = {token: w / math.fsum(weight.values()) for token, w in weight.items()}
    if top_p >= 1:
        return p
    for size in range(1, len(tokens) + 1):
        best = max(combinations(tokens, size), key=lambda chosen: math.fsum(p[token] for token in chosen))
        if (sum_of := math.fsum(p[token] for token in best)) >= top_p:
            return {token: p[token] / sum_of for token in best}
    return p


@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_3_5_all_subsets_of_five_tokens(draw, top_k, top_p):
    logits = 1.5 * draw.randn(7, 5)
    before, got = logits.clone(), keep_likely(logits, top_k, top_p)
    for row, kept in zip(logits.tolist(), got, strict=True):
        want = set(likely_by_hand(row, top_k, top_p))
        assert set(kept.isfinite().nonzero()[:, 0].tolist()) == want, f"{kept.isfinite().sum()} tokens stay, wanted {len(want)}"
        assert all(kept[token] == row[token] for token in want), "what stays, stays as it is"
        assert all(kept[token] == -math.inf for token in range(5) if token not in want)
    assert torch.equal(logits, before), "what came in stays as it was"


def test_3_5_the_token_that_crosses_p_stays(draw):
    """Four tokens of 0.25 each: two are 0.5; three are the first that reach 0.6. At 1 all stay, however sure the first is."""
    for top_p, wanted in ((0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.6, 3), (0.75, 3), (0.76, 4), (1.0, 4)):
        got = keep_likely(torch.zeros(2, 4), 0, top_p).isfinite().sum(dim=1).tolist()
        assert got == [wanted] * 2, f"top_p {top_p}: {got[0]} of 4 stay, wanted {wanted}"
    assert keep_likely(torch.tensor([[200.0, 0, -3, 1]]), 0, 1.0).isfinite().all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.8), (0.7, 4, 0.9)])
def test_3_5_as_often_as_likely(draw, temperature, top_k, top_p):
    """40,000 draws. More than 5 standard deviations off: once in 1.7 million cells, 25 cells here."""
    logits, n = draw.randn(5), 40_000
    drawn = choose(logits.expand(n, 5), temperature, top_k, top_p, draw.generator)
    assert drawn.dtype == torch.int64 and drawn.shape == (n,)
    counts, p = Counter(drawn.tolist()), likely_by_hand([x / temperature for x in logits.tolist()], top_k, top_p)
    for token in range(5):
        want = p.get(token, 0.0)
        assert abs(counts[token] - n * want) <= 5 * math.sqrt(n * want * (1 - want)), f"token {token}: {counts[token] / n:.3f}, wanted {want:.3f}"


def test_3_5_without_temperature_the_likeliest(draw):
    logits = draw.randn(6, 9)
    got = choose(logits, 0.0, 0, 1.0, None)
    assert got.dtype == torch.int64 and got.tolist() == [max(range(9), key=row.__getitem__) for row in logits.tolist()]


def test_3_5_one_seed_is_one_choice(draw):
    logits = draw.randn(1, 30).expand(40, 30)
    one, again, other = (choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(seed)).tolist() for seed in (3, 3, 4))
    assert one == again != other
    assert len(set(one)) > 5, "rows are drawn for themselves"
    assert choose(torch.zeros(3, 1), 1.0, 0, 1.0, None).tolist() == [0] * 3, "who has one word says it"


def test_3_5_half_precision_is_divided_in_full(draw):
    """100 and 101 at a temperature of 0.3 are 3.33 apart; in bf16 they would be 2 or 4. 5 standard deviations, once in 1.7 million."""
    n, p = 40_000, 1 / (1 + math.exp(-1 / 0.3))
    drawn = choose(torch.tensor([100.0, 101.0]).bfloat16().expand(n, 2), 0.3, 0, 1.0, draw.generator)
    assert abs(drawn.sum().item() - n * p) <= 5 * math.sqrt(n * p * (1 - p)), f"{drawn.sum().item() / n:.3f}, wanted {p:.3f}"


# --- 3.6 what a candidate is worth ---

def small_decoder(draw, vocab=17):
    return draw.bite(Decoder(llama(vocab, 12, 2, 2, 20, 40)), 0.4)


def log_p_by_hand(model, prompt, candidate):
    """The whole text at once, without a cache: Σ log p of the candidate's tokens."""
    with torch.no_grad():
        text = torch.tensor([[*prompt, *candidate]])
        log_p = model.logits(model(text)).double().log_softmax(dim=-1)[0]
    return math.fsum(float(log_p[len(prompt) + k - 1, token]) for k, token in enumerate(candidate))


CANDIDATES = [[5], [5, 6], [6, 5, 5, 9], [8, 2], [11, 3, 3], [8], [2, 2, 2, 2, 2]]


def prompts(draw):
    """Padded on the left, as decoders are."""
    rows = [draw.ids(n, low=1, high=17).tolist() for n in (4, 2, 5)]
    ids = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (5 - len(row)) + [True] * len(row) for row in rows])
    return rows, ids, real


def test_3_6_the_sum_of_the_whole_text(draw):
    model, (rows, ids, real), opened = small_decoder(draw), prompts(draw), []

    def prefill():
        opened.append(1)
        return model.prefill(real, ids)

    got = score_candidates(prefill, model.step, CANDIDATES)
    assert len(opened) == 1, "the prompt is read once"
    assert got.dtype == torch.float32 and not got.requires_grad
    close(got, torch.tensor([[log_p_by_hand(model, row, candidate) for candidate in CANDIDATES] for row in rows]), 1e-4)


@pytest.mark.parametrize("shortlist", [1, 2, 4, 7, 20])
def test_3_6_a_shortlist_by_the_first_token(draw, shortlist):
    """Of each row only candidates with the likeliest first tokens are read; the others are −inf."""
    model, (rows, ids, real) = small_decoder(draw), prompts(draw)
    different = [[3, 4], [9, 1, 1], [5], [12, 6], [7, 7], [1, 2, 3], [14]]
    got = score_candidates(lambda: model.prefill(real, ids), model.step, different, shortlist)
    for row, scores in zip(rows, got, strict=True):
        first = [log_p_by_hand(model, row, candidate[:1]) for candidate in different]
        best = sorted(range(len(different)), key=lambda j: -first[j])[:shortlist]
        assert set(scores.isfinite().nonzero()[:, 0].tolist()) == set(best)
        assert all(scores[j] == -math.inf for j in range(len(different)) if j not in best)
        close(scores[best], torch.tensor([log_p_by_hand(model, row, different[j]) for j in best]), 1e-4)


def test_3_6_only_what_has_to_be_read_is_read(draw):
    """A candidate of one token costs no step, and one that is on no row's shortlist none either; its last token is never read."""
    model, (_, ids, real), fed = small_decoder(draw), prompts(draw), []

    def step(ids, cache):
        fed.append(tuple(ids.shape))
        return model.step(ids, cache)

    score_candidates(lambda: model.prefill(real, ids), step, [[5], [8]])
    assert not fed
    score_candidates(lambda: model.prefill(real, ids), step, [[5, 1, 2, 3], [6, 4]])
    assert sorted(fed) == [(3, 1), (3, 3)]
    fed.clear()
    score_candidates(lambda: model.prefill(real, ids), step, [[t, 1, 2] for t in range(3, 13)], shortlist=2)
    assert sum(rows for rows, _ in fed) == 6 and all(rows > 0 for rows, _ in fed), "three rows with two candidates each"


def test_3_6_nothing_is_no_candidate(draw):
    model, (_, ids, real) = small_decoder(draw), prompts(draw)
    for candidates in ([[]], [[5], []]):
        with pytest.raises(ValueError):
            score_candidates(lambda: model.prefill(real, ids), model.step, candidates)


def test_3_6_in_full_precision_and_where_the_logits_are(draw):
    model, (_, ids, real) = small_decoder(draw), prompts(draw)

    def half(logits, cache):
        return logits.bfloat16(), cache

    def step(ids, cache):
        assert ids.device.type == "cpu"
        with torch.device("cpu"):
            return half(*model.step(ids, cache))

    with torch.device("cpu"):
        logits, cache = half(*model.prefill(real, ids))
    with torch.device("meta"):
        got = score_candidates(lambda: (logits, cache), step, CANDIDATES)
    assert got.device.type == "cpu" and got.dtype == torch.float32
    first = logits.double().log_softmax(dim=-1)
    close(got[:, 0], first[:, 5].float(), 1e-4)  # in bf16 it would be off by 0.01
    for candidate in CANDIDATES[1:3]:
        said = []
        got = score_candidates(lambda: (logits, cache), lambda *given: said.append(step(*given)) or said[-1], [candidate])
        log_p = torch.cat([rest for rest, _ in said], dim=1).double().log_softmax(dim=-1)  # of what the model has said, in bf16
        want = first[:, candidate[0]] + sum(log_p[:, k, token] for k, token in enumerate(candidate[1:]))
        close(got[:, 0], want.float(), 1e-4)
