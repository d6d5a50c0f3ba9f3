"""``UMITPretrainTrainer``: masked-autoencoder pre-training on nnU-Net's preprocessed images. No label is ever read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_umit.architectures.interpolation import interpolation_loss
from nnunet_umit.architectures.mae import MAEOutput, MaskedAutoencoder
from nnunet_umit.architectures.masking import TooFewTokensError
from nnunet_umit.architectures.transfer import save_encoder
from nnunet_umit.config import PretrainConfig, get_umit_config
from nnunet_umit.trainers.base import finite_mean
from nnunet_umit.trainers.pictures import Panel
from nnunet_umit.trainers.selfsupervised import SelfSupervisedTrainer
from nnunet_umit.trainers.summary import describe_encoder, summarise


class EncoderTrainer(SelfSupervisedTrainer):
    """Not for ``-tr``. Pre-training that hides tokens and ends with an encoder."""

    section = "pretrain"
    card_method: str  # for the card of the encoder

    @property
    def config(self) -> PretrainConfig:
        """The ``pretrain`` section of the plan's umit block."""
        return self.umit.pretrain

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Masked loss; the masks depend on the seed, the number of the step and the position in the batch only.

        Ranks whose images have more tokens count for more, so the gradient is that of one process with all images.

        Raises:
            TooFewTokensError: the images of the batch have one token each; it names them.
        """
        try:
            output = self.network(self.to_device(batch["data"]), self._generators("mask", batch, self.iteration()))
        except TooFewTokensError as error:
            cases = ", ".join(dict.fromkeys(map(str, batch["keys"])))
            raise TooFewTokensError(f"{error}, or leave such images out: {cases}") from error
        self.group_losses.add(batch["groups"], output.losses.tolist())
        return output.loss * self.share(output.hidden.numel())

    def evaluate(self, images: torch.Tensor, generators: Any) -> Any:
        """A masked forward pass."""
        return self.unwrapped()(images, generators)

    def picture_title(self) -> str:
        """With epoch, hidden share and score."""
        title, explained = super().picture_title(), self.history.get(self.score_name)
        if explained:
            title += (
                f": epoch {len(explained)}, {100 * self.config.mask_ratio:.0f} % hidden, "
                f"{round(100 * explained[-1])} % of the {self.score_name.removesuffix('_explained')} explained"
            )
        return title

    def settings(self) -> dict[str, Any]:
        """The share of hidden tokens."""
        return {"mask_ratio": self.config.mask_ratio}

    def finish(self, mean: dict[str, float], pooled: dict[str, float], cases: int) -> None:
        """``encoder.safetensors`` and ``card.json``."""
        if self.disable_checkpointing:
            self.print_to_log_file("No encoder.safetensors written, checkpointing is disabled")
        else:
            card = describe_encoder(self, mean, cases)
            save_encoder(cast(Any, self.unwrapped()).encoder, self.output_folder, card)


class UMITPretrainTrainer(EncoderTrainer):
    """Masked autoencoder (SelfMedMAE, arXiv 2203.05573) under nnU-Net's commands."""

    method = "masked autoencoder"
    card_method = "masked autoencoder (arXiv 2203.05573) on a spacing-adaptive transformer (arXiv 2312.07630)"
    loss_name, score_name = "masked_loss", "variance_explained"

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """The encoder of the plan's segmentation network, with the narrow decoder of the ``pretrain`` section."""
        return MaskedAutoencoder.from_arch_kwargs(
            num_input_channels,
            configuration_manager.network_arch_init_kwargs,
            get_umit_config(configuration_manager).pretrain,
        )

    def autoencoder(self) -> MaskedAutoencoder:
        """The network without wrappers."""
        return cast(MaskedAutoencoder, self.unwrapped())

    def figures(self, output: MAEOutput) -> dict[str, Any]:
        """Masked loss and target power."""
        return {"loss": float(output.loss), "power": float(output.target_power)}

    def final_figures(self, output: MAEOutput) -> dict[str, Any]:
        """Also the loss of interpolating the visible voxels, under the same masks."""
        return {**self.figures(output), "interpolation": interpolation_loss(output)}

    def summarise(self, outputs: list[dict[str, Any]]) -> dict[str, float]:
        """Masked loss and variance explained; the loss of interpolation where it is known."""
        loss, explained = summarise(outputs)
        found = {"masked_loss": loss, "variance_explained": explained}
        if all("interpolation" in output for output in outputs):
            found["interpolation_loss"] = finite_mean([output["interpolation"] for output in outputs])
        return found

    def describe_epoch(self) -> list[str]:
        """Masked loss and variance explained; the loss of every dataset and level where there are several."""
        return [
            *self.describe_groups("masked loss"),
            f"masked loss, training: {self.logged('train_losses')[-1]:.4f}",
            f"masked loss, validation: {self.logged('val_losses')[-1]:.4f}",
            f"variance explained, validation: {100 * self.history['variance_explained'][-1]:.1f} %",
        ]

    def panels(self) -> list[Panel]:
        """Masked loss, variance explained, learning rate, time."""
        losses = {"training": self.logged("train_losses"), "validation": self.logged("val_losses")}
        explained = [100 * value for value in self.history["variance_explained"]]
        return [
            Panel("masked loss (1: nothing learned)", losses, level=1.0),
            Panel("variance explained [%]", {"validation": explained}, level=0.0),
            *self.time_and_rate_panels(),
        ]

    def picture(
        self, image: torch.Tensor, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], Sequence[float]]:
        """Input, masked input, reconstruction."""
        masked, filled, output = self.autoencoder().reconstruct(image, generator)
        columns = {"input": output.image, "masked input": masked, "reconstruction": filled}
        return columns, output.spacings[0]

    def finish(self, mean: dict[str, float], pooled: dict[str, float], cases: int) -> None:
        """``encoder.safetensors``, ``card.json``, and a sentence."""
        super().finish(mean, pooled, cases)
        self.print_to_log_file(
            f"Mean masked loss: {mean['masked_loss']:.4f} (interpolation of the visible voxels: "
            f"{mean['interpolation_loss']:.4f}), variance explained: {100 * mean['variance_explained']:.1f} %"
        )
