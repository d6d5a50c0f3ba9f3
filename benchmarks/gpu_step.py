"""Training steps on a GPU: milliseconds, peak memory and use of the card, beside the arithmetic and the peers.

The cases are those of ``benchmarks.arithmetic``. For each of them, bfloat16 autocast as the trainers have it: UMIT's
pre-training and fine-tuning step, as they are and compiled; and, on the same batch and patch, the fine-tuning steps of
Primus-S and of the PlainConvUNet that nnU-Net lays out for that patch (padded where its poolings ask for it; compiled
too, as nnU-Net does by default). Networks, losses and optimisers are those of ``finetune_step`` and ``mae_step``;
images are random and already on the card, so no loader is measured. One repeat
takes ``--steps`` steps of every arm in turn and waits for the card; peaks are those of PyTorch's allocator, without the
CUDA context. ``--device cpu`` shows that the script works.

Claims: none yet; the planner's memory model and the arithmetic are held against what is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import arithmetic, finetune_step, mae_step, peers
from benchmarks.common import Results, parser, prepare_torch, provenance, say, table
from benchmarks.timing import Sample, interleaved, paired_ratio, repeat_line, summarise

CLAIM = "what a training step takes on a GPU, against the arithmetic, the planned memory and the peers"
PRETRAIN, FINETUNE = "UMIT pre-training", "UMIT fine-tuning"
COMPILED = ", compiled"
PLAIN, PRIMUS = "PlainConvUNet", "Primus-S"
ARMS = (PLAIN, PLAIN + COMPILED, PRIMUS, FINETUNE, FINETUNE + COMPILED, PRETRAIN, PRETRAIN + COMPILED)
BFLOAT16_CAPABILITY = (8, 0)


def device_named(name: str) -> torch.device:
    """The device to measure on.

    Raises:
        RuntimeError: there is no such GPU, or it has no bfloat16.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("--device cuda: PyTorch finds no CUDA device; --device cpu only shows that this works")
        if torch.cuda.get_device_capability() < BFLOAT16_CAPABILITY:
            raise RuntimeError(f"{torch.cuda.get_device_name()} has no bfloat16, with which these steps are taken")
    return torch.device(name)


