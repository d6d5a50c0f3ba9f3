"""Training for equal wall time: folders, plans and sub-processes of the benchmarks that compare trainings.

A :class:`Bench` stands for one dataset, configuration, fold and seed; it prepares, probes, trains, validates, and goes
on where a killed call stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATASET,
    REPOSITORY,
    WITH_BYTECODE,
    available_cores,
    data_root,
    process_counts,
    say,
    work_folder,
    write_json,
)

CONFIGURATION = "3d_fullres"
STOCK_PLANS = "nnUNetPlans"
PLANNERS = {STOCK_PLANS: "ExperimentPlanner", "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM"}
PROBE_S = 30.0
PRIMUS_TOKEN = 8  # voxels per axis
NOT_OF_A_RUN = ("arm", "results", "work", "again", "replan")  # options that do not change what a run gives


def epochs_for(iterations: float) -> int:
    """Epochs of a schedule: ten iterations or more each, 4 to 40 epochs (2 if there are hardly any iterations)."""
    return 2 if iterations < 12 else max(4, min(40, int(iterations // 10)))


def edit_plans(
    base: Path,
    source: str,
    target: str,
    *,
    configuration: str = CONFIGURATION,
    batch_size: int | None = None,
    umit: dict[str, Any] | None = None,
) -> None:
    """Write ``base/target.json``: the plans ``source`` under another name, with batch size and ``umit`` values changed.

    Args:
        umit: ``{"finetune.learning_rate": 0.001, ...}``, keys below ``configurations.<configuration>.umit``, or
            ``{"architecture.depth": 6, ...}``, arguments of the network, or ``{"configuration.patch_size": [...]}``.
    """
    plans = json.loads((base / f"{source}.json").read_text(encoding="utf-8"))
    plans["plans_name"] = target
    chosen = plans["configurations"][configuration]
    if batch_size is not None:
        chosen["batch_size"] = batch_size
    for key, value in (umit or {}).items():
        section, _, name = key.partition(".")
        sections = {**chosen.get("umit", {}), "configuration": chosen}
        if "architecture" in chosen:
            sections["architecture"] = chosen["architecture"]["arch_kwargs"]
        if section not in sections or (section not in chosen.get("umit", {}) and name not in sections[section]):
            raise ValueError(f"{key!r} is not a key below the umit block of {source}; use e.g. finetune.learning_rate")
        sections[section][name] = value
    write_json(base / f"{target}.json", plans)


def demanded(trainer: str, base: Path, plans: str, configuration: str = CONFIGURATION) -> dict[str, Any]:
    """What `edit_plans` must change before a stock trainer takes the plans ``base/plans.json``.

    Primus refuses a patch that is not made of whole tokens, and nnU-Net plans such patches (ACDC: 14 slices): it gets
    the smallest one around the planned one.
    """
    if "Primus" not in trainer:
        return {}
    planned = json.loads((base / f"{plans}.json").read_text(encoding="utf-8"))["configurations"][configuration]
    return {"configuration.patch_size": [-(-size // PRIMUS_TOKEN) * PRIMUS_TOKEN for size in planned["patch_size"]]}


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process: two invocations would replan under each other and spoil each other's clock.

    What :meth:`Bench.call` starts inherits the lock: a training that a killed benchmark left behind still holds it.

    Raises:
        RuntimeError: another one holds it.
    """
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another benchmark, or a training that a killed one left, is running in {folder}; wait for it (its "
                "timing counts) or stop it, or use another --work folder on other cores (taskset -c)"
            ) from error
        yield


def plans_copy(plans: str, folder: Path) -> str:
    """Name of the copy of some plans that one run edits and trains with."""
    return f"{plans}Bench{hashlib.sha1(folder.name.encode()).hexdigest()[:6]}"


