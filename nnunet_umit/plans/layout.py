"""From one configuration of a dataset to a network: the rules of `sizing` and the bytes of `memory` put together.

Nothing here knows nnU-Net; everything is in voxels, millimetres and bytes. Shapes are (D, H, W), or (H, W) in 2D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nnunet_umit.plans import sizing
from nnunet_umit.plans.memory import GB, TrainingMemory, predict_training_memory
from nnunet_umit.spacing import Anisotropy

# Stem and decoder at full, half and quarter resolution: narrow, because full resolution costs the memory and the time.
# Half of the time of a step for the least data, at no loss of Dice that could be measured (docs/results.md).
CHANNELS = (8, 24, 64)
CHANNELS_OF_SMALLEST = (8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """What one network size leads to: the network's arguments, token and patch in voxels, and the memory they take."""

    arch_kwargs: dict[str, Any]
    token: sizing.Shape
    patch: sizing.Shape
    memory: TrainingMemory


@dataclass(frozen=True)
class Task:
    """What is to be planned for.

    Args:
        spacing: mm, transposed (depth first); two values mean 2D.
        median_shape: voxels of the median image at that spacing.
        dataset_voxels: voxels of all training images together.
        target_bytes: memory that a training step may take.
        reach: voxels per axis that a patch need not exceed, because no label lies further; None: the whole image.
        native: images come as they are; then all logits are at full resolution, which takes memory.
    """

    spacing: tuple[float, ...]
    median_shape: tuple[float, ...]
    dataset_voxels: float
    input_channels: int
    num_classes: int
    target_bytes: float
    reach: tuple[float, ...] | None = None
    native: bool = False

    @property
    def anisotropy(self) -> Anisotropy:
        """Level and ratio of the planned spacing."""
        return Anisotropy.from_spacing(self.spacing)

    def choose_size(self) -> sizing.SizeChoice:
        """XS, S or B from the number of training tokens and, for B, the memory target."""
        layout = self.layout("XS")
        tokens = self.dataset_voxels / math.prod(layout.token)
        if tokens >= sizing.TOKENS_FOR_S:
            layout = self.layout("S")

        def base_fits() -> bool:
            arch_kwargs = self.arch_kwargs("B", layout.arch_kwargs["token_size"])
            return self._predict(arch_kwargs, layout.patch).total(sizing.SMALLEST_BATCH) <= self.target_bytes

        return sizing.choose_size(tokens, base_fits)

    def layout(self, size: str, token_size: int | None = None) -> Layout:
        """Token and patch for a network size: first what 8-voxel tokens would lead to on whole images, then the token
        that suits that, and the patch that reaches as far as the labels need.

        Args:
            token_size: use this one, whatever suits.

        Raises:
            ValueError: not even one token per axis fits the memory target.
        """
        if token_size is None:
            unlimited = self._fit(size, sizing.DEFAULT_TOKEN_SIZE, math.inf, self.median_shape)
            token_size = sizing.choose_token_size(unlimited.patch, self.anisotropy)
        reach = self.reach or self.median_shape
        needed = tuple(min(pair) for pair in zip(self.median_shape, reach, strict=True))
        return self._fit(size, token_size, sizing.token_limit(self.anisotropy), needed)

    def batch_size(self, layout: Layout) -> int:
        """Samples per step for a layout."""
        fitting = layout.memory.fitting_batch(self.target_bytes)
        tokens = sizing.count_tokens(layout.patch, layout.token)
        return sizing.choose_batch_size(layout.patch, tokens, self.dataset_voxels, fitting, self.anisotropy.planar)

    def arch_kwargs(self, size: str, token_size: int) -> dict[str, Any]:
        """Everything the network needs, as JSON types: a trained folder predicts with nothing but this package."""
        from nnunet_umit.architectures.encoder import SIZES

        strides = self.anisotropy.strides(token_size)
        channels = CHANNELS_OF_SMALLEST if size == "XS" else CHANNELS
        return {
            "spacing": list(self.spacing),
            "token_size": token_size,
            "stem": "conv",
            **SIZES[size],
            "stem_channels": list(channels),
            "decoder_channels": list(channels),
            "strides": [list(stride[3 - len(self.spacing) :]) for stride in strides],
            "fidelity": "exact",
            "positions": "relative",
            "checkpointing": False,
            "cpu_bfloat16": False,
        }

    def _fit(self, size: str, token_size: int, limit: float, shape: tuple[float, ...]) -> Layout:
        """The largest patch of a token size, up to `shape`, that holds at most `limit` tokens and fits memory at the
        smallest batch.

        One prediction serves the whole search: activations grow with the voxels of a patch (a test holds that to 2 %).
        """
        token = sizing.token_shape(token_size, self.anisotropy, len(shape))
        arch_kwargs = self.arch_kwargs(size, token_size)
        most = sizing.token_limit(self.anisotropy)
        probe = sizing.fit_patch(shape, token, lambda patch: sizing.count_tokens(patch, token) <= most)
        memory = self._predict(arch_kwargs, probe)

        def needed(patch: sizing.Shape) -> int:
            return memory.scaled(math.prod(patch) / math.prod(probe)).total(sizing.SMALLEST_BATCH)

        def fits(patch: sizing.Shape) -> bool:
            return sizing.count_tokens(patch, token) <= limit and needed(patch) <= self.target_bytes

        try:
            patch = sizing.fit_patch(shape, token, fits)
        except ValueError as error:
            raise ValueError(
                f"size {size} needs {needed(token) / GB:.2g} GB for a patch of one token {token} at batch "
                f"{sizing.SMALLEST_BATCH}, the memory target is {self.target_bytes / GB:g} GB; raise "
                "-gpu_memory_target, or plan a smaller size with -pl UMITPlanner"
            ) from error
        # A patch over the token limit is only asked for its shape, so its memory is not worth a second prediction.
        final = memory if limit == math.inf or patch == probe else self._predict(arch_kwargs, patch)
        return Layout(arch_kwargs, token, patch, final)

    def _predict(self, arch_kwargs: dict[str, Any], patch: sizing.Shape) -> TrainingMemory:
        given = {**arch_kwargs, "native": True} if self.native else arch_kwargs
        return predict_training_memory(given, patch, self.input_channels, self.num_classes)
