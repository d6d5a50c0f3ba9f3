"""Pictures of a pre-training: what went in, what was left of it, what came back; and the loss curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_umit.files import write_whole

PAPER, INK, FAINT, HIDDEN = "#101418", "#e8ebee", "#8b95a1", "#26415e"
TOKENS = "tokens"  # the column that shows codes: categories without an order, not grey levels
GOLDEN = 0.6180339887  # multiples of it, modulo 1, lie far apart: neighbouring codes get different colours
PLANES = ("axis 0", "axis 1", "axis 2")
CURVES = ("#58a6ff", "#ff9e64", "#7ee787", "#d2a8ff", "#f2cc60", "#ff7b72", "#56d4dd", "#b1bac4")


@dataclass(frozen=True)
class Reconstruction:
    """One case: named arrays of one channel and one shape, (D, H, W) or (H, W), the input first, and mm per voxel along
    each array axis; voxels that are NaN are drawn as hidden, and an array named "tokens" in colours."""

    case: str
    columns: Mapping[str, np.ndarray]
    spacing: Sequence[float]

    @property
    def image(self) -> np.ndarray:
        """The input."""
        return next(iter(self.columns.values()))


def draw_reconstructions(samples: Sequence[Reconstruction], path: str | Path, title: str = "") -> None:
    """Write a PNG: a row for each case and axis (central slice), a column for each named array.

    Slices are drawn with the true aspect ratio of the voxels. Grey levels run from the 1st to the 99th percentile of
    the input slice and are the same in a row, so brightness can be compared.

    Args:
        samples: one to a few cases.
        path: file to write; replaced in one step.
        title: shown above the columns.
    """
    rows = [
        (sample, axis if sample.image.ndim == 3 else None)
        for sample in samples
        for axis in range(sample.image.ndim if sample.image.ndim == 3 else 1)
    ]
    extents = [_extent(sample, axis) for sample, axis in rows]
    width = 2.5  # inches of one column
    heights = [min(max(width * tall / wide, 0.5), 1.6 * width) for tall, wide in extents]
    top, left, gap = 0.85, 1.25, 0.12
    size = left + len(samples[0].columns) * (width + gap) + 0.15, top + sum(heights) + gap * len(rows) + 0.15
    figure = _figure(size)
    y = size[1] - top
    for row, ((sample, axis), (tall, wide), height) in enumerate(zip(rows, extents, heights, strict=True)):
        y -= height
        image = _central(sample.image, axis)
        low, high = _grey_range(image)
        for column, (name, volume) in enumerate(sample.columns.items()):
            box = (left + column * (width + gap)) / size[0], y / size[1], width / size[0], height / size[1]
            axes = figure.add_axes(box)
            shown, limits, palette = _central(volume, axis), (low, high), "gray"
            if name == TOKENS:
                shown, limits, palette = np.mod(shown * GOLDEN, 1.0), (0.0, 1.0), "gist_rainbow"
            axes.imshow(
                np.ma.masked_invalid(shown),
                cmap=matplotlib.colormaps[palette].with_extremes(bad=HIDDEN),
                vmin=limits[0],
                vmax=limits[1],
                extent=(0, wide, tall, 0),
                interpolation="nearest",
            )
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name, color=INK, fontsize=10, pad=6)
        _label(figure, sample, axis, y + height / 2, size)
        y -= gap
    figure.text(0.12 / size[0], 1 - 0.28 / size[1], title, color=INK, fontsize=11, va="center")
    _write(figure, path)


@dataclass(frozen=True)
class Panel:
    """One set of axes of a progress picture.

    ``curves`` maps a name to its values, one for each epoch; an empty name is not shown. ``level`` draws a dotted line.
    """

    label: str
    curves: dict[str, list[float]]
    level: float | None = None
    from_zero: bool = False


def draw_progress(panels: Sequence[Panel], path: str | Path, title: str = "") -> None:
    """Write a PNG with one panel above the other, over a common epoch axis.

    Args:
        panels: the first one is drawn larger.
        path: file to write; replaced in one step.
        title: shown above the first panel.
    """
    figure = _figure((8.0, 2.6 + 1.7 * len(panels)))
    ratios = [2.0] + [1.0] * (len(panels) - 1)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=ratios, left=0.11, right=0.97, top=0.93, bottom=0.08)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[index])
        if panel.level is not None:
            axes.axhline(panel.level, color=FAINT, linewidth=0.8, linestyle=":")
        for (name, values), colour in zip(panel.curves.items(), itertools.cycle(CURVES)):
            epochs = range(1, len(values) + 1)
            marker = "o" if len(values) < 3 else None
            axes.plot(epochs, values, color=colour, linewidth=1.5, label=name, marker=marker, markersize=4)
        if any(panel.curves):
            axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=1 + len(panel.curves) // 6)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel(panel.label, color=INK, fontsize=9)
        axes.set_facecolor(PAPER)
        axes.tick_params(colors=FAINT, labelsize=8, labelbottom=index == len(panels) - 1)
        axes.grid(color="#1f262e", linewidth=0.8)
        for spine in axes.spines.values():
            spine.set_color("#333b44")
        if index == 0:
            axes.set_title(title, color=INK, fontsize=11, loc="left")
        if index == len(panels) - 1:
            axes.set_xlabel("epoch", color=INK, fontsize=9)
    _write(figure, path)


def draw_usage(usage: Sequence[float], path: str | Path, title: str = "") -> None:
    """Write a PNG: the share of all tokens that each code of a codebook has, sorted, against an equal share."""
    shares = 100 * np.sort(np.asarray(usage, dtype=float))[::-1]
    figure = _figure((8.0, 3.4))
    axes = figure.add_axes((0.09, 0.16, 0.88, 0.72))
    axes.stairs(shares, np.arange(len(shares) + 1) + 0.5, fill=True, color=CURVES[0])  # bars would show seams
    axes.grid(False)  # nnU-Net changes matplotlib's defaults
    axes.axhline(100 / len(shares), color=CURVES[1], linewidth=1.2, linestyle="--", label="equal share")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    axes.set_xlim(0.5, len(shares) + 0.5)
    axes.set_xlabel("codes, most used first", color=INK, fontsize=9)
    axes.set_ylabel("share of tokens [%]", color=INK, fontsize=9)
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=FAINT, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color("#333b44")
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    _write(figure, path)


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, facecolor=PAPER)  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: str | Path) -> None:
    write_whole(path, lambda part: figure.savefig(part, dpi=110, facecolor=PAPER, format="png"))


def _central(volume: np.ndarray, axis: int | None) -> np.ndarray:
    return volume if axis is None else np.take(volume, volume.shape[axis] // 2, axis=axis)


def _extent(sample: Reconstruction, axis: int | None) -> tuple[float, float]:
    """Height and width of a slice in mm."""
    steps = [float(step) for step in sample.spacing][-sample.image.ndim :]
    sides = [
        length * step
        for index, (length, step) in enumerate(zip(sample.image.shape, steps, strict=True))
        if index != axis
    ]
    return sides[0], sides[1]


def _grey_range(image: np.ndarray) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(image, (1, 99)))
    return (low, high) if high - low > 1e-6 and math.isfinite(high - low) else (low - 0.5, low + 0.5)


def _label(figure: Any, sample: Reconstruction, axis: int | None, y: float, size: tuple[float, float]) -> None:
    name = sample.case if len(sample.case) <= 16 else f"{sample.case[:7]}…{sample.case[-7:]}"
    figure.text(0.12 / size[0], (y + 0.09) / size[1], name, color=INK, fontsize=8, va="center")
    if axis is not None:
        slice_text = f"{PLANES[axis]}, slice {sample.image.shape[axis] // 2}"
        figure.text(0.12 / size[0], (y - 0.09) / size[1], slice_text, color=FAINT, fontsize=7, va="center")
