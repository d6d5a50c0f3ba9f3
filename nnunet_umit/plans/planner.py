"""nnU-Net's planner with a transformer at its end: ``nnUNetv2_plan_and_preprocess -d ID -pl UMITPlanner``.

Fingerprint, transpose, target spacing, resampling and normalisation are nnU-Net's and stay so (CT stays CT). What is
ours is `get_plans_for_configuration`: token, patch, batch, network size (see `layout`), and the ``umit`` block. Planned
are ``3d_fullres`` and ``2d``, and ``3d_native`` without resampling (see `native`); a low-resolution cascade would add
one input channel per class and so break the transfer of a pre-trained encoder.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json, maybe_mkdir_p, save_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_umit.plans import report
from nnunet_umit.plans.configuration import NETWORK, SMALL_PATCH, plan_configuration
from nnunet_umit.plans.labels import Foreground, read_foreground
from nnunet_umit.plans.layout import Task
from nnunet_umit.plans.memory import GB
from nnunet_umit.plans.native import THICKEN, native_configuration, representative
from nnunet_umit.plans.sizing import SizeChoice
from nnunet_umit.spacing import native_spacing

PLANNED = ("3d_fullres", "2d", "3d_native")
STOCK_PREPROCESSOR = "DefaultPreprocessor"  # what the command line passes when the user says nothing


class UMITPlanner(ExperimentPlanner):
    """Writes ``UMITPlans`` and picks the network size (XS, S or B) from the amount of data and the memory target.

    The constructor has nnU-Net's signature because the command line calls it by keyword.
    """

    size: str | None = None  # fixed by the subclasses

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = STOCK_PREPROCESSOR,
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        if not (math.isfinite(gpu_memory_target_in_gb) and gpu_memory_target_in_gb > 0):
            raise ValueError(f"-gpu_memory_target {gpu_memory_target_in_gb} must be a number of GB above 0; default 8")
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            "UMITPreprocessor" if preprocessor_name == STOCK_PREPROCESSOR else preprocessor_name,
            plans_name or f"UMITPlans{self.size or ''}",
            _checked_spacing(overwrite_target_spacing),
            suppress_transpose,
        )
        self.lowres_creation_threshold = 0.0  # no 3d_lowres, hence no cascade
        self._choice: SizeChoice | None = None  # made for the first configuration, kept for the others
        self._foreground: Foreground | None = None  # read once

    def plan_experiment(self) -> dict[str, Any]:
        """Plan as nnU-Net does, then print a table and the next commands instead of nnU-Net's "U-Net" printout."""
        self._choice = None
        with _quiet():
            plans = super().plan_experiment()
        names = [name for name in PLANNED if name in plans["configurations"]]
        rows = report.table_rows(plans, *self._heads_and_channels())
        report.print_table(rows, {name: plans["configurations"][name]["umit"]["why"] for name in names})
        print(f"Plans were saved to {self._plans_file}\nNext:")
        print("\n".join("  " + line for line in report.next_commands(self.dataset_name, self.plans_identifier, names)))
        return plans

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        """nnU-Net's, but an axis of one voxel comes first, whatever its spacing: ``2d`` cuts along the first axis."""
        sizes = np.median(np.asarray(self.dataset_fingerprint["shapes_after_crop"]), 0)
        single = [axis for axis in range(3) if sizes[axis] == 1]
        if self.suppress_transpose or len(single) != 1:
            forward, backward = super().determine_transpose()
            return list(forward), list(backward)
        order = [*single, *(axis for axis in range(3) if axis not in single)]
        return order, [order.index(axis) for axis in range(3)]

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | Sequence[float],
        median_shape: np.ndarray | Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """One configuration. `spacing` (mm) and `median_shape` (voxels) are already transposed, depth first; two values
        mean 2D. nnU-Net calculates with the returned spacing, so it stays an array."""
        reach = self._labelled().reach([float(value) for value in spacing])
        task = self._task(spacing, median_shape, approximate_n_voxels_dataset, reach)
        data, data_kwargs, seg, seg_kwargs = self.determine_resampling()
        probabilities, probabilities_kwargs = self.determine_segmentation_softmax_export_fn()
        return {
            **self._configuration(task, data_identifier),
            "preprocessor_name": self.preprocessor_name,
            "median_image_size_in_voxels": np.asarray(median_shape),
            "spacing": np.asarray(spacing, dtype=float),
            "resampling_fn_data": data.__name__,
            "resampling_fn_seg": seg.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": probabilities.__name__,
            "resampling_fn_probabilities_kwargs": probabilities_kwargs,
        }

    def get_native_plans(self, plans: dict[str, Any]) -> dict[str, Any]:
        """The configuration ``3d_native``: no resampling, every image brings its spacing along.

        It has the tokens of the resampled configuration, so that weights move between the two unchanged.
        """
        order = list(plans["transpose_forward"])
        resampled = plans["configurations"].get("3d_fullres", plans["configurations"]["2d"])
        spacings, shapes = (
            np.asarray(self.dataset_fingerprint[name], dtype=float)[:, order]
            for name in ("spacings", "shapes_after_crop")
        )
        told = [native_spacing(*each) for each in zip(spacings.tolist(), shapes.tolist(), strict=True)]
        extent = representative(told, shapes.tolist())
        voxels = float(shapes.prod(1).mean()) * self.dataset_json["numTraining"]
        configuration = self._configuration(
            replace(
                self._task(extent.spacing, extent.shape, voxels, self._labelled().native_reach(extent.spacing)),
                native=True,
            ),
            self.generate_data_identifier("3d_native"),
            thicken=THICKEN,
            token_size=resampled["architecture"]["arch_kwargs"]["token_size"],
        )
        return native_configuration(configuration, extent)

    def _labelled(self) -> Foreground:
        if self._foreground is None:
            forward, _ = self.determine_transpose()
            labels, reader = self.dataset_json["labels"], self.determine_reader_writer()
            self._foreground = read_foreground(self.dataset, labels, reader, forward)
        return self._foreground

    def _task(self, spacing: Any, median_shape: Any, dataset_voxels: float, reach: tuple[float, ...] | None) -> Task:
        classes, channels = self._heads_and_channels()
        return Task(
            spacing=tuple(float(value) for value in spacing),
            median_shape=tuple(float(size) for size in median_shape),
            dataset_voxels=float(dataset_voxels),
            input_channels=channels,
            num_classes=classes,
            target_bytes=self.UNet_vram_target_GB * GB,
            reach=reach,
        )

    def _configuration(self, task: Task, data_identifier: str, **options: Any) -> dict[str, Any]:
        """What every configuration has: network, patch, batch, normalisation and the umit block."""
        normalisation, use_mask = self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        orientation = self._labelled().orientation
        return plan_configuration(
            task,
            self._size_for(task),
            orientation if len(task.spacing) == 3 else orientation.of_slices(),
            data_identifier=data_identifier,
            normalisation=normalisation,
            use_mask=use_mask,
            **options,
        )

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Save; of the configurations in an older file of that name only those the user added survive."""
        configurations = plans["configurations"]
        configurations["3d_native"] = self.get_native_plans(plans)
        recursive_fix_for_json_export(plans)
        if "3d_fullres" in configurations:
            full = configurations["3d_fullres"]
            covered = math.prod(full["patch_size"]) / math.prod(full["median_image_size_in_voxels"])
            full["batch_dice"] = covered < SMALL_PATCH  # stock: true exactly when a low resolution would be worth it
        plans["configurations"] = {name: configurations[name] for name in PLANNED if name in configurations}
        if isfile(self._plans_file):
            old = load_json(self._plans_file)["configurations"]
            kept = _own_configurations(old, plans["configurations"])
            dropped = sorted(set(old) - set(kept) - set(plans["configurations"]))
            plans["configurations"].update(kept)
            if dropped:
                print(f"WARNING: dropped from {self._plans_file}: {', '.join(dropped)} (cascade or another planner's)")
        maybe_mkdir_p(join(nnUNet_preprocessed, self.dataset_name))
        save_json(plans, self._plans_file, sort_keys=False)

    @property
    def _plans_file(self) -> str:
        return join(nnUNet_preprocessed, self.dataset_name, self.plans_identifier + ".json")

    def _heads_and_channels(self) -> tuple[int, int]:
        return report.segmentation_heads(self.dataset_json), report.image_channels(self.dataset_json)

    def _size_for(self, task: Task) -> SizeChoice:
        """All configurations of a dataset share one network size, so that weights move between them."""
        if self._choice is not None:
            same = f"{self._choice.size} as in the first configuration, so that one set of weights serves both."
            return replace(self._choice, why=same)
        if self.size is not None:
            self._choice = SizeChoice(self.size, f"{self.size} because {type(self).__name__} was asked for.")
        else:
            self._choice = task.choose_size()
        return self._choice


class UMITPlannerS(UMITPlanner):
    """Size S (width 384, 12 blocks), whatever the amount of data."""

    size = "S"


class UMITPlannerB(UMITPlanner):
    """Size B (width 768, 12 blocks), whatever the amount of data."""

    size = "B"


class UMITPlannerL(UMITPlanner):
    """Size L (width 1024, 24 blocks), whatever the amount of data."""

    size = "L"


def _checked_spacing(spacing: Sequence[float] | None) -> list[float] | None:
    if spacing is None:
        return None
    values = [float(value) for value in spacing]
    if len(values) != 3 or any(not math.isfinite(value) or value <= 0 for value in values):
        given = " ".join(f"{value:g}" for value in values)
        raise ValueError(
            f"-overwrite_target_spacing {given} must be three numbers above 0, in mm and in the axis order of the "
            "fingerprint (slices first for NIfTI); for 2D images the first is 999 times the larger pixel spacing"
        )
    return values


def _own_configurations(old: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
    """Configurations the user added to an older plans file: ours, of his own name, with a parent that still exists."""
    kept: dict[str, Any] = {}
    candidates = {
        name: configuration
        for name, configuration in old.items()
        if name not in planned
        and name not in (*PLANNED, "3d_lowres", "3d_cascade_fullres")
        and not {"previous_stage", "next_stage"} & set(configuration)
    }
    for _ in candidates:  # once per candidate is enough for any order of parents and children
        for name, configuration in candidates.items():
            parent = configuration.get("inherits_from")
            ours = configuration.get("architecture", {}).get("network_class_name") == NETWORK
            if (parent in planned or parent in kept) if parent is not None else ours:
                kept[name] = configuration
    return kept


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what nnU-Net prints about U-Nets; its warnings come through, and everything when planning fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), end="")
        raise
    for line in said.getvalue().splitlines():
        if line.startswith("WARNING"):
            print(line)
