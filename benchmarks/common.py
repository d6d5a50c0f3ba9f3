"""What every benchmark shares: folders, the machine it ran on, versions, tables, and results that survive a kill.

Every finished run is written at once, atomically, and is not run again by the next call (``--again`` does that).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
DATASET = "Dataset004_Hippocampus"
PACKAGES = ("nnunet-umit", "nnunetv2", "torch", "numpy", "dynamic_network_architectures", "batchgeneratorsv2", "timm")


# ------------------------------------------------------------------------------------------------ where things are
def data_root() -> Path:
    """Folder with the raw datasets and ``splits/``: ``$UMIT_DATA``, else ``../shared/data`` beside the repository.

    Raises:
        FileNotFoundError: if neither holds Dataset004_Hippocampus; says what to set.
    """
    candidates = [Path(os.environ["UMIT_DATA"])] if os.environ.get("UMIT_DATA") else []
    candidates.append(REPOSITORY.parent / "shared" / "data")
    for folder in candidates:
        if (folder / DATASET / "dataset.json").is_file():
            return folder.resolve()
    tried = ", ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(
        f"{DATASET}/dataset.json not found under {tried}. Set UMIT_DATA to a folder with {DATASET} in nnU-Net's raw "
        f"format and splits/{DATASET}.json (Medical Segmentation Decathlon Task04; see benchmarks/README.md)."
    )


def work_folder(argument: str | None = None) -> Path:
    """Scratch folder (preprocessed data, checkpoints): ``--work``, else ``$UMIT_BENCH_WORK``, else benchmarks/work."""
    folder = Path(argument or os.environ.get("UMIT_BENCH_WORK") or REPOSITORY / "benchmarks" / "work")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


# -------------------------------------------------------------------------------------------------------- machine
def available_cores() -> int:
    """Number of cores this process may use (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# pip compiles what it installs; where a checkout is imported instead, its modules are compiled once, not at every start
WITH_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}


