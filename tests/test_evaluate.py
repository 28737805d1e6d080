"""What is shown of a model while it learns: a held-out question, the truth, its answer, whatever kind of model it is."""

from dataclasses import replace
from itertools import chain, product
from random import Random

import pytest
import torch
from PIL import Image
from tools import bite

from nanovlm import recipes
from nanovlm.contract import Reads
from nanovlm.data.collate import Collate
from nanovlm.data.conversation import answer_ids, template_texts
from nanovlm.data.sample import Sample, Turn, choosing
from nanovlm.data.source import Exam
from nanovlm.data.transforms import Transform
from nanovlm.errors import UserError
from nanovlm.evaluate import judges, retrieval
from nanovlm.evaluate.pupil import BATCH, Pupil, permuted
from nanovlm.evaluate.retrieval import retrieve
from nanovlm.metrics import recall_at_k
from nanovlm.tokenizer import Tokenizer
from nanovlm.world.ask import DESCRIBE
from nanovlm.world.datasets import Scenes
from nanovlm.world.scene import HELD_OUT

SOURCE = Scenes()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SOURCE.texts()[:300] + template_texts(), 600)


class Counting(Pupil):
    """Likes a candidate by a table; remembers who was asked with whom."""

    def __init__(self, likes):
        self.likes, self.asked = likes, []

    def scores(self, samples, among, mean=False):
        self.asked.append(([sample.id for sample in samples], tuple(among)))
        return torch.tensor([[self.likes[sample.id].get(candidate, -9.0) for candidate in among] for sample in samples])


def turned(name, *options):
    return Sample(name, turns=(Turn("?", "", options=options),))


def test_options_are_ranked_each_sample_by_its_own():
    likes = {"a": {"red": 1.0, "blue": 2.0, "green": 9.0}, "b": {"blue": 1.0, "red": 3.0}, "c": {"one": 0.0}}
    pupil = Counting(likes)
    said = pupil.answer([turned("a", "red", "blue"), turned("c", "one", "two"), turned("b", "blue", "red")], ranked=True)
    assert said == ["blue", "one", "red"], "green, which was no option of a's, does not count"
    assert pupil.asked == [(["a", "b"], ("blue", "red")), (["c"], ("one", "two"))], "those of the same options together"


def test_yes_and_no_may_be_said_in_several_ways():
    """The likeliest way counts (InstructBLIP §2.5), of these two only, and only where there are no further answers."""
    likes = {"a": {"yes": 1.0, "no": 2.0, "true": 3.0}}
    assert Counting(likes).answer([turned("a", "yes", "no")], ranked=True) == ["yes"]
    assert Counting(likes).answer([turned("a", "yes", "no", "perhaps")], ranked=True) == ["no"]


def test_chance_is_the_better_of_one_answer_and_a_lot_among_the_options():
    samples = [replace(turned(str(i), "a", "b") if i < 2 else turned(str(i)), references=(right,)) for i, right in enumerate("abcde")]
    ranked, asked = Exam("", samples, ("task",), ranked=True), Exam("", samples, ("task",))
    assert judges.best_guess(ranked, [0, 0, 1, 0, 0]) == [0.5, 0.5, 1, 0, 0], "a lot where there are options, else the one answer"
    assert judges.best_guess(ranked, [1, 1, 0, 0, 0]) == [1, 1, 0, 0, 0], "the one answer where it is right more often"
    assert judges.best_guess(asked, [0, 0, 1, 0, 0]) == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("among", [("red", " "), ()])
def test_without_candidates_there_is_nothing_to_rank(among):
    with pytest.raises(UserError, match="give the answers to choose from"):
        Pupil.scores(None, [turned("the question")], among)


def test_a_contrastive_model_chooses_among_captions(tokenizer, monkeypatch):
    recipe = recipes.get("clip/tiny")
    model = recipes.build("clip/tiny", "cpu")
    samples = [SOURCE.held_out("vague pairs", i) for i in range(5)]
    seen = []

    def score(images, input_ids, attention_mask):
        seen.append([tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(input_ids, attention_mask)])
        assert images.shape == (5, 3, 48, 48)
        return torch.tensor([[float(text == s.caption) for text in seen[0]] for s in samples])

    monkeypatch.setattr(model, "score", score)
    rows = Pupil(model, recipe, recipe.stages[0], tokenizer, "cpu").examples(SOURCE, n=5)
    assert seen[0] == list(dict.fromkeys(text for s in samples for text in (s.caption, *s.negatives)))
    assert [(row[0].tobytes(), *row[1:]) for row in rows] == [
        (s.images[0].tobytes(), f"which of {len(seen[0])} captions?", s.caption, s.caption) for s in samples]


