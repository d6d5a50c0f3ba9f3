"""Benchmarks of native spacing, thick slices and the corpus: arithmetic, rules, tables. Nothing is trained here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from benchmarks import (
    cases,
    corpus_transfer,
    memory,
    native_spacing,
    prediction,
    residual_errors,
    spacing_robustness,
    thick_slices,
)
from benchmarks.common import Results
from benchmarks.thick_slices import Condition


# ------------------------------------------------------------------------------------------------- thick slices
def test_blocks_are_averaged_and_the_last_slice_is_repeated():
    volume = np.arange(5, dtype=np.float32)[None, :, None] * np.ones((2, 1, 3), np.float32)
    thick = thick_slices.thicken(volume, axis=1, slices=2)
    assert thick.shape == (2, 3, 3) and thick.dtype == np.float32
    assert thick[0, :, 0].tolist() == [0.5, 2.5, 4.0], "the fifth slice makes a block with itself"
    assert np.array_equal(thick_slices.thicken(volume, 0, 1), volume)
    assert thick_slices.thicken(volume, 2, 6)[0, :, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("axis", "slices"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_blocks_are_refused(axis, slices):
    with pytest.raises(ValueError, match=f"cannot join {slices} slices along axis {axis}"):
        thick_slices.thicken(np.zeros((2, 2, 2)), axis, slices)


def test_the_affine_puts_voxels_into_the_centres_of_their_blocks():
    affine = np.array([[0.0, -2, 0, 10], [1, 0, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
    thick = thick_slices.thick_affine(affine, axis=1, slices=4)
    assert thick.tolist() == [[0, -8, 0, 7], [1, 0, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]
    for block in range(3):
        covered = [affine @ [5, 4 * block + inner, 7, 1] for inner in range(4)]
        assert np.allclose(thick @ [5, block, 7, 1], np.mean(covered, 0))


def test_files_carry_the_spacing_and_the_origin_of_the_thick_slices(tmp_path):
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1, 1, 1])), tmp_path / "a_0000.nii.gz")
    target = tmp_path / "thick" / "a_0000.nii.gz"
    thick_slices.thicken_file(tmp_path / "a_0000.nii.gz", target, Condition(3, 2))
    made = nibabel.Nifti1Image.from_filename(target)
    assert made.shape == (2, 3, 2) and made.header.get_zooms() == (1, 1, 3)
    assert made.affine[:3, 3].tolist() == [0, 0, 1]
    assert int(made.header["qform_code"]) == int(made.header["sform_code"]) == 1
    assert np.asarray(made.dataobj)[0, 0].tolist() == [1.0, 3.0]
    thick_slices.thicken_file(tmp_path / "a_0000.nii.gz", tmp_path / "thin" / "a_0000.nii.gz", Condition(1))
    assert (tmp_path / "thin" / "a_0000.nii.gz").is_symlink()


def test_only_images_of_one_millimetre_are_thickened(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.diag([1.0, 1, 1.5, 1])), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii has 1\.5 mm along z; this benchmark needs 1 mm"):
        thick_slices.thicken_file(tmp_path / "a.nii", tmp_path / "b.nii", Condition(2, 2))


def test_slices_are_repeated_on_the_original_grid():
    prediction = np.array([1, 2, 3])[None, :, None]
    assert thick_slices.repeat_back(prediction, Condition(2, 1), (1, 5, 1))[0, :, 0].tolist() == [1, 1, 2, 2, 3]
    assert thick_slices.repeat_back(prediction, Condition(1), (1, 3, 1)).tolist() == prediction.tolist()
    with pytest.raises(ValueError, match=r"shape \(1, 3, 1\) is not on the thick grid \(1, 2, 1\)"):
        thick_slices.repeat_back(prediction, Condition(2, 1), (1, 4, 1))


def test_probabilities_are_interpolated_between_the_centres_of_the_slices():
    one = np.array([0.0, 0.9, 0.4], np.float32)  # centres at 1.5, 5.5 and 9.5 of 10 thin slices
    between = np.array([0, 0, 0.1125, 0.3375, 0.5625, 0.7875, 0.8375, 0.7125, 0.5875, 0.4625])
    for threshold in (0.1, 0.33, 0.5, 0.75, 0.8):
        probabilities = np.stack([np.full(3, threshold, np.float32), one])[:, None, None, :]
        found = thick_slices.interpolate_back(probabilities, Condition(4, 2), (1, 1, 10))
        assert found[0, 0].tolist() == (between > threshold).astype(int).tolist()
    assert thick_slices.interpolate_back(probabilities[..., 1:2], Condition(4, 2), (1, 1, 3)).tolist() == [[[1, 1, 1]]]
    with pytest.raises(ValueError, match=r"shape \(1, 1, 3\) is not on the thick grid \(1, 1, 2\)"):
        thick_slices.interpolate_back(probabilities, Condition(4, 2), (1, 1, 8))


def test_shares_of_the_classes_say_what_the_grid_leaves_of_a_label():
    label = np.array([0, 1, 1, 2, 2, 0, 1], np.uint8)[None, None]
    shares = thick_slices.class_shares(label, 3, Condition(3, 2))
    assert np.allclose(shares[:, 0, 0], [[1 / 3, 1 / 3, 0], [2 / 3, 0, 1], [0, 2 / 3, 0]])
    assert thick_slices.class_shares(label, 3, Condition(1)).argmax(0).tolist() == label.tolist()


def test_probabilities_are_read_in_the_axis_order_of_their_labels(tmp_path):
    labels = np.array([[[0, 1], [2, 1]], [[0, 0], [1, 2]], [[0, 2], [2, 2]]])  # (3, 2, 2)
    hot = np.stack([(labels == value).astype(np.float16) for value in range(3)])
    for name, stored in (("nibabel", hot), ("sitk", hot.transpose(0, 3, 2, 1)), ("other", hot[:, ::-1])):
        np.savez_compressed(tmp_path / f"{name}.npz", probabilities=stored)
    for name in ("nibabel", "sitk"):
        assert np.array_equal(thick_slices.read_probabilities(tmp_path / f"{name}.npz", labels), hot)
    with pytest.raises(ValueError, match=r"other.npz of shape \(3, 3, 2, 2\) does not belong to labels of shape"):
        thick_slices.read_probabilities(tmp_path / "other.npz", labels)


def test_conditions_are_the_image_itself_and_every_axis_of_every_thickness():
    names = [condition.name for condition in thick_slices.conditions((2, 6))]
    assert names == ["1mm", "2mm_x", "2mm_y", "2mm_z", "6mm_x", "6mm_y", "6mm_z"]


def test_dice_of_cases_and_classes():
    truth, found = np.array([0, 1, 1, 2]), np.array([1, 1, 0, 2])
    assert [thick_slices.dice(found, truth, label) for label in (1, 2)] == [0.5, 1.0]
    assert math.isnan(thick_slices.dice(found, truth, 3))
    scored = {"a": {"1": 0.5, "2": 1.0}, "b": {"1": 0.7, "2": math.nan}}
    assert thick_slices.mean_dice(scored) == {"mean": 0.8, "per_class": {"1": 0.6, "2": 1.0}, "cases": 2}
    with pytest.raises(ValueError, match="no case was scored"):
        thick_slices.mean_dice({})


# -------------------------------------------------------------------------------------------------------- cases
def write_splits(folder: Path, dataset: str, folds: list[dict[str, list[str]]]) -> None:
    (folder / "splits").mkdir(exist_ok=True)
    (folder / "splits" / f"{dataset}.json").write_text(json.dumps(folds))


def test_cases_are_chosen_by_rule(tmp_path):
    write_splits(tmp_path, "Dataset001_A", [{"train": ["c", "a", "d"], "val": ["z", "x", "y"]}])
    split = cases.read_fold(tmp_path, "Dataset001_A", 0)
    assert cases.few_cases(split, 2, 2) == {"train": ["c", "a"], "val": ["x", "y"]}
    assert cases.few_cases(split, 0, None) == {"train": [], "val": ["x", "y", "z"]}
    with pytest.raises(ValueError, match="4 labelled cases were asked for, but the fold trains on 3"):
        cases.few_cases(split, 4, 2)
    with pytest.raises(ValueError, match=r"fold 1 of Dataset001_A: splits/Dataset001_A\.json has folds 0 to 0"):
        cases.read_fold(tmp_path, "Dataset001_A", 1)


def test_images_are_linked_with_all_their_channels_and_alone(tmp_path):
    dataset, folder = tmp_path / "Dataset001_A", tmp_path / "linked"
    (dataset / "imagesTr").mkdir(parents=True)
    for name in ("a_0000", "a_0001", "a_1_0000", "b_0000"):
        (dataset / "imagesTr" / f"{name}.nii.gz").write_text(name)
    for _ in range(2):
        assert cases.link_images(dataset, ["a"], folder) == 2
    assert sorted(file.name for file in folder.iterdir()) == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert (folder / "a_0001.nii.gz").read_text() == "a_0001"
    with pytest.raises(FileExistsError, match=r"holds other files than the 1 to predict \(a_0000"):
        cases.link_images(dataset, ["b"], folder)
    with pytest.raises(FileNotFoundError, match="no image of case c in Dataset001_A/imagesTr"):
        cases.link_images(dataset, ["c"], tmp_path / "other")


# ----------------------------------------------------------------------------------------------- native spacing
def native_run(dice: float) -> dict[str, Any]:
    scores = {"mean": dice, "per_class": {"1": dice - 0.1, "2": dice, "3": dice + 0.1}, "cases": 12}
    return {"dice": scores, "iterations": 100, "train_wall_s": 900.0}


def native_runs(native: list[float], resampled: list[float], walls: list[tuple[float, float]]) -> dict[str, Any]:
    runs = {}
    for arm, values in (("3d_native", native), ("3d_fullres", resampled)):
        runs |= {f"full/seed{seed}/{arm}": native_run(dice) for seed, dice in enumerate(values, 1)}
    for number, pair in enumerate(walls, 1):
        samples = {arm: {"wall": wall, "cpu": 2 * wall} for arm, wall in zip(native_spacing.ARMS, pair, strict=True)}
        runs[f"full/seed1/predict/{number}"] = {"samples": samples}
    return runs


@pytest.mark.parametrize(
    ("native", "verdict"),
    [
        ([0.80, 0.82], "+0.010 (+0.000 / +0.020; bar -0.005: met)"),
        ([0.79, 0.794], "-0.008 (-0.010 / -0.006; bar -0.005: NOT met)"),
        ([0.812, 0.784], "-0.002 (+0.012 / -0.016; bar -0.005: undecided, the seeds disagree)"),
    ],
)
def test_dice_on_the_native_grid_is_judged_by_every_seed(native, verdict):
    runs = native_runs(native, [0.80, 0.80], [])
    printed = native_spacing.report(runs, "full/")
    assert verdict in printed and "0.7000 / 0.8000 / 0.9000" in printed and "prediction" not in printed


def test_a_seed_without_its_partner_does_not_count():
    runs = native_runs([0.80, 0.82], [0.80], [])
    assert native_spacing.dice_differences(runs, "full/") == [0.0]
    assert native_spacing.dice_differences({}, "full/") == [] and native_spacing.report({}, "full/")


@pytest.mark.parametrize(("walls", "verdict"), [((10.0, 20.0), "0.500 (bar 1: met)"), ((21.0, 20.0), "NOT met")])
def test_prediction_is_judged_by_pairs(walls, verdict):
    printed = native_spacing.report(native_runs([], [], [walls, (9.0, 18.0 if walls[0] < 20 else 9.0), walls]), "full/")
    assert verdict in printed and f"{walls[0]:.1f} (9.0-{walls[0]:.1f})" in printed


def test_finished_trainings_and_predictions_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native_spacing, "Bench", lambda *given, **named: pytest.fail("nothing is left to run"))
    results = Results("native_spacing", "claim", tmp_path)
    for key, run in native_runs([0.8, 0.8], [0.8, 0.8], [(10.0, 20.0)] * 3).items():
        results.put(key.replace("full/", "full/fold0/15min/"), run)
    native_spacing.main(["--full", "--results", str(tmp_path)])
    assert "+0.000 (+0.000 / +0.000; bar -0.005: met)" in capsys.readouterr().out


def test_cpu_seconds_of_a_command_are_those_of_its_children():
    before = prediction.child_cpu_s()
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True)
    assert prediction.child_cpu_s() > before


LEAVES_WORK = """
import subprocess, sys
work = "import time\\nwhile time.process_time() < 0.3: pass"
subprocess.Popen([sys.executable, "-c", work])  # and is gone before that ends, as a command is before its fork server
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to another process than init")
def test_cpu_seconds_of_what_a_command_leaves_behind_count_and_others_are_left_alone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        before = prediction.child_cpu_s()
        with prediction.orphans_counted():
            subprocess.run([sys.executable, "-c", LEAVES_WORK], check=True)
        assert prediction.child_cpu_s() - before >= 0.3
        assert other.poll() is None
        other.communicate(b"done\n")
    assert other.returncode == 0


