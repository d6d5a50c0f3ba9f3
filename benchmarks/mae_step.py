"""Cost of one masked-autoencoder step: ours against MONAI's MaskedAutoEncoderViT of equal size.

Equal: image, tokens, encoder width, depth and heads, weights of the MLP (MONAI 4 x width and two matrices, ours 8/3 x
width and three), decoder width, depth and heads, mask ratio 0.75, batch 2 (1 with 4096 tokens), fp32, per-patch
normalised mean squared error over hidden tokens, optimiser torch.optim.AdamW(lr 1.5e-4, betas (0.9, 0.95), weight decay
0.05, fused) over all parameters. A step is masking, forward, loss, backward, optimiser. Extra rows: ours with its own
narrow decoder, with the patch stem and with the conv stem that the planner chooses. Peak memory: two steps in a process
of their own, the median of three processes.

Where the CPU has avx512_bf16 or AMX, one more row is ours at equal size with the transformer's products in bfloat16.

MONAI is measured, never used: it is no dependency. It is installed beside the benchmarks if it is missing. With
``--nnssl CHECKOUT`` nnssl's EvaMAE is one more row (nnssl.py), with the same decoder depth and 8 heads of 48 channels.

Beside the times stands the share of a step that is matrix products and attention (products.py): equal work in equal
precision cannot save that.

Claims: our step costs at most 0.7 times the CPU seconds and 0.7 times the memory of MONAI's; with bfloat16 at most 0.6
times ours.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import nnssl, peers
from benchmarks.common import Results, parser, prepare_torch, provenance, say, verdict
from benchmarks.products import share_of_products
from benchmarks.step_memory import PROCESSES, memory_figures, peak_memories
from benchmarks.step_process import StepProcess
from benchmarks.timing import interleaved, paired_ratio, repeat_line, step_table, summarise

CLAIM = "an MAE step takes <= 0.7 x CPU seconds and <= 0.7 x memory of MONAI's MaskedAutoEncoderViT of equal size, fp32"
BAR, BFLOAT16_BAR = 0.7, 0.6
TOKEN = 8
IMAGES = {175: (40, 56, 40), 512: (64, 64, 64), 1400: (80, 112, 80), 4096: (128, 128, 128)}
ENCODER = {"embed_dim": 384, "depth": 12, "num_heads": 6}
DECODER = {"decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 12}  # MONAI's defaults
NARROW = {"decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4}  # ours
MASK_RATIO = 0.75
BATCHES = {4096: 1}  # MONAI's attention keeps every head's matrix
BATCH = 2
OPTIMISER: dict[str, Any] = {"lr": 1.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "fused": True}
REFERENCE, OURS, BFLOAT16 = "MONAI", "UMIT, equal size", "UMIT, equal size, bfloat16"
NNSSL = "nnssl EvaMAE"
UMIT_ARMS = {  # stem and decoder
    OURS: ("patch", DECODER),
    "UMIT, narrow decoder": ("patch", NARROW),
    "UMIT, narrow decoder, conv stem": ("conv", NARROW),
    BFLOAT16: ("patch", DECODER),
}


def arms_here() -> tuple[str, ...]:
    """The arms that this CPU can be asked for: without instructions for bfloat16 it is emulated, and no claim."""
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return (REFERENCE, *(arm for arm in UMIT_ARMS if able or arm != BFLOAT16))


def patchify(image: Tensor) -> Tensor:
    """(B, 1, D, H, W) -> (B, L, TOKEN^3), the target for MONAI's predictions."""
    batch = image.shape[0]
    d, h, w = (size // TOKEN for size in image.shape[2:])
    cut = image.reshape(batch, d, TOKEN, h, TOKEN, w, TOKEN).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(batch, d * h * w, TOKEN**3)


def monai_loss(output: tuple[Tensor, Tensor], image: Tensor) -> Tensor:
    """Mean squared error over hidden tokens against per-patch normalised targets.

    MONAI's network returns predictions of all tokens and the mask (1: hidden); only hidden rows are taken, which is
    cheaper than multiplying by the mask.
    """
    prediction, hidden = output[0], output[1].bool()
    target = patchify(image)[hidden]
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return nn.functional.mse_loss(prediction[hidden], target)


def build_ours(stem: str, encoder: dict[str, int], decoder: dict[str, int], cpu_bfloat16: bool = False) -> nn.Module:
    """Our network with the sizes above."""
    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.config import UMITConfig

    arch_kwargs = {
        "spacing": [1.0, 1.0, 1.0],
        "token_size": TOKEN,
        "stem": stem,
        "cpu_bfloat16": cpu_bfloat16,
        **encoder,
    }
    config = UMITConfig.from_dict({"pretrain": {"mask_ratio": MASK_RATIO, **decoder}}).pretrain
    return MaskedAutoencoder.from_arch_kwargs(1, arch_kwargs, config)


def make_step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One complete training step."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIMISER)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def build(arm: str, image_size: tuple[int, ...], batch: int) -> tuple[nn.Module, Callable[[], None]]:
    """The network of an arm, and its training step on a fixed random image."""
    torch.manual_seed(0)
    image = torch.randn(batch, 1, *image_size)
    if arm == REFERENCE:
        network = peers.monai_mae(image_size, TOKEN, MASK_RATIO, ENCODER, DECODER)
        return network, make_step(network, lambda: monai_loss(network(image), image))
    stem, decoder = UMIT_ARMS[arm]
    ours = build_ours(stem, ENCODER, decoder, arm == BFLOAT16)
    return ours, make_step(ours, lambda: ours(image).loss)


def step_of(arm: str, image_size: tuple[int, ...], batch: int) -> Callable[[], None]:
    """The step alone, for a process that measures memory."""
    return build(arm, image_size, batch)[1]


def measure(
    image_size: tuple[int, ...], batch: int, repeats: int, quick: bool, kept: bool, checkout: str | None = None
) -> dict[str, Any]:
    """All arms on images of one size; whether freed memory is ``kept`` was set before."""
    threads, arms = torch.get_num_threads(), arms_here()
    builders: dict[str, tuple[Any, ...]] = {
        arm: ("benchmarks.mae_step:step_of", arm, image_size, batch) for arm in arms
    }
    foreign: tuple[Any, ...] = ()
    if checkout is not None:
        foreign = (checkout, image_size, batch, TOKEN, MASK_RATIO, ENCODER, DECODER["decoder_depth"], OPTIMISER)
        builders[NNSSL] = ("benchmarks.nnssl:step_of", *foreign)
    memory = peak_memories(builders, 1 if quick else PROCESSES, threads)
    parameters: dict[str, int] = {}
    steps: dict[str, Callable[[], None]] = {}
    for arm in arms:
        network, steps[arm] = build(arm, image_size, batch)
        parameters[arm] = sum(each.numel() for each in network.parameters())
    with ExitStack() as stack:
        if foreign:
            remote = StepProcess("benchmarks.nnssl:build", *foreign, threads=threads, keep_freed_memory=kept)
            steps[NNSSL], parameters[NNSSL] = stack.enter_context(closing(remote)), remote.parameters
        samples = interleaved(steps, repeats, 1 if quick else 2, repeat_line(repeats))
        shares = {arm: share_of_products(steps[arm]) for arm in arms}
    both = BFLOAT16 in samples
    return {
        "bfloat16_to_float32": paired_ratio(samples[BFLOAT16], samples[OURS]) if both else None,
        "image_size": list(image_size),
        "tokens": image_size[0] * image_size[1] * image_size[2] // TOKEN**3,
        "encoder": ENCODER,
        "decoder": DECODER,
        "narrow_decoder": NARROW,
        "mask_ratio": MASK_RATIO,
        "batch_size": batch,
        "threads": threads,
        "keeps_freed_memory": kept,
        "optimiser": {"class": "torch.optim.AdamW", **OPTIMISER},
        "arms": {
            name: summarise(samples[name])
            | memory_figures(memory[name])
            | {
                "parameters": parameters[name],
                "products_share": round(shares[name], 4) if name in shares else None,
                "ratio": paired_ratio(samples[name], samples[REFERENCE]),
            }
            for name in steps
        },
        **provenance(["monai"]),
    }


def report(run: dict[str, Any]) -> str:
    """Table of one measurement and whether the claim holds."""
    size, arms = " x ".join(map(str, run["image_size"])), run["arms"]
    lines = [
        f"{run['tokens']} tokens ({size}), batch {run['batch_size']}, {run['threads']} threads, "
        f"{arms[OURS]['repeats']} paired repeats",
        step_table(arms, REFERENCE),
        f"UMIT / MONAI at equal size, CPU seconds = {verdict(arms[OURS]['ratio']['cpu']['median'], BAR)}",
    ]
    shares = {arm: found["products_share"] for arm, found in arms.items() if found.get("products_share")}
    if shares:
        told = ", ".join(f"{arm} {share:.2f}" for arm, share in shares.items())
        floor = shares[OURS] * arms[OURS]["ratio"]["cpu"]["median"]
        lines.append(
            f"share of a step that is matrix products and attention: {told}; those of UMIT at equal size alone are "
            f"{floor:.3f} of MONAI's step"
        )
    own, theirs = (arms[arm].get("peak_memory_bytes") for arm in (OURS, REFERENCE))
    if own and theirs:
        lines.append(f"UMIT / MONAI at equal size, peak memory = {verdict(own / theirs, BAR)}")
    if BFLOAT16 in arms:
        stored = run.get("bfloat16_to_float32")  # older runs: the ratio of two ratios to MONAI
        own, theirs = (arms[arm]["ratio"]["cpu"]["median"] for arm in (BFLOAT16, OURS))
        ratio = stored["cpu"]["median"] if stored else own / theirs
        lines.append(f"UMIT, bfloat16 / float32 at equal size, CPU seconds = {verdict(ratio, BFLOAT16_BAR)}")
    else:
        lines.append("bfloat16: not measured, the CPU has neither avx512_bf16 nor AMX")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure the image sizes that are not done yet and print their tables."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--repeats", type=int, default=None, help="paired repeats (quick 3, full 15)")
    options_parser.add_argument("--tokens", type=int, action="append", choices=list(IMAGES), help="default: all")
    options_parser.add_argument("--nnssl", type=Path, metavar="CHECKOUT", help="measure nnssl's EvaMAE too")
    options = options_parser.parse_args(arguments)
    checkout = None if options.nnssl is None else str(options.nnssl.resolve())
    if options.nnssl is not None:
        nnssl.prepare(options.nnssl)
    kept = prepare_torch(options)
    results = Results.of(options, "mae_step", CLAIM)
    mode = "quick" if options.quick else "full"
    for tokens in options.tokens or ([175, 512] if options.quick else list(IMAGES)):
        key = f"{mode}/tokens{tokens}/threads{options.threads}" + ("/kept" if kept else "")
        if results.left(key) or (checkout and NNSSL not in results.get(key)["arms"]):
            say(f"{key} ...")
            repeats = options.repeats or (3 if options.quick else 15)
            batch = BATCHES.get(tokens, BATCH)
            results.put(key, measure(IMAGES[tokens], batch, repeats, options.quick, kept, checkout))
        say(report(results.get(key)))


if __name__ == "__main__":
    main()
