"""The preprocessors: damaged cases are refused by name, good ones are nnU-Net's, native ones keep their grid."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_umit.architectures.native import bucket
from nnunet_umit.plans.integrity import BadImageError
from nnunet_umit.plans.preprocessor import UMITNativePreprocessor, UMITPreprocessor


@pytest.mark.parametrize(
    ("corruption", "message"),
    [
        ("truncated", r"case_000_0000\.nii\.gz: truncated"),
        ("empty", r"case_000_0000\.nii\.gz: the file is empty"),
        ("nan", r"case_000_0000\.nii\.gz: voxel \(3, 3, 0\) \(x, y, z\) is nan"),
        ("inf", r"case_000_0000\.nii\.gz: voxel \(4, 4, 0\) \(x, y, z\) is inf"),
        ("constant", r"case_000_0000\.nii\.gz: every voxel has the same value"),
        ("label", r"case_000\.nii\.gz: label value 7 in .* declares \[0, 1, 2\]"),
    ],
)
def test_preprocessor_refuses_damaged_cases(make_dataset: Callable[..., Path], corruption: str, message: str) -> None:
    plans, dataset_json = _small_plans()
    damaged = make_dataset(cases=1, shape=(16, 16, 16), corruptions={0: corruption})
    images, label = [str(damaged / "imagesTr" / "case_000_0000.nii.gz")], str(damaged / "labelsTr" / "case_000.nii.gz")
    configuration = plans.get_configuration("3d_fullres")
    with pytest.raises(BadImageError, match=message):
        UMITPreprocessor(verbose=False).run_case(images, label, plans, configuration, dataset_json)
    with pytest.raises(BadImageError, match="preprocess again with --clean: the fingerprint was taken with this file"):
        UMITPreprocessor(verbose=False).run_case(images, label, plans, configuration, dataset_json)


def test_preprocessor_leaves_good_cases_to_nnunet(make_dataset: Callable[..., Path]) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    plans, dataset_json = _small_plans()
    folder = make_dataset(cases=1, shape=(16, 16, 16))
    case = ([str(folder / "imagesTr" / "case_000_0000.nii.gz")], str(folder / "labelsTr" / "case_000.nii.gz"))
    configuration = plans.get_configuration("3d_fullres")
    ours = UMITPreprocessor(verbose=False).run_case(*case, plans, configuration, dataset_json)
    stock = DefaultPreprocessor(verbose=False).run_case(*case, plans, configuration, dataset_json)
    np.testing.assert_array_equal(ours[0], stock[0])
    np.testing.assert_array_equal(ours[1], stock[1])


def test_preprocessor_checks_arrays_at_prediction() -> None:
    plans, dataset_json = _small_plans()
    image = np.full((1, 8, 8, 8), np.inf, np.float32)
    with pytest.raises(BadImageError, match="without a file name: channel 0 holds 512 of 512 voxels.*again$"):
        UMITPreprocessor(verbose=False).run_case_npy(
            image, None, {"spacing": [1, 1, 1]}, plans, plans.get_configuration("3d_fullres"), dataset_json
        )


def test_a_case_with_too_many_channels_is_named() -> None:
    """A PNG with opacity among others without, say."""
    plans, dataset_json = _small_plans()
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    with pytest.raises(BadImageError, match=r"without a file name: 2 channels, dataset.json declares 1 \(MRI\)"):
        UMITPreprocessor(verbose=False).run_case_npy(
            image, None, {"spacing": [1, 1, 1]}, plans, plans.get_configuration("3d_fullres"), dataset_json
        )


def test_a_black_image_among_those_to_be_predicted_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    plans, dataset_json = _small_plans()
    configuration, black = plans.get_configuration("3d_fullres"), np.zeros((1, 8, 8, 8), np.float32)
    case = (black, None, {"spacing": [1, 1, 1]}, plans, configuration, dataset_json)
    image, _, _ = UMITPreprocessor(verbose=False).run_case_npy(*case)
    assert image.shape == (1, 8, 8, 8) and (image == 0).all() and "channel 0 is constant (0)" in caplog.text


def test_native_preprocessor_keeps_the_grid_and_appends_the_spacing(make_dataset: Callable[..., Path]) -> None:
    plans, dataset_json = _small_plans()
    configuration = plans.plans["configurations"]["3d_fullres"]
    for kind in ("data", "seg"):
        configuration |= {f"resampling_fn_{kind}": "no_resampling_hack", f"resampling_fn_{kind}_kwargs": {}}
    plans.plans["transpose_forward"] = [2, 0, 1]
    folder = make_dataset(cases=1, shape=(16, 18, 10), spacing=(0.5, 1.0, 3.0))
    case = ([str(folder / "imagesTr" / "case_000_0000.nii.gz")], str(folder / "labelsTr" / "case_000.nii.gz"))
    made = PlansManager(plans.plans).get_configuration("3d_fullres")
    image, label, _ = UMITNativePreprocessor(verbose=False).run_case(*case, plans, made, dataset_json)
    assert image.shape == (4, 10, 16, 18) and label.shape == (1, 10, 16, 18)
    assert [np.unique(channel).tolist() for channel in image[1:]] == [[3.0], [0.5], [1.0]]
    assert abs(float(image[0].mean())) < 1e-3 and float(image[0].std()) == pytest.approx(1, abs=1e-3)


def test_a_volume_of_one_slice_has_no_depth(make_dataset: Callable[..., Path]) -> None:
    plans, dataset_json = _small_plans()
    configuration = plans.plans["configurations"]["3d_fullres"]
    configuration |= {"resampling_fn_data": "no_resampling_hack", "resampling_fn_data_kwargs": {}}
    plans.plans["transpose_forward"] = [2, 0, 1]
    image = np.random.default_rng(0).normal(size=(1, 16, 18, 1)).astype(np.float32)
    made = PlansManager(plans.plans).get_configuration("3d_fullres")
    properties = {"spacing": [0.5, 0.25, 1.0]}
    told, _, _ = UMITNativePreprocessor(verbose=False).run_case_npy(image, None, properties, plans, made, dataset_json)
    assert told.shape == (4, 1, 16, 18) and [np.unique(each).tolist() for each in told[1:]] == [[499.5], [0.5], [0.25]]
    assert bucket(told[1:, 0, 0, 0].tolist()) == (0, 5, True)
    assert properties["spacing"] == [0.5, 0.25, 1.0], "what the prediction is written with"


def _small_plans() -> tuple[PlansManager, dict[str, Any]]:
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "UMITPreprocessor",
        "patch_size": [16, 16, 16],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling | {"is_seg": False},
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True},
        "architecture": {},
    }
    plans = {
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {"3d_fullres": configuration},
    }
    return PlansManager(plans), {
        "labels": {"background": 0, "ball": 1, "box": 2},
        "channel_names": {"0": "MRI"},
    }


@pytest.mark.end_to_end
def test_damaged_file_stops_the_stock_command_with_its_name(nnunet_env: Any) -> None:
    """The error is raised in a spawned worker and must reach the user."""
    synthetic.make_dataset(nnunet_env.raw, cases=2, shape=(16, 16, 16), corruptions={1: "truncated"})
    command = "nnUNetv2_plan_and_preprocess -d 901 -pl UMITPlanner -c 3d_fullres -np 1 -npfp 1 --no_pbar"
    run = subprocess.run(shlex.split(command), capture_output=True, encoding="utf-8", timeout=600)
    assert run.returncode != 0
    assert "case_001_0000.nii.gz: truncated" in run.stderr and "again from its source" in run.stderr
