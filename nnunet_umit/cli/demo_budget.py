"""How many training steps the demo affords, and how they get into the plans."""

import math
from dataclasses import dataclass
from typing import Any

EPOCHS = 10

# Measured on two cores: what start-up, preprocessing, prediction and evaluation take, and one training step for each
# million voxels in its batch. They only turn --minutes into a number of steps.
FIXED_SECONDS = 130.0
PRETRAIN_SECONDS, FINETUNE_SECONDS = 2.2, 5.8
PRETRAIN_SHARE = 0.35


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimiser steps of the pre-training, and of the fine-tuning of each arm."""

    pretrain_steps: int
    finetune_steps: int

    @classmethod
    def from_minutes(cls, minutes: float, voxels: int) -> "Budget":
        """Steps that fit into the time on two cores.

        Args:
            minutes: Wall time of the whole demo.
            voxels: Voxels in one training batch.
        """
        seconds = max(0.0, 60 * minutes - FIXED_SECONDS)
        millions = voxels / 1e6
        pretrain = PRETRAIN_SHARE * seconds / (PRETRAIN_SECONDS * millions)
        finetune = (1 - PRETRAIN_SHARE) / 2 * seconds / (FINETUNE_SECONDS * millions)
        return cls(pretrain_steps=_whole_epochs(pretrain), finetune_steps=_whole_epochs(finetune))


def set_budget(block: dict[str, Any], budget: Budget) -> None:
    """Write the small budget into the ``umit`` block of a configuration, in place; everything else stays planned."""
    for section, steps in (("pretrain", budget.pretrain_steps), ("finetune", budget.finetune_steps)):
        block[section].update(
            epochs=EPOCHS,
            iterations_per_epoch=steps // EPOCHS,
            val_iterations_per_epoch=1,
            warmup_fraction=0.1,
            save_every=EPOCHS,
        )
    block["pretrain"]["picture_every"] = EPOCHS
    # Mirrored predictions would cost eight times as much.
    block["finetune"]["mirror_axes"] = []


def _whole_epochs(steps: float) -> int:
    return EPOCHS * max(1, math.floor(steps / EPOCHS))
