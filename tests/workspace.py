"""nnU-Net's own commands as sub-processes, in folders of their own."""

import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NAME = "Dataset901_Balls"
SETTINGS = {
    "nnUNet_def_n_proc": "1",
    "nnUNet_n_proc_DA": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # threads that wait do not burn the core another test needs
    "MPLBACKEND": "Agg",
    "PYTHONUNBUFFERED": "1",  # lines arrive when they are printed
}


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders and a way to run its commands in them."""

    root: Path
    configuration: str = "3d_fullres"
    device: str = "cpu"

    def environment(self, results: str = "results") -> dict[str, str]:
        folders = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": results}
        return {**os.environ, **SETTINGS, **{name: str(self.root / folder) for name, folder in folders.items()}}

    def start(self, command: str, *arguments: str, results: str = "results") -> subprocess.Popen:
        script = Path(sysconfig.get_path("scripts")) / command
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=self.environment(results),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def run(self, command: str, *arguments: str, results: str = "results", fails: bool = False) -> str:
        process = self.start(command, *arguments, results=results)
        output = finish(process, 600)
        assert (process.returncode != 0) == fails, f"{command} {' '.join(arguments)}\n{output[-4000:]}"
        return output

    def train(self, trainer: str, fold: str, *options: str, results: str = "results", fails: bool = False) -> str:
        common = ("901", self.configuration, fold, "-tr", trainer, "-p", "UMITPlans", "-device", self.device)
        return self.run("nnUNetv2_train", *common, *options, results=results, fails=fails)

    def fold(self, trainer: str, fold: str, results: str = "results") -> Path:
        return self.root / results / NAME / f"{trainer}__UMITPlans__{self.configuration}" / f"fold_{fold}"


def finish(process: subprocess.Popen, timeout: float) -> str:
    """The rest of the output of a process with a session of its own; at the time-out it and its children are killed."""
    try:
        output: str = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        raise
    return output
