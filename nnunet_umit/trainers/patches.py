"""One patch of one case: from resampled cases (nnU-Net's rules), and from cases that keep their own grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits

from nnunet_umit.architectures.native import append_spacing, axis_order, bucket, depth_first, thick_axis
from nnunet_umit.plans.native import crop_shape
from nnunet_umit.spacing import Anisotropy

Transforms = Callable[..., dict[str, Any]]
DRAWS = 32  # at a time, until a batch of one level is full
MIRROR_PROBABILITY = 0.5  # of each axis; nnU-Net's
MOST_DRAWS = 200_000  # then the rare level's own samples are repeated


class PatchSamples:
    """Patches of resampled cases, cut and augmented as nnU-Net's loader does, one at a time.

    Args:
        loader: gives cases, places and transforms; its batch size is that of all ranks together.
    """

    def __init__(self, loader: nnUNetDataLoader) -> None:
        self.loader = loader

    def draw(self) -> list[str]:
        """Cases, with replacement."""
        return [str(case) for case in self.loader.get_indices()]

    def drawn(self, requests: Sequence[str]) -> bool:
        """Never: labels are those of the resampled case."""
        return False

    def make(self, request: str, position: int) -> tuple[torch.Tensor, Any, str, str]:
        """Image (C, *patch) and target of a case; the last positions of a batch are cut around foreground."""
        loader = self.loader
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            data, segmentation, _, properties = loader._data.load_case(request)
            force = loader.get_do_oversample(position)
            lower, upper = loader.get_bbox(data.shape[1:], force, properties["class_locations"])
            box = [[int(low), int(high)] for low, high in zip(lower, upper, strict=True)]
            image = torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()
            label = torch.from_numpy(crop_and_pad_nd(segmentation, box, -1, cast_cropped_to=np.int16)).to(torch.int16)
            if loader.patch_size_was_2d:
                image, label = image[:, 0], label[:, 0]
            if loader.transforms is not None:
                made = loader.transforms(image=image, segmentation=label)
                image, label = made["image"], made["segmentation"]
        return image, label, request, ""


@dataclass(frozen=True)
class CaseTable:
    """What a native loader must know of its cases before it opens one.

    Args:
        cases: names for the dataset's ``load_case``.
        spacings: mm per axis, (cases, 3).
        weights: how often a case is drawn, relative to the others; they sum to 1.
        groups: dataset that a case belongs to; empty where there is only one.
    """

    cases: Sequence[str]
    spacings: np.ndarray
    weights: np.ndarray
    groups: Sequence[str]


@dataclass(frozen=True)
class Jitter:
    """Random changes of the spacing, of which the network is told.

    Args:
        thicken: probability that an image without thick slices is given some, by averaging 2 to ``thickest`` slices
            along a random axis.
        zoom: probability that an image is zoomed, and ``zooms`` the factors its spacing is multiplied by.
    """

    thicken: float = 0.0
    thickest: int = 6
    zoom: float = 0.0
    zooms: tuple[float, float] = (0.7, 1.4)


@dataclass(frozen=True)
class NativeRequest:
    """A sample to be made: row of the case table, what its slices and spacing become (axis order of the image), and the
    ``shape`` of the crop with that spacing, thick axis first."""

    row: int
    case: str
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    zoom: float
    slices: int
    axis: int

    @property
    def shared(self) -> tuple[object, ...]:
        """What the samples of a batch have in common: thick axis, level, 2D or not, and shape."""
        return *bucket(self.spacing), self.shape

    def __str__(self) -> str:
        return self.case


class NativeSamples:
    """Patches of cases on their own grid; a batch holds one anisotropy level, and every case is drawn by its weight.

    The first sample of a batch is drawn without restriction and fixes thick axis, level and shape; the others are drawn
    until they have them too. So the levels come as often as the cases that have them, and no state has to be kept
    between batches. Where slices are averaged the patch turns with the image, so that it covers the same part of the
    body.

    Samples come out in the axis order of the image, with their spacing as three more channels.

    Args:
        dataset: nnU-Net's dataset of preprocessed cases (image, spacing channels).
        table: its cases.
        batch_size: of all ranks together.
        patch: the plan's patch, for the anisotropy ``planned``.
        labels: nnU-Net's label manager, or its label-free stand-in.
        mirror_axes: axes of the images, before the thick one comes first, that are mirrored half of the time.
        augmentation: for a crop (D, H, W): the larger crop to read, and transforms of ``geometry`` (image, inside,
            label; told the zoom) and ``appearance`` (image and label).
    """

    def __init__(
        self,
        dataset: Any,
        table: CaseTable,
        *,
        batch_size: int,
        patch: Sequence[int],
        planned: Anisotropy,
        labels: Any,
        oversample_foreground: float,
        jitter: Jitter,
        mirror_axes: Sequence[int] = (),
        augmentation: Augmentation,
    ) -> None:
        self.dataset = dataset
        self.table = table
        self.batch_size = batch_size
        self.patch = tuple(patch)
        self.planned = planned
        self.labels = labels
        self.oversample_foreground = oversample_foreground
        self.jitter = jitter
        self.mirror_axes = tuple(mirror_axes)
        self.augmentation = augmentation
        self.cumulative = np.cumsum(table.weights)

    def draw(self) -> list[NativeRequest]:
        """Samples that can be one batch."""
        chosen = [self._request()]
        for _ in range(MOST_DRAWS // DRAWS):
            if len(chosen) >= self.batch_size:
                break
            drawn = [self._request() for _ in range(DRAWS)]
            chosen += [each for each in drawn if each.shared == chosen[0].shared]
        return (chosen * self.batch_size)[: self.batch_size]

    def drawn(self, requests: Sequence[NativeRequest]) -> bool:
        """Where slices are averaged, see :func:`draw_slice`."""
        return any(request.slices > 1 for request in requests)

    def _request(self) -> NativeRequest:
        row = min(int(np.searchsorted(self.cumulative, np.random.uniform(), side="right")), len(self.cumulative) - 1)
        spacing = [float(value) for value in self.table.spacings[row]]
        slices, axis = 1, 0
        if np.random.uniform() < self.jitter.thicken and _level(spacing) == (0, False):
            slices, axis = int(np.random.randint(2, self.jitter.thickest + 1)), int(np.random.randint(3))
            spacing[axis] *= slices
        patch = turned_patch(self.patch, self.table.spacings[row], spacing)
        zoom = 1.0
        if np.random.uniform() < self.jitter.zoom:
            zoom = float(np.random.uniform(*self.jitter.zooms))
            zoomed = self._zoomed(patch, spacing, zoom)
            zoom, spacing = (1.0, spacing) if zoomed is None else (zoom, zoomed)
        depth, height, width = (float(np.float32(value)) for value in spacing)  # what the network will read
        shape = crop_shape(patch, self.planned, (depth, height, width))
        return NativeRequest(row, self.table.cases[row], (depth, height, width), shape, zoom, slices, axis)

    def _zoomed(self, patch: Sequence[int], spacing: Sequence[float], zoom: float) -> list[float] | None:
        """The spacing after a zoom: of all axes, or within thick slices; None where it would turn one kind into the
        other, make another axis the thick one, or ask for more slices than the patch was planned with."""
        before = crop_shape(patch, self.planned, spacing)
        in_plane = rotates_in_plane(before)
        fixed = thick_axis(spacing) if in_plane else None
        zoomed = [value if axis == fixed else value * zoom for axis, value in enumerate(spacing)]
        after = crop_shape(patch, self.planned, zoomed)
        alike = rotates_in_plane(after) == in_plane and thick_axis(zoomed) == thick_axis(spacing)
        return zoomed if alike and after[0] <= max(before[0], patch[0]) else None

    def make(self, request: NativeRequest, position: int) -> tuple[torch.Tensor, Any, str, str]:
        """Image (C + 3, *crop) and target (1, *crop); they are augmented with the thick axis in front."""
        data, segmentation, _, properties = self.dataset.load_case(request.case)
        shape, order = request.shape, axis_order(request.spacing)
        force = position >= round(self.batch_size * (1 - self.oversample_foreground))
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            final, read = (
                _in_image_order(size, order, request.axis, request.slices)
                for size in (shape, self.augmentation.read_shape(shape))
            )
            placer = nnUNetDataLoader(self.dataset, 1, read, final, self.labels)
            lower, _ = placer.get_bbox(data.shape[1:], force, properties["class_locations"])
            image = read_crop(data, slice(0, data.shape[0] - 3), lower, read, 0).float()
            label = read_crop(segmentation, slice(None), lower, read, -1).to(torch.int16)
            inside = read_crop(np.broadcast_to(np.float32(1), (1, *data.shape[1:])), slice(None), lower, read, 0)
            if request.slices > 1:
                joined = [_join_slices(each, request.axis, request.slices) for each in (image, inside, label)]
                image, inside, label = average_slices(joined[0], joined[1]), joined[1].amax(-1), draw_slice(*joined[1:])
            flipped = [axis + 1 for axis in self.mirror_axes if np.random.uniform() < MIRROR_PROBABILITY]
            image, inside, label = (each.flip(flipped) for each in (image, inside, label))
            turned = [each.permute(0, *(axis + 1 for axis in order)).contiguous() for each in (image, inside, label)]
            back = [order.index(axis) + 1 for axis in range(3)]
            made = self.augmentation.apply(shape, request.zoom, *turned)
            image, inside, target = (each.permute(0, *back).contiguous() for each in made)
            image = append_spacing(image, request.spacing, _where(inside))
        number, planar = _level(request.spacing)
        level = "2D" if planar else f"level {number}"
        group = self.table.groups[request.row]
        return image, target, request.case, f"{group}, {level}" if group else level


class Augmentation:
    """Transforms of native samples; this one only cuts.

    Deep-supervision targets are not made here: native networks give all logits at full resolution.
    """

    def read_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Voxels to read for a crop of ``shape`` (thick axis first), more where it is to be rotated."""
        return tuple(shape)

    def apply(
        self, shape: Sequence[int], zoom: float, image: torch.Tensor, inside: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image (C, *read), inside (1, *read) and label (1, *read) -> the same of ``shape``."""
        return image, inside, label


def rotates_in_plane(shape: Sequence[int]) -> bool:
    """Whether nnU-Net would rotate and zoom a crop within its slices only (its "dummy 2D" augmentation)."""
    from nnunetv2.configuration import ANISO_THRESHOLD

    return bool(max(shape) / shape[0] > ANISO_THRESHOLD)


def _level(spacing: Sequence[float]) -> tuple[int, bool]:
    """What the samples of a batch share: anisotropy level, and whether they are 2D."""
    anisotropy = Anisotropy.from_spacing(depth_first(spacing))
    return anisotropy.level, anisotropy.planar


def _in_image_order(shape: Sequence[int], order: Sequence[int], axis: int, slices: int) -> list[int]:
    """Thick-axis-first voxels -> voxels in the image's axis order, before its slices are joined."""
    sizes = [0, 0, 0]
    for size, each in zip(shape, order, strict=True):
        sizes[each] = int(size)
    sizes[axis] *= slices
    return sizes


def read_crop(array: Any, channels: slice, lower: Sequence[int], size: Sequence[int], pad: int) -> torch.Tensor:
    """Read (C, *size) from ``lower`` on, opening only what lies inside; the rest is ``pad``."""
    inner = [
        slice(max(int(low), 0), max(min(int(low) + length, whole), 0))
        for low, length, whole in zip(lower, size, array.shape[1:], strict=True)
    ]
    found = torch.from_numpy(np.array(array[(channels, inner[0], inner[1], inner[2])]))
    margins: list[int] = []
    for low, length, part in zip(lower, size, inner, strict=True):
        margins = [part.start - int(low), length - (part.stop - int(low)), *margins]
    return torch.nn.functional.pad(found, margins, value=pad)


def _join_slices(volume: torch.Tensor, axis: int, slices: int) -> torch.Tensor:
    """(C, D, H, W) -> the same with every ``slices`` neighbours along ``axis`` in a new last axis."""
    return volume.unflatten(axis + 1, (volume.shape[axis + 1] // slices, slices)).movedim(axis + 2, -1)


def turned_patch(patch: Sequence[int], own: Sequence[float], spacing: Sequence[float]) -> tuple[int, int, int]:
    """A patch (thick axis of the ``own`` spacing first) for an image that was given another ``spacing``.

    It has the same voxels along every axis of the image, in the order that the network sees now.
    """
    before, after = axis_order(own), axis_order(spacing)
    depth, height, width = (int(patch[before.index(axis)]) for axis in after)
    return depth, height, width


def average_slices(joined: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """(C, *size, slices) -> (C, *size): the mean of those slices that are ``inside`` (1, *size, slices) the image."""
    return (joined * inside).sum(-1) / inside.sum(-1).clamp_min(1)


def draw_slice(inside: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
    """(1, *size, slices) labels -> (1, *size): every thick voxel has the label of one of its slices, drawn at random.

    Only slices ``inside`` the image are drawn: at its border a thick slice is not all image.

    So the share of a class in a thick voxel is the probability of its label, and what a network learns. The most
    frequent label would be a hard decision, and where two slices differ always for the same class: a perfect network of
    such labels, brought back to a thin grid, draws bodies that are too small.
    """
    drawn = torch.from_numpy(np.random.uniform(size=(*joined.shape[:-1], 1)))
    before = inside.cumsum(-1) - inside
    chosen = (drawn * inside.sum(-1, keepdim=True)).floor()  # the how-manieth of those inside
    index = ((inside > 0) & (before == chosen)).int().argmax(-1, keepdim=True)
    return joined.gather(-1, index).squeeze(-1)


def _where(inside: torch.Tensor) -> torch.Tensor | None:
    """(1, D, H, W) -> where the image is, (D, H, W); None for everywhere."""
    mask = inside[0] > 0.5
    return mask if bool(mask.any()) and not bool(mask.all()) else None


def weights_of(shares: Sequence[float]) -> np.ndarray:
    """Relative weights as probabilities.

    Raises:
        ValueError: a weight that is negative or not finite, or none above 0.
    """
    values = np.asarray(shares, dtype=float)
    if not len(values) or not np.isfinite(values).all() or (values < 0).any() or math.isclose(values.sum(), 0.0):
        raise ValueError(f"weights must be finite, not negative, and one of them above 0; they are {list(shares)[:5]}")
    return values / values.sum()
