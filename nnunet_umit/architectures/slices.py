"""Same-size 3D convolution as 2D convolutions over slices: what a CPU does best.

On CPUs the backward pass of a narrow 3D convolution is slow: up to 3 times slower than this at 16 to 64 channels, and
far slower for one input channel. A kernel of three slices either reads each slice together with its neighbours
(:func:`with_neighbours`), or writes three results for each slice, which go to the slice and its neighbours
(:func:`to_neighbours`). The two are adjoint, so each is the other's backward pass, and the kernel is turned around in
depth between them. Whatever has fewer channels is tripled: that costs the fewest copies and keeps the least for the
backward pass.

Shape legend: B batch, C channels, D H W voxels, O output channels, k kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def slice_conv(image: Tensor, kernel: Tensor) -> Tensor:
    """(B, C, D, H, W) and a kernel (O, C, 1 or 3, k, k) -> (B, O, D, H, W); beyond the image there are zeros."""
    batch, (out, channels, taps, size) = image.shape[0], kernel.shape[:4]
    padding = size // 2
    if taps == 1:
        return to_volume(F.conv2d(to_slices(image), kernel[:, :, 0], padding=padding), batch)
    if channels < out:
        reading = kernel.transpose(1, 2).reshape(out, taps * channels, size, size)
        joined: Tensor = _WithNeighbours.apply(image)
        return to_volume(F.conv2d(joined, reading, padding=padding), batch)
    writing = kernel.flip(2).permute(2, 0, 1, 3, 4).reshape(taps * out, channels, size, size)
    shared: Tensor = _ToNeighbours.apply(F.conv2d(to_slices(image), writing, padding=padding), batch)
    return shared


def to_slices(volume: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B * D, C, H, W)."""
    batch, channels, depth, height, width = volume.shape
    return volume.transpose(1, 2).reshape(batch * depth, channels, height, width)


def to_volume(slices: Tensor, batch: int) -> Tensor:
    """(B * D, C, H, W) -> (B, C, D, H, W)."""
    return slices.reshape(batch, -1, *slices.shape[1:]).transpose(1, 2).contiguous()


def with_neighbours(volume: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B * D, 3 C, H, W): the slice before, the slice itself, the slice after; zeros at the ends."""
    batch, channels, depth, height, width = volume.shape
    slices = volume.transpose(1, 2)
    joined = volume.new_empty(batch, depth, 3, channels, height, width)
    joined[:, 1:, 0] = slices[:, :-1]
    joined[:, :, 1] = slices
    joined[:, :-1, 2] = slices[:, 1:]
    joined[:, 0, 0] = 0
    joined[:, -1, 2] = 0
    return joined.view(batch * depth, 3 * channels, height, width)


def to_neighbours(joined: Tensor, batch: int) -> Tensor:
    """(B * D, 3 C, H, W) -> (B, C, D, H, W): what each slice has for the one before, for itself and for the one after,
    summed where it belongs; the adjoint of :func:`with_neighbours`."""
    parts = joined.reshape(batch, -1, 3, joined.shape[1] // 3, *joined.shape[2:])
    volume = parts[:, :, 1].transpose(1, 2).clone(memory_format=torch.contiguous_format)  # never the input itself
    volume[:, :, :-1] += parts[:, 1:, 0].transpose(1, 2)
    volume[:, :, 1:] += parts[:, :-1, 2].transpose(1, 2)
    return volume


class _WithNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor) -> Tensor:
        ctx.batch = volume.shape[0]
        return with_neighbours(volume)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _ToNeighbours.apply(gradients[0], ctx.batch)


class _ToNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, batch: int) -> Tensor:
        return to_neighbours(joined, batch)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _WithNeighbours.apply(gradients[0]), None
