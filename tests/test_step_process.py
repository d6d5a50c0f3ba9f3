"""Steps of networks that need a process of their own, and nnssl's network out of a checkout."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import nnssl
from benchmarks.step_process import StepProcess
from benchmarks.timing import Sample, interleaved


def tiny(log: str) -> tuple[nn.Module, Callable[[], None]]:
    """A network of nine weights, and a step that leaves a line; the fourth fails."""

    def step() -> None:
        lines = Path(log).read_text(encoding="utf-8") if Path(log).exists() else ""
        if lines.count("step") == 3:
            raise ValueError("the fourth step fails")
        Path(log).write_text(f"{lines}step with {torch.get_num_threads()} threads\n", encoding="utf-8")

    return nn.Linear(2, 3), step


def test_a_step_elsewhere_is_timed_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    with closing(StepProcess(f"{__name__}:tiny", str(log), threads=1)) as remote:
        assert remote.parameters == 9
        samples = interleaved({"here": lambda: None, "there": remote}, repeats=2, warmup=1)
        assert log.read_text(encoding="utf-8") == "step with 1 threads\n" * 3
        assert all(isinstance(each, Sample) and each.cpu > 0 for each in samples["there"]), "not this process's seconds"
        with pytest.raises(RuntimeError, match="ended with exit code 1"):
            remote.timed()
    assert "the fourth step fails" in capfd.readouterr().err


def test_nnssl_loss_looks_at_hidden_tokens_only() -> None:
    torch.manual_seed(0)
    image, kept = torch.randn(2, 1, 4, 4, 2), torch.tensor([[0, 3], [1, 2]])
    prediction, hidden = image.clone(), [[1, 2], [0, 3]]
    for sample, tokens in enumerate(kept.tolist()):
        for token in tokens:
            row, column = divmod(token, 2)
            prediction[sample, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 5  # what it saw does not count
    assert nnssl.hidden_voxels_loss(prediction, image, kept, 2).item() == 0
    row, column = divmod(hidden[1][1], 2)
    prediction[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 2
    assert nnssl.hidden_voxels_loss(prediction, image, kept, 2).item() == pytest.approx(4 / 4), "one of four tokens"


def test_what_is_no_checkout_of_nnssl_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaMAE_module.py is missing: --nnssl must name a checkout"):
        nnssl.prepare(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    with pytest.raises(RuntimeError, match="process of its own"):
        nnssl.build(str(tmp_path), (8, 8, 8), 1, 8, 0.75, {}, 1, {})
