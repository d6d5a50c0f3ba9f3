"""Cost of one supervised training step on the hippocampus plan: UMIT, PlainConvUNet, Primus-S and MONAI's UNETRs.

A step is what the trainer does with a batch: forward, Dice + CE (with deep supervision where the trainer has it),
backward, gradient clipping, optimiser. Each network keeps the optimiser of its own trainer: SGD with Nesterov momentum,
clip 12 (nnUNetTrainer); fused AdamW, clip 1 (Primus, and MONAI's networks, which have no trainer); fused AdamW with
layer-wise rates, clip from the plan, and the balanced cross-entropy of the first half of a training (UMIT). Random
images and labels: no data needed. The same batch for all, and the same patch, but UNETR and SwinUNETR cannot take it:
they get the next one that they can, 48 x 64 x 48 and 64 x 64 x 64. fp32, CPU. Peak memory is that of two steps in a
process of its own, the median of three processes. One more row tells what activation checkpointing costs and saves.

Claims: CPU seconds of UMIT at most 0.25 times PlainConvUNet's, and no more than Primus-S's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha1
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.common import Results, parser, prepare_torch, provenance, say, verdict
from benchmarks.step_memory import PROCESSES, memory_figures, peak_memories
from benchmarks.timing import interleaved, paired_ratio, repeat_line, step_table, summarise

CLAIM = "CPU seconds of a UMIT fine-tuning step <= 0.25 x PlainConvUNet and <= 1.0 x Primus-S at equal batch and patch"
BAR = 0.25
CHECKPOINTING = "UMIT, activation checkpointing"
PADDED = {"MONAI UNETR": [48, 64, 48], "MONAI SwinUNETR": [64, 64, 64]}  # multiples of 16 and of 32
ARMS = ("PlainConvUNet", "Primus-S", "UMIT", CHECKPOINTING, *PADDED)
OURS = ("UMIT", CHECKPOINTING)
CLASSES = 3  # background, anterior, posterior

# nnU-Net 2.8.1's default plan for Dataset004_Hippocampus (206 cases), 3d_fullres
NNUNET_PLAN: dict[str, Any] = {
    "batch_size": 7,
    "patch_size": [40, 56, 40],
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [32, 64, 128, 256],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 4,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [2, 2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2, 2],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
}
# UMITPlanner's plan for the same data set; --plans reads a newer one
UMIT_PLAN: dict[str, Any] = {
    "batch_size": 4,
    "patch_size": [40, 56, 40],
    "architecture": {
        "network_class_name": "nnunet_umit.architectures.unetr.UMITSegmenter",
        "arch_kwargs": {
            "spacing": [1.0, 1.0, 1.0],
            "token_size": 8,
            "stem": "conv",
            "embed_dim": 256,
            "depth": 8,
            "num_heads": 8,
            "stem_channels": [8, 16, 32],
            "decoder_channels": [8, 16, 32],
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        },
        "_kw_requires_import": [],
    },
}


def read_plan(path: str | None) -> dict[str, Any]:
    """The 3d_fullres configuration of a UMIT plans file, or the one above."""
    if path is None:
        return UMIT_PLAN
    return json.loads(Path(path).read_text(encoding="utf-8"))["configurations"]["3d_fullres"]


def build(plan: dict[str, Any]) -> nn.Module:
    """The network of a plan as nnU-Net builds it for training: one input channel, three classes, deep supervision."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plan["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        CLASSES,
        allow_init=True,
        deep_supervision=True,
    )


def loss_function(scales: int, balanced: bool = False) -> Callable[[Any, Any], Tensor]:
    """nnU-Net's Dice + CE; for ``scales`` > 1 its deep supervision with weights 1, 1/2, ... and the coarsest off.

    Args:
        balanced: UMIT's balanced cross-entropy is added, as in the first half of a training.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from nnunet_umit.trainers.balance import balanced_cross_entropy

    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    loss: Callable[[Any, Any], Tensor] = stock
    if balanced:
        loss = lambda output, target: stock(output, target) + balanced_cross_entropy(output, target)  # noqa: E731
    if scales == 1:
        return loss
    weights = [0.5**scale for scale in range(scales)]
    weights[-1] = 0.0
    return DeepSupervisionWrapper(loss, [weight / sum(weights) for weight in weights])


def optimiser(name: str, network: nn.Module, umit_finetune: dict[str, Any]) -> tuple[torch.optim.Optimizer, float]:
    """Optimiser and clipping norm of the trainer that goes with the network."""
    if name == "PlainConvUNet":
        return torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True), 12.0
    if name == "Primus-S" or name in PADDED:
        return torch.optim.AdamW(network.parameters(), 3e-4, weight_decay=5e-2, betas=(0.9, 0.98), fused=True), 1.0
    from nnunet_umit.config import UMITConfig
    from nnunet_umit.trainers.optimisation import adamw, parameter_groups

    config = UMITConfig.from_dict({"finetune": umit_finetune}).finetune
    groups = parameter_groups(
        network,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        transformer_rate=config.transformer_rate,
    )
    return adamw(groups, betas=config.betas), config.clip_norm


def precision(device: torch.device) -> AbstractContextManager:
    """As the trainers have it: bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def make_step(
    name: str,
    network: nn.Module,
    batch: int,
    patch: list[int],
    finetune: dict[str, Any],
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    compiled: bool = False,
) -> Callable[[], None]:
    """One complete training step of ``network`` on a fixed random batch; with ``compiled``, as nnU-Net compiles it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 1, *patch, generator=generator).to(device)
    labels = torch.randint(0, CLASSES, (batch, 1, *patch), generator=generator).float().to(device)
    network.to(device).train()
    forward = torch.compile(network) if compiled else network
    with torch.no_grad():
        outputs = network(image[:1])
    sizes = [output.shape[2:] for output in outputs] if isinstance(outputs, (list, tuple)) else [outputs.shape[2:]]
    targets: Any = [nn.functional.interpolate(labels, size) for size in sizes]
    targets = targets if len(sizes) > 1 else targets[0]
    loss = loss_function(len(sizes), balanced=name in OURS)
    optimizer, clip = optimiser(name, network, finetune)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision(device):
            value = loss(forward(image), targets)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()

    return step


def with_checkpointing(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, with the blocks of the transformer recomputed in the backward pass."""
    architecture = plan["architecture"]
    return plan | {
        "architecture": architecture | {"arch_kwargs": architecture["arch_kwargs"] | {"checkpointing": True}}
    }


