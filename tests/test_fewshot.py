"""Few-shot exams: the prompts to the letter, which examples and in which order, closed answers against a slow loop, every control."""

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
import torch
from PIL import Image
from tools import bite, close

from experiments import flamingo_emoji
from nanovlm import recipes
from nanovlm.data.conversation import answer_ids, prompt
from nanovlm.data.sample import BLANK, IMAGE, Sample, Turn, text_only, without_pictures
from nanovlm.errors import UserError
from nanovlm.evaluate import fewshot
from nanovlm.evaluate.fewshot import Episode, measure, with_examples, zero_shot
from nanovlm.evaluate.pupil import Pupil, drawn, opening, permuted, question
from nanovlm.tokenizer import Tokenizer
from nanovlm.world import pages
from nanovlm.world.datasets import Scenes

NAMES = ("dax", "wug", "blik", "toma")
TOKENIZER = Tokenizer.train([f"Output: {name}. Question: Answer: " for name in NAMES] * 9, 300)


def picture(seed: int, side: int = 48) -> Image.Image:
    return Image.frombytes("RGB", (side, side), Random(seed).randbytes(3 * side * side))


def shot(name: str, seed: int, asked: str = "") -> Sample:
    return Sample(name, (picture(seed),), turns=(Turn(IMAGE + asked, name, "names"),))


def written(sample: Sample) -> str:
    """The prompt as a text."""
    names = {i: special for i, special in enumerate(Tokenizer.SPECIALS)}
    ids = prompt(sample.turns, TOKENIZER, sample.format)
    return "".join(names[i] if i in names else TOKENIZER.decode([i]) for i in ids)


@pytest.fixture(scope="module")
def pupil():
    torch.manual_seed(0)
    recipe = recipes.get("flamingo/tiny")
    model = bite(recipe.build(recipe.stages[-1]), seed=3, std=0.1)
    for name, parameter in model.vision.named_parameters():
        if name.endswith("gain"):  # with small gains, biases are all that the eyes see
            torch.nn.init.ones_(parameter)
    return Pupil(model, recipe, recipe.stages[-1], TOKENIZER, "cpu")


# ---- prompts

def test_prompts_are_the_papers_to_the_letter():
    query, examples = shot("blik", 0), [shot("dax", 1), shot(" wug", 2)]
    assert written(with_examples(query, [])) == "<s><image>Output:"
    sample = with_examples(query, examples)
    assert written(sample) == "<s><image>Output: dax<EOC><image>Output: wug<EOC><image>Output:"
    assert sample.images == (*examples[0].images, *examples[1].images, *query.images) and sample.turns[-1].answer == "blik"
    asked = with_examples(shot("red", 0, "\nwhat colour?"), [shot("two", 1, "how many?")])
    assert written(asked) == "<s><image>Question: how many? Answer: two<EOC><image>Question: what colour? Answer:"


def test_without_shots_two_examples_have_neither_picture_nor_tag():
    sample = zero_shot(shot("blik", 0), [shot("A.", 1), shot("B.", 2), shot("C.", 3)])
    assert written(sample) == "<s>Output: A.<EOC>Output: B.<EOC><image>Output:"
    assert sample.images == shot("blik", 0).images


def test_of_a_conversation_the_last_question_is_the_example():
    """Its picture was shown with the first one, and goes along."""
    talk = Sample("talk", (picture(1),), turns=(Turn("<image>\nwhat is it?", "a cat"), Turn("and its colour?", "red")))
    sample = with_examples(shot("x", 0, "what?"), [talk])
    assert written(sample) == "<s><image>Question: and its colour? Answer: red<EOC><image>Question: what? Answer:"


