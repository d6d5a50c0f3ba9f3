"""Visual tokenizer: image -> one soft token for every token of the transformer's grid -> image (PUMIT, 2312.07630).

Spatially adaptive convolutions throughout, so one tokenizer serves 2D, thick-slice and isotropic images; its total
stride is the plan's token size, so its grid is that of the transformer at every anisotropy level. Unlike PUMIT's, its
norms look at one position at a time: a token depends on its neighbourhood and not on the crop it was seen in.

Shape legend: B batch, C channels, D H W voxels, L tokens, E width, K codes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.encoder import Spacings
from nnunet_umit.architectures.native import NativeView
from nnunet_umit.architectures.quantiser import Quantised, Quantiser
from nnunet_umit.architectures.sac import SACConv, SACDown, SACUp
from nnunet_umit.architectures.transfer import load_state
from nnunet_umit.config import TokenizerConfig
from nnunet_umit.spacing import NATURAL, Anisotropy, TokenGrid, token_grid

FIRST_STRIDE = 4
BIAS = 0.5  # range of the first biases: behind a norm, they are what lets a layer tell weak contrast from strong
PREFIX = "tokenizer."


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, D, H, W), at every position by itself."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.movedim(1, -1)).movedim(-1, 1)


class Down(nn.Module):
    """Kernel = stride SAC, norm, GELU."""

    def __init__(self, in_channels: int, out_channels: int, size: int, fidelity: str) -> None:
        super().__init__()
        self.conv = SACDown(in_channels, out_channels, size, fidelity)
        nn.init.uniform_(self.conv.bias, -BIAS, BIAS)  # type: ignore[arg-type]
        self.norm = ChannelNorm(out_channels)

    def forward(self, image: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        return F.gelu(self.norm(self.conv(image, anisotropy, halvings)))


class Same(nn.Module):
    """Same-size SAC, norm, LeakyReLU."""

    def __init__(self, channels: int, fidelity: str) -> None:
        super().__init__()
        self.conv = SACConv(channels, channels, fidelity)
        self.norm = ChannelNorm(channels)

    def forward(self, image: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(image, anisotropy, halvings)), 0.01)


class View:
    """A batch as the tokenizer works on it: padded image (B, C, D, H, W), its grid, its anisotropy and spacings."""

    def __init__(self, batch: Tensor, spacing: tuple[float, ...], token_size: int, native: bool) -> None:
        self.spacings: Spacings = [spacing if batch.dim() == 5 else spacing[-2:]]
        self.image, self.order = batch, NATURAL
        if native:
            view = NativeView.of(batch)
            self.image, self.spacings, self.order = view.image, view.spacings, view.order
        volume = self.image if self.image.dim() == 5 else self.image.unsqueeze(2)
        self.anisotropy = Anisotropy.from_spacings(self.spacings, self.order)
        self.grid: TokenGrid = token_grid(tuple(volume.shape[2:]), self.spacings, token_size, "relative", self.order)
        self.padded = self.grid.pad(volume)

    def like_image(self, padded: Tensor) -> Tensor:
        """Crop the padding away; the shape of ``image``."""
        return self.grid.crop(padded).reshape(self.image.shape)


class SoftTokenizer(nn.Module):
    """Encoder, quantiser and decoder.

    Args:
        input_channels: image channels C.
        spacing: mm, depth first, as for :class:`~nnunet_umit.architectures.encoder.SACViT`.
        token_size: in-plane token extent in voxels: 4, 8 or 16.
        dim: width at the token grid; half of it at each finer level.
        codes, quantiser: see :class:`~nnunet_umit.architectures.quantiser.Quantiser`.
        native: images bring their spacing in three more channels.
    """

    def __init__(
        self,
        input_channels: int,
        *,
        spacing: tuple[float, ...],
        token_size: int,
        dim: int = 256,
        codes: int = 256,
        quantiser: str = "soft",
        fidelity: str = "exact",
        native: bool = False,
    ) -> None:
        super().__init__()
        self.spacing = tuple(float(value) for value in spacing)
        self.token_size = token_size
        self.input_channels = input_channels
        self.native = native
        halvings = token_size.bit_length() - 1
        levels = halvings - 1  # the first layer halves twice
        if levels < 1:
            raise ValueError(f"token_size {token_size} is below {FIRST_STRIDE}, the tokenizer's first stride")
        if dim % 2 ** (levels - 1):
            raise ValueError(
                f"tokenizer.dim {dim} must be a multiple of {2 ** (levels - 1)} for {token_size}-voxel tokens"
            )
        widths = [dim // 2 ** (levels - 1 - level) for level in range(levels)]
        self.down = nn.ModuleList([Down(input_channels, widths[0], FIRST_STRIDE, fidelity)])
        self.down.extend(Down(a, b, 2, fidelity) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.tail = nn.ModuleList(Same(dim, fidelity) for _ in range(2))
        self.quantiser = Quantiser(dim, codes, quantiser)
        self.head = nn.ModuleList(Same(dim, fidelity) for _ in range(2))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(SACUp(a, b, 2, fidelity) for a, b in pairs)
        self.smooth = nn.ModuleList(Same(b, fidelity) for _, b in pairs)
        self.out = SACUp(widths[0], input_channels, FIRST_STRIDE, fidelity)
        self.halvings = halvings

    @classmethod
    def from_plan(cls, input_channels: int, arch_kwargs: Mapping[str, Any], config: TokenizerConfig) -> SoftTokenizer:
        """Build from ``arch_kwargs`` of the plan's segmentation network and the ``tokenizer`` section of its block."""
        return cls(
            input_channels,
            spacing=tuple(arch_kwargs["spacing"]),
            token_size=arch_kwargs["token_size"],
            dim=config.dim,
            codes=config.codes,
            quantiser=config.quantiser,
            fidelity=arch_kwargs.get("fidelity", "exact"),
            native=arch_kwargs.get("native", False),
        )

    def view(self, batch: Tensor) -> View:
        """Read (B, C, D, H, W), (B, C, H, W), or (B, C + 3, D, H, W) if native."""
        return View(batch, self.spacing, self.token_size, self.native)

    def tokenize(self, view: View, temperature: float = 1.0) -> Quantised:
        """One token for every token of the view's grid, in its order."""
        features, done = view.padded, 0
        for layer in self.down:
            features = layer(features, view.anisotropy, done)
            done += 2 if done == 0 else 1
        for layer in self.tail:
            features = layer(features, view.anisotropy, done)
        return self.quantiser(features.flatten(2).transpose(1, 2), temperature, view.anisotropy.level)

    def decode(self, codes_BLE: Tensor, view: View) -> Tensor:
        """Codes (B, L, E) of the view's whole grid to an image of the view's shape."""
        features, left = view.grid.unflatten(codes_BLE), self.halvings
        for layer in self.head:
            features = layer(features, view.anisotropy, left)
        for up, smooth in zip(self.up, self.smooth, strict=True):
            features = up(features, view.anisotropy, left)
            left -= 1
            features = smooth(features, view.anisotropy, left)
        return view.like_image(self.out(features, view.anisotropy, left))

    def describe(self) -> dict[str, Any]:
        """What must agree for weights and tokens of two tokenizers to mean the same."""
        return {
            "input channels": self.input_channels,
            "token size": self.token_size,
            "dim": self.quantiser.codebook.shape[1],
            "codes": self.quantiser.codes,
            "quantiser": self.quantiser.mode,
        }


def load_tokenizer(tokenizer: SoftTokenizer, path: str | os.PathLike[str]) -> None:
    """Copy the tokenizer of a checkpoint into one of the same architecture.

    Raises:
        ValueError: the file holds none, or one of another architecture; the message says what differs.
    """
    state = {name.removeprefix(PREFIX): value for name, value in load_state(path)[0].items() if name.startswith(PREFIX)}
    if not state:
        raise ValueError(
            f"{path} holds no tokenizer; give checkpoint_final.pth of `nnUNetv2_train ... -tr UMITTokenizerTrainer`"
        )
    own = tokenizer.state_dict()
    lines = [f"{name} is only {'there' if name in state else 'here'}" for name in sorted(state.keys() ^ own.keys())]
    lines += [
        f"{name} is {tuple(state[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if lines:
        shown = "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
        raise ValueError(
            f"the tokenizer in {path} has another architecture than the plans describe "
            f"({json.dumps(tokenizer.describe())}): {shown}. Train the tokenizer with these plans, or give "
            "umit.tokenizer the dim, codes and quantiser, and the network the token_size and channels, that it was "
            "trained with"
        )
    tokenizer.load_state_dict(state)
