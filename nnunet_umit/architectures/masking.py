"""Which tokens are hidden, uniformly at random, for each sample of its own (MAE, arXiv 2111.06377); and what stands in
their place.

Shape legend: B batch, L tokens, K visible, M hidden, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_umit.spacing import TokenGrid

SMALLEST = 1e-30  # a total weight below this counts as this: where nothing is near, nothing is suggested


class TooFewTokensError(ValueError):
    """An image of a single token: nothing of it can be hidden and something shown."""


def visible_count(tokens: int, mask_ratio: float) -> int:
    """``floor(L (1 - ratio))``, at least one token visible and one hidden.

    Raises:
        TooFewTokensError: fewer than two tokens.
    """
    if tokens < 2:
        raise TooFewTokensError(
            f"an image of {tokens} token(s) cannot be masked; use a larger patch or a smaller token_size in the plans"
        )
    return min(max(int(tokens * (1.0 - mask_ratio) + 1e-6), 1), tokens - 1)


def random_masking(
    batch: int,
    tokens: int,
    mask_ratio: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw visible (B, K) and hidden (B, L - K) token indices on the CPU, each in rising order.

    Args:
        generator: one for all samples, or one for each, so that a sample's mask does not depend on its neighbours.
    """
    if isinstance(generator, Sequence):
        noise = torch.stack([torch.rand(tokens, generator=each) for each in generator])
    else:
        noise = torch.rand(batch, tokens, generator=generator)
    order = noise.argsort(1)
    count = visible_count(tokens, mask_ratio)
    return order[:, :count].sort(1).values, order[:, count:].sort(1).values


def fill_hidden(tokens_BKE: Tensor, visible_BK: Tensor, mask_BLE: Tensor, grid: TokenGrid) -> Tensor:
    """The whole sequence (B, L, E): visible tokens in their places; in the others the mask token plus :func:`spread` of
    the visible ones.

    Mask tokens alone are all alike. They would find their neighbours only through attention, which has to learn first
    that near tokens matter: hundreds of steps in which nothing else is learned.
    """
    suggested = spread(tokens_BKE, visible_BK, grid) + mask_BLE.to(tokens_BKE.dtype)
    return suggested.scatter(1, visible_BK.unsqueeze(-1).expand_as(tokens_BKE), tokens_BKE)


def spread(tokens_BKE: Tensor, visible_BK: Tensor, grid: TokenGrid) -> Tensor:
    """Mean of the visible tokens for every place, with weights ``exp(-d^2)``, d the distance in tokens: (B, L, E)."""
    batch, _, dim = tokens_BKE.shape
    weighted = F.pad(tokens_BKE.float(), (0, 1), value=1.0)
    index = visible_BK.unsqueeze(-1).expand_as(weighted)
    field = weighted.new_zeros(batch, grid.tokens, dim + 1).scatter(1, index, weighted)
    means = near_mean(field.view(batch, *grid.shape, dim + 1), (1.0, 1.0, 1.0))
    return means.flatten(1, 3).to(tokens_BKE.dtype)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Full precision inside a training's autocast; other devices than these have none in nnU-Net, or in older torch."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def near_mean(field: Tensor, reach: Sequence[float]) -> Tensor:
    """Normalised convolution with a Gaussian (Knutsson & Westin, CVPR 1993): (B, D, H, W, E + 1) -> (B, D, H, W, E).

    The Gaussian is separable, so it is one small matrix product along each axis; the weights of the values ride along
    as their last channel. Always in float32: a weight of exp(-25) is 0 in float16.

    Args:
        field: values times weights, and the weights.
        reach: steps along (depth, height, width) at which the Gaussian has fallen to 1 / e.
    """
    with without_autocast(field.device):
        for axis, steps in enumerate(reach, start=1):
            place = torch.arange(field.shape[axis], device=field.device, dtype=torch.float32) / steps
            near = (-(place[:, None] - place).square()).exp()
            field = (near @ field.movedim(axis, -2)).movedim(-2, axis)
        return field[..., :-1] / field[..., -1:].clamp_min(SMALLEST)
