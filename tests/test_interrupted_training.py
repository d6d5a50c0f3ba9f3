"""Trainings that are killed, continued or begun anew: nothing learned is lost, nothing wrong is continued."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import Killed, equal, folder_of, kill_at, log_of, weights

from nnunet_umit.architectures.transfer import load_state
from nnunet_umit.trainers import base
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.checkpoint import CheckpointError, read_checkpoint
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.resume import LOCK

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_kill_before_the_first_epoch_keeps_the_pretrained_weights(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    trainer.network.load_umit_pretrained(str(source))
    before = weights(trainer)
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    resumed = tiny.make_trainer(UMITTrainer, plans, resume=True)
    resumed.load_checkpoint(str(folder_of(resumed) / checkpoints.LATEST))
    assert resumed.current_epoch == 0
    assert equal(weights(resumed), before)
    encoder, _ = load_state(source)
    name = "encoder.transformer.blocks.0.attn.qkv.weight"
    assert torch.equal(resumed.network.state_dict()[name], encoder[name])
    resumed.save_checkpoint(str(folder_of(resumed) / "again.pth"))
    assert read_checkpoint(folder_of(resumed) / "again.pth")["umit"]["transfer"]["fraction"] == 1.0


def test_continuing_a_training_that_left_no_checkpoint_is_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    fresh = tiny.make_trainer(UMITTrainer, plans, resume=True)  # an empty folder: --c starts, as in nnU-Net
    fresh.initialize()
    fresh.begin_folder()
    (folder_of(fresh) / checkpoints.LATEST).unlink()
    (folder_of(fresh) / "training_log_2020_1_1_00_00_00.txt").write_text("an earlier start")
    lost = tiny.make_trainer(UMITTrainer, plans, resume=True)
    with pytest.raises(CheckpointError, match=r"-pretrained_weights.*without --c"):
        lost.run_training()


def test_scripts_that_always_continue_start_where_nothing_began(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    failed = tiny.make_trainer(
        UMITTrainer, plans, resume=True
    )  # its log has the command; then it fails, as without data
    assert "command: " in log_of(failed)
    again = tiny.make_trainer(UMITTrainer, plans, resume=True)
    again.initialize()
    again.begin_folder()
    assert (folder_of(again) / checkpoints.LATEST).is_file()


@pytest.mark.parametrize(
    "log",
    [
        "command: nnUNetv2_train 4 2d 0 -tr UMITTrainer -pretrained_weights a.pth",
        "command: notebook\n2026-11-28 15:00:00: pre-trained weights: Transfer from a.pth",
        "an older version",
    ],
)
def test_a_start_that_may_have_had_weights_is_not_forgotten(prepare: Callable[..., dict], log: str) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(), resume=True)
    (folder_of(trainer) / "training_log_2020_1_1_00_00_00.txt").write_text(log)
    trainer.initialize()
    with pytest.raises(CheckpointError, match="training_log_2020_1_1_00_00_00.txt"):
        trainer.begin_folder()


def test_how_a_step_is_calculated_may_change(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    tiny.make_trainer(UMITTrainer, plans).run_training()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {"checkpointing": True}
    again = tiny.make_trainer(UMITTrainer, plans, resume=True)
    again.load_checkpoint(str(folder_of(again) / checkpoints.FINAL))
    assert again.network.encoder.transformer.checkpointing and again.current_epoch == 2
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {"depth": 3}
    with pytest.raises(CheckpointError, match="depth"):
        tiny.make_trainer(UMITTrainer, plans, resume=True).load_checkpoint(str(folder_of(again) / checkpoints.FINAL))


def test_continuing_starts_anew_however_the_folder_is_written(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = prepare()
    monkeypatch.setenv("nnUNet_results", f"{nnunet_env.results.parent}//{nnunet_env.results.name}")
    trainer = tiny.make_trainer(UMITTrainer, plans, resume=True)
    trainer.initialize()
    trainer.begin_folder()
    assert (folder_of(trainer) / checkpoints.LATEST).is_file()


def test_a_former_training_is_moved_aside(prepare: Callable[..., dict]) -> None:
    """Else --c after a kill would find the old checkpoint_final.pth and call the new training finished."""
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    for name in (checkpoints.FINAL, checkpoints.BEST, checkpoints.PREVIOUS):
        (folder_of(trainer) / name).write_bytes(b"old")
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    names = {file.name for file in folder_of(trainer).glob("*.pth")}
    assert names == {"old_checkpoint_final.pth", "old_checkpoint_best.pth", checkpoints.LATEST}


def test_what_a_former_training_validated_is_not_scored_again(prepare: Callable[..., dict]) -> None:
    """nnU-Net averages every file in the folder, of whichever model and fold."""
    plans = prepare()
    for trainer_class in (UMITTrainer, UMITPretrainTrainer):
        trainer = tiny.make_trainer(trainer_class, plans)
        folder = folder_of(trainer)
        for number in range(2):
            (folder / "validation").mkdir()
            for name in ("case_009.nii.gz", "case_009.npz"):
                (folder / "validation" / name).write_text(str(number))
            (folder / "encoder.safetensors").write_bytes(b"of another training")
            kill_at(trainer, 0)
            with pytest.raises(Killed):
                trainer.run_training()
            assert not (folder / "validation").exists() and not (folder / "encoder.safetensors").exists()
            trainer = tiny.make_trainer(trainer_class, plans)
        assert [(folder / name / "case_009.npz").read_text() for name in ("old_validation", "old_validation_2")] == [
            "0",
            "1",
        ]
        assert (folder / "old_encoder.safetensors").is_file() and (folder / "old_encoder_2.safetensors").is_file()


def test_starting_again_and_again_loses_no_epoch_and_no_model(prepare: Callable[..., dict]) -> None:
    """A job without --c on a machine that takes it away: hours, then minutes, must not leave minutes."""
    plans = prepare(finetune={"epochs": 4})

    def start(until: int | None) -> Path:
        trainer = tiny.make_trainer(UMITTrainer, plans)
        if until is None:
            trainer.run_training()
            return folder_of(trainer)
        kill_at(trainer, until)
        with pytest.raises(Killed):
            trainer.run_training()
        return folder_of(trainer)

    folder = start(until=9)
    start(until=4)
    assert read_checkpoint(folder / "old_checkpoint_latest.pth")["current_epoch"] == 3
    start(until=0)
    assert read_checkpoint(folder / "old_checkpoint_latest.pth")["current_epoch"] == 3
    for _ in range(2):
        start(until=None)
    start(until=0)
    finished = {"old_checkpoint_final.pth", "old_checkpoint_final_2.pth"}
    assert finished <= {file.name for file in folder.glob("*.pth")}
    assert [read_checkpoint(folder / name)["current_epoch"] for name in sorted(finished)] == [4, 4]


def test_a_start_of_another_training_takes_no_epoch_away(prepare: Callable[..., dict]) -> None:
    """Nine hours from other weights, or of another plan, are not those of this one."""
    plans = prepare(finetune={"epochs": 4})
    for rate, until in ((0.001, 9), (0.002, 5), (0.002, 9), (0.001, 0)):
        plans["configurations"]["3d_fullres"]["umit"]["finetune"]["learning_rate"] = rate
        trainer = tiny.make_trainer(UMITTrainer, plans)
        kill_at(trainer, until)
        with pytest.raises(Killed):
            trainer.run_training()
    folder = folder_of(trainer)
    kept = [read_checkpoint(file) for file in sorted(folder.glob("old_checkpoint_latest*.pth"))]
    assert [(each["umit"]["config"]["finetune"]["learning_rate"], each["current_epoch"]) for each in kept] == [
        (0.001, 3),
        (0.002, 3),
    ]
    tiny.make_trainer(UMITTrainer, plans).run_training()
    best = (folder / checkpoints.BEST).read_bytes()
    kill_at(trainer := tiny.make_trainer(UMITTrainer, plans), 0)
    with pytest.raises(Killed):
        trainer.run_training()
    assert best in [file.read_bytes() for file in folder.glob("old_checkpoint_best*.pth")], "of a finished model"


def test_where_a_former_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, same = tmp_path / checkpoints.BEST, dict.fromkeys(("section", "config", "architecture", "transfer"))
    epochs = {best.name: 3, f"old_{best.name}": 5}
    monkeypatch.setattr(checkpoints, "_readable", lambda file: {"current_epoch": epochs[file.name], "umit": same})
    (tmp_path / f"old_{best.name}").touch()
    assert checkpoints.aside(best, finished=False) is None
    assert checkpoints.aside(best, finished=True) == tmp_path / "old_checkpoint_best_2.pth"
    epochs[best.name] = 5
    assert checkpoints.aside(best, finished=False) == tmp_path / f"old_{best.name}"
    (tmp_path / f"old_{best.name}").unlink()
    epochs[best.name] = 0
    assert checkpoints.aside(best, finished=False) is None, "nothing is lost"


def test_nothing_is_moved_before_all_is_decided(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else --c after a kill in between continues what was left."""
    plans = prepare()
    for _ in range(2):
        tiny.make_trainer(UMITTrainer, plans).run_training()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    before = sorted(file.name for file in folder_of(trainer).glob("*.pth"))

    def killed(path: Path, finished: bool) -> None:
        if path.name == checkpoints.BEST:
            raise Killed

    monkeypatch.setattr(checkpoints, "aside", killed)
    with pytest.raises(Killed):
        trainer.run_training()
    assert sorted(file.name for file in folder_of(trainer).glob("*.pth")) == sorted([*before, checkpoints.FIRST])


