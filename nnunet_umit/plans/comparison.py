"""Which of nnU-Net's pairs of trainer and plans can be compared where UMIT is one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.file_path_utilities import get_output_folder


def trained_pairs(models: Sequence[dict[str, str]], dataset: int | str) -> list[dict[str, str]]:
    """Leave out pairs of a UMIT trainer with other plans, or another trainer with UMIT plans, that were not trained.

    Args:
        models: ``trainer``, ``plans`` and ``configuration`` of each, as nnUNetv2_find_best_configuration makes them.
        dataset: number or name.

    Returns:
        The rest, in order; a missing model of matching trainer and plans stays, for nnU-Net to complain about.
    """
    kept = []
    for model in models:
        mixed = model["trainer"].startswith("UMIT") != model["plans"].startswith("UMIT")
        folder = get_output_folder(dataset, model["trainer"], model["plans"], model["configuration"], fold=None)
        if mixed and not Path(folder).is_dir():
            print(f"nnunet-umit: {model['trainer']} was not trained with {model['plans']}; left out of the comparison.")
        else:
            kept.append(model)
    return kept
