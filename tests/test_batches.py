"""Batches are a function of (seed, stream, index): whatever the workers, the history, and the restarts."""

import multiprocessing
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_training
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_umit.trainers import batches as module
from nnunet_umit.trainers.batches import (
    BatchStream,
    IndexedBatches,
    IndexSequence,
    derive_seed,
    random_state,
    workers_for_shared_memory,
)
from nnunet_umit.trainers.patches import PatchSamples
from nnunet_umit.trainers.unlabelled import NoLabels, UnlabelledBlosc2, UnlabelledNumpy, unlabelled

PATCH = (16, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_preprocessed(tmp_path_factory.mktemp("pre"), tiny_training.make_plans(), cases=3)


class Jitter:
    """A transform that draws from all three generators, as augmentations do."""

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "image": image + random.random() + np.random.random() + torch.randn(image.shape),
            "segmentation": segmentation,
        }


def make(folder: Path, dataset_class: type = nnUNetDatasetBlosc2, seed: int = 1, **options: Any) -> IndexedBatches:
    labels = SimpleNamespace(all_labels=[1, 2], has_ignore_label=False)
    loader = nnUNetDataLoader(
        dataset_class(str(folder)), 2, PATCH, PATCH, options.pop("labels", labels), 0.5, transforms=Jitter()
    )
    return IndexedBatches(PatchSamples(loader), seed=seed, stream=options.pop("stream", "train"), **options)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    equal = torch.equal(one["data"], other["data"]) and torch.equal(one["target"], other["target"])
    return equal and one["keys"] == other["keys"] and one["index"] == other["index"]


def take(stream: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [next(stream) for _ in range(count)]


def test_seeds_depend_on_every_argument() -> None:
    seeds = {
        derive_seed(seed, stream, *indices)
        for seed in (0, 1)
        for stream in ("train", "validation")
        for indices in ((), (0,), (1,), (0, 1), (1, 0))
    }
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(5, "train", 7) == derive_seed(5, "train", 7)


def test_generators_and_threads_are_put_back() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), random_state(3):
        random.random(), np.random.random(), torch.rand(1)
        assert torch.get_num_threads() == 1
        raise KeyError
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert torch.get_num_threads() == threads


def test_a_batch_depends_on_its_index_only(folder: Path) -> None:
    batches = make(folder)
    first = batches[5]
    batches[6], batches[0]
    np.random.random(), torch.rand(1)
    assert same(first, batches[5])
    assert same(first, make(folder)[5])
    assert not same(first, batches[6])
    assert not torch.equal(first["data"], make(folder, seed=2)[5]["data"])
    assert not torch.equal(first["data"], make(folder, stream="validation")[5]["data"])


def test_ranks_share_out_a_batch(folder: Path) -> None:
    """pumit 29: together they hold what one process would hold, and nothing twice."""
    whole = make(folder)[5]
    shares = [make(folder, rank=rank, ranks=2)[5] for rank in range(2)]
    assert [share["positions"] for share in shares] == [[0], [1]]
    assert torch.equal(torch.cat([share["data"] for share in shares]), whole["data"])
    assert [key for share in shares for key in share["keys"]] == whole["keys"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder: Path, workers: int) -> None:
    alone = BatchStream(make(folder), IndexSequence(2, 8))
    many = BatchStream(make(folder), IndexSequence(2, 8), workers=workers)
    assert all(same(one, other) for one, other in zip(take(alone, 6), take(many, 6), strict=True))
    for stream in (alone, many):
        with pytest.raises(StopIteration):
            next(stream)


