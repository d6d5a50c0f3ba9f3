"""Virtual subjects: warped, shaded and noisy copies of the MNI152 brain that nilearn ships in its package.

One real brain (the T1 average of 152 people with its grey- and white-matter maps) becomes a small data set without
any download. Every subject gets its own pose, smooth deformation, tissue contrast, bias field and noise, and is
sampled on an isotropic grid or in thick slices. It is real anatomy, but one anatomy: good to show that a chain
works, not to rank methods.

Template: ICBM 152 nonlinear symmetric 2009a; Fonov et al., NeuroImage 54:313-327, 2011 and NeuroImage 47:S102, 2009;
Collins et al., IPMI 1999.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

LABELS = {"background": 0, "grey matter": 1, "white matter": 2}

SOURCE = """\
# Source of these images

Virtual subjects made by `umit demo` from the MNI152 T1 template and its grey- and white-matter maps (ICBM 152
nonlinear symmetric 2009a, 1 mm, skull-stripped) as shipped in the Python package nilearn (BSD-3-Clause). Every image
here is a deformed, shaded and noisy re-sampling of that one template; no image shows a real person.

nilearn's own description gives the template's licence as "unknown". Its makers distribute it with this notice:

> Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
> University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
> without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
> University make no representations about the suitability of this software for any purpose. It is provided "as is"
> without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
> loss, or injury to subjects or patients resulting from the use or misuse of this software package.

Please cite
- V. S. Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54(1):313-327, 2011,
  doi:10.1016/j.neuroimage.2010.07.033
- V. S. Fonov et al., Unbiased nonlinear average age-appropriate brain templates from birth to adulthood,
  NeuroImage 47(Suppl. 1):S102, 2009, doi:10.1016/S1053-8119(09)70884-5
- D. L. Collins et al., ANIMAL+INSECT: improved cortical structure segmentation, IPMI, 210-223, 1999.
"""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """How a virtual scanner samples the brain.

    Args:
        name: Goes into the case names.
        spacing: Voxel size along x (left to right), y (back to front), z (up), mm.
        shape: Voxels along x, y, z.
    """

    name: str
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]


# Both see the same box of 120 x 144 x 96 mm: a quick demo needs few voxels, and this box holds most of the brain.
ISOTROPIC = Acquisition(name="isotropic", spacing=(3.0, 3.0, 3.0), shape=(40, 48, 32))
THICK = Acquisition(name="thick", spacing=(3.0, 3.0, 6.0), shape=(40, 48, 16))
BOX_CENTRE = (0.0, -18.0, 14.0)  # mm in MNI space: near the centre of the cerebrum


@dataclass(frozen=True, kw_only=True)
class Template:
    """T1 intensity (0 to 1) and tissue probabilities on one 1 mm grid.

    Args:
        t1, grey, white: Arrays of one shape, axes x, y, z (RAS).
        origin: Position of voxel (0, 0, 0), mm.
    """

    t1: Array
    grey: Array
    white: Array
    origin: NDArray[np.float64]
    _blurred: dict[tuple[float, float, float], list[Array]] = field(default_factory=dict, repr=False)

    def blurred(self, spacing: tuple[float, float, float]) -> list[Array]:
        """The three maps as a scanner with this voxel size sees them (point spread: its full width is one voxel)."""
        if spacing not in self._blurred:
            sigma = [mm / 2.3548 if mm > 1 else 0.0 for mm in spacing]
            self._blurred[spacing] = [gaussian_filter(map_, sigma) for map_ in (self.t1, self.grey, self.white)]
        return self._blurred[spacing]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One virtual scan: int16 image, uint8 labels (see ``LABELS``), axes x, y, z, and the 4 x 4 affine (mm, RAS)."""

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


