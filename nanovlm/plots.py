"""The pictures: what training did, what the model says, what a mask lets through, what the model looks at.

    metrics.jsonl ──► read_metrics ──► save_curves             curves.png    a panel per loss, evaluation and vital sign
    (image, question, truth, prediction) ──► save_samples      samples.png   a grid, right answers green, wrong ones red
    title ─► (image, its texts, kept or not) ──► save_verdicts report.png    the same, in blocks
    mask (T, S) ──► show_mask(ax)                              notebooks     filled = may attend
    image + weights (N,) ──► attention_over_image(ax)          notebooks     the picture under a grid, a colour for each token

Everything goes through matplotlib's Figure object and never through pyplot: no display is needed and no global state
is touched, so that training may draw at any time. Files are replaced as a whole (files.py): nobody sees half a picture.

Shapes: T rows (who looks), S columns (what is seen), N image tokens in a grid of rows × columns.
"""

import json
import math
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from PIL import Image

from nanovlm.errors import UserError
from nanovlm.files import replacing
from nanovlm.metrics import vqa_accuracy

INK, MUTED, FAINT = "#22303c", "#7b8794", "#e8ecf0"
BLUE, GREEN, RED = "#2a6fbb", "#1a7f4b", "#c0392b"
LINES = (BLUE, "#d9822b", GREEN, "#8e5bb5", RED, "#17859b", "#8a6d3b", "#d0579b", "#56606b", "#7d9c2c")
TINTS = ("#dce9f7", "#fdebd3", "#dff2e3", "#f0e3f6", "#fbe0dd", "#e3eef0")  # the stages, behind the curves
DPI = 130
PANEL = (4.3, 2.6)  # inches of a panel of the curves, with its title and numbers

Row = tuple[Image.Image | None, str, str | Sequence[str], str]


# ---- training curves


