"""What trainers say about bad images, plans and folders."""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import Killed, case_file, equal, folder_of, kill_at, log_of, weights

from nnunet_umit.config import FinetuneConfig
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.base import use_own_cores
from nnunet_umit.trainers.checkpoint import read_checkpoint
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.guard import NonFiniteGuard, NonFiniteLossError
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.requirements import require_plans

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINERS = (UMITPretrainTrainer, UMITTrainer)


def test_a_broken_image_is_named_and_its_steps_are_skipped(prepare: Callable[..., dict], nnunet_env: Any) -> None:
    plans = prepare(finetune={"iterations_per_epoch": 8}, batch=2)
    tiny.spoil(case_file(nnunet_env.preprocessed, 1))
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.run_training()
    assert 0 < trainer.guard.total < 16
    assert "the loss is not finite; step skipped (1 in a row, 1 in all). Cases in this batch:" in log_of(trainer)
    skipped = [line for line in log_of(trainer).splitlines() if "step skipped" in line]
    assert len(skipped) == trainer.guard.total and all("case_001" in line for line in skipped)
    assert all(math.isfinite(loss) for loss in trainer.logged("train_losses"))
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert read_checkpoint(folder_of(trainer) / checkpoints.FINAL)["umit"]["guard"]["total"] == trainer.guard.total


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_too_many_broken_steps_stop_the_training(
    prepare: Callable[..., dict], nnunet_env: Any, trainer_class: type
) -> None:
    plans = prepare(**{trainer_class.section: {"max_nonfinite": 2}})
    for index in range(4):
        tiny.spoil(case_file(nnunet_env.preprocessed, index))
    trainer = tiny.make_trainer(trainer_class, plans)
    with pytest.raises(NonFiniteLossError, match=r"2 steps in a row \(limit: max_nonfinite = 2.*checkpoint_latest"):
        trainer.run_training()
    stored = read_checkpoint(folder_of(trainer) / checkpoints.LATEST)
    assert all(value.isfinite().all() for value in stored["network_weights"].values())


def test_an_infinite_gradient_skips_the_step_and_counts(prepare: Callable[..., dict]) -> None:
    plans = prepare(finetune={"max_nonfinite": 3})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    before = weights(trainer)
    trainer.network.decoder.seg_layers["head0"].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match="the gradient was not finite in 3 steps in a row"):
        trainer.run_training()
    assert equal(before, weights(trainer))


def test_the_guard_forgets_after_a_good_step() -> None:
    lines: list[str] = []
    guard = NonFiniteGuard(2, lines.append)
    assert not guard.accept(False, ["a", "b", "a"], step=7)
    assert guard.accept(True, ["c"], step=8)
    assert not guard.accept(False, ["d"], step=9)
    assert lines[0].endswith("Cases in this batch: a, b") and guard.total == 2
    restored = NonFiniteGuard(2, lines.append)
    restored.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteLossError):
        restored.accept(False, ["e"], step=10)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_plans_of_another_planner_are_refused(prepare: Callable[..., dict], trainer_class: type) -> None:
    plans = prepare()
    del plans["configurations"]["3d_fullres"]["umit"]
    with pytest.raises(ValueError, match="-pl UMITPlanner"):
        tiny.make_trainer(trainer_class, plans)


def test_unknown_configuration_cascade_and_unknown_key_are_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    with pytest.raises(ValueError, match="no configuration '3d_lowres'; they have 3d_fullres"):
        UMITTrainer(copy.deepcopy(plans), "3d_lowres", 0, tiny.dataset_json(), torch.device("cpu"))
    small = copy.deepcopy(plans)
    small["configurations"]["3d_fullres"]["patch_size"][1] = 3
    with pytest.raises(ValueError, match="smaller than one token .* along axis 1"):
        tiny.make_trainer(UMITTrainer, small)
    thin = copy.deepcopy(plans)  # as a configuration that inherits the network of another may be
    thin["configurations"]["3d_fullres"]["spacing"][0] = 3.0
    with pytest.raises(ValueError, match=r"'3d_fullres' resamples images to \[3.0, 1.0, 1.0\] mm, but its network is"):
        tiny.make_trainer(UMITTrainer, thin)
    cascade = copy.deepcopy(plans)
    cascade["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    with pytest.raises(NotImplementedError, match="cascade"):
        tiny.make_trainer(UMITTrainer, cascade)
    wrong = copy.deepcopy(plans)
    wrong["configurations"]["3d_fullres"]["umit"]["finetune"]["epoch"] = 3
    with pytest.raises(ValueError, match=r"did you mean umit\.finetune\.epochs"):
        tiny.make_trainer(UMITTrainer, wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze": "encoder"}, "freeze_epochs is 0 but must be a whole number >= 1 where freeze is 'encoder'"),
        ({"seed": -1}, "seed is -1 but must be a whole number >= 0"),
    ],
)
def test_values_that_would_do_nothing_or_fail_later_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**values)


