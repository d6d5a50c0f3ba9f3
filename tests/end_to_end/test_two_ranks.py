"""Both trainers as two distributed processes. nnU-Net's DDP needs GPUs; here its CUDA-only parts are replaced, so that
what is ours (seeds per rank, agreement, gathering, re-wrapping after a freeze) runs for real, over gloo on the CPU."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(sys.platform != "linux", reason="gloo over localhost")]


class OnCPU(DistributedDataParallel):
    """nnU-Net passes GPU numbers."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None) -> None:
        super().__init__(module)


def train(rank: int, trainer_name: str, plans: dict[str, Any], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.cuda.get_device_capability = lambda device: (8, 0)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

    from nnunet_umit.trainers import finetune, pretrain

    stock.DDP = finetune.DistributedDataParallel = OnCPU
    trainer_class = getattr(finetune, trainer_name, None) or getattr(pretrain, trainer_name)
    trainer = tiny.make_trainer(trainer_class, plans)
    trainer.device = torch.device("cpu")
    trainer.run_training()
    if trainer_name == "UMITPretrainTrainer":
        trainer.perform_actual_validation()
    torch.save(
        {
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
        ("UMITTrainer", {"freeze": "encoder", "freeze_epochs": 1, "drop_path": 0.2}, False),
        ("UMITTrainer", {"iterations_per_epoch": 5, "max_nonfinite": 50}, True),
    ],
)
def test_two_ranks_stay_equal(
    nnunet_env: Any, tmp_path: Path, trainer_name: str, options: dict[str, Any], broken: bool
) -> None:
    """Same weights on both ranks after a training, even if only one of them met a broken image."""
    section = "pretrain" if trainer_name == "UMITPretrainTrainer" else "finetune"
    plans = tiny.make_plans(batch=3, **{section: options})
    cases = tiny.write_preprocessed(nnunet_env.preprocessed, plans)
    if broken:
        tiny.spoil(cases / "case_001.b2nd")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train, args=(trainer_name, plans, port, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    assert one["losses"] == other["losses"]
    assert (one["batch"], other["batch"]) == (2, 1)
    assert one["skipped"] == other["skipped"] and (one["skipped"] > 0) == broken
