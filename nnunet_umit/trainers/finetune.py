"""``UMITTrainer``: supervised training of the segmentation network, from scratch or from a pre-trained encoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunet_umit.config import FinetuneConfig
from nnunet_umit.plans.network import PlannedSegmenter
from nnunet_umit.trainers.augmentation import light_augmentation, with_own_blur
from nnunet_umit.trainers.balance import balanced_cross_entropy, fading
from nnunet_umit.trainers.base import UMITBaseTrainer, finite_mean
from nnunet_umit.trainers.optimisation import frozen_parameters, last_layer, set_layer_decay, set_trainable
from nnunet_umit.trainers.pictures import Panel
from nnunet_umit.trainers.ranks import wrap
from nnunet_umit.trainers.shares import share_loss

LIGHT_BELOW = 50  # times that a training shows each of its cases


class UMITTrainer(PlannedSegmenter, UMITBaseTrainer):
    """Dice and cross-entropy with deep supervision (nnU-Net's loss), AdamW with layer-wise learning rates.

    In the first part of a training a class-balanced cross-entropy is added (``finetune.balance``). Region-based labels
    and an ignore label work as in nnU-Net; cascades are refused.
    """

    section = "finetune"

    @property
    def config(self) -> FinetuneConfig:
        """The ``finetune`` section of the plan's umit block."""
        return self.umit.finetune

    # ----------------------------------------------------------------------------------------------- set-up

    @functools.cached_property
    def augmentation(self) -> str:
        """``nnunet``, ``light`` or ``none``; ``auto`` is ``light`` where the training shows a case a few times only.

        What a network has hardly seen it cannot learn by heart, and undistorted it learns it faster.
        """
        if self.config.augmentation != "auto":
            return self.config.augmentation
        samples = self.num_epochs * self.num_iterations_per_epoch * self.configuration_manager.batch_size
        shown = samples / max(len(self.do_split()[0]), 1)
        chosen = "light" if shown < LIGHT_BELOW else "nnunet"
        self.print_to_log_file(
            f"augmentation: {chosen}, because the training shows every case about {shown:.0f} times ({LIGHT_BELOW} and "
            "more: nnunet)"
        )
        return chosen

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:
        """nnU-Net's choice for its own augmentation; else no rotation, and so no larger patch to rotate in."""
        if self.augmentation == "nnunet":
            chosen = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            rotation, dummy_2d, initial_patch_size, _ = chosen
        else:
            rotation, dummy_2d, initial_patch_size = None, False, self.configuration_manager.patch_size
        axes = self.inference_allowed_mirroring_axes = self.mirrored_axes()
        return rotation, dummy_2d, initial_patch_size, axes

    def mirrored_axes(self) -> tuple[int, ...] | None:
        """As the plan says; ``augmentation`` "none" mirrors nothing, in prediction neither."""
        return None if self.config.augmentation == "none" else super().mirrored_axes()

    def training_transforms(
        self, patch: Any, rotation: Any, mirror_axes: Any, dummy_2d: bool, scales: Any
    ) -> BasicTransform:
        """Augmentation ``nnunet``, ``light`` (flips, noise, brightness, gamma) or ``none``."""
        use_mask = self.configuration_manager.use_mask_for_norm
        if self.augmentation == "nnunet":
            transforms = self.get_training_transforms(
                patch,
                rotation,
                scales,
                mirror_axes,
                dummy_2d,
                use_mask_for_norm=use_mask,
                is_cascaded=False,
                foreground_labels=self.label_manager.foreground_labels,
                regions=self.label_manager.foreground_regions if self.label_manager.has_regions else None,
                ignore_label=self.label_manager.ignore_label,
            )
            return with_own_blur(transforms)
        light: list[BasicTransform] = []
        if self.augmentation == "light":
            light = light_augmentation(mirror_axes, use_mask)
        return ComposeTransforms([*light, *self.validation_transforms(scales).transforms])

    def validation_transforms(self, scales: Any) -> ComposeTransforms:
        """nnU-Net's: no augmentation, targets at every resolution."""
        return self.get_validation_transforms(
            scales,
            is_cascaded=False,
            foreground_labels=self.label_manager.foreground_labels,
            regions=self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            ignore_label=self.label_manager.ignore_label,
        )

    def configure_optimizers(self) -> Any:
        """As for every UMIT trainer; what is frozen at first is frozen before DDP wraps the network."""
        optimiser_and_schedule = super().configure_optimizers()
        self._freeze(epoch=0)
        return optimiser_and_schedule

    def _set_batch_size_and_oversample(self) -> None:
        """As for every UMIT trainer; Dice over the batch needs equal shares.

        Raises:
            ValueError: the shares of the ranks would differ.
        """
        super()._set_batch_size_and_oversample()
        manager = self.configuration_manager
        if self.is_ddp and manager.batch_dice and manager.batch_size % distributed.get_world_size():
            raise ValueError(
                f"nnU-Net computes Dice over the whole batch here (batch_dice), and {manager.batch_size} samples have "
                f"no equal shares for {distributed.get_world_size()} processes: set batch_size of "
                f"{self.configuration_name} in the plans to a multiple of them"
            )

    def _freeze(self, epoch: int) -> int:
        """Freeze or release for an epoch; returns how many tensors changed."""
        frozen = epoch < self.config.freeze_epochs
        changed = set_trainable(frozen_parameters(self.unwrapped(), self.config.freeze), not frozen)
        if changed and isinstance(self.network, DistributedDataParallel):  # it remembers which gradients to expect
            self.network = wrap(self.network.module, self.device)
        return changed

    # ----------------------------------------------------------------------------------------------- epochs

    def on_train_epoch_start(self) -> None:
        """Freeze or release what ``finetune.freeze`` names."""
        changed = self._freeze(self.current_epoch)
        if changed:
            self.print_to_log_file(
                f"{self.config.freeze}: {changed} tensors are "
                f"{'frozen' if self.current_epoch < self.config.freeze_epochs else 'trained from now on'}"
            )
        super().on_train_epoch_start()

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """nnU-Net's loss, or that of shares where labels were drawn; and the balanced cross-entropy that fades."""
        output = self.network(self.to_device(batch["data"]))
        targets = self._targets(output, batch)
        loss: torch.Tensor = (self.loss_of_shares if batch["drawn"] else self.loss)(output, targets)
        weight = fading(self.iteration() / (self.num_epochs * self.num_iterations_per_epoch), self.config.balance)
        if weight and self.balance is not None:
            loss = loss + weight * self.balance(output, targets)
        return loss

    @functools.cached_property
    def balance(self) -> Any:
        """Balanced cross-entropy of an output and its target, or of lists of them with nnU-Net's weights of deep
        supervision; None for regions, which overlap: a voxel has no one class."""
        return None if self.label_manager.has_regions else self._supervised(balanced_cross_entropy)

    @functools.cached_property
    def loss_of_shares(self) -> Any:
        """The loss for drawn labels, in the same form; nnU-Net's for regions."""
        return self.loss if self.label_manager.has_regions else self._supervised(share_loss)

    def _supervised(self, single: Callable[..., torch.Tensor]) -> Any:
        """A loss of one output as one of all outputs."""
        single = functools.partial(single, ignore_label=self.label_manager.ignore_label)
        if isinstance(self.loss, DeepSupervisionWrapper):
            return DeepSupervisionWrapper(single, self.loss.weight_factors)
        return single

    def _targets(self, output: Any, batch: dict[str, Any]) -> Any:
        """A target for every output; native networks give all of them at full resolution."""
        target = self.to_device(batch["target"])
        return [target] * len(output) if isinstance(output, list) and not isinstance(target, list) else target

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss, and true and false positives and false negatives of every class (nnU-Net's pseudo Dice).

        nnU-Net's own step always uses float16, which a network trained in bfloat16 may overflow.
        """
        with self.autocast():
            output = self.network(self.to_device(batch["data"]))
            target = self._targets(output, batch)
            loss = float(self.loss(output, target))
        if self.enable_deep_supervision:
            output, target = output[0], target[0]
        counts = confusion(output, target, self.label_manager)
        self.end_validation_step(batch, loss)
        return {"loss": loss, **counts}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """nnU-Net's pseudo Dice, safe where no class occurs: a class without a voxel is NaN and counts in no mean."""
        self.progress.stop()
        outputs = self.gather(val_outputs)
        tp, fp, fn = (
            np.sum([np.asarray(output[name], float) for output in outputs], 0)
            for name in ("tp_hard", "fp_hard", "fn_hard")
        )
        total = 2 * tp + fp + fn
        dice = np.divide(2 * tp, total, out=np.full_like(total, np.nan), where=total > 0)
        scores = [float(score) for score in dice]
        mean = finite_mean(scores)
        if not math.isfinite(mean):  # one NaN would stay in the moving average for ever
            previous = self.logger.get_value("ema_fg_dice", step=None)
            mean = float(previous[-1]) if previous else 0.0
        self.logger.log("mean_fg_dice", mean, self.current_epoch)
        self.logger.log("dice_per_class_or_region", scores, self.current_epoch)
        self.logger.log("val_losses", finite_mean([output["loss"] for output in outputs]), self.current_epoch)

    def describe_epoch(self) -> list[str]:
        """Losses and pseudo Dice, as nnU-Net logs them."""
        dice = [round(score, 4) for score in self.logger.get_value("dice_per_class_or_region", step=-1)]
        return [
            f"train_loss {self.logged('train_losses')[-1]:.4f}",
            f"val_loss {self.logged('val_losses')[-1]:.4f}",
            f"Pseudo dice {dice}",
        ]

    def panels(self) -> list[Panel]:
        """Loss, pseudo Dice, learning rate, time."""
        losses = {"training": self.logged("train_losses"), "validation": self.logged("val_losses")}
        dice = {"mean": self.logged("mean_fg_dice"), "moving average": self.logged("ema_fg_dice")}
        return [Panel("loss", losses), Panel("pseudo Dice", dice), *self.time_and_rate_panels()]

    # -------------------------------------------------------------------------------------------- transfer

    def on_train_start(self) -> None:
        """Set layer-wise decay, then begin.

        Layer-wise decay protects what a pre-trained encoder knows; weights that know nothing all learn at one rate.
        """
        if not self.was_initialized:
            self.initialize()
        if self.describe_transfer() is None:
            self.print_to_log_file("no pre-trained weights: training from scratch, without layer-wise decay")
        decay = self.config.layer_decay if self.describe_transfer() is not None else 1.0
        rate, layers = self.config.learning_rate, last_layer(self.unwrapped())
        set_layer_decay(self.optimizer, learning_rate=rate, layers=layers, decay=decay)
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As for every UMIT trainer; what is frozen follows from the epoch."""
        super().load_checkpoint(filename_or_checkpoint)
        self._freeze(self.current_epoch)


def confusion(logits: torch.Tensor, target: torch.Tensor, labels: Any) -> dict[str, np.ndarray]:
    """True positives, false positives and false negatives of every foreground class or region, over the batch.

    Args:
        logits: (B, K, *size).
        target: (B, 1, *size) labels, or (B, regions, *size) with the ignore mask as last channel if there is one.
        labels: nnU-Net's label manager.

    Returns:
        ``tp_hard``, ``fp_hard``, ``fn_hard``, each (classes without background,) or (regions,).
    """
    counted: torch.Tensor | None = None
    if labels.has_regions:
        predicted = torch.sigmoid(logits.float()) > 0.5
        if labels.has_ignore_label:
            counted, target = ~target[:, -1:].bool(), target[:, :-1]
        true = target.bool()
    else:
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.dim() - 2))
        predicted = logits.argmax(1, keepdim=True) == classes
        true = target == classes
        if labels.has_ignore_label:
            counted = target != labels.ignore_label
    if counted is not None:
        predicted, true = predicted & counted, true & counted
    axes = [0, *range(2, logits.dim())]
    pairs = {"tp_hard": predicted & true, "fp_hard": predicted & ~true, "fn_hard": ~predicted & true}
    return {name: hits.sum(axes).cpu().numpy().astype(np.float64) for name, hits in pairs.items()}
