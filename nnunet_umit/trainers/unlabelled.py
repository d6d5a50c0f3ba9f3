"""nnU-Net's preprocessed cases without their labels: neither segmentations nor what was derived from them is opened.

Pre-training uses these classes, so it also runs where the ``_seg`` files are deleted, and gives the same losses there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy


@dataclass(frozen=True)
class NoLabels:
    """What nnU-Net's loader asks a label manager, answered for data without labels."""

    all_labels: list[int] = field(default_factory=list)
    has_ignore_label: bool = False


class UnlabelledBlosc2(nnUNetDatasetBlosc2):
    """Images of preprocessed cases; neither the segmentation nor the class locations are ever opened."""

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, None, dict[str, None]]:
        """Image (C, z, y, x), lazily read; zeros in place of labels, no previous stage, no locations."""
        data = self.open_image(self.source_folder, identifier)
        return data, self.no_segmentation(data.shape), None, {"class_locations": None}

    @staticmethod
    def open_image(folder: str, case: str) -> Any:
        """The stored image (C, z, y, x), lazily read."""
        mapped = {} if os.name == "nt" else {"mmap_mode": "r"}  # memory maps of blosc2 fail on Windows (nnU-Net #2723)
        return blosc2.open(urlpath=os.path.join(folder, case + ".b2nd"), mode="r", dparams={"nthreads": 1}, **mapped)

    @staticmethod
    def no_segmentation(image_shape: tuple[int, ...]) -> np.ndarray:
        """Zeros (1, z, y, x) in place of labels."""
        return _no_segmentation(image_shape)


class UnlabelledNumpy(nnUNetDatasetNumpy):
    """The same for nnU-Net's older ``.npz`` folders."""

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, None, dict[str, None]]:
        """See ``UnlabelledBlosc2.load_case``."""
        path = os.path.join(self.source_folder, identifier)
        if os.path.isfile(path + ".npy"):
            data = np.load(path + ".npy", mmap_mode="r")
        else:
            with np.load(path + ".npz") as archive:  # members are read one by one: "seg" stays closed
                data = archive["data"]
        return data, _no_segmentation(data.shape), None, {"class_locations": None}

    @staticmethod
    def unpack_dataset(*arguments: Any, **keywords: Any) -> None:
        """nnU-Net would unpack the segmentations as well; here nothing is unpacked."""


def _no_segmentation(image_shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros((1, *image_shape[1:]), np.int16)  # zero pages: the system gives them memory when they are written


def unlabelled(dataset_class: type) -> type:
    """The label-free version of the dataset class that nnU-Net inferred from a folder.

    Raises:
        NotImplementedError: a storage format this package does not know.
    """
    for version in (UnlabelledBlosc2, UnlabelledNumpy):
        if issubclass(version, dataset_class):
            return version
    raise NotImplementedError(
        f"pre-training reads .b2nd and .npz folders, not those of {dataset_class.__name__}; preprocess the dataset "
        "again with nnUNetv2_preprocess"
    )
