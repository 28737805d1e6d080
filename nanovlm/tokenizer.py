"""Byte-level byte-pair encoding (BPE), all of it: learn the merges, text to ids, ids to text.

Idea: start from the 256 bytes, so that no text is ever unknown, and let the corpus vote for longer units: again and
again the most frequent pair of neighbours becomes one new token. Frequent words end as single tokens, rare ones as a
few pieces. Papers: Sennrich et al. 2016 (arXiv:1508.07909), Section 3.2, Algorithm 1 (the merges); Radford et al. 2019
(GPT-2), Section 2.2 (bytes as the base; no merge across kinds of characters); single digits as in LLaMA
(arXiv:2302.13971), Section 2.1.

    "two red cubes\n"
          │ SPLIT: pieces that no merge may cross
    ["two", " red", " cubes", "\n"]
          │ UTF-8 bytes, each byte one token
    [t w o] [␣ r e d] [␣ c u b e s] [\n]
          │ the learned merges, earliest learned first (r e → re, ␣ re → ␣re, ...)
    [two] [␣red] [␣cube s] [\n]
          │ numbers
    [301, 275, 340, 119, 14]

    ids:  0 .. S-1  specials  │  S .. S+255  bytes  │  S+256 ..  merges, in the order in which they were learned

Specials (<pad>, <s>, </s>, <image>, and those of Flamingo, BLIP and BERT) take part in no merge: ordinary text can never turn into one. A user who types
"</s>" gets a few ordinary tokens; only code that asks with `encode(text, specials=True)` gets the id.

Differs from GPT-2 in: single digits; a newline is always its own piece; pieces are cut after 64 characters, which
bounds the cost of a line without spaces; a pair seen only once is not merged; bytes stay bytes (GPT-2's files write
each as a printable character).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from nanovlm.errors import UserError

# What no merge may cross. The space in front belongs to the word behind it, so that a word costs one token and not two.
SPLIT = re.compile(
    r"\n"                                # a newline is its own piece: "caption\n" always ends in the same token
    r"| ?[^\W\d_]{1,64}"                 # a run of letters of any script
    r"|\d"                               # one digit, without the space: a 7 is the same token wherever it stands
    r"| ?(?:[^\w\s]|_){1,64}"            # a run of punctuation, symbols, emoji
    r"|[^\S\n]{1,64}(?!\S)|[^\S\n]"      # white space; of a run before a word, the last character is left to the word
)
CACHE_SIZE = 200_000  # pieces remembered by encode; text that never repeats itself must not fill the memory

Pair = tuple[int, int]


class Tokenizer:
    SPECIALS = ("<pad>", "<s>", "</s>", "<image>", "<EOC>", "[ENC]", "[DEC]", "[MASK]")

    def __init__(self, merges: list[Pair], specials: tuple[str, ...] = SPECIALS):
        """`merges[k]` is the pair of ids that became token `len(specials) + 256 + k`."""
        self.specials = tuple(specials)
        self.merges = [(left, right) for left, right in merges]
        base = len(self.specials)
        self._bytes = [name.encode("utf-8") for name in self.specials] + [bytes([b]) for b in range(256)]
        for left, right in self.merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._merged = {pair: base + 256 + k for k, pair in enumerate(self.merges)}
        self._special_ids = {name: i for i, name in enumerate(self.specials)}
        # Longest first: with "<s>" and "<s>2" both special, the text "<s>2" is the second one.
        names = sorted(self.specials, key=len, reverse=True)
        self._special_split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._cache: dict[str, list[int]] = {}

    # ---- learning

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: tuple[str, ...] = SPECIALS) -> "Tokenizer":
        """Learn merges until there are `vocab_size` tokens, or fewer where the texts hold too few repeated pairs."""
        smallest = len(specials) + 256
        if vocab_size < smallest:
            raise UserError(f"vocab_size {vocab_size} is too small: {len(specials)} specials + 256 bytes = {smallest}.")
        counts = Counter()
        for text in texts:
            counts.update(SPLIT.findall(text))
        words = [[byte + len(specials) for byte in utf8(piece)] for piece in counts]
        merges = _learn_merges(words, list(counts.values()), vocab_size - smallest, first_id=smallest)
        return cls(merges, specials)

    # ---- text to ids and back

    def encode(self, text: str, specials: bool = False, before: str | int | None = None) -> list[int]:
        """The ids of `text`. Only with specials=True does "<image>" in it mean the special token.

        before: what it stands behind, which plays no part here; see published_tokenizer.py.
        """
        if not specials or self._special_split is None:
            return self._encode_ordinary(text)
        ids = []
        for part in self._special_split.split(text):  # the capture group keeps the specials in the list
            special = self._special_ids.get(part)
            ids += self._encode_ordinary(part) if special is None else [special]
        return ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of `ids`; special tokens are dropped unless specials=True; broken UTF-8 becomes U+FFFD.

        An id that the vocabulary does not have, as −100 of labels, is a UserError that names it and the largest id that there is.
        """
        first = 0 if specials else len(self.specials)
        chunks = []
        for i in ids:
            if not 0 <= i < len(self):  # -100 from labels would otherwise quietly count from the end
                raise UserError(f"Token id {int(i)} is outside the vocabulary 0..{len(self) - 1}; "
                                "drop ignored labels (-100) before decoding.")
            if i >= first:
                chunks.append(self._bytes[i])
        return b"".join(chunks).decode("utf-8", errors="replace")

    def _encode_ordinary(self, text: str) -> list[int]:
        ids = []
        for piece in SPLIT.findall(text):
            known = self._cache.get(piece)
            if known is None:
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                known = self._cache[piece] = self._encode_piece(piece)
            ids += known
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        """Apply the merges in the order in which they were learned, which is the order of their ids."""
        ids = [byte + len(self.specials) for byte in utf8(piece)]
        while len(ids) > 1:
            best = min(pairwise(ids), key=lambda pair: self._merged.get(pair, len(self)))
            if best not in self._merged:
                break
            ids = _replace_pair(ids, best, self._merged[best])
        return ids

    # ---- ids with a meaning

    def __len__(self) -> int:
        return len(self._bytes)

    def token_id(self, special: str) -> int:
        if special not in self._special_ids:
            raise UserError(f"This tokenizer has no special token {special!r}; it has {', '.join(self.specials)}.")
        return self._special_ids[special]

    @property
    def bridge(self) -> "Tokenizer":
        """Of a Q-Former that reads: ours reads the language model's words."""
        return self

    @property
    def pad_id(self) -> int:
        return self.token_id("<pad>")

    @property
    def bos_id(self) -> int:
        return self.token_id("<s>")

    @property
    def eos_id(self) -> int:
        return self.token_id("</s>")

    @property
    def image_id(self) -> int:
        return self.token_id("<image>")

    # ---- to plain values, as checkpoints hold them, and back

    def to_dict(self) -> dict:
        return {"specials": list(self.specials), "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_dict(cls, d: dict, name: str = "the tokenizer") -> "Tokenizer":
        """The inverse of to_dict; `name` says in messages where `d` comes from."""
        specials, merges = _validated(d, name)
        return cls(merges, specials)


def utf8(piece: str) -> bytes:
    try:
        return piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"The text has the lone surrogate {piece[error.start]!a} in {piece!a}: half of a character, "
                        "which UTF-8 cannot write; repair the text where it was read.") from error


