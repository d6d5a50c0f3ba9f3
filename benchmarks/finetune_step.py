"""Cost of one supervised training step on the hippocampus plan: UMIT against stock PlainConvUNet and Primus-S.

A step is what the trainer does with a batch: forward, Dice + CE (with deep supervision where the trainer has it),
backward, gradient clipping, optimiser. Each network keeps the optimiser of its own trainer: SGD with Nesterov momentum,
clip 12 (nnUNetTrainer); fused AdamW, clip 1 (Primus); fused AdamW with layer-wise rates, clip from the plan (UMIT).
Random images and labels: no data needed. The same batch for all. fp32, CPU.

Claim: UMIT costs at most 0.35 times the CPU seconds of PlainConvUNet at the same batch and patch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Results, parser, prepare_torch, provenance, say, verdict
from benchmarks.timing import interleaved, paired_ratio, repeat_line, step_table, summarise

CLAIM = "CPU seconds of a UMIT fine-tuning step <= 0.35 x PlainConvUNet at equal batch and patch"
BAR = 0.35
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
            "stem_channels": [8, 24, 64],
            "decoder_channels": [8, 24, 64],
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


def build_primus_s(patch: list[int]) -> nn.Module:
    """The network of nnU-Net's nnUNet_Primus_S_Trainer."""
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    class Patch:
        patch_size = patch

    return nnUNet_Primus_S_Trainer.build_network_architecture(None, Patch, 1, CLASSES, False)


def loss_function(scales: int) -> Callable[[Any, Any], Tensor]:
    """nnU-Net's Dice + CE; for ``scales`` > 1 its deep supervision with weights 1, 1/2, ... and the coarsest off."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    if scales == 1:
        return loss
    weights = [0.5**scale for scale in range(scales)]
    weights[-1] = 0.0
    return DeepSupervisionWrapper(loss, [weight / sum(weights) for weight in weights])


def optimiser(name: str, network: nn.Module, umit_finetune: dict[str, Any]) -> tuple[torch.optim.Optimizer, float]:
    """Optimiser and clipping norm of the trainer that goes with the network."""
    if name == "PlainConvUNet":
        return torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True), 12.0
    if name == "Primus-S":
        return torch.optim.AdamW(network.parameters(), 3e-4, weight_decay=5e-2, betas=(0.9, 0.98), fused=True), 1.0
    from nnunet_umit.config import UMITConfig
    from nnunet_umit.trainers.optimisation import adamw, parameter_groups

    config = UMITConfig.from_dict({"finetune": umit_finetune}).finetune
    groups = parameter_groups(
        network,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    return adamw(groups, betas=config.betas), config.clip_norm


def make_step(
    name: str, network: nn.Module, batch: int, patch: list[int], finetune: dict[str, Any]
) -> Callable[[], None]:
    """One complete training step of ``network`` on a fixed random batch."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 1, *patch, generator=generator)
    labels = torch.randint(0, CLASSES, (batch, 1, *patch), generator=generator).float()
    network.train()
    with torch.no_grad():
        outputs = network(image[:1])
    sizes = [output.shape[2:] for output in outputs] if isinstance(outputs, (list, tuple)) else [outputs.shape[2:]]
    targets: Any = [nn.functional.interpolate(labels, size) for size in sizes]
    targets = targets if len(sizes) > 1 else targets[0]
    loss = loss_function(len(sizes))
    optimizer, clip = optimiser(name, network, finetune)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(network(image), targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()

    return step


def measure(batch: int, plan: dict[str, Any], repeats: int, warmup: int, kept: bool) -> dict[str, Any]:
    """All three networks at one batch size, on the patch of the UMIT plan; ``kept`` is only noted."""
    patch = list(plan["patch_size"])
    torch.manual_seed(0)
    networks = {"PlainConvUNet": build(NNUNET_PLAN), "Primus-S": build_primus_s(patch), "UMIT": build(plan)}
    finetune = plan.get("umit", {}).get("finetune", {})
    steps = {name: make_step(name, network, batch, patch, finetune) for name, network in networks.items()}

    samples = interleaved(steps, repeats, warmup, repeat_line(repeats))
    return {
        "batch_size": batch,
        "patch_size": patch,
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": kept,
        "umit_arch_kwargs": plan["architecture"]["arch_kwargs"],
        "arms": {
            name: summarise(samples[name])
            | {
                "parameters": sum(parameter.numel() for parameter in networks[name].parameters()),
                "ratio": paired_ratio(samples[name], samples["PlainConvUNet"]),
            }
            for name in networks
        },
        **provenance(),
    }


def report(run: dict[str, Any]) -> str:
    """Table of one measurement and whether the claim holds."""
    size = " x ".join(map(str, run["patch_size"]))
    repeats = run["arms"]["UMIT"]["repeats"]
    found = run["arms"]["UMIT"]["ratio"]["cpu"]["median"]
    return (
        f"batch {run['batch_size']}, patch {size}, {run['threads']} threads, {repeats} paired repeats\n"
        f"{step_table(run['arms'], 'PlainConvUNet')}\nUMIT / PlainConvUNet = {verdict(found, BAR)}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the batch sizes that are not done yet and print their tables."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--plans", default=None, help="UMITPlans.json (default: the plan in this file)")
    options_parser.add_argument("--repeats", type=int, default=None, help="paired repeats (quick 3, full 15)")
    options = options_parser.parse_args(arguments)
    kept = prepare_torch(options)
    plan = read_plan(options.plans)
    results = Results("finetune_step", CLAIM, options.results)
    mode = "quick" if options.quick else "full"
    batches = [2] if options.quick else sorted({plan["batch_size"], NNUNET_PLAN["batch_size"]})
    repeats = options.repeats or (3 if options.quick else 15)
    for batch in batches:
        key = f"{mode}/batch{batch}/threads{options.threads}" + ("/kept" if kept else "")
        if results.get(key) is None or options.again:
            say(f"{key} ...")
            results.put(key, measure(batch, plan, repeats, 1 if options.quick else 2, kept))
        say(report(results.get(key)))


if __name__ == "__main__":
    main()