def load_template() -> Template:
    """Read the template from nilearn's package data; nothing is downloaded.

    Raises:
        ModuleNotFoundError: When nilearn is not installed, with the command that mends it.
    """
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the demo brain comes with nilearn, which is not installed ({error}): pip install "nnunet-umit[demo]", '
            "or give your own data with --dataset",
            name=error.name,
        ) from error
    images = [load(resolution=1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    return Template(t1=t1, grey=grey, white=white, origin=np.asarray(images[0].affine[:3, 3], dtype=np.float64))


def smooth_noise(rng: np.random.Generator, knots: Sequence[int], shape: Sequence[int]) -> Array:
    """Gaussian noise on a coarse grid of ``knots``, interpolated by cubic splines to ``shape``."""
    coarse = rng.standard_normal(tuple(knots))
    factors = [size / count for size, count in zip(shape, knots, strict=True)]
    return np.asarray(zoom(coarse, factors, order=3, mode="nearest", grid_mode=True), dtype=np.float32)


def warped_positions(rng: np.random.Generator, acquisition: Acquisition) -> Array:
    """Where in MNI space (mm) each voxel of a new subject comes from, shape (3, X, Y, Z).

    Pose: turned by about 5 degrees, scaled by about 5 % along each axis, shifted by about 3 mm. Deformation: cubic
    splines over knots 40 mm apart with a standard deviation of 3 mm, too smooth to fold space (tested).
    """
    grid = np.stack(
        np.meshgrid(
            *[
                (np.arange(count) - (count - 1) / 2) * mm
                for count, mm in zip(acquisition.shape, acquisition.spacing, strict=True)
            ],
            indexing="ij",
        )
    )
    angles = np.deg2rad(rng.normal(0, 5, 3))
    matrix = np.diag(np.exp(rng.normal(0, 0.05, 3)))
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    shift = np.asarray(BOX_CENTRE) + rng.normal(0, 3, 3)
    extent = [count * mm for count, mm in zip(acquisition.shape, acquisition.spacing, strict=True)]
    knots = [max(2, round(length / 40)) for length in extent]
    displacement = np.stack([3 * smooth_noise(rng, knots, acquisition.shape) for _ in range(3)])
    positions = np.tensordot(matrix, grid, axes=1) + shift[:, None, None, None] + displacement
    return np.asarray(positions, dtype=np.float32)


def make_subject(template: Template, acquisition: Acquisition, seed: Sequence[int]) -> Subject:
    """Sample one virtual subject; equal seeds give equal voxels.

    The label of a voxel is the tissue that fills most of it. The image is the warped T1 with each tissue's
    brightness varied by about 3 % of white matter, a gamma, a smooth bias field of about 12 %, and Rician noise of 2
    to 4 %; white matter lies near 1000.
    """
    rng = np.random.default_rng(seed)
    indices = warped_positions(rng, acquisition) - template.origin.astype(np.float32)[:, None, None, None]
    t1, grey, white = (
        map_coordinates(map_, indices, order=1, mode="constant", cval=0.0, output=np.float32)
        for map_ in template.blurred(acquisition.spacing)
    )
    tissue = np.stack([1 - grey - white, grey, white])
    contrast = t1 + rng.normal(0, 0.03) * grey + rng.normal(0, 0.03) * white
    clean = np.clip(contrast, 0, None) ** rng.uniform(0.8, 1.25)
    shaded = clean * np.exp(0.12 * smooth_noise(rng, (3, 3, 3), acquisition.shape))
    noise = rng.uniform(0.02, 0.04)
    measured = np.hypot(shaded + rng.normal(0, noise, shaded.shape), rng.normal(0, noise, shaded.shape))
    affine = np.diag([*acquisition.spacing, 1.0])
    affine[:3, 3] = np.asarray(BOX_CENTRE) - (np.asarray(acquisition.shape) - 1) / 2 * np.asarray(acquisition.spacing)
    return Subject(
        image=np.round(1000 * measured).clip(0, 32767).astype(np.int16),
        labels=tissue.argmax(axis=0).astype(np.uint8),
        affine=affine,
    )


def save_subject(subject: Subject, image_file: Path, label_file: Path) -> None:
    """Write image and labels as NIfTI with equal geometry."""
    from nibabel.loadsave import save
    from nibabel.nifti1 import Nifti1Image

    for array, file in ((subject.image, image_file), (subject.labels, label_file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Nifti1Image(array, subject.affine)
        image.header.set_xyzt_units("mm")
        save(image, file)
