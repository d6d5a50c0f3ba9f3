"""Samples of cases that keep their own grid: one level a batch, unbiased, and the network is told the truth."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from tiny_training import NATIVE_SPACINGS

from nnunet_umit.architectures.native import SPACING_CHANNELS, NativeView, append_spacing, bucket
from nnunet_umit.plans.native import crop_shape
from nnunet_umit.spacing import Anisotropy
from nnunet_umit.trainers.batches import IndexedBatches, random_state
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.native import native_shapes, prepare, read_table, rotation_for
from nnunet_umit.trainers.patches import (
    Augmentation,
    CaseTable,
    Jitter,
    NativeSamples,
    average_slices,
    draw_slice,
    turned_patch,
    weights_of,
)
from nnunet_umit.trainers.unlabelled import NoLabels, UnlabelledBlosc2

pytestmark = pytest.mark.usefixtures("one_thread")

ISOTROPIC = Anisotropy(1.0)


def case_folder(nnunet_env: Any) -> Path:
    return nnunet_env.preprocessed / tiny.NAME / "UMITPlans_3d_native"


class Nothing(Augmentation):
    """Crops as they are."""


def samples(folder: Path, jitter: Jitter | None = None, batch: int = 3, **options: Any) -> NativeSamples:
    dataset = UnlabelledBlosc2(str(folder))
    table = options.pop("table", None) or read_table(dataset)
    return NativeSamples(
        dataset, table, batch_size=batch, patch=(16, 16, 16), planned=ISOTROPIC, labels=NoLabels(),
        oversample_foreground=0.0, jitter=jitter or Jitter(), augmentation=Nothing(), **options,
    )  # fmt: skip


def training_samples(plans: dict[str, Any]) -> NativeSamples:
    """What a fine-tuning of these plans learns from, augmented as they say."""
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    made: NativeSamples = trainer.get_dataloaders()[0].batches.samples
    return made


def spacing_of(sample: torch.Tensor) -> tuple[float, ...]:
    return tuple(sample[-SPACING_CHANNELS:].amax((1, 2, 3)).tolist())


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ((1.0, 1.0, 1.0), (16, 24, 32)),
        ((2.0, 1.0, 1.0), (8, 24, 32)),
        ((1.0, 5.0, 1.0), (4, 24, 32)),
        ((31.0, 1.0, 1.0), (1, 24, 32)),
        ((999.0, 1.0, 1.0), (1, 24, 32)),
    ],
)
def test_crops_cover_equal_millimetres(spacing: tuple[float, ...], expected: tuple[int, ...]) -> None:
    """pumit 31, with the plan's patch in place of 16 voxels."""
    assert crop_shape((16, 24, 32), ISOTROPIC, spacing) == expected
    assert expected in native_shapes((16, 24, 32), ISOTROPIC)


def test_a_batch_holds_one_level_and_cases_come_by_weight(native: Callable[..., dict], nnunet_env: Any) -> None:
    """pumit 29 and 30."""
    native()
    made = samples(case_folder(nnunet_env))
    batches = IndexedBatches(made, seed=3, stream="train")
    seen: Counter[str] = Counter()
    for index in range(40):
        batch = batches[index]
        levels = {bucket(spacing_of(sample)) for sample in batch["data"]}
        assert len(levels) == 1
        axis, level, planar = next(iter(levels))
        assert axis == (2 if "case_003" in batch["keys"] else 0) and not planar
        shape = [16, 16, 16]
        shape[axis] = 16 >> level  # images keep their orientation; the network turns the thick axis to the front
        assert list(batch["data"].shape[2:]) == shape
        assert set(batch["groups"]) == {f"level {level}"}
    for index in range(3000):
        with random_state(index):
            seen.update(str(request) for request in made.draw())
    shares = np.array([seen[f"case_{number:03d}"] for number in range(4)]) / seen.total()
    assert shares == pytest.approx([0.25] * 4, abs=0.02)
    again = IndexedBatches(samples(case_folder(nnunet_env)), seed=3, stream="train")
    assert torch.equal(batches[17]["data"], again[17]["data"]) and batches[17]["keys"] == again[17]["keys"]


def test_weights_are_obeyed(native: Callable[..., dict], nnunet_env: Any) -> None:
    native()
    table = read_table(UnlabelledBlosc2(str(case_folder(nnunet_env))))
    assert np.allclose(table.spacings, NATIVE_SPACINGS)
    heavy = CaseTable(table.cases, table.spacings, weights_of([6, 1, 2, 1]), ["a", "b", "b", "b"])
    made = samples(case_folder(nnunet_env), table=heavy)
    seen: Counter[str] = Counter()
    for index in range(3000):
        with random_state(index):
            seen.update(str(request) for request in made.draw())
    assert [seen[f"case_{n:03d}"] / seen.total() for n in range(4)] == pytest.approx([0.6, 0.1, 0.2, 0.1], abs=0.02)
    with random_state(0):
        request = made.draw()[0]
        assert made.make(request, 0)[3] == f"{heavy.groups[request.row]}, level {bucket(request.spacing)[1]}"
    with pytest.raises(ValueError, match="not negative"):
        weights_of([1.0, -1.0])


