"""Spatially adaptive convolution (SAC): one isotropic kernel serves every slice thickness, and 2D.

Weights are always stored as the full isotropic 3D kernel, so every configuration has the same state dict. One
definition gives all variants (PUMIT, arXiv 2312.07630, made exact): replicate each thick slice ``r`` times, apply the
stored kernel, average back to the thick slices. The closed forms below never build the replicated image.

Stored kernels have the axes of the image. Where the image was turned to bring its thick axis to the front, they are
turned with it before anything else (PUMIT's axis 0 is always the thick one, so it has no such rule).

``fidelity="pumit"`` gives the paper's published rule instead: a 3-tap kernel summed over depth while the voxel is still
thick (no context between slices), and summed instead of averaged chunks in the transposed convolution.

Shape legend: B batch, C channels, D H W voxels, k kernel. First pure functions on weights, then on images, then thin
modules that hold the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.slices import slice_conv, to_slices, to_volume
from nnunet_umit.spacing import NATURAL, Anisotropy, Size3

FIDELITIES = ("exact", "pumit")


def chunk_depth(kernel: Tensor, depth: int, reduce: str) -> Tensor:
    """Join contiguous depth taps: (..., k, k, k) -> (..., depth, k, k), summed or averaged (``reduce``).

    Raises:
        ValueError: ``depth`` does not divide the stored depth.
    """
    taps = kernel.shape[-3]
    if depth < 1 or taps % depth:
        raise ValueError(f"{taps} depth taps cannot be joined into {depth}; depth must divide {taps}")
    if taps == depth:
        return kernel
    chunks = kernel.reshape(*kernel.shape[:-3], depth, taps // depth, *kernel.shape[-2:])
    return chunks.sum(-3) if reduce == "sum" else chunks.mean(-3)


def turn(kernel: Tensor, order: Size3) -> Tensor:
    """A stored kernel (..., k, k, k), its axes in the ``order`` that those of the image were put in."""
    if order == NATURAL:
        return kernel
    first = kernel.dim() - 3
    return kernel.permute(*range(first), *(first + axis for axis in order))


def down_kernel(kernel: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
    """Kernel = stride (patch embedding, down-sampling): depth taps are summed in contiguous chunks."""
    return chunk_depth(turn(kernel, anisotropy.order), anisotropy.depth_stride(kernel.shape[-1], halvings), "sum")


def same_kernel(kernel: Tensor, anisotropy: Anisotropy, halvings: int, fidelity: str) -> Tensor:
    """Kernel 3, stride 1: side taps ``w(±1) / r`` and centre ``w(0) + (1 - 1/r) (w(-1) + w(+1))``.

    Exact average of the thin convolution over a slice that is ``r`` thin slices thick, for any real ``r >= 1``. With
    ``fidelity="pumit"`` the taps are summed to depth 1 while the voxel is thick and left alone afterwards.
    """
    if kernel.shape[-3] == 1:
        return kernel
    if kernel.shape[-3] != 3:
        raise ValueError(f"a same-size SAC kernel has 1 or 3 depth taps, not {kernel.shape[-3]}")
    kernel, left = turn(kernel, anisotropy.order), anisotropy.at(halvings)
    if fidelity == "pumit":
        return kernel.sum(-3, keepdim=True) if anisotropy.level > halvings else kernel
    if left.planar:
        return kernel.sum(-3, keepdim=True)
    if left.ratio == 1.0:
        return kernel
    before, centre, after = kernel.unbind(-3)
    share = left.inverse_ratio
    return torch.stack((before * share, centre + (1.0 - share) * (before + after), after * share), -3)


def mixed_same_conv(image: Tensor, kernel: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
    """The same-size convolution of a batch (B, C, D, H, W) whose samples share a level but not a ratio.

    The kernel of :func:`same_kernel` is linear in 1/r, so one convolution of the sum over depth, and one of the rest
    scaled by each sample's 1/r, give every sample its own: no loop over samples.
    """
    ratios = anisotropy.at(halvings).ratios
    share = torch.tensor([1.0 / ratio for ratio in ratios], device=image.device, dtype=image.dtype).view(-1, 1, 1, 1, 1)
    kernel = turn(kernel, anisotropy.order)
    before, _, after = kernel.unbind(-3)
    rest = torch.stack((before, -(before + after), after), -3)
    return same_conv(image, kernel.sum(-3, keepdim=True)) + share * same_conv(image, rest)


def up_kernel(kernel: Tensor, anisotropy: Anisotropy, halvings: int, fidelity: str) -> Tensor:
    """Transposed, kernel = stride, after ``halvings`` in-plane halvings: depth taps are averaged in chunks.

    A thick voxel is then the mean of its thin ones; ``fidelity="pumit"`` sums them (the adjoint of the down layer).
    """
    stride = kernel.shape[-1]
    depth = anisotropy.depth_stride(stride, halvings - int(math.log2(stride)))
    return chunk_depth(turn(kernel, anisotropy.order), depth, "sum" if fidelity == "pumit" else "mean")


def down_conv(image: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Non-overlapping convolution (B, C, D, H, W) with a reduced kernel (O, C, d, k, k); stride is the kernel.

    Raises:
        ValueError: a size is not a multiple of the kernel (the remainder would be dropped silently).
    """
    stride = tuple(kernel.shape[2:])
    for axis, (size, step) in enumerate(zip(image.shape[2:], stride, strict=True)):
        if size % step:
            raise ValueError(
                f"size {tuple(image.shape[2:])} is not a multiple of {stride} along axis {axis}; pad it first"
            )
    if stride[0] == 1 and image.device.type == "cpu":
        return to_volume(F.conv2d(to_slices(image), kernel.squeeze(2), bias, stride[1:]), image.shape[0])
    return F.conv3d(image, kernel, bias, stride)


