"""The yardsticks: VQA accuracy, exact match, BLEU, CIDEr-D, recall@k. Plain functions; nothing here knows a model.

    prediction ──► normalise_answer ──► vqa_accuracy      one question against its answers
               ──► exact_match                            one text against its references
    captions   ──► words ──► n-grams ──► bleu, cider      a whole corpus against its references
    similarity ──► recall_at_k                            a matrix of scores against the pairs that count as right

VQA accuracy  Antol et al. 2015 (arXiv:1505.00468), Section 4, and the rules published with the VQA evaluation.
BLEU          Papineni et al. 2002, Section 2:   BLEU = BP · exp(Σ_n 1/N · log p_n),   BP = min(1, exp(1 − r/c))
CIDEr-D       Vedantam et al. 2015 (arXiv:1411.5726), Sections 3 and 6:
    g_n(s)      tf-idf vector over the n-grams of s:   count · log(number of images / images whose references have it)
    sim_n(c,s)  min(g_n(c), g_n(s)) · g_n(s) / (|g_n(c)| |g_n(s)|) · exp(−(l(c) − l(s))² / 2σ²),   σ = 6
    CIDEr-D     10 · mean of sim_n over references s and n = 1..4;   then the mean over the corpus

Shapes: Q queries, G gallery items.

Differs from the released code in: `vqa_accuracy` normalises even where all ten answers are equal (the released script
then compares raw strings, so "Yes" is wrong where all ten said "yes"), and an answer that the rules erase (the letter
"a" is taken for an article) is compared as it stands. `words` replaces the Java PTB tokenizer: BLEU and CIDEr may move
a little against published tables.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

from nanovlm.errors import UserError

_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(n) for n, word in enumerate(_COUNTING)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # 3.5 keeps its point, "red." and "a.m." lose theirs

# The published table has a line for each spelling with one apostrophe missing (dont, couldnt've, couldn'tve). The
# right spellings are enough to make it; what is also another word without it (well, wed, its, ill) is not in the table.
_RIGHT_SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _RIGHT_SPELLINGS.split()
    for i, letter in enumerate(word)
    if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # stands the wrong way round in the published table; kept as published


# ---- answers


def normalise_answer(answer: str) -> str:
    """The official VQA rules: "Two dogs, a cat." → "2 dogs cat"."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    digits_with_comma = COMMA_IN_NUMBER.search(text)
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        # Nowhere beside a space, a mark separates words (red/blue → red blue); otherwise all of its kind just vanish.
        out = out.replace(mark, "" if beside_space or digits_with_comma else " ")
    numbered = [NUMBER_WORDS.get(word, word) for word in PERIOD.sub("", out).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Ten answers are ten people's votes; any other number of answers is a list of texts that are all right.

    Votes: min(number of people who said it / 3, 1), where each person in turn is left out and the ten values are
    averaged, as people are scored against each other. So 1, 2, 3, 4 votes give 0.3, 0.6, 0.9, 1.0.
    """
    if not answers:
        raise UserError(f"The prediction {prediction!r} has no reference answer to be compared with.")
    said, truths = _comparable(prediction), [_comparable(answer) for answer in answers]
    if len(truths) != 10:
        return float(said in truths)
    votes = sum(said == truth for truth in truths)
    return sum(min((votes - (said == left_out)) / 3, 1.0) for left_out in truths) / 10


def _comparable(answer: str) -> str:
    return normalise_answer(answer) or answer.strip().lower()  # the letter "A" must not equal an empty prediction


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Equal to one of the references; only case and white space may differ."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    return plain(prediction) in {plain(reference) for reference in references}


def is_sentence(text: str) -> bool:
    """Three words or more and a full stop: what an answer is when no word or phrase was asked for."""
    return text.endswith(".") and len(text.split()) >= 3


# ---- letters

def option_letter(text: str) -> str | None:
    """The letter that a text decides for: it is nothing else, or begins "B. ", or says "The answer is B." once (ScienceQA's
    scorer, LLaVA's eval_science_qa.py); two such sentences are no decision.
    """
    text = text.strip()
    if found := re.fullmatch(r"([A-Z])(\. .*)?", text, re.DOTALL):
        return found[1]
    hits = re.findall(r"The answer is ([A-Z])\.", text)
    return hits[0] if len(hits) == 1 else None


def same_letter(prediction: str, truth: str) -> float:
    return float(option_letter(prediction) is not None and option_letter(prediction) == option_letter(truth))


# ---- boxes

def box_hit(prediction: str, truth: str) -> float:
    """1 where the box that is said overlaps the right one by half of their union or more (RefCOCO), else 0."""
    said, right = _box(prediction), _box(truth)
    return float(said is not None and intersection_over_union(said, right) >= 0.5)


def _box(text: str) -> tuple[float, ...] | None:
    """The four numbers of "[0.10, 0.25, 0.40, 0.50]"; None if there are not four, or if they make no box."""
    numbers = tuple(float(number) for number in re.findall(r"\d+\.?\d*", text))
    return numbers if len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3] else None


def intersection_over_union(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Of two boxes, each left, top, right, bottom."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)


# ---- captions

WORD = re.compile(
    r"\w+?(?=n't\b)|n't\b"  # PTB splits clitics: don't → do n't
    r"|'(?:s|re|ve|ll|d|m)\b"  # it's → it 's
    r"|\d+(?:[.,:]\d+)+"  # 3.5  1,000  10:30
    r"|\w+(?:-\w+)*"  # black-and-white is one word
)


def words(text: str) -> list[str]:
    """Lower-case words in the manner of the Penn Treebank; punctuation is dropped, as in COCO's caption evaluation."""
    return WORD.findall(text.lower().replace("’", "'"))


def _ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
    """Corpus BLEU-n in 0..1: counts are summed over the corpus before anything is divided."""
    _check_captions(candidates, references)
    matched, proposed = [0] * n, [0] * n
    candidate_length = reference_length = 0
    for candidate, truths in zip(candidates, references, strict=True):
        said, truths = words(candidate), [words(truth) for truth in truths]
        candidate_length += len(said)
        # the closest reference length; of two equally close ones, the shorter
        reference_length += min((len(truth) for truth in truths), key=lambda length: (abs(length - len(said)), length))
        for k in range(n):
            grams = _ngrams(said, k + 1)
            allowed = Counter()
            for truth in truths:
                allowed |= _ngrams(truth, k + 1)  # the largest count that any single reference has
            matched[k] += (grams & allowed).total()  # clipped: "the the the" earns no more than a reference holds
            proposed[k] += grams.total()
    if min(matched) == 0:
        return 0.0  # log 0: one order without any match makes the geometric mean zero
    mean_log = sum(math.log(m / p) for m, p in zip(matched, proposed, strict=True)) / n
    return math.exp(min(0.0, 1 - reference_length / candidate_length) + mean_log)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> float:
    """CIDEr-D of the corpus, 0..10. The idf is that of the references given: figures of two corpora do not compare,
    and a corpus of one image scores 0, since no n-gram tells its only image from the others."""
    return sum(cider_of_each(candidates, references, sigma)) / len(candidates)


def cider_of_each(candidates: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> list[float]:
    """What each caption adds to the corpus's mean."""
    _check_captions(candidates, references)
    truths = [[words(truth) for truth in several] for several in references]
    images_with = Counter()  # document frequency: in how many images does any reference have the n-gram
    for several in truths:
        images_with.update({gram for truth in several for n in range(1, 5) for gram in _ngrams(truth, n)})

    def vector(tokens: list[str], n: int) -> dict[tuple[str, ...], float]:
        return {g: count * math.log(len(truths) / max(1, images_with[g])) for g, count in _ngrams(tokens, n).items()}

    def score(candidate: str, several: list[list[str]]) -> float:
        said, total = words(candidate), 0.0
        said_vectors = {n: vector(said, n) for n in range(1, 5)}
        for truth in several:
            length_penalty = math.exp(-((len(said) - len(truth)) ** 2) / (2 * sigma**2))
            cosines = sum(_clipped_cosine(said_vectors[n], vector(truth, n)) for n in range(1, 5))
            total += 10 * length_penalty * cosines / 4 / len(several)
        return total

    return [score(candidate, several) for candidate, several in zip(candidates, truths, strict=True)]


def _clipped_cosine(said: dict, truth: dict) -> float:
    dot = sum(min(value, truth.get(gram, 0.0)) * truth.get(gram, 0.0) for gram, value in said.items())
    norms = math.hypot(*said.values()) * math.hypot(*truth.values())
    return dot / norms if norms else 0.0


def _check_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise UserError(f"{len(candidates)} captions and {len(references)} lists of references: give one per caption.")
    for i, several in enumerate(references):
        if isinstance(several, str) or not several:
            raise UserError(f"references[{i}] must be a list with at least one caption, not {several!r}.")


# ---- retrieval


def recall_at_k(similarity: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    """The share of queries with a relevant item among their k best. similarity and relevant (bool): (Q, G).

    Ties and NaN count against the model: an item that is irrelevant and not strictly worse stands before. A model that
    gives every pair the same score has recall 0 and not, by the luck of the order, 1.
    """
    if similarity.shape != relevant.shape:
        raise UserError(f"similarity {tuple(similarity.shape)} and relevant {tuple(relevant.shape)} differ in shape.")
    without = (~relevant.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise UserError(f"Query {without[0]} has no relevant item in the gallery, so its recall is not defined.")
    best = similarity.masked_fill(~relevant, float("-inf")).amax(dim=1, keepdim=True)  # (Q, 1)
    before = (~relevant & ~(similarity < best)).sum(dim=1)  # (Q,)
    return (before < k).float().mean().item()


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """How often a positive one scores higher than another one, a tie counting half: the area under the ROC curve.

    By ranks (Mann and Whitney's U); nan where there is no positive or no other.
    """
    score, is_positive = torch.tensor(scores, dtype=torch.float64), torch.tensor(positive)
    values, place, often = score.unique(return_inverse=True, return_counts=True)  # equal scores share the mean of their ranks
    ranks = (often.cumsum(0) - (often - 1) / 2)[place]  # from 1 on
    n, m = int(is_positive.sum()), int((~is_positive).sum())
    return (ranks[is_positive].sum().item() - n * (n + 1) / 2) / (n * m) if n and m else float("nan")
