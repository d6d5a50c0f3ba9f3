"""Learning a tokenizer: reconstruction, prior-distribution regularisation, and terms that are off unless asked for.

    loss = |x - x'| + sharpness * mean H(p_i) - diversity * H(mean p_i)
           [+ gradient, similarity, perceptual, discriminator]

(PUMIT, arXiv 2312.07630; pumit.md sections 2.3 and 2.4.)

Shape legend: B batch, C channels, D H W voxels, L tokens, K codes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.discriminator import PatchDiscriminator
from nnunet_umit.architectures.encoder import SACViT, encoder_arguments
from nnunet_umit.architectures.image_losses import absolute_error, gradient_error, structural_dissimilarity
from nnunet_umit.architectures.quantiser import follow, negative_entropy, pooled_mean, token_entropy
from nnunet_umit.architectures.tokenizer import SoftTokenizer, View, load_tokenizer
from nnunet_umit.architectures.transfer import CARD_FILE, load_state
from nnunet_umit.config import TokenizerConfig


@dataclass
class TokenizerOutput:
    """One pass: ``local`` (mean over samples) and ``pooled`` (over the tokens of all ranks already) are to be added to
    the loss; ``losses`` (B,) mean absolute errors; ``measures`` for the log; ``usage`` (K,) mean probabilities;
    ``reconstruction`` and ``image`` of one shape; ``probabilities`` (B, L, K)."""

    local: Tensor
    pooled: Tensor
    losses: Tensor
    measures: dict[str, float]
    usage: Tensor
    reconstruction: Tensor
    probabilities: Tensor
    view: View


class TokenizerTraining(nn.Module):
    """A tokenizer and what judges it.

    Args:
        tokenizer: the tokenizer to train.
        config: weights of the terms.
        perceptual: a frozen encoder whose features are compared, where ``config.perceptual`` is above 0.
    """

    usage: Tensor

    def __init__(self, tokenizer: SoftTokenizer, config: TokenizerConfig, perceptual: SACViT | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        codes = tokenizer.quantiser.codes
        self.register_buffer("usage", torch.full((codes,), 1.0 / codes))
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator:
            self.discriminator = PatchDiscriminator(tokenizer.input_channels, tokenizer.out.fidelity)
        self.perceptual = None if perceptual is None else perceptual.eval().requires_grad_(False)

    @classmethod
    def from_plan(
        cls, input_channels: int, arch_kwargs: Mapping[str, Any], config: TokenizerConfig
    ) -> TokenizerTraining:
        """Build from ``arch_kwargs`` of the plan's segmentation network and the ``tokenizer`` section of its block."""
        perceptual = read_encoder(config.perceptual_weights) if config.perceptual_weights else None
        return cls(SoftTokenizer.from_plan(input_channels, arch_kwargs, config), config, perceptual)

    def train(self, mode: bool = True) -> TokenizerTraining:
        """The perceptual encoder stays as it is."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def forward(self, batch: Tensor, temperature: float = 1.0) -> TokenizerOutput:
        """Tokenize, reconstruct, judge.

        Args:
            batch: (B, C, D, H, W) or (B, C, H, W); (B, C + 3, D, H, W) if native.
            temperature: of the Gumbel noise.
        """
        view = self.tokenizer.view(batch)
        tokens = self.tokenizer.tokenize(view, temperature)
        reconstruction = self.tokenizer.decode(tokens.codes, view)
        # ranks validate different numbers of images, and draw on one rank alone: no rank may wait for another there
        usage = pooled_mean(tokens.probabilities) if self.training else tokens.probabilities.flatten(0, -2).mean(0)
        entropy = token_entropy(tokens.logits).mean()
        made, image = as_volume(reconstruction), as_volume(view.image)
        losses = absolute_error(made.float(), image.float())
        local = losses + tokens.commitment
        config, pooled = self.config, image.new_zeros((), dtype=torch.float32)
        if config.quantiser != "nearest":
            local = local + config.sharpness * entropy
            pooled = config.diversity * negative_entropy(self.smoothed(usage))
        if config.gradient:
            local = local + config.gradient * gradient_error(made.float(), image.float(), view.anisotropy)
        if config.similarity:
            local = local + config.similarity * structural_dissimilarity(made.float(), image.float())
        if self.perceptual is not None:
            local = local + config.perceptual * feature_error(self.perceptual, reconstruction, view)
        if self.discriminator is not None and self.training:
            local = local + config.discriminator * self.discriminator.generator_loss(made, view.anisotropy)
        squares = (made.detach().float() - image.float()).square().mean()
        measures = {
            "reconstruction": float(losses.detach().mean()),
            "entropy": float(entropy.detach()) if config.quantiser != "nearest" else 0.0,
            "squared error": float(squares),
            "variance": float(image.float().flatten(1).var(1, unbiased=False).mean()),
        }
        return TokenizerOutput(
            local.mean(), pooled, losses.detach(), measures, usage.detach(), reconstruction, tokens.probabilities, view
        )

    def smoothed(self, usage: Tensor) -> Tensor:
        """Usage over the last steps in value, over this batch in gradient: a batch with fewer tokens than codes cannot
        use them all, and shall not be blamed for it."""
        momentum = self.config.usage_momentum
        if not momentum or not self.training:
            return usage
        follow(self.usage, usage, 1 - momentum)
        return self.usage.clone() + usage - usage.detach()

    def discriminator_loss(self, output: TokenizerOutput) -> Tensor:
        """Hinge loss of the discriminator on the images and reconstructions of a pass."""
        if self.discriminator is None:
            raise RuntimeError("there is no discriminator; set umit.tokenizer.discriminator above 0 in the plans")
        view = output.view
        return self.discriminator.loss(as_volume(view.image), as_volume(output.reconstruction), view.anisotropy)

    def load_umit_pretrained(self, path: str) -> None:
        """Start from another tokenizer of the same architecture (``checkpoint_*.pth``).

        Raises:
            ValueError: another architecture; the network is unchanged then.
        """
        load_tokenizer(self.tokenizer, path)


def as_volume(image: Tensor) -> Tensor:
    """(B, C, H, W) or (B, C, D, H, W) to the latter."""
    return image if image.dim() == 5 else image.unsqueeze(2)


def feature_error(encoder: SACViT, made: Tensor, view: View) -> Tensor:
    """Mean squared difference (B,) of normalised tokens of two images, over the blocks of a frozen encoder."""
    taps = range(encoder.depth)
    found = encoder(made, spacings=view.spacings, order=view.order, taps=taps).taps
    with torch.no_grad():
        wanted = encoder(view.image, spacings=view.spacings, order=view.order, taps=taps).taps
    pairs = ((F.layer_norm(each, each.shape[-1:]) for each in both) for both in zip(found, wanted, strict=True))
    return torch.stack([(a - b).square().mean((1, 2)) for a, b in pairs]).mean(0)


def read_encoder(path: str | os.PathLike[str]) -> SACViT:
    """The encoder in ``encoder.safetensors``, built from the card beside it.

    Raises:
        FileNotFoundError: no such file, or no card.
    """
    state, card = load_state(path)
    if not card:
        raise FileNotFoundError(
            f"{Path(path).with_name(CARD_FILE)} is missing: umit.tokenizer.perceptual_weights must name an "
            "encoder.safetensors that a UMIT pre-training wrote, with its card"
        )
    encoder = SACViT(card["input_channels"], **encoder_arguments(card["architecture"]))
    encoder.load_state_dict(state)
    return encoder
