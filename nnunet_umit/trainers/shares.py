"""A loss for labels that were drawn by the share of each class in a voxel: what a network learns of them is the share.

Dice does not: it pulls a probability to 1 where the share is above half the Dice, and to 0 elsewhere. On thick slices
that is a decision too early. Brought to a thinner grid, decisions draw steps, where shares draw the surface between the
slices. V-Net's Dice (arXiv 1606.04797) is

    1 - 2 sum p y / (sum p^2 + sum y^2)  =  sum (p - y)^2 / (sum p^2 + sum y^2)

and with its denominator held constant it is a Brier score: proper, so its expectation over drawn labels is least at
the share, and as strong as Dice on a class of few voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_umit.trainers.balance import labels_that_count


def share_loss(logits: Tensor, target: Tensor, ignore_label: int | None = None) -> Tensor:
    """Cross-entropy, and the mean over foreground classes of that Brier score: proper both.

    Args:
        logits: (B, K, *size).
        target: (B, 1, *size) labels.
        ignore_label: voxels that do not count; where nothing else is, the loss is zero.
    """
    logits, (labels, counted) = logits.float(), labels_that_count(target, ignore_label)
    entropy = (F.cross_entropy(logits, labels, reduction="none") * counted).sum() / counted.sum().clamp_min(1)
    kinds = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.dim() - 2))
    drawn = labels.unsqueeze(1) == kinds
    probabilities = logits.softmax(1)[:, 1:] * counted.unsqueeze(1)
    axes = [0, *range(2, logits.dim())]
    size = (probabilities.detach().square() + drawn).sum(axes).clamp_min(1.0)
    brier = (probabilities - drawn.to(probabilities.dtype)).square().sum(axes) / size
    return entropy + brier.mean()
