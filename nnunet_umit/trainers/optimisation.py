"""Optimiser and learning-rate schedule: layer-wise learning rates that survive the schedule.

nnU-Net's own schedulers write one learning rate into every parameter group, which silently removes layer-wise decay.
Here each group keeps its own ``base_lr`` and the schedule only multiplies it. The schedule is a function of the
iteration number alone, so a resumed training needs no scheduler state and continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nnunet_umit.architectures.transformer import Transformer

POLY_EXPONENT = 0.9  # nnU-Net's polynomial schedule
SHAPES = ("cosine", "poly")
ENCODER = "encoder."


def learning_rate_factor(
    position: float, *, total: float, warmup: float, shape: str = "cosine", minimum: float = 0.0
) -> float:
    """Share of the base learning rate at ``position`` iterations: 0 at 0, 1 at ``warmup``, ``minimum`` at ``total``.

    The way up is linear; the way down is a half cosine or nnU-Net's polynomial ``(1 - p) ** 0.9``.

    Args:
        position: where in the training, in iterations; real numbers are allowed, values outside [0, total] are clipped.
        total: length of the training in iterations.
        warmup: length of the linear way up in iterations.
        shape: ``"cosine"`` or ``"poly"``.
        minimum: share of the base learning rate that is left at the end.

    Returns:
        A factor from 0 to 1.

    Raises:
        ValueError: ``shape`` is unknown, or the lengths make no sense.
    """
    if shape not in SHAPES:
        raise ValueError(f"schedule is {shape!r} but must be one of {', '.join(SHAPES)}")
    if not total > 0 or not 0 <= warmup <= total:
        raise ValueError(f"a schedule needs total > 0 and 0 <= warmup <= total, not total={total}, warmup={warmup}")
    position = min(max(position, 0.0), total)
    if position < warmup:
        return position / warmup
    progress = (position - warmup) / (total - warmup) if total > warmup else 0.0
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else (1 - progress) ** POLY_EXPONENT
    return minimum + (1 - minimum) * falling


class LearningRateSchedule:
    """Sets ``lr = base_lr * factor`` in each parameter group, before each iteration.

    Iteration ``i`` (from 0) takes the factor at ``i + 0.5``, the middle of its interval, so that neither the first
    nor the last iteration is spent on a learning rate of zero.

    Args:
        optimizer: every parameter group must hold ``base_lr`` (see ``parameter_groups``).
        total: number of iterations of the training.
        warmup_fraction: share of the training spent on the linear way up.
        shape: ``"cosine"`` or ``"poly"``.
        minimum: share of the base learning rate that is left at the end.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        total: int,
        warmup_fraction: float,
        shape: str = "cosine",
        minimum: float = 0.0,
    ) -> None:
        self.optimizer = optimizer
        self.total = total
        self.warmup = warmup_fraction * total
        self.shape = shape
        self.minimum = minimum
        self.factor(0)  # complain now, not in the first iteration

    def factor(self, position: float) -> float:
        """Share of the base learning rate at a position in iterations."""
        return learning_rate_factor(
            position, total=self.total, warmup=self.warmup, shape=self.shape, minimum=self.minimum
        )

    def step(self, iteration: int) -> float:
        """Write the learning rates of ``iteration`` (counted from 0 over the whole training); returns the factor."""
        factor = self.factor(iteration + 0.5)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return factor


def is_vector(parameter: torch.Tensor) -> bool:
    """Biases, norm scales and single tokens of shape (1, 1, D): weight decay would only shrink what they mean."""
    return parameter.ndim <= 1 or (parameter.ndim <= 3 and parameter.numel() == max(parameter.shape))


def layer_scale(layer: int, layers: int, decay: float) -> float:
    """``decay ** (layers - layer)``: 1 for the last layer (``layer == layers``), smaller towards the image."""
    return decay ** (layers - layer)


