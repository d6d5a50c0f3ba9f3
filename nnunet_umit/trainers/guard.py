"""What happens when a loss is not a number: name the cases, skip the step, stop after a bound.

A single broken image must not destroy a long training, and a training that has diverged must not go on silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had no finite loss."""


class NonFiniteGuard:
    """Counts steps without a finite loss.

    Args:
        limit: this many in a row raise ``NonFiniteLossError``.
        log: called with one line for each such step.
        last_good: gives the text that names the last good checkpoint in the error.
    """

    def __init__(self, limit: int, log: Callable[[str], Any] = print, last_good: Callable[[], str] = str) -> None:
        self.limit = limit
        self.log = log
        self.last_good = last_good
        self.consecutive = 0
        self.total = 0

    def accept(self, finite: bool, cases: Sequence[str], *, step: int, what: str = "loss") -> bool:
        """Whether this step may change the weights.

        Args:
            finite: the verdict, already agreed between all ranks.
            cases: identifiers of the cases in the batch.
            step: iteration number over the whole training, for the log.
            what: ``"loss"`` or ``"gradient"``.

        Raises:
            NonFiniteLossError: ``limit`` such steps in a row.
        """
        if finite:
            self.consecutive = 0
            return True
        self.consecutive += 1
        self.total += 1
        named = ", ".join(dict.fromkeys(str(case) for case in cases))
        self.log(
            f"step {step}: the {what} is not finite; step skipped ({self.consecutive} in a row, {self.total} in all). "
            f"Cases in this batch: {named}"
        )
        if self.consecutive >= self.limit:
            raise NonFiniteLossError(
                f"the {what} was not finite in {self.consecutive} steps in a row (limit: max_nonfinite = {self.limit} "
                f"in the umit block); the last cases were {named}. {self.last_good()} Check these images for NaN or "
                "infinite voxels (nnUNetv2_plan_and_preprocess --verify_dataset_integrity), or lower learning_rate; "
                "then continue with --c"
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for the checkpoint."""
        return {"consecutive": self.consecutive, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue counting where the checkpoint stopped."""
        self.consecutive, self.total = int(state["consecutive"]), int(state["total"])


def agreed(finite: torch.Tensor, is_ddp: bool) -> bool:
    """Whether the value is finite on every rank.

    All ranks must skip or all must step: a rank that skips its backward pass alone would leave the others waiting for
    its gradients for ever.

    Args:
        finite: boolean scalar tensor on the training device.
        is_ddp: whether other ranks exist.
    """
    if is_ddp:
        flag = finite.to(torch.int32)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
        return bool(flag.item())
    return bool(finite.item())
