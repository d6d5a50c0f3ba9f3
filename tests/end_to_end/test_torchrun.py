"""``umit train`` under torchrun: two processes on the CPU, one of them killed, and the continuation."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from workspace import finish

pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")]

EPOCHS = 5


def start(*options: str, processes: int = 2) -> subprocess.Popen:
    umit = Path(sys.executable).parent / "umit"
    words = ["902", "3d_native", "all", "-tr", "UMITPretrainTrainer", "-p", "UMITPlans", "-device", "cpu", *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(umit), "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_rank_that_dies_ends_the_job_and_loses_nothing(nnunet_env: Any) -> None:
    schedule = {"epochs": EPOCHS, "iterations_per_epoch": 4, "val_iterations_per_epoch": 1, "picture_every": 100}
    plans = tiny.make_plans(batch=3, native=True, pretrain=schedule)
    spacings = ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0))
    tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=4, spacings=spacings)
    process = start()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if re.search(r"\bEpoch 2\s*$", line):
            break
    ranks = children(process.pid)
    if len(ranks) == 2:
        os.kill(max(ranks), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    output = finish(process, 120)
    assert len(ranks) == 2, "".join([*lines, output])[-3000:]
    assert process.returncode != 0 and "SIGKILL" in output
    folder = nnunet_env.results / tiny.NAME / "UMITPretrainTrainer__UMITPlans__3d_native" / "fold_all"
    stored = torch.load(folder / "checkpoint_latest.pth", weights_only=True)
    assert 1 <= stored["current_epoch"] <= EPOCHS - 1 and not (folder / "checkpoint_final.pth").exists()

    continued = start("--c")
    output = finish(continued, 300)
    assert continued.returncode == 0, output[-3000:]
    final = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert len(final["logging"]["train_losses"]) == EPOCHS and (folder / "encoder.safetensors").is_file()


def test_torchrun_decides_how_many_processes_there_are() -> None:
    umit = Path(sys.executable).parent / "umit"
    words = [str(umit), "train", "902", "3d_native", "all", "-num_gpus", "4"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 2 and "leave -num_gpus away" in done.stderr


LEAVES_A_CYCLE = """
import os, sys
from pathlib import Path
import torch
from nnunetv2.run import run_training
from nnunet_umit.cli import train

def threads():
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}

class Trainer:
    pass

def run():
    trainer = Trainer()
    trainer.network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    trainer.itself = trainer
    print("during", any("gloo" in name for name in threads()))

run_training.run_training_entry = run
train.train(["-device", "cpu"])
print("after", any("gloo" in name for name in threads()))
"""


def test_no_thread_of_the_process_group_is_left_when_the_interpreter_shuts_down(tmp_path: Path) -> None:
    # Such a thread made a rank abort at its very end, with everything written: once in many runs, in CI.
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_CYCLE],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        env={**os.environ, **group},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["during", "True", "after", "False"], done.stdout
