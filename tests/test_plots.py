"""The pictures, looked at: what is drawn is read back from the figure or from the pixels of the file."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from nanovlm import plots
from nanovlm.errors import UserError


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has, an axis without extent, ...
        yield


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order; the files are written too."""
    seen, save = [], plots._save

    def watch(figure, path):
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", watch)
    return seen


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def pixels_of(path, colour):
    """How many pixels of the file have exactly this colour (the inside of strokes; edges are mixed)."""
    rgb = np.round(np.array(to_rgb(colour)) * 255)
    return int((np.abs(np.asarray(Image.open(path).convert("RGB")) - rgb).max(axis=2) <= 2).sum())


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


# ---- training curves

RUN = [{"stage": "align", "step": s, "lr": 1e-3, "loss/lm": 5.0 - s / 10} for s in range(1, 11)] + [
    {"stage": "tune", "step": s, "lr": 1e-4, "loss/lm": 2.0, "loss/itc": 1.5, "grad_norm": 0.5} for s in range(1, 8)
]
RUN.append({"stage": "tune", "step": 7, "eval/vqa_accuracy": 0.75, "eval/vqa_accuracy/colour": 0.5, "eval/cider": 3.0})


def test_every_loss_metric_and_vital_sign_has_a_panel_and_the_stages_follow_each_other(tmp_path, figures):
    plots.save_curves(write_lines(tmp_path / "metrics.jsonl", RUN), tmp_path / "curves.png")
    titles = [ax.get_title(loc="left") for ax in figures[0].axes]
    assert titles == ["loss/lm", "loss/itc", "eval/vqa_accuracy", "eval/cider", "lr", "grad_norm"]
    raw = panel(figures[0], "loss/lm").lines[::2]  # raw and smoothed by turns
    assert raw[0].get_xdata().tolist() == list(range(1, 11)) and raw[1].get_xdata().tolist() == list(range(11, 18))
    assert raw[0].get_ydata().tolist() == [record["loss/lm"] for record in RUN[:10]]
    assert panel(figures[0], "loss/itc").get_xlim() == (10, 17), "only the stage that has this loss"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["align", "tune"]
    spans = [patch.get_extents().x0 for patch in panel(figures[0], "lr").patches]
    assert len(spans) == 2 and spans[0] < spans[1]
    legend = panel(figures[0], "eval/vqa_accuracy").get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["all", "colour"]
    assert all(pixels_of(tmp_path / "curves.png", tint) > 1000 for tint in plots.TINTS[:2])


def test_a_truncated_last_line_changes_nothing_but_the_note(tmp_path, figures):
    whole = write_lines(tmp_path / "whole.jsonl", RUN)
    cut = write_lines(tmp_path / "cut.jsonl", RUN, tail='{"stage": "tune", "step": 8, "loss/l')
    assert plots.read_metrics(cut) == (plots.read_metrics(whole)[0], 1)
    plots.save_curves(cut, tmp_path / "curves.png")
    assert any("left out: 1" in text.get_text() for text in figures[0].texts)


def test_steps_logged_again_after_a_resume_replace_the_old_ones(tmp_path):
    first = [{"stage": "tune", "step": s, "loss/lm": 9.0} for s in (1, 2, 3, 4, 5)]
    again = [{"stage": "tune", "step": s, "loss/lm": 1.0} for s in (3, 4)]
    stages, unreadable = plots.read_metrics(write_lines(tmp_path / "m.jsonl", first + again))
    assert [(r["step"], r["loss/lm"]) for r in stages["tune"]] == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]
    assert unreadable == 0


