"""What both trainers share: a plan-driven, reproducible, kill-safe training inside nnU-Net's own loop.

Every random number of a training is a function of the plan's seed and a position: batches (``batches.py``), masks,
drop path and initial weights. No generator state is stored, and ``--c`` continues bit for bit on a CPU with the same
number of threads. On a GPU the order of floating-point sums is up to the kernels (nnU-Net switches cuDNN benchmarking
on), so curves agree only closely there.
"""

from __future__ import annotations

import locale
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter, time
from typing import Any

import numpy as np
import torch
from torch import distributed

from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.batches import derive_seed, explain_death, loader_died
from nnunet_umit.trainers.cpu import keep_freed_memory, use_own_cores
from nnunet_umit.trainers.guard import NonFiniteGuard, agreed
from nnunet_umit.trainers.loading import LoadingTrainer
from nnunet_umit.trainers.optimisation import LearningRateSchedule, adamw, parameter_groups
from nnunet_umit.trainers.pictures import Panel, draw_progress
from nnunet_umit.trainers.progress import StepProgress
from nnunet_umit.trainers.ranks import own_device, ranks_here, wrapping_on
from nnunet_umit.trainers.requirements import read_plan, require_cases, require_folders
from nnunet_umit.trainers.resume import COMMAND

DRAWING_SHARE = 0.05  # of the wall time may go into drawing progress.png


