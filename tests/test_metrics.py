"""The yardsticks: numbers worked out by hand in the comments, and the COCO caption scorers as independent oracle."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer

from nanovlm.errors import UserError
from nanovlm.metrics import bleu, cider, exact_match, is_sentence, normalise_answer, recall_at_k, vqa_accuracy, words

# ---- answers


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  The Red\tcube.\n", "red cube"),
        ("one", "1"),
        ("None", "0"),
        ("Ten dogs, and an apple", "10 dogs and apple"),
        ("eleven", "eleven"),  # the published number words end at ten
        ("at the end", "at end"),
        ("theatre", "theatre"),  # articles are whole words
        ("dont", "don't"),
        ("Isnt it", "isn't it"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("well", "well"),  # not we'll
        ("somebody'd", "somebodyd"),  # as published
        ("red/blue", "red blue"),  # a mark between letters becomes a space
        ("red / blue", "red blue"),  # beside spaces it is dropped
        ("red-and-blue, t-shirt", "red and blue t shirt"),  # "-" has no space beside it, "," has one
        ("is it red? blue?green", "is it red bluegreen"),  # one "?" beside a space: every "?" is dropped, not spaced
        ("1,000", "1000"),  # a comma between digits: marks are dropped
        ("1,000/day", "1000day"),  # ... all of them, as published
        ("3.5", "3.5"),
        ("10 a.m.", "10 am"),
        (".5", ".5"),
        ("$5: yes'", "$5: yes'"),  # $ : ' are not in the published list
        ("", ""),
        ("the", ""),
    ],
)
def test_normalisation_follows_the_published_rules(answer, normal):
    assert normalise_answer(answer) == normal


@pytest.mark.parametrize(("votes", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers_are_votes_with_leave_one_out(votes, score):
    # 2 votes: leaving out a voter for it (2 of 10) leaves 1 → 1/3; leaving out another (8 of 10) leaves 2 → 2/3.
    # (2 · 1/3 + 8 · 2/3) / 10 = 18/30 = 0.6. Likewise 3: (3 · 2/3 + 7 · 1) / 10 = 0.9, and 4 leave at least 3: 1.
    answers = ["two dogs"] * votes + [f"other {i}" for i in range(10 - votes)]
    assert vqa_accuracy("The 2 dogs.", answers) == pytest.approx(score)
    assert vqa_accuracy("The 2 dogs.", answers[::-1]) == pytest.approx(score)


def test_other_numbers_of_answers_are_alternatives():
    assert vqa_accuracy("Red.", ["red"]) == 1.0 and vqa_accuracy("dark red", ["red"]) == 0.0
    assert vqa_accuracy("grey", ["gray", "Grey"]) == 1.0
    assert vqa_accuracy("grey", ["gray"] * 8 + ["grey"]) == 1.0 == vqa_accuracy("grey", ["gray"] * 10 + ["grey"])


def test_an_answer_that_is_only_an_article_is_not_equal_to_silence():
    assert vqa_accuracy("A", ["a"]) == 1.0
    assert vqa_accuracy("", ["a"]) == 0.0 and vqa_accuracy("the", ["a"]) == 0.0 and vqa_accuracy("?", ["a"]) == 0.0
    with pytest.raises(UserError, match="no reference answer"):
        vqa_accuracy("red", [])


def test_exact_match_forgives_case_and_white_space_only():
    references = ["a red cube", "one red  cube\n"]
    assert exact_match(" A red\tcube ", references) and exact_match("one red cube", references)
    assert not exact_match("red cube", references) and not exact_match("a red cube.", references)
    assert not exact_match("a red cube", [])


# ---- captions


def test_words_are_split_as_documented():
    said = words("A man's dog doesn't like black-and-white 3.5-inch “TVs”, can’t it?  (東京)")
    assert " ".join(said) == "a man 's dog does n't like black-and-white 3.5 inch tvs ca n't it 東京"


def test_bleu_by_hand():
    """
    "the cat the cat on mat" against {"the cat is on the mat", "there is a cat on the mat"}.
    c = 6, the references have 6 and 7 words, r = 6: BP = 1.
    1-grams: the ×2 (at most 2: ok), cat ×2 (at most 1), on, mat                          2+1+1+1 = 5 of 6
    2-grams: the-cat ×2 (1), cat-the (0), cat-on (1, second reference), on-mat (0)        2 of 5
    3-grams: the-cat-the, cat-the-cat, the-cat-on, cat-on-mat: none                       0 of 4
    """
    said, truths = ["the cat the cat on mat"], [["the cat is on the mat", "there is a cat on the mat"]]
    assert bleu(said, truths, n=1) == pytest.approx(5 / 6)
    assert bleu(said, truths, n=2) == pytest.approx(math.sqrt(5 / 6 * 2 / 5))
    assert bleu(said, truths, n=3) == 0.0


def test_bleu_brevity_penalty_takes_the_closest_reference_and_the_shorter_of_two():
    # c = 4; references of 3 and 5 words are equally close: r = 3, no penalty.  Of 5 and 9 words: r = 5, exp(1 − 5/4).
    assert bleu(["a b c d"], [["a b c", "a b c d e"]], n=1) == pytest.approx(1.0)
    assert bleu(["a b c d"], [["a b c d e", "a b c d e f g h i"]], n=1) == pytest.approx(math.exp(-1 / 4))


def test_bleu_is_of_the_corpus_and_not_the_mean_of_sentences():
    # sentence 1: 1 of 1 right, sentence 2: 1 of 3 right; the corpus has 2 of 4, the mean would be 2/3.
    assert bleu(["x", "x y z"], [["x"], ["x q r"]], n=1) == pytest.approx(2 / 4)


def test_cider_by_hand():
    """
    Three images, one reference each: "red cube", "red ball", "blue cone". Candidate 1 says "red ball".
    idf over N = 3 images: red ln(3/2) = 0.405465 =: s;  cube, ball, red-cube, red-ball ln(3/1) = 1.098612 =: b.
    1-grams: g(c) = {red: s, ball: b}, g(r) = {red: s, cube: b}: min(s, s)·s / (s² + b²) = s²/(s² + b²) = 0.119879...
    2-grams: red-ball against red-cube: 0.  3- and 4-grams: none: 0.  Lengths equal: penalty 1.
    CIDEr of image 1 = 10/4 · 0.1198...;  images 2 and 3, said exactly: (1 + 1 + 0 + 0)/4 · 10 = 5.
    """
    s, b = math.log(3 / 2), math.log(3)
    by_hand = (10 / 4 * s * s / (s * s + b * b) + 5 + 5) / 3
    truths = [["red cube"], ["red ball"], ["blue cone"]]
    assert cider(["red ball", "red ball", "blue cone"], truths) == pytest.approx(by_hand)
    # Clipping and length: "red red cube" for "red cube". 1-grams: g(c) = {red: 2s, cube: b}; dot = min(2s, s)·s + b·b;
    # norms sqrt(4s² + b²) and sqrt(s² + b²). 2-grams {red-red: ln 3, red-cube: ln 3} against {red-cube}: 1/sqrt(2).
    # 3-gram red-red-cube against nothing: 0. One word longer: exp(−1/72).
    unigrams = (s * s + b * b) / math.sqrt((4 * s * s + b * b) * (s * s + b * b))
    first = 10 * math.exp(-1 / 72) * (unigrams + 1 / math.sqrt(2)) / 4
    assert cider(["red red cube", "red ball", "blue cone"], truths) == pytest.approx((first + 5 + 5) / 3)


def test_cider_of_the_right_captions_is_ten_and_of_swapped_ones_is_low():
    truths = [["a small red cube left of a ball"], ["two green cones on a table"], ["one big blue sphere above all"]]
    assert cider([t[0] for t in truths], truths) == pytest.approx(10.0)
    assert cider([truths[1][0], truths[2][0], truths[0][0]], truths) < 0.5
    assert cider(["", "?", "1"], truths) == 0.0


def random_corpus(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    vocabulary = ["a", "the", "red", "blue", "small", "cube", "ball", "cone", "left", "of", "on", "two", "and", "is"]

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(4, 13)))

    truths = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(23)]
    said = []
    for several in truths:
        copy = rng.choice(several).split()
        copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        said.append(" ".join(copy[: rng.randint(3, 13)]))
    return said, truths


@pytest.mark.parametrize("seed", range(6))
def test_bleu_and_cider_equal_the_coco_scorers(seed):
    said, truths = random_corpus(seed)
    bleu_scorer, cider_scorer = BleuScorer(n=4), CiderScorer(n=4, sigma=6.0)
    for candidate, several in zip(said, truths, strict=True):
        bleu_scorer += (candidate, several)
        cider_scorer += (candidate, several)
    for n, theirs in enumerate(bleu_scorer.compute_score(option="closest")[0], start=1):
        assert bleu(said, truths, n) == pytest.approx(theirs, abs=1e-6) and theirs > 0.3
    assert cider(said, truths) == pytest.approx(cider_scorer.compute_score()[0], abs=1e-9)


TEXT = st.text(max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_scores_stay_in_their_range_on_any_text(pairs):
    said, truths = [p[0] for p in pairs], [p[1] for p in pairs]
    assert 0 <= bleu(said, truths) <= 1 + 1e-12 and 0 <= cider(said, truths) <= 10 + 1e-9
    assert 0 <= vqa_accuracy(said[0], truths[0]) <= 1


@pytest.mark.parametrize("score", [bleu, cider])
def test_captions_without_matching_references_are_refused(score):
    with pytest.raises(UserError, match="2 captions and 1 lists"):
        score(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="0 captions"):
        score([], [])
    with pytest.raises(UserError, match=r"references\[1\].*'b'"):  # a plain string would be read as a list of letters
        score(["a", "b"], [["a"], "b"])
    with pytest.raises(UserError, match=r"references\[0\]"):
        score(["a"], [[]])


# ---- retrieval


def test_recall_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.7, 0.6], [0.4, 0.3, 0.2, 0.1]])
    # the best relevant item stands second, first and fourth; query 0 has another one, third, which must not matter
    relevant = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool()
    assert [recall_at_k(similarity, relevant, k) for k in (1, 2, 3, 4)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])


def test_recall_equals_sorting_each_row():
    g = torch.Generator().manual_seed(3)
    similarity, relevant = torch.randn(11, 17, generator=g), torch.rand(11, 17, generator=g) < 0.15
    relevant[torch.arange(11), torch.arange(11)] = True
    for k in (1, 3, 10, 40):
        hits = 0
        for q in range(11):
            order = sorted(range(17), key=lambda item: -similarity[q, item].item())
            hits += any(relevant[q, item] for item in order[:k])
        assert recall_at_k(similarity, relevant, k) == pytest.approx(hits / 11)


def test_a_model_that_cannot_tell_items_apart_has_no_recall():
    relevant = torch.eye(5, 7).bool()
    assert recall_at_k(torch.ones(5, 7), relevant, 1) == 0.0
    assert recall_at_k(torch.full((5, 7), float("nan")), relevant, 3) == 0.0
    assert recall_at_k(torch.full((5, 7), float("-inf")), relevant, 3) == 0.0
    both = relevant.clone()
    both[:, 5] = True
    assert recall_at_k(both.float(), both, 1) == 1.0, "a tie among relevant items is no harm"


def test_recall_refuses_what_has_no_answer():
    with pytest.raises(UserError, match="Query 2 has no relevant"):
        recall_at_k(torch.randn(3, 4), torch.eye(3, 4).bool() & torch.tensor([[True], [True], [False]]), 1)
    with pytest.raises(UserError, match=r"\(3, 4\).*\(4, 3\)"):
        recall_at_k(torch.randn(3, 4), torch.ones(4, 3).bool(), 1)


def test_what_a_sentence_is():
    assert all(map(is_sentence, ("It is red.", "No, there is not.")))
    assert not any(map(is_sentence, ("red", "red.", "small red.", "a small red square", "")))