def test_thickened_slices_are_means_and_the_spacing_is_true(native: Callable[..., dict], nnunet_env: Any) -> None:
    native(cases=1, spacings=((1.0, 1.0, 1.0),), channels=2)
    made = samples(case_folder(nnunet_env), Jitter(thicken=1.0, thickest=4))
    seen = set()
    for index in range(30):
        with random_state(index):
            request = made.draw()[0]
            sample, _, _, group = made.make(request, 0)
        seen.add((request.axis, request.slices))
        assert request.spacing[request.axis] == request.slices >= 2
        level, spacing, shape = 1 if request.slices < 4 else 2, [1.0, 1.0, 1.0], [16, 16, 16]
        spacing[request.axis], shape[request.axis] = request.slices, 16 >> level
        assert spacing_of(sample) == tuple(spacing)
        assert group == f"level {level}" and list(sample.shape[1:]) == shape
    assert {axis for axis, _ in seen} == {0, 1, 2} and {slices for _, slices in seen} == {2, 3, 4}


def test_thickening_equals_averaging_by_hand(native: Callable[..., dict], nnunet_env: Any) -> None:
    native(cases=1, spacings=((1.0, 1.0, 1.0),))
    made = samples(case_folder(nnunet_env), Jitter(thicken=1.0, thickest=2))
    whole = torch.from_numpy(nnUNetDatasetBlosc2(str(case_folder(nnunet_env))).load_case("case_000")[0][:1])
    with random_state(1):
        request = made.draw()[0]
        sample = made.make(request, 0)[0][:1]
    pairs, sample = (each.movedim(request.axis + 1, 1) for each in (whole, sample))
    means = (pairs[:, :-1] + pairs[:, 1:]) / 2
    windows = means.unfold(2, 16, 1).unfold(3, 16, 1)  # every in-plane place of a 16 x 16 crop
    first, inside = sample[:, 4], (windows - sample[0, 4]).abs().amax((-1, -2))
    assert first.abs().sum() > 0 and float(inside.min()) < 1e-6


def test_a_patch_turns_with_the_image_when_slices_are_averaged(native: Callable[..., dict], nnunet_env: Any) -> None:
    """Along every axis of the image the crop covers what the planned patch covers."""
    own = (1.0, 1.0, 1.0)
    assert turned_patch((16, 24, 32), own, own) == (16, 24, 32)
    assert turned_patch((16, 24, 32), own, (1.0, 1.0, 2.0)) == (32, 16, 24)
    assert turned_patch((16, 24, 32), own, (1.0, 4.0, 1.0)) == (24, 16, 32)
    assert turned_patch((16, 24, 32), (1.0, 1.0, 1.4), (1.0, 1.0, 1.4)) == (16, 24, 32), "thick from the start"
    assert turned_patch((16, 24, 32), (1.0, 1.0, 1.4), (1.0, 3.0, 1.4)) == (32, 24, 16)
    native(cases=1, spacings=(own,))
    dataset = UnlabelledBlosc2(str(case_folder(nnunet_env)))
    made = NativeSamples(
        dataset, read_table(dataset), batch_size=2, patch=(8, 16, 24), planned=ISOTROPIC, labels=NoLabels(),
        oversample_foreground=0.0, jitter=Jitter(thicken=1.0, thickest=2), augmentation=Nothing(),
    )  # fmt: skip
    seen = set()
    for index in range(30):
        with random_state(index):
            first, second = made.draw()
            sample = made.make(first, 0)[0]
        assert first.axis == second.axis, "the three shapes differ, and a batch has one"
        expected = {0: (4, 16, 24), 1: (8, 8, 24), 2: (8, 16, 12)}[first.axis]
        assert sample.shape[1:] == expected
        assert first.shape in native_shapes((8, 16, 24), ISOTROPIC, thickened=True)
        seen.add(first.axis)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.3333333, 0.1666667, 0.1666667), (5.0, 0.31, 0.31)])