@pytest.mark.parametrize("name", ["lm/tiny", "lm/tiny-t5", "llava/tiny", "blip2/tiny-t5"])
def test_a_model_that_speaks_is_asked_and_its_answer_is_cut_at_the_stop(tokenizer, monkeypatch, name):
    recipe = recipes.get(name)
    stage, model, calls = recipe.stages[-1], recipes.build(name, "cpu"), []

    def generate(batch, room, stop):
        calls.append(batch)
        answer = answer_ids("top left", tokenizer, stage.format)
        return torch.tensor([answer + [tokenizer.pad_id] * 3] * len(batch["input_ids"]))

    monkeypatch.setattr(model, "generate", generate)
    rows = Pupil(model, recipe, stage, tokenizer, "cpu").examples(SOURCE, n=6)
    images, ids, mask = (calls[0][name] for name in ("images", "input_ids", "attention_mask"))
    assert mask[:, 0 if "t5" in name else -1].all()  # padded where the answer does not begin
    assert len(rows) == len(ids) == 6 and {prediction for *_, prediction in rows} == {"top left"}
    assert images.shape == ((0 if "lm/" in name else 6), 3, 48, 48)
    assert [row[0] is None for row in rows] == ["lm/" in name] * 6
    for (_, question, truth, _), row, real in zip(rows, ids, mask):
        asked = question.split("\n")[-1].split(". ")[-1]
        unsaid = name == "lm/tiny-t5" and asked == DESCRIBE  # a caption needs no question there
        assert truth and (asked in tokenizer.decode(row[real].tolist())) != unsaid


class FakeRetriever:
    """Contrast finds eight texts better than the right one; matching knows it."""

    def __init__(self, ids: torch.Tensor):
        n = len(ids)
        self.ids, distance = ids, (torch.arange(n) - torch.arange(n)[:, None]) % n
        self.cosine = torch.where(distance <= 8, distance * 0.1, -0.01 * distance)

    def score(self, images, ids, mask):
        return self.cosine

    def encode_image(self, images):
        return torch.arange(len(self.ids))[:, None]

    def match(self, numbers, ids, mask):
        belongs = (ids == self.ids[numbers[:, 0]]).all(dim=1)
        return torch.stack([torch.zeros(len(ids)), belongs * 5.0], dim=1)


def test_retrieval_before_and_after_reranking(tokenizer):
    """i2t: the right text is ninth by contrast, first after matching; what is not among the best stays behind."""
    n = 40
    gallery = SOURCE.galleries(n)[0]
    ids = Collate(tokenizer, "plain", Transform(48), Reads("pairs")).texts([s.caption for s in gallery])["input_ids"]
    model = FakeRetriever(ids)
    found = retrieve(model, torch.zeros(n, 3, 2, 2), ids, ids != tokenizer.pad_id)
    right = torch.eye(n).bool()
    assert recall_at_k(found["i2t/itc"], right, 1) == 0 and recall_at_k(found["i2t/itc"], right, 10) == 1
    assert recall_at_k(found["i2t"], right, 1) == recall_at_k(found["t2i"].T, right, 1) == 1
    for way, rows in (("i2t", found["i2t"]), ("t2i", found["t2i"].T)):
        contrast = model.cosine if way == "i2t" else model.cosine.T
        judged = contrast >= contrast.topk(16, dim=1).values[:, -1:]
        assert rows[judged].min() > rows[~judged].max(), "re-ranking is among the best by contrast"
        wrong = judged & ~right
        assert torch.equal(rows[wrong], contrast[wrong]), "matching is added to contrast, not put in its place"