def test_fewer_shots_are_those_next_to_the_query():
    """An open answer without shots has the two examples in words; one among candidates needs none."""
    examples = [shot(name, i) for i, name in enumerate(NAMES[:3])]
    one = Episode(shot("dax", 9), examples)
    [two] = fewshot.prompts(one, 2)
    assert [turn.answer for turn in two.turns] == ["wug", "blik", "dax"]
    assert written(fewshot.prompts(one, 0)[0]) == "<s>Output: dax<EOC>Output: wug<EOC><image>Output:"
    assert written(fewshot.prompts(replace(one, among=NAMES), 0)[0]) == "<s><image>Output:"
    with pytest.raises(UserError, match="4 shots: there are 3 examples for dax"):
        fewshot.prompts(one, 4)


@pytest.mark.parametrize(("many", "several", "want"), [(0, 6, 1), (1, 6, 1), (2, 6, 2), (3, 6, 6), (4, 6, 6), (8, 6, 6), (8, 1, 1)])
def test_an_ensemble_has_every_order_once(many, several, want):
    found = fewshot.orders([*range(many)], several)
    assert len(found) == len({tuple(order) for order in found}) == want and found[0] == [*range(many)]
    assert all(sorted(order) == [*range(many)] for order in found)


# ---- which examples

def test_rices_puts_the_most_similar_last():
    support = [shot(name, i) for i, name in enumerate("abcd")]
    features = torch.tensor([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0], [0.8, 0.6]])
    query = torch.tensor([1.0, 0.0])
    assert [s.id for s in fewshot.rices(query, features, support, 3)] == ["a", "d", "b"]
    assert [s.id for s in fewshot.rices(query, features, support, 4)] == ["c", "a", "d", "b"]
    assert fewshot.rices(query, features, support, 0) == []
    with pytest.raises(UserError, match="5 shots: there are 4 examples"):
        fewshot.rices(query, features, support, 5)
    with pytest.raises(UserError, match="5 shots: there are 4 examples"):
        fewshot.by_chance(support, 5, Random(0))


def test_by_chance_no_example_comes_twice():
    """600 draws: each of four first places 150 times ± 50, which is 4.7 standard deviations."""
    support, rng = [shot(name, i) for i, name in enumerate("abcd")], Random(0)
    draws = [fewshot.by_chance(support, 3, rng) for _ in range(600)]
    assert all(len({s.id for s in draw}) == 3 for draw in draws)
    assert all(100 < n < 200 for n in Counter(draw[0].id for draw in draws).values())


def test_features_are_mean_tokens_of_the_last_picture_or_clip(pupil):
    samples = [Sample("a", (picture(1), picture(2))), Sample("b", ((picture(3), picture(4), picture(5)),)), Sample("c", (picture(6),))]
    got = fewshot.features(pupil, samples)
    for row, frames in zip(got, ([2], [3, 4, 5], [6])):
        with torch.no_grad():
            each = [pupil.model.vision(pupil.collate.transform(picture(seed))[None])[0].mean(dim=0) for seed in frames]
        want = torch.stack(each).mean(dim=0)
        close(row, want / want.norm())


# ---- closed answers

def likelihood(pupil: Pupil, sample: Sample, answer: str) -> float:
    """log p of an answer behind its prompt, token by token off one pass through the whole page."""
    before, said = prompt(sample.turns, TOKENIZER, sample.format), answer_ids(answer, TOKENIZER, sample.format)
    ids = torch.tensor([before + said])
    with torch.no_grad():
        logits = pupil.model(**pupil.collate.clips([sample.images]), input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool)).logits
    return sum(logits[0, len(before) + i - 1].log_softmax(dim=-1)[token].item() for i, token in enumerate(said))


def episodes(n: int, shots: int, among=()) -> list[Episode]:
    rng, found = Random(5), []
    for i in range(n):
        order = [rng.choice(NAMES) for _ in range(shots)]
        candidates = among if not callable(among) else among(i)
        found.append(Episode(shot(rng.choice(candidates or NAMES), i), [shot(name, 100 + 10 * i + j) for j, name in enumerate(order)], candidates))
    return found


