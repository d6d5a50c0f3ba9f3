"""Augmentation of images on their own grid: nnU-Net's transforms, kept off the spacing channels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

from nnunet_umit.architectures.native import SPACING_CHANNELS
from nnunet_umit.plans.native import crop_shape
from nnunet_umit.spacing import MAX_LEVEL, Anisotropy
from nnunet_umit.trainers.patches import Augmentation, CaseTable, rotates_in_plane, weights_of

Shape = tuple[int, ...]
GEOMETRY = (Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform)
ZOOM_PROBABILITY = 0.2  # nnU-Net's
ROUND = 1.5  # nnU-Net turns 2D patches freely up to this aspect ratio, else by 15 degrees


class ToldSpatialTransform(SpatialTransform):
    """nnU-Net's rotation and scaling, with the scale told by the sample: the network hears of the new spacing."""

    @classmethod
    def like(cls, stock: SpatialTransform) -> ToldSpatialTransform:
        """The same settings."""
        told = cls.__new__(cls)
        told.__dict__.update(stock.__dict__)
        return told

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """As nnU-Net draws them, but for the scale ``zoom``."""
        zoom = data_dict["zoom"]
        self.p_scaling, self.scaling = float(zoom != 1.0), (zoom, zoom)
        parameters: dict[str, Any] = super().get_parameters(**data_dict)
        return parameters


@dataclass(frozen=True)
class Prepared:
    """Transforms for one shape of crops."""

    read: Shape
    geometry: ComposeTransforms
    appearance: ComposeTransforms


class TransformAugmentation(Augmentation):
    """Geometry moves image, label and the mask of what is inside; appearance changes image and label only."""

    def __init__(self, prepared: Mapping[Shape, Prepared]) -> None:
        self.prepared = dict(prepared)

    def read_shape(self, shape: Sequence[int]) -> Shape:
        return self.prepared[tuple(shape)].read

    def apply(
        self, shape: Sequence[int], zoom: float, image: torch.Tensor, inside: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prepared = self.prepared[tuple(shape)]
        moved = prepared.geometry(image=torch.cat((image, inside)), segmentation=label, zoom=zoom)
        image, inside = moved["image"][:-1], moved["image"][-1:]
        made = prepared.appearance(image=image.contiguous(), segmentation=moved["segmentation"])
        return made["image"], inside, made["segmentation"]


def prepare(read: Shape, transforms: BasicTransform | None) -> Prepared:
    """Sort nnU-Net's list of transforms into the two kinds, keeping their order."""
    steps = [] if transforms is None else list(transforms.transforms)
    geometry = [step for step in steps if isinstance(step, GEOMETRY)]
    geometry = [ToldSpatialTransform.like(step) if isinstance(step, SpatialTransform) else step for step in geometry]
    return Prepared(
        read, ComposeTransforms(geometry), ComposeTransforms([step for step in steps if not isinstance(step, GEOMETRY)])
    )


def native_shapes(patch: Sequence[int], planned: Anisotropy, thickened: bool = False) -> list[Shape]:
    """Crops (thick axis first) of every level, and of 2D images.

    Args:
        thickened: along any axis, which then comes first.
    """
    spacings = [(2.0**level, 1.0, 1.0) for level in range(MAX_LEVEL + 1)]
    patches = itertools.permutations(patch) if thickened else [tuple(patch)]
    shapes = [crop_shape(each, planned, spacing) for each in patches for spacing in spacings]
    return list(dict.fromkeys([*shapes, (1, *tuple(patch)[1:])]))


def rotation_for(shape: Sequence[int]) -> tuple[tuple[float, float], bool, Shape]:
    """nnU-Net's rules for one shape of crops: range of angles, whether to turn within slices only, voxels to read."""
    in_plane = rotates_in_plane(shape)
    degrees = 180.0 if in_plane else 30.0
    if shape[0] == 1 and max(shape[1:]) / min(shape[1:]) > ROUND:
        degrees = 15.0
    angle = degrees / 180.0 * np.pi
    moved = list(shape)[1:] if in_plane else list(shape)
    read = [int(size) for size in get_patch_size(moved, angle, angle, angle, (0.85, 1.25))]
    return (-angle, angle), in_plane, (shape[0], *read) if in_plane else tuple(read)


def read_table(dataset: Any) -> CaseTable:
    """Spacing of every preprocessed case, from one voxel of its spacing channels; all cases weigh the same."""
    rows = [np.asarray(dataset.load_case(case)[0][-SPACING_CHANNELS:, 0, 0, 0]) for case in dataset.identifiers]
    cases = [str(case) for case in dataset.identifiers]
    return CaseTable(cases, np.asarray(rows, dtype=float), weights_of([1.0] * len(cases)), [""] * len(cases))
