"""The demo's data set in nnU-Net's raw layout: virtual subjects, or a small part of the user's own data set."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_umit.cli import virtual_subjects
from nnunet_umit.cli.virtual_subjects import ISOTROPIC, LABELS, THICK

LABELLED, VALIDATION, UNLABELLED, TEST = 4, 1, 11, 4
"""Cases for each use: labels trained on, validation of the fine-tuning, images only, held out."""
VIRTUAL = "Dataset900_VirtualSubjects"


class DemoError(RuntimeError):
    """Something the user can mend; the message says how."""


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """A raw data set and what each case is for.

    Args:
        raw: The ``nnUNet_raw`` folder.
        name: The data set's folder in it, e.g. ``Dataset900_VirtualSubjects``.
        training: Cases whose labels the fine-tuning sees.
        validation: Cases of its validation.
        test: Held-out cases in ``imagesTs``, in nobody's training.
        groups: Kinds of test cases to report apart, e.g. isotropic and thick-slice.
        story: Sentences on what the data are, printed under the results.
    """

    raw: Path
    name: str
    training: list[str]
    validation: list[str]
    unlabelled: list[str]
    test: list[str]
    story: str
    groups: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The raw folder of the data set."""
        return self.raw / self.name

    @property
    def identifier(self) -> str:
        """The number that nnU-Net's commands take."""
        return str(int(self.name[7:10]))

    def description(self) -> dict[str, Any]:
        """The content of ``dataset.json``."""
        return read_json(self.folder / "dataset.json")

    def splits(self) -> list[dict[str, list[str]]]:
        """nnU-Net's ``splits_final.json``: one fold."""
        return [{"train": self.training, "val": self.validation}]


def read_json(file: Path) -> Any:
    """Read a JSON file; an error names the file and the line.

    Raises:
        DemoError: When the file is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"{file} is not valid JSON ({error})") from error


def write_json(file: Path, content: object) -> None:
    """Write a JSON file that people can read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def virtual_dataset(raw: Path, *, scale: float = 1.0, seed: int = 2009) -> DemoData:
    """Make the built-in data set.

    Every third subject has thick slices, so that nnU-Net's median spacing is the isotropic one; of the held-out
    subjects it is every second one, so that both kinds are tested equally.

    Args:
        raw: The ``nnUNet_raw`` folder to write into.
        scale: Below 1 makes proportionally fewer subjects (never fewer than two of a kind of use).
        seed: Changes all subjects.

    Raises:
        DemoError: When nilearn is missing.
    """
    counts = {
        use: max(min(count, 2), round(scale * count))
        for use, count in (("tr", LABELLED), ("va", VALIDATION), ("un", UNLABELLED), ("ts", TEST))
    }
    folder = raw / VIRTUAL
    try:
        template = virtual_subjects.load_template()
    except ModuleNotFoundError as error:
        raise DemoError(str(error)) from error
    cases: dict[str, list[str]] = {use: [] for use in counts}
    number = 0
    for use, count in counts.items():
        for index in range(count):
            number += 1
            period = 2 if use == "ts" else 3
            acquisition = THICK if index % period == period - 1 else ISOTROPIC
            case = f"subject{number:02d}_{acquisition.name}"
            subject = virtual_subjects.make_subject(template, acquisition, (seed, number))
            part = "Ts" if use == "ts" else "Tr"
            virtual_subjects.save_subject(
                subject, folder / f"images{part}" / f"{case}_0000.nii.gz", folder / f"labels{part}" / f"{case}.nii.gz"
            )
            cases[use].append(case)
    write_json(
        folder / "dataset.json",
        {
            "name": "Virtual subjects from the MNI152 brain",
            "description": "Made by `umit demo`; see SOURCE.md",
            "reference": "Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033; shipped by nilearn",
            "licence": "see SOURCE.md",
            "channel_names": {"0": "MRI"},
            "labels": LABELS,
            "numTraining": sum(len(cases[use]) for use in ("tr", "va", "un")),
            "file_ending": ".nii.gz",
        },
    )
    (folder / "SOURCE.md").write_text(virtual_subjects.SOURCE, encoding="utf-8")
    groups = {
        f"{acquisition.spacing[2]:g} mm slices": [case for case in cases["ts"] if case.endswith(acquisition.name)]
        for acquisition in (ISOTROPIC, THICK)
    }
    return DemoData(
        raw=raw,
        name=folder.name,
        training=cases["tr"],
        validation=cases["va"],
        unlabelled=cases["un"],
        test=cases["ts"],
        groups=groups,
        story="All subjects are warps of one brain (MNI152, shipped by nilearn), so the numbers say nothing about "
        "patients. Source, licence and citations: SOURCE.md in the data set's folder.",
    )


