"""Patch discriminator with a hinge loss and PUMIT's gate (arXiv 2312.07630), for tokenizers; off unless asked for.

Shape legend: B batch, C channels, D H W voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nnunet_umit.architectures.quantiser import follow
from nnunet_umit.architectures.sac import SACConv, SACDown
from nnunet_umit.spacing import Anisotropy, TokenGrid

WIDTHS = (32, 64, 128)
GATE, MOMENTUM, FIRST = 0.025, 0.9, 0.1  # the generator hears of it only while the discriminator clearly wins


class PatchDiscriminator(nn.Module):
    """Three halvings and one map of scores; ``gate`` holds the moving average of its own loss, and the last one."""

    gate: Tensor

    def __init__(self, input_channels: int, fidelity: str) -> None:
        super().__init__()
        channels = (input_channels, *WIDTHS)
        self.down = nn.ModuleList(SACDown(a, b, 2, fidelity) for a, b in zip(channels[:-1], WIDTHS, strict=True))
        self.conv = nn.ModuleList(SACConv(width, width, fidelity) for width in WIDTHS)
        self.norm = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.score = nn.Conv3d(WIDTHS[-1], 1, 1)
        self.register_buffer("gate", torch.tensor([FIRST, FIRST]))

    def forward(self, image: Tensor, anisotropy: Anisotropy) -> Tensor:
        """(B, C, D, H, W) of any size to a map of scores, an eighth of it in plane, in float32."""
        depth, height, width = image.shape[2:]
        image = TokenGrid((depth, height, width), anisotropy.token(2 ** len(WIDTHS))).pad(image)
        for halvings, (down, conv, norm) in enumerate(zip(self.down, self.conv, self.norm, strict=True)):
            image = conv(down(image, anisotropy, halvings), anisotropy, halvings + 1)
            image = F.leaky_relu(norm(image), 0.2)
        return self.score(image).float()  # losses and gate are float32 under autocast too

    def loss(self, real: Tensor, made: Tensor, anisotropy: Anisotropy) -> Tensor:
        """Hinge loss of the discriminator; moves the gate in training."""
        found = 0.5 * (F.relu(1 - self(real, anisotropy)).mean() + F.relu(1 + self(made.detach(), anisotropy)).mean())
        if self.training:
            follow(self.gate, found.expand(2), self.gate.new_tensor([1 - MOMENTUM, 1.0]))
        return found

    def generator_loss(self, made: Tensor, anisotropy: Anisotropy) -> Tensor:
        """``-mean D(made)``, with the discriminator held still; zero while the gate is shut."""
        if float(self.gate.max()) > GATE:
            return made.new_zeros(())
        still = {name: value.detach() for name, value in self.named_parameters()}
        return -functional_call(self, still, (made, anisotropy)).mean()