class UMITBaseTrainer(LoadingTrainer):
    """Not for ``-tr``: use one of the trainers made of it."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net copies this very signature
    ) -> None:
        plans.setdefault("continue_training", False)  # nnU-Net's command sets it, other callers need not
        self.continue_requested = bool(plans["continue_training"])
        self.umit = read_plan(plans, configuration)
        require_folders()
        super().__init__(plans, configuration, fold, dataset_json, device)
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        self.print_to_log_file(f"{COMMAND}{shlex.join(words)}", also_print_to_console=False)
        if self.is_ddp:
            self.device = own_device(device)
        config = self.config
        self.num_epochs = config.epochs
        self.num_iterations_per_epoch = config.iterations_per_epoch
        self.num_val_iterations_per_epoch = config.val_iterations_per_epoch
        self.initial_lr = config.learning_rate
        self.weight_decay = config.weight_decay
        self.oversample_foreground_percent = config.oversample_foreground
        if config.thicken and not self.native:
            raise ValueError(
                f"umit.{self.section}.thicken is {config.thicken} in configuration {configuration}, whose network "
                "cannot be told of a spacing that changes; set it to 0, or train 3d_native"
            )
        self.save_every = config.save_every
        self.seed = config.seed
        self.continued = False
        self.step_in_epoch = 0
        self.history: dict[str, list[Any]] = {}
        self.transfer: dict[str, Any] | None = None
        self.guard = NonFiniteGuard(config.max_nonfinite, self.print_to_log_file, self.name_last_good)
        self.progress = StepProgress(self.print_to_log_file, shown=self.local_rank == 0)
        self._draw_next = 0.0  # on the clock of perf_counter
        if self.device.type == "cpu":
            use_own_cores(ranks_here())
            keep_freed_memory()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("nnU-Net's default device is cuda, and torch finds no GPU here: add -device cpu")
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device)[0] >= 8:
            self.grad_scaler = None  # bfloat16 (emulated, slowly, on older GPUs) has float32's range: nothing to scale

    def _set_batch_size_and_oversample(self) -> None:
        """nnU-Net's share of the batch for this rank.

        Raises:
            ValueError: there are more ranks than samples.
        """
        ranks, batch = distributed.get_world_size() if self.is_ddp else 1, self.configuration_manager.batch_size
        if batch < ranks:
            raise ValueError(
                f"a batch of {batch} cannot be shared out to {ranks} processes: set batch_size of "
                f"{self.configuration_name} in the plans to {ranks} or a multiple, or start fewer"
            )
        super()._set_batch_size_and_oversample()

    def iteration(self) -> int:
        """Number of the present step, counted over the whole training."""
        return self.current_epoch * self.num_iterations_per_epoch + self.step_in_epoch

    def seed_for(self, stream: str, *indices: int) -> int:
        """A seed for one purpose and position, different on every rank."""
        return derive_seed(self.seed, stream, self.local_rank, *indices)

    def autocast(self) -> AbstractContextManager:
        """bfloat16 on GPUs that have it, else nnU-Net's float16 with a scaler; full precision elsewhere."""
        if self.device.type != "cuda":
            return nullcontext()  # on a CPU, bfloat16 convolutions are ten times slower
        return torch.autocast("cuda", dtype=torch.bfloat16 if self.grad_scaler is None else torch.float16)

    def to_device(self, value: Any) -> Any:
        """A tensor, or a list of tensors, on the training device."""
        if isinstance(value, list):
            return [self.to_device(item) for item in value]
        return value.to(self.device, non_blocking=True)

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, in one list."""
        if not self.is_ddp:
            return values
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    # ----------------------------------------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """Build network, optimiser and loss; the initial weights depend on the plan's seed only."""
        require_cases(self)
        torch.manual_seed(derive_seed(self.seed, "weights"))
        with wrapping_on(self.device):
            super().initialize()

    def _do_i_compile(self) -> bool:
        """As nnU-Net decides, but never for native images: their spacing is a constant of compiled code, which would be
        compiled again for nearly every batch, until torch gives up."""
        if not self.native:
            compiled: bool = super()._do_i_compile()
            return compiled
        if compile_requested():
            self.print_to_log_file("INFO: torch.compile disabled because every image of 3d_native has its own spacing")
        return False

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LearningRateSchedule]:
        """AdamW with one group for each layer, and a schedule that keeps their ratio."""
        config = self.config
        optimizer = adamw(self.optimised_groups(), betas=config.betas)
        schedule = LearningRateSchedule(
            optimizer,
            total=config.epochs * config.iterations_per_epoch,
            warmup_fraction=config.warmup_fraction,
            shape=config.schedule,
            minimum=config.minimum_learning_rate_fraction,
        )
        return optimizer, schedule

    def optimised_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, each with its ``base_lr``."""
        config = self.config
        return parameter_groups(
            self.unwrapped(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            transformer_rate=config.transformer_rate,
        )

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net draws with a package that is no longer maintained and logs its failure."""

    # ----------------------------------------------------------------------------------------------- epochs

    def run_training(self) -> None:
        """nnU-Net's loop; worker processes end with it, however it ends."""
        if self.native:
            torch.backends.cudnn.benchmark = False  # nnU-Net's, for shapes that never change: here batches differ
        try:
            super().run_training()
        except RuntimeError as error:
            if loader_died(error):  # in the middle of a step
                raise explain_death(self.dataloader_train.workers) from error
            raise
        finally:
            self.progress.stop()
            for stream in (self.dataloader_train, self.dataloader_val):
                if stream is not None:
                    stream.close()

    def on_train_start(self) -> None:
        """Say what ``-pretrained_weights`` brought, write the first checkpoint, before anything else can fail, then let
        nnU-Net prepare the training.

        With it, ``--c`` after a kill in the first minutes continues from the pre-trained weights, instead of silently
        starting without them.
        """
        if not self.was_initialized:
            self.initialize()
        report = getattr(self.unwrapped(), "transfer_report", None)
        if report is not None:
            self.print_to_log_file(f"pre-trained weights: {report}", also_print_to_console=False)  # printed already
        self.hold_folder()
        self.require_equal_start()
        if not self.continued:
            self.begin_folder()
        super().on_train_start()
        parameters = sum(parameter.numel() for parameter in self.unwrapped().parameters())
        self.print_to_log_file(
            f"{type(self).__name__}: {parameters / 1e6:.2f} million parameters, patch "
            f"{tuple(self.configuration_manager.patch_size)}, batch {self.configuration_manager.batch_size}, "
            f"{self.num_epochs} epochs of {self.num_iterations_per_epoch} iterations, from epoch {self.current_epoch}"
        )

    def require_equal_start(self) -> None:
        """Refuse ranks that would not train the same network.

        Raises:
            CheckpointError: some continue and others begin, or they continue from different epochs.
        """
        starts = self.gather([(self.continued, self.current_epoch)])
        if len(set(starts)) > 1:
            raise checkpoints.CheckpointError(
                f"the processes do not begin at the same place (continued, epoch): {starts}; nnUNet_results must be "
                "one folder that all machines share"
            )

    def on_train_end(self) -> None:
        """nnU-Net's end (``checkpoint_final.pth`` is whole before ``checkpoint_latest.pth`` goes), and ours; without
        checkpointing those of an earlier training stay."""
        if self.disable_checkpointing:
            self.print_to_log_file("Training done.")
            return
        super().on_train_end()
        if self.local_rank == 0:
            (Path(self.output_folder) / checkpoints.PREVIOUS).unlink(missing_ok=True)
        if self.is_ddp:
            distributed.barrier()  # --val_best reads next, in all processes, what this one has just written

    def on_train_epoch_start(self) -> None:
        """Learning rates are set before every step; here they are logged."""
        self.network.train()
        self.step_in_epoch = 0
        self.lr_scheduler.step(self.iteration())
        rate = float(max(group["lr"] for group in self.optimizer.param_groups))
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch}")
        self.print_to_log_file(f"Current learning rate: {rate:.3g}")
        self.logger.log("lrs", rate, self.current_epoch)
        self.progress.start(f"epoch {self.current_epoch}, training", self.num_iterations_per_epoch)

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Forward pass of one training batch."""
        raise NotImplementedError

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step; skipped, with the cases named, if loss or gradient is not finite."""
        step = self.iteration()
        torch.manual_seed(self.seed_for("step", step))  # drop path: the same after a restart
        self.lr_scheduler.step(step)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.compute_loss(batch)
        what, finite = "loss", agreed(torch.isfinite(loss.detach()), self.is_ddp)
        if finite:
            what, finite = "gradient", self._update(loss)
        self.accept(self.guard, finite, batch, step=step, what=what)
        self.step_in_epoch += 1
        value = float(loss.detach())
        self.progress.advance(f"loss {value:.4f}")
        return {"loss": value}

    def accept(self, guard: NonFiniteGuard, finite: bool, batch: dict[str, Any], *, step: int, what: str) -> None:
        """Tell a guard of a step, and of the cases of all ranks where it is not finite: all of them know and ask."""
        cases = batch["keys"] if finite else self.gather(list(batch["keys"]))
        guard.accept(finite, cases, step=step, what=what)

    def _update(self, loss: torch.Tensor) -> bool:
        """Backward pass and optimiser step; False if the gradient is not finite and the weights stay as they are."""
        parameters = self.network.parameters()
        if self.grad_scaler is not None:  # float16: the scaler skips overflowing steps by itself
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            # an overflow is how the scaler finds its scale; below 1 it is the gradient itself that is not finite
            return bool(torch.isfinite(norm)) or self.grad_scaler.get_scale() >= 1
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)  # equal on all ranks: already summed
        if not bool(torch.isfinite(norm)):
            return False
        self.optimizer.step()
        return True

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """Log the mean over all steps with a finite loss."""
        self.progress.stop()
        losses = self.gather([output["loss"] for output in train_outputs])
        self.logger.log("train_losses", finite_mean(losses), self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        """Evaluation mode."""
        self.network.eval()
        self.progress.start(f"epoch {self.current_epoch}, validation", self.num_val_iterations_per_epoch)

    def end_validation_step(self, batch: dict[str, Any], loss: float) -> None:
        """Show progress; name the cases of a loss that is not finite."""
        if not math.isfinite(loss):
            self.print_to_log_file(
                f"validation batch {batch['index']} has no finite loss; cases: {', '.join(batch['keys'])}"
            )
        self.progress.advance(f"loss {loss:.4f}")

    def describe_epoch(self) -> list[str]:
        """Lines for the log at the end of an epoch."""
        raise NotImplementedError

    def panels(self) -> list[Panel]:
        """Curves of ``progress.png``."""
        raise NotImplementedError

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's, with escapes for characters that the log or the console cannot have: names of files hold any."""
        words = [printable(str(each)) for each in args]
        super().print_to_log_file(*words, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def draw_or_say(self, draw: Callable[[], None]) -> None:
        """Draw; where there is no room, or a viewer keeps the file open, say so: a picture ends no training."""
        try:
            draw()
        except OSError as error:
            self.print_to_log_file(f"a picture was not drawn ({error}); all else goes on")

    def draw(self) -> None:
        """Write ``progress.png`` as often as that takes a twentieth of the time at most, and after the last epoch."""
        began = perf_counter()
        if began < self._draw_next and self.current_epoch + 1 < self.num_epochs:
            return
        file = Path(self.output_folder) / "progress.png"
        self.draw_or_say(lambda: draw_progress(self.panels(), file, type(self).__name__))
        ended = perf_counter()
        self._draw_next = ended + (ended - began) / DRAWING_SHARE

    def logged(self, name: str) -> list[float]:
        """All values of one of nnU-Net's logging keys."""
        return [float(value) for value in self.logger.get_value(name, step=None)]

    def time_and_rate_panels(self) -> list[Panel]:
        """Learning rate, and seconds per epoch."""
        stamps = zip(self.logged("epoch_start_timestamps"), self.logged("epoch_end_timestamps"), strict=False)
        return [
            Panel("learning rate", {"": self.logged("lrs")}),
            Panel("seconds an epoch", {"": [end - start for start, end in stamps]}, from_zero=True),
        ]

    def on_epoch_end(self) -> None:
        """Log, draw, and keep the best and the latest state.

        Unlike in nnU-Net, the best score is up to date when the latest checkpoint is written, so that a resumed
        training cannot overwrite a better ``checkpoint_best.pth``; and a score that is not a number is never the best.
        """
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        for line in self.describe_epoch():
            self.print_to_log_file(line)
        started, ended = (self.logged(f"epoch_{name}_timestamps")[-1] for name in ("start", "end"))
        self.print_to_log_file(f"Epoch time: {ended - started:.2f} s")
        score = self.logged("ema_fg_dice")[-1]
        if math.isfinite(score) and (self._best_ema is None or score > self._best_ema):
            self._best_ema = score
            self.save_checkpoint(os.path.join(self.output_folder, checkpoints.BEST))
        done = self.current_epoch + 1
        if done % self.save_every == 0 and done != self.num_epochs:
            self.save_checkpoint(os.path.join(self.output_folder, checkpoints.LATEST))
        if self.local_rank == 0:
            self.draw()
        self.current_epoch = done


def printable(text: str) -> str:
    """``text`` with backslash escapes in place of what the locale's files and standard output cannot encode."""
    for encoding in (locale.getpreferredencoding(False), getattr(sys.stdout, "encoding", None) or "utf-8"):
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def compile_requested() -> bool:
    """Whether ``nnUNet_compile`` asks for torch.compile; unset, it does not."""
    return os.environ.get("nnUNet_compile", "f").lower() in ("true", "1", "t")


def finite_mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
