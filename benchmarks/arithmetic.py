"""What a step should cost on a GPU, by arithmetic alone: nobody has run this package on one yet.

Floating-point operations of matrix products, convolutions and attention are counted on tensors without data (forward
and backward); divided by ``--tflops`` (989, an H100's dense bf16) times ``--utilisation`` (0.4 and 0.2) they give
seconds. Convolutions of few channels and everything elementwise run below that: expect the conv rows to be optimistic.
Memory is the planner's model (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Results, parser, provenance, say, table
from nnunet_umit.plans import layout

CLAIM = "expected cost of training steps on a GPU; arithmetic, not measured"
TFLOPS = 989.0
CLASSES = 3
UTILISATION = (0.4, 0.2)
CASES: dict[str, tuple[str, tuple[int, int, int], tuple[float, float, float], int, int]] = {
    # name: size, patch, spacing, token, batch
    "hippocampus, XS": ("XS", (40, 56, 40), (1.0, 1.0, 1.0), 8, 4),
    "ACDC, XS": ("XS", (16, 176, 176), (6.95, 1.56, 1.56), 16, 2),
    "128 x 128 x 128, S": ("S", (128, 128, 128), (1.0, 1.0, 1.0), 8, 2),
    "160 x 160 x 160, B": ("B", (160, 160, 160), (1.0, 1.0, 1.0), 8, 2),
}


def arch_kwargs(size: str, spacing: tuple[float, ...], token: int) -> dict[str, Any]:
    """Arguments of the network as the planner writes them."""
    extent = tuple(1.0 for _ in spacing)  # what the arguments do not depend on
    return layout.Task(spacing, extent, 1.0, 1, CLASSES, 1.0).arch_kwargs(size, token)


def operations(size: str, patch: tuple[int, ...], spacing: tuple[float, ...], token: int) -> dict[str, Any]:
    """Operations of one sample, forward and backward, and the memory of a fine-tuning step in bytes."""
    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.architectures.unetr import UMITSegmenter
    from nnunet_umit.config import UMITConfig
    from nnunet_umit.plans.memory import predict_training_memory

    arch = arch_kwargs(size, spacing, token)
    found: dict[str, Any] = {"tokens": 0}
    with torch.device("meta"):
        masked = MaskedAutoencoder.from_arch_kwargs(1, arch, UMITConfig().pretrain)
        segmenter = UMITSegmenter(1, CLASSES, **arch)
        image = torch.empty(1, 1, *patch)
        grid = segmenter.encoder.grid(image)
        hidden = round(0.75 * grid.tokens)
        order = torch.arange(grid.tokens)[None]
        masks = (order[:, hidden:], order[:, :hidden])
        for name, forward in (
            ("pretrain", lambda: masked(image, masks=masks).loss),
            ("finetune", lambda: sum(each.mean() for each in segmenter(image))),
        ):
            with FlopCounterMode(display=False) as counter:
                forward().backward()
            found[name] = counter.get_total_flops()
    found["tokens"] = grid.tokens
    found["parameters"] = sum(parameter.numel() for parameter in segmenter.parameters())
    memory = predict_training_memory(arch, patch, 1, CLASSES)
    return found | {"constant_bytes": memory.total(0), "sample_bytes": memory.sample_bytes}


def measure() -> dict[str, Any]:
    """Count all cases."""
    cases = {}
    for name, (size, patch, spacing, token, batch) in CASES.items():
        cases[name] = operations(size, patch, spacing, token) | {"batch_size": batch, "patch_size": list(patch)}
    return {"cases": cases, **provenance()}


def report(run: Mapping[str, Any], tflops: float = TFLOPS) -> str:
    """Expected milliseconds of a step at both utilisations, and what the loader has to deliver at the higher one."""
    rows = []
    for name, case in run["cases"].items():
        batch = case["batch_size"]
        cells: list[object] = [name, batch, case["tokens"], f"{case['parameters'] / 1e6:.1f}"]
        for kind in ("pretrain", "finetune"):
            seconds = [batch * case[kind] / (tflops * 1e12 * share) for share in UTILISATION]
            cells += [f"{case[kind] / 1e9:.0f}", " / ".join(f"{1e3 * each:.2f}" for each in seconds)]
        memory = (case["constant_bytes"] + batch * case["sample_bytes"]) / 1e9
        rows.append([*cells, f"{memory:.1f}"])
    shares = " / ".join(f"{100 * share:.0f} %" for share in UTILISATION)
    step = f"ms a step at {shares}"
    heads = ["case", "batch", "tokens", "M parameters", "pre-training GFLOP a sample", step]
    return table([*heads, "fine-tuning GFLOP a sample", step, "fine-tuning GB"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Count what is not counted yet and print the table."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--tflops", type=float, default=TFLOPS, help="of the GPU, dense, half precision")
    options = options_parser.parse_args(arguments)
    results, key = Results.of(options, "arithmetic", CLAIM), "quick" if options.quick else "full"
    if results.left(key):
        results.put(key, measure())
    say(report(results.get(key), options.tflops))


if __name__ == "__main__":
    main()
