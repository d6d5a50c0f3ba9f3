"""Which tokens are hidden: uniformly at random, for each sample of its own (MAE, arXiv 2111.06377)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible_count(tokens: int, mask_ratio: float) -> int:
    """``floor(L (1 - ratio))``, at least one token visible and one hidden.

    Raises:
        ValueError: fewer than two tokens.
    """
    if tokens < 2:
        raise ValueError(
            f"an image of {tokens} token(s) cannot be masked; use a larger patch or a smaller token_size in the plans"
        )
    return min(max(int(tokens * (1.0 - mask_ratio) + 1e-6), 1), tokens - 1)


def random_masking(
    batch: int,
    tokens: int,
    mask_ratio: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw visible (B, K) and hidden (B, L - K) token indices on the CPU, each in rising order.

    Args:
        generator: one for all samples, or one for each, so that a sample's mask does not depend on its neighbours.
    """
    if isinstance(generator, Sequence):
        noise = torch.stack([torch.rand(tokens, generator=each) for each in generator])
    else:
        noise = torch.rand(batch, tokens, generator=generator)
    order = noise.argsort(1)
    count = visible_count(tokens, mask_ratio)
    return order[:, :count].sort(1).values, order[:, count:].sort(1).values