# ------------------------------------------------------------------------------------------- spacing robustness
def scores_of(one: float, four: list[float]) -> dict[str, Any]:
    per_axis = {Condition(4, axis).name: four[axis] for axis in range(3)}
    scores = {}
    for name, mean in ({"1mm": one} | per_axis).items():
        repeated = {"mean": mean if name == "1mm" else mean - 0.1, "per_class": {}, "cases": 42}
        scores[name] = {"mean": mean, "per_class": {}, "cases": 42, "repeated": repeated}
    return scores


def test_loss_is_the_mean_over_the_axes_against_one_millimetre():
    scores = scores_of(0.85, [0.70, 0.75, 0.80])
    assert spacing_robustness.by_thickness(scores) == {1: 0.85, 4: pytest.approx(0.75)}
    assert spacing_robustness.loss_at(scores, 4) == pytest.approx(0.10)


def test_native_must_lose_less_than_half_of_every_arm_that_resamples():
    scored = {
        "umit_native": scores_of(0.85, [0.80] * 3),
        "umit_resampled": scores_of(0.85, [0.70] * 3),
        "primus_s": scores_of(0.80, [0.71] * 3),
        spacing_robustness.CEILING: scores_of(1.0, [0.9] * 3),
    }
    first, second = spacing_robustness.verdicts(scored)
    assert "umit_resampled 0.1500, 0.33 of it" in first and first.endswith("met)") and "NOT" not in first
    assert "primus_s 0.0900, 0.56 of it" in second and second.endswith("NOT met)")
    scored["primus_s"] = scores_of(0.80, [0.81] * 3)
    assert spacing_robustness.verdicts(scored)[1].endswith("no ratio: it loses nothing (bar below 0.5: NOT met)")
    assert spacing_robustness.verdicts({"primus_s": scored["primus_s"]}) == []


