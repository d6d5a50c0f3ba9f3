"""What is wrong where more training no longer helps: errors of finished trainings, and what they have in common.

Of the trainings that `accuracy` left in the work folder (UMIT from scratch, fold 0 of the hippocampus, 20 minutes and
an hour), nnU-Net's own validation predictions are held against the labels and against each other:

- of which kind the wrong voxels are (missed, added, one structure taken for the other), and how many lie beside a voxel
  to which the reference gives the predicted label: moving its border by one voxel would make those right;
- Dice between the predictions of two trainings, the correlation of their Dice over the cases, and Dice of their vote:
  what trainings do not share, a vote removes; what they share lies in data, labels or method;
- Dice of the reference with itself moved by one voxel, as a measure for all of these.

No claim: this explains a figure. Nothing is trained.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.cases import read_fold
from benchmarks.common import DATASET, Results, add_place, parser, provenance, say, table
from benchmarks.equal_time import Bench
from benchmarks.thick_slices import dice, read_label

CLAIM = "none: what the errors of finished trainings are, and what trainings have in common"
FOLD = 0
LABELS = (1, 2)
RUNS = {
    "20 minutes, seed 1": "20min/seed1",
    "20 minutes, seed 2": "20min/seed2",
    "20 minutes, seed 3": "20min/seed3",
    "60 minutes, seed 1": "60min/seed1",
}


def mean_dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Mean over the foreground labels of one case."""
    return statistics.fmean(dice(prediction, reference, label) for label in LABELS)


def beside(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Where one of the 26 neighbours of a voxel, or itself, has in the reference the label predicted for the voxel."""
    found = np.zeros(reference.shape, bool)
    for label in np.unique(prediction):
        found |= (prediction == label) & ndimage.binary_dilation(reference == label, np.ones((3, 3, 3), bool))
    return found


def kinds(prediction: np.ndarray, reference: np.ndarray) -> dict[str, int]:
    """Number of voxels: of the foreground, wrong ones by kind, and wrong ones beside their label."""
    wrong, there, said = prediction != reference, reference > 0, prediction > 0
    return {
        "foreground": int(there.sum()),
        "missed": int((there & ~said).sum()),
        "added": int((said & ~there).sum()),
        "confused": int((wrong & there & said).sum()),
        "beside": int((wrong & beside(reference, prediction)).sum()),
    }


def vote(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """The label that most predictions give a voxel; of equally many the smallest."""
    counts = np.stack([sum((each == label).astype(np.uint8) for each in predictions) for label in (0, *LABELS)])
    return np.argmax(counts, axis=0)


def moved(reference: np.ndarray) -> float:
    """Dice with itself moved by one voxel, mean over the three axes (borders are background)."""
    padded = np.pad(reference, 1)
    return statistics.fmean(mean_dice(np.roll(padded, 1, axis), padded) for axis in range(3))


def compare(
    references: Mapping[str, np.ndarray], predictions: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """All figures: references by case, predictions by name of the training and case."""
    scores = {
        name: [mean_dice(found[case], reference) for case, reference in references.items()]
        for name, found in predictions.items()
    }
    trainings = {}
    for name, found in predictions.items():
        counted = [kinds(found[case], reference) for case, reference in references.items()]
        trainings[name] = {
            "dice": statistics.fmean(scores[name]),
            **{kind: sum(each[kind] for each in counted) for kind in counted[0]},
        }

    def agreement(first: str, second: str) -> dict[str, float]:
        between = [mean_dice(predictions[first][case], predictions[second][case]) for case in references]
        correlation = statistics.correlation(scores[first], scores[second])
        return {"dice": statistics.fmean(between), "correlation": correlation}

    votes = {case: vote([found[case] for found in predictions.values()]) for case in references}
    return {
        "cases": len(references),
        "trainings": trainings,
        "pairs": {
            f"{first} / {second}": agreement(first, second) for first, second in itertools.combinations(predictions, 2)
        },
        "vote_dice": statistics.fmean(mean_dice(votes[case], reference) for case, reference in references.items()),
        "moved_dice": statistics.fmean(moved(reference) for reference in references.values()),
    }


def report(run: Mapping[str, Any]) -> str:
    """A table of the trainings and what they have in common."""
    rows = []
    for name, each in run["trainings"].items():
        wrong = each["missed"] + each["added"] + each["confused"]
        shares = [f"{each[kind] / wrong:.2f}" for kind in ("missed", "added", "confused", "beside")]
        rows.append([name, f"{each['dice']:.4f}", f"{wrong / each['foreground']:.3f}", *shares])
    heads = ["training", "Dice", "wrong voxels / foreground", "of them missed", "added", "confused", "at the border"]
    agreement = [each["dice"] for each in run["pairs"].values()]
    correlations = [each["correlation"] for each in run["pairs"].values()]
    return "\n".join(
        [
            f"{run['cases']} cases",
            table(heads, rows),
            f"Dice between two trainings: {min(agreement):.4f} to {max(agreement):.4f}; correlation of their Dice over "
            f"the cases: {min(correlations):.2f} to {max(correlations):.2f}; Dice of the vote of all {len(rows)}: "
            f"{run['vote_dice']:.4f}; Dice of the reference moved by one voxel: {run['moved_dice']:.4f}",
        ]
    )


def check_stored(trainings: Mapping[str, Mapping[str, Any]], stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether what lies in the work folder is what the results tell.

    Raises:
        ValueError: a training has another Dice there, or is not there.
    """
    for name, each in trainings.items():
        key = key_of(name)
        told = stored[key]["dice"]["mean"] if key in stored else None
        if told is None or not abs(told - each["dice"]) <= 1e-6:
            raise ValueError(
                f"the work folder holds a training of Dice {each['dice']:.6f} for {key}, accuracy.json "
                f"{'none' if told is None else f'one of {told:.6f}'}; give the --work folder of that one or train again"
            )


def key_of(name: str) -> str:
    """Of a training in `accuracy`'s results."""
    return f"full/hippocampus/fold{FOLD}/{RUNS[name]}/umit_scratch"


def read_folder(folder: Path, cases: Sequence[str]) -> dict[str, np.ndarray]:
    """The labels of some cases."""
    return {case: read_label(folder / f"{case}.nii.gz") for case in cases}


def main(arguments: list[str] | None = None) -> None:
    """Compare the trainings of the work folder, and print the figures."""
    options_parser = parser(__doc__)
    add_place(options_parser)
    options = options_parser.parse_args(arguments)
    results = Results.of(options, "residual_errors", CLAIM)
    key = "quick" if options.quick else "full"
    if results.left(key):
        bench = Bench(options, dataset=DATASET, fold=FOLD, seed=1, runs="accuracy")
        folders = {}
        for name in RUNS:
            model = bench.model(bench.folder_of(key_of(name)), "UMITTrainer", "UMITPlans")
            folders[name] = model / f"fold_{FOLD}" / "validation"
        cases = read_fold(bench.data, DATASET, FOLD)["val"][: 4 if options.quick else None]
        references = read_folder(bench.base / "gt_segmentations", cases)
        predictions = {name: read_folder(folder, cases) for name, folder in folders.items()}
        found = compare(references, predictions)
        if not options.quick:
            check_stored(found["trainings"], Results.of(options, "accuracy", "").runs)
        results.put(key, {"fold": FOLD, "dataset": DATASET, **found, **provenance()})
    say(report(results.get(key)))


if __name__ == "__main__":
    main()
