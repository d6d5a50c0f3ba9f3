"""3d_native with nnU-Net's own commands, as sub-processes, on images of two spacings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import synthetic
from workspace import NAME, Workspace

pytestmark = pytest.mark.end_to_end

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def make_mixed(root: Path) -> None:
    """Three isotropic cases and three with slices of 4 mm along the last array axis, and one of them to predict."""
    thin = synthetic.make_dataset(root / "raw", number=901, cases=3, shape=(20, 24, 24))
    thick = synthetic.make_dataset(
        root / "thick", number=901, cases=3, test_cases=1, shape=(20, 24, 6), spacing=(1.0, 1.0, 4.0), seed=1
    )
    for kind in ("imagesTr", "labelsTr"):
        for file in (thick / kind).iterdir():
            shutil.move(file, thin / kind / file.name.replace("case_", "case_1"))
    for kind in ("imagesTs", "labelsTs"):
        shutil.move(thick / kind, thin / kind)
    description = json.loads((thin / "dataset.json").read_text())
    (thin / "dataset.json").write_text(json.dumps({**description, "numTraining": 6}))


def test_images_keep_their_grid_through_the_whole_journey(tmp_path: Path) -> None:
    make_mixed(tmp_path)
    space = Workspace(tmp_path, "3d_native")
    space.run(
        "nnUNetv2_plan_and_preprocess", "-d", "901", "-pl", "UMITPlanner", "-c", "3d_native", "-np", "1", "-npfp", "1"
    )
    file = space.root / "preprocessed" / NAME / "UMITPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_native"]
    configuration["architecture"]["arch_kwargs"].update(TINY)
    for section in ("pretrain", "finetune"):
        configuration["umit"][section].update(epochs=2, iterations_per_epoch=3, val_iterations_per_epoch=1)
    file.write_text(json.dumps(plans))

    output = space.train("UMITPretrainTrainer", "all")
    assert "masked loss, level 0:" in output
    source = space.fold("UMITPretrainTrainer", "all") / "checkpoint_final.pth"
    output = space.train("UMITTrainer", "0", "-pretrained_weights", str(source))
    assert "100.0 % of the encoder" in output
    summary = json.loads((space.fold("UMITTrainer", "0") / "validation" / "summary.json").read_text())
    assert summary["metric_per_case"] and 0 <= summary["foreground_mean"]["Dice"] <= 1
    raw, predicted = space.root / "raw" / NAME, space.root / "predicted"
    space.run(
        "nnUNetv2_predict", "-i", str(raw / "imagesTs"), "-o", str(predicted), "-d", "901", "-c", "3d_native",
        "-f", "0", "-tr", "UMITTrainer", "-p", "UMITPlans", "-device", "cpu", "-npp", "0", "-nps", "0",
    )  # fmt: skip
    image = sitk.ReadImage(str(raw / "imagesTs" / "test_000_0000.nii.gz"))
    label = sitk.ReadImage(str(predicted / "test_000.nii.gz"))
    assert label.GetSize() == image.GetSize() == (6, 24, 20) and label.GetSpacing() == image.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(label))) <= {0, 1, 2}