def test_robustness_table_and_picture(tmp_path):
    scored = {
        "umit_native": scores_of(0.85, [0.80, 0.81, 0.79]),
        spacing_robustness.CEILING: scores_of(1.0, [0.9] * 3),
    }
    printed = spacing_robustness.report(scored)
    assert "0.8500" in printed and "0.0500" in printed and "0.800 / 0.810 / 0.790" in printed
    assert "0.7000" in printed[printed.index("slices of the labels repeated") :], "0.80 less 0.1"
    spacing_robustness.plot(scored, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_the_one_millimetre_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("UMIT_DATA", str(tmp_path))
    dataset = tmp_path / "Dataset004_Hippocampus"
    (dataset / "labelsTr").mkdir(parents=True)
    (dataset / "dataset.json").write_text("{}")
    write_splits(tmp_path, dataset.name, [{"train": [], "val": ["a"]}])
    label = np.zeros((2, 2, 4), np.uint8)
    label[..., 1:3], label[..., 3] = 1, 2
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), dataset / "labelsTr" / "a.nii.gz")
    options = spacing_robustness.training_parser("", 1.0).parse_args(["--full", "--work", str(tmp_path / "work")])
    options.cases, options.seed = None, 1
    robustness = spacing_robustness.Robustness(options, 1.0)
    perfect = robustness.score(Condition(1), None)
    assert perfect["mean"] == perfect["repeated"]["mean"] == 1.0
    thick = np.ones((2, 2, 2), np.uint8)
    (tmp_path / "predicted").mkdir()
    nibabel.save(nibabel.Nifti1Image(thick, np.diag([1.0, 1, 2, 1])), tmp_path / "predicted" / "a.nii.gz")
    hot = np.stack([(thick == value).astype(np.float32) for value in range(3)])
    np.savez_compressed(tmp_path / "predicted" / "a.npz", probabilities=hot.transpose(0, 3, 2, 1))
    scored = robustness.score(Condition(2, 2), tmp_path / "predicted")
    expected = {"mean": pytest.approx(1 / 3), "per_class": {"1": pytest.approx(2 / 3), "2": 0.0}, "cases": 1}
    assert scored == expected | {"repeated": expected}


