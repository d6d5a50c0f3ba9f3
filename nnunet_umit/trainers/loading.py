"""From preprocessed cases to streams of batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_umit.trainers.batches import (
    PREFETCH,
    BatchStream,
    IndexedBatches,
    IndexSequence,
    workers_for_shared_memory,
)
from nnunet_umit.trainers.resume import ResumableTrainer


class LoadingTrainer(ResumableTrainer):
    """nnU-Net's split and loader, behind streams that give the same batches after a restart."""

    seed: int  # of the plan

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

    def training_transforms(self, rotation: Any, mirror_axes: Any, dummy_2d: bool, scales: Any) -> Any:
        """Transforms of one training sample."""
        raise NotImplementedError

    def validation_transforms(self, scales: Any) -> Any:
        """Transforms of one validation sample."""
        raise NotImplementedError

    def loader_labels(self) -> Any:
        """What the loader asks about labels."""
        return self.label_manager

    def get_dataloaders(self) -> tuple[BatchStream, BatchStream]:
        """Streams of training batches, from the present epoch on, and of the same validation batches every epoch."""
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, larger_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        training, validation = self.get_tr_and_val_datasets()
        first, last = (epoch * self.num_iterations_per_epoch for epoch in (self.current_epoch, self.num_epochs))
        workers = self._workers()
        train_transforms = self.training_transforms(rotation, mirror_axes, dummy_2d, scales)
        return (
            self._stream("train", training, larger_patch, train_transforms, IndexSequence(first, last), workers),
            self._stream(
                "validation",
                validation,
                patch_size,
                self.validation_transforms(scales),
                IndexSequence(period=self.num_val_iterations_per_epoch),
                min(workers, max(1, workers // 2)),
            ),
        )

    def _workers(self) -> int:
        wanted = get_allowed_n_proc_DA()
        batch_bytes = (
            self.batch_size * math.prod(self.configuration_manager.patch_size) * (4 * self.num_input_channels + 4)
        )
        fitting = workers_for_shared_memory(wanted, batch_bytes=batch_bytes, prefetch=2 * PREFETCH)
        if fitting < wanted:
            self.print_to_log_file(
                f"shared memory (/dev/shm) has room for {fitting} instead of {wanted} data-loading processes; start "
                "containers with more, for example docker run --shm-size=8g"
            )
        return fitting

    def _stream(
        self, name: str, dataset: Any, larger_patch: Any, transforms: Any, indices: IndexSequence, workers: int
    ) -> BatchStream:
        loader = nnUNetDataLoader(
            dataset,
            self.batch_size,
            larger_patch,
            self.configuration_manager.patch_size,
            self.loader_labels(),
            oversample_foreground_percent=self.oversample_foreground_percent,
            transforms=transforms,
        )
        batches = IndexedBatches(loader, seed=self.seed, stream=name, rank=self.local_rank)
        return BatchStream(batches, indices, workers=workers, pin_memory=self.device.type == "cuda")