def part_of_dataset(source: Path, raw: Path, *, scale: float = 1.0) -> DemoData:
    """Pick a few cases of the user's data set; training images are referred to, not copied.

    The held-out cases are the last ones in alphabetical order and the training cases the first ones, so that the
    same data give the same split, and neighbours (scans of one patient) mostly stay on one side.

    Args:
        source: A data set folder in nnU-Net's raw format: ``dataset.json`` and ``imagesTr`` with ``labelsTr``.
        raw: The ``nnUNet_raw`` folder to write into.
        scale: Below 1 takes proportionally fewer cases.

    Raises:
        DemoError: When something is missing; it says what.
    """
    description, cases = _read_raw(source)
    names = sorted(cases)
    wanted = [max(min(count, 2), round(scale * count)) for count in (TEST, VALIDATION, LABELLED, UNLABELLED)]
    if len(names) < 4:
        raise DemoError(f"{source} has {len(names)} labelled cases; the demo needs 4 or more (train, validate, test)")
    share = min(1.0, len(names) / sum(wanted[:3]))
    n_test, n_validation, n_training = (max(1, int(share * count)) for count in wanted[:3])
    test, rest = names[-n_test:], names[:-n_test]
    kept = rest[: n_training + n_validation + wanted[3]]
    training, validation, unlabelled = (
        kept[:n_training],
        kept[n_training : n_training + n_validation],
        kept[n_training + n_validation :],
    )
    name = source.name if re.fullmatch(r"Dataset\d{3}_\w+", source.name) else "Dataset901_Own"
    folder, ending = raw / name, description["file_ending"]
    for case in test:
        for channel, file in enumerate(cases[case]["images"]):
            _copy(Path(file), folder / "imagesTs" / f"{case}_{channel:04d}{ending}")
        _copy(Path(cases[case]["label"]), folder / "labelsTs" / f"{case}{ending}")
    description.update(dataset={case: cases[case] for case in kept}, numTraining=len(kept))
    write_json(folder / "dataset.json", description)
    return DemoData(
        raw=raw,
        name=name,
        training=training,
        validation=validation,
        unlabelled=unlabelled,
        test=test,
        story=f"{len(kept) + len(test)} of the {len(names)} cases of {source} were used. Cases were divided by name; "
        "if one patient has several cases, some may be on both sides.",
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _read_raw(source: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``dataset.json`` and, for each case, ``{"images": [one file a channel], "label": file}``, all absolute."""
    if not source.is_dir():
        raise DemoError(f"--dataset {source}: there is no such folder")
    if not (source / "dataset.json").is_file():
        raise DemoError(
            f"--dataset {source} is not a data set in nnU-Net's raw format: dataset.json is missing. It should hold "
            "dataset.json, imagesTr/<case>_0000<ending> and labelsTr/<case><ending>"
        )
    description = read_json(source / "dataset.json")
    missing = [key for key in ("channel_names", "labels", "file_ending") if key not in description]
    if missing:
        raise DemoError(f"{source / 'dataset.json'} lacks {', '.join(missing)}")
    if "dataset" in description:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        cases = get_filenames_of_train_images_and_targets(str(source), description)
    else:
        for part in ("imagesTr", "labelsTr"):
            if not (source / part).is_dir():
                raise DemoError(f"--dataset {source} is not a data set in nnU-Net's raw format: {part} is missing")
        ending, channels = description["file_ending"], len(description["channel_names"])
        cases = {
            file.name.removesuffix(ending): {
                "images": [
                    str((source / "imagesTr" / f"{file.name.removesuffix(ending)}_{channel:04d}{ending}").absolute())
                    for channel in range(channels)
                ],
                "label": str(file.absolute()),
            }
            for file in sorted((source / "labelsTr").iterdir())
            if file.name.endswith(ending)
        }
        if not cases:
            raise DemoError(f"{source / 'labelsTr'} holds no file that ends with {ending!r} (see dataset.json)")
    lost = [file for case in cases.values() for file in (*case["images"], case["label"]) if not Path(file).is_file()]
    if lost:
        raise DemoError(f"{len(lost)} files that {source} should hold are missing, the first: {lost[0]}")
    return description, cases
