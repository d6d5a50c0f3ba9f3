"""How far a reconstruction is from its image, for tokenizers: terms that need no downloaded network.

All take (B, C, D, H, W) pairs and return one value for every sample (B,). A 2D image has depth 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_umit.spacing import Anisotropy

SCALES = 3
WINDOW = 7
SSIM_CONSTANTS = (0.01, 0.03)  # shares of the image's range (Wang et al. 2004)
SMALLEST_RANGE = 1e-3  # of a constant image


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (prediction - target).abs().flatten(1).mean(1)


def gradient_error(prediction: Tensor, target: Tensor, anisotropy: Anisotropy) -> Tensor:
    """Mean absolute error of the differences between neighbours along every axis, at three resolutions.

    Each resolution halves the image as a spatially adaptive layer would: no depth while the voxel is thick.
    """
    error = prediction - target
    terms = []
    for halvings in range(SCALES):
        for axis in (2, 3, 4):
            if error.shape[axis] > 1:
                terms.append(error.diff(dim=axis).abs().flatten(1).mean(1))
        stride = (min(anisotropy.depth_stride(2, halvings), error.shape[2]), 2, 2)
        if min(error.shape[3:]) < 2:
            break
        error = F.avg_pool3d(error, stride)
    return torch.stack(terms).mean(0) if terms else error.flatten(1).mean(1) * 0.0


def structural_dissimilarity(prediction: Tensor, target: Tensor) -> Tensor:
    """``(1 - SSIM) / 2``, from 0 to 1, with a flat window of at most 7 voxels an axis (Wang et al. 2004).

    The range of values is that of the target, so the measure does not depend on the unit of the image.
    """
    window = tuple(min(WINDOW, size - 1 + size % 2) for size in target.shape[2:])

    def local(values: Tensor) -> Tensor:
        return F.avg_pool3d(values, window, stride=1)

    extent = (target.flatten(1).amax(1) - target.flatten(1).amin(1)).clamp_min(SMALLEST_RANGE).view(-1, 1, 1, 1, 1)
    c1, c2 = ((constant * extent).square() for constant in SSIM_CONSTANTS)
    mean_p, mean_t = local(prediction), local(target)
    variance_p = local(prediction.square()) - mean_p.square()
    variance_t = local(target.square()) - mean_t.square()
    covariance = local(prediction * target) - mean_p * mean_t
    ssim = (2 * mean_p * mean_t + c1) * (2 * covariance + c2)
    ssim = ssim / ((mean_p.square() + mean_t.square() + c1) * (variance_p + variance_t + c2))
    return 0.5 * (1 - ssim.flatten(1).mean(1))
