"""What every benchmark shares: the machine it ran on, versions, paired timing, tables, and results that survive a kill.

Rules kept by every script of this folder:

- arms are timed *interleaved* (one repeat runs every arm once, in rotating order), so that a noisy neighbour hits all
  of them alike, and ratios are taken *within* a repeat before the median is formed;
- wall seconds and CPU seconds are both kept. CPU seconds are the process CPU time, threads included
  (``time.process_time``); they hold still on a busy machine where wall seconds do not;
- every finished run is written at once, atomically, and is not run again by the next call (``--again`` does that).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


def provenance(extra_packages: Iterable[str] = ()) -> dict[str, Any]:
    """When, on what, and with which versions a run was made. Stored with every run: a file may span machines."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": versions(extra_packages),
    }


# --------------------------------------------------------------------------------------------------------- timing
@dataclass(frozen=True)
class Sample:
    """One timed call. ``wall`` and ``cpu`` in seconds; ``cpu`` counts all threads of the process."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Sample:
    """Run ``call`` once and return its wall and CPU seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Sample(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    on_repeat: Callable[[int, dict[str, Sample]], None] | None = None,
) -> dict[str, list[Sample]]:
    """Time every arm ``repeats`` times, one call of each arm per repeat, the first arm rotating.

    Args:
        arms: name -> call without arguments, which does one complete unit of work (one training step).
        repeats: number of paired repeats, at least 1.
        warmup: untimed calls of each arm before the first repeat.
        on_repeat: called with (index, samples of this repeat), for progress lines.

    Returns:
        name -> samples; sample ``i`` of every arm belongs to the same repeat.

    Raises:
        ValueError: no arm, or fewer than one repeat.
    """
    if not arms or repeats < 1:
        raise ValueError(f"need at least one arm and one repeat, got {len(arms)} arms and {repeats} repeats")
    for _ in range(warmup):
        for call in arms.values():
            call()
    names = list(arms)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for index in range(repeats):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(arms[name]))
        if on_repeat is not None:
            on_repeat(index, {name: samples[name][-1] for name in names})
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, smallest and largest of ``values`` (one value: all the same)."""
    if not values:
        raise ValueError("spread of no values")
    if len(values) == 1:
        q1 = q3 = float(values[0])
    else:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    figures = {"median": statistics.median(values), "q1": q1, "q3": q3, "min": min(values), "max": max(values)}
    return {name: round(float(value), 6) for name, value in figures.items()}


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """JSON of one arm's samples: spread of wall and CPU seconds, and their number."""
    return {
        "repeats": len(samples),
        "wall_s": spread([sample.wall for sample in samples]),
        "cpu_s": spread([sample.cpu for sample in samples]),
    }


def paired_ratio(numerator: Sequence[Sample], denominator: Sequence[Sample]) -> dict[str, Any]:
    """Spread of the within-repeat ratios numerator / denominator, of CPU and of wall seconds.

    Raises:
        ValueError: the two lists differ in length, so they are not paired.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"not paired: {len(numerator)} samples against {len(denominator)}")
    return {
        "cpu": spread([a.cpu / b.cpu for a, b in zip(numerator, denominator, strict=True)]),
        "wall": spread([a.wall / b.wall for a, b in zip(numerator, denominator, strict=True)]),
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


class Results:
    """The runs of one benchmark, ``benchmarks/results/<name>.json``: ``{"benchmark", "claim", "runs": {key: run}}``.

    Every ``put`` writes the file, so a benchmark that was killed goes on behind its last finished run.
    """

    def __init__(self, name: str, claim: str, folder: str | Path | None = None) -> None:
        root = Path(folder or os.environ.get("UMIT_BENCH_RESULTS") or REPOSITORY / "benchmarks" / "results")
        self.path = root / f"{name}.json"
        self.content: dict[str, Any] = {"benchmark": name, "claim": claim, "runs": {}}
        if self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(stored.get("runs"), dict):
                raise ValueError(f"{self.path} is not a benchmark result (no 'runs'); move it away and run again")
            self.content["runs"] = stored["runs"]

    @property
    def runs(self) -> dict[str, Any]:
        """Finished runs by key."""
        return dict(self.content["runs"])

    def get(self, key: str) -> Any:
        """The run stored under ``key``, or None."""
        return self.content["runs"].get(key)

    def put(self, key: str, run: Any) -> None:
        """Store one finished run and write the file."""
        self.content["runs"][key] = run
        write_json(self.path, self.content)


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


def step_table(arms: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """Table of timed steps; each arm holds :func:`summarise`, ``parameters`` and ``ratio`` (to ``reference``)."""

    def middle(figures: Mapping[str, float]) -> str:
        return f"{figures['median']:.3f} ({figures['q1']:.3f}-{figures['q3']:.3f})"

    rows = []
    for name, arm in arms.items():
        figures = (arm["cpu_s"], arm["wall_s"], arm["ratio"]["cpu"], arm["ratio"]["wall"])
        rows.append([name, f"{arm['parameters'] / 1e6:.1f}", *map(middle, figures)])
    seconds = ["CPU s: median (quartiles)", "wall s"]
    return table(["network", "M parameters", *seconds, f"CPU / {reference}", f"wall / {reference}"], rows)


def repeat_line(repeats: int) -> Callable[[int, dict[str, Sample]], None]:
    """Progress of :func:`interleaved`: one line a repeat."""

    def line(index: int, samples: dict[str, Sample]) -> None:
        figures = ", ".join(f"{name} {sample.cpu:.2f}" for name, sample in samples.items())
        say(f"  repeat {index + 1}/{repeats}, CPU seconds: {figures}")

    return line


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
    return arguments
