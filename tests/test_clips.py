"""Clips: frames from files, and the world's clips, whose direction only the order of the frames tells."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image

from nanovlm.data.clips import frames, load
from nanovlm.data.formats import read
from nanovlm.errors import UserError
from nanovlm.world import clips
from nanovlm.world.datasets import Scenes
from nanovlm.world.scene import BACKGROUND, COLOURS, HELD_OUT, PAIRS, SEEN, Object

# ---- from files


def gif(file, durations: list[int]) -> None:
    """Frame i is grey 20 i; durations in milliseconds."""
    shown = [Image.new("RGB", (12, 10), (20 * i,) * 3) for i in range(len(durations))]
    shown[0].save(file, save_all=True, append_images=shown[1:], duration=durations if len(durations) > 1 else durations[0])


def greys(shown) -> list[int]:
    return [round(image.getpixel((5, 5))[0] / 20) for image in shown]


@pytest.mark.parametrize(("durations", "per_second", "seen"), [
    ([400, 700, 900], 1.0, [0, 1]),  # seen at 0 s and at 1 s; it ends at 2 s
    ([400, 700, 910], 1.0, [0, 1, 2]), ([1000, 1000, 1000], 1.0, [0, 1, 2]), ([100] * 10, 1.0, [0]), ([500] * 4, 2.0, [0, 1, 2, 3]),
    ([250] * 8, 2.0, [0, 2, 4, 6]), ([2500, 100], 1.0, [0, 0, 0]), ([300], 1.0, [0])])
def test_a_gif_is_sampled_by_its_durations(tmp_path, durations, per_second, seen):
    gif(tmp_path / "a.gif", durations)
    shown = frames(tmp_path / "a.gif", per_second)
    assert greys(shown) == seen and {(image.mode, image.size) for image in shown} == {("RGB", (12, 10))}


def test_a_gif_of_one_frame_is_a_picture_and_a_picture_a_clip_of_one(tmp_path):
    gif(tmp_path / "one.gif", [100])
    gif(tmp_path / "two.gif", [1000, 1000])
    assert isinstance(load(tmp_path / "one.gif"), Image.Image) and greys(load(tmp_path / "two.gif")) == [0, 1]
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    assert len(frames(str(tmp_path / "a.png"))) == 1 == len(frames(tmp_path / "one.gif"))
    with pytest.raises(UserError, match="gone.gif: the picture is missing"):
        frames(tmp_path / "gone.gif")
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="bad.gif: the picture cannot be read"):
        frames(tmp_path / "bad.gif")


def test_a_gif_that_breaks_off_is_one_sentence(tmp_path, monkeypatch):
    gif(tmp_path / "two.gif", [1000, 1000])

    def seek(image, frame):
        raise EOFError("no more images in GIF file")
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", seek)
    with pytest.raises(UserError, match="two.gif: the clip breaks off behind frame 0 .*; replace or remove it"):
        frames(tmp_path / "two.gif")


def test_a_gif_that_moves_is_a_clip_in_a_table_and_its_first_frame_elsewhere(tmp_path):
    gif(tmp_path / "a.gif", [1000] * 3)
    gif(tmp_path / "b.gif", [1000])
    (tmp_path / "a.txt").write_text("moves")
    (tmp_path / "b.txt").write_text("stands")
    source = read(tmp_path)
    shown = {}
    for split in ("train", "val"):
        page, pair = source.sample("pages", split, 0), source.sample("pairs", split, 0)
        shown[page.caption] = page.images[0]
        assert isinstance(pair.images[0], Image.Image)
    assert greys(shown["moves"]) == [0, 1, 2] and isinstance(shown["stands"], Image.Image)


def test_the_frames_of_a_folder(tmp_path):
    for i in (0, 2, 10):
        Image.new("RGB", (12, 10), (20 * i,) * 3).save(tmp_path / f"f{i}.png")
    (tmp_path / "notes.txt").write_text("x")
    assert greys(frames(tmp_path)) == [0, 2, 10]


# ---- of the world


def place(image: Image.Image) -> tuple[float, float]:
    """Where the object is: the mean of the pixels that are not background."""
    rows, columns = np.nonzero((np.array(image) != BACKGROUND).any(-1))
    return columns.mean(), rows.mean()


def went(shown) -> str:
    (x0, y0), (x1, y1) = place(shown[0]), place(shown[-1])
    assert min(abs(x1 - x0), abs(y1 - y0)) < 1.01 and max(abs(x1 - x0), abs(y1 - y0)) >= 10, "along one axis, and far enough to be seen"
    return ("left" if x1 < x0 else "right") if abs(x1 - x0) > abs(y1 - y0) else "up" if y1 < y0 else "down"


def same(one, two) -> bool:
    return [image.tobytes() for image in one] == [image.tobytes() for image in two]


def test_what_is_said_of_a_clip_is_what_it_shows():
    kinds, answers, pairs = Counter(), Counter(), set()
    for i in range(400):
        sample = Scenes().draw("clips", Random(i))
        (shown,), (turn,) = sample.images, sample.turns
        direction = went(shown)
        assert len(shown) == 8 and {image.size for image in shown} == {(48, 48)}
        size, colour, shape = sample.caption.split()[1:4]
        assert sample.caption == f"a {size} {colour} {shape} goes {direction}." and COLOURS[colour] in {pixel for _, pixel in shown[0].getcolors(9999)}
        asked = turn.question == "<image>which way does it move?"
        assert (turn.answer, turn.kind, sample.format) == ((direction, "direction", "flamingo") if asked else (sample.caption, "caption", "pages"))
        assert asked or turn.question == "<image>"
        kinds[turn.kind] += 1
        answers[direction] += 1
        pairs.add((colour, shape))
    assert pairs == set(SEEN) and not pairs & set(HELD_OUT)
    assert abs(kinds["caption"] - 200) < 5 * 10 and all(abs(n - 100) < 5 * (400 * 3 / 16) ** 0.5 for n in answers.values())


def test_no_frame_by_itself_tells_the_direction():
    """Where the object is in the first, the middle and the last frame does not depend on where it came from: means within five deviations."""
    for at in (0, 4, 7):
        found = {direction: [place(clips.film(Object("red", "square", "small", ""), Random(i), direction, 8, 1.0)[at])[0] for i in range(400)]
                 for direction in ("left", "right")}
        means = {direction: np.mean(values) for direction, values in found.items()}
        spread = np.std(found["left"]) * (2 / 400) ** 0.5
        if at == 4:
            assert abs(means["left"] - means["right"]) < 3 + 5 * spread  # half a second before and behind the middle
        assert all(0 < value < 48 for value in found["left"] + found["right"])
    frame_sets = [{frame.tobytes() for frame in clips.film(Object("red", "square", "small", ""), Random(3), way, 8, 1.0)} for way in ("left", "right")]
    assert frame_sets[0] == frame_sets[1]


def test_the_exams_are_of_twins_and_of_the_same_clips():
    short, long = Scenes().exams(("clips",))
    assert (short.name, long.name, short.judges, short.room) == ("direction", "direction_30", ("answer",), 8)
    assert len(short.samples) == len(long.samples) == 200
    for exam, many in ((short, 8), (long, 30)):
        assert set(Counter(sample.turns[-1].answer for sample in exam.samples).values()) == {50}
        for one, two in zip(exam.samples[::2], exam.samples[1::2]):
            assert len(one.images[0]) == many and same(one.images[0], two.images[0][::-1]), "twins: the same frames, backwards"
            assert one.turns[-1].answer == went(one.images[0]) != went(two.images[0]) == two.turns[-1].answer
            assert one.turns[-1].question == two.turns[-1].question
    for eight, thirty in zip(short.samples, long.samples):
        assert same(eight.images[0], thirty.images[0][4:26:3]), "the same motion, three times as fine"
    assert len({sample.images[0][0].tobytes() for sample in short.samples}) > 190
    shown = {tuple(pixel) for sample in short.samples for pixel in np.array(sample.images[0][3]).reshape(-1, 3)}
    assert {COLOURS[colour] for colour, _ in HELD_OUT} <= shown
    assert [sample.images[0][0].tobytes() for sample in Scenes(7).exams(("clips",), 4)[0].samples] == [
        sample.images[0][0].tobytes() for sample in short.samples[:4]]


def test_a_clip_is_drawn_in_any_size_and_every_direction_has_a_twin():
    thing = Object(*PAIRS[0], "large", "")
    for direction, twin in clips.TWIN.items():
        for size in (48, 64, 96):
            there, back = (clips.film(thing, Random(1), way, 8, 1.0, size) for way in (direction, twin))
            assert same(there, back[::-1]) and {image.size for image in there} == {(size, size)}
            for image in (*there, *clips.film(thing, Random(1), direction, 30, 3.0, size)):
                box = Image.fromarray((np.array(image) != BACKGROUND).any(-1).astype(np.uint8) * 255).getbbox()
                assert box[2] - box[0] >= 20 * size / 48 and box[3] - box[1] >= 20 * size / 48, "nothing leaves the picture"