# ---------------------------------------------------------------------------------------------- corpus transfer
LOG = """2026-01-01 10:00:00.1: Epoch 0 
2026-01-01 10:00:01.1: masked loss, Dataset027_ACDC, level 3: 1.0100 (8 samples) 
2026-01-01 10:00:01.1: masked loss, Dataset124_BUSI, 2D: 0.9000 (1 samples) 
2026-01-01 10:00:01.1: masked loss, training: 0.9500 
2026-01-01 10:00:02.1: Epoch time: 2.00 s 
2026-01-01 10:00:02.1: Epoch 1 
2026-01-01 10:00:03.1: masked loss, Dataset027_ACDC, level 3: 0.7000 (4 samples) 
2026-01-01 10:00:03.1: masked loss, training: 0.7000 
"""  # noqa: W291 - nnU-Net's logger leaves a blank


def test_loss_of_every_dataset_and_level_is_read_from_the_log():
    assert corpus_transfer.loss_by_group(LOG) == {
        "Dataset027_ACDC, level 3": {"first": 1.01, "samples": 12, "epochs": 2, "last": 0.7},
        "Dataset124_BUSI, 2D": {"first": 0.9, "samples": 1, "epochs": 1, "last": 0.9},
    }
    assert corpus_transfer.last_epoch(LOG) == [
        "masked loss, Dataset027_ACDC, level 3: 0.7000 (4 samples)",
        "masked loss, training: 0.7000",
    ]