@pytest.mark.parametrize("odd", ["[]", "7", "null", '{"step": 1}', '{"stage": "a"}', '{"stage": "a", "step": []}', "{"])
def test_lines_that_are_no_records_are_counted_and_passed_over(tmp_path, odd):
    path = write_lines(tmp_path / "m.jsonl", RUN[:3], tail=odd + "\n" + json.dumps(RUN[3]) + "\n")
    stages, unreadable = plots.read_metrics(path)
    assert len(stages["align"]) == 4 and unreadable == 1


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path, figures):
    values = [3.0, float("nan"), 2.0, float("inf"), 1.0, None]
    records = [{"stage": "a", "step": step, "loss/lm": value} for step, value in enumerate(values)]
    plots.save_curves(write_lines(tmp_path / "m.jsonl", records), tmp_path / "curves.png")
    raw, smooth = panel(figures[0], "loss/lm").lines
    for line in (raw, smooth):
        assert np.isnan(line.get_ydata()).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("n", [1, 2, 3, 50, 1000])
def test_smoothing_keeps_a_constant_has_no_lag_and_takes_noise_away(n):
    assert np.allclose(plots._smooth(np.full(n, 2.5)), 2.5)
    ramp = np.arange(n, dtype=float)
    inside = slice(n // 4, n - n // 4)
    assert np.allclose(plots._smooth(ramp)[inside], ramp[inside], atol=n / 100)
    if n >= 50:
        noise = np.random.default_rng(0).normal(size=n)
        assert plots._smooth(noise).std() < 0.6 * noise.std()


def test_one_single_point_is_visible(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [{"stage": "a", "step": 0, "loss/lm": 3.0}])
    plots.save_curves(path, tmp_path / "c.png")
    assert pixels_of(tmp_path / "c.png", plots.BLUE) > 5


def test_nothing_to_draw_is_said_with_the_name_of_the_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl.*No such file"):
        plots.save_curves(tmp_path / "absent.jsonl", tmp_path / "c.png")
    for records in ([], [{"stage": "a", "step": 1}]):
        with pytest.raises(UserError, match=r"m\.jsonl"):
            plots.save_curves(write_lines(tmp_path / "m.jsonl", records), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


# ---- samples

CUBE = Image.new("RGB", (40, 30), (12, 200, 230))
AWKWARD = [
    (CUBE, "<image>\n東京 🙂 naïve e\u0301 \x00\x1b\ud800 \u202e $x^2$ costs $5 \\alpha_{", "$\\nope{$", "白 \u200b"),
    (CUBE.resize((700, 200)), "W" * 200 + " " + "i" * 300, "", ""),
    (None, "word " * 500 + "\n\n\nend", ["", "y"], "\n"),
    (CUBE.convert("L").resize((9, 60)), "", [], "a"),
    (CUBE.convert("RGBA"), "one\ntwo\tthree", "four", "five " * 40),
]


def test_right_predictions_are_green_and_wrong_ones_red(tmp_path):
    right, wrong = [tmp_path / name for name in ("right.png", "wrong.png")]
    plots.save_samples([(CUBE, "How many?", "two", "2.")], right)  # equal after the official normalisation
    plots.save_samples([(CUBE, "How many?", "two", "3")], wrong)
    assert pixels_of(right, plots.GREEN) > 10 and pixels_of(right, plots.RED) == 0
    assert pixels_of(wrong, plots.RED) > 10 and pixels_of(wrong, plots.GREEN) == 0


def test_any_of_several_truths_is_right_and_the_one_that_was_met_is_shown(tmp_path, figures):
    plots.save_samples([(CUBE, "Describe.", ["a red cube", "one red cube"], "one red cube")], tmp_path / "s.png")
    assert [t.get_text() for t in figures[0].texts] == ["Describe.", "truth: one red cube", "✓ model: one red cube"]
    plots.save_samples([(CUBE, "?", [str(i) for i in range(10)], "7")], tmp_path / "s.png")
    assert figures[1].texts[-1].get_color() == plots.GREEN, "ten alternatives are no votes here"


def test_verdicts_stand_in_blocks(tmp_path, figures):
    kept, dropped = (CUBE, [("web: a cube", True), ("captioner: a ball", False)]), (CUBE, [("web: a dog", False)])
    plots.save_verdicts({"kept: 5": [kept] * 5, "dropped: 1": [dropped], "none": []}, tmp_path / "v.png")
    texts = [(t.get_text(), t.get_color()) for t in figures[0].texts]
    both = [("✓ web: a cube", plots.GREEN), ("✗ captioner: a ball", plots.RED)]
    assert texts == [("kept: 5", plots.INK), *both * 5, ("dropped: 1", plots.INK), ("✗ web: a dog", plots.RED)]
    boxes = [ax.get_position() for ax in figures[0].axes]
    assert len({round(box.y0, 3) for box in boxes}) == 3 and boxes[4].x0 == boxes[5].x0 == boxes[0].x0, "four in a row, a new row for a block"
    assert all(0 <= t.get_position()[1] <= 1 for t in figures[0].texts)


def test_pictures_keep_their_colours_and_shapes_and_text_rows_have_none(tmp_path, figures):
    plots.save_samples([(CUBE, "q", "t", "p"), (None, "q", "t", "p")], tmp_path / "s.png")
    side = plots.CELL * plots.DPI
    assert pixels_of(tmp_path / "s.png", "#0cc8e6") == pytest.approx(side * side * 30 / 40, rel=0.03)
    board = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (5, 5)))  # small: no blur
    plots.save_samples([(board, "", "", "")], tmp_path / "board.png")
    assert pixels_of(tmp_path / "board.png", "black") == pytest.approx(side * side / 2, rel=0.03)
    assert [len(ax.images) for ax in figures[0].axes] == [1, 0]
    assert [t.get_text() for t in figures[0].axes[1].texts] == ["text only"]


