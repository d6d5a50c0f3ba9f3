"""A cross-entropy in which every class weighs the same, for the first part of a training.

In the first steps the probability of a class may fall to zero wherever it should be found. There its Dice has no
gradient left (that of a softmax is proportional to the probability), and plain cross-entropy, a mean over all voxels,
hardly sees a class of one voxel in a hundred: in a short training the class stays lost. A mean over classes pulls each
of them with the same force.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced_cross_entropy(logits: Tensor, target: Tensor, ignore_label: int | None = None) -> Tensor:
    """Mean over samples of the mean over the classes of a sample of their mean cross-entropies.

    Args:
        logits: (B, K, *size).
        target: (B, 1, *size) labels.
        ignore_label: voxels that do not count; a sample of nothing else adds zero.
    """
    classes, counted = (each.flatten(1) for each in labels_that_count(target, ignore_label))
    errors = F.cross_entropy(logits.float().flatten(2), classes, reduction="none") * counted
    counts = errors.new_zeros(logits.shape[:2]).scatter_add_(1, classes, counted.to(errors.dtype))
    weights = counts.clamp_min(1).reciprocal() * (counts > 0) / (counts > 0).sum(1, keepdim=True).clamp_min(1)
    return (errors * weights.gather(1, classes)).sum() / logits.shape[0]


def labels_that_count(target: Tensor, ignore_label: int | None) -> tuple[Tensor, Tensor]:
    """(B, 1, *size) labels -> (B, *size) class indices, 0 where a voxel does not count, and whether it does."""
    labels = target[:, 0].long()
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_label is None else labels != ignore_label
    return torch.where(counted, labels, 0), counted


def fading(progress: float, share: float) -> float:
    """Weight of the balanced cross-entropy: from 1 at the start to 0 at ``share`` of the schedule, linearly."""
    return max(0.0, 1.0 - progress / share) if share > 0 else 0.0
