"""A benchmark that trains, from planning to Dice, on a data set of five small volumes: what makes the figures runs."""

import json
import shutil
from pathlib import Path

import pytest
import synthetic

from benchmarks import accuracy
from benchmarks.common import DATASET, Results

pytestmark = pytest.mark.end_to_end
CASES = [f"case_{index:03d}" for index in range(5)]


def test_seeds_weights_and_values_reach_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = DATASET.removeprefix("Dataset004_")
    made = synthetic.make_dataset(tmp_path / "data", number=4, name=name, shape=(20, 24, 24))
    assert made.name == DATASET
    (tmp_path / "data" / "splits").mkdir()
    (tmp_path / "data" / "splits" / f"{DATASET}.json").write_text(json.dumps([{"train": CASES[:3], "val": CASES[3:]}]))
    monkeypatch.setenv("UMIT_DATA", str(tmp_path / "data"))
    shared = ["--quick", "--minutes", "0.02", "--threads", "1"]
    shared += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    accuracy.main([*shared, "--arm", "umit_shared", "--seed", "1", "--seed", "2"])
    values = ["--set", "finetune.augmentation=none", "--tag", "plain"]
    accuracy.main([*shared, "--arm", "umit_scratch", "--seed", "1", *values])

    runs = Results("accuracy", "", tmp_path / "results").runs
    prefix = "quick/hippocampus/fold0/0.02min/"
    one, other = (runs[f"{prefix}seed{seed}/umit_shared"]["stages"] for seed in (1, 2))
    for pretraining, finetuning in (one, other):
        assert pretraining["trainer"] == "UMITPretrainTrainer" and finetuning["trainer"] == "UMITTrainer"
        assert finetuning["arrived"] == 1.0, "all of the encoder"
        assert finetuning["dice"]["cases"] == 2 and 0 <= finetuning["dice"]["mean"] <= 1
    for stage in (0, 1):
        assert one[stage]["train_losses"][0] != other[stage]["train_losses"][0], "seeds have weights of their own"
    (plain,) = runs[f"{prefix}seed1/umit_scratch+plain"]["stages"]
    assert plain["augmentation"] == "none" != one[1]["augmentation"] and "arrived" not in plain
    shutil.rmtree(tmp_path / "work")
