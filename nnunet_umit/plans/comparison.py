"""Which of nnU-Net's pairs of trainer and plans can be compared where UMIT is one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def _file(plans: str, dataset: int | str) -> Path:
    return Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(dataset) / f"{plans}.json"


def planned_here(plans: str, dataset: int | str) -> bool:
    """Whether plans are a UMIT planner's, whatever their name (``-overwrite_plans_name``)."""
    file = _file(plans, dataset)
    if not file.is_file():
        return plans.startswith("UMIT")
    configurations = json.loads(file.read_text(encoding="utf-8"))["configurations"]
    return any("umit" in configuration for configuration in configurations.values())


def is_native(plans: str, dataset: int | str, configuration: str) -> bool:
    """Whether the images of a configuration have their own spacing each, which only UMIT trainers can be told of."""
    try:
        planned = PlansManager(str(_file(plans, dataset))).get_configuration(configuration).configuration
    except (OSError, RuntimeError, ValueError, KeyError):  # no such dataset or plans, which nnU-Net says itself
        return False
    return bool(planned.get("architecture", {}).get("arch_kwargs", {}).get("native"))


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
        mixed = model["trainer"].startswith("UMIT") != planned_here(model["plans"], dataset)
        folder = Path(get_output_folder(dataset, model["trainer"], model["plans"], model["configuration"], fold=None))
        if mixed and not any(folder.glob("fold_*/validation/summary.json")):  # a folder is made before anything fails
            print(f"nnunet-umit: {model['trainer']} was not trained with {model['plans']}; left out of the comparison.")
        else:
            kept.append(model)
    return kept
