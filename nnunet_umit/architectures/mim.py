"""Masked modelling of soft tokens: see some of the tokens, predict what a frozen tokenizer says of the others (PUMIT,
arXiv 2312.07630).

The first blocks of the encoder see visible tokens only; before the last ``mask_layers`` blocks a mask token is put in
every hidden place, as in PUMIT's large model; unlike there, the mean of the visible tokens near it is added. The loss
is the cross-entropy with the tokenizer's probabilities, mean over hidden tokens.

Shape legend: B batch, L tokens, K visible, M hidden, E width, N codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_umit.architectures.encoder import SACViT, encoder_arguments
from nnunet_umit.architectures.masking import fill_hidden, random_masking
from nnunet_umit.architectures.quantiser import token_entropy
from nnunet_umit.architectures.rope import rotary_table
from nnunet_umit.architectures.stem import take_tokens
from nnunet_umit.architectures.tokenizer import SoftTokenizer, View, load_tokenizer
from nnunet_umit.architectures.transfer import Transferable, TransferReport, load_state, transfer_encoder
from nnunet_umit.config import PretrainConfig, TokenizerConfig
from nnunet_umit.spacing import TokenGrid


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``-sum_k p_k log q_k`` of (..., N) logits and probabilities: (...), never below the entropy of the target."""
    return -(target.float() * logits.float().log_softmax(-1)).sum(-1)


@dataclass
class SoftTokenOutput:
    """One pass: ``loss`` (mean over hidden tokens) and ``losses`` (B,); ``measures`` for the log; logits and targets
    (B, M, N); indices of visible and hidden tokens; and the view they belong to."""

    loss: Tensor
    losses: Tensor
    measures: dict[str, float]
    logits: Tensor
    target: Tensor
    visible: Tensor
    hidden: Tensor
    view: View