@pytest.mark.skipif(os.name != "posix", reason="POSIX locks")
def test_a_second_training_in_the_same_folder_is_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder_of(trainer) / LOCK)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()  # it has the lock
    with pytest.raises(CheckpointError, match="another training is running in .*fold_all"):
        trainer.run_training()
    assert not list(folder_of(trainer).glob("*.pth"))
    other.kill()
    other.communicate()
    tiny.make_trainer(UMITTrainer, plans).run_training()


def test_a_trial_does_not_replace_the_validation_of_a_finished_model(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    tiny.make_trainer(UMITTrainer, plans).run_training()
    trial = tiny.make_trainer(UMITTrainer, plans)
    trial.disable_checkpointing = True
    with pytest.raises(CheckpointError, match=r"holds a finished model.*--disable_checkpointing"):
        trial.run_training()


def test_ranks_wait_for_the_last_checkpoints(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net reads the best one at once where --val_best was given, in every process."""
    trainer = tiny.make_trainer(UMITTrainer, prepare())
    trainer.run_training()
    there: list[bool] = []
    final = folder_of(trainer) / checkpoints.FINAL
    final.unlink()
    monkeypatch.setattr(trainer, "is_ddp", True)
    monkeypatch.setattr(base.distributed, "barrier", lambda: there.append(final.is_file()))
    trainer.on_train_end()
    assert there == [True]


def test_a_loader_that_dies_during_a_step_is_explained(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare())

    def die(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(trainer, "train_step", die)
    with pytest.raises(RuntimeError, match="nnUNet_n_proc_DA below"):
        trainer.run_training()
    monkeypatch.setattr(checkpoints.torch, "save", die)
    with pytest.raises(RuntimeError, match="^DataLoader worker"):
        trainer.save_checkpoint(str(folder_of(trainer) / "some.pth"))


def test_a_full_disk_at_the_start_leaves_the_former_training_where_it_is(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = prepare()
    tiny.make_trainer(UMITTrainer, plans).run_training()
    second = tiny.make_trainer(UMITTrainer, plans)
    before = sorted(file.name for file in folder_of(second).glob("*.pth"))

    def full(folder: Path, needed: int, what: str) -> None:
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoints, "require_space", full)
    with pytest.raises(CheckpointError, match="no room"):
        second.run_training()
    assert sorted(file.name for file in folder_of(second).glob("*.pth")) == before


def test_a_finished_training_that_is_made_longer_continues_where_it_was_killed(prepare: Callable[..., dict]) -> None:
    """nnU-Net takes the final checkpoint where there is one."""
    plans = prepare(finetune={"epochs": 2})
    tiny.make_trainer(UMITTrainer, plans).run_training()
    plans["configurations"]["3d_fullres"]["umit"]["finetune"]["epochs"] = 5
    longer = tiny.make_trainer(UMITTrainer, plans, resume=True)
    final = str(folder_of(longer) / checkpoints.FINAL)
    longer.load_checkpoint(final)
    kill_at(longer, 13)
    with pytest.raises(Killed):
        longer.run_training()
    again = tiny.make_trainer(UMITTrainer, plans, resume=True)
    again.load_checkpoint(final)
    assert again.current_epoch == 4 and "checkpoint_latest.pth: 4 of 5 epochs are done" in log_of(again)
    validating = tiny.make_trainer(UMITTrainer, plans)
    validating.load_checkpoint(final)
    assert validating.current_epoch == 2, "what is validated is the final one"


def test_disabled_checkpointing_takes_none_away(prepare: Callable[..., dict]) -> None:
    plans = prepare(finetune={"epochs": 3})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    kill_at(trainer, 5)
    with pytest.raises(Killed):
        trainer.run_training()
    files = {file.name: file.read_bytes() for file in folder_of(trainer).glob("*.pth")}
    assert checkpoints.LATEST in files
    again = tiny.make_trainer(UMITTrainer, plans, resume=True)
    again.load_checkpoint(str(folder_of(again) / checkpoints.LATEST))
    again.disable_checkpointing = True
    again.run_training()
    assert again.current_epoch == 3
    assert {file.name: file.read_bytes() for file in folder_of(again).glob("*.pth")} == files
    assert "disable_checkpointing" in again.name_last_good()


def test_ranks_that_begin_at_different_places_are_refused(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare())
    trainer.gather = lambda values: [*values, (True, 7)]
    with pytest.raises(CheckpointError, match=r"\(False, 0\), \(True, 7\).*one folder that all machines share"):
        trainer.run_training()


def test_disabled_checkpointing_writes_none(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()
    assert not [*folder_of(trainer).glob("*.pth"), *folder_of(trainer).glob("*.safetensors")]
    assert (folder_of(trainer) / "validation" / "summary.json").is_file()


def test_the_latest_checkpoint_knows_the_best_score(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net writes latest before it updates the best score, so a resumed training may overwrite a better best."""
    plans = prepare(finetune={"epochs": 2})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    seen = []
    save = trainer.save_checkpoint

    def watch(filename: str) -> None:
        save(filename)
        stored = read_checkpoint(filename)
        seen.append((Path(filename).name, stored["_best_ema"], stored["logging"]["ema_fg_dice"]))

    trainer.save_checkpoint = watch
    trainer.run_training()
    assert seen[0] == (checkpoints.FIRST, None, [])
    latest = [entry for entry in seen if entry[0] == checkpoints.LATEST]
    assert latest[0][1] == latest[0][2][0]


def test_a_checkpoint_of_another_trainer_or_network_is_refused(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    trainer = tiny.make_trainer(UMITTrainer, plans)
    with pytest.raises(CheckpointError, match=r"UMITPretrainTrainer.*UMITTrainer.*-pretrained_weights"):
        trainer.load_checkpoint(str(source))
    wider = copy.deepcopy(plans)
    wider["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["embed_dim"] = 48
    with pytest.raises(CheckpointError, match="embed_dim: 24 in the checkpoint, 48 now"):
        tiny.make_trainer(UMITPretrainTrainer, wider).load_checkpoint(str(source))
    deeper = copy.deepcopy(plans)
    deeper["configurations"]["3d_fullres"]["umit"]["pretrain"]["decoder_depth"] = 2
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: decoder\.blocks\.1"):
        tiny.make_trainer(UMITPretrainTrainer, deeper).load_checkpoint(str(source))


def test_the_plan_counts_when_it_changed(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    plans = copy.deepcopy(plans)
    plans["configurations"]["3d_fullres"]["umit"]["pretrain"].update(epochs=9, learning_rate=0.5, weight_decay=0.25)
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans, resume=True)
    trainer.load_checkpoint(str(source))
    assert trainer.num_epochs == 9
    assert {group["base_lr"] for group in trainer.optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.25}
    assert "the plan counts: epochs: 2 in the checkpoint, 9 now" in log_of(trainer)
