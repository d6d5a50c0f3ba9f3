"""What the benchmarks that train ask for, in which order, and what they do not ask for again.

Trainings and commands are replaced; files, splits, scores and results are real.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from benchmarks import (
    accuracy,
    common,
    corpus_transfer,
    equal_time,
    label_efficiency,
    native_spacing,
    predict,
    prediction,
    pretraining_methods,
    spacing_robustness,
    tokenizer,
)
from benchmarks.common import Results
from nnunet_umit.plans.corpus import Corpus, Source

DATASETS = ("Dataset004_Hippocampus", "Dataset027_ACDC", "Dataset124_BUSI")


class Machine:
    """Stands in for sub-processes; remembers what was asked of it. ``answer`` is what a command does."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.prepared: list[Any] = []
        self.trained: list[tuple[Any, ...]] = []
        self.values: list[Any] = []
        self.weights: list[str | None] = []
        self.labelled: list[int] = []
        self.commands: list[list[str]] = []
        self.answer: Callable[[Any, list[str], Path], object]
        monkeypatch.setenv("UMIT_DATA", str(root / "data"))
        replaced = {"prepare": self.prepare, "stage": self.stage, "call": self.call}
        for name, method in replaced.items():
            monkeypatch.setattr(
                equal_time.Bench, name, lambda bench, *given, method=method, **named: method(bench, *given, **named)
            )

    def prepare(self, bench: Any, wanted: Any) -> None:
        self.prepared.append(wanted)

    def stage(self, bench: Any, folder: Path, name: str, trainer: str, plans: str, seconds: float, **named: Any) -> Any:
        weights = bool(named.get("pretrained_weights"))
        if not self.prepared and bench.fold != "all":
            split = json.loads((bench.base / "splits_final.json").read_text())[bench.fold]
            self.labelled.append(len(split["train"]))
        self.values.append(named.get("values"))
        self.trained.append((bench.dataset, bench.configuration, bench.seed, trainer, plans, seconds, weights))
        copy = equal_time.plans_copy(plans, folder)
        fold = folder / bench.dataset / f"{trainer}__{copy}__{bench.configuration}" / f"fold_{bench.fold}"
        fold.mkdir(parents=True)
        (fold / "checkpoint_final.pth").touch()
        (fold / "training_log_1.txt").write_text("x: Epoch 0 \nx: masked loss, Dataset001_A, 2D: 1.0 (3 samples) \n")
        dice = {"mean": 0.5, "per_class": {"1": 0.5}, "cases": 2}
        report: dict[str, Any] = {"iterations": 3, "batch_size": 4, "wall_s": 1.0, "cpu_s": 2.0}
        report["checkpoint"] = str(fold / "checkpoint_final.pth")
        report["kept"] = [{"wall_s": at, "checkpoint": f"{at:.0f}"} for at in named.get("keep_at_s", [])]
        self.weights.append(named.get("pretrained_weights"))
        pooled = {"perplexity": 64.0, "codes_used": 90.0, "entropy": 0.5}
        figures = {"mean": {"psnr": 25.0, "ssim": 0.8, "masked_loss": 0.75}, "pooled": pooled, "cases": 2}
        if named.get("validate"):
            scored = trainer.endswith("UMITTrainer") or name == "stock"
            report |= {"dice": dice} if scored else {"figures": figures}
        (folder / f"{name}.report.json").write_text(json.dumps(report))
        return report

    def call(self, bench: Any, command: list[str], folder: Path, accepted: Any = (0,)) -> int:
        self.commands.append(command)
        self.answer(bench, command, folder)
        return 0

    def main(self, benchmark: Any, *arguments: str) -> None:
        folders = ["--results", str(self.root / "results"), "--work", str(self.root / "work")]
        benchmark.main(["--full", *folders, *arguments])

    def runs(self, name: str) -> dict[str, Any]:
        return Results(name, "", self.root / "results").runs


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Small data, and no sub-process."""
    for dataset in DATASETS:
        folder = tmp_path / "data" / dataset
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        (folder / "dataset.json").write_text("{}")
        split = {"train": [f"t{number}" for number in range(12)], "val": ["b", "a"]}
        (tmp_path / "data" / "splits").mkdir(exist_ok=True)
        (tmp_path / "data" / "splits" / f"{dataset}.json").write_text(json.dumps([split, split]))
        label = np.broadcast_to(np.array([0, 1, 1, 2, 2], np.uint8), (4, 6, 5))
        for case in split["val"]:
            nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"{case}.nii.gz")
            image = nibabel.Nifti1Image(label.astype(np.float32), np.eye(4))
            nibabel.save(image, folder / "imagesTr" / f"{case}_0000.nii.gz")
    return Machine(tmp_path, monkeypatch)


def test_native_spacing_trains_every_arm_and_seed_once_and_times_predictions_in_turn(machine, monkeypatch, capsys):
    seconds = itertools.count(1.0)
    monkeypatch.setattr(prediction, "child_cpu_s", lambda: next(seconds))

    def predict(bench: Any, command: list[str], folder: Path) -> None:
        images, output = (Path(command[command.index(word) + 1]) for word in ("-i", "-o"))
        output.mkdir()
        for image in images.iterdir():
            (output / image.name.replace("_0000", "")).touch()

    machine.answer = predict
    machine.main(native_spacing, "--seed", "1")
    machine.main(native_spacing)
    trained = [("Dataset027_ACDC", arm, seed, "UMITTrainer", "UMITPlans", 900.0, False) for seed in (1, 2)
               for arm in native_spacing.ARMS]  # fmt: skip
    assert machine.trained == trained
    assert machine.prepared == [{"UMITPlans": native_spacing.ARMS}] * 2
    order = [command[command.index("-c") + 1] for command in machine.commands]
    native, resampled = native_spacing.ARMS
    assert order == [native, resampled] * 2 + [resampled, native] + [native, resampled]
    assert {"--disable_tta", "cpu"} <= set(machine.commands[0])
    expected = [f"seed1/{last}" for last in (*native_spacing.ARMS, "predict/1", "predict/2", "predict/3")]
    expected += [f"seed2/{arm}" for arm in native_spacing.ARMS]
    assert list(machine.runs("native_spacing")) == [f"full/fold0/15min/{key}" for key in expected]
    assert machine.runs("native_spacing")["full/fold0/15min/seed1/predict/1"]["cases"] == 2
    assert str(machine.root) not in (machine.root / "results" / "native_spacing.json").read_text()
    assert "+0.000 (+0.000 / +0.000; bar -0.005: met)" in capsys.readouterr().out


def test_a_prediction_that_left_images_out_is_no_timing(machine):
    machine.answer = lambda bench, command, folder: Path(command[command.index("-o") + 1]).mkdir()
    with pytest.raises(RuntimeError, match="wrote 0 of 2 files"):
        machine.main(native_spacing, "--seed", "1")
    assert list(machine.runs("native_spacing")) == [f"full/fold0/15min/seed1/{arm}" for arm in native_spacing.ARMS]


def test_robustness_scores_every_arm_on_every_thickness(machine, capsys):
    def predict(bench: Any, command: list[str], folder: Path) -> None:
        for images, output in json.loads(Path(command[-1]).read_text())["folders"]:
            Path(output).mkdir(parents=True)
            for file in Path(images).iterdir():
                image = nibabel.Nifti1Image.from_filename(file)
                found = np.floor(np.asarray(image.dataobj) + 0.5).astype(np.uint8)
                name = file.name.replace("_0000", "")
                nibabel.save(nibabel.Nifti1Image(found, image.affine), Path(output) / name)
                hot = np.stack([(found == value).astype(np.float32) for value in range(3)])
                np.savez(Path(output) / name.replace(".nii.gz", ".npz"), probabilities=hot.transpose(0, 3, 2, 1))

    machine.answer = predict
    machine.main(spacing_robustness, "--arm", "primus_s")
    machine.main(spacing_robustness)
    machine.main(spacing_robustness)
    assert machine.prepared == [{"nnUNetPlans": ["3d_fullres"]}, {"UMITPlans": ["3d_native", "3d_fullres"]}]
    assert [row[1:5] for row in machine.trained] == [
        ("3d_fullres", 1, "nnUNet_Primus_S_Trainer", "nnUNetPlans"),
        ("3d_native", 1, "UMITTrainer", "UMITPlans"),
        ("3d_fullres", 1, "UMITTrainer", "UMITPlans"),
    ]
    scores = machine.runs("spacing_robustness")["full/fold0/15min/seed1/umit_native/thick"]["scores"]
    perfect = {"mean": 1.0, "per_class": {"1": 1.0, "2": 1.0}, "cases": 2}
    assert scores["1mm"] == perfect | {"repeated": perfect}
    assert scores["2mm_x"]["mean"] == 1.0, "the label does not change along x"
    # slices 0 1 1 2 2 along z become (0 1) (1 2) (2 2), are predicted as 1 2 2, and come back as 1 1 2 2 2
    assert scores["2mm_z"]["repeated"]["per_class"] == {"1": 0.5, "2": 0.8}
    assert len(scores) == 13 and (machine.root / "results" / "spacing_robustness.png").is_file()
    assert "thick grid" in capsys.readouterr().out


def test_the_corpus_is_built_once_and_fine_tuned_with_and_without(machine, monkeypatch, capsys):
    monkeypatch.setattr(corpus_transfer, "DATASETS", (4, 27, 124))

    def answer(bench: Any, command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("9 imported, 0 quarantined\n")
        bench.base.mkdir(parents=True, exist_ok=True)
        if command[1] == "import":
            (bench.raw / "Dataset901_Extra").mkdir()
            (bench.raw / "Dataset901_Extra" / "dataset.json").write_text("{}")
        if command[1] == "corpus":
            home = bench.base / "UMITPlans_3d_native"
            home.mkdir()
            corpus = Corpus(1, [Source("Dataset001_A", "x", 1.0, [], "")], root=home)
            for spacing in ((999.0, 1.0, 1.0), (1.0, 1.0, 1.0)):
                corpus.add(0, "a", 1, False, spacing, (1, 5, 5))
            corpus.write(home)
            plans = {"configurations": {"3d_native": {"umit": {"size": "S"}}}}
            (bench.base / "UMITPlans.json").write_text(json.dumps(plans))

    machine.answer = answer
    machine.main(corpus_transfer)
    machine.main(corpus_transfer)
    typed = [command[1:] for command in machine.commands]
    assert typed[1] == ["corpus", *"-d 4 -d 27 -d 124 -d 901 --id 900 --name Corpus".split()]
    assert [words[:4] for words in typed[2:]] == [["-d", str(n), "-pl", "UMITPlannerS"] for n in (4, 27, 124)]
    assert machine.trained[0] == (
        "Dataset900_Corpus", "3d_native", 1, "UMITPretrainTrainer", "UMITPlans", 1800.0, False,
    )  # fmt: skip
    assert len(machine.trained) == 1 + 3 * 2 * 2
    assert machine.trained[1][3:] == ("UMITTrainer", "UMITPlansS", 240.0, True) and not machine.trained[2][-1]
    runs = machine.runs("corpus_transfer")
    assert runs["full/corpus"]["commands"][0].startswith("umit import DATA/unlabelled_extra --dataset 901 --name Extra")
    assert runs["full/corpus/30min"]["missing"] == ["Dataset001_A, level 0"]
    split = machine.root / "work" / "corpus_transfer" / "nnUNet_preprocessed" / "Dataset124_BUSI" / "splits_final.json"
    assert json.loads(split.read_text()) == [{"train": [f"t{n}" for n in range(10)], "val": ["a", "b"]}]
    assert str(machine.root) not in (machine.root / "results" / "corpus_transfer.json").read_text()
    assert "Dataset124_BUSI: no difference to speak of" in capsys.readouterr().out


def test_tokenizers_are_compared_over_three_seeds(machine, monkeypatch, capsys):
    monkeypatch.setattr(equal_time.Bench, "umit_value", lambda *given: 256)
    machine.main(tokenizer)
    machine.main(tokenizer)
    compared = [(mode, seed, 360.0) for seed in (1, 2, 3) for mode in tokenizer.MODES]
    assert machine.values == [{"tokenizer.quantiser": mode} for mode in ("soft", *(each[0] for each in compared))]
    assert [(each[2], each[5]) for each in machine.trained] == [(1, 1200.0), *(each[1:] for each in compared)]
    assert {each[3] for each in machine.trained} == {"UMITTokenizerTrainer"}
    assert len(machine.runs("tokenizer")) == 10
    printed = capsys.readouterr().out
    assert "perplexity as a share of the codebook: 0.250 (bar 0.5: NOT met)" in printed
    assert "codes_used, mean over 3 seed(s): soft 90.00, nearest 90.00 (met)" in printed
    runs = machine.runs("tokenizer")
    for mode, codes in (("soft", 10.0), ("gumbel", 80.0)):
        runs[f"full/fold0/6min/seed1/{mode}"]["figures"]["pooled"]["codes_used"] = codes
    del runs["full/fold0/6min/seed1/gumbel"]
    lines = tokenizer.verdicts(runs, "", "full/fold0/6min/")
    assert "codes_used, mean over 2 seed(s): soft 90.00, gumbel 90.00 (met)" in lines, "the seeds that both have"
    assert "codes_used, mean over 3 seed(s): soft 63.33, nearest 90.00 (NOT met)" in lines


def test_every_method_pretrains_once_and_is_finetuned_with_every_seed(machine, capsys):
    machine.answer = lambda bench, command, folder: None
    machine.main(pretraining_methods)
    machine.main(pretraining_methods)
    first = [each for each in machine.trained if each[3] != "UMITTrainer"]
    tokenizer_s, soft_s = pytest.approx(480.0), pytest.approx(720.0)
    for dataset, trained in zip(DATASETS[:2], (first[:3], first[3:]), strict=True):
        assert trained == [
            (dataset, "3d_fullres", 1, "UMITPretrainTrainer", "UMITPlans", 1200.0, False),
            (dataset, "3d_fullres", 1, "UMITTokenizerTrainer", "UMITPlans", tokenizer_s, False),
            (dataset, "3d_fullres", 1, "UMITSoftTokenPretrainTrainer", "UMITPlans", soft_s, False),
        ]
    tuned = [each for each in machine.trained if each[3] == "UMITTrainer"]
    assert len(tuned) == 3 * 2 * 4 and sum(each[-1] for each in tuned) == 3 * 2 * 2
    assert sorted({each[5] for each in tuned}) == [300.0, 1500.0]
    runs = machine.runs("pretraining_methods")
    assert runs["full/fold0/20min+5min/Dataset004_Hippocampus/all/seed2/mae"]["labelled"] == 12
    assert str(machine.root) not in (machine.root / "results" / "pretraining_methods.json").read_text()
    assert (machine.root / "results" / "pretraining_methods.png").stat().st_size > 0
    assert "Dataset027_ACDC/10" in capsys.readouterr().out
    trained = len(machine.trained)
    machine.main(pretraining_methods, "--again", "--arm", "mae", "--dataset", "27")
    again = [each[3] for each in machine.trained[trained:]]
    assert again == ["UMITPretrainTrainer", "UMITTrainer", "UMITTrainer"], "one pre-training for both seeds"


def test_finetunings_are_tuned_on_another_fold_from_one_pretraining(machine, capsys):
    machine.answer = lambda bench, command, folder: None
    tuned = ("--dataset", "27", "--arm", "mae", "--seed", "1", "--validation-fold", "1")
    machine.main(pretraining_methods, *tuned)
    machine.main(pretraining_methods, *tuned, "--set", "finetune.layer_decay=0.75", "--tag", "decay75")
    assert [each[3] for each in machine.trained] == ["UMITPretrainTrainer", "UMITTrainer", "UMITTrainer"]
    assert machine.weights[1] == machine.weights[2] and machine.weights[1] is not None
    prefix = "full/fold1/20min+5min/Dataset027_ACDC/"
    runs = machine.runs("pretraining_methods")
    assert set(runs) == {f"{prefix}mae", f"{prefix}10/seed1/mae", f"{prefix}10/seed1/mae+decay75"}
    machine.main(pretraining_methods, *tuned, "--labelled", "5")
    runs = machine.runs("pretraining_methods")
    assert len(machine.trained) == 4 and runs[f"{prefix}5/seed1/mae"]["labelled"] == 5
    assert machine.labelled == [12, 10, 10, 5], "cases of fold 1 where nnU-Net looks for them"
    assert runs[f"{prefix}10/seed1/mae+decay75"]["umit_values"] == {"finetune.layer_decay": 0.75}
    assert "mae+decay75" in capsys.readouterr().out
    assert not (machine.root / "results" / "pretraining_methods.png").exists(), "the picture is of fold 0"
    with pytest.raises(SystemExit):
        machine.main(pretraining_methods, "--set", "finetune.layer_decay=1")
    assert "--tag" in capsys.readouterr().err


def test_a_pretraining_with_values_of_its_own_shares_none(machine, capsys):
    machine.answer = lambda bench, command, folder: None
    tuned = ("--dataset", "27", "--arm", "mae", "--seed", "1", "--validation-fold", "1")
    machine.main(pretraining_methods, *tuned)
    own = (*tuned, "--set", "pretrain.mask_ratio=0.5", "--set", "finetune.layer_decay=0.75", "--tag", "half")
    machine.main(pretraining_methods, *own)
    machine.main(pretraining_methods, *own)
    assert [each[3] for each in machine.trained] == ["UMITPretrainTrainer", "UMITTrainer"] * 2
    assert machine.weights[1] != machine.weights[3] and machine.weights[3] is not None
    prefix = "full/fold1/20min+5min/Dataset027_ACDC/"
    runs = machine.runs("pretraining_methods")
    assert set(runs) == {f"{prefix}{name}{tag}" for name in ("mae", "10/seed1/mae") for tag in ("", "+half")}
    assert runs[f"{prefix}mae+half"]["umit_values"] == {"pretrain.mask_ratio": 0.5, "finetune.layer_decay": 0.75}
    assert runs[f"{prefix}mae"]["umit_values"] == {}
    assert "mae+half" in capsys.readouterr().out
    other = ("--minutes", "10", "--set", "finetune.layer_decay=0.75", "--tag", "decay75")
    machine.main(pretraining_methods, *tuned, *other)
    shared = machine.runs("pretraining_methods")["full/fold1/10min+5min/Dataset027_ACDC/mae"]
    assert shared["umit_values"] == {}, "fine-tunings with other values share it"


def test_accuracy_gives_umit_three_seeds_and_every_other_arm_one(machine, capsys):
    machine.main(accuracy)
    machine.main(accuracy, "--task", "acdc", "--arm", "primus_s")
    stock = {"nnUNetPlans": ["3d_fullres"]}
    assert machine.prepared == [
        stock | {"UMITPlans": ["3d_fullres"], "nnUNetResEncUNetMPlans": ["3d_fullres"]}, stock
    ]  # fmt: skip
    trainings = [(each[2], each[3], each[4], each[5]) for each in machine.trained]
    assert trainings == [
        (1, "UMITTrainer", "UMITPlans", 1200.0),
        (1, "nnUNetTrainer", "nnUNetPlans", 1200.0),
        (1, "nnUNetTrainer", "nnUNetResEncUNetMPlans", 1200.0),
        (1, "nnUNet_Primus_S_Trainer", "nnUNetPlans", 1200.0),
        (1, "UMITPretrainTrainer", "UMITPlans", 360.0),
        (1, "UMITTrainer", "UMITPlans", 840.0),
        (2, "UMITTrainer", "UMITPlans", 1200.0),
        (3, "UMITTrainer", "UMITPlans", 1200.0),
        (1, "nnUNet_Primus_S_Trainer", "nnUNetPlans", 1800.0),
    ]
    assert "full/acdc/fold0/30min/seed1/primus_s" in machine.runs("accuracy")
    assert str(machine.root) not in (machine.root / "results" / "accuracy.json").read_text()
    assert "mean of 3" in capsys.readouterr().out


def test_labels_are_counted_with_one_pretraining_and_its_early_encoders(machine, monkeypatch, capsys):
    machine.answer = lambda bench, command, folder: None
    monkeypatch.setattr(label_efficiency, "LABELLED", (5, 10, 12))
    machine.main(label_efficiency, "--arm", "scratch", "--labelled", "10", "--seed", "2")
    assert [(each[2], each[3], each[-1]) for each in machine.trained] == [(2, "UMITTrainer", False)]
    machine.main(label_efficiency)
    machine.main(label_efficiency)
    assert [each[5] for each in machine.trained if each[3] == "UMITPretrainTrainer"] == [3600.0]
    tuned = [each for each in machine.trained if each[3] == "UMITTrainer"]
    assert len(tuned) == 3 * 3 * 2 + 2 and {each[5] for each in tuned} == {300.0}
    assert [each for each in machine.weights if each is not None][3:5] == ["600", "1800"], "after the claim's seeds"
    runs = machine.runs("label_efficiency")
    early = runs["full/fold0/60min+5min/10/seed1/pretrained@10min"]
    assert early["pretrained_minutes"] == 10 and early["labelled"] == 10
    assert str(machine.root) not in (machine.root / "results" / "label_efficiency.json").read_text()
    printed = capsys.readouterr().out
    assert "3 seed(s): 0.000 (bar 0.03: NOT met); the seeds OVERLAP. The pre-trained arm had 60 more min" in printed
    del runs["full/fold0/60min+5min/10/seed3/pretrained"]
    runs["full/fold0/60min+5min/10/seed3/scratch"]["dice"]["mean"] = 0.9
    assert "2 seed(s): 0.000" in label_efficiency.report(runs, "full/fold0/60min+5min/"), "the seeds that both have"
    assert "masked loss on 2 unseen cases: 0.750 (bar 0.8: met)" in printed


def test_a_pretraining_whose_weights_are_gone_is_not_silently_made_again(machine):
    machine.answer = lambda bench, command, folder: None
    machine.main(label_efficiency, "--labelled", "10", "--seed", "1")
    trained = len(machine.trained)
    shutil.rmtree(machine.root / "work" / "runs")
    with pytest.raises(FileNotFoundError, match=r"checkpoint_final\.pth is gone, but the results need it"):
        machine.main(label_efficiency, "--labelled", "5", "--seed", "1", "--arm", "pretrained")
    assert len(machine.trained) == trained


@pytest.mark.parametrize(
    ("benchmark", "options", "named"),
    [
        (pretraining_methods, ("--tokenizer-share", "0.6", "--arm", "scratch"), "{'tokenizer_share': 0.6}"),
        (label_efficiency, ("--threads", "1", "--arm", "scratch", "--labelled", "10"), "{'threads': 1}"),
        (accuracy, ("--validation-cases", "6", "--arm", "umit_scratch"), "{'validation_cases': 6}"),
    ],
)
def test_a_result_of_other_options_is_not_taken_for_done(machine, benchmark, options, named):
    machine.answer, chosen = lambda bench, command, folder: None, options[2:]
    machine.main(benchmark, *chosen)
    with pytest.raises(ValueError, match=f"the default options, and now {named} are asked for; give another --results"):
        machine.main(benchmark, *options)


def test_predictions_of_all_arms_are_timed_in_turn(machine, monkeypatch, capsys):
    patches: dict[str, list[int]] = {}

    def write_new_model(base: Path, model: Path, trainer: str, plans: Any) -> int:
        patches[trainer] = plans["configurations"]["3d_fullres"]["patch_size"]
        assert plans["plans_name"] in model.name, "nnU-Net finds the model by the name of its plans"
        return 1_000_000

    monkeypatch.setattr(predict, "write_new_model", write_new_model)
    start = dict.fromkeys((*predict.STARTS, *predict.INSIDE), {"median": 5.0, "min": 4.0, "max": 6.0})
    monkeypatch.setattr(predict, "starts", lambda repeats: {"ms": start})
    seconds = itertools.count(1.0)
    monkeypatch.setattr(prediction, "child_cpu_s", lambda: next(seconds))
    base = machine.root / "work" / "nnUNet_preprocessed" / common.DATASET
    base.mkdir(parents=True)
    for _, plans in predict.ARMS.values():
        planned = {"configurations": {"3d_fullres": {"patch_size": [14, 32, 24]}}}
        (base / f"{plans}.json").write_text(json.dumps(planned))

    def answer(bench: Any, command: list[str], folder: Path) -> None:
        images, output = (Path(command[command.index(word) + 1]) for word in ("-i", "-o"))
        output.mkdir(parents=True)
        for image in images.iterdir():
            (output / image.name.replace("_0000", "")).touch()
        if "benchmarks.timed_predict" in command:
            Path(command[3]).write_text(json.dumps(dict.fromkeys(predict.PARTS, 2.0)))

    machine.answer = answer
    machine.main(predict, "--dataset", common.DATASET)
    ends = [command[command.index("-tr") + 1] for command in machine.commands if "1" == command[-1]]
    first, second, third = (trainer for trainer, _ in predict.ARMS.values())
    warm, one, two = [third, first, second], [first, second, third], [second, third, first]
    assert ends == warm + one + two + [third, first, second]
    assert [patches[each] for each in (first, second, third)] == [[14, 32, 24], [16, 32, 24], [14, 32, 24]]
    run = machine.runs("predict")[f"full/{common.DATASET}/threads2"]
    assert run["cases"] == 2 and run["arms"]["UMIT"]["parts_s"]["network"]["median"] == 2.0
    assert "hook alone, ms: 5.000 (bar 1: NOT met)" in capsys.readouterr().out
