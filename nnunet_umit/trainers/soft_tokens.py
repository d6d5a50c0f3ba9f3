"""``UMITSoftTokenPretrainTrainer``: masked modelling of a frozen tokenizer's soft tokens. No label is ever read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_umit.architectures.mim import SoftTokenModel, SoftTokenOutput
from nnunet_umit.architectures.quantiser import negative_entropy
from nnunet_umit.config import get_umit_config
from nnunet_umit.trainers.pictures import Panel
from nnunet_umit.trainers.pretrain import EncoderTrainer
from nnunet_umit.trainers.summary import pooled_usage

MEASURES = ("cross-entropy", "target entropy", "accuracy")


class UMITSoftTokenPretrainTrainer(EncoderTrainer):
    """Masked soft-token modelling (PUMIT, arXiv 2312.07630) under nnU-Net's commands.

    The tokenizer comes through ``-pretrained_weights TOKENIZER/checkpoint_final.pth``, or through
    ``umit.pretrain.tokenizer`` in the plans (then ``-pretrained_weights`` may bring an encoder to go on from). It is
    stored in the checkpoints, so ``--c`` needs nothing else.
    """

    method = "masked soft tokens"
    card_method = "masked soft-token modelling on a spacing-adaptive transformer (arXiv 2312.07630)"
    loss_name, score_name = "cross_entropy", "information_explained"
    restoring = False  # from a checkpoint, which holds the tokenizer

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """The encoder of the plan's segmentation network, a head, and the tokenizer of the ``tokenizer`` section."""
        umit = get_umit_config(configuration_manager)
        return SoftTokenModel.from_plan(
            num_input_channels,
            configuration_manager.network_arch_init_kwargs,
            umit.pretrain,
            umit.tokenizer,
            configuration_manager.normalization_schemes,
        )

    def model(self) -> SoftTokenModel:
        """The network without wrappers."""
        return cast(SoftTokenModel, self.unwrapped())

    def initialize(self) -> None:
        """As for every training without labels, with the tokenizer that the plans name."""
        super().initialize()
        if self.config.tokenizer is not None and not (self.continue_requested or self.restoring):
            self.model().take_tokenizer(self.config.tokenizer)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As for every UMIT trainer; the file that the plans name may be gone."""
        self.restoring = True
        super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        """Refuse to begin without a tokenizer.

        Raises:
            RuntimeError: there is none; the message says how to give one.
        """
        if not self.was_initialized:
            self.initialize()
        if self.config.tokenizer is not None and not bool(self.model().ready):  # --c, and nothing to continue
            self.model().take_tokenizer(self.config.tokenizer)
        if not bool(self.model().ready):
            raise RuntimeError(
                "there is no tokenizer to predict the tokens of; train one with -tr UMITTokenizerTrainer and give its "
                "checkpoint_final.pth as -pretrained_weights, or its path as umit.pretrain.tokenizer in the plans"
            )
        super().on_train_start()

    def figures(self, output: SoftTokenOutput) -> dict[str, Any]:
        """Cross-entropy, its least value, how often the most probable code is right; and how often each code occurs."""
        target = output.target.flatten(0, 1)
        usage = {"usage": target.mean(0).tolist(), "tokens": len(target)}
        return {"loss": output.measures["cross-entropy"], **output.measures, **usage}

    def summarise(self, outputs: list[dict[str, Any]]) -> dict[str, float]:
        """Means over tokens, and the share of what can be known of a token that is: 0 for one who only knows how often
        each code occurs in all these passes, 1 for the tokenizer itself."""
        finite = [output for output in outputs if math.isfinite(output["loss"])]
        tokens = sum(each["tokens"] for each in finite)
        loss, least, accuracy = (
            sum(each[name] * each["tokens"] for each in finite) / tokens if finite else math.nan for name in MEASURES
        )
        marginal = -float(negative_entropy(torch.from_numpy(pooled_usage(finite)))) if finite else math.nan
        explained = (marginal - loss) / (marginal - least) if marginal > least else 0.0 if finite else math.nan
        return {
            "cross_entropy": loss,
            "kl_divergence": loss - least,
            "information_explained": explained,
            "accuracy": accuracy,
        }

    def describe_epoch(self) -> list[str]:
        """Cross-entropy, divergence, information explained, accuracy."""
        last = {name: values[-1] for name, values in self.history.items()}
        return [
            *self.describe_groups("cross-entropy"),
            f"cross-entropy, training: {self.logged('train_losses')[-1]:.4f}",
            f"cross-entropy, validation: {self.logged('val_losses')[-1]:.4f} (KL {last['kl_divergence']:.4f})",
            f"information explained, validation: {100 * last['information_explained']:.1f} %, "
            f"most probable code right: {100 * last['accuracy']:.1f} %",
        ]

    def panels(self) -> list[Panel]:
        """Cross-entropy, information explained, accuracy, learning rate, time."""
        losses = {"training": self.logged("train_losses"), "validation": self.logged("val_losses")}
        shares = {
            "information explained": [100 * value for value in self.history["information_explained"]],
            "most probable code right": [100 * value for value in self.history["accuracy"]],
        }
        return [
            Panel("cross-entropy [nat]", losses),
            Panel("validation [%]", shares, level=0.0),
            *self.time_and_rate_panels(),
        ]

    def picture(
        self, image: torch.Tensor, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], Sequence[float]]:
        """Input, masked input, what the tokenizer keeps of it, and what is decoded from predicted tokens."""
        shown, output = self.model().reconstruct(image, generator)
        names = ("input", "masked input", "tokenizer", "predicted tokens")
        return dict(zip(names, shown, strict=True)), output.view.spacings[0]

    def finish(self, mean: dict[str, float], pooled: dict[str, float], cases: int) -> None:
        """``encoder.safetensors``, ``card.json``, and a sentence."""
        super().finish(mean, pooled, cases)
        self.print_to_log_file(
            f"Mean cross-entropy: {mean['cross_entropy']:.4f} (KL {mean['kl_divergence']:.4f}); information explained "
            f"over all {cases} cases: {100 * pooled['information_explained']:.1f} %"
        )
