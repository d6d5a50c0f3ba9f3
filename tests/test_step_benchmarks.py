"""The benchmarks of single steps, predictions and growth: their networks, losses, sizes and bookkeeping."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    arithmetic,
    demo,
    finetune_step,
    gpu_step,
    journey,
    mae_step,
    peers,
    planning,
    scaling,
    step_memory,
    timed_predict,
    timing,
)
from benchmarks.common import Results
from benchmarks.products import share_of_products
from nnunet_umit.architectures.encoder import SIZES
from nnunet_umit.plans import layout
from nnunet_umit.spacing import token_grid

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


# ------------------------------------------------------------------------------------------------------- steps
def test_the_three_networks_are_the_stock_ones():
    plan = finetune_step.NNUNET_PLAN
    parameters = sum(parameter.numel() for parameter in finetune_step.build(plan).parameters())
    assert parameters == 5_603_177, "PlainConvUNet of nnU-Net's default plan for 206 hippocampi"
    primus = peers.primus_s(plan["patch_size"], finetune_step.CLASSES)
    assert sum(parameter.numel() for parameter in primus.parameters()) == 23_285_955


def test_the_umit_plan_of_the_benchmark_is_a_valid_plan():
    network: Any = finetune_step.build(finetune_step.UMIT_PLAN)
    assert network.decoder.deep_supervision
    assert finetune_step.UMIT_PLAN["patch_size"] == finetune_step.NNUNET_PLAN["patch_size"]
    kwargs = finetune_step.UMIT_PLAN["architecture"]["arch_kwargs"]
    assert tuple(kwargs["stem_channels"]) == tuple(kwargs["decoder_channels"]) == layout.CHANNELS_OF_SMALLEST
    assert {name: kwargs[name] for name in SIZES["XS"]} == SIZES["XS"], "the planner has moved on: update UMIT_PLAN"


def test_a_fine_tuning_step_trains_all_parameters():
    kwargs = finetune_step.UMIT_PLAN["architecture"]["arch_kwargs"] | TINY
    plan = {"architecture": finetune_step.UMIT_PLAN["architecture"] | {"arch_kwargs": kwargs}}
    torch.manual_seed(0)
    network = finetune_step.build(plan)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    finetune_step.make_step("UMIT", network, 2, [16, 16, 16], {"weight_decay": 0.05})()
    same = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    assert [name for name in same if "head2" not in name] == [], "the coarsest head has weight 0 in nnU-Net's loss"


def test_optimisers_are_those_of_the_trainers():
    network = nn.Linear(2, 2)
    stock, clip = finetune_step.optimiser("PlainConvUNet", network, {})
    assert isinstance(stock, torch.optim.SGD) and clip == 12.0
    primus, clip = finetune_step.optimiser("Primus-S", network, {})
    assert isinstance(primus, torch.optim.AdamW) and clip == 1.0


# --------------------------------------------------------------------------------------------------------- MAE
def test_the_target_for_monai_is_ours():
    image = torch.randn(2, 1, 16, 24, 16)
    grid = token_grid((16, 24, 16), [(1.0, 1.0, 1.0)], mae_step.TOKEN, "relative")
    assert torch.equal(mae_step.patchify(image), grid.patchify(image))


def test_the_loss_for_monai_counts_hidden_tokens_only():
    image = torch.randn(1, 1, 16, 16, 16)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0]])
    prediction = torch.zeros(1, 8, 512)
    assert mae_step.monai_loss((prediction, mask), image).item() == pytest.approx(1.0, abs=1e-3)
    prediction[:, 1] = 1e6
    assert mae_step.monai_loss((prediction, mask), image).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("stem", "cpu_bfloat16"), [("patch", False), ("conv", False), ("patch", True)])
def test_an_mae_step_of_ours_changes_the_encoder(stem, cpu_bfloat16):
    torch.manual_seed(0)
    decoder = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 2}
    network: Any = mae_step.build_ours(stem, TINY, decoder, cpu_bfloat16)
    assert {network.encoder.transformer.cpu_bfloat16, network.decoder.cpu_bfloat16} == {cpu_bfloat16}
    weight = network.encoder.transformer.blocks[0].attn.qkv.weight
    before = weight.detach().clone()
    image = torch.randn(2, 1, 16, 16, 16)
    mae_step.make_step(network, lambda: network(image).loss)()
    assert not torch.equal(weight, before)


def test_sizes_compared_are_those_of_the_claim():
    for tokens, size in mae_step.IMAGES.items():
        assert token_grid(size, [(1.0, 1.0, 1.0)], mae_step.TOKEN, "relative").tokens == tokens


def test_missing_monai_is_installed_beside_the_environment(tmp_path, monkeypatch):
    if importlib.util.find_spec("monai") is not None:
        pytest.skip("MONAI is installed in this environment")
    monkeypatch.setenv("UMIT_MONAI", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def install(command: list[str], check: bool) -> None:
        assert check and "--no-deps" in command and command[-1] == peers.MONAI
        package = Path(command[command.index("--target") + 1]) / "monai"
        package.mkdir()
        (package / "__init__.py").write_text("here = 1")

    monkeypatch.setattr(peers.subprocess, "run", install)
    assert peers.import_monai("monai").here == 1
    monkeypatch.delitem(sys.modules, "monai")


def test_memory_of_a_step_is_that_of_its_tensors():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    arms = {str(megabytes): ("tests.test_step_benchmarks:fill", megabytes) for megabytes in (200, 400)}
    found = step_memory.peak_memories(arms, 2, threads=1)
    assert {arm: len(samples) for arm, samples in found.items()} == {"200": 2, "400": 2}
    assert all(int(arm) - 5 < each / 1e6 < int(arm) + 30 for arm, samples in found.items() for each in samples)


def test_memory_of_several_processes_is_their_median_and_range():
    figures = step_memory.memory_figures([1_000_000_000, 5_000_000_000, 2_000_000_000])
    assert figures["peak_memory_bytes"] == 2_000_000_000
    assert step_memory.memory_figures([])["peak_memory_bytes"] is None
    once = {"parameters": 1e6, **timing.summarise([timing.Sample(1.0, 2.0)])}
    once["ratio"] = timing.paired_ratio([timing.Sample(1.0, 2.0)], [timing.Sample(1.0, 2.0)])

    def cell(samples: list[int]) -> str:
        arms = {"ours": once | step_memory.memory_figures(samples)}
        return timing.step_table(arms, "ours").split("|")[-2].strip()

    assert cell([2_000_000_000, 1_000_000_000, 5_000_000_000]) == "2.00 (1.00-5.00)"
    assert cell([7_000_000_000]) == "7.00" and cell([]) == "-"


def fill(megabytes: int) -> Any:
    """A "training step" that touches so much memory, in a process of its own."""
    return lambda: torch.ones(megabytes * 250_000)


def test_operations_grow_with_the_patch():
    small, large = (arithmetic.operations("XS", (side, 32, 32), (1.0, 1.0, 1.0), 8) for side in (32, 64))
    assert (small["tokens"], large["tokens"]) == (64, 128)
    for kind in ("pretrain", "finetune"):
        assert 1.9 < large[kind] / small[kind] < 2.2
    assert small["pretrain"] < small["finetune"] and small["sample_bytes"] < large["sample_bytes"]


def test_the_demo_says_which_arm_is_ahead():
    steps = {"finetune_steps": 70, "pretrain_steps": 220}
    dice = {"from scratch": {"mean": 0.7}, "pre-trained": {"mean": 0.6}}
    run = {"steps": steps, "dice": dice, "test_cases": 4, "wall_s": 330.0}
    assert "ended behind the one from scratch: mean Dice 0.600 against 0.700" in demo.report(run)
    dice["pre-trained"]["mean"] = 0.8
    assert "ended ahead of the one" in demo.report(run) and "5.5 minutes" in demo.report(run)
    dice["pre-trained"]["mean"] = 0.7001
    assert "ended level with the one" in demo.report(run)


# ----------------------------------------------------------------------------------------------------- scaling
def test_a_volume_keeps_its_size_in_millimetres_and_its_tokens_at_every_level():
    for level in scaling.LEVELS:
        size, spacing = scaling.volume_at(level)
        assert tuple(n * mm for n, mm in zip(size, spacing, strict=True)) == scaling.VOLUME_MM
        assert token_grid(size, [spacing], 8, "relative").tokens == 8 * 12 * 12


def test_a_synthetic_corpus_gives_batches(tmp_path):
    batch = scaling.open_corpus(str(scaling.make_corpus(tmp_path, 20)))()
    assert batch["data"].shape[:2] == (4, 4) and len(set(batch["groups"])) == 1
    assert len(list((tmp_path / "images").iterdir())) == 20


# -------------------------------------------------------------------------------------------------- prediction
def test_the_stop_watch_gives_every_second_to_the_innermost_part(monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 16.0])  # export begins, resampling begins, ends, export ends
    monkeypatch.setattr(timed_predict.time, "time", lambda: next(clock))
    watch = timed_predict.StopWatch(started=4.0)
    resampling = watch.timing("resampling", lambda: None)
    watch.timing("export", resampling)()
    assert watch.seconds == dict.fromkeys(timed_predict.PARTS, 0.0) | {
        "start-up": 6.0, "export": 3.0, "resampling": 3.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- planning
def test_plans_and_memory_are_stored_and_not_made_again(tmp_path, monkeypatch, capsys):
    for name in ("Dataset004_Hippocampus", "Dataset027_ACDC"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset.json").write_text("{}")
    monkeypatch.setenv("UMIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(planning, "DATASETS", (4, 27))
    planned: list[str] = []
    monkeypatch.setattr(planning, "plan", lambda name, work: planned.append(name) or Path(name))
    row = ["3d_fullres", *["x"] * 9, "1.5 GB"]
    monkeypatch.setattr(planning, "described", lambda file: {"rows": [row], "why": {"3d_fullres": "small"}})
    sizes = {"batch": 4, "predicted_bytes": 1_500_000_000, "measured_bytes": 1_200_000_000}
    monkeypatch.setattr(planning, "measured", lambda file, configuration: sizes)
    for _ in range(2):
        planning.main(["--full", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])
    assert planned == ["Dataset004_Hippocampus", "Dataset027_ACDC"]
    runs = Results("planning", "", tmp_path / "results").runs
    memory = [key.removeprefix("full/memory/") for key in runs if "/memory/" in key]
    first, second = planned
    assert memory == [f"{first}/3d_fullres", f"{first}/2d", f"{second}/3d_fullres"]
    printed = capsys.readouterr().out
    assert "| 004_Hippocampus | 3d_fullres " in printed and printed.count("1.50 GB   | 1.20 GB  | 125% ") == 6
    monkeypatch.setattr(planning, "DATASETS", (120,))
    with pytest.raises(FileNotFoundError, match="Dataset120 is not in the data folder; set UMIT_DATA"):
        planning.main(["--full", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])


# ----------------------------------------------------------------------------------------------------- products
def attention(tokens: torch.Tensor) -> torch.Tensor:
    heads = tokens.view(2, 4, 16, 8).requires_grad_()
    return nn.functional.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.view(64, 16) @ x.view(16, 64), lambda x: torch.einsum("bij,bkj->bik", x, x), attention,
     nn.Conv1d(16, 4, 3), nn.Linear(32, 8)],
)  # fmt: skip
def test_products_and_attention_are_found_in_a_step(operation):
    tokens = torch.randn(2, 16, 32)
    assert 0 < share_of_products(lambda: operation(tokens).sum()) <= 1


def test_nothing_else_counts_as_a_product():
    norm, tokens = nn.LayerNorm(32), torch.randn(2, 16, 32)
    assert share_of_products(lambda: nn.functional.gelu(norm(tokens)).softmax(-1).sum().backward()) == 0


def test_the_share_of_products_stands_beside_the_ratio():
    spread = {"median": 0.9, "q1": 0.9, "q3": 0.9}
    arm = {"repeats": 1, "wall_s": spread, "cpu_s": spread, "parameters": 1, "ratio": {"cpu": spread, "wall": spread}}
    arms = {mae_step.REFERENCE: arm | {"products_share": 0.8}, mae_step.OURS: arm | {"products_share": 0.7}}
    run = {"image_size": [8, 8, 8], "arms": arms, "tokens": 1, "batch_size": 2, "threads": 2}
    assert (
        "attention: MONAI 0.80, UMIT, equal size 0.70; those of UMIT at equal size alone are 0.630"
        in mae_step.report(run)
    )


# ------------------------------------------------------------------------------------------------------ journey
def test_a_stored_journey_is_repeated_once_where_that_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "data" / "Dataset004_Hippocampus").mkdir(parents=True)
    (tmp_path / "data" / "Dataset004_Hippocampus" / "dataset.json").write_text("{}")
    monkeypatch.setenv("UMIT_DATA", str(tmp_path / "data"))
    results, ran = Results("journey", "", tmp_path / "results"), []
    monkeypatch.setattr(journey.Journey, "words", lambda self, *words: ran.append(words) or ["true"])
    journey.Journey(tmp_path / "work", results).run("4/predict", "nnUNetv2_predict")
    stored = journey.Journey(tmp_path / "work", results)
    stored.run("4/predict", "nnUNetv2_predict")
    assert len(ran) == 1
    assert journey.Journey(tmp_path / "work", results).environment("results")["PYTHONUNBUFFERED"] == "1"
    repeated = journey.Journey(tmp_path / "work", Results("journey", "", tmp_path / "results", again=True))
    for _ in range(2):
        repeated.run("4/predict", "nnUNetv2_predict")
    assert len(ran) == 2


def state(losses: list[float], weight: float) -> dict[str, Any]:
    return {
        "logging": {"train_losses": losses, "val_losses": [1.0]},
        "network_weights": {"layer": torch.tensor([weight])},
    }


def test_a_continued_training_must_equal_the_unbroken_one():
    whole = state([2.0, 1.0], 0.5)
    assert journey.difference(whole, state([2.0, 1.0], 0.5), exact=True) == {
        "largest_difference": 0.0,
        "weights_equal": True,
    }
    with pytest.raises(RuntimeError, match="train_losses differ"):
        journey.difference(whole, state([2.0, 1.0000001], 0.5), exact=True)
    with pytest.raises(RuntimeError, match="weights do not"):
        journey.difference(whole, state([2.0, 1.0], 0.6), exact=True)


def test_on_a_gpu_it_must_be_close():
    whole = state([2.0, 1.0], 0.5)
    found = journey.difference(whole, state([2.0, 1.01], 0.6), exact=False)
    assert found["largest_difference"] == pytest.approx(0.01) and not found["weights_equal"]
    for other in (1.03, float("nan")):
        with pytest.raises(RuntimeError, match="differ"):
            journey.difference(whole, state([2.0, other], 0.5), exact=False)


# --------------------------------------------------------------------------------------------------------- GPU
def test_the_steps_for_a_gpu_run_on_a_cpu_too(tmp_path, monkeypatch, capsys):
    case = ("XS", (16, 16, 16), (1.0, 1.0, 1.0), 8, 2)
    monkeypatch.setattr(gpu_step.arithmetic, "CASES", {"tiny": case})
    gpu_step.main(["--quick", "--device", "cpu", "--case", "tiny", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    run = Results("gpu_step", "", tmp_path).runs["quick/cpu/tiny"]
    assert list(run["arms"]) == [gpu_step.PLAIN, gpu_step.PRIMUS, gpu_step.FINETUNE, gpu_step.PRETRAIN]
    assert run["arms"][gpu_step.PLAIN]["ratio"]["wall"]["median"] == 1.0 and run["tokens"] == 8
    own = run["arms"][gpu_step.FINETUNE]
    assert own["operations"] == 2 * arithmetic.operations(*case[:4])["finetune"] and own["peak_memory_bytes"] is None
    assert printed.count("| tiny ") == 4 and "Measured on: cpu" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_for_a_gpu_say_that_there_is_none():
    with pytest.raises(RuntimeError, match="no CUDA device; --device cpu"):
        gpu_step.main(["--quick"])


def test_the_plain_network_is_laid_out_as_nnunet_does():
    arch = gpu_step.plain_conv_unet((40, 56, 40), (1.0, 1.0, 1.0))[0]["architecture"]["arch_kwargs"]
    stock = finetune_step.NNUNET_PLAN["architecture"]["arch_kwargs"]
    assert arch == stock
    deep = gpu_step.plain_conv_unet((128, 128, 128), (1.0, 1.0, 1.0))[0]["architecture"]["arch_kwargs"]
    assert deep["features_per_stage"] == [32, 64, 128, 256, 320, 320]


@pytest.mark.parametrize("case", arithmetic.CASES)
def test_the_plain_network_takes_the_patch_of_every_case(case):
    _, patch, spacing, _, _ = arithmetic.CASES[case]
    plan, padded = gpu_step.plain_conv_unet(patch, spacing)
    assert all(size <= wanted < size + 32 for size, wanted in zip(patch, padded, strict=True))
    with torch.device("meta"):
        made = finetune_step.build(plan).eval()(torch.empty(1, 1, *padded))
    assert (made[0] if isinstance(made, (list, tuple)) else made).shape[2:] == tuple(padded)
