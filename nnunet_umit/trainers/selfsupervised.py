"""What trainings without labels share: images of a dataset or a corpus, light augmentation, pictures, a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from torch import distributed, nn

from nnunet_umit.architectures.native import SPACING_CHANNELS, thick_axis
from nnunet_umit.config import PretrainConfig, TokenizerConfig
from nnunet_umit.plans.corpus import Corpus
from nnunet_umit.plans.native import crop_shape
from nnunet_umit.spacing import Anisotropy
from nnunet_umit.trainers.base import UMITBaseTrainer, compile_requested, finite_mean
from nnunet_umit.trainers.batches import derive_seed
from nnunet_umit.trainers.corpus import CorpusDataset, corpus_table
from nnunet_umit.trainers.patches import CaseTable, read_crop
from nnunet_umit.trainers.pictures import Reconstruction, draw_reconstructions
from nnunet_umit.trainers.summary import GroupLosses, write_json
from nnunet_umit.trainers.unlabelled import NoLabels, unlabelled

CROPS_PER_CASE = 4  # random crops that the final figures of a case are the mean of
MOST_SCORED = 500  # cases, evenly spaced, that the final figures are the mean of
PICTURED_CASES = 2
SCALE, SHIFT = (0.9, 1.1), 0.1  # light intensity augmentation, in units of the normalised image


class SelfSupervisedTrainer(UMITBaseTrainer):
    """Not for ``-tr``. No label is ever read.

    Fold ``all`` learns from every case, an integer fold from its training cases only. Crops have the plan's patch size:
    without rotation there is no reason to load more. Validation uses the same crops and masks in every epoch.
    """

    method: ClassVar[str]  # for the summary
    loss_name: ClassVar[str]  # of the figures that `summarise` gives: what is minimised,
    score_name: ClassVar[str]  # and what makes an epoch the best, from 0 (nothing learned) to 1

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which must be kept
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.oversample_foreground_percent:
            raise ValueError(
                f"umit.{self.section}.oversample_foreground is {self.oversample_foreground_percent}, but pre-training "
                "reads no label and cannot know where the foreground is; set it to 0 in the plans"
            )
        self.enable_deep_supervision = False
        self.history = {"group_losses": []}
        self.group_losses = GroupLosses()
        self.corpus = Corpus.read(self.preprocessed_dataset_folder)
        if self.corpus is not None and fold != "all":
            raise ValueError(f"fold {fold} of a corpus: the images of a case would fall apart; train fold 'all'")

    @property
    def config(self) -> PretrainConfig | TokenizerConfig:
        """The section of the plan's umit block that this trainer obeys."""
        section: PretrainConfig | TokenizerConfig = getattr(self.umit, self.section)
        return section

    # ----------------------------------------------------------------------------------------------- set-up

    def initialize(self) -> None:
        """As for every UMIT trainer, with a dataset class that opens no label, or that stands for a whole corpus."""
        folder = self.preprocessed_dataset_folder
        if self.corpus is not None:  # nnU-Net looks what kind of files there are; the corpus itself holds none
            self.preprocessed_dataset_folder = str(self.corpus.folder(0))
        super().initialize()
        self.preprocessed_dataset_folder = folder
        self.dataset_class = unlabelled(self.dataset_class) if self.corpus is None else CorpusDataset

    def case_table(self, dataset: Any) -> CaseTable:
        """Spacing and weight of every case."""
        return super().case_table(dataset) if self.corpus is None else corpus_table(self.corpus)

    def _do_i_compile(self) -> bool:
        """Only on request (``nnUNet_compile=t``): compiling takes longer than it saves in short pre-trainings."""
        return compile_requested() and super()._do_i_compile()

    def _build_loss(self) -> nn.Module:
        """The network computes its own loss."""
        return nn.Identity()

    def _get_deep_supervision_scales(self) -> None:
        return None

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch."""

    def loader_labels(self) -> NoLabels:
        """No label is known, so that none can steer where patches are cut."""
        return NoLabels()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[None, bool, Any, Any]:
        """No rotation, and so no larger patch to rotate in; the plan's axes are mirrored."""
        axes = self.inference_allowed_mirroring_axes = self.mirrored_axes()
        return None, False, self.configuration_manager.patch_size, axes

    def training_transforms(
        self, patch: Any, rotation: Any, mirror_axes: Any, dummy_2d: bool, scales: Any
    ) -> ComposeTransforms:
        """A small change of scale and offset per channel, and mirroring (p 0.5 for each axis)."""
        return ComposeTransforms(
            [
                MultiplicativeBrightnessTransform(SCALE, synchronize_channels=False),
                BrightnessAdditiveTransform(0.0, SHIFT, synchronize_channels=False),
                *([MirrorTransform(mirror_axes)] if mirror_axes else []),
            ]
        )

    def validation_transforms(self, scales: Any) -> None:
        """None."""

    # ------------------------------------------------------------------------------------------------ steps

    def _generator(self, stream: str, *indices: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_for(stream, *indices))

    def _generators(self, stream: str, batch: dict[str, Any], *indices: int) -> list[torch.Generator]:
        """One for each sample of a batch, by its position in the batch of all ranks."""
        seeds = (derive_seed(self.seed, stream, *indices, position) for position in batch["positions"])
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def share(self, tokens: int) -> float:
        """Tokens of this rank over the mean of all ranks; 1 in a single process."""
        if not self.is_ddp:
            return 1.0
        total = torch.tensor(float(tokens), device=self.device)
        distributed.all_reduce(total)
        return tokens * distributed.get_world_size() / float(total)

    def evaluate(self, images: torch.Tensor, generators: Any) -> Any:
        """Forward pass of a batch on the device, under given masks (where there are any), without the wrapper of DDP:
        ranks may have different numbers of cases."""
        raise NotImplementedError

    def figures(self, output: Any) -> dict[str, Any]:
        """What `summarise` needs to know of a pass: plain numbers and lists."""
        raise NotImplementedError

    def final_figures(self, output: Any) -> dict[str, Any]:
        """The same for the validation at the end, where more may be asked."""
        return self.figures(output)

    def summarise(self, outputs: list[dict[str, Any]]) -> dict[str, float]:
        """Named figures of several passes, `loss_name` and `score_name` among them."""
        raise NotImplementedError

    def picture(
        self, image: torch.Tensor, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], Sequence[float]]:
        """Columns of a picture (image first), each (1, C, ...) of one shape, and mm per voxel."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Figures under masks that are the same in every epoch."""
        with self.autocast():
            output = self.evaluate(
                self.to_device(batch["data"]), self._generators("validation mask", batch, batch["index"])
            )
        figures = self.figures(output)
        self.end_validation_step(batch, figures["loss"])
        return figures

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log all figures; nnU-Net's score keys carry ours."""
        self.progress.stop()
        found = self.summarise(self.gather(val_outputs))
        self.logger.log("val_losses", found.pop(self.loss_name), self.current_epoch)
        for name, value in found.items():
            self.history.setdefault(name, []).append(value)
        score = found[self.score_name]
        score = score if math.isfinite(score) else 0.0  # one NaN would stay in the moving average for ever
        self.logger.log("mean_fg_dice", score, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [score], self.current_epoch)
        self.history["group_losses"].append(self.group_losses.means(self.gather))

    def describe_groups(self, what: str) -> list[str]:
        """The loss of every dataset and level where there are several."""
        groups = self.history["group_losses"][-1]
        return [f"{what}, {name}: {loss:.4f} ({count} samples)" for name, (loss, count) in groups.items() if name]

    # ------------------------------------------------------------------------------------------- pictures, end

    def draw(self) -> None:
        """``progress.png`` after every epoch, the other pictures every few."""
        super().draw()
        if (self.current_epoch + 1) % self.config.picture_every == 0 or self.current_epoch + 1 == self.num_epochs:
            self.draw_or_say(self.draw_pictures)

    def picture_title(self) -> str:
        """What stands above ``reconstructions.png``."""
        return f"{self.plans_manager.dataset_name}, {self.configuration_name}"

    @torch.no_grad()
    def draw_pictures(self) -> None:
        """``reconstructions.png``: the centres of a few validation cases, always under the same masks."""
        _, dataset = self.get_tr_and_val_datasets()
        samples = []
        self.network.eval()
        pictured = dataset.identifiers[:: max(len(dataset.identifiers) // PICTURED_CASES, 1)][:PICTURED_CASES]
        for index, case in enumerate(pictured):
            with self.autocast():
                columns, spacing = self.picture(
                    self.to_device(self._crop(dataset, case, None)), self._generator("picture", index)
                )
            shown = {name: tensor[0, 0].float().cpu().numpy() for name, tensor in columns.items()}
            if len(spacing) == 2:
                shown = {name: array.reshape(array.shape[-2:]) for name, array in shown.items()}
            samples.append(Reconstruction(case, shown, spacing))
        draw_reconstructions(samples, Path(self.output_folder) / "reconstructions.png", self.picture_title())

    def _crop(self, dataset: Any, case: str, random: np.random.RandomState | None) -> torch.Tensor:
        """A patch (1, C, *patch) from the centre of a case, or from a random place within it."""
        data, _, _, _ = dataset.load_case(case)
        patch = self._patch(data)
        flat = len(patch) == 2
        patch = [1, *patch] if flat else patch
        lower = []
        for size, wanted in zip(data.shape[1:], patch, strict=True):
            slack = size - wanted
            lower.append(slack // 2 if random is None or slack <= 0 else int(random.randint(0, slack + 1)))
        image = read_crop(data, slice(None), lower, patch, 0).float()[None]
        return image[:, :, 0] if flat else image

    def _patch(self, data: Any) -> list[int]:
        """Voxels to cut from a case, in its own axis order."""
        patch = [int(size) for size in self.configuration_manager.patch_size]
        if not self.native:
            return patch
        spacing = [float(value) for value in np.asarray(data[-SPACING_CHANNELS:, 0, 0, 0])]
        planned = Anisotropy.from_spacing(self.configuration_manager.network_arch_init_kwargs["spacing"])
        depth, *patch = crop_shape(patch, planned, spacing)
        patch.insert(thick_axis(spacing), depth)
        return patch

    @torch.no_grad()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Figures of every validation case, ``validation/summary.json``, the pictures, and what others can use."""
        if not self.was_initialized:
            self.initialize()
        self.network.eval()
        _, dataset = self.get_tr_and_val_datasets()
        ranks = distributed.get_world_size() if self.is_ddp else 1
        scored = dataset.identifiers[:: -(-len(dataset.identifiers) // MOST_SCORED)]
        rows = [(case, self._score(dataset, case)) for case in scored[self.local_rank :: ranks]]
        rows = sorted(self.gather(rows), key=lambda row: row[0])
        if self.local_rank == 0:
            self._finish(rows)
        if self.is_ddp:
            distributed.barrier()

    def _score(self, dataset: Any, case: str) -> list[dict[str, Any]]:
        """Figures of one case, from crops and masks that its name determines."""
        seed = derive_seed(self.seed, f"case {case}")
        random = np.random.RandomState(seed % 2**32)
        images = torch.cat([self._crop(dataset, case, random) for _ in range(CROPS_PER_CASE)])
        masks = [torch.Generator().manual_seed(derive_seed(seed, "mask", crop)) for crop in range(CROPS_PER_CASE)]
        together = math.gcd(CROPS_PER_CASE, self.batch_size)  # as many in every pass: all crops count alike
        outputs = []
        for first in range(0, CROPS_PER_CASE, together):
            chunk = self.to_device(images[first : first + together])
            with self.autocast():
                output = self.evaluate(chunk, masks[first : first + together])
            outputs.append(self.final_figures(output))
        return outputs

    def settings(self) -> dict[str, Any]:
        """What the figures in the summary depend on."""
        return {}

    def _finish(self, rows: list[tuple[str, list[dict[str, Any]]]]) -> None:
        figures = [self.summarise(outputs) for _, outputs in rows]
        mean = {name: finite_mean([each[name] for each in figures]) for name in figures[0]}
        pooled = self.summarise([output for _, outputs in rows for output in outputs])
        folder = Path(self.output_folder)
        (folder / "validation").mkdir(exist_ok=True)
        summary = {
            "method": self.method,
            **self.settings(),
            "crops_per_case": CROPS_PER_CASE,
            "seed": self.seed,
            "mean": mean,
            "pooled": pooled,
            "metric_per_case": [{"case": case, **each} for (case, _), each in zip(rows, figures, strict=True)],
        }
        write_json(folder / "validation" / "summary.json", summary)
        self.draw_or_say(self.draw_pictures)
        self.finish(mean, pooled, len(figures))
        self.print_to_log_file("Validation complete", also_print_to_console=True)

    def finish(self, mean: dict[str, float], pooled: dict[str, float], cases: int) -> None:
        """Write what others can use, and say how good it is."""
        raise NotImplementedError
