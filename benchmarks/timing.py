"""Timing of single steps.

- Arms are timed *interleaved* (one repeat runs every arm once, in rotating order), so that a noisy neighbour hits all
  of them alike, and ratios are taken *within* a repeat before the median is formed.
- Wall seconds and CPU seconds are both kept. CPU seconds are the process CPU time, threads included
  (``time.process_time``); they hold still on a busy machine where wall seconds do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import say, table


@dataclass(frozen=True)
class Sample:
    """One timed call. ``wall`` and ``cpu`` in seconds; ``cpu`` counts all threads of the process."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Sample:
    """Run ``call`` once and return its wall and CPU seconds; a call that runs elsewhere times itself (``timed()``)."""
    elsewhere = getattr(call, "timed", None)
    if elsewhere is not None:
        sample: Sample = elsewhere()
        return sample
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


def step_table(arms: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """Table of timed steps; each arm holds :func:`summarise`, ``parameters``, ``ratio`` (to ``reference``) and, where
    it was measured, ``peak_memory_bytes``, with the least and the most of several processes."""

    def middle(figures: Mapping[str, float]) -> str:
        return f"{figures['median']:.3f} ({figures['q1']:.3f}-{figures['q3']:.3f})"

    rows = []
    for name, arm in arms.items():
        figures = (arm["cpu_s"], arm["wall_s"], arm["ratio"]["cpu"], arm["ratio"]["wall"])
        memory = arm.get("peak_memory_bytes")
        peak = f"{memory / 1e9:.2f}" if memory else None
        every = arm.get("peak_memory_of_processes_bytes", [])
        if len(every) > 1:
            peak = f"{peak} ({min(every) / 1e9:.2f}-{max(every) / 1e9:.2f})"
        rows.append([name, f"{arm['parameters'] / 1e6:.1f}", *map(middle, figures), peak])
    seconds = ["CPU s: median (quartiles)", "wall s"]
    heads = ["network", "M parameters", *seconds, f"CPU / {reference}", f"wall / {reference}", "peak GB"]
    return table(heads, rows)


def repeat_line(repeats: int) -> Callable[[int, dict[str, Sample]], None]:
    """Progress of :func:`interleaved`: one line a repeat."""

    def line(index: int, samples: dict[str, Sample]) -> None:
        figures = ", ".join(f"{name} {sample.cpu:.2f}" for name, sample in samples.items())
        say(f"  repeat {index + 1}/{repeats}, CPU seconds: {figures}")

    return line
