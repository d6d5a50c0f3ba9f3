"""From preprocessed cases to streams of batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed

from nnunet_umit.architectures.native import SPACING_CHANNELS
from nnunet_umit.config import TrainingConfig
from nnunet_umit.spacing import Anisotropy
from nnunet_umit.trainers.batches import (
    PREFETCH,
    BatchStream,
    IndexedBatches,
    IndexSequence,
    Samples,
    workers_for_shared_memory,
)
from nnunet_umit.trainers.native import (
    ZOOM_PROBABILITY,
    TransformAugmentation,
    native_shapes,
    prepare,
    read_table,
    rotation_for,
)
from nnunet_umit.trainers.patches import CaseTable, Jitter, NativeSamples, PatchSamples
from nnunet_umit.trainers.ranks import ranks_here
from nnunet_umit.trainers.resume import ResumableTrainer


class LoadingTrainer(ResumableTrainer):
    """nnU-Net's split and loader, behind streams that give the same batches after a restart."""

    seed: int  # of the plan

    @property
    def config(self) -> TrainingConfig:
        """The section of the plan's umit block that this trainer obeys."""
        return getattr(self.umit, self.section)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, with a clear error where five folds cannot be made.

        Raises:
            ValueError: an integer fold of fewer than five cases.
        """
        splits = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold != "all" and not splits.is_file():
            cases = len(self.dataset_class.get_identifiers(self.preprocessed_dataset_folder))
            if cases < 5:
                raise ValueError(
                    f"{cases} cases cannot be split into 5 folds; train fold 'all' or write your own folds to {splits}"
                )
        return super().do_split()

    def mirrored_axes(self) -> tuple[int, ...] | None:
        """Axes of the patch that the plan lets be mirrored; None for none (nnU-Net fails on an empty tuple).

        Raises:
            ValueError: an axis that the patch does not have.
        """
        axes, dimensions = self.config.mirror_axes, len(self.configuration_manager.patch_size)
        if axes is None:
            return tuple(range(dimensions))
        if any(axis >= dimensions for axis in axes):
            raise ValueError(
                f"umit.{self.section}.mirror_axes is {list(axes)} but the patch has axes 0 to {dimensions - 1}"
            )
        return axes or None

    def training_transforms(self, patch: Any, rotation: Any, mirror_axes: Any, dummy_2d: bool, scales: Any) -> Any:
        """Transforms of one training sample of ``patch`` voxels."""
        raise NotImplementedError

    def validation_transforms(self, scales: Any) -> Any:
        """Transforms of one validation sample."""
        raise NotImplementedError

    def loader_labels(self) -> Any:
        """What the loader asks about labels."""
        return self.label_manager

    @property
    def native(self) -> bool:
        """Whether images keep their own grid and bring their spacing along (``3d_native``)."""
        return bool(self.configuration_manager.network_arch_init_kwargs.get("native", False))

    def batches_in_all(self) -> int:
        """Training batches of all epochs, after which the stream of them ends."""
        return self.num_epochs * self.num_iterations_per_epoch

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Streams of training batches, from the present epoch on, and of the same validation batches every epoch."""
        if self.is_ddp:  # one rank writes splits_final.json where there is none, before the others read it
            if self.local_rank == 0:
                self.do_split()
            distributed.barrier()
        training, validation = self.get_tr_and_val_datasets()
        first, last = self.current_epoch * self.num_iterations_per_epoch, self.batches_in_all()
        workers = self._workers()
        samples = self._native_samples if self.native else self._samples
        return (
            self._stream("train", samples(training, True), IndexSequence(first, last), workers),
            self._stream(
                "validation",
                samples(validation, False),
                IndexSequence(period=self.num_val_iterations_per_epoch),
                min(workers, max(1, workers // 2)),
            ),
        )

    def _workers(self) -> int:
        wanted = get_allowed_n_proc_DA()
        channels = self.num_input_channels + (SPACING_CHANNELS if self.native else 0)
        batch_bytes = self.batch_size * math.prod(self.configuration_manager.patch_size) * (4 * channels + 4)
        fitting = workers_for_shared_memory(wanted, batch_bytes=batch_bytes, prefetch=2 * PREFETCH, ranks=ranks_here())
        if fitting < wanted:
            self.print_to_log_file(
                f"shared memory (/dev/shm) has room for {fitting} instead of {wanted} data-loading processes; start "
                "containers with more, for example docker run --shm-size=8g"
            )
        return fitting

    def _samples(self, dataset: Any, training: bool) -> PatchSamples:
        """Patches of resampled cases."""
        patch = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, larger_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if training:
            transforms = self.training_transforms(patch, rotation, mirror_axes, dummy_2d, scales)
        else:
            larger_patch, transforms = patch, self.validation_transforms(scales)
        loader = nnUNetDataLoader(
            dataset,
            self.configuration_manager.batch_size,
            larger_patch,
            patch,
            self.loader_labels(),
            oversample_foreground_percent=self.config.oversample_foreground,
            transforms=transforms,
        )
        return PatchSamples(loader)

    def _native_samples(self, dataset: Any, training: bool) -> NativeSamples:
        """Patches of cases on their own grid, each batch of one anisotropy level."""
        manager = self.configuration_manager
        patch = tuple(manager.patch_size)
        planned = Anisotropy.from_spacing(manager.network_arch_init_kwargs["spacing"])
        chosen, _, _, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        prepared = {}
        for shape in native_shapes(patch, planned, training and self.config.thicken > 0):
            if training:
                rotation, in_plane, read = (None, False, shape) if chosen is None else rotation_for(shape)
                transforms = self.training_transforms(shape, rotation, None, in_plane, None)
            else:
                read, transforms = shape, self.validation_transforms(None)
            prepared[shape] = prepare(read, transforms)
        jitter = Jitter()
        if training:
            zoom = 0.0 if chosen is None else ZOOM_PROBABILITY
            jitter = Jitter(thicken=self.config.thicken, thickest=self.config.thickest, zoom=zoom)
        return NativeSamples(
            dataset,
            self.case_table(dataset),
            batch_size=manager.batch_size,
            patch=patch,
            planned=planned,
            labels=self.loader_labels(),
            oversample_foreground=self.config.oversample_foreground,
            jitter=jitter,
            mirror_axes=(mirror_axes or ()) if training else (),
            augmentation=TransformAugmentation(prepared),
        )

    def case_table(self, dataset: Any) -> CaseTable:
        """Spacing and weight of every case of a native dataset."""
        return read_table(dataset)

    def _stream(self, name: str, samples: Samples, indices: IndexSequence, workers: int) -> BatchStream:
        ranks = distributed.get_world_size() if self.is_ddp else 1
        batches = IndexedBatches(samples, seed=self.seed, stream=name, rank=self.local_rank, ranks=ranks)
        return BatchStream(batches, indices, workers=workers, pin_memory=self.device.type == "cuda")
