"""What a training is shown: cases of its fold, labels that lie on their image, mirrored as planned, and foreground."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_umit.trainers.batches import random_state
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.tokenizer import UMITTokenizerTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

FOLD = {"train": ["case_000", "case_002", "case_004"], "val": ["case_001", "case_003"]}
KINDS = ("3d_fullres", "3d_native")
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture
def plan(nnunet_env: Any) -> Callable[..., dict[str, Any]]:
    """Plans of one kind and preprocessed cases."""

    def plan(kind: str, cases: int = 1, shape: tuple[int, ...] = (18, 20, 22), **options: Any) -> dict[str, Any]:
        native = kind == "3d_native"
        plans = tiny.make_plans(native=native, **options)
        spacings = (SPACING,) if native else ()
        tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=cases, shape=shape, spacings=spacings)
        return plans

    return plan


def relabel(folder: Path, label: np.ndarray) -> None:
    """Give the only case below ``folder`` the label (D, H, W), and an image that is its label."""
    image, _, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case("case_000")
    image = np.asarray(image[:]).copy()
    image[0] = label
    properties["class_locations"] = {value: np.argwhere(label[None] == value) for value in (1, 2)}
    for file in folder.iterdir():
        file.unlink()
    nnUNetDatasetBlosc2.save_case(
        image, label[None].astype(np.int16), properties, str(folder / "case_000"), chunks=image.shape,
        blocks=image.shape,
    )  # fmt: skip


def samples_of(plans: dict[str, Any]) -> Any:
    """The training samples of a fine-tuning, without noise, brightness and gamma."""
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    samples = trainer.get_dataloaders()[0].batches.samples
    for transforms in all_transforms(samples):
        transforms.transforms = [step for step in transforms.transforms if not isinstance(step, RandomTransform)]
    return samples


def all_transforms(samples: Any) -> list[ComposeTransforms]:
    if hasattr(samples, "loader"):
        return [samples.loader.transforms]
    return [each.appearance for each in samples.augmentation.prepared.values()]


def unmirrored(samples: Any, seed: int) -> torch.Tensor:
    """Image of the sample of a seed, before it is mirrored."""
    if not hasattr(samples, "loader"):
        axes, samples.mirror_axes = samples.mirror_axes, ()
        image = sample(samples, seed)[0]
        samples.mirror_axes = axes
        return image
    (transforms,) = all_transforms(samples)
    steps = transforms.transforms
    transforms.transforms = [step for step in steps if not isinstance(step, MirrorTransform)]
    image = sample(samples, seed)[0]
    transforms.transforms = steps
    return image


def sample(samples: Any, seed: int, position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and label at full resolution, (D, H, W)."""
    with random_state(seed):
        image, target, _, _ = samples.make(samples.draw()[0], position)
    return image[0], (target[0] if isinstance(target, list) else target)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer_class", [UMITTrainer, UMITPretrainTrainer, UMITTokenizerTrainer])
def test_a_fold_learns_its_training_cases_and_is_judged_on_the_others(
    plan: Callable[..., dict], nnunet_env: Any, trainer_class: type, kind: str
) -> None:
    plans = plan(kind, cases=5, batch=4)
    (nnunet_env.preprocessed / tiny.NAME / "splits_final.json").write_text(json.dumps([FOLD]))
    trainer = tiny.make_trainer(trainer_class, plans, fold=0)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    assert {key for _ in range(6) for key in next(training)["keys"]} == set(FOLD["train"])
    assert {key for _ in range(2) for key in next(validation)["keys"]} <= set(FOLD["val"])
    if trainer_class is not UMITTrainer:
        trainer.run_training()
        trainer.perform_actual_validation()
        summary = json.loads((tiny.folder_of(trainer) / "validation" / "summary.json").read_text())
        assert [row["case"] for row in summary["metric_per_case"]] == FOLD["val"]


@pytest.mark.parametrize("axes", [[], [1], [0, 2]])
@pytest.mark.parametrize("kind", KINDS)
def test_image_and_label_are_cut_and_mirrored_together_as_planned(
    plan: Callable[..., dict], nnunet_env: Any, kind: str, axes: list[int]
) -> None:
    plans = plan(kind, finetune={"mirror_axes": axes, "augmentation": "light"})
    blocks = np.random.default_rng(0).integers(0, 3, (6, 7, 8))
    label = blocks.repeat(3, 0).repeat(3, 1).repeat(3, 2)[:18, :20, :22]
    relabel(nnunet_env.preprocessed / tiny.NAME / f"UMITPlans_{kind}", label)
    samples, seen = samples_of(plans), set()
    for seed in range(30):
        image, target = sample(samples, seed)
        assert torch.equal(image, target.float()), "the image is its label"
        plain = unmirrored(samples, seed)
        flips = [
            chosen
            for count in range(len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
            if torch.equal(image, plain.flip(chosen))
        ]
        assert len(flips) == 1
        seen.add(flips[0])
    assert len(seen) == 2 ** len(axes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_samples_of_a_batch_show_foreground(plan: Callable[..., dict], nnunet_env: Any, kind: str) -> None:
    """A lesion of one voxel, in a volume of which a patch is a twenty-seventh."""
    options = {"mirror_axes": [], "augmentation": "none", "oversample_foreground": 0.5}
    plans = plan(kind, shape=(48, 48, 48), finetune=options)
    label = np.zeros((48, 48, 48), np.int16)
    label[40, 9, 24] = 2
    relabel(nnunet_env.preprocessed / tiny.NAME / f"UMITPlans_{kind}", label)
    samples = samples_of(plans)
    shown = [[bool((sample(samples, seed, position)[1] == 2).any()) for seed in range(20)] for position in (0, 1)]
    assert not all(shown[0]) and all(shown[1])
