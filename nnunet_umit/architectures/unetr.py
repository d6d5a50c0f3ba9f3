"""UNETR-style decoder (arXiv 2103.10504) and the segmentation network made of encoder and decoder.

From token resolution the decoder climbs one halving at a time: narrow the channels, interpolate, join the skip
feature, one SAC convolution (on a CPU the decoder, not the transformer, is what costs). Skips come from the conv stem
where it has that resolution, else from evenly spaced blocks of the transformer (blocks 3, 6, 9 of 12 for 16-voxel
tokens, as in UNETR); with a patch stem the full-resolution skip is a convolution on the image itself. Levels and
strides follow from token size and spacing.

Shape legend: B batch, C channels, D H W voxels, E encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.encoder import Encoding, SACViT, encoder_arguments
from nnunet_umit.architectures.native import NativeView
from nnunet_umit.architectures.sac import SACUp
from nnunet_umit.architectures.stem import ConvNormAct
from nnunet_umit.architectures.transfer import Transferable
from nnunet_umit.spacing import Anisotropy

UPSAMPLE = ("interpolate", "transposed")


class DecoderLevel(nn.Module):
    """One step up: (B, C, coarse) and a skip feature (B, S, fine) -> (B, O, fine)."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, upsample: str, fidelity: str):
        super().__init__()
        self.upsample = upsample
        if upsample == "transposed":
            self.up: nn.Module = SACUp(in_channels, out_channels, 2, fidelity)
        else:
            self.up = nn.Conv3d(in_channels, out_channels, 1)
        self.conv = ConvNormAct(out_channels + skip_channels, out_channels, fidelity)

    def forward(self, coarse: Tensor, skip: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        """``halvings`` counts the in-plane halvings of the skip feature."""
        if self.upsample == "transposed":
            fine = self.up(coarse, anisotropy, halvings + 1)
        else:
            fine = F.interpolate(self.up(coarse), skip.shape[2:], mode="trilinear", align_corners=False)
        return self.conv(torch.cat((fine, skip), 1), anisotropy, halvings)


class UNETRDecoder(nn.Module):
    """Tokens and skip features -> logits at every resolution level (finest first).

    All parameters live below ``seg_layers``: nnU-Net's own ``-pretrained_weights`` skips keys with that name, so a
    pre-training checkpoint loads even where our hook is switched off. ``deep_supervision`` is the flag nnU-Net's
    trainers set; without it only the finest logits are computed.
    """

    def __init__(
        self,
        encoder: SACViT,
        input_channels: int,
        num_classes: int,
        *,
        channels: Sequence[int],
        deep_supervision: bool,
        upsample: str,
        fidelity: str,
        logit_bound: float,
    ) -> None:
        super().__init__()
        if upsample not in UPSAMPLE:
            raise ValueError(f"upsample {upsample!r} is not one of {', '.join(UPSAMPLE)}")
        self.deep_supervision = deep_supervision
        self.logit_bound = logit_bound
        levels = encoder.token_size.bit_length() - 1
        widths = list(channels[:levels])
        while len(widths) < levels:
            widths.append(2 * widths[-1])
        stem = encoder.stem_channels[:levels]
        first_tap = max(len(stem), 1)
        taps = levels - first_tap
        self.levels = levels
        self.stem_levels = len(stem)
        self.taps = tuple(
            min(round(encoder.depth * level / levels), encoder.depth - 1) for level in range(first_tap, levels)
        )
        self.seg_layers = nn.ModuleDict()
        if not stem:
            self.seg_layers["image"] = ConvNormAct(input_channels, widths[0], fidelity)
        for index in range(taps):
            self.seg_layers[f"tap{first_tap + index}"] = nn.Conv3d(encoder.embed_dim, widths[first_tap + index], 1)
        below = encoder.embed_dim
        for level in reversed(range(levels)):
            skip = stem[level] if level < len(stem) else widths[level]
            self.seg_layers[f"level{level}"] = DecoderLevel(below, skip, widths[level], upsample, fidelity)
            self.seg_layers[f"head{level}"] = nn.Conv3d(widths[level], num_classes, 1)
            below = widths[level]

    def skips(self, encoding: Encoding) -> list[Tensor]:
        """One skip feature for each level, finest first, at the level's own resolution."""
        skips = list(encoding.features[: self.levels])
        if not skips:
            skips.append(self.seg_layers["image"](encoding.image, encoding.anisotropy, 0))
        for tap in encoding.taps:
            level = len(skips)
            narrow = self.seg_layers[f"tap{level}"](encoding.grid.unflatten(tap))
            skips.append(F.interpolate(narrow, self.size(encoding, level), mode="trilinear", align_corners=False))
        return skips

    def size(self, encoding: Encoding, level: int) -> tuple[int, ...]:
        """Voxels of a level in the padded image."""
        size = list(encoding.grid.padded_size)
        for stride in encoding.anisotropy.strides(2**level):
            size = [voxels // step for voxels, step in zip(size, stride, strict=True)]
        return tuple(size)

    def forward(self, encoding: Encoding, full_size: bool = False) -> list[Tensor]:
        """Bounded logits, finest first, cropped to the unpadded image; only the finest without deep supervision.

        Args:
            full_size: coarse logits are interpolated to the voxels of the image, before they are cropped.
        """
        skips = self.skips(encoding)
        feature = encoding.grid.unflatten(encoding.tokens)
        logits: list[Tensor] = []
        for level in reversed(range(self.levels)):
            feature = self.seg_layers[f"level{level}"](feature, skips[level], encoding.anisotropy, level)
            if level == 0 or self.deep_supervision:
                raw = self.seg_layers[f"head{level}"](feature)
                bounded = self.logit_bound * (raw / self.logit_bound).tanh()
                if full_size and level:
                    bounded = F.interpolate(bounded, encoding.grid.padded_size, mode="trilinear", align_corners=False)
                logits.insert(0, self._crop(bounded, encoding, 0 if full_size else level))
        return logits

    def _crop(self, logits: Tensor, encoding: Encoding, level: int) -> Tensor:
        padded, size = self.size(encoding, level), encoding.grid.padded_size
        factors = [fine / coarse for fine, coarse in zip(size, padded, strict=True)]
        wanted = [max(round(v / f), 1) for v, f in zip(encoding.grid.image_size, factors, strict=True)]
        return logits[..., : wanted[0], : wanted[1], : wanted[2]]


class UMITSegmenter(Transferable):
    """The network in a UMIT plan: SACViT and UNETR-style decoder, as nnU-Net's plans construct it.

    Args:
        input_channels, num_classes, deep_supervision: given by nnU-Net.
        decoder_channels: widths from full resolution down; missing coarser ones double the last.
        strides: read by nnU-Net from the plans to scale the deep-supervision targets; must fit token and spacing.
        logit_bound: logits are squashed to (-bound, bound): nnU-Net accumulates them in fp16.
        upsample: ``"interpolate"`` or ``"transposed"`` (SAC).
        native: every image brings its spacing in three more channels (:mod:`nnunet_umit.architectures.native`);
            with deep supervision all logits come at full resolution then, because strides differ between images.
        arch_kwargs: everything else goes to :class:`SACViT`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        decoder_channels: Sequence[int] = (8, 24, 64),
        strides: Sequence[Sequence[int]] | None = None,
        logit_bound: float = 100.0,
        upsample: str = "interpolate",
        native: bool = False,
        **arch_kwargs: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(arch_kwargs) - set(encoder_arguments(arch_kwargs)))
        if unknown:
            raise ValueError(f"unknown arch_kwargs {unknown} in the plans; plan again with -pl UMITPlanner")
        self.encoder = SACViT(input_channels, **arch_kwargs)
        self.native = native
        self._check_strides(strides)
        self.decoder = UNETRDecoder(
            self.encoder,
            input_channels,
            num_classes,
            channels=decoder_channels,
            deep_supervision=deep_supervision,
            upsample=upsample,
            fidelity=arch_kwargs.get("fidelity", "exact"),
            logit_bound=logit_bound,
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """(B, C, D, H, W) or (B, C, H, W) of any size -> logits of that size, or a list, finest first."""
        if self.native:
            return self._native(image)
        logits = self.decoder(self.encoder(image, taps=self.decoder.taps))
        if image.dim() == 4:
            logits = [each.squeeze(2) for each in logits]
        return logits if self.decoder.deep_supervision else logits[0]

    @torch.compiler.disable
    def _native(self, image: Tensor) -> Tensor | list[Tensor]:
        """Never compiled, though nnU-Net would for predictions: there a spacing is a constant, and images differ."""
        view = NativeView.of(image)
        encoding = self.encoder(view.image, spacings=view.spacings, order=view.order, taps=self.decoder.taps)
        restored = [view.restore(each) for each in self.decoder(encoding, full_size=True)]
        return restored if self.decoder.deep_supervision else restored[0]

    def set_drop_path(self, rate: float) -> None:
        """Change the encoder's stochastic depth rate."""
        self.encoder.set_drop_path(rate)

    def _check_strides(self, strides: Sequence[Sequence[int]] | None) -> None:
        if strides is None:
            return
        spacing = self.encoder.spacing
        wanted = [
            list(each)[3 - len(spacing) :] for each in Anisotropy.from_spacing(spacing).strides(self.encoder.token_size)
        ]
        if [list(each) for each in strides] != wanted:
            raise ValueError(
                f"strides {[list(s) for s in strides]} do not fit token_size {self.encoder.token_size} at spacing "
                f"{list(spacing)}; expected {wanted}; plan again with -pl UMITPlanner"
            )