def _replace_pair(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Every occurrence of `pair` from left to right: (a a) in [a, a, a] gives [new, a]."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def _learn_merges(words: list[list[int]], counts: list[int], wanted: int, first_id: int) -> list[Pair]:
    """Sennrich et al., Algorithm 1, on distinct words and their counts → the pairs in order: merge k makes token first_id + k.

    words: the ids of each; counts: how often each word was met. The most frequent pair of neighbours is merged, of equally frequent ones
    the smaller; none that was met only once, and no more than `wanted`. In [a, a, a] the pair (a, a) counts twice.

    Counting all pairs afresh for each merge would cost (merges x corpus). Only words that hold the merged pair change,
    so `where` remembers which words have held a pair, and only their old pairs are taken off and their new pairs added.
    """
    pair_counts: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for w, ids in enumerate(words):
        for pair in pairwise(ids):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    merges = []
    while len(merges) < wanted and pair_counts:
        # Ties go to the lexicographically smaller pair of ids: the same texts give the same tokenizer, in any order.
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        if pair_counts[best] < 2:
            break
        for w in where.pop(best):
            merged = _replace_pair(words[w], best, first_id + len(merges))
            for pair in pairwise(words[w]):
                pair_counts[pair] -= counts[w]
                if pair_counts[pair] == 0:
                    del pair_counts[pair]
            for pair in pairwise(merged):
                pair_counts[pair] += counts[w]
                where[pair].add(w)
            words[w] = merged
        merges.append(best)
    return merges


def _validated(d: dict, name: str) -> tuple[tuple[str, ...], list[Pair]]:
    """The two fields of to_dict, or a UserError that names the file and the field."""
    if not isinstance(d, dict):
        raise UserError(f"{name}: a tokenizer is a JSON object with the fields specials and merges.")
    for field in ("specials", "merges"):
        if not isinstance(d.get(field), list):
            raise UserError(f"{name}: field {field} is missing or is not a list.")
    specials = d["specials"]
    if not all(isinstance(s, str) and s for s in specials) or len(set(specials)) != len(specials):
        raise UserError(f"{name}: field specials must hold different, non-empty strings.")
    seen = set()
    for k, pair in enumerate(d["merges"]):
        known = range(len(specials), len(specials) + 256 + k)  # bytes and earlier merges: specials are never merged
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(i) is int and i in known for i in pair):
            raise UserError(f"{name}: field merges[{k}] needs two ids of {known.start}..{known.stop - 1}, not {pair}.")
        if tuple(pair) in seen:
            raise UserError(f"{name}: field merges[{k}] repeats the earlier merge {pair}.")
        seen.add(tuple(pair))
    return tuple(specials), [tuple(pair) for pair in d["merges"]]
