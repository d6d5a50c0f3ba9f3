"""How much of a step is matrix products and attention: what equal work in equal precision cannot save."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "mkldnn_convolution",
        "convolution_backward",
    )
)


def share_of_products(step: Callable[[], object], repeats: int = 3) -> float:
    """Share of the wall time of ``step`` that torch's profiler finds in these operators themselves, on a CPU.

    The step should have run before: the first one also allocates.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        wall = time.perf_counter() - started
    inside = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key in PRODUCTS)
    return float(inside / 1e6 / wall)