def test_recall_stands_beside_its_controls(tokenizer):
    """Both ways, before and after re-ranking, the mean over two galleries of unequal size; `shuffled` looks for others' texts."""
    class Pupil:
        device, collate = "cpu", Collate(tokenizer, "plain", Transform(4), Reads("pairs"))

        @property
        def model(self):
            return self

        reads = Reads("pairs", matches=True)

        def score(self, images, ids, mask):
            self.asked = FakeRetriever(ids)
            return self.asked.cosine

        def encode_image(self, images):
            return self.asked.encode_image(images)

        def match(self, *inputs):
            return self.asked.match(*inputs)

    class Source:
        def galleries(self):
            samples = SOURCE.galleries(60)[0]
            return [samples[:20], samples[20:]]

    figures = retrieval.measure(Pupil(), Source())
    assert set(figures) == {f"{way}_r{k}{stage}" for way in ("i2t", "t2i") for k in (1, 10) for stage in ("", "/itc")}
    for name, figure in figures.items():
        k = int(name.split("_r")[1].split("/")[0])
        assert figure["n"] == 60 and figure["chance"] == pytest.approx((k / 20 + k / 40) / 2)
        assert figure["value"] == (0 if k == 1 and "itc" in name else 1), name
        assert figure["shuffled"] < (0.2 if k == 1 else 0.7), name


def test_a_gallery_has_different_scenes_with_held_out_pairs():
    [gallery] = SOURCE.galleries(60)
    assert len({s.references for s in gallery}) == len({s.caption for s in gallery}) == 60
    assert all(any(f"{colour} {shape}" in s.caption for colour, shape in HELD_OUT) for s in gallery)


def test_the_most_likely_of_several_answers_is_chosen(tokenizer):
    """As the loss of each has it, when it is learned as the answer; rows of unequal length, longer than a batch of the pupil."""
    recipe, classes = recipes.get("llava/tiny"), ["red", "top left", "a large square", "no"]
    model = bite(recipes.build("llava/tiny", "cpu"), seed=4)
    pupil = Pupil(model, recipe, recipe.stages[-1], tokenizer, "cpu")
    samples = [Sample(str(i), SOURCE.held_out("captions", i).images, turns=(Turn(f"<image>\nwhat{' else' * (i % 3)}?", "?"),))
               for i in range(BATCH + 4)]
    chosen = pupil.answer([choosing(sample, tuple(classes)) for sample in samples], ranked=True)
    for sample, choice in [*zip(samples, chosen)][::13]:
        losses = []
        for answer in classes:
            batch = pupil.collate.teach([replace(sample, turns=(replace(sample.turns[0], answer=answer),))], Random(0))
            losses.append(model.losses(batch)["lm"][0].item())
        assert choice == classes[losses.index(min(losses))]
    assert len(set(chosen)) > 1


# ---- exchanged pictures


def shade(value: int) -> Image.Image:
    return Image.new("L", (4, 4), value)