def build_arm(arm: str, batch: int, plan: dict[str, Any]) -> tuple[nn.Module, Callable[[], None]]:
    """The network of an arm, and its training step on the patch of the UMIT plan or the next it can take."""
    patch = PADDED.get(arm, list(plan["patch_size"]))
    torch.manual_seed(0)
    builders: dict[str, Callable[[], nn.Module]] = {
        "PlainConvUNet": lambda: build(NNUNET_PLAN),
        "Primus-S": lambda: peers.primus_s(patch, CLASSES),
        "UMIT": lambda: build(plan),
        CHECKPOINTING: lambda: build(with_checkpointing(plan)),
        "MONAI UNETR": lambda: peers.unetr(patch, CLASSES),
        "MONAI SwinUNETR": lambda: peers.swin_unetr(CLASSES),
    }
    network = builders[arm]()
    return network, make_step(arm, network, batch, patch, plan.get("umit", {}).get("finetune", {}))


def step_of(arm: str, batch: int, plan: dict[str, Any]) -> Callable[[], None]:
    """The step alone, for a process that measures memory."""
    return build_arm(arm, batch, plan)[1]


def measure(batch: int, plan: dict[str, Any], repeats: int, quick: bool, kept: bool) -> dict[str, Any]:
    """All networks at one batch size; ``kept`` is only noted."""
    threads = torch.get_num_threads()
    builders = {arm: ("benchmarks.finetune_step:step_of", arm, batch, plan) for arm in ARMS}
    memory = peak_memories(builders, 1 if quick else PROCESSES, threads)
    built = {arm: build_arm(arm, batch, plan) for arm in ARMS}
    steps = {arm: step for arm, (_, step) in built.items()}
    samples = interleaved(steps, repeats, 1 if quick else 2, repeat_line(repeats))
    return {
        "batch_size": batch,
        "patch_size": list(plan["patch_size"]),
        "threads": threads,
        "keeps_freed_memory": kept,
        "umit_arch_kwargs": plan["architecture"]["arch_kwargs"],
        "arms": {
            arm: summarise(samples[arm])
            | memory_figures(memory[arm])
            | {
                "patch_size": PADDED.get(arm, list(plan["patch_size"])),
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "ratio": paired_ratio(samples[arm], samples["PlainConvUNet"]),
                "ratio_to_primus_s": paired_ratio(samples[arm], samples["Primus-S"]),
            }
            for arm, (network, _) in built.items()
        },
        **provenance(["monai"]),
    }


def report(run: dict[str, Any]) -> str:
    """Table of one measurement and whether the claims hold."""
    size, ours = " x ".join(map(str, run["patch_size"])), run["arms"]["UMIT"]
    named = {}
    for arm, found in run["arms"].items():
        own = " x ".join(map(str, found["patch_size"]))
        named[arm if own == size else f"{arm}, {own}"] = found
    lines = [
        f"batch {run['batch_size']}, patch {size}, {run['threads']} threads, {ours['repeats']} paired repeats",
        step_table(named, "PlainConvUNet"),
        f"UMIT / PlainConvUNet, CPU seconds = {verdict(ours['ratio']['cpu']['median'], BAR)}",
    ]
    if "ratio_to_primus_s" in ours:
        lines.append(f"UMIT / Primus-S, CPU seconds = {verdict(ours['ratio_to_primus_s']['cpu']['median'], 1.0)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure the batch sizes that are not done yet and print their tables."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--plans", default=None, help="UMITPlans.json (default: the plan in this file)")
    options_parser.add_argument("--repeats", type=int, default=None, help="paired repeats (quick 3, full 15)")
    sizes = "this batch size only (may be repeated; default: UMIT's and nnU-Net's)"
    options_parser.add_argument("--batch", type=int, action="append", help=sizes)
    options = options_parser.parse_args(arguments)
    kept = prepare_torch(options)
    plan = read_plan(options.plans)
    settings = {} if options.plans is None else {"plans_sha1": sha1(json.dumps(plan).encode()).hexdigest()}
    results = Results.of(options, "finetune_step", CLAIM, settings)
    mode = "quick" if options.quick else "full"
    planned = [2] if options.quick else sorted({plan["batch_size"], NNUNET_PLAN["batch_size"]})
    repeats = options.repeats or (3 if options.quick else 15)
    for batch in options.batch or planned:
        key = f"{mode}/batch{batch}/threads{options.threads}" + ("/kept" if kept else "")
        if results.left(key):
            say(f"{key} ...")
            results.put(key, measure(batch, plan, repeats, options.quick, kept))
        say(report(results.get(key)))


if __name__ == "__main__":
    main()