def read_metrics(path: str | Path) -> tuple[dict[str, list[dict]], int]:
    """metrics.jsonl → ({stage: its lines, by step}, number of lines that could not be read).

    A killed run leaves a truncated line, and a resumed one logs steps again that the killed one had logged: the later
    line counts. Lines of the same stage and step (losses first, evaluation after) become one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: the metrics file cannot be read ({error.strerror}).") from error
    stages: dict[str, list[dict]] = {}
    unreadable = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            record = json.loads(line)
            step, lines = int(record["step"]), stages.setdefault(str(record["stage"]), [])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        while lines and lines[-1]["step"] > step:
            lines.pop()
        if lines and lines[-1]["step"] == step:
            lines[-1] |= record
        else:
            lines.append(record)
    if not stages:
        raise UserError(f"{path}: no line with the fields stage and step, so there is nothing to draw yet.")
    return stages, unreadable


def save_curves(metrics_path: str | Path, png_path: str | Path) -> None:
    """One panel per loss, per evaluation metric (its parts together) and for learning rate, gradient norm and speed."""
    stages, unreadable = read_metrics(metrics_path)
    # stage → (first x, last x): every stage counts its own steps, the x axis goes on
    spans = dict(zip(stages, pairwise(accumulate((lines[-1]["step"] for lines in stages.values()), initial=0))))
    panels = _panels(stages)
    if not panels:
        raise UserError(f"{metrics_path}: no line has a loss or any other number to draw.")
    columns = min(3, len(panels))
    width, height = 0.2 + PANEL[0] * columns, 0.8 + PANEL[1] * math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.text(0.25 / width, 1 - 0.3 / height, Path(metrics_path).absolute().parent.name, fontsize=12, color=INK,
                weight="bold", va="center", parse_math=False)
    note = "thin: as logged,  thick: smoothed" + (f",  unreadable lines left out: {unreadable}" if unreadable else "")
    figure.text(0.25 / width, 1 - 0.53 / height, note, fontsize=7.5, color=MUTED, va="center")
    tints = [Patch(color=TINTS[i % len(TINTS)], label=stage) for i, stage in enumerate(spans)]
    figure.legend(handles=tints, loc="upper right", bbox_to_anchor=(1 - 0.15 / width, 1 - 0.12 / height), fontsize=8,
                  ncols=min(len(tints), 2 * columns), frameon=False, labelcolor=INK, handlelength=1.4)
    for i, (title, names) in enumerate(panels.items()):
        left, top = 0.7 + PANEL[0] * (i % columns), 1.1 + PANEL[1] * (i // columns)
        across = PANEL[0] - (1.5 if len(names) > 1 else 0.7)  # room for a legend on the right
        box = (left / width, 1 - (top + PANEL[1] - 0.85) / height, across / width, (PANEL[1] - 0.85) / height)
        _draw_panel(figure.add_axes(box), title, names, stages, spans)
    _save(figure, png_path)


def _panels(stages: dict[str, list[dict]]) -> dict[str, list[str]]:
    """Panel title → the fields it draws: eval/vqa_accuracy/colour and eval/vqa_accuracy/count share a panel."""
    fields = dict.fromkeys(name for lines in stages.values() for record in lines for name in record)
    panels: dict[str, list[str]] = {name: [name] for name in fields if name.startswith("loss/")}
    for name in fields:
        if name.startswith("eval/"):
            panels.setdefault("/".join(name.split("/")[:2]), []).append(name)
    return panels | {name: [name] for name in ("lr", "grad_norm", "samples_per_s") if name in fields}


def _draw_panel(ax: Axes, title: str, names: list[str], stages: dict, spans: dict) -> None:
    ax.grid(axis="y", color="white", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=7.5, colors=MUTED, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#c5cdd5")
    ax.set_title(title, fontsize=9.5, color=INK, loc="left", parse_math=False)
    ax.set_xlabel("step", fontsize=7.5, color=MUTED, loc="right", labelpad=1)
    drawn = [stage for stage, records in stages.items() if any(name in r for r in records for name in names)]
    lines = {}
    for i, (stage, (start, end)) in enumerate(spans.items()):
        ax.axvspan(start, end, color=TINTS[i % len(TINTS)], lw=0, zorder=0)
        for j, name in enumerate(names):
            points = [(start + r["step"], r[name]) for r in stages[stage] if isinstance(r.get(name), int | float)]
            if not points:
                continue
            x, y = np.array(points, dtype=float).T
            y[~np.isfinite(y)] = np.nan  # a gap in the line shows where a loss blew up
            colour = LINES[j % len(LINES)]
            marker = "o" if title.startswith("eval/") or len(points) == 1 else None
            if title.startswith(("loss/", "grad_norm", "samples_per_s")):
                ax.plot(x, y, color=colour, lw=0.7, alpha=0.35)
                y = _smooth(y)
            lines[name] = ax.plot(x, y, color=colour, lw=1.7, marker=marker, ms=3.5, clip_on=marker is None)[0]
    # A loss that only the first stage has would fill a corner of an axis that shows the whole run.
    ax.set_xlim(spans[drawn[0]][0], max(spans[drawn[-1]][1], spans[drawn[0]][0] + 1))
    if title.startswith("eval/") and ax.get_ylim()[0] >= -0.1 and ax.get_ylim()[1] <= 1.1:
        ax.set_ylim(0, 1.03)
    if len(names) > 1:
        labels = [name.removeprefix(title).lstrip("/") or "all" for name in lines]
        ax.legend(list(lines.values()), labels, fontsize=6.5, labelcolor=INK, loc="center left",
                  bbox_to_anchor=(1, 0.5), frameon=False, handlelength=1)


def _smooth(y: np.ndarray) -> np.ndarray:
    """A centred bell-shaped mean over about a twentieth of the curve, without lag; gaps stay gaps."""
    width = max(len(y) / 40, min(3, len(y) / 10))  # in points; a curve of few points stays nearly as it is
    reach = min(int(3 * width) + 1, max(1, len(y) // 2))
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = ~np.isnan(y)
    total = np.convolve(np.where(known, y, 0), bell)[reach : reach + len(y)]
    weight = np.convolve(known.astype(float), bell)[reach : reach + len(y)]
    return np.where(known, total / np.maximum(weight, 1e-12), np.nan)


# ---- samples

CELL, GAP, SIZE, LEADING, TITLE = 2.5, 0.22, 8.0, 0.15, 0.4  # inches, inches, points, inches from line to line, inches
MOST_LINES = 7  # of each of the three texts


def save_samples(rows: Sequence[Row], png_path: str | Path) -> None:
    """A grid of pictures with question, truth and prediction below each. A row is (image or None, question, truth,
    prediction); truth may be several texts that are all right. What is right is decided as by vqa_accuracy."""
    _save_grid({"": [(image, _sample_lines(*texts)) for image, *texts in rows]}, png_path)


def save_verdicts(blocks: dict[str, Sequence[tuple[Image.Image, Sequence[tuple[str, bool]]]]], png_path: str | Path) -> None:
    """A block of pictures under each title, with texts below each of them: green those that were kept, red those that were dropped."""
    marked = {True: ("✓", GREEN), False: ("✗", RED)}
    _save_grid({title: [(image, [(line, marked[kept][1]) for text, kept in texts for line in _wrap(f"{marked[kept][0]} {text}")])
                        for image, texts in cells] for title, cells in blocks.items()}, png_path)


def _save_grid(blocks: dict[str, list[tuple[Image.Image | None, list[tuple[str, str]]]]], png_path: str | Path) -> None:
    """Up to four cells in a row, each a picture and lines of text in their colours; a block's title stands above its first row."""
    columns = min(4, max(map(len, blocks.values()), default=0))
    if not columns:
        raise UserError(f"{png_path}: there are no samples to draw.")
    rows = [("" if i else title, cells[i : i + columns]) for title, cells in blocks.items() for i in range(0, len(cells), columns)]
    # Every row of the grid is as tall as its longest text needs.
    heights = [TITLE * bool(title) + CELL + LEADING * (max(len(lines) for _, lines in cells) + 1) + GAP for title, cells in rows]
    width, height = columns * (CELL + GAP) + GAP, sum(heights) + GAP
    figure = Figure(figsize=(width, height), dpi=DPI)
    for (title, cells), above in zip(rows, accumulate(heights, initial=GAP)):
        top = height - above - TITLE * bool(title)
        if title:
            figure.text(GAP / width, (top + 0.13) / height, _drawable(title), fontsize=11, color=INK, weight="bold",
                        family=list(_fonts()), parse_math=False)
        for column, (image, lines) in enumerate(cells):
            left = GAP + column * (CELL + GAP)
            _draw_picture(figure.add_axes((left / width, (top - CELL) / height, CELL / width, CELL / height)), image)
            for n, (line, colour) in enumerate(lines, start=1):
                figure.text(left / width, (top - CELL - 0.06 - n * LEADING) / height, line, fontsize=SIZE, color=colour,
                            family=list(_fonts()), parse_math=False)
    _save(figure, png_path)


