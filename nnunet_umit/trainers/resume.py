"""Saving and continuing a training: what a checkpoint holds, and when it may be continued."""

from __future__ import annotations

import errno
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_umit import __version__
from nnunet_umit.architectures.transfer import CARD_FILE, ENCODER_FILE
from nnunet_umit.config import UMITConfig
from nnunet_umit.files import replace
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.guard import NonFiniteGuard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COMMAND = "command: "  # begins the line of the log that holds the command line
LOCK = ".training.lock"
LEFT = ("validation", ENCODER_FILE, CARD_FILE)  # what a training leaves beside its checkpoints
HOW_ONLY = ("checkpointing", "cpu_bfloat16")  # arguments of the network that change no weight


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer with checkpoints that a kill cannot damage, and that never continue the wrong thing."""

    network: Any
    dataset_class: Any
    preprocessed_dataset_folder: Any
    section: ClassVar[str]  # which part of the umit block the trainer obeys
    umit: UMITConfig
    guard: NonFiniteGuard
    history: dict[str, list[Any]]
    transfer: dict[str, Any] | None
    continued: bool
    continue_requested: bool

    def unwrapped(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return getattr(network, "_orig_mod", network)

    def hold_folder(self) -> None:
        """Keep the folder of the results for this process until it ends, however it ends (POSIX systems only).

        Raises:
            CheckpointError: another process trains there.
        """
        if self.local_rank != 0 or fcntl is None:
            return
        self._held = open(Path(self.output_folder) / LOCK, "w", encoding="ascii")  # open until the end
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process only: loaders do not inherit it
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                self.print_to_log_file(f"{self.output_folder} cannot be locked ({error}): train there only once")
                return
            raise checkpoints.CheckpointError(
                f"another training is running in {self.output_folder}; two would overwrite each other's checkpoints. "
                "Wait for it or stop it, or set nnUNet_results to another folder"
            ) from error

    def begin_folder(self) -> None:
        """A new training: refuse a lost continuation, write the first checkpoint, move what a former one left aside.

        Of former ones, finished models are all kept, and of starts of the same training that did not end the one with
        most epochs: a job that is started again and again without ``--c`` must not replace days by minutes. Its
        validation goes aside, as nnU-Net scores every file that lies there; so do the encoder and its card. All is
        decided before anything is moved: a kill in between would leave ``--c`` a former training to continue.

        Raises:
            CheckpointError: ``--c`` in a folder where a training began but left no checkpoint; or no checkpoints are
                wanted in the folder of a finished model, whose validation would be replaced.
        """
        folder = Path(self.output_folder)
        if self.local_rank == 0 and self.disable_checkpointing and (folder / checkpoints.FINAL).is_file():
            raise checkpoints.CheckpointError(
                f"{folder} holds a finished model; with --disable_checkpointing it would stay, and its validation "
                "would be replaced by that of a network that is not kept. Train without it (the finished model is "
                "moved aside), or set nnUNet_results to another folder for the trial"
            )
        if self.local_rank == 0 and not self.disable_checkpointing:
            own = Path(self.log_file).name  # nnU-Net joins its path as the environment variable is written
            logs = [log for log in folder.glob("training_log_*.txt") if log.name != own]
            earlier = [
                log.name for log in logs if may_have_had_weights(log.read_text(encoding="utf-8", errors="replace"))
            ]
            if self.continue_requested and earlier:
                raise checkpoints.CheckpointError(
                    f"--c was given, and a training began in {folder} ({min(earlier)}), but it was stopped before its "
                    "first checkpoint. It may have had -pretrained_weights, so nothing is started without them: run "
                    "the original command again, without --c"
                )
            self.current_epoch -= 1  # a checkpoint names the epoch after the present one
            self.save_checkpoint(os.path.join(folder, checkpoints.FIRST))  # nothing is moved if the disk is full
            self.current_epoch += 1
            finished = (folder / checkpoints.FINAL).is_file()
            left = [folder / name for name in (checkpoints.FINAL, checkpoints.BEST, checkpoints.LATEST, *LEFT)]
            moves = [(path, checkpoints.aside(path, finished)) for path in left if path.exists()]
            for path, old in moves:
                if old is None:
                    path.unlink()
                    now = "gone: no epoch was done, or the old one of the same training has more"
                else:
                    replace(path, old)
                    now = f"now {old.name}"
                self.print_to_log_file(f"a former training is in this folder; its {path.name} is {now}")
            (folder / checkpoints.PREVIOUS).unlink(missing_ok=True)
            replace(folder / checkpoints.FIRST, folder / checkpoints.LATEST)
        if self.is_ddp:
            distributed.barrier()

    def describe_architecture(self) -> dict[str, Any]:
        """What must agree for weights to fit."""
        manager = self.configuration_manager
        return {
            "network": f"{type(self.unwrapped()).__module__}.{type(self.unwrapped()).__qualname__}",
            "input_channels": self.num_input_channels,
            "arch_kwargs": dict(manager.network_arch_init_kwargs),
        }

    def describe_transfer(self) -> dict[str, Any] | None:
        """Report of ``-pretrained_weights``; a continued training keeps the one it began with."""
        report = getattr(self.unwrapped(), "transfer_report", None)
        return self.transfer if report is None else report.to_dict()

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's content with plain values, and a ``umit`` entry; written so that a kill cannot damage it."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        content = {
            "network_weights": self.unwrapped().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "umit": {
                "format": checkpoints.FORMAT,
                "section": self.section,
                "config": self.umit.to_dict(),
                "architecture": self.describe_architecture(),
                "transfer": self.describe_transfer(),
                "history": self.history,
                "guard": self.guard.state_dict(),
                "versions": versions(),
            },
        }
        path = Path(filename)
        previous = path.with_name(checkpoints.PREVIOUS) if path.name == checkpoints.LATEST else None
        checkpoints.atomic_save(content, path, previous=previous)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint of the same trainer and architecture.

        Raises:
            CheckpointError: damaged, or of another trainer or architecture; the message says what differs.
        """
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, dict):
            name, content = "the checkpoint", filename_or_checkpoint
        else:
            name, content = self._furthest(str(filename_or_checkpoint))
        self._require_same(name, content)
        self.unwrapped().load_state_dict(content["network_weights"])
        self._load_optimizer(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        self.history = {**self.history, **content["umit"]["history"]}
        self.transfer = content["umit"]["transfer"]
        self.guard.load_state_dict(content["umit"]["guard"])
        self.continued = True
        self.print_to_log_file(f"continuing from {name}: {self.current_epoch} of {self.num_epochs} epochs are done")

    def _furthest(self, name: str) -> tuple[str, dict[str, Any]]:
        """The checkpoint to continue from: of a finished training that was made longer, the latest, which nnU-Net does
        not look for beside a final one."""
        content = checkpoints.read_with_fallback(name, self.print_to_log_file)
        latest = Path(name).with_name(checkpoints.LATEST)
        if self.continue_requested and Path(name).name == checkpoints.FINAL and latest.is_file():
            further = checkpoints.read_with_fallback(latest, self.print_to_log_file)
            if further["current_epoch"] > content["current_epoch"]:
                return str(latest), further
        return name, content

    def _require_same(self, name: str, content: dict[str, Any]) -> None:
        stored = content["umit"]
        if stored["section"] != self.section:
            raise checkpoints.CheckpointError(
                f"{name} was written by {content['trainer_name']} and cannot be continued by {type(self).__name__}; to "
                "fine-tune from it, start a new training with -pretrained_weights"
            )
        present = checkpoints.to_plain(self.describe_architecture())
        lines = checkpoints.differences(of_the_weights(stored["architecture"]), of_the_weights(present))
        lines = lines or checkpoints.state_mismatch(content["network_weights"], self.unwrapped().state_dict())
        if lines:
            raise checkpoints.CheckpointError(
                f"{name} holds another network than the plans {self.plans_manager.plans_name} describe:\n  "
                + "\n  ".join(lines)
                + "\nRestore the plans it was trained with, or start a new training, with -pretrained_weights to keep "
                "the encoder"
            )
        for line in checkpoints.differences(stored["config"][self.section], self.umit.to_dict()[self.section]):
            self.print_to_log_file(f"the plan has changed since the checkpoint, the plan counts: {line}")

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments from the checkpoint; learning rates, decay and betas from the plan."""
        wanted = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for group, values in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(values)

    def name_last_good(self) -> str:
        """A sentence for errors: which file still holds a good state."""
        for name in () if self.disable_checkpointing else (checkpoints.LATEST, checkpoints.BEST):
            if (Path(self.output_folder) / name).is_file():
                return f"The last good state is kept in {Path(self.output_folder) / name}."
        return "No checkpoint was written (--disable_checkpointing)."


def of_the_weights(architecture: dict[str, Any]) -> dict[str, Any]:
    """What weights depend on, not how a step is calculated: that may change when a training moves to another card."""
    kept = {name: value for name, value in architecture["arch_kwargs"].items() if name not in HOW_ONLY}
    return {**architecture, "arch_kwargs": kept}


def may_have_had_weights(log: str) -> bool:
    """Whether the log of a training speaks of ``-pretrained_weights``, or does not hold the command that began it."""
    command = re.search(rf"{re.escape(COMMAND)}(.*)", log)
    return command is None or "-pretrained_weights" in command[1] or ": pre-trained weights: " in log


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    found = {"nnunet_umit": __version__, "torch": str(torch.__version__)}
    try:
        found["nnunetv2"] = version("nnunetv2")
    except PackageNotFoundError:  # a source checkout on the path
        found["nnunetv2"] = "unknown"
    return found
