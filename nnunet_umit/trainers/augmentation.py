"""Augmentation of resampled images: nnU-Net's own, mended where it fails here, and a light one."""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform


def light_augmentation(mirror_axes: tuple[int, ...] | None, use_mask: list[bool] | None) -> list[BasicTransform]:
    """nnU-Net's noise, brightness and gamma with its probabilities, and mirroring; nothing that resamples."""
    transforms: list[BasicTransform] = [
        RandomTransform(
            GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1
        ),
        RandomTransform(
            MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), synchronize_channels=False, p_per_channel=1),
            0.15,
        ),
        RandomTransform(
            GammaTransform(
                BGContrast((0.7, 1.5)), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
            ),
            0.3,
        ),
    ]
    if mirror_axes:
        transforms.append(MirrorTransform(mirror_axes))
    if use_mask is not None and any(use_mask):
        masked = [channel for channel, used in enumerate(use_mask) if used]
        transforms.append(MaskImageTransform(apply_to_channels=masked, channel_idx_in_seg=0, set_outside_to=0))
    return transforms


class Blur(GaussianBlurTransform):
    """nnU-Net's blur without its stop-watch, and along axes that are long enough only.

    The stop-watch picks one of two algorithms by their speed at this moment; they differ in the last bits, so the same
    seed would give different batches. And an axis is mirrored at its ends by half a kernel, three standard deviations,
    which crops of a slice or two (``3d_native``) do not have.
    """

    @classmethod
    def like(cls, stock: GaussianBlurTransform) -> Blur:
        """The same settings."""
        blur = cls.__new__(cls)
        blur.__dict__.update(stock.__dict__)
        blur.benchmark = True  # asks the method below for every axis
        return blur

    def _benchmark_wrapper(self, img: torch.Tensor, sigma: float, dim_to_blur: int) -> torch.Tensor:
        if img.shape[1 + dim_to_blur] <= 3 * sigma + 1:
            return img
        blurred: torch.Tensor = blur_dimension(img, sigma, dim_to_blur)
        return blurred


def with_own_blur(transform: BasicTransform) -> BasicTransform:
    """The same transforms, in place, with :class:`Blur` for nnU-Net's."""
    if isinstance(transform, GaussianBlurTransform):
        return Blur.like(transform)
    if isinstance(transform, ComposeTransforms):
        transform.transforms = [with_own_blur(each) for each in transform.transforms]
    if isinstance(transform, RandomTransform):
        transform.transform = with_own_blur(transform.transform)
    return transform
