"""The planner on invented fingerprints."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_umit.config import get_umit_config
from nnunet_umit.plans import layout, report, sizing
from nnunet_umit.plans import planner as planner_module
from nnunet_umit.plans.labels import Foreground
from nnunet_umit.plans.memory import TrainingMemory, predict_training_memory
from nnunet_umit.plans.orientation import Orientation
from nnunet_umit.plans.planner import UMITPlanner, UMITPlannerB, UMITPlannerL, UMITPlannerS
from nnunet_umit.spacing import Anisotropy

ISOTROPIC, PLANAR = Anisotropy(1.0), Anisotropy(math.inf)
KEYS = {
    "data_identifier",
    "preprocessor_name",
    "batch_size",
    "patch_size",
    "median_image_size_in_voxels",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
    "architecture",
    "batch_dice",
}


@pytest.fixture
def invent(nnunet_env: Any, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a tiny raw dataset whose fingerprint claims any shape and spacing (reader order); returns its name."""
    # nnU-Net lists the files with twelve processes; one case is enough to find the reader.
    monkeypatch.setattr(default_experiment_planner, "get_filenames_of_train_images_and_targets", _first_case)
    # The labels are those of the tiny images, not of the invented ones: they say nothing here.
    monkeypatch.setattr(planner_module, "read_foreground", lambda *_: Foreground(Orientation((0, 1, 2))))

    def invent(
        shape: tuple[int, ...], spacing: tuple[float, ...], cases: int = 100, channel_names: tuple[str, ...] = ("MRI",)
    ) -> str:
        tiny = (16, 16) if shape[0] == 1 else (8, 8, 8)
        made = make_dataset(cases=2, shape=tiny, channels=len(channel_names), channel_names=channel_names)
        raw = nnunet_env.raw / made.name
        raw.mkdir()
        for part in ("imagesTr", "labelsTr"):
            (raw / part).symlink_to(made / part)
        content = load_json(str(made / "dataset.json")) | {"numTraining": cases}
        (raw / "dataset.json").write_text(json.dumps(content))
        folder = nnunet_env.preprocessed / made.name
        folder.mkdir(exist_ok=True)
        statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
        fingerprint = {
            "spacings": [list(spacing)] * 2,
            "shapes_after_crop": [list(shape)] * 2,
            "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(len(channel_names))},
            "median_relative_size_after_cropping": 1.0,
        }
        (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return made.name

    return invent


def _first_case(folder: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
    ending = dataset_json["file_ending"]
    image, label = f"{folder}/imagesTr/case_000_0000{ending}", f"{folder}/labelsTr/case_000{ending}"
    return {"case_000": {"images": [image], "label": label}}


@pytest.fixture
def cheap_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory model by rule of thumb, for tests that are about something else."""

    def rule_of_thumb(arch_kwargs: dict[str, Any], patch_size: Any, *_: Any) -> TrainingMemory:
        weights = 12 * arch_kwargs["depth"] * arch_kwargs["embed_dim"] ** 2
        return TrainingMemory(weights, 2 * weights, 800 * math.prod(patch_size), "mixed")

    monkeypatch.setattr(layout, "predict_training_memory", rule_of_thumb)
    monkeypatch.setattr(report, "predict_training_memory", rule_of_thumb)


def test_hippocampus_plan(invent: Callable[..., str], nnunet_env: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = invent((35, 50, 35), (1.0, 1.0, 1.0), cases=206)
    UMITPlanner(name).plan_experiment()
    plans = load_json(str(nnunet_env.preprocessed / name / "UMITPlans.json"))
    assert list(plans["configurations"]) == ["3d_fullres", "2d", "3d_native"]
    full, flat = plans["configurations"]["3d_fullres"], plans["configurations"]["2d"]
    assert set(full) == KEYS | {"umit"} and set(flat) == KEYS | {"umit"}
    assert (full["patch_size"], full["batch_size"]) == ([40, 56, 40], 4)
    assert full["preprocessor_name"] == "UMITPreprocessor" and full["data_identifier"] == "UMITPlans_3d_fullres"
    arch = full["architecture"]
    assert arch["network_class_name"] == "nnunet_umit.architectures.unetr.UMITSegmenter"
    assert arch["_kw_requires_import"] == [] and arch["arch_kwargs"]["embed_dim"] == 256
    assert arch["arch_kwargs"]["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert flat["architecture"]["arch_kwargs"]["strides"] == [[1, 1], [2, 2], [2, 2]]
    assert flat["umit"]["size"] == full["umit"]["size"] == "XS"
    printed = capsys.readouterr().out
    assert "U-Net" not in printed
    weights = f"{name}/UMITPretrainTrainer__UMITPlans__3d_fullres/fold_all/checkpoint_final.pth"
    pretrain = "nnUNetv2_train 901 3d_fullres all -tr UMITPretrainTrainer -p UMITPlans"
    for piece in (pretrain, weights, "nnUNetv2_predict"):
        assert piece in printed


@pytest.mark.usefixtures("cheap_memory")
def test_plan_builds_the_network_and_inheriting_configurations_inherit_the_block(
    invent: Callable[..., str], nnunet_env: Any
) -> None:
    name = invent((40, 64, 64), (2.0, 1.0, 1.0), channel_names=("T1", "T2"))
    UMITPlanner(name).plan_experiment()
    plans = load_json(str(nnunet_env.preprocessed / name / "UMITPlans.json"))
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    configuration = PlansManager(plans).get_configuration("mine")
    assert get_umit_config(configuration).size == "XS"
    patch_size = configuration.patch_size
    with torch.device("meta"):
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            2,
            3,
            deep_supervision=True,
        )
        outputs = network(torch.empty(1, 2, *patch_size))
    assert len(outputs) == len(configuration.pool_op_kernel_sizes) - 1  # as many as nnU-Net's trainer makes targets
    scales = np.cumprod(np.array(configuration.pool_op_kernel_sizes), axis=0)[:-1]
    for output, scale in zip(outputs, scales, strict=True):
        assert list(output.shape[2:]) == [size // step for size, step in zip(patch_size, scale, strict=True)]


@pytest.mark.usefixtures("cheap_memory")
def test_thick_slices_last_are_transposed_to_the_front(invent: Callable[..., str], nnunet_env: Any) -> None:
    name = invent((200, 220, 18), (1.5, 1.5, 6.6))
    plans = UMITPlanner(name).plan_experiment()
    assert plans["transpose_forward"] == [2, 0, 1]
    full, flat = plans["configurations"]["3d_fullres"], plans["configurations"]["2d"]
    arch = full["architecture"]["arch_kwargs"]
    assert arch["spacing"] == [6.6, 1.5, 1.5] == full["spacing"]
    assert Anisotropy.from_spacing(arch["spacing"]).level == 2
    assert full["patch_size"][0] in (18, 20) and flat["architecture"]["arch_kwargs"]["spacing"] == [1.5, 1.5]


@pytest.mark.usefixtures("cheap_memory")
def test_slices_that_were_stored_one_by_one_are_2d_whatever_their_thickness(invent: Callable[..., str]) -> None:
    plans = UMITPlanner(invent((1, 280, 235), (1.0, 1.5, 1.6))).plan_experiment()
    assert plans["transpose_forward"] == [0, 1, 2] and list(plans["configurations"]) == ["2d", "3d_native"]
    assert plans["configurations"]["2d"]["spacing"] == [1.5, 1.6]
    native = plans["configurations"]["3d_native"]
    assert native["patch_size"] == [1, *plans["configurations"]["2d"]["patch_size"]]


@pytest.mark.usefixtures("cheap_memory")
def test_labels_decide_what_is_mirrored_and_how_far_a_patch_reaches(
    invent: Callable[..., str], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heart of 130 mm in 380 mm of chest; thick slices are the last axis of the files and the first of the plans."""
    name = invent((256, 224, 12), (1.5, 1.5, 8.0))
    whole = UMITPlanner(name).plan_experiment()["configurations"]
    seen: list[Any] = []

    def read(dataset: Any, labels: Any, reader: type, transpose: Any) -> Foreground:
        seen.append((list(dataset), list(transpose)))
        orientation = Orientation((0, 2), ("one comes before two along axis 1",))
        return Foreground(orientation, ((90.0, 120.0, 105.0),), ((8.0, 1.5, 1.5),))

    monkeypatch.setattr(planner_module, "read_foreground", read)
    plans = UMITPlanner(name).plan_experiment()["configurations"]
    assert seen == [(["case_000"], [2, 0, 1])], "read once, in the axes of the plans"
    for section in ("pretrain", "tokenizer", "finetune"):
        axes = {name: each["umit"][section]["mirror_axes"] for name, each in plans.items()}
        assert axes == {"3d_fullres": [0, 2], "2d": [1], "3d_native": [0, 2]}
    assert "Not mirrored there: one comes before two along axis 1." in plans["2d"]["umit"]["why"]
    for configuration, planned in plans.items():
        token = planned["architecture"]["arch_kwargs"]["token_size"]
        assert token == whole[configuration]["architecture"]["arch_kwargs"]["token_size"]
        wanted = [math.ceil(voxels / token) * token for voxels in (2 * 120 / 1.5, 2 * 105 / 1.5)]
        assert planned["patch_size"][-2:] == wanted < whole[configuration]["patch_size"][-2:]
        assert len(planned["patch_size"]) == 2 or planned["patch_size"][0] == whole[configuration]["patch_size"][0]


@pytest.mark.usefixtures("cheap_memory")
def test_2d_dataset_has_only_2d(invent: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    plans = UMITPlanner(invent((1, 280, 235), (999.0, 1.0, 1.0))).plan_experiment()
    assert list(plans["configurations"]) == ["2d", "3d_native"]
    native = plans["configurations"]["3d_native"]
    assert native["patch_size"] == [1, *plans["configurations"]["2d"]["patch_size"]]
    assert native["architecture"]["arch_kwargs"]["strides"][1] == [1, 2, 2] and native["spacing"] == [999.0, 1.0, 1.0]
    assert plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["token_size"] == 8
    mirrored = [plans["configurations"][name]["umit"][section]["mirror_axes"] for name, section in
                itertools.product(("2d", "3d_native"), ("pretrain", "tokenizer", "finetune"))]  # fmt: skip
    assert mirrored == [[0, 1]] * 3 + [[1, 2]] * 3, "height and width, which a volume of one slice has behind its depth"
    assert "nnUNetv2_train 901 2d 0 -tr UMITTrainer" in capsys.readouterr().out


@pytest.mark.usefixtures("cheap_memory")
def test_native_is_planned_for_the_lowest_level_that_occurs(
    invent: Callable[..., str], nnunet_env: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name = invent((10, 220, 200), (10.0, 1.5, 1.5))
    file = nnunet_env.preprocessed / name / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    fingerprint["spacings"][1], fingerprint["shapes_after_crop"][1] = [5.0, 1.5, 1.5], [20, 220, 200]
    file.write_text(json.dumps(fingerprint))
    plans = UMITPlanner(name).plan_experiment()["configurations"]
    native, full = plans["3d_native"], plans["3d_fullres"]
    arch = native["architecture"]["arch_kwargs"]
    assert arch["native"] is True and arch["spacing"] == [5.0, 1.5, 1.5] == native["spacing"]
    assert native["median_image_size_in_voxels"] == [20.0, 220.0, 200.0]
    assert arch["token_size"] == full["architecture"]["arch_kwargs"]["token_size"]
    assert native["preprocessor_name"] == "UMITNativePreprocessor" and native["umit"]["finetune"]["thicken"] == 0.3
    assert full["umit"]["finetune"]["thicken"] == 0.0
    for kind in ("data", "seg", "probabilities"):
        assert native[f"resampling_fn_{kind}"] == "no_resampling_hack" and native[f"resampling_fn_{kind}_kwargs"] == {}
    assert "nnUNetv2_preprocess -d 901 -plans_name UMITPlans -c 3d_native" in capsys.readouterr().out


def test_large_ct_stays_ct_and_within_memory(invent: Callable[..., str]) -> None:
    name = invent((300, 512, 512), (1.0, 0.8, 0.8), channel_names=("CT",))
    full = UMITPlanner(name).plan_experiment()["configurations"]["3d_fullres"]
    assert full["normalization_schemes"] == ["CTNormalization"] and full["batch_dice"]
    arch = full["architecture"]["arch_kwargs"]
    assert predict_training_memory(arch, full["patch_size"], 1, 3).total(full["batch_size"]) <= 8e9 * 1.02
    assert math.prod(size // arch["token_size"] for size in full["patch_size"]) <= sizing.MOST_TOKENS_3D


@pytest.mark.usefixtures("cheap_memory")
def test_memory_target_sets_the_patch(invent: Callable[..., str]) -> None:
    name = invent((300, 512, 512), (1.0, 0.8, 0.8))
    voxels = []
    for target in (2.0, 4.0, 8.0):
        full = UMITPlanner(name, gpu_memory_target_in_gb=target).plan_experiment()["configurations"]["3d_fullres"]
        voxels.append(math.prod(full["patch_size"]))
        assert 800 * full["batch_size"] * voxels[-1] < target * 1e9
    assert voxels[0] < voxels[1] < voxels[2]


@pytest.mark.usefixtures("cheap_memory")
@pytest.mark.parametrize(("planner", "size"), [(UMITPlannerS, "S"), (UMITPlannerB, "B"), (UMITPlannerL, "L")])
def test_sized_planners_write_their_own_plans(
    invent: Callable[..., str], nnunet_env: Any, planner: type[UMITPlanner], size: str
) -> None:
    name = invent((35, 50, 35), (1.0, 1.0, 1.0))
    planner(name, gpu_memory_target_in_gb=24).plan_experiment()
    plans = load_json(str(nnunet_env.preprocessed / name / f"UMITPlans{size}.json"))
    assert {configuration["umit"]["size"] for configuration in plans["configurations"].values()} == {size}
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == f"UMITPlans{size}_3d_fullres"
    assert planner.__name__ in plans["configurations"]["3d_fullres"]["umit"]["why"]


@pytest.mark.usefixtures("cheap_memory")
def test_options_are_honoured(invent: Callable[..., str], nnunet_env: Any) -> None:
    name = invent((60, 60, 60), (1.0, 1.0, 1.0))
    planner = UMITPlannerS(
        name, preprocessor_name="MyPreprocessor", plans_name="Mine", overwrite_target_spacing=[1.0, 1.0, 4.0]
    )
    planner.plan_experiment()
    full = load_json(str(nnunet_env.preprocessed / name / "Mine.json"))["configurations"]["3d_fullres"]
    assert full["preprocessor_name"] == "MyPreprocessor" and full["spacing"] == [4.0, 1.0, 1.0]
    assert full["architecture"]["arch_kwargs"]["spacing"] == [4.0, 1.0, 1.0]
    assert full["median_image_size_in_voxels"] == [15.0, 60.0, 60.0]


@pytest.mark.parametrize("spacing", [[1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, math.nan], [1.0, -2.0, 1.0, 1.0]])
def test_bad_target_spacing_is_refused(spacing: list[float]) -> None:
    with pytest.raises(ValueError, match="-overwrite_target_spacing .* must be three numbers above 0"):
        UMITPlanner("Dataset901_Any", overwrite_target_spacing=spacing)


@pytest.mark.usefixtures("cheap_memory")
def test_memory_target_that_is_too_small_is_refused(invent: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="must be a number of GB above 0"):
        UMITPlanner("Dataset901_Any", gpu_memory_target_in_gb=0)
    name = invent((35, 50, 35), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"size L needs .* the memory target is 2 GB; raise -gpu_memory_target"):
        UMITPlannerL(name, gpu_memory_target_in_gb=2).plan_experiment()


@pytest.mark.usefixtures("cheap_memory")
def test_slices_a_hundred_pixels_thick_are_a_volume_all_the_same(invent: Callable[..., str]) -> None:
    """Sparse OCT rasters: the network treats their slices as images, and there are several in a patch."""
    plans = UMITPlanner(invent((40, 300, 260), (0.5, 0.004, 0.004))).plan_experiment()
    full = plans["configurations"]["3d_fullres"]
    assert len(full["patch_size"]) == 3 and full["patch_size"][0] > 1
    assert Anisotropy.from_spacing(full["spacing"]).planar
    assert {len(stride) for stride in full["architecture"]["arch_kwargs"]["strides"]} == {3}
    with torch.device("meta"):
        manager = PlansManager(plans).get_configuration("3d_fullres")
        network = get_network_from_plans(
            manager.network_arch_class_name, manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=False,
        )  # fmt: skip
        assert list(network(torch.empty(1, 1, *full["patch_size"])).shape[2:]) == full["patch_size"]


@pytest.mark.usefixtures("cheap_memory")
def test_a_configuration_that_inherits_its_patch_survives_planning_again(
    invent: Callable[..., str], nnunet_env: Any
) -> None:
    name = invent((35, 50, 35), (1.0, 1.0, 1.0))
    plans = UMITPlanner(name).plan_experiment()
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres"} | {
        key: full[key] for key in ("umit", "architecture")
    }
    (nnunet_env.preprocessed / name / "UMITPlans.json").write_text(json.dumps(plans))
    assert "mine" in UMITPlanner(name).plan_experiment()["configurations"]


@pytest.mark.usefixtures("cheap_memory")
def test_stale_configurations_go_and_own_ones_stay(
    invent: Callable[..., str], nnunet_env: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name = invent((35, 50, 35), (1.0, 1.0, 1.0))
    file = nnunet_env.preprocessed / name / "UMITPlans.json"
    ours = {"architecture": {"network_class_name": planner_module.NETWORK}}
    old = {
        "3d_lowres": {"next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "unet": {"architecture": {"network_class_name": "PlainConvUNet"}},
        "orphan": {"inherits_from": "3d_lowres"},
        "grandchild": {"inherits_from": "child"},
        "child": {"inherits_from": "3d_fullres", "batch_size": 7},
        "own": ours,
    }
    file.write_text(json.dumps({"configurations": old}))
    UMITPlanner(name).plan_experiment()
    assert set(load_json(str(file))["configurations"]) == {*planner_module.PLANNED, "grandchild", "child", "own"}
    assert "dropped" in capsys.readouterr().out
