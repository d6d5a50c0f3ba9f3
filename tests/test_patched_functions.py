"""What the hook changes in nnU-Net's functions, for our classes only: -pretrained_weights, and what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_umit import registration


class _Stock:
    """Stands for any network that is not ours."""


class _Ours:
    def __init__(self) -> None:
        self.paths: list[str] = []

    def load_umit_pretrained(self, path: str) -> str:
        self.paths.append(path)
        return "report"


def test_pretrained_weights_go_to_our_transfer_and_all_other_networks_to_nnunet() -> None:
    calls: list[tuple[object, ...]] = []

    def original(network: object, fname: object, verbose: bool = False) -> None:
        calls.append((network, fname, verbose))

    ours, stock = _Ours(), _Stock()
    registration._load_pretrained(original, ours, Path("a.pth"), verbose=True)
    registration._load_pretrained(original, stock, "b.pth", verbose=True)
    registration._load_pretrained(original, network=stock, fname="c.pth")
    assert ours.paths == ["a.pth"]
    assert calls == [(stock, "b.pth", True), (stock, "c.pth", False)]


def test_pretrained_weights_see_through_compile_and_data_parallel() -> None:
    import torch
    from torch._dynamo import OptimizedModule
    from torch.nn.parallel import DistributedDataParallel

    class Network(torch.nn.Linear):
        pass

    network = Network(1, 1)
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(parallel)
    parallel.module = torch.compile(network)
    assert isinstance(parallel.module, OptimizedModule)
    assert registration._unwrapped(network) is network
    assert registration._unwrapped(parallel.module) is network
    assert registration._unwrapped(parallel) is network


def test_models_that_cannot_exist_are_left_out_of_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnUNetv2_find_best_configuration pairs every trainer with every plans and stops at the first that is missing."""
    from nnunetv2.evaluation import find_best_configuration as module

    registration.register()
    raw, preprocessed, results = (tmp_path / name for name in ("raw", "preprocessed", "results"))
    for name, folder in (("nnUNet_raw", raw), ("nnUNet_preprocessed", preprocessed), ("nnUNet_results", results)):
        monkeypatch.setenv(name, str(folder))
    dataset = preprocessed / "Dataset901_Balls"
    dataset.mkdir(parents=True)
    for plans in ("UMITPlans", "nnUNetPlans"):
        (dataset / f"{plans}.json").write_text('{"plans_name": "x", "configurations": {"3d_fullres": {}}}')
    ours, stock = (
        {"trainer": trainer, "plans": plans, "configuration": "3d_fullres"}
        for trainer, plans in (("UMITTrainer", "UMITPlans"), ("nnUNetTrainer", "nnUNetPlans"))
    )
    for model in (ours, stock):
        (results / "Dataset901_Balls" / f"{model['trainer']}__{model['plans']}__3d_fullres").mkdir(parents=True)
    pairs = module.dumb_trainer_config_plans_to_trained_models_dict(
        ["UMITTrainer", "nnUNetTrainer"], ["3d_fullres"], ["UMITPlans", "nnUNetPlans"]
    )
    assert len(pairs) == 4
    kept = module.filter_available_models(pairs, "Dataset901_Balls")
    assert [dict(model) for model in kept] == [ours, stock]
    assert "UMITTrainer was not trained with nnUNetPlans; left out" in capsys.readouterr().out
    (results / "Dataset901_Balls" / "UMITTrainer__UMITPlans__3d_fullres").rmdir()
    with pytest.raises(RuntimeError, match="does not have an output folder"):  # nnU-Net's own mercilessness
        module.filter_available_models(pairs, "Dataset901_Balls")