class Bench:
    """Folders, environment and sub-processes of one invocation.

    Args:
        options: of the command line; see ``common.training_parser``.
        dataset, configuration, fold, seed: what is trained; fold and seed are those of the options unless given.
        settings: what the result of a run depends on, compared before a killed run is continued (default: all options).
        runs: folder of the runs, below ``runs`` of the work folder, so that benchmarks can share one work folder.
        room: folder below the work folder for a benchmark that needs nnU-Net folders of its own, raw data included.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        dataset: str = DATASET,
        configuration: str = CONFIGURATION,
        fold: int | str | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        runs: str = "",
        room: str = "",
    ) -> None:
        self.options = options
        self.dataset = dataset
        self.configuration = configuration
        self.fold = options.validation_fold if fold is None else fold
        self.seed = options.seed if seed is None else seed
        self.settings = settings
        self.data = data_root()
        self.work = work_folder(options.work) / room
        self.raw = self.work / "nnUNet_raw" if room else self.data
        self.runs = self.work / "runs" / runs
        self.base = self.work / "nnUNet_preprocessed" / dataset

    def environment(self, results: Path) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        return os.environ | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.work / "nnUNet_preprocessed"),
            "nnUNet_results": str(results),
            **process_counts(self.options.threads),
            "PYTHONPATH": path,
            **WITH_BYTECODE,
        }

    def call(self, command: list[str], folder: Path, accepted: Sequence[int] = (0,)) -> int:
        """Run ``command`` on ``--threads`` cores, output in ``folder/log.txt``; its tail is shown if it fails.

        Returns:
            The exit code, one of ``accepted``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        pin: Callable[[], None] | None = None
        if hasattr(os, "sched_setaffinity") and available_cores() > self.options.threads:
            cores = sorted(os.sched_getaffinity(0))[: self.options.threads]
            pin = lambda: os.sched_setaffinity(0, cores)  # noqa: E731 - a hook of one line
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.run(
                command,
                env=self.environment(folder),
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=pin,
                close_fds=False,  # the lock of `alone_in`; Python makes no other descriptor inheritable
            )
        if process.returncode not in accepted:
            tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n" + "\n".join(tail))
        return process.returncode

    def prepare(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Plan and preprocess what is missing, and put the grouped split in place.

        Args:
            wanted: configurations by the name of their plans.
        """
        for plans, configurations in wanted.items():
            self.plan(plans, list(configurations))
        shutil.copyfile(self.data / "splits" / f"{self.dataset}.json", self.base / "splits_final.json")

    def set_fold(self, cases: Mapping[str, Sequence[str]]) -> None:
        """Make ``cases`` the fold that is trained; those below it are the same, as nnU-Net finds a fold by position."""
        write_json(self.base / "splits_final.json", [cases] * (int(self.fold) + 1))

    def cases_sha1(self) -> str | None:
        """Fingerprint of the cases of the fold; None for all cases.

        Raises:
            ValueError: ``splits_final.json`` has no such fold; nnU-Net would split at random.
        """
        if self.fold == "all":
            return None
        file = self.base / "splits_final.json"
        folds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if int(self.fold) >= len(folds):
            raise ValueError(f"fold {self.fold} of {self.dataset} is to be trained, but {file} has {len(folds)} folds")
        return hashlib.sha1(json.dumps(folds[int(self.fold)], sort_keys=True).encode()).hexdigest()

    def plan(self, plans: str, configurations: list[str]) -> None:
        """Plan and preprocess, unless every case of every configuration is there."""
        planner = PLANNERS.get(plans) or plans.replace("Plans", "Planner", 1)
        again = self.options.replan and plans not in PLANNERS
        if not again and all(self.is_preprocessed(plans, each) for each in configurations):
            return
        say(f"planning and preprocessing {self.dataset} with {planner} ...")
        program = str(Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess")
        command = [program, "-d", str(int(self.dataset[7:10])), "-pl", planner, "-c", *configurations]
        processes = str(self.options.threads)
        self.call([*command, "-np", processes, "-npfp", processes], self.work / "planning")

    def is_preprocessed(self, plans: str, configuration: str) -> bool:
        """Whether the plans have the configuration and every training case was preprocessed for it."""
        file = self.base / f"{plans}.json"
        if not file.is_file():
            return False
        planned = json.loads(file.read_text(encoding="utf-8"))["configurations"].get(configuration)
        if planned is None:
            return False
        cases = json.loads((self.base / "dataset.json").read_text(encoding="utf-8"))["numTraining"]
        return len(list((self.base / planned["data_identifier"]).glob("*.pkl"))) >= cases

    def umit_value(self, plans: str, section: str, name: str) -> Any:
        """A hyper-parameter of the plans as they are before a run edits its copy."""
        from nnunet_umit.config import get_umit_config

        planned = json.loads((self.base / f"{plans}.json").read_text(encoding="utf-8"))
        return getattr(getattr(get_umit_config(planned["configurations"][self.configuration]), section), name)

    def train(self, folder: Path, name: str, **settings: Any) -> dict[str, Any]:
        """One sub-process of budgeted_training; returns its report.

        What an earlier, killed call finished is kept if it was the same job, cases and contents of the plans included.
        """
        job: dict[str, Any] = {
            "dataset": self.dataset,
            "configuration": self.configuration,
            "fold": self.fold,
            "seed": self.seed,
            "threads": self.options.threads,
            "device": self.options.device,
            "probe": False,
            "validate": False,
            "validation_cases": 2 if self.options.quick else self.options.validation_cases,
            "pretrained_weights": None,
            "keep_at_s": [],
            "curve_cases": 0,
            "step_s": 1.0,
            "overhead_s": 0.0,
            "report": str(folder / f"{name}.report.json"),
        } | settings
        plans = self.base / f"{job['plans']}.json"
        job |= {"plans_sha1": hashlib.sha1(plans.read_bytes()).hexdigest(), "cases_sha1": self.cases_sha1()}
        path, done = folder / f"{name}.job.json", Path(job["report"])
        if not (path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(job))):
            done.unlink(missing_ok=True)
        if not (done.is_file() and json.loads(done.read_text(encoding="utf-8"))["finished"]):
            write_json(path, job)
            self.call([sys.executable, "-m", "benchmarks.budgeted_training", str(path)], folder)
        return json.loads(done.read_text(encoding="utf-8"))

    def run_folder(self, key: str) -> Path:
        """The folder of a run, emptied unless a killed call with the same settings left it."""
        folder = self.folder_of(key)
        given = self.settings
        if given is None:
            given = {name: value for name, value in vars(self.options).items() if name not in NOT_OF_A_RUN}
        given = {**given, "device": self.options.device}
        settings, stored = json.loads(json.dumps(given)), folder / "options.json"
        same = stored.is_file() and json.loads(stored.read_text(encoding="utf-8")) == settings
        if self.options.again or self.options.replan or not same:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(stored, settings)
        return folder

    def folder_of(self, key: str) -> Path:
        """Where the logs, reports and checkpoints of a run are."""
        return self.runs / key.replace("/", "_")

    def report(self, folder: Path, name: str) -> dict[str, Any]:
        """What a finished stage of a run reported; see :meth:`train`."""
        content: dict[str, Any] = json.loads((folder / f"{name}.report.json").read_text(encoding="utf-8"))
        return content

    def model(self, folder: Path, trainer: str, plans: str) -> Path:
        """What a run trained, as nnU-Net lays it out: ``plans.json``, ``dataset.json``, ``fold_X/``.

        Raises:
            FileNotFoundError: there is no final checkpoint.
        """
        model = folder / self.dataset / f"{trainer}__{plans_copy(plans, folder)}__{self.configuration}"
        checkpoint = model / f"fold_{self.fold}" / "checkpoint_final.pth"
        if not checkpoint.is_file():
            raise FileNotFoundError(f"{checkpoint} is gone, but the results need it; train again with --again")
        return model

    def stage(
        self,
        folder: Path,
        name: str,
        trainer: str,
        plans: str,
        seconds: float,
        *,
        values: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Probe the time of a step, fit the schedule to ``seconds``, train.

        Args:
            folder: of this run; logs, reports and checkpoints go there.
            name: ``stock``, or the section of the umit block: ``pretrain``, ``tokenizer`` or ``finetune``.
            trainer, plans: names as nnU-Net knows them; the plans are copied under a name of this run, then edited.
            seconds: training wall time.
            values: of the umit block, e.g. ``{"tokenizer.quantiser": "nearest"}``.
        """
        target, configuration = plans_copy(plans, folder), self.configuration
        batch = 2 if self.options.quick else None
        if name == "stock":
            overrides = demanded(trainer, self.base, plans, configuration)
        else:
            fixed = {f"{name}.val_iterations_per_epoch": 1, f"{name}.seed": self.seed}
            overrides = dict(self.options.set) | dict(values or {}) | fixed
        step_s, overhead_s, epochs = 1.0, 0.0, 2
        if not self.options.quick:
            probe_plan = overrides if name == "stock" else overrides | {f"{name}.epochs": 2}
            edit_plans(self.base, plans, target, configuration=configuration, batch_size=batch, umit=probe_plan)
            probe_s = min(PROBE_S, seconds)
            found = self.train(
                folder, f"{name}_probe", trainer=trainer, plans=target, budget_s=probe_s, epochs=2, probe=True
            )
            step_s, overhead_s = found["step_s"], found["last_overhead_s"]
            epochs = epochs_for(seconds / step_s)
        iterations = max(1, round((seconds / epochs - overhead_s) / step_s))
        if name != "stock":
            overrides |= {f"{name}.epochs": epochs, f"{name}.iterations_per_epoch": iterations}
        edit_plans(self.base, plans, target, configuration=configuration, batch_size=batch, umit=overrides)
        say(f"  {name}: {step_s:.2f} s a step, {epochs} epochs of about {iterations} iterations in {seconds:.0f} s")
        return self.train(
            folder, name, trainer=trainer, plans=target, budget_s=seconds, epochs=epochs,
            step_s=step_s, overhead_s=overhead_s, **settings,
        )  # fmt: skip


def totals(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Iterations and times of the stages of a run, their Dice if the last one was validated, and the stages.

    What only the machinery needs is left out of them: paths do not belong into results.
    """
    dropped = ("checkpoint", "kept", "finished")
    kept = [{key: value for key, value in each.items() if key not in dropped} for each in stages]
    return {
        "iterations": sum(stage["iterations"] for stage in stages),
        "train_wall_s": sum(stage["wall_s"] for stage in stages),
        "train_cpu_s": sum(stage["cpu_s"] for stage in stages),
        **({"dice": stages[-1]["dice"]} if "dice" in stages[-1] else {}),
        "stages": kept,
    }
