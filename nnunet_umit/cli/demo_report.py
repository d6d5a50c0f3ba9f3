"""What the demo shows at its end: Dice of both arms, where the time went, and one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from nnunet_umit.cli.demo_data import DemoData, DemoError, read_json
from nnunet_umit.cli.stock import Step

# Okabe and Ito's palette: distinct for colour-blind eyes too. Vermilion and sky blue first: both stand out on grey.
COLOURS = ("#D55E00", "#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#0072B2")

Image = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Dice of one arm on the held-out cases.

    Args:
        labels: Mean Dice of each foreground label or region.
        mean: Mean over labels.
        groups: Mean over labels and the cases of a group.
        cases: Mean over labels for each case.
    """

    labels: dict[str, float]
    mean: float
    groups: dict[str, float]
    cases: dict[str, float]


def read_scores(summary_file: Path, data: DemoData) -> Scores:
    """Read the ``summary.json`` of ``nnUNetv2_evaluate_folder``.

    A label that neither truth nor prediction of a case holds has no Dice there and is left out of the means, as
    nnU-Net does.

    Raises:
        DemoError: When a held-out case is missing in the summary.
    """
    summary = read_json(summary_file)
    keys = foreground(data.description())
    table: dict[str, dict[str, float]] = {}
    for entry in summary["metric_per_case"]:
        case = Path(entry["reference_file"]).name.removesuffix(data.description()["file_ending"])
        table[case] = {label: float(entry["metrics"][key]["Dice"]) for label, key in keys.items()}
    missing = sorted(set(data.test) - set(table))
    if missing:
        raise DemoError(f"{summary_file} has no scores of {', '.join(missing)}")
    labels = {label: _mean([table[case][label] for case in data.test]) for label in keys}
    return Scores(
        labels=labels,
        mean=_mean(list(labels.values())),
        groups={
            name: _mean([dice for case in cases for dice in table[case].values()])
            for name, cases in data.groups.items()
        },
        cases={case: _mean(list(table[case].values())) for case in data.test},
    )


def foreground(description: Mapping[str, Any]) -> dict[str, str]:
    """Foreground label (or region) names and the keys that nnU-Net's summaries use for them."""
    names = {}
    for name, value in description["labels"].items():
        if name in ("background", "ignore") or value == 0:
            continue
        whole = tuple(int(part) for part in value) if isinstance(value, list | tuple) else int(value)
        names[name] = str(whole)
    return names


def dice_table(scores: Mapping[str, Scores], n_test: int) -> Table:
    """One row an arm, one column a label, the mean, and the mean of each group of cases."""
    table = Table(title=f"Dice on {n_test} held-out cases")
    table.add_column("", no_wrap=True)
    first = next(iter(scores.values()))
    for name in (*first.labels, "mean", *first.groups):
        table.add_column(name, justify="right")
    for arm, score in scores.items():
        values = (*score.labels.values(), score.mean, *score.groups.values())
        table.add_row(arm, *(f"{value:.3f}" for value in values))
    return table