def test_scores_and_their_mean_over_orders_are_a_slow_loop(pupil):
    those = episodes(3, 3, NAMES)
    rounds = [*zip(*(fewshot.prompts(one, 3, fewshot.ORDERS) for one in those))]
    got = fewshot.ensemble(pupil, rounds, NAMES)
    for row, one in zip(got, those):
        several = [with_examples(one.query, order) for order in permutations(one.examples)]
        close(row, torch.tensor([sum(likelihood(pupil, sample, name) for sample in several) / 6 for name in NAMES]), 1e-3)
        close(pupil.scores([several[0]], NAMES)[0], torch.tensor([likelihood(pupil, several[0], name) for name in NAMES]), 1e-3)


def test_each_query_has_its_own_candidates(pupil):
    """In groups of equal ones: the same choice as one by one."""
    those = episodes(6, 2, lambda i: NAMES[:2] if i % 3 == 0 else NAMES[i % 3:])
    samples = [fewshot.prompts(one, 2)[0] for one in those]
    got = fewshot.answers(pupil, [samples], [one.among for one in those], 8)
    for one, sample, choice in zip(those, samples, got):
        assert choice == max(one.among, key=lambda name, sample=sample: likelihood(pupil, sample, name))


def test_open_answers_are_found_by_three_beams_up_to_the_close(pupil, monkeypatch):
    seen, generate = [], pupil.model.generate
    monkeypatch.setattr(pupil.model, "generate", lambda *given, **how: seen.append((given[1:], how)) or generate(*given, **how))
    said = fewshot.answers(pupil, [[with_examples(one.query, one.examples) for one in episodes(2, 1)]], [(), ()], 4)
    assert len(said) == 2 and seen == [((4, [TOKENIZER.token_id("<EOC>")]), {"beams": 3})]


# ---- controls

def test_without_pictures_the_tags_stay():
    page = with_examples(shot("x", 0), [shot("dax", 1), Sample("clip", ((picture(2), picture(3)),), turns=(Turn(IMAGE, "wug"),))])
    blank = without_pictures(page)
    assert blank.images == (BLANK, (BLANK, BLANK), BLANK) and blank.turns == page.turns


def test_a_blank_picture_is_nothing_once_it_is_normalised(pupil):
    assert pupil.collate.transform(BLANK).abs().max() < 0.01


def test_as_text_only_the_question_keeps_its_picture():
    page = with_examples(shot("x", 0), [shot("dax", 1), shot("wug", 2, "what?")])
    words = text_only(page)
    assert written(words) == "<s>Output: dax<EOC>Question: what? Answer: wug<EOC><image>Output:" and words.images == page.images[-1:]
    alone = with_examples(shot("x", 0), [])
    assert text_only(alone) == alone
    talk = Sample("talk", (picture(1), picture(2)), turns=(Turn(IMAGE, "dax"), Turn(IMAGE + "what?", "red"), Turn("sure?", "yes")))
    assert text_only(talk).images == talk.images[1:] and [turn.question.count(IMAGE) for turn in text_only(talk).turns] == [0, 1, 0]


def test_shuffled_pictures_belong_to_others():
    """Clips and pictures alike, in one list; a page alone exchanges its own, and one picture alone stays."""
    clip = (picture(7), picture(8))
    pages_ = [with_examples(shot("x", i), [shot("y", 10 + i)]) for i in range(20)]
    pages_ = [*pages_, replace(pages_[0], images=(clip, picture(99)))]
    before, after = ([image for page in found for image in page.images] for found in (pages_, permuted(pages_)))
    assert sorted(map(id, before)) == sorted(map(id, after)) and all(a is not b for a, b in zip(before, after))
    one = pages_[0]
    assert permuted([one])[0].images == one.images[::-1] and permuted([one])[0].turns == one.turns
    assert permuted([shot("x", 0)]) == [shot("x", 0)] and permuted([]) == []
    blank = [without_pictures(page) for page in pages_[:5]]
    assert permuted(blank) == blank


