"""``UMITTokenizerTrainer``: a visual tokenizer with soft tokens, on nnU-Net's preprocessed images, without labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_umit.architectures.image_losses import structural_dissimilarity
from nnunet_umit.architectures.quantiser import perplexity
from nnunet_umit.architectures.tokenizer_training import TokenizerOutput, TokenizerTraining, as_volume
from nnunet_umit.config import TokenizerConfig, get_umit_config
from nnunet_umit.trainers.base import finite_mean
from nnunet_umit.trainers.guard import NonFiniteGuard, agreed
from nnunet_umit.trainers.optimisation import is_vector
from nnunet_umit.trainers.pictures import TOKENS, Panel, draw_usage
from nnunet_umit.trainers.selfsupervised import SelfSupervisedTrainer
from nnunet_umit.trainers.summary import pooled_usage

HOTTEST, COLDEST = 0.9, 1e-6  # PUMIT's Gumbel temperatures, from the first step to the last


class UMITTokenizerTrainer(SelfSupervisedTrainer):
    """Encoder, soft quantiser and decoder (PUMIT, arXiv 2312.07630) under nnU-Net's commands."""

    section = "tokenizer"
    method = "soft tokenizer"
    loss_name, score_name = "reconstruction_loss", "variance_explained"

    @property
    def config(self) -> TokenizerConfig:
        """The ``tokenizer`` section of the plan's umit block."""
        return self.umit.tokenizer

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """A tokenizer on the token grid of the plan's segmentation network."""
        return TokenizerTraining.from_plan(
            num_input_channels,
            configuration_manager.network_arch_init_kwargs,
            get_umit_config(configuration_manager).tokenizer,
        )

    def initialize(self) -> None:
        """As for every training without labels.

        Raises:
            NotImplementedError: a discriminator in a distributed training.
        """
        if self.is_ddp and self.config.discriminator:
            raise NotImplementedError(
                "umit.tokenizer.discriminator works in one process only; set it to 0 or train without torchrun"
            )
        super().initialize()

    def optimised_groups(self) -> list[dict[str, Any]]:
        """Matrices and vectors of the tokenizer; the discriminator learns at a rate of its own."""
        config, network = self.config, cast(TokenizerTraining, self.unwrapped())
        parts: list[tuple[nn.Module, float]] = [(network.tokenizer, config.learning_rate)]
        if network.discriminator is not None:
            parts.append((network.discriminator, config.discriminator_learning_rate))
        groups = []
        for part, rate in parts:
            kinds: dict[bool, list[nn.Parameter]] = {False: [], True: []}  # two groups, also where both decays are 0
            for name, parameter in part.named_parameters():
                plain = is_vector(parameter) or name.endswith("codebook")  # decay would only shrink what they mean
                kinds[plain].append(parameter)
            groups += [
                {"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": 0.0 if plain else config.weight_decay}
                for plain, chosen in kinds.items()
            ]
        return groups

    # ------------------------------------------------------------------------------------------------ steps

    @functools.cached_property
    def second_guard(self) -> NonFiniteGuard:
        """Of the discriminator: good steps of the one network do not excuse bad ones of the other."""
        return NonFiniteGuard(self.config.max_nonfinite, self.print_to_log_file, self.name_last_good)

    def temperature(self) -> float:
        """Of the Gumbel noise: a cosine from 0.9 to nearly 0 over the training."""
        done = min((self.current_epoch + self.step_in_epoch / self.num_iterations_per_epoch) / self.num_epochs, 1.0)
        return COLDEST + (HOTTEST - COLDEST) * 0.5 * (1 + math.cos(math.pi * done))

    def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Reconstruction and regularisation; what is pooled over ranks already is not weighted by them again."""
        output: TokenizerOutput = self.network(self.to_device(batch["data"]), self.temperature())
        self.group_losses.add(batch["groups"], output.losses.tolist())
        self._output = output
        return output.local * self.share(output.view.grid.tokens * output.losses.shape[0]) + output.pooled

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One step of the tokenizer; then, where there is a discriminator, one of that."""
        result = super().train_step(batch)
        network, output = cast(TokenizerTraining, self.unwrapped()), self._output
        del self._output
        if network.discriminator is not None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = network.discriminator_loss(output)
            finite = agreed(torch.isfinite(loss.detach()), self.is_ddp) and self._update(loss)
            step = self.iteration() - 1
            self.accept(self.second_guard, finite, batch, step=step, what="loss of the discriminator")
        return result

    def evaluate(self, images: torch.Tensor, generators: Any) -> TokenizerOutput:
        """Reconstruct; there is nothing to draw."""
        output: TokenizerOutput = self.unwrapped()(images)
        return output

    def figures(self, output: TokenizerOutput) -> dict[str, Any]:
        """Errors, PSNR and SSIM against the range of each image, entropy, usage."""
        image, made = (as_volume(each).float() for each in (output.view.image, output.reconstruction))
        extent = image.flatten(1).amax(1) - image.flatten(1).amin(1)
        psnr = 10 * torch.log10(extent.square() / (made - image).square().flatten(1).mean(1))
        varied = extent > 0
        ssim = 1 - 2 * structural_dissimilarity(made, image)
        chosen = output.probabilities.argmax(-1).flatten()
        return {
            "loss": output.measures["reconstruction"],
            "entropy": output.measures["entropy"],
            "squared error": output.measures["squared error"],
            "variance": output.measures["variance"],
            "psnr": psnr[varied].tolist(),
            "ssim": ssim[varied].tolist(),
            "usage": output.usage.tolist(),
            "tokens": chosen.numel(),
            "chosen": torch.bincount(chosen, minlength=output.usage.numel()).tolist(),
        }

    def summarise(self, outputs: list[dict[str, Any]]) -> dict[str, float]:
        """Figures of several passes; the codebook is judged by the tokens of all of them together."""
        finite = [output for output in outputs if math.isfinite(output["loss"])]
        if not finite:
            names = ("reconstruction_loss", "variance_explained", "psnr", "ssim", "entropy", "perplexity", "codes_used")
            return dict.fromkeys(names, math.nan)
        usage = pooled_usage(finite)
        variance = finite_mean([output["variance"] for output in finite])
        error = finite_mean([output["squared error"] for output in finite])
        used = np.sum([output["chosen"] for output in finite], 0) > 0
        return {
            "reconstruction_loss": finite_mean([output["loss"] for output in finite]),
            "variance_explained": 1 - error / variance if variance > 0 else 0.0,
            "psnr": finite_mean([value for output in finite for value in output["psnr"]]),
            "ssim": finite_mean([value for output in finite for value in output["ssim"]]),
            "entropy": finite_mean([output["entropy"] for output in finite]),
            "perplexity": float(perplexity(torch.from_numpy(usage))),
            "codes_used": float(used.sum()),
        }

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log; keep the usage for the picture; warn of a collapse."""
        finite = [output for output in self.gather(val_outputs) if math.isfinite(output["loss"])]
        self._usage = pooled_usage(finite).tolist() if finite else []
        super().on_validation_epoch_end(val_outputs)

    def describe_epoch(self) -> list[str]:
        """Losses, PSNR and SSIM, and what the codebook does; a collapse is warned of."""
        last = {name: values[-1] for name, values in self.history.items()}
        codes, config = self.config.codes, self.config
        lines = [
            *self.describe_groups("reconstruction loss"),
            f"loss, training: {self.logged('train_losses')[-1]:.4f}",
            f"reconstruction loss, validation: {self.logged('val_losses')[-1]:.4f}",
            f"PSNR {last['psnr']:.2f} dB, SSIM {last['ssim']:.3f}",
            f"codebook: {last['codes_used']:.0f} of {codes} codes used, perplexity {last['perplexity']:.1f}, "
            f"mean token entropy {last['entropy']:.3f} nat",
        ]
        bound = config.smallest_perplexity * codes
        if last["perplexity"] < bound:
            lines.append(
                f"WARNING: the codebook collapses: perplexity {last['perplexity']:.1f} is below {bound:.1f} "
                "(umit.tokenizer.smallest_perplexity x codes). Raise umit.tokenizer.diversity (now "
                f"{config.diversity:g}), lower sharpness (now {config.sharpness:g}) or the learning rate, or plan "
                "fewer codes"
            )
        return lines

    def panels(self) -> list[Panel]:
        """Losses, quality, codebook, learning rate, time."""
        losses = {"training, all terms": self.logged("train_losses"), "validation, |error|": self.logged("val_losses")}
        history = self.history
        return [
            Panel("loss", losses),
            Panel("PSNR [dB]", {"validation": history["psnr"]}),
            Panel("codes", {"perplexity": history["perplexity"], "used": history["codes_used"]}, from_zero=True),
            Panel("token entropy [nat]", {"validation": history["entropy"]}, from_zero=True),
            *self.time_and_rate_panels(),
        ]

    # ------------------------------------------------------------------------------------------- at the end

    def picture(
        self, image: torch.Tensor, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], Sequence[float]]:
        """Input, reconstruction, and the most probable code of every token."""
        output = self.evaluate(image, generator)
        view = output.view
        codes = output.probabilities.argmax(-1).float()
        columns = {
            "input": view.image,
            "reconstruction": output.reconstruction,
            TOKENS: view.like_image(view.grid.expand(codes).expand_as(view.padded)),
        }
        return columns, view.spacings[0]

    def picture_title(self) -> str:
        """With epoch, PSNR and perplexity."""
        title, psnr = super().picture_title(), self.history.get("psnr")
        if psnr:
            perplexity = self.history["perplexity"][-1]
            title += f": epoch {len(psnr)}, PSNR {psnr[-1]:.1f} dB, perplexity {perplexity:.0f} of {self.config.codes}"
        return title

    def draw_pictures(self) -> None:
        """``reconstructions.png`` and ``codebook.png``."""
        super().draw_pictures()
        if getattr(self, "_usage", None):
            title = f"{self.plans_manager.dataset_name}, {self.configuration_name}: use of {self.config.codes} codes"
            draw_usage(self._usage, Path(self.output_folder) / "codebook.png", title)

    def settings(self) -> dict[str, Any]:
        """Size and kind of the codebook."""
        return {"codes": self.config.codes, "quantiser": self.config.quantiser}

    def finish(self, mean: dict[str, float], pooled: dict[str, float], cases: int) -> None:
        """Say how good it is."""
        self.print_to_log_file(
            f"PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.3f}; over all {cases} cases: perplexity "
            f"{pooled['perplexity']:.1f} of {self.config.codes}, {pooled['codes_used']:.0f} codes used, mean token "
            f"entropy {pooled['entropy']:.3f} nat"
        )
