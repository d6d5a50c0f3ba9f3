"""What plain interpolation makes of hidden voxels: the yardstick of masked pre-training.

A masked autoencoder that explains less of the hidden tokens than a smooth continuation of the visible ones has learned
no anatomy yet. The continuation starts from a mean of near voxels and is then relaxed towards a harmonic function
(every hidden voxel is the mean of its neighbours, near ones in mm count for more); visible voxels stay.

Shape legend: B batch, C channels, D H W voxels, K visible tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_umit.architectures.mae import MAEOutput, normalise_patches
from nnunet_umit.architectures.masking import near_mean
from nnunet_umit.architectures.stem import take_tokens
from nnunet_umit.spacing import TokenGrid

REACH = 0.25  # of a token: where the weights of the first mean have fallen to 1 / e
RELAXATIONS = 20  # five times as many change the loss in its third digit


@torch.no_grad()
def interpolation_loss(output: MAEOutput) -> float:
    """Masked loss of the interpolation under the masks of a pass: what it says of a hidden token, normalised like the
    target, times the one factor that suits all of them best."""
    grid, image = output.grid, output.grid.pad(output.image)
    made = interpolate(image, output.visible, grid, output.spacings)
    guess, _, _ = normalise_patches(take_tokens(grid.patchify(made), output.hidden))
    target = output.target.float()
    factor = (target * guess).mean() / guess.square().mean().clamp_min(torch.finfo(guess.dtype).tiny)
    return float((target - factor * guess).square().mean())


def interpolate(image: Tensor, visible_BK: Tensor, grid: TokenGrid, spacings: Sequence[Sequence[float]]) -> Tensor:
    """A padded image (B, C, D, H, W) with its hidden voxels filled from the visible ones, in float32.

    Args:
        spacings: mm of every sample or of all, depth first; two values for 2D.
    """
    image = image.float()
    known = grid.expand(image.new_zeros(image.shape[0], grid.tokens).scatter(1, visible_BK, 1.0))
    image = image * known
    field = torch.cat((image, known), 1).movedim(1, -1)
    start = near_mean(field, [REACH * size for size in grid.token]).movedim(-1, 1)
    made = torch.where(known > 0, image, start)
    weights = 1.0 / torch.tensor([[torch.inf, *each][-3:] for each in spacings], device=image.device).square()
    weights = (weights / weights.sum(1, keepdim=True)).T.reshape(3, -1, 1, 1, 1, 1)
    for _ in range(RELAXATIONS):
        mean = sum(weight * neighbours(made, axis) for axis, weight in enumerate(weights, start=2))
        made = image + (1.0 - known) * mean
    return made


def neighbours(image: Tensor, axis: int) -> Tensor:
    """Mean of the voxels before and behind every voxel along an axis; the outermost are their own neighbours."""
    last = image.shape[axis] - 1
    before = torch.cat((image.narrow(axis, 0, 1), image.narrow(axis, 0, last)), axis)
    behind = torch.cat((image.narrow(axis, 1, last), image.narrow(axis, last, 1)), axis)
    return 0.5 * (before + behind)