def name_of(device: torch.device) -> str:
    """Of the card, or ``cpu``."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def plain_conv_unet(patch: Sequence[int], spacing: Sequence[float]) -> tuple[dict[str, Any], list[int]]:
    """The PlainConvUNet that nnU-Net's planner lays out for a patch, as its plans have it, and the patch it takes."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, padded, _ = get_pool_and_conv_props(list(spacing), list(patch), 4, 999999)
    stages = len(strides)
    base = finetune_step.NNUNET_PLAN["architecture"]
    kwargs = base["arch_kwargs"] | {
        "n_stages": stages,
        "features_per_stage": [min(320, 32 * 2**stage) for stage in range(stages)],
        "kernel_sizes": [list(each) for each in kernels],
        "strides": [list(each) for each in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    return {"architecture": base | {"arch_kwargs": kwargs}}, [int(size) for size in padded]


def build(arm: str, case: str, device: torch.device) -> tuple[nn.Module, Callable[[], None]]:
    """Network and training step of an arm."""
    size, patch, spacing, token, batch = arithmetic.CASES[case]
    name, compiled = arm.removesuffix(COMPILED), arm.endswith(COMPILED)
    arch = arithmetic.arch_kwargs(size, spacing, token)
    torch.manual_seed(0)
    if name == PRETRAIN:
        return pretraining(arch, patch, batch, device, compiled)
    if name == FINETUNE:
        segmenter = "nnunet_umit.architectures.unetr.UMITSegmenter"
        plan = {"network_class_name": segmenter, "arch_kwargs": arch, "_kw_requires_import": []}
        network = finetune_step.build({"architecture": plan})
    elif name == PRIMUS:
        network = peers.primus_s(patch, arithmetic.CLASSES)
    else:
        plan, patch = plain_conv_unet(patch, spacing)
        network = finetune_step.build(plan)
    known = "UMIT" if name == FINETUNE else name
    return network, finetune_step.make_step(known, network, batch, list(patch), {}, device, compiled)


def pretraining(
    arch: dict[str, Any], patch: Sequence[int], batch: int, device: torch.device, compiled: bool
) -> tuple[nn.Module, Callable[[], None]]:
    """A masked autoencoder with the plan's defaults, and its step."""
    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.config import UMITConfig

    network = MaskedAutoencoder.from_arch_kwargs(1, arch, UMITConfig().pretrain).to(device)
    image = torch.randn(batch, 1, *patch, device=device)
    forward = torch.compile(network) if compiled else network

    def loss() -> torch.Tensor:
        with finetune_step.precision(device):
            value: torch.Tensor = forward(image).loss
        return value

    return network, mae_step.make_step(network, loss)


def finished(step: Callable[[], None], steps: int, device: torch.device) -> None:
    """Take some steps, and wait until the device has."""
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_of(arm: str, case: str, device: torch.device) -> tuple[int | None, int, Callable[[], None]]:
    """Bytes that building an arm and two steps take at most (None on a CPU), its parameters, its step."""
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    network, step = build(arm, case, device)
    finished(step, 2, device)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    return peak, sum(parameter.numel() for parameter in network.parameters()), step


def measure(case: str, arms: Sequence[str], device: torch.device, repeats: int, steps: int) -> dict[str, Any]:
    """All arms of a case."""
    from nnunet_umit.plans.memory import CONTEXT_BYTES

    torch.compiler.reset()  # else the sizes of the last case make those of this one dynamic, as in no training
    size, patch, spacing, token, batch = arithmetic.CASES[case]
    padded = plain_conv_unet(patch, spacing)[1]
    operations = arithmetic.operations(size, patch, spacing, token)
    planned = operations["constant_bytes"] + batch * operations["sample_bytes"] - CONTEXT_BYTES
    content: dict[str, Any] = {"batch_size": batch, "patch_size": list(patch), "tokens": operations["tokens"]}
    content |= {"device": name_of(device), "steps": steps}
    content |= {"planned_bytes": planned, "arms": {}, **provenance(["triton"])}
    calls: dict[str, Callable[[], None]] = {}
    for arm in arms:
        peak, parameters, step = peak_of(arm, case, device)
        calls[arm] = partial(finished, step, steps, device)
        taken = padded if arm.removesuffix(COMPILED) == PLAIN else list(patch)
        content["arms"][arm] = {"peak_memory_bytes": peak, "parameters": parameters, "patch_size": taken}
        say(f"  {arm}: built, peak {'-' if peak is None else f'{peak / 1e9:.2f} GB'}")
    samples = interleaved(calls, repeats, 1, repeat_line(repeats))
    each = {arm: [Sample(one.wall / steps, one.cpu / steps) for one in found] for arm, found in samples.items()}
    for arm, found in each.items():
        kind = {FINETUNE: "finetune", PRETRAIN: "pretrain"}.get(arm.removesuffix(COMPILED))
        reference = each.get(PLAIN + COMPILED if arm.endswith(COMPILED) else PLAIN)
        content["arms"][arm] |= summarise(found)
        if kind is not None:
            content["arms"][arm]["operations"] = batch * operations[kind]
        if reference:
            content["arms"][arm]["ratio"] = paired_ratio(found, reference)
    return content


def report(runs: Mapping[str, Any]) -> str:
    """One table: cases by arms."""
    rows = []
    for key, run in runs.items():
        for arm, found in run["arms"].items():
            wall = found["wall_s"]["median"]
            rate = f"{found['operations'] / wall / 1e12:.1f}" if "operations" in found else None
            ratio = f"{found['ratio']['wall']['median']:.2f}" if "ratio" in found else None
            peak = None if found["peak_memory_bytes"] is None else f"{found['peak_memory_bytes'] / 1e9:.2f}"
            planned = f"{run['planned_bytes'] / 1e9:.2f}" if arm.startswith(FINETUNE) else None
            case = key.rsplit("/", 1)[-1]
            taken = found.get("patch_size", run["patch_size"])
            shown = arm if taken == run["patch_size"] else f"{arm} ({' x '.join(map(str, taken))})"
            rows.append([case, run["batch_size"], shown, f"{1e3 * wall:.2f}", ratio, rate, peak, planned])
    heads = [
        "case",
        "batch",
        "step",
        "ms: median",
        f"wall / {PLAIN} of the same kind",
        "TFLOP/s",
        "peak GB",
        "planned GB",
    ]
    names = sorted({run["device"] for run in runs.values()})
    return table(heads, rows) + f"\n\nMeasured on: {', '.join(names)}"


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases that are not done yet, print the table."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--case", action="append", choices=list(arithmetic.CASES), help="default: all; quick: the first")
    add("--arm", action="append", choices=ARMS, help="default: all; quick: without the compiled ones")
    add("--repeats", type=int, default=None, help="paired repeats (quick 2, full 15)")
    add("--steps", type=int, default=None, help="steps an arm takes in a repeat (quick 1, full 10)")
    options = options_parser.parse_args(arguments)
    prepare_torch(options)
    device = device_named(options.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train sets it
    chosen = {name: value for name, value in {"arm": options.arm, "steps": options.steps}.items() if value is not None}
    results, mode = Results.of(options, "gpu_step", CLAIM, chosen), "quick" if options.quick else "full"
    name = name_of(device)
    repeats, steps = options.repeats or (2 if options.quick else 15), options.steps or (1 if options.quick else 10)
    arms = options.arm or [arm for arm in ARMS if not (options.quick and arm.endswith(COMPILED))]
    for case in options.case or list(arithmetic.CASES)[: 1 if options.quick else None]:
        key = f"{mode}/{name}/{case}"
        if results.left(key):
            say(f"{key} ...")
            results.put(key, measure(case, arms, device, repeats, steps))
    say(report({key: run for key, run in results.runs.items() if key.startswith(f"{mode}/{name}/")}))


if __name__ == "__main__":
    main()