def test_the_network_reads_the_level_that_the_batch_was_made_for(spacing: tuple[float, ...]) -> None:
    """A ratio of 2 that has gone through a zoom, float32 and a tensor is still one of 2."""
    table = CaseTable(["case"], np.asarray([spacing]), weights_of([1.0]), [])
    made = NativeSamples(
        None, table, batch_size=1, patch=(16, 16, 16), planned=ISOTROPIC, labels=NoLabels(), oversample_foreground=0.0,
        jitter=Jitter(thicken=0.7, thickest=4, zoom=1.0), augmentation=Nothing(),
    )  # fmt: skip
    zoomed = 0
    with random_state(0):
        for _ in range(2000):
            request = made.draw()[0]
            zoomed += request.zoom != 1.0
            batch = append_spacing(torch.zeros(1, 2, 2, 2), request.spacing)[None]
            view = NativeView.of(batch)
            assert bucket(spacing_of(batch[0])) == bucket(request.spacing) == request.shared[:3]
            assert Anisotropy.from_spacings(view.spacings).level == request.shared[1]
    assert zoomed > 500


def test_a_zoom_asks_for_no_more_slices_than_were_planned() -> None:
    """5 mm slices of 1 mm pixels are of level 2; zoomed by 1.4 they would be of level 1, with twice the slices."""
    table = CaseTable(["case"], np.asarray([(5.0, 1.0, 1.0)]), weights_of([1.0]), [])
    made = NativeSamples(
        None, table, batch_size=1, patch=(20, 256, 256), planned=Anisotropy(5.0), labels=NoLabels(),
        oversample_foreground=0.0, jitter=Jitter(zoom=1.0), augmentation=Nothing(),
    )  # fmt: skip
    with random_state(0):
        requests = [made.draw()[0] for _ in range(300)]
    assert {request.shape for request in requests} == {(20, 256, 256)}
    assert 1.2 < max(request.zoom for request in requests) < 1.25 and min(request.zoom for request in requests) < 0.75