def test_every_dataset_and_level_of_the_corpus_is_expected():
    spacings = [(10.0, 1.5, 1.5), (1.0, 1.1, 4.5), (999.0, 1.0, 1.0), (10.0, 1.4, 1.4)]
    assert corpus_transfer.expected_groups(["A", "A", "B", "A"], spacings) == ["A, level 2", "B, 2D"]


def test_fine_tuning_uses_a_network_of_the_size_of_the_corpus():
    assert [corpus_transfer.plans_for(size) for size in ("XS", "B")] == ["UMITPlans", "UMITPlansB"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0.02, 0.01], "A: the corpus encoder helps: Dice +0.0150 (mean of 2 seeds)"),
        ([0.004], "A: no difference to speak of: Dice +0.0040 with the corpus encoder (mean of 1 seed)"),
        ([-0.03, 0.01], "A: the corpus encoder does NOT help: Dice -0.0100 (mean of 2 seeds; the seeds disagree)"),
    ],
)
def test_where_the_corpus_does_not_help_the_report_says_so(found, expected):
    assert corpus_transfer.sentence("A", found) == expected


def test_corpus_report(tmp_path):
    runs: dict[str, Any] = {
        "full/corpus/30min": {
            "groups": corpus_transfer.loss_by_group(LOG),
            "missing": ["Dataset121_CHASEDB1, 2D"],
            "memory": {"peak_rss_gb": 4.2, "peak_pss_gb": 3.1, "samples": 1800},
            "iterations": 900,
            "train_wall_s": 1800.2,
        }
    }
    for arm, dice in (("corpus", 0.6), ("scratch", 0.5)):
        scores = {"mean": dice, "per_class": {"1": dice}, "cases": 16}
        runs[f"full/30min+4min/Dataset124_BUSI/seed1/{arm}"] = {"dice": scores, "iterations": 50, "configuration": "2d"}
    printed = corpus_transfer.report(runs, "full/corpus/30min", "full/30min+4min/")
    assert "RSS 4.200 (bar 4: NOT met); PSS 3.100" in printed
    assert "900 iterations in 1800 s; datasets" in printed and "does not show: Dataset121_CHASEDB1, 2D\n" in printed
    assert "Dataset124_BUSI: the corpus encoder helps: Dice +0.1000 (mean of 1 seed)" in printed
    assert corpus_transfer.report({}, "full/corpus/30min", "full/30min+4min/") == ""


# ------------------------------------------------------------------------------------------------------- memory
def test_descendants_are_found_at_any_depth():
    assert memory.descendants(1, {1: 0, 2: 1, 3: 2, 4: 3, 5: 0}) == [2, 3, 4]


def test_memory_is_read_from_proc(tmp_path):
    for pid, pages, pss in ((7, 10, 20), (8, 1, 4)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "statm").write_text(f"99 {pages} 3 0 0 0 0")
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a b) c) S {pid - 1} 0")
        (tmp_path / str(pid) / "smaps_rollup").write_text(f"Rss: 1 kB\nPss:   {pss} kB\nPss_Dirty: 9 kB\n")
    assert memory.parents(tmp_path) == {7: 6, 8: 7}
    assert memory.memory_of([7, 8, 9], tmp_path) == (11 * os.sysconf("SC_PAGE_SIZE"), 24 * 1024)


