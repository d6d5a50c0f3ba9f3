"""The body mask that stands in for a label: nnU-Net's commands want one, and pre-training wants patches of the body.

It need not be beautiful. It must never be empty (the fingerprint takes intensity statistics from it), should leave
air out, and must cost little beside reading the image; so it is found on a coarse grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_COARSE = 96  # voxels along an axis of the coarse grid, at most twice that
_BINS = 256


def body_mask(image_ZYX: NDArray[Any]) -> NDArray[np.uint8]:
    """1 in the body, 0 outside, for any image that is not constant.

    Otsu's threshold on a smoothed coarse copy, its largest component, holes filled slice by slice. At least one voxel
    is 1 and at least one is 0; one of the ones is not zero in the image, because nnU-Net crops zeros away before it
    looks.

    Args:
        image_ZYX: One channel, finite; Z may be 1.
    """
    strides = [max(1, size // _COARSE) for size in image_ZYX.shape]
    coarse = image_ZYX[tuple(slice(None, None, stride) for stride in strides)].astype(np.float64)
    low, high = np.percentile(coarse, (0.5, 99.5))  # metal and hot pixels would draw the threshold to themselves
    if low < high:
        coarse = np.clip(coarse, low, high)
    sigmas = [1.0 if size >= 8 else 0.0 for size in coarse.shape]  # not across a few thick slices
    body = _largest(ndimage.gaussian_filter(coarse, sigmas) > otsu(coarse))
    for plane in body:
        plane[...] = ndimage.binary_fill_holes(plane)
    indices = [np.arange(size) // stride for size, stride in zip(image_ZYX.shape, strides, strict=True)]
    mask = body.astype(np.uint8)[np.ix_(*indices)]
    if not (mask.astype(bool) & (image_ZYX != 0)).any():
        mask = (image_ZYX != 0).astype(np.uint8)
    if mask.all():
        mask.flat[int(np.abs(image_ZYX).argmin())] = 0
    return mask


def otsu(values: NDArray[np.float64]) -> float:
    """The threshold with the largest variance between the two classes (Otsu 1979); the value, when all are equal."""
    low, extent = float(values.min()), float(values.max() - values.min())
    if extent == 0:
        return low
    counts, edges = np.histogram((values - low) / extent, _BINS, (0.0, 1.0))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * middles)
    means_below = sums[:-1] / np.maximum(below, 1)
    means_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    between = below * above * (means_below - means_above) ** 2
    best = np.flatnonzero(between == between.max())  # a plateau where a gap lies between the classes: its middle
    return low + extent * float(middles[best].mean())


def _largest(mask_ZYX: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected component, or the mask itself when it is empty."""
    parts, number = ndimage.label(mask_ZYX)
    if number < 2:
        return mask_ZYX
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())
