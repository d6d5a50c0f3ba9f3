"""Rotary positions for 3D token grids (RoPE, arXiv 2104.09864; additive depth, PUMIT, 2312.07630; EVA-02 in plane).

No learned table, so no parameter depends on the patch size. With h the width of a head there are h/2 rotated channel
pairs; the first half of the pairs turns with the row, the second half with the column, and depth is added to both:

    angle(pair k)       = z * w_depth[k] + y * w_plane[k]
    angle(pair h/4 + k) = z * w_depth[k] + x * w_plane[k]        k = 0 .. h/4 - 1
    w_plane[k] = 10000 ** (-2k / (h/2))      w_depth[k] = 2333 ** (-(2k + 1) / (h/2))

Angles are linear in the position, so attention depends on position differences only. Depth 0 is EVA-02's 2D table.
Depth, row and column are those of the image before it was turned to bring its thick axis to the front.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nnunet_umit.spacing import NATURAL, Size3, TokenGrid

Steps = tuple[tuple[float, float, float], ...]
PLANE_BASE = 10000.0
DEPTH_BASE = 2333.0


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Positions (L, 3) in (depth, row, column) -> angles (L, head_dim / 2) in radians, float64.

    Raises:
        ValueError: ``head_dim`` is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head width {head_dim} is not a multiple of 4, as rotary positions need; change num_heads")
    pairs = head_dim // 2
    k = torch.arange(pairs // 2, dtype=torch.float64)
    plane = PLANE_BASE ** (-2 * k / pairs)
    depth = DEPTH_BASE ** (-(2 * k + 1) / pairs)
    z, y, x = positions.double().unsqueeze(-1).unbind(1)
    return torch.cat((z * depth + y * plane, z * depth + x * plane), -1)


def token_positions(grid: TokenGrid) -> Tensor:
    """Position of every token along the axes of the image, in token order and position units, counted from the first:
    (S, L, 3) float64, S samples or 1 for all."""
    index = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float64) for count in grid.shape))
    along = [grid.order.index(axis) for axis in NATURAL]
    return torch.stack([(index * torch.tensor(steps, dtype=torch.float64))[:, along] for steps in grid.steps])


def rotary_table(grid: TokenGrid, head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine for every token of a grid: (2, S, L, head_dim / 2) float32, S samples or 1 for all.

    Remembered: the images of a training share a few grids.
    """
    return _constant_table(grid.shape, grid.steps, grid.order, head_dim, device)


def forget_tables() -> None:
    """Drop the remembered tables."""
    _table.cache_clear()


@torch.compiler.assume_constant_result
def _constant_table(shape: Size3, steps: Steps, order: Size3, head_dim: int, device: torch.device) -> Tensor:
    """Compiled code holds the table instead of computing it in every step; for that, arguments are plain values."""
    return _table(shape, steps, order, head_dim, device)


@functools.lru_cache(maxsize=16)
def _table(shape: Size3, steps: Steps, order: Size3, head_dim: int, device: torch.device) -> Tensor:
    grid = TokenGrid(shape, (1, 1, 1), steps, order)
    with torch.inference_mode(False), torch.no_grad():
        angles = torch.stack([rotary_angles(places, head_dim) for places in token_positions(grid)])
        return torch.stack((angles.cos(), angles.sin())).to(device=device, dtype=torch.float32)


def gather_table(table: Tensor, index: Tensor | None) -> Tensor:
    """Rows of the table for a token subset: index (B, K) -> (2, B, 1, K, h/2); None -> (2, S, 1, L, h/2)."""
    if index is None:
        return table.unsqueeze(2)
    samples = torch.arange(index.shape[0], device=index.device) if table.shape[1] > 1 else torch.zeros_like(index[:, 0])
    return table[:, samples[:, None], index].unsqueeze(2)


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs of (..., B, heads, L, h) by the table (2, B or 1, 1, L, h/2).

    On a CPU as one complex product, read where the pairs lie, without a copy; GPUs fuse the plain form, and
    torch.compile knows no complex numbers.
    """
    if heads.device.type == "cpu" and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.complex(table[0], table[1]))
        return turned.flatten(-2).to(heads.dtype)
    return rotate_plainly(heads, table)


def rotate_plainly(heads: Tensor, table: Tensor) -> Tensor:
    """The same without complex numbers."""
    cosine, sine = table.to(heads.dtype)
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)