def test_labels_of_thick_slices_are_drawn_by_their_share() -> None:
    joined = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 2, 2], [2, 2, 2, 2]], dtype=torch.int16)
    with random_state(0):
        drawn = draw_slice(torch.ones(1, 4000, 4, 4), joined.expand(1, 4000, 4, 4))
    assert drawn.shape == (1, 4000, 4) and drawn.dtype == torch.int16
    shares = [[(drawn[..., voxel] == label).float().mean().item() for label in range(3)] for voxel in range(4)]
    expected = [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_small_images_are_marked_where_they_end(native: Callable[..., dict], nnunet_env: Any) -> None:
    native(cases=1, spacings=((4.0, 1.0, 1.0),))  # 18 mm are 4 slices, the crop has 4: no padding in depth
    native_folder = case_folder(nnunet_env)
    sample = samples(native_folder).make(samples(native_folder).draw()[0], 0)[0]
    assert (sample[-1] > 0).all()
    wide = NativeSamples(
        UnlabelledBlosc2(str(native_folder)), read_table(UnlabelledBlosc2(str(native_folder))), batch_size=1,
        patch=(32, 24, 24), planned=ISOTROPIC, labels=NoLabels(), oversample_foreground=0.0, jitter=Jitter(),
        augmentation=Nothing(),
    )  # fmt: skip
    sample = wide.make(wide.draw()[0], 0)[0]
    assert sample.shape[1:] == (8, 24, 24)
    extent = (sample[-1] > 0).nonzero().amax(0) - (sample[-1] > 0).nonzero().amin(0) + 1
    assert extent.tolist() == [4, 20, 22]
    assert (sample[0][sample[-1] == 0] == 0).all()


def test_thick_slices_at_the_border_are_of_the_image_alone() -> None:
    """The second thick voxel reaches two slices beyond the image: air there would be averaged with zeros."""
    inside = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    image = torch.tensor([[[-3.0, -3.0, -1.0, -1.0], [-3.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert average_slices(image, inside).tolist() == [[-2.0, -2.5, 0.0]]
    label = torch.tensor([[[0, 0, 1, 1], [1, 2, -1, -1], [-1, -1, -1, -1]]], dtype=torch.int16)
    with random_state(0):
        drawn = torch.stack([draw_slice(inside, label)[0] for _ in range(2000)])
    assert (drawn[:, 2] == -1).all() and set(drawn[:, 1].tolist()) == {1, 2}
    assert abs((drawn[:, 1] == 2).float().mean().item() - 0.5) < 0.05


def test_a_zoom_leaves_the_thick_axis_where_it_is() -> None:
    """A flat patch of isotropic voxels is zoomed within its slices: then the others become the thicker ones."""
    table = CaseTable(["case"], np.asarray([(1.0, 1.0, 1.0)]), weights_of([1.0]), [])
    made = NativeSamples(
        None, table, batch_size=1, patch=(8, 64, 64), planned=ISOTROPIC, labels=NoLabels(), oversample_foreground=0.0,
        jitter=Jitter(zoom=1.0), augmentation=Nothing(),
    )  # fmt: skip
    with random_state(0):
        requests = [made.draw()[0] for _ in range(300)]
    assert {bucket(request.spacing)[0] for request in requests} == {0}
    assert max(request.zoom for request in requests) < 1.03 and min(request.zoom for request in requests) < 0.75


@pytest.mark.parametrize("axes", [(), (1,), (0, 2)])
def test_only_the_chosen_axes_of_the_image_are_mirrored(
    native: Callable[..., dict], nnunet_env: Any, axes: tuple[int, ...]
) -> None:
    """Axes are those of the stored image, though the thick one (here the second) is in front when it is augmented."""
    native(cases=1, spacings=((1.0, 4.0, 1.0),))
    plain = samples(case_folder(nnunet_env), batch=1)
    mirrored = samples(case_folder(nnunet_env), batch=1, mirror_axes=axes)
    seen = set()
    for seed in range(40):
        with random_state(seed):
            request = plain.draw()[0]
        with random_state(seed):
            wanted = plain.make(request, 0)[0]
        with random_state(seed):
            found = mirrored.make(request, 0)[0]
        flips = [
            chosen
            for count in range(len(axes) + 1)
            for chosen in itertools.combinations(axes, count)
            if torch.equal(found, wanted.flip([axis + 1 for axis in chosen]))
        ]
        assert len(flips) == 1
        seen.add(flips[0])
    assert len(seen) == 2 ** len(axes)


@pytest.mark.parametrize("planned", [ISOTROPIC, Anisotropy(4.0)])
def test_zoom_is_told_and_appearance_leaves_the_spacing_alone(
    native: Callable[..., dict], nnunet_env: Any, planned: Anisotropy
) -> None:
    spacing = ((1.0, 1.0, 1.0),) if planned is ISOTROPIC else ((4.5, 1.0, 1.0),)
    options = {"patch": (16, 16, 16) if planned is ISOTROPIC else (4, 16, 16), "spacing": (planned.ratio, 1.0, 1.0)}
    plans = native(spacings=spacing, finetune={"augmentation": "nnunet"}, **options)
    made = training_samples(plans)
    zooms = set()
    for index in range(60):
        with random_state(index):
            request = made.draw()[0]
            sample = made.make(request, 0)[0]
        zooms.add(request.zoom)
        told = [value * request.zoom for value in spacing[0]]
        if request.slices == 1:
            expected = told if planned is ISOTROPIC else [spacing[0][0], *told[1:]]
            assert spacing_of(sample) == pytest.approx(expected)
        channels = sample[-SPACING_CHANNELS:]
        for channel in channels:
            assert len(channel.unique()) <= 2  # one value inside, zero outside
    assert 1.0 in zooms and len(zooms) > 3 and all(0.7 <= zoom <= 1.4 for zoom in zooms)


@pytest.mark.parametrize("spacing", [(999.0, 1.0, 1.0), (8.0, 1.0, 1.0), (16.0, 1.0, 1.0)])
def test_crops_of_a_slice_or_two_are_augmented_too(
    native: Callable[..., dict], nnunet_env: Any, spacing: tuple[float, ...]
) -> None:
    plans = native(cases=1, spacings=(spacing,), finetune={"augmentation": "nnunet", "thicken": 0.3})
    made = training_samples(plans)
    shapes = set()
    for seed in range(60):
        with random_state(seed):
            image, target = made.make(made.draw()[0], 0)[:2]
        assert image.isfinite().all() and target.shape[1:] == image.shape[1:]
        shapes.add(min(image.shape[1:]))
    assert min(shapes) <= 2


def test_a_zoomed_sample_shows_the_object_at_its_new_size() -> None:
    """The scale the network is told of is the scale that happened: a ball of 8 mm stays a ball of 8 mm."""
    axis = torch.arange(48.0) - 23.5
    distance = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2).sqrt()
    image, label = (distance <= 8).float()[None], (distance <= 8).to(torch.int16)[None]
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    prepared = prepare((48, 48, 48), ComposeTransforms([SpatialTransform((32, 32, 32), 0, False, p_rotation=0)]))
    for zoom in (0.7, 1.0, 1.4):
        moved = prepared.geometry(image=image, segmentation=label, zoom=zoom)
        volume = float(moved["image"].sum()) * zoom**3
        assert volume == pytest.approx(float(image.sum()), rel=0.05)


def test_rotation_follows_nnunet() -> None:
    angles, in_plane, read = rotation_for((16, 16, 16))
    assert not in_plane and angles[1] == pytest.approx(np.pi / 6) and min(read) > 16
    angles, in_plane, read = rotation_for((4, 16, 16))
    assert in_plane and angles[1] == pytest.approx(np.pi) and read[0] == 4 and read[1] > 16
    assert rotation_for((1, 16, 40))[0][1] == pytest.approx(np.pi / 12)