def test_any_text_is_drawn_inside_its_cell_without_overlap_or_warning(tmp_path, figures):
    plots.save_samples(AWKWARD, tmp_path / "s.png")
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    cells = [ax.get_window_extent(renderer) for ax in figure.axes]
    assert len(boxes) > 3 * len(AWKWARD)
    for i, box in enumerate(boxes):
        assert box.width <= plots.CELL * figure.dpi + 2 and box.x0 >= 0 and box.y0 >= 0, figure.texts[i].get_text()
        for other in boxes[:i] + cells:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 2 or down <= 2, figure.texts[i].get_text()
    shown = " ".join(text.get_text() for text in figure.texts)
    assert all(part in shown for part in ("$x^2$ costs $5", "naïve é", "two three", "(nothing)", "…"))


def test_samples_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"s\.png: there are no samples"):
        plots.save_samples([], tmp_path / "s.png")


# ---- masks and attention


def test_a_cell_is_filled_exactly_where_the_mask_is_true():
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    figure = Figure(figsize=(6, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    plots.show_mask(ax, mask, list("abcde"), [f"k{i}" for i in range(8)], "who sees whom")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    blue = np.round(np.array(to_rgb(plots.BLUE)) * 255)
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"k{i}" for i in range(8)]
    assert [label.get_text() for label in ax.get_yticklabels()] == list("abcde")
    for t in range(5):
        for s in range(8):
            x, y = ax.transData.transform((ax.get_xticks()[s], ax.get_yticks()[t]))
            filled = np.abs(pixels[int(len(pixels) - y), int(x), :3] - blue).max() <= 2
            assert filled == bool(mask[t, s]), (t, s)
    first, last = (ax.transData.transform((0.5, ax.get_yticks()[t]))[1] for t in (0, 4))
    assert first > last, "the first row is on top"


def test_a_large_mask_has_few_labels_and_a_batch_of_masks_is_refused():
    ax = Figure().add_subplot()
    plots.show_mask(ax, np.eye(70, 50).astype(bool))
    assert len(ax.get_yticks()) <= 16 and len(ax.get_xticks()) <= 16
    assert ax.get_yticklabels()[1].get_text() == str(int(ax.get_yticks()[1] - 0.5))
    with pytest.raises(UserError, match=r"mask\[0\]"):
        plots.show_mask(ax, torch.ones(1, 3, 4).bool())
    with pytest.raises(UserError, match="col_labels has 3 entries"):
        plots.show_mask(ax, torch.ones(3, 4).bool(), col_labels=["a", "b", "c"])


@pytest.mark.parametrize("shape", [(15,), (3, 5)])
@pytest.mark.parametrize("token", [0, 4, 7, 13])
def test_attention_lights_up_at_the_place_of_the_token(token, shape):
    weights = torch.full((15,), 0.02, dtype=torch.bfloat16, requires_grad=True)
    weights = weights + 0.5 * torch.nn.functional.one_hot(torch.tensor(token), 15)
    figure = Figure()
    overlay = plots.attention_over_image(figure.add_subplot(), Image.new("RGB", (100, 48)), weights.view(shape), (3, 5))
    heat, alpha = np.asarray(overlay.get_array()), np.asarray(overlay.get_alpha())
    assert heat.shape == (48, 100)  # 3 rows of 16 pixels, 5 columns of 20
    row, column = token // 5, token % 5
    inside = np.zeros((48, 100), dtype=bool)
    inside[16 * row : 16 * row + 16, 20 * column : 20 * column + 20] = True
    assert heat[inside] == pytest.approx(0.52, rel=0.01) and heat[~inside] == pytest.approx(0.02, rel=0.01)
    assert len(set(alpha[inside])) == len(set(alpha[~inside])) == 1, "one colour for each token, nothing in between"
    assert alpha[inside][0] == pytest.approx(0.75) and alpha[inside][0] > 5 * alpha[~inside][0]


def test_attention_of_zeros_is_drawn_and_a_wrong_number_of_weights_refused(tmp_path):
    figure = Figure()
    plots.attention_over_image(figure.add_subplot(), CUBE, np.zeros(6), (2, 3))
    figure.savefig(tmp_path / "zeros.png")
    with pytest.raises(UserError, match="7 weights do not fill 2 x 3"):
        plots.attention_over_image(figure.add_subplot(), CUBE, np.zeros(7), (2, 3))


# ---- files


@pytest.mark.parametrize("at", ["savefig", "replace"])
def test_a_failed_picture_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch, at):
    path = tmp_path / "s.png"
    plots.save_samples([(CUBE, "q", "t", "p")], path)
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure if at == "savefig" else os, at, full_disk)
    with pytest.raises(UserError, match=r"s\.png.*No space left"):
        plots.save_samples([(CUBE, "q", "t", "other")], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_drawing_needs_no_display_and_leaves_pyplot_alone(tmp_path):
    write_lines(tmp_path / "m.jsonl", RUN)
    script = (
        "import sys; from nanovlm import plots; plots.save_curves('m.jsonl', 'c.png'); "
        "plots.save_samples([(None, 'q', 't', 'p')], 's.png'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MPLBACKEND": "tkagg"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["c.png", "s.png"]


def test_attention_has_one_colour_for_each_token_and_lines_between_them():
    """Over a picture of one colour: nothing is blurred from a token into its neighbours."""
    figure = Figure(figsize=(5, 3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    weights = torch.arange(1.0, 16.0)
    plots.attention_over_image(figure.add_axes((0, 0, 1, 1)), Image.new("RGB", (50, 30), "grey"), weights, (3, 5))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)  # (300, 500, 3): 3 x 5 cells of 100 x 100
    cells = pixels.reshape(3, 100, 5, 100, 3)
    inside = cells[:, 2:98, :, 2:98]
    assert (inside == inside[:, :1, :, :1]).all()
    assert len({tuple(colour) for colour in cells[:, 50, :, 50].reshape(-1, 3).tolist()}) == 15
    for row, column in ((0, 0), (1, 3)):  # the line is brighter than what it parts
        right, below = cells[row, 50, column : column + 2, :, 0].ravel()[95:105], cells[row : row + 2, :, column, 50, 0].ravel()[95:105]
        assert all(line[4:6].max() > max(line[0], line[-1]) for line in (right, below))