def same_conv(image: Tensor, kernel: Tensor) -> Tensor:
    """Same-size convolution (B, C, D, H, W) with a reduced kernel; a single slice only meets the centre taps."""
    if image.shape[2] == 1 and kernel.shape[2] == 3:
        kernel = kernel[:, :, 1:2]
    if image.device.type == "cpu":
        return slice_conv(image, kernel)
    return F.conv3d(image, kernel, padding=tuple(size // 2 for size in kernel.shape[2:]))


KEPT = 8  # reduced kernels of a layer: the levels of a dataset; where every image has its own ratio, the latest


class _SACLayer(nn.Module):
    """Holds the stored kernel and caches reduced ones while it cannot change (eval, no gradient)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, fidelity: str) -> None:
        super().__init__()
        if fidelity not in FIDELITIES:
            raise ValueError(f"fidelity {fidelity!r} is not one of {', '.join(FIDELITIES)}")
        self.fidelity = fidelity
        self._reduced: dict[tuple[Anisotropy, int], Tensor] = {}

    def reduced(self, anisotropy: Anisotropy, halvings: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return reduce(self.weight)
        key = (anisotropy, halvings)
        if key not in self._reduced:
            if len(self._reduced) >= KEPT:
                del self._reduced[next(iter(self._reduced))]
            with torch.inference_mode(False), torch.no_grad():
                self._reduced[key] = reduce(self.weight)
        return self._reduced[key]

    def forget(self) -> None:
        """Drop cached kernels; called whenever the stored one may change."""
        self._reduced.clear()

    def train(self, mode: bool = True) -> _SACLayer:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _SACLayer:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]


class SACDown(_SACLayer):
    """Convolution with kernel = stride = ``size`` (PUMIT variant A): (B, C, D, H, W) -> (B, O, D/d, H/size, W/size)."""

    def __init__(self, in_channels: int, out_channels: int, size: int, fidelity: str = "exact") -> None:
        super().__init__(fidelity)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, size, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight.view(out_channels, -1))

    def kernel(self, anisotropy: Anisotropy, halvings: int) -> Tensor:
        """The reduced kernel (O, C, d, size, size)."""
        return self.reduced(anisotropy, halvings, lambda weight: down_kernel(weight, anisotropy, halvings))

    def forward(self, image: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        return down_conv(image, self.kernel(anisotropy, halvings), self.bias)


class SACConv(_SACLayer):
    """Convolution with kernel 3 and stride 1 (PUMIT variant B), no bias: a normalisation follows. Keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, fidelity: str = "exact") -> None:
        super().__init__(fidelity)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3, 3))
        nn.init.kaiming_normal_(self.weight, a=0.01)

    def forward(self, image: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        if self.fidelity == "exact" and anisotropy.at(halvings).ratios:
            return mixed_same_conv(image, self.weight, anisotropy, halvings)
        kernel = self.reduced(
            anisotropy, halvings, lambda weight: same_kernel(weight, anisotropy, halvings, self.fidelity)
        )
        return same_conv(image, kernel)


class SACUp(_SACLayer):
    """Transposed convolution with kernel = stride = ``size`` (PUMIT variant C).

    ``halvings`` counts the in-plane halvings of the input; the output has ``halvings - log2(size)``.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, fidelity: str = "exact") -> None:
        super().__init__(fidelity)
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels, size, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight.view(in_channels, -1))

    def kernel(self, anisotropy: Anisotropy, halvings: int) -> Tensor:
        """The reduced kernel (C, O, d, size, size)."""
        return self.reduced(anisotropy, halvings, lambda weight: up_kernel(weight, anisotropy, halvings, self.fidelity))

    def forward(self, image: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        kernel = self.kernel(anisotropy, halvings)
        return F.conv_transpose3d(image, kernel, self.bias, stride=tuple(kernel.shape[2:]))