def test_missing_folders_and_cases_name_the_remedy(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    command = "nnUNetv2_preprocess -d 902 -plans_name UMITPlans -c 3d_fullres"  # nnU-Net takes no name there
    fingerprint = nnunet_env.preprocessed / tiny.NAME / "dataset_fingerprint.json"
    fingerprint.write_text(json.dumps({"shapes_after_crop": [[18, 20, 22]] * 5}))
    with pytest.raises(FileNotFoundError, match=f"4 of 5 preprocessed cases in .*; run: {command}; if .* --clean"):
        tiny.make_trainer(UMITTrainer, plans).run_training()
    fingerprint.write_text(json.dumps({"shapes_after_crop": [[18, 20, 22]] * 4}))
    tiny.make_trainer(UMITTrainer, plans).initialize()
    half = case_file(nnunet_env.preprocessed, 0).with_suffix(".pkl")
    content = half.read_bytes()
    half.unlink()  # nnU-Net writes it after the image: a kill in between leaves a file of the right size and no voxels
    for trainer_class in (UMITTrainer, UMITPretrainTrainer):
        with pytest.raises(FileNotFoundError, match=f"3 of 4 preprocessed cases in .*; run: {command}; if .* --clean"):
            tiny.make_trainer(trainer_class, plans).initialize()
    half.write_bytes(content)
    fingerprint.unlink()
    tiny.make_trainer(UMITTrainer, plans).initialize()
    (nnunet_env.preprocessed / tiny.NAME / "UMITPlans_3d_fullres").rename(nnunet_env.preprocessed / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"0 of all preprocessed cases in .*; run: {command}$"):
        trainer.run_training()
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(RuntimeError, match="nnUNet_results is not set"):
        tiny.make_trainer(UMITTrainer, plans)


def test_missing_datasets_and_plans_name_the_command(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    require_plans("902", "UMITPlans")
    require_plans(tiny.NAME, "UMITPlans")
    plans = nnunet_env.preprocessed / tiny.NAME / "UMITPlans.json"
    shutil.copy(plans, plans.with_name("ACDC24GB.json"))
    with pytest.raises(ValueError, match="ACDC24GB.json: \"plans_name\" is 'UMITPlans', .* set it to 'ACDC24GB'"):
        require_plans("902", "ACDC24GB")
    with pytest.raises(FileNotFoundError, match=r"there are plans ACDC24GB, UMITPlans \(option -p\)"):
        require_plans("902", "nnUNetPlans")
    plans.with_name("ACDC24GB.json").write_text("{")
    with pytest.raises(ValueError, match="ACDC24GB.json is no valid JSON"):
        require_plans("902", "ACDC24GB")
    plans.with_name("ACDC24GB.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there are plans UMITPlans \(option -p\).*-d 902 -pl UMITPlanner"):
        require_plans("902", "UMITPlansB")
    with pytest.raises(FileNotFoundError, match=r"-d 902 -pl UMITPlanner"):
        require_plans(tiny.NAME, "UMITPlansB")
    (nnunet_env.preprocessed / tiny.NAME / "UMITPlans.json").unlink()
    with pytest.raises(FileNotFoundError, match="UMITPlans.json does not exist.*has no plans yet"):
        require_plans("902", "UMITPlans")
    with pytest.raises(FileNotFoundError, match="(?s)dataset 77: .*nnUNetv2_plan_and_preprocess -d 77 -pl UMITPlanner"):
        require_plans("77", "UMITPlans")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(
        FileNotFoundError, match="(?s)Put it into a folder that nnUNet_raw is set to, then run: .*-d 78 "
    ):
        require_plans("78", "UMITPlans")
    with pytest.raises(ValueError, match="'hippocampus' is neither a number nor a name like"):
        require_plans("hippocampus", "UMITPlans")


def test_threads_are_limited_to_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    torch.set_num_threads(2)
    use_own_cores()
    assert torch.get_num_threads() == 1


def test_too_few_cases_for_folds_are_explained(prepare: Callable[..., dict]) -> None:
    plans = prepare(cases=3)
    trainer = tiny.make_trainer(UMITTrainer, plans, fold=0)
    with pytest.raises(ValueError, match="3 cases cannot be split into 5 folds; train fold 'all'"):
        trainer.run_training()


def test_pretraining_cannot_oversample_foreground(prepare: Callable[..., dict]) -> None:
    plans = prepare(pretrain={"oversample_foreground": 0.5})
    with pytest.raises(ValueError, match="reads no label"):
        tiny.make_trainer(UMITPretrainTrainer, plans)


def test_workers_end_with_the_training(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    kill_at(trainer, 2)
    with pytest.raises(Killed):
        trainer.run_training()
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()