class Reader:
    """Learns from the page alone: says what stood behind a picture like the last one, and of a new one the first candidate."""

    def known(self, sample: Sample) -> str:
        shown = dict(zip((image.tobytes() for image in sample.images[:-1]), (turn.answer for turn in sample.turns)))
        return shown.get(sample.images[-1].tobytes(), "") if len(sample.images) == len(sample.turns) else ""

    def answer(self, samples, room, beams):
        return [self.known(sample) for sample in samples]

    def scores(self, samples, among):
        return torch.tensor([[float(name == self.known(sample)) for name in among] for sample in samples])


def test_open_and_closed_questions_are_measured_apart():
    those = [Episode(shot("x", 0), [shot("y", 1)], among) for among in ((), ("x", "y"))]
    with pytest.raises(UserError, match="measure them apart"):
        measure(Reader(), those, shots=(1,))


@pytest.mark.parametrize("closed", [True, False])
def test_figures_stand_beside_their_controls(closed):
    """20 episodes of 8 examples, of which the last shows the thing that is asked for in every second one."""
    those = []
    for i in range(20):
        name = NAMES[i % 4]
        others = [shot(NAMES[(i + j) % 4], 50 * i + j) for j in range(8)]
        last = replace(shot(name, 50 * i + 7), images=(picture(50 * i + 40),))
        those.append(Episode(replace(shot(name, 0), images=(picture(50 * i + 40),)), [*others[:7], last if i % 2 else others[7]],
                             (NAMES[(i + 1) % 4], *(one for one in NAMES if one != NAMES[(i + 1) % 4])) if closed else ()))
    figures = measure(Reader(), those, (0, 1, 8))
    assert [*figures] == ["fewshot_accuracy/0", *(f"fewshot_accuracy/{n}{end}" for n in (1, 8) for end in ("", "/no images", "/text only"))]
    assert all(set(figure) == {"value", "n", "chance", "shuffled"} and figure["n"] == 20 and figure["chance"] == 0.25
               for figure in figures.values())
    values = {name.removeprefix("fewshot_accuracy/"): figure["value"] for name, figure in figures.items()}
    assert values["0"] == 0 and values["1"] == values["8"] == 0.5
    assert values["8/text only"] == 0 and values["8/no images"] <= 0.5
    assert figures["fewshot_accuracy/8"]["shuffled"] < 0.2


def test_the_worlds_exam_has_the_controls_of_two_numbers():
    exams = Scenes().exams(("fewshot",), 3)
    assert [exam.name for exam in exams] == ["0", "1", "2", "4", "4/no images", "4/text only", "8", "8/no images", "8/text only", "16"]
    four, blank, words = exams[3:6]
    assert all(exam.judges == ("fewshot",) and exam.room == pages.ONE_WORD for exam in exams)
    assert [s.turns for s in blank.samples] == [s.turns for s in four.samples] and all(image is BLANK for image in blank.samples[0].images)
    assert [s.images for s in words.samples] == [s.images[-1:] for s in four.samples]


# ---- samples.png

def test_what_was_asked_of_a_page_of_examples():
    page = with_examples(shot("blik", 0), [shot("dax", 1), shot("wug", 2)])
    assert question(page) == "dax, wug → ?" and question(with_examples(shot("blik", 0), [])) == "→ ?"
    assert question(with_examples(shot("red", 0, "what colour?"), [shot("two", 1, "how many?")])) == "how many? two. what colour?"


def test_of_a_clip_three_frames_are_drawn():
    film = tuple(Image.new("RGB", (4, 3), (10 * i, 0, 0)) for i in range(8))
    strip = drawn(film)
    assert strip.size == (12, 3) and [strip.getpixel((x, 1))[0] for x in (0, 5, 11)] == [0, 40, 70]
    assert drawn(film[0]) is film[0] and drawn(film[:1]).size == (12, 3)


def test_a_page_opens_with_its_first_picture():
    page = Sample("page", (picture(1), picture(2)), turns=(Turn("", "title"), Turn(IMAGE, "one"), Turn(IMAGE, "two")), format="pages")
    assert opening(page).turns == page.turns[:2] and opening(page).images == page.images[:1]
    text = Sample("text", turns=(Turn("what?", "no"), Turn("sure?", "yes")))
    assert opening(text).turns == text.turns[:1]
    pair = Sample("pair", (picture(1),), "a cat")
    assert opening(pair) is pair


