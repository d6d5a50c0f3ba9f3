"""What every configuration of a UMIT plans file holds, whatever it is planned for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunet_umit.config import UMITConfig
from nnunet_umit.plans.layout import Task
from nnunet_umit.plans.orientation import Orientation
from nnunet_umit.plans.sizing import SizeChoice

NETWORK = "nnunet_umit.architectures.unetr.UMITSegmenter"
SMALL_PATCH = 0.25  # nnU-Net computes Dice over the batch when a patch covers less of the median image than this


def plan_configuration(
    task: Task,
    choice: SizeChoice,
    orientation: Orientation,
    *,
    data_identifier: str,
    normalisation: Sequence[str],
    use_mask: Sequence[bool],
    thicken: float = 0.0,
    token_size: int | None = None,
) -> dict[str, Any]:
    """Network, patch, batch, normalisation and the umit block; resampling is the caller's.

    Args:
        orientation: of the labels, in the axes of the patch.
        token_size: of another configuration, so that weights move between the two unchanged; None: what suits best.
    """
    layout = task.layout(choice.size, token_size)
    why = choice.why + "".join(f" Not mirrored there: {reason}." for reason in orientation.why)
    umit = UMITConfig.for_size(choice.size, why, thicken, orientation.mirrored)
    return {
        "data_identifier": data_identifier,
        "batch_size": task.batch_size(layout),
        "patch_size": list(layout.patch),
        "normalization_schemes": list(normalisation),
        "use_mask_for_norm": list(use_mask),
        "architecture": {
            "network_class_name": NETWORK,
            "arch_kwargs": layout.arch_kwargs,
            "_kw_requires_import": [],
        },
        "umit": umit.to_dict(),
    }