def process_counts(threads: int) -> dict[str, str]:
    """nnU-Net's environment for so many threads: half as many processes load data."""
    return {
        "nnUNet_n_proc_DA": str(max(1, threads // 2)),
        "nnUNet_def_n_proc": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system: the figure is left out, nothing depends on it
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and load. No host name and no path: results are meant to be published."""
    return {
        "cpu": _cpu_model(),
        "cores_available": available_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions(extra: Iterable[str] = ()) -> dict[str, str]:
    """Installed versions of what the figures depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *extra):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def date_now() -> str:
    """In UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@functools.cache
def code_version() -> str | None:
    """The commit of the checkout that runs, with ``-dirty`` where files differ from it; None outside of one.

    Asked when a process starts (:class:`Results`, budgeted_training) and kept: a commit during an hour of training
    does not change the code that trains.
    """
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an installed or copied folder
        return None


def provenance(extra_packages: Iterable[str] = ()) -> dict[str, Any]:
    """When, on what, and with which versions a run was made. Stored with every run: a file may span machines."""
    return {
        "date": date_now(),
        "code": code_version(),
        "machine": machine(),
        "versions": versions(extra_packages),
    }


# -------------------------------------------------------------------------------------------------------- results
def write_json(path: Path, content: Any) -> None:
    """Write atomically: temporary file in the same folder, fsync, rename. A kill leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, sort_keys=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


PLACES = ("--work", "--results", "--nnssl")  # options whose values are paths of a machine


def without_place(word: str) -> str:
    """A path of this machine, ``/a/b`` or ``NAME=/a/b``, as its last part; other words as they are."""
    name, separator, value = word.rpartition("=")
    return f"{name}{separator}{Path(value).name}" if os.path.isabs(value) else word


def options_given(arguments: Sequence[str] | None = None) -> list[str]:
    """Command line of this process without the paths in it."""
    kept: list[str] = []
    words = iter(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if word in PLACES:
            next(words, None)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(without_place(word))
    return kept


class Results:
    """The runs of one benchmark, ``benchmarks/results/<name>.json``: benchmark, claim, command, and runs by key.

    Every ``put`` writes the file, so a benchmark that was killed goes on behind its last finished run.

    Args:
        name, claim: of the benchmark.
        folder: of the file; ``$UMIT_BENCH_RESULTS`` or benchmarks/results unless given.
        settings: options that change figures, are part of no key, and are not the defaults (:func:`unusual`). They
            are stored with each run, and a stored run that had others is refused.
        again: make every run once more, whatever is stored (``--again``).
    """

    def __init__(
        self,
        name: str,
        claim: str,
        folder: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        again: bool = False,
    ) -> None:
        code_version()  # now, not when the first run ends
        self.settings, self.again = dict(settings or {}), again
        self.made: set[str] = set()  # in this invocation
        root = Path(folder or os.environ.get("UMIT_BENCH_RESULTS") or REPOSITORY / "benchmarks" / "results")
        self.path = root / f"{name}.json"
        command = f"python -m benchmarks.{name} --full"
        self.content: dict[str, Any] = {"benchmark": name, "claim": claim, "command": command, "runs": {}}
        self._read()

    @classmethod
    def of(
        cls, options: argparse.Namespace, name: str, claim: str, settings: Mapping[str, Any] | None = None
    ) -> Results:
        """What the common ``options`` of a benchmark (:func:`parser`) ask for."""
        return cls(name, claim, options.results, settings, options.again)

    def _read(self) -> None:
        if self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(stored.get("runs"), dict):
                raise ValueError(f"{self.path} is not a benchmark result (no 'runs'); move it away and run again")
            self.content["runs"] = stored["runs"]

    @property
    def runs(self) -> dict[str, Any]:
        """Finished runs by key."""
        return dict(self.content["runs"])

    def get(self, key: str, settings: Mapping[str, Any] | None = None) -> Any:
        """The run stored under ``key``, or None.

        Args:
            settings: more of them, of this key only.

        Raises:
            ValueError: the stored run had others.
        """
        run, asked = self.content["runs"].get(key), self.settings | dict(settings or {})
        if run is not None and run.get("settings", {}) != asked:
            raise ValueError(
                f"{self.path.name} has {key} with {run.get('settings') or 'the default options'}, and now "
                f"{asked or 'the default options'} are asked for; give another --results folder"
            )
        return run

    def left(
        self, key: str, settings: Mapping[str, Any] | None = None, values: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether a run is still to be made; ``settings`` and errors as in :meth:`get`.

        Args:
            values: of the plans' umit block (:func:`umit_values`); a stored run that had others is refused, too.
        """
        if self.again:
            return key not in self.made
        run = self.get(key, settings)
        if run is not None and values is not None and run.get("umit_values", values) != values:
            raise ValueError(
                f"{self.path.name} has {key} with {run['umit_values'] or 'no --set'}, and now {values or 'none'} is "
                "asked for; give another --tag, or --again"
            )
        return run is None

    def put(self, key: str, run: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
        """Store one finished run, with the options of the command that made it, and write the file.

        What another process has stored since this one read the file is kept.
        """
        asked = self.settings | dict(settings or {})
        with locked(self.path.parent):
            self._read()
            self.content["runs"][key] = {**run, "options": options_given(), **({"settings": asked} if asked else {})}
            write_json(self.path, self.content)
        self.made.add(key)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` while a file in it is read and written again; others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unusual(options_parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options ``names`` that have another value than their default."""
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value != options_parser.get_default(name)}


# --------------------------------------------------------------------------------------------------------- output
def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table with aligned columns; floats keep four significant digits, None is a dash."""

    def text(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(headers), *cells]) for column in range(len(headers))]
    lines = ["| " + " | ".join(str(head).ljust(width) for head, width in zip(headers, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in cells:
        lines.append("| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |")
    return "\n".join(lines)


def verdict(found: float, bar: float, at_most: bool = True) -> str:
    """``0.214 (bar 0.35: met)``."""
    met = found <= bar if at_most else found >= bar
    return f"{found:.3f} (bar {bar:g}: {'met' if met else 'NOT met'})"


def say(*words: object) -> None:
    """Print at once, also into a pipe."""
    print(*words, flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Argument parser with the options that all benchmarks have."""
    arguments = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    mode = arguments.add_mutually_exclusive_group(required=True)
    mode.add_argument("--quick", action="store_true", help="a few minutes, to see that it runs; not for claims")
    mode.add_argument("--full", action="store_true", help="the figures that may be quoted")
    arguments.add_argument("--again", action="store_true", help="run again what the results file already holds")
    arguments.add_argument("--results", default=None, help="folder of the results file (default: benchmarks/results)")
    arguments.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    arguments.add_argument(
        "--keep-freed-memory", action="store_true", help="single steps: allocator as in UMIT trainers"
    )
    return arguments


def training_parser(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """Options of a benchmark that trains; ``--minutes`` is None until :func:`budget` fills it in."""
    options_parser = parser(description)
    add = options_parser.add_argument
    add("--minutes", type=float, default=None, help=f"training wall time of each run (default {minutes:g})")
    add("--replan", action="store_true", help="plan and preprocess with the UMIT planner again")
    add_place(options_parser)
    options_parser.set_defaults(set=[], tag="", validation_cases=None, validation_fold=0)
    return options_parser


def add_place(options_parser: argparse.ArgumentParser) -> None:
    """Where a benchmark that trains or predicts works: scratch folder and device."""
    add = options_parser.add_argument
    add("--work", default=None, help="scratch folder (default: $UMIT_BENCH_WORK or benchmarks/work)")
    add(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="cuda: with --results, or CPU figures are taken for done",
    )


def setting(text: str) -> tuple[str, Any]:
    """``finetune.learning_rate=0.002`` -> key and value (JSON; a bare word is a string)."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. finetune.learning_rate=0.002")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse_with_tuning(options_parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, with the options of a benchmark whose trainings may be tuned: another fold, other values in the plans."""
    add = options_parser.add_argument
    add("--validation-fold", type=int, default=0, choices=range(5), help="0 for the claim, 1-4 for tuning")
    add("--set", action="append", type=setting, default=[], metavar="KEY=VALUE",
        help="value of the plans' umit block, e.g. finetune.learning_rate=0.002; for tuning, with --tag")  # fmt: skip
    add("--tag", default="", help="kept in the key of the result, to tell tuning runs apart")
    options = options_parser.parse_args(arguments)
    if options.set and not options.tag:
        options_parser.error("--set changes the plans' values: name the runs with --tag")
    return options


def umit_values(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` asks for, as it is stored: without the paths of this machine."""
    return {key: without_place(value) if isinstance(value, str) else value for key, value in options.set}


def tagged(options: argparse.Namespace) -> str:
    """What a tag adds to the key of a run."""
    return f"+{options.tag}" if options.tag else ""


def budget(minutes: float | None, quick: bool, full: float) -> float:
    """Minutes of a training: what was asked for, else eight seconds for ``--quick``, else ``full``."""
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes {minutes:g} must be above 0, e.g. {full:g}")
    return minutes if minutes is not None else 8 / 60 if quick else full


def prepare_torch(options: argparse.Namespace) -> bool:
    """Set the threads and, with ``--keep-freed-memory``, the allocator: for the process, and so for all arms alike.

    Returns:
        Whether freed memory is kept (glibc only).
    """
    import torch

    from nnunet_umit.trainers.cpu import keep_freed_memory

    torch.set_num_threads(options.threads)
    return options.keep_freed_memory and keep_freed_memory()
