"""Both trainers as two distributed processes, over gloo on the CPU."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch import distributed, multiprocessing

pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(sys.platform != "linux", reason="gloo over localhost")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def train(rank: int, trainer_name: str, plans: dict[str, Any], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    from nnunet_umit.trainers import finetune, pretrain, tokenizer

    rooms = (finetune, pretrain, tokenizer)
    trainer_class = next(getattr(room, trainer_name) for room in rooms if hasattr(room, trainer_name))
    trainer = tiny.make_trainer(trainer_class, plans)
    trainer.run_training()
    if trainer_name != "UMITTrainer":
        trainer.perform_actual_validation()
    log = Path(trainer.log_file).read_text() if rank == 0 else ""
    torch.save(
        {
            "accused": "step skipped" in log and "case_001" in log,
            "weights": trainer.unwrapped().state_dict(),
            "losses": trainer.logged("train_losses") + trainer.logged("val_losses"),
            "batch": trainer.batch_size,
            "skipped": trainer.guard.total,
        },
        Path(folder) / f"rank{rank}.pt",
    )
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("trainer_name", "options", "broken"),
    [
        ("UMITPretrainTrainer", {}, False),
        ("UMITTokenizerTrainer", {"picture_every": 1}, False),
        ("UMITTrainer", {"freeze": "encoder", "freeze_epochs": 1, "drop_path": 0.2}, False),
        ("UMITTrainer", {"iterations_per_epoch": 5, "max_nonfinite": 50}, True),
    ],
)
def test_two_ranks_stay_equal(
    nnunet_env: Any, tmp_path: Path, trainer_name: str, options: dict[str, Any], broken: bool
) -> None:
    """Same weights on both ranks after a training, even if only one of them met a broken image."""
    sections = {"UMITPretrainTrainer": "pretrain", "UMITTokenizerTrainer": "tokenizer", "UMITTrainer": "finetune"}
    plans = tiny.make_plans(batch=3, **{sections[trainer_name]: options})
    cases = tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=5)  # one rank validates more than the other
    if broken:
        tiny.spoil(cases / "case_001.b2nd")
    multiprocessing.spawn(train, args=(trainer_name, plans, free_port(), str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    assert one["losses"] == other["losses"]
    assert (one["batch"], other["batch"]) == (2, 1)
    assert one["skipped"] == other["skipped"] and (one["skipped"] > 0) == broken
    assert one["accused"] == broken, "the log of rank 0 names the broken case, whichever rank met it"


def test_two_processes_learn_what_one_learns(nnunet_env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps on native images of several spacings: the loss curve of one process with the pooled batch."""
    options = {"epochs": 20, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "picture_every": 100}
    plans = tiny.make_plans(batch=3, native=True, pretrain={**options, "thicken": 0.3})
    spacings = ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (5.0, 0.8, 0.8))
    tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=6, spacings=spacings)
    from nnunet_umit.trainers.pretrain import UMITPretrainTrainer

    torch.set_num_threads(1)
    alone = tiny.make_trainer(UMITPretrainTrainer, plans)
    alone.run_training()
    monkeypatch.setenv("nnUNet_results", str(nnunet_env.results / "two"))
    multiprocessing.spawn(train, args=("UMITPretrainTrainer", plans, free_port(), str(tmp_path)), nprocs=2)
    together = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert together["losses"][:20] == pytest.approx(alone.logged("train_losses"), abs=1e-5)
    for name, value in alone.unwrapped().state_dict().items():
        torch.testing.assert_close(together["weights"][name], value, atol=1e-4, rtol=1e-3)