def test_spawned_workers_get_the_same_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS, Windows and Python >= 3.14 start workers without fork: everything must be picklable."""
    expected = take(BatchStream(make(folder), IndexSequence(0, 2)), 2)
    make_loader = module.DataLoader

    def spawning(*arguments: Any, **options: Any) -> Any:
        return make_loader(*arguments, **options, multiprocessing_context=multiprocessing.get_context("spawn"))

    monkeypatch.setattr(module, "DataLoader", spawning)
    stream = BatchStream(make(folder), IndexSequence(0, 2), workers=1)
    found = take(stream, 2)
    stream.close()
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))


def test_batches_are_picklable(folder: Path) -> None:
    batches = make(folder)
    assert same(pickle.loads(pickle.dumps(batches))[4], batches[4])


def test_a_resumed_stream_continues_the_unbroken_one(folder: Path) -> None:
    unbroken = take(BatchStream(make(folder), IndexSequence(0, 6), workers=1), 6)
    resumed = take(BatchStream(make(folder), IndexSequence(3, 6)), 3)
    assert all(same(one, other) for one, other in zip(unbroken[3:], resumed, strict=True))


def test_validation_repeats_its_indices() -> None:
    sequence = iter(IndexSequence(period=3))
    assert [next(sequence) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert list(IndexSequence(4, 7)) == [4, 5, 6]


def test_the_global_generator_is_untouched_by_a_stream(folder: Path) -> None:
    """Otherwise drop path would depend on when the workers start."""
    before = torch.get_rng_state()
    for workers in (0, 1):
        stream = BatchStream(make(folder), IndexSequence(0, 4), workers=workers)
        next(stream)
        stream.close()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_name_the_cases_and_keep_the_traceback(tmp_path: Path, workers: int) -> None:
    folder = tiny_training.write_preprocessed(tmp_path, tiny_training.make_plans(), cases=1)
    (folder / "case_000.b2nd").write_bytes(b"not an array")
    stream = BatchStream(make(folder), IndexSequence(0, 3), workers=workers)
    with pytest.raises(RuntimeError, match=r"batch 0 of the train data.*case_000") as caught:
        next(stream)
    if workers:
        assert "load_case" in str(caught.value)


class Suicidal:
    """A transform in a process that the system kills."""

    def __call__(self, **sample: torch.Tensor) -> dict[str, torch.Tensor]:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
        return sample


def test_killed_workers_are_explained(folder: Path) -> None:
    batches = make(folder)
    batches.samples.loader.transforms = Suicidal()
    with pytest.raises(RuntimeError, match="nnUNet_n_proc_DA below 1"):
        next(BatchStream(batches, IndexSequence(0, 3), workers=1))


def test_a_death_that_torch_tells_at_another_moment_is_one() -> None:
    told = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert module.loader_died(told) and not module.loader_died(RuntimeError("CUDA error: killed by signal"))


def test_closing_stops_the_workers(folder: Path) -> None:
    stream = BatchStream(make(folder), IndexSequence(0, 100), workers=2)
    next(stream)
    children = multiprocessing.active_children()
    assert len(children) >= 2
    stream.close()
    for child in children:
        child.join(10)
    assert not any(child.is_alive() for child in children)


def test_workers_are_limited_by_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64_000_000))
    assert workers_for_shared_memory(8, batch_bytes=1_000_000, prefetch=3, folder=tmp_path) == 8
    assert workers_for_shared_memory(12, batch_bytes=5_000_000, prefetch=3, folder=tmp_path) == 2
    assert workers_for_shared_memory(12, batch_bytes=100_000_000, prefetch=3, folder=tmp_path) == 0
    assert workers_for_shared_memory(12, batch_bytes=100_000_000, prefetch=3, folder=tmp_path / "missing") == 12


def test_no_label_is_opened(tmp_path: Path) -> None:
    """MAE-9: the same image batches with the segmentations deleted and the class locations gone."""
    folder = tiny_training.write_preprocessed(tmp_path, tiny_training.make_plans(), cases=3)
    before = make(folder, UnlabelledBlosc2, labels=NoLabels())
    before.samples.loader.oversample_foreground_percent = 0.0
    expected = before[3]
    assert not expected["target"].any()
    for file in [*folder.glob("*_seg.b2nd"), *folder.glob("*.pkl")]:
        file.unlink()
    after = make(folder, UnlabelledBlosc2, labels=NoLabels())
    after.samples.loader.oversample_foreground_percent = 0.0
    assert same(expected, after[3])


def test_numpy_folders_are_read_without_their_labels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", data=image)  # no "seg" inside
    data, segmentation, previous, properties = UnlabelledNumpy(str(tmp_path)).load_case("a")
    assert np.array_equal(data, image)
    assert segmentation.shape == (1, 5, 6, 7) and not segmentation.any()
    assert previous is None and properties == {"class_locations": None}


def test_unlabelled_class_follows_the_stored_format() -> None:
    assert unlabelled(nnUNetDatasetBlosc2) is UnlabelledBlosc2
    assert unlabelled(nnUNetDatasetNumpy) is UnlabelledNumpy
    with pytest.raises(NotImplementedError, match="dict"):
        unlabelled(dict)