def test_peaks_of_a_killed_call_count(tmp_path, monkeypatch):
    (tmp_path / "memory.json").write_text(json.dumps({"rss_bytes": 2e9, "pss_bytes": 1e9, "samples": 5}))
    watch = memory.MemoryWatch(tmp_path / "memory.json")
    monkeypatch.setattr(memory, "parents", dict)
    monkeypatch.setattr(memory, "memory_of", lambda pids: (int(3e9), int(5e8)))
    watch.sample()
    assert watch.peaks() == {"peak_rss_gb": 3.0, "peak_pss_gb": 1.0, "samples": 6}
    assert json.loads((tmp_path / "memory.json").read_text())["rss_bytes"] == 3e9
    unwatched = memory.MemoryWatch(tmp_path / "other.json")
    with unwatched:
        pass
    assert unwatched.peaks() == {"peak_rss_gb": None, "peak_pss_gb": None, "samples": 0}
    assert not (tmp_path / "other.json").exists()


# ----------------------------------------------------------------------------------------------- residual errors
def line_of(*labels: int) -> np.ndarray:
    """A volume of one row of voxels."""
    return np.array(labels)[None, None, :]


def test_wrong_voxels_are_counted_by_kind_and_at_the_border():
    reference, predicted = line_of(0, 0, 0, 1, 1, 2, 2, 0), line_of(0, 1, 0, 1, 2, 2, 0, 2)
    found = residual_errors.kinds(predicted, reference)
    assert found == {"foreground": 4, "missed": 1, "added": 2, "confused": 1, "beside": 3}, "one is two voxels away"


def test_a_vote_is_the_label_of_most():
    cast = [line_of(0, 1, 2, 1), line_of(0, 1, 1, 2), line_of(1, 2, 2, 0)]
    assert residual_errors.vote(cast).tolist() == line_of(0, 1, 2, 0).tolist(), "of equally many the smallest"


def test_a_reference_moved_by_one_voxel_is_compared_with_itself():
    block = np.zeros((4, 4, 4), int)
    block[0, :, :2], block[0, :, 2:] = 1, 2  # 1 x 4 x 2 voxels each, at the border: nothing wraps around
    assert residual_errors.moved(block) == pytest.approx((0 + 3 / 4 + 1 / 2) / 3)


def test_trainings_are_held_against_the_reference_and_each_other():
    exact, shifted, lost = line_of(1, 1, 2, 2), line_of(1, 2, 2, 2), line_of(1, 0, 0, 0)
    references = {"a": exact, "b": line_of(1, 2, 0, 0), "c": exact}
    first = references | {"a": shifted, "c": shifted}
    other = {"a": shifted, "b": lost, "c": exact}
    found = residual_errors.compare(references, {"x": first, "y": first, "z": other})
    moved = (2 / 3 + 4 / 5) / 2
    assert found["trainings"]["x"]["dice"] == found["vote_dice"] == pytest.approx((2 * moved + 1) / 3)
    assert found["trainings"]["z"]["dice"] == pytest.approx((moved + 0.5 + 1) / 3)
    assert found["trainings"]["x"]["confused"] == 2 and found["trainings"]["x"]["foreground"] == 10
    assert found["pairs"]["x / y"] == {"dice": 1.0, "correlation": pytest.approx(1)}
    assert found["pairs"]["x / z"] == {
        "dice": pytest.approx((1 + 0.5 + moved) / 3),
        "correlation": pytest.approx(-0.846, abs=1e-3),
    }
    shown = residual_errors.report(found)
    assert "| x        | 0.8222 | 0.200                     | 0.00           | 0.00  | 1.00     | 1.00" in shown


def test_trainings_other_than_the_stored_ones_are_refused():
    name = next(iter(residual_errors.RUNS))
    stored = {residual_errors.key_of(name): {"dice": {"mean": 0.8}}}
    residual_errors.check_stored({name: {"dice": 0.8}}, stored)
    with pytest.raises(ValueError, match=r"Dice 0\.900000 for full/hippocampus.*one of 0\.800000; give the --work"):
        residual_errors.check_stored({name: {"dice": 0.9}}, stored)
    with pytest.raises(ValueError, match=r"accuracy\.json none"):
        residual_errors.check_stored({name: {"dice": 0.9}}, {})