@pytest.mark.parametrize(("shown", "left"), [
    ([i // 10 for i in range(20)], 0),  # two pictures, ten questions each
    ([i % 7 for i in range(100)], 0), ([0] * 10 + list(range(1, 11)), 0), ([0, 0, 1, 1, 2], 0), ([5] * 6, 6)])
def test_the_control_shows_another_picture(shown, left):
    """Each is shown as often as before; decoded anew for each question, equal pictures are different objects."""
    for kind in (shade, lambda value: (shade(value), shade(9))):
        samples = [Sample(str(i), (kind(value),)) for i, value in enumerate(shown)]
        found = [sample.images[0] for sample in permuted(samples)]
        assert sorted(map(id, found)) == sorted(id(sample.images[0]) for sample in samples)
        assert sum(image == sample.images[0] for image, sample in zip(found, samples)) == left
        assert list(map(id, found)) == [id(sample.images[0]) for sample in permuted(samples)], "the same again"


def test_where_most_questions_are_about_one_picture_the_others_come_more_often():
    shown = [0] * 15 + [1] * 3 + [2] * 2
    found = [sample.images[0] for sample in permuted([Sample(str(i), (value,)) for i, value in enumerate(shown)])]
    assert all(a != b for a, b in zip(shown, found)) and {*found} == {0, 1, 2}


def test_every_short_list_is_exchanged_as_far_as_can_be():
    """All lists of up to six from three pictures: nobody keeps his own, and nothing comes more often unless more than half are equal."""
    for shown in chain(*(product(range(3), repeat=n) for n in range(2, 7))):
        found = [sample.images[0] for sample in permuted([Sample(str(i), (value,)) for i, value in enumerate(shown)])]
        assert len({*shown}) == 1 or all(a != b for a, b in zip(shown, found)), shown
        assert sorted(found) == sorted(shown) or 2 * max(map(shown.count, shown)) > len(shown), shown


def test_different_pictures_are_exchanged_as_they_have_always_been():
    """Stored figures are of this order."""
    assert [sample.images[0] for sample in permuted([Sample(str(i), (i,)) for i in range(12)])] == [11, 9, 3, 7, 0, 10, 1, 4, 5, 8, 2, 6]


# ---- judges


class Parrot:
    """Says what it is told to: one answer with the right pictures, another with those that belong to others."""

    def __init__(self, right: list[str], wrong: list[str]):
        self.answers = {False: right, True: wrong}

    def answer(self, samples, room, ranked=False):
        return self.answers[[s.images[0] for s in samples] != sorted(s.images[0] for s in samples)]


def exam(answers: list[str], judges: tuple[str, ...], **more) -> Exam:
    samples = [Sample(str(i), (i,), turns=(Turn("<image>?", answer),), **{k: v[i] for k, v in more.items()})
               for i, answer in enumerate(answers)]
    return Exam("kind", samples, judges)


@pytest.mark.parametrize(("judge", "truths", "said", "blind", "value", "chance", "shuffled"), [
    ("answer", ["two", "red", "2", "no"], ["2", "a red.", "three", "no"], ["x"] * 4, 0.75, 0.5, 0),
    ("letter", ["x. The answer is A.", "y. The answer is B.", "z. The answer is A."], ["The answer is A."] * 3, ["?"] * 3, 2 / 3, 2 / 3, 0),
    ("box", ["[0.10, 0.10, 0.50, 0.50]", "[0.60, 0.60, 0.90, 0.90]"], ["[0.10, 0.10, 0.50, 0.48]", "none"], ["[0.60, 0.60, 0.90, 0.90]"] * 2,
     0.5, 0.5, 0.5),
    ("answer", ["a cat", "dog", "dog", "cat", "The cat."], ["dog"] * 5, ["cat"] * 5, 0.4, 0.6, 0.6),
    ("letter", ["A", "B", "B", "B"], ["A. red", "The answer is B.", "b", "C"], ["B"] * 4, 0.5, 0.75, 0.75),
    ("class", ["hat", "shoes", "hat"], ["hat", "hat", "hat"], ["shoes"] * 3, 2 / 3, 2 / 3, 1 / 3),
])
def test_each_judge_by_hand(judge, truths, said, blind, value, chance, shuffled):
    """value, beside chance (the most common answer, as the judge compares them) and the answers to exchanged pictures."""
    [(name, figure)] = judges.measure(Parrot(said, blind), exam(truths, (judge,))).items()
    assert name == "vqa_accuracy/kind" and figure["n"] == len(truths)
    assert [figure[k] for k in ("value", "chance", "shuffled")] == pytest.approx([value, chance, shuffled])


def test_captions_are_judged_against_all_that_count_as_right():
    references = [("a hat", "a red hat"), ("a shoe",), ("a hat",)]
    of_captions = exam(["a hat", "a shoe", "a hat"], ("exact", "cider"), references=references)
    figures = judges.measure(Parrot(["A red  hat", "a hat", "a shoe"], ["a hat"] * 3), of_captions)
    assert figures["caption_exact/kind"] == pytest.approx({"value": 1 / 3, "n": 3, "chance": 2 / 3, "shuffled": 2 / 3})
    assert figures["caption_cider/kind"]["value"] < figures["caption_cider/kind"]["shuffled"]


def test_the_mean_over_all_questions_leaves_out_those_without_a_picture():
    class Source:
        def exams(self, names):
            blind = [Sample(str(i), turns=(Turn("?", "no"),)) for i in range(3)]
            return [exam(["two", "red"], ("answer",)), Exam("chat", blind)]

    class Pupil(Parrot):
        stage = recipes.get("llava/tiny").stages[1]

        def answer(self, samples, room, ranked=False):
            return ["yes"] * 3 if not samples[0].images else super().answer(samples, room)

    figures = judges.evaluate(Pupil(["two", "red"], ["red", "two"]), Source())
    assert figures["vqa_accuracy"] == {"value": 1, "n": 2, "chance": 0.5, "shuffled": 0}
    assert figures["vqa_accuracy/chat"]["value"] == 0 and figures["vqa_accuracy/kind"]["value"] == 1