def time_table(steps: Sequence[Step]) -> Table:
    """Wall time of every step."""
    table = Table(title="Wall time")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for step in steps:
        table.add_row(step.title, f"{step.seconds:.0f}")
    table.add_section()
    table.add_row("all", f"{sum(step.seconds for step in steps):.0f}")
    return table


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One held-out image through the masked autoencoder; all arrays (D, H, W), hidden voxels of ``masked`` are NaN."""

    image: Image
    masked: Image
    filled: Image
    spacing: tuple[float, float, float]
    mask_ratio: float


@dataclass(frozen=True, kw_only=True)
class View:
    """One slice through a volume: its axis, its index, and which ends are drawn on top and on the left."""

    axis: int
    index: int
    upwards: bool

    def cut(self, volume: NDArray[Any]) -> NDArray[Any]:
        """(D, H, W) -> the slice."""
        return np.take(volume, self.index, axis=self.axis)

    def aspect(self, spacing: Sequence[float]) -> float:
        """Height of a pixel over its width."""
        rows, columns = (mm for axis, mm in enumerate(spacing) if axis != self.axis)
        return rows / columns

    def proportion(self, volume: NDArray[Any], spacing: Sequence[float]) -> float:
        """Height of the slice over its width, both in mm."""
        rows, columns = self.cut(volume).shape
        return rows / columns * self.aspect(spacing)


def draw_picture(
    file: Path,
    data: DemoData,
    predictions: Mapping[str, Path],
    scores: Mapping[str, Scores],
    reconstruction: Reconstruction | None,
) -> None:
    """Draw image, truth and both arms' predictions of two held-out cases, and a masked reconstruction, as PNG.

    Pixels keep their true aspect ratio, so thick slices look thick.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    description = data.description()
    names = list(foreground(description))
    shown = [cases[0] for cases in data.groups.values() if cases] or data.test[:2]
    loaded = [load_case(data, case, predictions) for case in shown]
    views = [_view(masks["truth"], spacing, upwards) for _, masks, spacing, upwards in loaded]
    heights = [view.proportion(case[0], case[2]) for view, case in zip(views, loaded, strict=True)]
    if reconstruction is not None:
        plane = View(axis=0, index=reconstruction.image.shape[0] // 2, upwards=loaded[0][3][0])
        heights.append(plane.proportion(reconstruction.image, reconstruction.spacing))
    columns = 2 + len(predictions)
    width = 2.7  # inches a column; half an inch more in each row for its titles
    figure = Figure(
        figsize=(width * columns, sum(width * height + 0.5 for height in heights) + 0.4),
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (case, view, (image, masks, spacing, _)) in enumerate(zip(shown, views, loaded, strict=True)):
        low, high = np.percentile(image, (0.5, 99.9))
        group = next((name for name, cases in data.groups.items() if case in cases), "")
        titles = [f"{case}\n{group}".strip(), "truth"]
        titles += [f"{arm}\nDice {scores[arm].cases[case]:.2f}" for arm in predictions]
        for axis, title, mask in zip(axes[row], titles, (None, *masks.values()), strict=True):
            _show(axis, view.cut(image), view, spacing, (low, high))
            if mask is not None:
                _overlay(axis, view.cut(mask), view, spacing, description)
            axis.set_title(title, fontsize=9)
    if reconstruction is not None:
        _draw_reconstruction(list(axes[-1]), reconstruction, plane)
    figure.legend(
        handles=[Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(names)],
        loc="outside lower center",
        ncols=min(len(names), 5),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(file, dpi=130)


def _draw_reconstruction(axes: list[Any], picture: Reconstruction, view: View) -> None:
    limits = tuple(np.percentile(picture.image, (0.5, 99.9)))
    difference = np.abs(picture.filled - picture.image)
    for axis, title, volume in zip(
        axes,
        (
            "pre-training: held-out image",
            f"what the encoder sees\n({1 - picture.mask_ratio:.0%} of the tokens)",
            "hidden tokens predicted\n(own mean and contrast)",
            "absolute difference",
        ),
        (picture.image, picture.masked, picture.filled, difference),
        strict=False,
    ):
        scale = (0.0, limits[1] - limits[0]) if volume is difference else limits
        _show(axis, view.cut(volume), view, picture.spacing, scale)
        axis.set_title(title, fontsize=9)


def _show(axis: Any, plane: NDArray[Any], view: View, spacing: Sequence[float], limits: Sequence[float]) -> None:
    from matplotlib import colormaps

    grey = colormaps["gray"].with_extremes(bad="#3B4A6B")  # hidden voxels: dark blue, no shade of grey
    axis.imshow(
        plane,
        cmap=grey,
        vmin=limits[0],
        vmax=limits[1],
        aspect=view.aspect(spacing),
        origin="lower" if view.upwards else "upper",
        interpolation="nearest",
    )


def _overlay(
    axis: Any, mask: NDArray[Any], view: View, spacing: Sequence[float], description: Mapping[str, Any]
) -> None:
    from matplotlib.colors import to_rgba

    paint = np.zeros((*mask.shape, 4))
    values = [value for name, value in description["labels"].items() if name in foreground(description)]
    for number, value in enumerate(values):
        paint[np.isin(mask, value)] = to_rgba(COLOURS[number % len(COLOURS)], 0.6)
    axis.imshow(
        paint, aspect=view.aspect(spacing), origin="lower" if view.upwards else "upper", interpolation="nearest"
    )


def load_case(
    data: DemoData, case: str, predictions: Mapping[str, Path]
) -> tuple[Image, dict[str, NDArray[Any]], tuple[float, float, float], tuple[bool, bool, bool]]:
    """First channel, masks (truth first), spacing of the array's axes (mm), and per view whether rows run upwards."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    description = data.description()
    ending = description["file_ending"]
    image_file = data.folder / "imagesTs" / f"{case}_0000{ending}"
    reader = determine_reader_writer_from_dataset_json(description, str(image_file), verbose=False)()
    image, properties = reader.read_images([str(image_file)])
    files = {"truth": data.folder / "labelsTs" / f"{case}{ending}"}
    files |= {arm: folder / f"{case}{ending}" for arm, folder in predictions.items()}
    masks = {name: np.asarray(reader.read_seg(str(file))[0][0]) for name, file in files.items()}
    direction = properties.get("sitk_stuff", {}).get("direction", ())
    if len(direction) == 9:  # LPS: y grows towards the back, z towards the head; heads and fronts belong on top
        up_y, up_z = direction[4] < 0, direction[8] > 0
    else:
        up_y = up_z = False
    depth, height, width = (float(mm) for mm in properties["spacing"])
    return np.asarray(image[0], dtype=np.float32), masks, (depth, height, width), (up_y, up_z, up_z)


def _view(truth: NDArray[Any], spacing: Sequence[float], upwards: Sequence[bool]) -> View:
    """The slice with most labelled voxels: across axis 0, or axis 1 where that shows thick slices from the side."""
    axis = 1 if truth.shape[0] > 1 and spacing[0] > 1.5 * min(spacing[1:]) else 0
    labelled = (truth > 0).sum(axis=tuple(other for other in range(3) if other != axis))
    return View(axis=axis, index=int(labelled.argmax()), upwards=upwards[axis])


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