def _sample_lines(question: str, truth: str | Sequence[str], prediction: str) -> list[tuple[str, str]]:
    truths = [truth] if isinstance(truth, str) else list(truth) or [""]
    shown = max(truths, key=lambda text: vqa_accuracy(prediction, [text]))  # of several truths, the one that was met
    right = vqa_accuracy(prediction, [shown]) == 1
    mark, colour = ("✓", GREEN) if right else ("✗", RED)  # the mark is for those who cannot tell the colours apart
    return [
        *((line, INK) for line in _wrap(question.replace("<image>", "").strip())),
        *((line, MUTED) for line in _wrap("truth: " + shown)),
        *((line, colour) for line in _wrap(f"{mark} model: {prediction.strip() or '(nothing)'}")),
    ]


def _draw_picture(ax: Axes, image: Image.Image | None) -> None:
    ax.set(xticks=[], yticks=[], facecolor="#f6f8fa")
    ax.spines[:].set_color(FAINT)
    if image is None:
        ax.text(0.5, 0.5, "text only", ha="center", va="center", fontsize=SIZE, color=MUTED)
        return
    small = image.convert("RGB")
    small.thumbnail((512, 512))
    ax.imshow(np.asarray(small))  # by default a tiny picture keeps its square pixels and a large one is smoothed


def _wrap(text: str) -> list[str]:
    """Break `text` into lines no wider than a cell, by the real widths of the letters."""
    lines = []
    for paragraph in _drawable(text[:1000]).split("\n"):  # more would not fit in any case
        line = ""
        for word in paragraph.split():
            if line and _inches(f"{line} {word}") > CELL:
                lines, line = [*lines, line], ""
            line = f"{line} {word}".strip()
            while _inches(line) > CELL:  # a word wider than the cell is cut wherever it has to be
                fits = max(1, bisect(range(len(line)), CELL, key=lambda n: _inches(line[:n])) - 1)
                lines, line = [*lines, line[:fits]], line[fits:]
        lines += [line] if line else []
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"]


@cache
def _fonts() -> dict[str, frozenset[int]]:
    """Family → its characters, of the fonts to draw text with. DejaVu comes with matplotlib; others where installed."""
    wanted = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Emoji", "Symbola",
              "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS", "Segoe UI Symbol")
    installed = set(font_manager.get_font_names())
    chosen = [font_manager.FontProperties(family=[family]) for family in wanted if family in installed]
    return {f.get_name(): frozenset(font_manager.get_font(font_manager.findfont(f)).get_charmap()) for f in chosen}


