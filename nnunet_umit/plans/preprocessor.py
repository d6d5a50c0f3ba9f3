"""nnU-Net's preprocessor, which refuses damaged cases instead of training on them.

Cropping, normalisation and resampling are nnU-Net's own, untouched. The checks live in `run_case` (files) and
`run_case_npy` (voxels), so they hold in `nnUNetv2_preprocess`, in its spawned workers, and at prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_umit.plans import integrity
from nnunet_umit.spacing import native_spacing


class UMITPreprocessor(DefaultPreprocessor):
    """`DefaultPreprocessor` with checks before and after reading; see `nnunet_umit.plans.integrity` for the rules."""

    _files: tuple[list[str], str | None] | None = None  # of the case in work, only to name it in errors

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict[str, Any] | str,
    ) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Check the bytes of every file, then let nnU-Net read and process the case.

        Raises:
            BadImageError: naming file, value, limit and fix.
        """
        for file in [*image_files, *([seg_file] if seg_file is not None else [])]:
            problem = integrity.file_problem(file)
            if problem is not None:
                raise _refused(problem, training=seg_file is not None)
        self._files = (list(image_files), seg_file)
        try:
            return super().run_case(image_files, seg_file, plans_manager, configuration_manager, dataset_json)
        finally:
            self._files = None

    def run_case_npy(
        self,
        data: NDArray[Any],
        seg: NDArray[Any] | None,
        properties: dict[str, Any],
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict[str, Any] | str,
    ) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Check the voxels of image (C, D, H, W) and label (1, D, H, W), then process them as nnU-Net does."""
        files, label_file = self._files or (["array without a file name"], None)
        declared = load_json(dataset_json) if isinstance(dataset_json, str) else dataset_json
        problem = integrity.channel_problem(len(data), declared, files)
        if problem is None:
            problem = integrity.array_problem(np.asarray(data), files, may_be_constant=seg is None)
        if problem is None and seg is not None:
            name = label_file or f"label of {files[0]}"
            problem = integrity.label_problem(seg, integrity.allowed_labels(declared), name)
        if problem is not None:
            raise _refused(problem, training=seg is not None)
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)


def _refused(problem: integrity.Problem, training: bool) -> integrity.BadImageError:
    """What stops the preprocessing of a case, with all that is to be done about it."""
    clean = f"{problem}. Then plan and preprocess again with --clean: the fingerprint was taken with this file"
    return integrity.BadImageError(clean if training else str(problem))


class UMITNativePreprocessor(UMITPreprocessor):
    """For ``3d_native``: every case keeps its own grid, and its spacing follows the image as three constant channels.

    The plans name nnU-Net's ``no_resampling_hack`` as resampling function, for images, labels and predictions.
    """

    def run_case_npy(
        self,
        data: NDArray[Any],
        seg: NDArray[Any] | None,
        properties: dict[str, Any],
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict[str, Any] | str,
    ) -> tuple[NDArray[Any], NDArray[Any], dict[str, Any]]:
        """As for every case; the image comes back as (C + 3, D, H, W), spacing in mm in the axis order of the plans."""
        image, label, properties = super().run_case_npy(
            data, seg, properties, plans_manager, configuration_manager, dataset_json
        )
        spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
        told = np.asarray(native_spacing(spacing, properties["shape_before_cropping"]), np.float32)
        channels = np.broadcast_to(told[:, None, None, None], (3, *image.shape[1:]))
        return np.concatenate((image, channels)), label, properties
