"""How much memory does a training step need? Predicted on tensors without data, so planning costs no memory itself.

The network is built of tensors without data and run forward under ``saved_tensors_hooks``: what autograd would keep for
the backward pass is summed by distinct storage. Two runs (one and two samples) separate what grows with the batch from
what does not. For a GPU the tensors are on the ``meta`` device; for a CPU they are fake tensors that claim to be on the
CPU, because the network convolves differently there.

Counted: weights, gradients and the two moments of AdamW (16 bytes per parameter); everything autograd saves, reduced
SAC kernels and fp16 weight copies included; the loss on the logits of every deep-supervision level; gradients in
flight, as twice the largest single activation; on a GPU the CUDA context. Attention is counted as the fused kernel that
PyTorch uses on GPU and CPU (query, key, value, output, log-sum-exp), not as the L x L matrix of the fallback that
tensors without data take.

Not counted: convolution workspaces beyond that, allocator fragmentation, exponential moving averages, the data loader,
and what the Python process needs anyway.

Mixed precision: nnU-Net trains under fp16 autocast on a GPU. Its rule is imitated here call by call, because a single
factor would be wrong: convolutions and linear layers save fp16, norms and interpolation run and save in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

OPTIMISER_BYTES = 16  # per parameter: fp32 weight, gradient, two AdamW moments
CONTEXT_BYTES = 500_000_000  # CUDA context with cuDNN and cuBLAS workspaces, before the first tensor
IN_FLIGHT = 2  # gradient of an output and of an input exist together while a layer is differentiated
LOSS_BYTES_PER_LOGIT = 20  # fp32: softmax (Dice), two log-softmaxes (cross-entropies), one product, one gradient
LOSS_BYTES_PER_VOXEL = 28  # target as float and twice as int64, one-hot rows as bool, weights of the balanced voxels

GB = 1e9
PRECISIONS = ("mixed", "full")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step, split by what they grow with. Build with `predict_training_memory`."""

    parameters: int
    constant_bytes: int
    sample_bytes: int
    precision: str

    def total(self, batch_size: int) -> int:
        """Bytes for a batch."""
        context = CONTEXT_BYTES if self.precision == "mixed" else 0
        return context + OPTIMISER_BYTES * self.parameters + self.constant_bytes + batch_size * self.sample_bytes

    def fitting_batch(self, available_bytes: float) -> int:
        """The largest batch that stays within `available_bytes`; 0 when a single sample does not."""
        return max(int((available_bytes - self.total(0)) // self.sample_bytes), 0)

    def scaled(self, factor: float) -> TrainingMemory:
        """For a patch with `factor` times the voxels: activations grow with the patch, weights do not."""
        return replace(self, sample_bytes=math.ceil(self.sample_bytes * factor))


@dataclass(frozen=True)
class SavedTensors:
    """What autograd keeps of one forward pass."""

    saved_bytes: int
    largest_bytes: int
    logit_shapes: tuple[tuple[int, ...], ...]


def predict_training_memory(
    arch_kwargs: Mapping[str, Any],
    patch_size: Sequence[int],
    input_channels: int,
    num_classes: int,
    precision: str = "mixed",
) -> TrainingMemory:
    """Memory of one fine-tuning step of `UMITSegmenter` with deep supervision.

    Args:
        arch_kwargs: as in the plans, JSON types only; a second call with the same arguments costs nothing.
        patch_size: voxels, (D, H, W) or (H, W).
        precision: ``"mixed"`` for a GPU (fp16 autocast), ``"full"`` for a CPU (fp32).

    Pre-training needs less: its encoder sees the visible tokens only, and its decoder is narrow.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    return _predict(json.dumps(dict(arch_kwargs)), tuple(patch_size), input_channels, num_classes, precision)


@functools.lru_cache(maxsize=256)
def _predict(
    arch_json: str, patch_size: tuple[int, ...], input_channels: int, num_classes: int, precision: str
) -> TrainingMemory:
    from nnunet_umit.architectures.unetr import UMITSegmenter

    arch_kwargs = json.loads(arch_json)
    native = arch_kwargs.pop("native", False)  # spacing channels would be read, and there is nothing to read
    with without_data(precision):
        network = UMITSegmenter(input_channels, num_classes, deep_supervision=True, **arch_kwargs).train()
        one, two = (
            saved_tensors(network, torch.empty((batch, input_channels, *patch_size)), precision) for batch in (1, 2)
        )
    sample = two.saved_bytes - one.saved_bytes
    shapes = one.logit_shapes[:1] * len(one.logit_shapes) if native else one.logit_shapes  # native: all at full size
    logits = sum(math.prod(shape) for shape in shapes)
    voxels = sum(math.prod(shape[2:]) for shape in shapes)
    loss = LOSS_BYTES_PER_LOGIT * logits + LOSS_BYTES_PER_VOXEL * voxels
    return TrainingMemory(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        constant_bytes=one.saved_bytes - sample,
        sample_bytes=sample + loss + IN_FLIGHT * one.largest_bytes,
        precision=precision,
    )


@contextlib.contextmanager
def without_data(precision: str) -> Iterator[None]:
    """New tensors hold no data: on ``meta`` for ``"mixed"`` (what a GPU does), fake CPU tensors for ``"full"``."""
    if precision == "mixed":
        with torch.device("meta"):
            yield
        return
    from nnunet_umit.architectures.rope import forget_tables

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        forget_tables()  # they are remembered by device, and these are fake


def saved_tensors(network: nn.Module, image_BCDHW: Tensor, precision: str = "full") -> SavedTensors:
    """Run one forward pass and sum the distinct storages that autograd saved, parameters excluded.

    Works `without_data` (prediction) and on real tensors (measurement, ``precision="full"``).
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _TrainingRules(precision == "mixed"):
        output = network(image_BCDHW)
    sizes = [storage.nbytes() for storage in storages.values()]
    levels = output if isinstance(output, (list, tuple)) else [output]
    return SavedTensors(sum(sizes), max(sizes, default=0), tuple(tuple(level.shape) for level in levels))


class _FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel: the same output shape, and saves what such a kernel saves."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("the memory model only runs forward")


_HALF: frozenset[Callable[..., Any]] = frozenset(
    {
        F.conv2d,
        F.conv3d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.linear,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
    }
)
_SINGLE: frozenset[Callable[..., Any]] = frozenset(
    {F.group_norm, F.layer_norm, F.interpolate, F.softmax, F.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt}
)


class _TrainingRules(TorchFunctionMode):
    """Fused attention for tensors without data and, where `mixed`, the casts of CUDA's autocast (torch.amp docs)."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        dtype = torch.float16 if func in _HALF else torch.float32 if func in _SINGLE else None
        if self.mixed and dtype is not None:
            args = [_cast(value, dtype) for value in args]
            named = {name: _cast(value, dtype) for name, value in named.items()}
        if func is F.scaled_dot_product_attention and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return _FusedAttention.apply(*args[:3])
        return func(*args, **named)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