def _drawable(text: str) -> str:
    """Only characters that some font has: the others become a box, since matplotlib would warn about each of them."""

    def drawable(letter: str) -> bool:
        control = unicodedata.category(letter) in ("Cc", "Cf", "Cs")
        return letter == "\n" or (not control and any(ord(letter) in characters for characters in _fonts().values()))

    composed = unicodedata.normalize("NFC", text.replace("\t", " "))
    return "".join(letter if drawable(letter) else "\u25af" for letter in composed)


def _inches(line: str) -> float:
    prop = font_manager.FontProperties(family=list(_fonts()), size=SIZE)
    return text_to_path.get_text_width_height_descent(line, prop, ismath=False)[0] / 72


# ---- masks and attention, for notebooks: each draws on an axis of the caller


def show_mask(ax: Axes, mask: torch.Tensor | np.ndarray, row_labels: Sequence[str] | None = None,
              col_labels: Sequence[str] | None = None, title: str = "") -> None:
    """A bool mask (T, S) as a grid: row t, column s is filled where t may attend to s."""
    cells = _array(mask).astype(bool)
    if cells.ndim != 2:
        raise UserError(f"show_mask draws one mask (T, S), not {cells.shape}: choose one of the batch, as in mask[0].")
    T, S = cells.shape
    # Cell (t, s) covers s..s+1 by t..t+1; the white edges make cells countable as long as there are few.
    ax.pcolormesh(cells, cmap=ListedColormap(["#f3f5f7", BLUE]), vmin=0, vmax=1, edgecolors="white",
                  linewidth=1.2 if max(T, S) <= 40 else 0)
    ax.set(xlim=(0, S), ylim=(T, 0), aspect="equal")  # row 0 on top, as the matrix is written
    ax.set_title(title, fontsize=10, color=INK, parse_math=False)
    ax.set_ylabel("who looks", fontsize=8, color=MUTED)
    ax.set_xlabel("what is seen (filled: may attend)", fontsize=8, color=MUTED)
    box = ax.get_window_extent().size * 72 / ax.figure.dpi  # the axis in points, before labels take their part
    room = 0.8 * min(box[0] / S, box[1] / T)
    for axis, labels, length, what in ((ax.yaxis, row_labels, T, "row_labels"), (ax.xaxis, col_labels, S, "col_labels")):
        if labels is not None and len(labels) != length:
            raise UserError(f"{what} has {len(labels)} entries for a mask of shape {cells.shape}.")
        every = 1 if labels is not None else max(1, math.ceil(length / 16))
        shown = range(0, length, every)
        names = [str(i) if labels is None else _drawable(str(labels[i])) for i in shown]
        axis.set_ticks([i + 0.5 for i in shown], names, fontsize=float(np.clip(room * every, 4, 8.5)), color=INK,
                       family=list(_fonts()), parse_math=False)
        if axis is ax.xaxis and any(len(name) > 2 for name in names):
            ax.tick_params(axis="x", rotation=90)
    ax.tick_params(length=0, top=False, bottom=False)
    ax.spines[:].set_visible(False)


def attention_over_image(ax: Axes, image: Image.Image, weights: torch.Tensor | np.ndarray, grid: tuple[int, int]) -> AxesImage:
    """Lay the attention on the N image tokens, N = rows · columns, over the picture as the encoder saw it (after the
    crop): one colour for each token, since inside a patch nothing is known. weights: (N,) or (rows, columns), not negative.
    The strongest token is brightest whatever its weight: compare maps by their numbers, not by their colours. Returns
    the heat map, for a colour bar in units of the weights."""
    rows, columns = grid
    heat = _array(weights).astype(np.float32)
    if heat.size != rows * columns:
        raise UserError(f"{heat.size} weights do not fill {rows} x {columns} cells: leave out class tokens and text.")
    picture = image.convert("RGB")
    cells = np.asarray(Image.fromarray(heat.reshape(grid)).resize(picture.size, Image.Resampling.NEAREST))  # (height, width)
    peak = float(heat.max()) or 1.0
    ax.imshow(np.asarray(picture) // 2)  # darkened: what is not looked at stays recognisable and does not shine
    overlay = ax.imshow(cells, cmap="inferno", vmin=0, vmax=peak, alpha=0.75 * np.clip(cells / peak, 0, 1), interpolation="nearest")
    for draw, parts, length in ((ax.axhline, rows, picture.height), (ax.axvline, columns, picture.width)):
        for i in range(1, parts):
            draw(i * length / parts - 0.5, color="white", lw=0.6, alpha=0.4)
    ax.set_axis_off()
    return overlay


# ---- common


def _array(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _save(figure: Figure, path: str | Path) -> None:
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror}).") from error