class SoftTokenModel(Transferable):
    """Encoder, head and the frozen tokenizer, which is part of the state, so that nothing else is needed to go on.

    Args:
        encoder: the encoder to train; its state dict is the same as in the segmentation network.
        tokenizer: gives the targets; never trained here.
        mask_ratio: share of hidden tokens.
        mask_layers: number of last blocks that see mask tokens.
        mask_positions: mask tokens carry a sine and cosine of their absolute position, weighted by a learned vector;
            without it they know their place through rotary positions alone, as in PUMIT.
        normalisation: nnU-Net's normalisation schemes of the images, which the tokenizer's must agree with.
    """

    ready: Tensor

    def __init__(
        self,
        encoder: SACViT,
        tokenizer: SoftTokenizer,
        *,
        mask_ratio: float = 0.75,
        mask_layers: int = 2,
        mask_positions: bool = True,
        normalisation: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 1 <= mask_layers <= encoder.depth:
            raise ValueError(
                f"pretrain.mask_layers {mask_layers} must be from 1 to {encoder.depth}, the encoder's depth"
            )
        if tokenizer.token_size != encoder.token_size:
            raise ValueError(
                f"the tokenizer's tokens have {tokenizer.token_size} voxels and the encoder's {encoder.token_size}; "
                "their grids must be the same"
            )
        dim = encoder.embed_dim
        self.encoder = encoder
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.mask_ratio = mask_ratio
        self.mask_layers = mask_layers
        self.normalisation = list(normalisation)
        self.mask_token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.mask_position = nn.Parameter(torch.full((dim,), 0.02)) if mask_positions else None
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, tokenizer.quantiser.codes))
        nn.init.normal_(self.head[-1].weight, std=0.02)  # type: ignore[arg-type]  # the first guess is: all codes alike
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("ready", torch.tensor(False))  # whether the tokenizer's weights have come

    @classmethod
    def from_plan(
        cls,
        input_channels: int,
        arch_kwargs: Mapping[str, Any],
        config: PretrainConfig,
        tokenizer: TokenizerConfig,
        normalisation: Sequence[str] = (),
    ) -> SoftTokenModel:
        """Build from ``arch_kwargs`` of the plan's segmentation network and two sections of its block."""
        arguments = {**encoder_arguments(dict(arch_kwargs)), "drop_path": config.drop_path}
        return cls(
            SACViT(input_channels, **arguments),
            SoftTokenizer.from_plan(input_channels, arch_kwargs, tokenizer),
            mask_ratio=config.mask_ratio,
            mask_layers=config.mask_layers,
            mask_positions=config.mask_positions,
            normalisation=normalisation,
        )

    def train(self, mode: bool = True) -> SoftTokenModel:
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(
        self,
        image: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        masks: tuple[Tensor, Tensor] | None = None,
    ) -> SoftTokenOutput:
        """Mask, encode, predict; arguments as for :class:`~nnunet_umit.architectures.mae.MaskedAutoencoder`."""
        view = self.tokenizer.view(image)
        visible, hidden = masks or random_masking(image.shape[0], view.grid.tokens, self.mask_ratio, generator)
        visible, hidden = visible.to(image.device), hidden.to(image.device)
        with torch.no_grad():
            target = take_tokens(self.tokenizer.tokenize(view).probabilities, hidden)
        logits = self.head(self.encode(view, visible, hidden)).float()
        each = soft_cross_entropy(logits, target)
        entropy = token_entropy(target.clamp_min(torch.finfo(target.dtype).tiny).log()).mean()
        measures = {
            "cross-entropy": float(each.detach().mean()),
            "target entropy": float(entropy),
            "accuracy": float((logits.argmax(-1) == target.argmax(-1)).float().mean()),
        }
        return SoftTokenOutput(each.mean(), each.detach().mean(1), measures, logits, target, visible, hidden, view)

    def encode(self, view: View, visible: Tensor, hidden: Tensor) -> Tensor:
        """Normalised encoder output (B, M, E) of the hidden tokens; of all tokens where none is hidden."""
        encoder, blocks = self.encoder, len(self.encoder.transformer.blocks)
        embedded = encoder.embed(view.image, spacings=view.spacings, order=view.order, visible=visible)
        grid, first = embedded.grid, blocks - self.mask_layers
        tokens = encoder.transformer.run(embedded.tokens, encoder.rope(grid, visible, visible.device), range(first))
        sequence = fill_hidden(tokens, visible, self.masks(grid, tokens), grid)
        queries = hidden if hidden.shape[1] else None
        rope = encoder.rope(grid, None, visible.device)
        return encoder.transformer.norm(encoder.transformer.run(sequence, rope, range(first, blocks), queries))

    def masks(self, grid: TokenGrid, like: Tensor) -> Tensor:
        """A mask token in every place of the grid (B, L, E)."""
        tokens = self.mask_token.expand(1, grid.tokens, -1)
        if self.mask_position is not None:
            cosine, sine = rotary_table(grid, self.encoder.embed_dim, like.device)  # (S, L, E / 2) each
            tokens = tokens + self.mask_position * torch.cat((cosine, sine), -1)
        return tokens.to(like.dtype).expand(like.shape[0], -1, -1)

    def load_umit_pretrained(self, path: str) -> TransferReport | None:  # type: ignore[override]
        """Take the tokenizer of a checkpoint; or, once there is one, the encoder of another pre-training.

        A checkpoint of this kind of pre-training has both: the encoder is taken, and the tokenizer unless there is one.

        Raises:
            ValueError: the tokenizer does not fit (grid, channels, normalisation), or the file holds neither.
        """
        state, card = load_state(path)
        has_encoder = any(name.startswith("encoder.") for name in state)
        if not (has_encoder and bool(self.ready)):
            self.take_tokenizer(path)
        if not has_encoder:
            return None
        mine = ("tokenizer.", "ready")
        self.transfer_report = transfer_encoder(state, self, source=str(path), card=card, leave=mine)
        return self.transfer_report

    def take_tokenizer(self, path: str) -> None:
        """Load and check a tokenizer; it is part of the state from now on.

        Raises:
            ValueError: it does not fit.
        """
        load_state(path)  # a file that is missing or damaged is named before anything else is asked of it
        trained_on = read_normalisation(path)
        if trained_on and self.normalisation and trained_on != self.normalisation:
            raise ValueError(
                f"the tokenizer in {path} saw images with normalisation {', '.join(trained_on)}, but these are "
                f"normalised by {', '.join(self.normalisation)}; train a tokenizer on this dataset"
            )
        load_tokenizer(self.tokenizer, path)
        self.ready.fill_(True)
        print(f"tokenizer: {path}", flush=True)

    @torch.no_grad()
    def reconstruct(
        self, image: Tensor, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], SoftTokenOutput]:
        """For pictures: the image, the image with hidden tokens blanked to NaN, the tokenizer's reconstruction, and
        what its decoder makes of the predicted tokens in hidden places and the true ones elsewhere."""
        output: SoftTokenOutput = self(image, generator)
        view, grid = output.view, output.view.grid
        tokens = self.tokenizer.tokenize(view)
        where = output.hidden.unsqueeze(-1).expand_as(output.logits)
        predicted = tokens.probabilities.scatter(1, where, output.logits.softmax(-1))
        blank = view.padded.new_zeros(view.padded.shape[0], grid.tokens).scatter(1, output.hidden, float("nan"))
        masked = view.like_image(view.padded + grid.expand(blank))
        decoded = (
            self.tokenizer.decode(codes, view) for codes in (tokens.codes, self.tokenizer.quantiser.lookup(predicted))
        )
        return [view.image, masked, *decoded], output


def read_normalisation(path: str) -> list[str]:
    """Normalisation schemes of the plans that a checkpoint was trained with; empty where it does not say."""
    if path.endswith(".safetensors"):
        return []
    content = torch.load(path, map_location="cpu", weights_only=True)
    arguments = content.get("init_args", {})
    plans, configuration = arguments.get("plans", {}), arguments.get("configuration")
    configurations = plans.get("configurations", {})
    found: dict[str, Any] = {}
    while configuration in configurations:
        found = {**configurations[configuration], **found}
        configuration = configurations[configuration].get("inherits_from")
    return list(found.get("normalization_schemes", []))
