"""Numbers and words at the end of a pre-training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_umit.files import write_whole
from nnunet_umit.trainers.base import finite_mean
from nnunet_umit.trainers.resume import versions


def summarise(outputs: list[dict[str, float]]) -> tuple[float, float]:
    """Mean masked loss, and the share of the targets' variance that is explained.

    Targets have variance 1 except where patches are constant, so the share is 1 - loss there and slightly less with
    constant patches, whose target is zero and whose prediction is free.

    Args:
        outputs: ``loss`` and ``power`` (the loss of predicting zero) of several batches.
    """
    finite = [output for output in outputs if math.isfinite(output["loss"])]
    loss, power = (finite_mean([output[name] for output in finite]) for name in ("loss", "power"))
    if not finite or power <= 0:  # nothing but constant patches: nothing to explain
        return loss, math.nan if not finite else 0.0
    return loss, 1.0 - loss / power


def pooled_usage(outputs: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Mean probabilities (K,) of the codes over the tokens of several passes (``usage``, ``tokens``)."""
    tokens = np.asarray([output["tokens"] for output in outputs], dtype=float)
    usage = np.asarray([output["usage"] for output in outputs], dtype=float)
    pooled: NDArray[np.float64] = (usage * tokens[:, None]).sum(0) / tokens.sum()
    return pooled / pooled.sum()


class GroupLosses:
    """Mean loss of the samples of every group (dataset and anisotropy level) within an epoch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, groups: Sequence[str], losses: Sequence[float]) -> None:
        """Losses of the samples of one batch; those that are not finite do not count."""
        for name, loss in zip(groups, losses, strict=True):
            if math.isfinite(loss):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + loss, count + 1

    def means(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, tuple[float, int]]:
        """Mean loss and number of samples by group, over all ranks; the sums begin anew."""
        sums: dict[str, tuple[float, int]] = {}
        for name, (total, count) in gather(list(self._sums.items())):
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count
        self._sums = {}
        return {name: (total / count, count) for name, (total, count) in sorted(sums.items())}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON; the file is replaced in one step."""
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def describe_encoder(trainer: Any, mean: dict[str, float], validated: int) -> dict[str, Any]:
    """The card: what a stranger must know about the weights of an encoder.

    Args:
        trainer: the ``EncoderTrainer`` that made them.
        mean: final figures.
        validated: number of cases that these are the mean of.
    """
    manager = trainer.configuration_manager
    training, _ = trainer.do_split()
    pretrain = trainer.umit.to_dict()["pretrain"]  # the path of a tokenizer is of this machine
    licence = trainer.dataset_json.get("licence", trainer.dataset_json.get("license"))
    return {
        "method": trainer.card_method,
        "data": {
            "dataset": trainer.plans_manager.dataset_name,
            "configuration": trainer.configuration_name,
            "fold": trainer.fold,
            "training_cases": len(training),
            "channels": trainer.dataset_json.get("channel_names", trainer.dataset_json.get("modality")),
        },
        "licence": licence if licence else "unknown: dataset.json names none",
        **({} if trainer.corpus is None else {"corpus": [asdict(source) for source in trainer.corpus.sources]}),
        "spacing": list(manager.spacing),
        "patch_size": list(manager.patch_size),
        "normalisation": list(manager.normalization_schemes),
        "intensity_properties": trainer.plans_manager.foreground_intensity_properties_per_channel,
        "input_channels": trainer.num_input_channels,
        "architecture": dict(manager.network_arch_init_kwargs),
        "pretrain": {**pretrain, "tokenizer": pretrain["tokenizer"] and Path(pretrain["tokenizer"]).name},
        "epochs_done": trainer.current_epoch,
        "metrics": {**mean, "validation_cases": validated},
        "versions": versions(),
    }
