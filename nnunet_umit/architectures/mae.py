"""Masked autoencoder: see a quarter of the tokens, predict the rest (MAE, 2111.06377; SelfMedMAE, 2203.05573).

The encoder sees visible tokens only. The decoder is narrow; its last block and its head are computed for hidden tokens
only. There a hidden token starts from the visible ones near it (``fill_hidden``), where MAE's are all alike and need
long to find their neighbours. The head is a SAC layer, so one set of weights predicts patches of any slice thickness.
Targets are normalised per patch, so a loss of 1.0 means "learned nothing" on images without constant patches.

Shape legend: B batch, C channels, D H W voxels, L tokens, K visible, M hidden, E encoder width, P values in a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.encoder import SACViT, Spacings, encoder_arguments
from nnunet_umit.architectures.masking import fill_hidden, random_masking
from nnunet_umit.architectures.native import NativeView
from nnunet_umit.architectures.rope import gather_table, rotary_table
from nnunet_umit.architectures.sac import SACUp
from nnunet_umit.architectures.stem import take_tokens
from nnunet_umit.architectures.transfer import Transferable
from nnunet_umit.architectures.transformer import Transformer
from nnunet_umit.config import PretrainConfig
from nnunet_umit.spacing import NATURAL, Anisotropy, TokenGrid

EPSILON = 1e-6


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., P) -> the same with mean 0 and variance 1 over P (constant patches become 0), mean and deviation."""
    mean = patches.mean(-1, keepdim=True)
    deviation = (patches.var(-1, keepdim=True, unbiased=False) + EPSILON).sqrt()
    return (patches - mean) / deviation, mean, deviation


@dataclass
class MAEOutput:
    """One masked forward pass: the loss to minimise (mean squared error over hidden tokens), the same for every sample
    (B,), ``target_power`` (the loss of predicting zero: 1 unless patches are constant), predictions and targets
    (B, M, P), indices, the grid, and what the encoder was shown: image (depth first, cropped, where images bring their
    own spacing) and spacings in mm."""

    loss: Tensor
    losses: Tensor
    target_power: Tensor
    prediction: Tensor
    target: Tensor
    visible: Tensor
    hidden: Tensor
    grid: TokenGrid
    image: Tensor
    spacings: Spacings


class MaskedAutoencoder(Transferable):
    """SACViT encoder, narrow decoder, per-patch normalised target.

    Args:
        encoder: the encoder to train; its state dict is the same as in the segmentation network.
        input_channels: image channels C.
        mask_ratio: share of hidden tokens.
        decoder_dim, decoder_depth, decoder_heads: size of the decoder.
        native: images bring their spacing in three more channels (:mod:`nnunet_umit.architectures.native`).
    """

    def __init__(
        self,
        encoder: SACViT,
        input_channels: int,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        fidelity: str = "exact",
        native: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} must lie between 0 and 1, both excluded")
        self.encoder = encoder
        self.native = native
        self.mask_ratio = mask_ratio
        self.head_dim = decoder_dim // decoder_heads
        self.embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder = Transformer(
            decoder_dim, decoder_depth, decoder_heads, cpu_bfloat16=encoder.transformer.cpu_bfloat16
        )
        self.head = SACUp(decoder_dim, input_channels, encoder.token_size, fidelity)
        nn.init.normal_(self.head.weight, std=0.02)  # the first prediction is near zero, the first loss near 1

    @classmethod
    def from_arch_kwargs(
        cls, input_channels: int, arch_kwargs: dict[str, Any], config: PretrainConfig
    ) -> MaskedAutoencoder:
        """Build from a plan: ``arch_kwargs`` of the segmentation network and the ``pretrain`` section of its block."""
        encoder = SACViT(input_channels, **{**encoder_arguments(arch_kwargs), "drop_path": config.drop_path})
        return cls(
            encoder,
            input_channels,
            mask_ratio=config.mask_ratio,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
            decoder_heads=config.decoder_heads,
            fidelity=arch_kwargs.get("fidelity", "exact"),
            native=arch_kwargs.get("native", False),
        )

    def forward(
        self,
        image: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> MAEOutput:
        """Mask, encode, predict.

        Args:
            image: (B, C, D, H, W) or (B, C, H, W); (B, C + 3, D, H, W) if native.
            generator: CPU generator that draws the masks, or one for each sample; None uses torch's global one.
            masks: visible (B, K) and hidden (B, M) indices instead of drawn ones.
        """
        spacings: Spacings | None = None
        order = NATURAL
        if self.native:
            view = NativeView.of(image)
            image, spacings, order = view.image, view.spacings, view.order
        grid = self.encoder.grid(image, spacings, order)
        visible, hidden = masks or random_masking(image.shape[0], grid.tokens, self.mask_ratio, generator)
        visible, hidden = visible.to(image.device), hidden.to(image.device)
        encoding = self.encoder(image, spacings=spacings, order=order, visible=visible)
        prediction = self.predict(encoding.tokens, visible, hidden, grid, encoding.anisotropy)
        target, _, _ = normalise_patches(take_tokens(grid.patchify(encoding.image), hidden))
        losses = (prediction.float() - target.float()).square().mean((1, 2))
        power = target.detach().square().mean()
        shown = spacings or [self.encoder.spacing]
        return MAEOutput(losses.mean(), losses.detach(), power, prediction, target, visible, hidden, grid, image, shown)

    def predict(
        self, tokens_BKE: Tensor, visible: Tensor, hidden: Tensor, grid: TokenGrid, anisotropy: Anisotropy
    ) -> Tensor:
        """Normalised patches (B, M, P) of the hidden tokens from the encoded visible ones."""
        shown = self.embed(tokens_BKE)
        sequence = fill_hidden(shown, visible, self.mask_token, grid)
        rope = gather_table(rotary_table(grid, self.head_dim, shown.device), None)
        decoded, _ = self.decoder(sequence, rope, queries=hidden)
        halvings = self.encoder.token_size.bit_length() - 1
        kernel = self.head.kernel(anisotropy, halvings)
        bias = self.head.bias.repeat(kernel[0, 0].numel())  # type: ignore[union-attr]
        return F.linear(decoded, kernel.permute(2, 3, 4, 1, 0).reshape(-1, kernel.shape[0]), bias)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, MAEOutput]:
        """For pictures: the image with hidden tokens blanked to NaN, the image with hidden tokens predicted (they
        are scaled back with each patch's own mean and deviation), and the pass they come from; shapes as its image."""
        output: MAEOutput = self(image, generator)
        image = output.image
        grid, channels = output.grid, image.shape[1]
        patches = grid.patchify(grid.pad(image)).float()
        _, mean, deviation = normalise_patches(take_tokens(patches, output.hidden))
        where = output.hidden.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        blank = patches.scatter(1, where, float("nan"))
        filled = patches.scatter(1, where, output.prediction.float() * deviation + mean)
        masked, reconstruction = (grid.crop(grid.unpatchify(each, channels)) for each in (blank, filled))
        return masked.reshape(image.shape), reconstruction.reshape(image.shape), output
