"""What the hook changes in nnU-Net's functions, for our classes only: -pretrained_weights, and what is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    for plans, block in (("UMITPlans", {"umit": {}}), ("nnUNetPlans", {})):
        content = {"plans_name": "x", "configurations": {"3d_fullres": block}}
        (dataset / f"{plans}.json").write_text(json.dumps(content))
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
    refused = results / "Dataset901_Balls" / "UMITTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    refused.mkdir(parents=True)  # a trainer makes its folder before it is refused
    kept = module.filter_available_models(pairs, "Dataset901_Balls")
    assert [dict(model) for model in kept] == [ours, stock]
    assert "UMITTrainer was not trained with nnUNetPlans; left out" in capsys.readouterr().out
    (refused / "validation").mkdir()
    (refused / "validation" / "summary.json").touch()
    kept = module.filter_available_models(pairs, "Dataset901_Balls")
    assert {"trainer": "UMITTrainer", "plans": "nnUNetPlans", "configuration": "3d_fullres"} in map(dict, kept)
    shutil.rmtree(refused.parent)
    own = '{"plans_name": "Mine", "configurations": {"3d_fullres": {"umit": {}}}}'  # -overwrite_plans_name Mine
    (dataset / "Mine.json").write_text(own)
    mine = {"trainer": "UMITTrainer", "plans": "Mine", "configuration": "3d_fullres"}
    (results / "Dataset901_Balls" / "UMITTrainer__Mine__3d_fullres").mkdir()
    others = module.dumb_trainer_config_plans_to_trained_models_dict(
        ["UMITTrainer", "nnUNetTrainer"], ["3d_fullres"], ["Mine", "nnUNetPlans"]
    )
    assert [dict(model) for model in module.filter_available_models(others, 901)] == [mine, stock]
    (results / "Dataset901_Balls" / "UMITTrainer__UMITPlans__3d_fullres").rmdir()
    with pytest.raises(RuntimeError, match="does not have an output folder"):  # nnU-Net's own mercilessness
        module.filter_available_models(pairs, "Dataset901_Balls")


@pytest.mark.parametrize(("trainer", "native", "told"), [
    ("nnUNetTrainer", False, True), ("UMITTrainer", False, False), ("nnUNetTrainer", True, True),
])  # fmt: skip
def test_a_forgotten_trainer_is_told(
    nnunet_env: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trainer: str,
    native: bool,
    told: bool,
) -> None:
    """`-p UMITPlans` without `-tr UMITTrainer` trains our network with nnU-Net's SGD."""
    monkeypatch.setattr("nnunet_umit.trainers.requirements.require_plans", lambda dataset, plans: None)
    configuration = {"umit": {}, "architecture": {"arch_kwargs": {"native": native}}}
    made = SimpleNamespace(configuration_manager=SimpleNamespace(configuration=configuration))
    dataset = nnunet_env.preprocessed / "Dataset004_Hippocampus"
    dataset.mkdir()
    planned = {"3d_fullres": configuration, "3d_native": configuration, "mine": {"inherits_from": "3d_native"}}
    (dataset / "UMITPlans.json").write_text(json.dumps({"configurations": planned}))
    arguments = ("4", "mine" if native else "3d_fullres", 0, trainer, "UMITPlans")
    if native:
        with pytest.raises(RuntimeError, match="cannot train mine, where every image has its own spacing; use -tr"):
            registration._get_trainer(lambda *given: pytest.fail("its folder would be there now"), *arguments)
        return
    assert registration._get_trainer(lambda *given: made, *arguments) is made
    assert ("Did you mean -tr UMITTrainer?" in capsys.readouterr().err) == told
