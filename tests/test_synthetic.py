"""The synthetic data sets are what nnU-Net's own readers make of them."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import synthetic
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from synthetic import Corruption


def test_volume_reads_back_with_shape_spacing_and_all_labels(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(shape=(10, 32, 28), spacing=(4.0, 1.0, 1.5), channels=2, cases=2, test_cases=1)
    files = sorted(str(file) for file in (folder / "imagesTr").glob("case_000_*.nii.gz"))
    image, properties = SimpleITKIO().read_images(files)
    label, _ = SimpleITKIO().read_seg(str(folder / "labelsTr" / "case_000.nii.gz"))
    assert image.shape == (2, 10, 32, 28)
    assert properties["spacing"] == [4.0, 1.0, 1.5]
    assert set(np.unique(label)) == {0, 1, 2}
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert (folder / "imagesTs" / "test_000_0001.nii.gz").is_file()


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_reads_back(make_dataset: Callable[..., Path], channels: int) -> None:
    folder = make_dataset(shape=(40, 32), channels=channels, cases=1)
    image, _ = NaturalImage2DIO().read_images([str(folder / "imagesTr" / "case_000_0000.png")])
    label, _ = NaturalImage2DIO().read_seg(str(folder / "labelsTr" / "case_000.png"))
    assert image.shape == (channels, 1, 40, 32)
    assert label.shape == (1, 1, 40, 32)
    assert set(np.unique(label)) == {0, 1, 2}


def test_same_seed_same_voxels_and_unknown_corruption_refused(tmp_path: Path) -> None:
    first = synthetic.make_dataset(tmp_path / "a", cases=1) / "imagesTr" / "case_000_0000.nii.gz"
    second = synthetic.make_dataset(tmp_path / "b", cases=1) / "imagesTr" / "case_000_0000.nii.gz"
    other = synthetic.make_dataset(tmp_path / "c", cases=1, seed=1) / "imagesTr" / "case_000_0000.nii.gz"
    voxels = [SimpleITKIO().read_images([str(file)])[0] for file in (first, second, other)]
    assert np.array_equal(voxels[0], voxels[1])
    assert not np.array_equal(voxels[0], voxels[2])
    with pytest.raises(ValueError, match="melted"):
        synthetic.make_dataset(tmp_path / "d", corruptions={0: "melted"})  # type: ignore[dict-item]


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_bad_voxels_are_in_the_file(make_dataset: Callable[..., Path], how: Corruption) -> None:
    """Read with nibabel: SimpleITK turns non-finite voxels of a NIfTI file into zeros without a word."""
    folder = make_dataset(cases=1, corruptions={0: how})
    voxels = nibabel.load(folder / "imagesTr" / "case_000_0000.nii.gz").get_fdata()
    assert not np.isfinite(voxels).all()
