"""The journey with nnU-Net's own commands, as sub-processes, on one tiny dataset: plan, pre-train (killed and
continued), fine-tune, validate, predict, evaluate."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import synthetic
import torch
from workspace import NAME, Workspace, finish

pytestmark = pytest.mark.end_to_end

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
EPOCHS, ITERATIONS = 5, 12


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A planned and preprocessed dataset, and plans cut down to a tiny network and a training of seconds."""
    space = Workspace(tmp_path_factory.mktemp("journey"))
    synthetic.make_dataset(space.root / "raw", number=901, cases=5, test_cases=1, shape=(20, 24, 24))
    processes = ("-np", "1", "-npfp", "1")
    output = space.run(
        "nnUNetv2_plan_and_preprocess", "-d", "901", "-pl", "UMITPlanner", "-c", "3d_fullres", *processes
    )
    assert "nnUNetv2_train 901 3d_fullres all -tr UMITPretrainTrainer -p UMITPlans" in output
    path = space.root / "preprocessed" / NAME / "UMITPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"].update(TINY)
    configuration["umit"]["tokenizer"].update(dim=32, codes=16)
    for section in ("pretrain", "tokenizer", "finetune"):
        configuration["umit"][section].update(
            epochs=EPOCHS, iterations_per_epoch=ITERATIONS, val_iterations_per_epoch=2, drop_path=0.1
        )
    path.write_text(json.dumps(plans))
    return space


@pytest.fixture(scope="module")
def pretrained(workspace: Workspace) -> Path:
    """The folder of an unbroken pre-training."""
    workspace.train("UMITPretrainTrainer", "all")
    return workspace.fold("UMITPretrainTrainer", "all")


@pytest.fixture(scope="module")
def finetuned(workspace: Workspace, pretrained: Path) -> Path:
    """The folder of a fine-tuning from that pre-training."""
    source = str(pretrained / "checkpoint_final.pth")
    output = workspace.train("UMITTrainer", "0", "-pretrained_weights", source, "--npz")
    assert "100.0 % of the encoder" in output
    return workspace.fold("UMITTrainer", "0")


def test_pretraining_leaves_everything_behind(pretrained: Path) -> None:
    names = {file.name for file in pretrained.iterdir()}
    assert names >= {"checkpoint_final.pth", "encoder.safetensors", "card.json", "progress.png", "reconstructions.png"}
    assert "checkpoint_latest.pth" not in names
    summary = json.loads((pretrained / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 5


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_pretraining_continues_bit_for_bit(workspace: Workspace, pretrained: Path) -> None:
    arguments = ("901", "3d_fullres", "all", "-tr", "UMITPretrainTrainer", "-p", "UMITPlans", "-device", "cpu")
    process = workspace.start("nnUNetv2_train", *arguments, results="killed")
    folder = workspace.fold("UMITPretrainTrainer", "all", results="killed")
    read_until(process, r"\bEpoch 2\s*$")
    process.send_signal(signal.SIGKILL)
    finish(process, 60)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "checkpoint_final.pth").exists()
    output = workspace.train("UMITPretrainTrainer", "all", "--c", results="killed")
    assert re.search(r"continuing from .*: [1-4] of 5 epochs are done", output)

    broken, unbroken = (torch.load(each / "checkpoint_final.pth", weights_only=True) for each in (folder, pretrained))
    for curve in ("train_losses", "val_losses", "lrs", "ema_fg_dice"):
        assert broken["logging"][curve] == unbroken["logging"][curve]
        assert len(broken["logging"][curve]) == EPOCHS
    for name, value in unbroken["network_weights"].items():
        assert torch.equal(broken["network_weights"][name], value), name
    assert broken["umit"]["history"] == unbroken["umit"]["history"]


def read_until(process: subprocess.Popen, pattern: str) -> None:
    """Read the output of a command until a line matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"{pattern!r} did not appear:\n{''.join(lines)[-4000:]}")


def test_finetuning_validates(finetuned: Path) -> None:
    summary = json.loads((finetuned / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    assert {file.suffix for file in (finetuned / "validation").iterdir()} >= {".npz", ".pkl", ".gz", ".json"}
    stored = torch.load(finetuned / "checkpoint_final.pth", weights_only=True)
    assert stored["umit"]["transfer"]["fraction"] == 1.0
    assert len(stored["logging"]["train_losses"]) == EPOCHS


def test_validation_alone_gives_the_same_scores(workspace: Workspace, finetuned: Path) -> None:
    before = json.loads((finetuned / "validation" / "summary.json").read_text())
    for file in (finetuned / "validation").iterdir():
        file.unlink()
    workspace.train("UMITTrainer", "0", "--val", "--npz")
    after = json.loads((finetuned / "validation" / "summary.json").read_text())
    assert after["mean"] == before["mean"]
    assert list((finetuned / "validation").glob("*.npz"))


def test_predict_and_evaluate(workspace: Workspace, finetuned: Path) -> None:
    raw, output = workspace.root / "raw" / NAME, workspace.root / "predicted"
    workspace.run(
        "nnUNetv2_predict", "-i", str(raw / "imagesTs"), "-o", str(output), "-d", "901", "-c", "3d_fullres", "-f", "0",
        "-tr", "UMITTrainer", "-p", "UMITPlans", "-device", "cpu", "-npp", "0", "-nps", "0",
    )  # fmt: skip
    image = sitk.ReadImage(str(raw / "imagesTs" / "test_000_0000.nii.gz"))
    label = sitk.ReadImage(str(output / "test_000.nii.gz"))
    assert label.GetSize() == image.GetSize() and label.GetSpacing() == image.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(label))) <= {0, 1, 2}
    workspace.run(
        "nnUNetv2_evaluate_folder", str(raw / "labelsTs"), str(output), "-djfile", str(output / "dataset.json"),
        "-pfile", str(output / "plans.json"), "-np", "1",
    )  # fmt: skip
    assert "foreground_mean" in json.loads((output / "summary.json").read_text())


def test_a_checkpoint_of_another_trainer_is_not_continued(workspace: Workspace, pretrained: Path) -> None:
    folder = workspace.fold("UMITTrainer", "1")
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").write_bytes((pretrained / "checkpoint_final.pth").read_bytes())
    output = workspace.train("UMITTrainer", "1", "--c", fails=True)
    assert "written by UMITPretrainTrainer and cannot be continued by UMITTrainer" in output


def test_soft_tokens(workspace: Workspace) -> None:
    """Tokenizer, then masked soft tokens with the tokenizer as -pretrained_weights."""
    output = workspace.train("UMITTokenizerTrainer", "all")
    assert re.search(r"over all 5 cases: perplexity \d+\.\d of 16", output)
    source = workspace.fold("UMITTokenizerTrainer", "all") / "checkpoint_final.pth"
    output = workspace.train("UMITSoftTokenPretrainTrainer", "all", "-pretrained_weights", str(source))
    assert f"tokenizer: {source}" in output
    folder = workspace.fold("UMITSoftTokenPretrainTrainer", "all")
    stored = torch.load(folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    wanted = torch.load(source, weights_only=True)["network_weights"]
    names = [name for name in wanted if name.startswith("tokenizer.")]
    assert names and all(torch.equal(stored[name], wanted[name]) for name in names)
    assert (folder / "encoder.safetensors").is_file()