def parameter_groups(
    network: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    transformer_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal layer, kind and weight decay, each with its ``base_lr``.

    Layer ids follow BEiT and MAE fine-tuning: 0 for the stem, k + 1 for transformer block k, depth + 1 for all else
    (final norm, decoder, heads). The learning rate of a layer is ``learning_rate * layer_decay ** (depth + 1 - id)``,
    times ``transformer_rate`` for what belongs to a transformer: AdamW moves every weight by about the learning rate
    a step, which convolutions before an instance norm bear at rates that destroy attention.

    Args:
        network: has ``.encoder`` with ``.layer_id(parameter_name)``; parameters outside the encoder are "all else".
        learning_rate: of the last layer's convolutions.
        weight_decay: of matrices and kernels; vectors get none.
        layer_decay: 1 gives every layer the same learning rate.
        transformer_rate: learning rate of transformers, as a share of that of convolutions.

    Returns:
        Groups for ``torch.optim``, from the image upwards, with the extra keys ``base_lr``, ``layer``, ``share`` (1, or
        ``transformer_rate``) and ``name``.
    """
    last, attending = last_layer(network), transformer_parameters(network)
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, attends, vector = layer_of(network, name), id(parameter) in attending, is_vector(parameter)
        if (layer, attends, vector) not in groups:
            share = transformer_rate if attends else 1.0
            base = learning_rate * share * layer_scale(layer, last, layer_decay)
            groups[layer, attends, vector] = {
                "params": [],
                "lr": base,
                "base_lr": base,
                "weight_decay": 0.0 if vector else weight_decay,
                "layer": layer,
                "share": share,
                "name": f"layer {layer}{', transformer' if attends else ''}, {'vectors' if vector else 'matrices'}",
            }
        groups[layer, attends, vector]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def transformer_parameters(network: nn.Module) -> set[int]:
    """``id`` of every parameter inside a :class:`~nnunet_umit.architectures.transformer.Transformer`."""
    transformers = (module for module in network.modules() if isinstance(module, Transformer))
    return {id(parameter) for module in transformers for parameter in module.parameters()}


def last_layer(network: nn.Module) -> int:
    """The id of everything above the transformer blocks: depth + 1."""
    return int(network.encoder.layer_id(""))  # type: ignore[operator, union-attr]


def layer_of(network: nn.Module, name: str) -> int:
    """Layer id of a parameter of the whole network, by its full name."""
    if not name.startswith(ENCODER):
        return last_layer(network)
    return int(network.encoder.layer_id(name[len(ENCODER) :]))  # type: ignore[operator, union-attr]


def set_layer_decay(optimizer: torch.optim.Optimizer, *, learning_rate: float, layers: int, decay: float) -> None:
    """Give the groups of ``parameter_groups`` the base learning rates of another ``layer_decay``.

    Args:
        learning_rate: of the last layer's convolutions; ``transformer_rate`` stays as it was.
        layers: id of the last layer, depth + 1.
        decay: 1 gives every layer the same learning rate.
    """
    for group in optimizer.param_groups:
        group["base_lr"] = learning_rate * group["share"] * layer_scale(group["layer"], layers, decay)


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, fused on the devices that it is measured on."""
    first = groups[0]["params"][0]
    return torch.optim.AdamW(groups, betas=betas, fused=first.device.type in ("cpu", "cuda"))


def frozen_parameters(network: nn.Module, what: str) -> Iterator[nn.Parameter]:
    """Parameters that ``finetune.freeze`` names: the whole ``"encoder"``, its ``"stem"``, or ``"none"``."""
    if what not in ("none", "encoder", "stem"):
        raise ValueError(f"freeze is {what!r} but must be 'none', 'encoder' or 'stem'")
    for name, parameter in network.named_parameters():
        inside = name.startswith(ENCODER)
        if inside and (what == "encoder" or what == "stem" and layer_of(network, name) == 0):
            yield parameter


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> int:
    """Switch gradients on or off; returns how many parameters (tensors) changed.

    AdamW skips parameters without a gradient altogether, so frozen ones keep both their values and their moments.
    """
    changed = 0
    for parameter in parameters:
        if parameter.requires_grad != trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None
            changed += 1
    return changed
