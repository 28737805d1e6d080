"""The probe that judges encoders: its labels are the scene's, it reads what is there and nothing where nothing is."""

import pytest
import torch
from torch.nn import functional as F

from experiments import backbones, encoder_probe
from experiments.encoder_probe import (
    READINGS,
    VALUES,
    features,
    fit,
    held_out_scenes,
    judge,
    labels,
    pixels,
    seen_scenes,
)
from nanovlm import recipes
from nanovlm.data.collate import Collate
from nanovlm.data.transforms import Transform
from nanovlm.evaluate.retrieval import retrieve
from nanovlm.world.datasets import Scenes
from nanovlm.world.exams import TOLD
from nanovlm.world.scene import CELLS, HELD_OUT, SEEN, Object, Scene, Sign, render

SCENE = Scene((Object("red", "triangle", "small", "top right"), Object("blue", "star", "large", "bottom left")),
              Sign("47", "bottom right"))


class Pupil:
    """What `features` needs of one; the encoder is the identity."""

    device, collate = "cpu", Collate(None, "plain", Transform(48), recipes.build("clip/tiny").reads)
    model = recipes.build("clip/tiny")


def named(truth: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    """The labels of one scene, as words."""
    return [{fact: values[truth[fact][0, cell]] for fact, values in VALUES.items() if truth[fact][0, cell] >= 0} for cell in range(4)]


def test_labels_are_what_the_scene_holds():
    """Of four cells: nothing, a held-out pair, a seen one, a number."""
    nothing, number = {"place": "nothing"}, {"place": "sign", "tens": "4", "ones": "7"}
    triangle = {"place": "object", "colour": "red", "shape": "triangle", "size": "small"}
    star = {"place": "object", "colour": "blue", "shape": "star", "size": "large"}
    assert named(labels([SCENE])) == [nothing, triangle, star, number]
    assert named(labels([SCENE], HELD_OUT)) == [nothing, triangle, {"place": "object"}, number]
    assert named(labels([Scene((), Sign("HI", "top left"))])) == [{"place": "sign", "sign": "HI"}, nothing, nothing, nothing]


def test_cells_of_features_are_cells_of_the_picture():
    """With pixels as tokens each cell's features are its quarter of the picture."""
    got = features(Pupil(), [SCENE], pixels)[0].view(4, 24, 24, 3)
    picture = Transform(48)(render(SCENE)).permute(1, 2, 0)  # (48, 48, 3)
    for cell, (row, column) in enumerate(((0, 0), (0, 24), (24, 0), (24, 24))):
        assert torch.equal(got[cell], picture[row:row + 24, column:column + 24]), CELLS[cell]


def test_a_probe_reads_what_llava_reads():
    llava, images = recipes.build("llava/tiny", "cpu"), torch.randn(2, 3, 48, 48)
    assert torch.equal(encoder_probe.patches(llava.vision)(images), llava.encode_image(images))


def test_held_out_scenes_are_the_worlds_and_seen_ones_have_seen_pairs():
    world = Scenes(seed=5)
    for i, scene in enumerate(held_out_scenes(20)):
        assert render(scene).tobytes() == world.held_out("captions", i).images[0].tobytes()
    signs = [scene.sign.type for scene in seen_scenes(300, 0) if scene.sign]
    assert {thing.pair for scene in seen_scenes(300, 0) for thing in scene.objects} == set(SEEN)
    assert 0.3 < signs.count("number") / len(signs) < 0.7 and set(signs) == {"number", "digit", "word"}


def truth_as_features(truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """One-hot: all facts of a cell side by side."""
    return torch.cat([F.one_hot(y + 1, len(VALUES[fact]) + 1).float() for fact, y in truth.items()], dim=-1)


@pytest.fixture(scope="module")
def exam() -> tuple[dict, dict]:
    """Labels to learn from and, of held-out scenes, labels to be judged by."""
    return labels(seen_scenes(600, 0)), labels(held_out_scenes(300) + encoder_probe.held_out_numbers(100), HELD_OUT)


def test_a_probe_reads_what_stands_there(exam):
    """Also of held-out pairs, and no longer where the cells are exchanged."""
    learned, asked = exam
    x = truth_as_features(labels(held_out_scenes(300) + encoder_probe.held_out_numbers(100)))
    probes = fit(truth_as_features(learned), learned)
    for reading in READINGS:
        figures = judge(probes, reading, x, asked)
        assert figures["value"] == 1.0, reading
        assert figures["shuffled"] < 0.65 and figures["n"] == (asked[READINGS[reading][0]] >= 0).sum(), reading


def test_a_probe_of_noise_reads_chance(exam):
    """No better than the most common answer, up to four standard deviations."""
    learned, asked = exam
    noise = torch.Generator().manual_seed(0)
    x, held_out = (torch.randn(*y["place"].shape, 3, generator=noise) for y in (learned, asked))
    probes = fit(x, learned)
    for reading in READINGS:
        figures = judge(probes, reading, held_out, asked)
        assert figures["value"] < figures["chance"] + 4 * (figures["chance"] / figures["n"]) ** 0.5, reading


def test_who_does_not_match_is_judged_by_contrast():
    class Contrast:
        def score(self, images, ids, mask):
            return torch.arange(6.).view(2, 3)

    found = retrieve(Contrast(), None, None, None, matches=False)
    assert found.keys() == {"i2t", "t2i"} and all(torch.equal(scores, torch.arange(6.).view(2, 3)) for scores in found.values())


def test_mean_and_worst_of_a_form():
    """The mean over the kinds, the name of the worst; a model that was not asked has a dash."""
    kinds = tuple(f"short/{kind}" for kind in "abc")
    asked = {kind: {"value": value, "chance": 0.25, "shuffled": 0.5, "n": 10} for kind, value in zip(kinds, (0.9, 0.6, 0.9))}
    assert backbones.form_of(kinds, [{}, asked]) == ["–", "–", "0.800", "0.60 (short/b)", "0.25", "0.50", "30"]
    figures = {f"vqa_accuracy/{kind}": figure for kind, figure in asked.items()} | {"vqa_accuracy": asked["short/a"]}
    assert backbones.by_kind(figures) == asked


def test_every_question_that_is_told_stands_in_the_table():
    assert sorted(kind for kinds in backbones.FORMS.values() for kind in kinds) == sorted(TOLD["told"])
    assert {kind for kinds in backbones.PAGES.values() for kind in kinds} == {*TOLD["pages"]} - {"names/0"}
