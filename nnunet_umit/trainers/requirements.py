"""What must be there before a training can start, and which command makes it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_umit.config import UMITConfig, get_umit_config
from nnunet_umit.plans.corpus import FILE
from nnunet_umit.plans.sizing import check_patch
from nnunet_umit.spacing import Anisotropy

SAME_SPACING = 1e-3


def read_plan(plans: dict[str, Any], configuration: str) -> UMITConfig:
    """The umit block of a configuration.

    Raises:
        ValueError: plans of another planner, a configuration that does not exist, a network for another spacing than
            the images are resampled to, or a patch smaller than one token.
        NotImplementedError: a cascade.
    """
    names = list(plans["configurations"])
    if configuration not in names:
        raise ValueError(
            f"the plans {plans.get('plans_name')} have no configuration {configuration!r}; they have {', '.join(names)}"
        )
    manager = PlansManager(plans).get_configuration(configuration)
    umit = get_umit_config(manager)
    network = manager.network_arch_init_kwargs
    if not network.get("native"):
        _require_spacing(configuration, manager.spacing, network["spacing"])
    token = Anisotropy.from_spacing(network["spacing"]).token(network["token_size"])
    check_patch(manager.patch_size, token[3 - len(manager.patch_size) :])
    if manager.previous_stage_name is not None:
        raise NotImplementedError(
            f"configuration {configuration!r} is the second stage of a cascade, which UMIT trainers do not support: "
            "its extra input channels would not fit a pre-trained encoder; use 3d_fullres or 2d of -pl UMITPlanner"
        )
    return umit


def _require_spacing(configuration: str, images: Sequence[float], network: Sequence[float]) -> None:
    """An inherited configuration may have a spacing of its own, and still the network of its parent."""
    pairs = zip(images, network, strict=False)
    if len(images) != len(network) or not all(math.isclose(*pair, rel_tol=SAME_SPACING) for pair in pairs):
        raise ValueError(
            f"configuration {configuration!r} resamples images to {list(images)} mm, but its network is planned for "
            f"{list(network)} mm; set architecture.arch_kwargs.spacing in the plans to the former (and strides, where "
            "the slices become thicker or thinner)"
        )


def require_plans(dataset: str | int, plans_name: str) -> None:
    """Check that a dataset is known and planned, before nnU-Net opens its files.

    Raises:
        RuntimeError: one of nnU-Net's environment variables is not set.
        ValueError: the dataset is neither a number nor a DatasetXXX_Name; or the plans are damaged, or call themselves
            by another name, where nnU-Net would put the results.
        FileNotFoundError: no such dataset, or no plans of that name; with the command to run.
    """
    require_folders()
    text = str(dataset)
    if not (text.startswith("Dataset") or text.isdigit()):
        raise ValueError(f"dataset {text!r} is neither a number nor a name like Dataset004_Hippocampus")
    try:
        name = maybe_convert_to_dataset_name(text if text.startswith("Dataset") else int(text))
    except RuntimeError as error:  # nnU-Net: no such id, or several datasets share it
        raw = os.environ.get("nnUNet_raw") or "a folder that nnUNet_raw is set to"
        raise FileNotFoundError(
            f"dataset {text}: {error} Put it into {raw}, then run: "
            f"nnUNetv2_plan_and_preprocess -d {number_of(text)} -pl UMITPlanner"
        ) from error
    folder = Path(str(nnUNet_preprocessed)) / name
    for file in (folder / f"{plans_name}.json", folder / "dataset.json"):
        if not file.is_file():
            planned = sorted(each.stem for each in folder.glob("*.json") if "configurations" in read_json(each))
            found = f"there are plans {', '.join(planned)} (option -p)" if planned else "it has no plans yet"
            raise FileNotFoundError(
                f"{file} does not exist; of dataset {name} {found}; run: "
                f"nnUNetv2_plan_and_preprocess -d {number_of(name)} -pl UMITPlanner"
            )
    file = folder / f"{plans_name}.json"
    content = read_json(file)
    inside = content.get("plans_name")
    if not content:
        raise ValueError(f"{file} is no valid JSON; correct it in an editor, or plan again")
    if inside != plans_name:
        raise ValueError(
            f'{file}: "plans_name" is {inside!r}, so the results would go to that name; set it to {plans_name!r}'
        )


def read_json(file: Path) -> dict[str, Any]:
    """Content of a file; nothing where it is missing or damaged, or holds something else than an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def number_of(dataset: str) -> str:
    """What nnU-Net's planning commands take for ``-d``: a number, never a name."""
    found = re.match(r"Dataset(\d{3})", dataset)
    return str(int(found[1])) if found else dataset


def require_folders() -> None:
    """Raises RuntimeError if one of nnU-Net's environment variables is missing."""
    for name, folder in (("nnUNet_preprocessed", nnUNet_preprocessed), ("nnUNet_results", nnUNet_results)):
        if not folder.is_set() and not os.environ.get(name):
            raise RuntimeError(f"the environment variable {name} is not set; set it to a folder: export {name}=/path")


def require_cases(trainer: Any) -> None:
    """Raises FileNotFoundError with the command to run if preprocessed cases of a trainer are missing, all or some: of
    those that are there nnU-Net would make folds, and keep them."""
    folder = Path(trainer.preprocessed_dataset_folder)
    if (folder / FILE).is_file():
        raise NotImplementedError(
            f"{trainer.plans_manager.dataset_name} is a corpus: it has images of several datasets and no labels, so it "
            "can only be pre-trained on (-tr UMITPretrainTrainer); fine-tune one of its datasets"
        )
    images = {file.stem for kind in ("b2nd", "npz") for file in folder.glob(f"*.{kind}")}
    images = {name for name in images if not name.endswith("_seg")}
    properties = {file.stem for file in folder.glob("*.pkl")}  # written last: without them an image may be half there
    done = len(images & properties if properties else images)
    planned = len(read_json(folder.parent / "dataset_fingerprint.json").get("shapes_after_crop", []))
    if not done or done < planned:
        number, name = number_of(trainer.plans_manager.dataset_name), trainer.plans_manager.plans_name
        fewer = f"; if cases were removed: nnUNetv2_plan_and_preprocess -d {number} -pl UMITPlanner --clean"
        raise FileNotFoundError(
            f"{done} of {planned or 'all'} preprocessed cases in {folder}; run: "
            f"nnUNetv2_preprocess -d {number} -plans_name {name} -c {trainer.configuration_name}{fewer if done else ''}"
        )
