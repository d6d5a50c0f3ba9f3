"""The benchmarks' own arithmetic, bookkeeping and smallest runs. No data, no sub-process, seconds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    common,
    timing,
    transfer_matrix,
)
from benchmarks.common import Results
from benchmarks.timing import Sample


# ------------------------------------------------------------------------------------------------------ timing
def test_every_repeat_runs_every_arm_once_and_the_first_arm_rotates():
    calls: list[str] = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleaved(arms, repeats=3, warmup=1)
    assert calls[:3] == ["a", "b", "c"]
    assert calls[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(("arms", "repeats"), [({}, 3), ({"a": list}, 0)])
def test_timing_nothing_is_refused(arms, repeats):
    with pytest.raises(ValueError, match="at least one arm and one repeat"):
        timing.interleaved(arms, repeats)


def test_wall_and_cpu_seconds_come_from_their_own_clocks(monkeypatch):
    wall, cpu = iter([10.0, 12.5]), iter([3.0, 3.25])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(cpu))
    assert timing.timed(lambda: None) == Sample(wall=2.5, cpu=0.25)


def test_spread_and_paired_ratio():
    assert timing.spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0}
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0])["q3"] == 4.0
    slow = [Sample(wall=2.0, cpu=4.0), Sample(wall=20.0, cpu=40.0)]
    fast = [Sample(wall=1.0, cpu=1.0), Sample(wall=10.0, cpu=10.0)]
    assert timing.paired_ratio(fast, slow)["cpu"]["median"] == 0.25, "the noisy repeat cancels within its pair"
    with pytest.raises(ValueError, match="not paired: 2 samples against 1"):
        timing.paired_ratio(fast, slow[:1])


def test_provenance_names_versions_but_no_host_and_no_path():
    text = json.dumps(common.provenance())
    assert torch.__version__.split("+")[0] in text
    assert str(common.REPOSITORY) not in text
    assert set(common.machine()) == {"cpu", "cores_available", "memory_gib", "system", "load_average_1min"}


# ----------------------------------------------------------------------------------------------------- results
def test_results_are_continued_and_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    results = Results("name", "claim", tmp_path, {"planner": "UMITPlannerS"})
    typed = ["benchmark", "--full", "--work", "/scratch", "--results=/there", "--seed", "2", "--plans", "A=/b/c.json"]
    monkeypatch.setattr(sys, "argv", typed)
    results.put("one", {"value": 1}, {"cases": 2})
    with pytest.raises(TypeError):
        results.put("two", {"value": object()})
    again = Results("name", "claim", tmp_path, {"planner": "UMITPlannerS"})
    settings = {"planner": "UMITPlannerS", "cases": 2}
    one = {"value": 1, "options": ["--full", "--seed", "2", "--plans", "A=c.json"], "settings": settings}
    assert again.runs == {"one": one} and again.get("one", {"cases": 2}) == one and again.get("two") is None
    with pytest.raises(ValueError, match=r"has one with {.*'cases': 2}, and now {'planner': 'UMITPlannerS'} are asked"):
        again.get("one")
    with pytest.raises(ValueError, match=r"has one with {.*'cases': 2}, and now the default options are asked for"):
        Results("name", "claim", tmp_path).get("one")
    again.put("three", {"value": 3})
    assert json.loads((tmp_path / "name.json").read_text())["runs"].keys() == {"one", "three"}


def test_what_is_left_to_run(tmp_path):
    Results("name", "claim", tmp_path).put("one", {}, {"cases": 2})
    results = Results("name", "claim", tmp_path)
    assert not results.left("one", {"cases": 2}) and results.left("two")
    with pytest.raises(ValueError, match="give another --results folder"):
        results.left("one")
    options = argparse.Namespace(results=str(tmp_path), again=True)
    repeated = Results.of(options, "name", "claim")
    assert repeated.left("one")
    repeated.put("one", {"value": 2})
    assert not repeated.left("one") and repeated.left("two"), "made in this invocation"


def test_a_tag_stands_for_one_set_of_values(tmp_path):
    results = Results("name", "claim", tmp_path)
    results.put("older", {})
    results.put("one+a", {"umit_values": {"finetune.learning_rate": 0.002}})
    assert not results.left("one+a", values={"finetune.learning_rate": 0.002})
    assert not results.left("older", values={"finetune.learning_rate": 0.004}), "it does not tell"
    for values in ({"finetune.learning_rate": 0.004}, {}):
        with pytest.raises(ValueError, match=r"one\+a with .*0\.002.*give another --tag"):
            results.left("one+a", values=values)


def test_what_another_process_stored_meanwhile_is_kept(tmp_path):
    one, other = Results("name", "claim", tmp_path), Results("name", "claim", tmp_path)
    one.put("of one", {})
    other.put("of the other", {})
    assert Results("name", "claim", tmp_path).runs.keys() == {"of one", "of the other"}


def test_options_of_no_key_are_those_that_are_not_the_defaults():
    options_parser = common.parser("A benchmark.")
    options = options_parser.parse_args(["--quick", "--threads", "1"])
    assert common.unusual(options_parser, options, "threads", "again") == {"threads": 1}
    options.set = [("pretrain.tokenizer", "/somewhere/checkpoint_final.pth"), ("pretrain.mask_ratio", 0.5)]
    assert common.umit_values(options) == {"pretrain.tokenizer": "checkpoint_final.pth", "pretrain.mask_ratio": 0.5}


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "name.json").write_text("{}")
    with pytest.raises(ValueError, match="not a benchmark result"):
        Results("name", "claim", tmp_path)


def test_table_is_aligned():
    lines = common.table(["a", "long head"], [[0.123456, None], ["text", 3]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "0.1235" in lines[2] and "| -" in lines[2]


def test_data_are_found_or_the_error_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "REPOSITORY", tmp_path / "a" / "b")
    monkeypatch.setenv("UMIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Set UMIT_DATA"):
        common.data_root()
    (tmp_path / common.DATASET).mkdir()
    (tmp_path / common.DATASET / "dataset.json").write_text("{}")
    assert common.data_root() == tmp_path.resolve()


# ---------------------------------------------------------------------------------------------------- transfer
def test_quick_transfer_matrix_is_complete_and_refusals_are_cells(tmp_path, capsys):
    transfer_matrix.main(["--quick", "--results", str(tmp_path)])
    assert "met)" in capsys.readouterr().out
    cells = Results("transfer_matrix", "claim", tmp_path).get("quick")["cells"]
    assert len(cells) == 4 and all(len(row) == 4 for row in cells.values())
    assert min(cell["fraction"] for row in cells.values() for cell in row.values()) >= 0.99

    checkpoints, networks = transfer_matrix.quick_networks(tmp_path / "encoders")
    wide: Any = transfer_matrix.functools.partial(networks["isotropic"].func, 1, 3, **networks["isotropic"].keywords)
    wide.keywords["embed_dim"] = 96
    refused = transfer_matrix.cross({"2D": checkpoints["2D"]}, {"wide": wide})["2D"]["wide"]
    assert refused["fraction"] == 0.0 and str(tmp_path) not in refused["error"]


def test_the_network_of_a_plans_file_needs_its_dataset(tmp_path):
    plans = Path(tmp_path) / "UMITPlans.json"
    plans.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing"):
        transfer_matrix.network_of(f"{plans}:2d")


def test_named_arguments():
    assert transfer_matrix.named("a=b=c") == ("a", "b=c")
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=PATH"):
        transfer_matrix.named("path")
