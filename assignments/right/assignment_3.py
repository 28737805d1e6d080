"""Other right solutions, which the grader must let pass: (task, what is different, the file's text)."""

HEAD = "import torch\nfrom torch import Tensor\nfrom torch.nn import functional as F\nimport math\n"
RIGHT = [
    ("3.1", "everything counted afresh for each merge", '''
def _replace_pair(ids, pair, new_id):
    out = []
    rest = list(ids)
    while rest:
        if tuple(rest[:2]) == tuple(pair):
            out, rest = out + [new_id], rest[2:]
        else:
            out, rest = out + rest[:1], rest[1:]
    return out

def _learn_merges(words, counts, wanted, first_id):
    words = [list(word) for word in words]
    merges = []
    for k in range(wanted):
        seen = Counter()
        for word, count in zip(words, counts):
            for left, right in zip(word, word[1:]):
                seen[left, right] += count
        if not seen or max(seen.values()) < 2:
            return merges
        top = max(seen.values())
        best = min(pair for pair in seen if seen[pair] == top)
        words = [_replace_pair(word, best, first_id + k) for word in words]
        merges.append(best)
    return merges
'''),
    ("3.1", "by recursion, and sorted by count", '''
def _replace_pair(ids, pair, new_id):
    for i in range(len(ids) - 1):
        if ids[i] == pair[0] and ids[i + 1] == pair[1]:
            return ids[:i] + [new_id] + _replace_pair(ids[i + 2:], pair, new_id)
    return ids[:]

def pairs_of(words, counts):
    seen = defaultdict(int)
    for ids, n in zip(words, counts):
        for i in range(1, len(ids)):
            seen[(ids[i - 1], ids[i])] += n
    return sorted(seen.items(), key=lambda item: (-item[1], item[0]))

def _learn_merges(words, counts, wanted, first_id):
    merges = []
    while len(merges) < wanted:
        ranked = pairs_of(words, counts)
        if not ranked or ranked[0][1] <= 1:
            break
        best = ranked[0][0]
        for w in range(len(words)):
            words[w] = _replace_pair(words[w], best, first_id + len(merges))
        merges.append(best)
    return merges
'''),
    ("3.2", "all merges in their order, over the whole piece", '''
class Tokenizer:
    def _encode_piece(self, piece):
        ids = [len(self.specials) + b for b in piece.encode("utf-8")]
        for k, (left, right) in enumerate(self.merges):
            i = 0
            while i < len(ids) - 1:
                if ids[i] == left and ids[i + 1] == right:
                    ids[i:i + 2] = [len(self.specials) + 256 + k]
                i += 1
        return ids

    def decode(self, ids, specials=False):
        out = bytearray()
        for i in ids:
            if i < 0 or i >= len(self):
                raise UserError(f"no token {i}: the last one is {len(self) - 1}")
            if i < len(self.specials):
                out += self.specials[i].encode() if specials else b""
            else:
                out += self._bytes[i]
        return bytes(out).decode("utf-8", "replace")
'''),
    ("3.2", "the rank of each pair by searching the list; the bytes of a token by recursion", '''
class Tokenizer:
    def _encode_piece(self, piece):
        base = len(self.specials)
        ids = [base + b for b in utf8(piece)]
        while True:
            ranks = [(self.merges.index(pair), pair) for pair in zip(ids, ids[1:]) if pair in self.merges]
            if not ranks:
                return ids
            rank, pair = min(ranks)
            ids = _replace_pair(ids, pair, base + 256 + rank)

    def spelt(self, i):
        base = len(self.specials)
        if i < base:
            return self.specials[i].encode()
        if i < base + 256:
            return bytes((i - base,))
        left, right = self.merges[i - base - 256]
        return self.spelt(left) + self.spelt(right)

    def decode(self, ids, specials=False):
        ids = [int(i) for i in ids]
        for i in ids:
            if i not in range(len(self)):
                raise UserError(f"{i} is not in 0..{len(self._bytes) - 1}")
        return b"".join(self.spelt(i) for i in ids if specials or i >= len(self.specials)).decode(errors="replace")
'''),
    ("3.3", "a loop over rows; the loss from log_softmax; always through checkpoint", HEAD + '''
def lm_loss(hidden, head_weight, labels, chunk=8192, head_bias=None, smoothing=0.0):
    states, targets = [], []
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != IGNORE:
                states.append(hidden[b, t - 1])
                targets.append(labels[b, t])
    total = (hidden * 0).sum().float()
    for first in range(0, len(states), chunk):
        some, right = torch.stack(states[first:first + chunk]), torch.stack(targets[first:first + chunk])
        total = total + checkpoint(chunk_loss, some, head_weight, right, head_bias, smoothing, use_reentrant=False)
    return total, torch.tensor(len(states))

def chunk_loss(states, head_weight, targets, head_bias, smoothing):
    logits = (states @ head_weight.T).float()
    if head_bias is not None:
        logits = logits + head_bias
    log_p = logits.log_softmax(dim=-1)
    right = log_p.gather(1, targets[:, None]).sum()
    return -(1 - smoothing) * right - smoothing * log_p.mean(dim=1).sum()
'''),
    ("3.3", "flattened, with the places of what is learned, and no helper", HEAD + '''
def lm_loss(hidden, head_weight, labels, chunk=8192, head_bias=None, smoothing=0.0):
    B, T, D = hidden.shape
    following = torch.cat([labels[:, 1:], labels.new_full((B, 1), IGNORE)], dim=1).reshape(-1)
    places = (following != IGNORE).nonzero()[:, 0]
    flat = hidden.reshape(-1, D)

    def of(places):
        return F.cross_entropy(F.linear(flat[places], head_weight, head_bias).float(), following[places], reduction="sum",
                               label_smoothing=smoothing)

    total = flat.float().sum() * 0
    for some in places.split(chunk):
        if len(some):
            total = total + checkpoint(of, some, use_reentrant=False)
    return total, torch.tensor(len(places), device=labels.device)
'''),
    ("3.4", "a growing text, and a set of the rows that go on", HEAD + '''
def stream(prefill, step, max_new_tokens, stop, pad=0, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    logits, cache = prefill()
    B = len(logits)
    ids = torch.zeros(B, 0, dtype=torch.int64, device=logits.device)
    running = set(range(B))
    while ids.shape[1] < max_new_tokens:
        if ids.shape[1]:
            logits, cache = step(ids[:, -1:], cache)
            logits = logits[:, -1]
        new = choose(logits, temperature, top_k, top_p, generator)
        new = torch.stack([new[b] if b in running else torch.full_like(new[b], pad) for b in range(B)])
        ids = torch.cat([ids, new[:, None]], dim=1)
        yield ids
        ended = ends_with(ids, stop).tolist()
        running -= {b for b in range(B) if ended[b]}
        if not running:
            break

def ends_with(ids, stop):
    stop = list(stop)
    verdicts = [len(stop) > 0 and row[-len(stop):] == stop for row in ids.tolist()]
    return torch.tensor(verdicts, dtype=torch.bool, device=ids.device)
'''),
    ("3.4", "first token outside of the loop; stop compared from behind, token by token", HEAD + '''
def stream(prefill, step, max_new_tokens, stop, pad=0, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    logits, cache = prefill()
    text = [choose(logits, temperature, top_k, top_p, generator)]
    yield torch.stack(text, dim=1)
    over = ends_with(torch.stack(text, dim=1), stop)
    for _ in range(max_new_tokens - 1):
        if bool(over.all()):
            return
        logits, cache = step(text[-1].unsqueeze(1), cache)
        new = choose(logits.squeeze(1), temperature, top_k, top_p, generator)
        text.append(torch.where(over, torch.full_like(new, pad), new))
        yield torch.stack(text, dim=1)
        over = torch.logical_or(over, ends_with(torch.stack(text, dim=1), stop))

def ends_with(ids, stop):
    n = ids.shape[1]
    same = torch.full((len(ids),), 0 < len(stop) <= n, dtype=torch.bool, device=ids.device)
    for back, token in enumerate(reversed(stop), 1):
        if back <= n:
            same = same & (ids[:, n - back] == token)
    return same
'''),
    ("3.5", "row by row; drawn by searching the cumulated probabilities", HEAD + '''
def choose(logits, temperature, top_k, top_p, generator):
    if not temperature:
        return torch.tensor([int(row.argmax()) for row in logits])
    p = torch.softmax(keep_likely(logits.double() / temperature, top_k, top_p), dim=-1)
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(p.cumsum(-1), u, right=True)[:, 0].clamp(max=p.shape[1] - 1)

def keep_likely(logits, top_k, top_p):
    out = torch.full_like(logits, -math.inf)
    for b in range(len(logits)):
        ranked = logits[b].argsort(descending=True)
        if top_k > 0:
            ranked = ranked[:top_k]
        if top_p < 1:
            p, reached, n = logits[b][ranked].softmax(-1), 0.0, 0
            while n < len(ranked) and reached < top_p:
                reached += float(p[n])
                n += 1
            ranked = ranked[:n]
        out[b, ranked] = logits[b, ranked]
    return out
'''),
    ("3.5", "the threshold of the last token that stays; Gumbel's way to draw", HEAD + '''
def choose(logits, temperature, top_k, top_p, generator):
    if temperature == 0:
        return torch.max(logits, dim=1).indices
    likely = keep_likely(logits.float() / temperature, top_k, top_p)
    noise = -torch.empty_like(likely).exponential_(generator=generator).log()
    return (likely + noise).argmax(dim=1)

def keep_likely(logits, top_k, top_p):
    V = logits.shape[-1]
    if 0 < top_k < V:
        kth = logits.sort(dim=-1).values[:, V - top_k, None]
        logits = torch.where(logits >= kth, logits, torch.full_like(logits, -math.inf))
    if top_p >= 1:
        return logits
    p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = torch.cat([torch.zeros_like(p[:, :1]), p.cumsum(-1)[:, :-1]], dim=1)
    stays = torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before < top_p)
    return logits.masked_fill(~stays, -math.inf)
'''),
    ("3.6", "token by token, each on a copy of its own", HEAD + '''
@torch.no_grad()
def score_candidates(prefill, step, candidates, shortlist=0):
    if any(len(candidate) == 0 for candidate in candidates):
        raise ValueError("nothing to score")
    logits, cache = prefill()
    B, C = len(logits), len(candidates)
    log_p = logits.float().log_softmax(-1)
    first = torch.stack([log_p[:, candidate[0]] for candidate in candidates], dim=1)
    scores = torch.full((B, C), float("-inf"), device=logits.device)
    for b in range(B):
        order = first[b].argsort(descending=True).tolist()
        for j in order[:shortlist] if shortlist else order:
            scores[b, j] = first[b, j]
    for j, candidate in enumerate(candidates):
        rows = torch.isfinite(scores[:, j]).nonzero()[:, 0]
        if len(candidate) == 1 or not len(rows):
            continue
        read = torch.tensor([candidate[:-1]] * len(rows), device=logits.device)
        after, _ = step(read, cache.reorder(rows))
        after = after.float().log_softmax(-1)
        for k, token in enumerate(candidate[1:]):
            scores[rows, j] += after[:, k, token]
    return scores
'''),
    ("3.6", "the loss of the rest, by cross-entropy", HEAD + '''
@torch.no_grad()
def score_candidates(prefill, step, candidates, shortlist=0):
    candidates = [list(candidate) for candidate in candidates]
    if [] in candidates:
        raise ValueError("a candidate is empty")
    logits, cache = prefill()
    starts = torch.tensor([candidate[0] for candidate in candidates], device=logits.device)
    scores = logits.float().log_softmax(-1).index_select(1, starts)
    if 0 < shortlist < len(candidates):
        out = torch.ones_like(scores, dtype=torch.bool)
        out.scatter_(1, scores.argsort(dim=1, descending=True)[:, :shortlist], False)
        scores = scores.masked_fill(out, -math.inf)
    for j, candidate in enumerate(candidates):
        rows = (scores[:, j] > -math.inf).nonzero().flatten()
        if len(candidate) > 1 and rows.numel():
            text = torch.tensor(candidate, device=logits.device).repeat(len(rows), 1)
            rest = step(text[:, :-1], cache.reorder(rows))[0].float()
            scores[rows, j] -= F.cross_entropy(rest.transpose(1, 2), text[:, 1:], reduction="none").sum(1)
    return scores
'''),
]