# ---- emoji by a stranger

@pytest.fixture
def emoji(tmp_path):
    """Twelve things by three artists, eight of them held out."""
    rows = []
    for i in range(12):
        for j, artist in enumerate(("twemoji", "noto", "fluentui")):
            picture(10 * i + j, 8).save(tmp_path / f"{artist}{i}.png")
            rows.append({"image": f"{artist}{i}.png", "caption": f"thing {i}", "artist": artist, "split": "val" if i >= 4 else "train"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_stranger_draws_queries_and_nothing_else(emoji, tmp_path):
    learned = [json.loads(line) for line in (flamingo_emoji.without_stranger(emoji, tmp_path / "two") / "captions.jsonl").read_text().splitlines()]
    learned, read = [row for row in learned if "image" in row], [row for row in learned if "texts" in row]
    assert len(learned) == 24 and not any("fluentui" in row["image"] for row in learned)
    assert Counter(row["split"] for row in learned) == {"train": 8, "val": 16}
    known = {row["image"]: row["caption"] for row in learned if row["split"] == "train"}
    assert len(read) == len(known)
    for i, page in enumerate(read):
        said = [(known[image], text.removeprefix("Output: ")) for image, text in zip(page["images"][::2], page["texts"][1::2], strict=True)]
        assert len(said) == 5 == len({*page["images"]}) - 1 and len(set(said)) == len({thing for thing, _ in said})
        assert all((thing != name) == (i % 2 == 1) for thing, name in said) and page["split"] == "train"
    drawings = flamingo_emoji.held_out(emoji)
    assert len(drawings) == 8
    for made_up in (False, True):
        those = flamingo_emoji.of_four(drawings, made_up, True, seed=0)
        times = flamingo_emoji.TIMES // 4
        assert len(those) == 8 * times and Counter(one.query.id.split("/")[1] for one in those) == dict.fromkeys(drawings, times)
        for one in those:
            assert one.query.id.startswith("fluentui/") and not any(example.id.startswith("fluentui") for example in one.examples)
            called = {(s.id.split("/")[1], s.turns[0].answer) for s in (one.query, *one.examples)}
            assert len(called) == 4 == len(set(one.among)) and {name for _, name in called} == {*one.among}
            assert made_up == (called & {(thing, thing) for thing in drawings} == set())
    assert len({tuple(sorted(one.among)) for one in those}) == 2 and flamingo_emoji.shown(those)["8"] == 1
    bound = [{s.id.split("/")[1]: s.turns[0].answer for s in one.examples} for one in those[:flamingo_emoji.TIMES]]
    assert any(binding != bound[0] for binding in bound)


def test_emoji_are_asked_and_told_in_a_table(emoji, pupil, monkeypatch):
    monkeypatch.setattr(flamingo_emoji, "TIMES", 1)
    monkeypatch.setattr(flamingo_emoji, "ROOM", 2)
    monkeypatch.setattr(flamingo_emoji, "ORDERS", 2)
    monkeypatch.setattr(flamingo_emoji, "SHOTS", (0, 1, 3))
    tasks = flamingo_emoji.ask(pupil, flamingo_emoji.held_out(emoji), seed=0)
    table = flamingo_emoji.table({"runs": [{"tasks": tasks}, {"tasks": tasks}]}).split("\n")
    assert len({line.count("|") for line in table}) == 1 and table[0].endswith("| 3 shots |")
    first = tasks["real names, one of four"]
    row = next(line for line in table if line.startswith("| **real names, one of four** |")).split(" | ")
    assert row[1] == "0.25" and row[2] == " / ".join(2 * [f"{first['fewshot_accuracy/0']['value']:.2f}"])
    assert sum(line.startswith("| shown |") for line in table) == 6
