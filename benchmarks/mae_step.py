"""Cost of one masked-autoencoder step: ours against MONAI's MaskedAutoEncoderViT of equal size.

Equal: image, tokens, encoder width, depth and heads, weights of the MLP (MONAI 4 x width and two matrices, ours 8/3 x
width and three), decoder width, depth and heads, mask ratio 0.75, batch 2, fp32, per-patch normalised mean squared
error over hidden tokens, optimiser torch.optim.AdamW(lr 1.5e-4, betas (0.9, 0.95), weight decay 0.05, fused) over all
parameters. A step is masking, forward, loss, backward, optimiser. Extra rows: ours with its own narrow decoder, with
the patch stem and with the conv stem that the planner chooses.

MONAI is measured, never used: it is no dependency. It needs nothing but torch and numpy here, so

    pip install --no-deps --target benchmarks/work/monai "monai==1.6.1"
    python -m benchmarks.mae_step --full

Claim: our step costs at most 0.8 times the CPU seconds of MONAI's.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import REPOSITORY, Results, parser, prepare_torch, provenance, say, verdict
from benchmarks.timing import interleaved, paired_ratio, repeat_line, step_table, summarise

CLAIM = "CPU seconds of an MAE step <= 0.8 x MONAI MaskedAutoEncoderViT at equal width, depth, tokens, mask ratio, fp32"
BAR = 0.8
TOKEN = 8
IMAGES = {512: (64, 64, 64), 1400: (80, 112, 80)}
ENCODER = {"embed_dim": 384, "depth": 12, "num_heads": 6}
DECODER = {"decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 12}  # MONAI's defaults
NARROW = {"decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4}  # ours
MASK_RATIO = 0.75
BATCH = 2
OPTIMISER: dict[str, Any] = {"lr": 1.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "fused": True}
REFERENCE, OURS = "MONAI", "UMIT, equal size"


def import_monai(folder: str | None) -> Any:
    """MONAI's class, from ``--monai``, ``$UMIT_MONAI``, ``benchmarks/work/monai`` or the environment.

    Raises:
        ModuleNotFoundError: says how to install it.
    """
    place = Path(folder or os.environ.get("UMIT_MONAI") or REPOSITORY / "benchmarks" / "work" / "monai")
    sys.path.append(str(place.resolve()))  # behind the environment: only monai itself comes from there
    try:
        return importlib.import_module("monai.networks.nets.masked_autoencoder_vit").MaskedAutoEncoderViT
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != "monai":
            raise
        raise ModuleNotFoundError(
            "MONAI is not installed (it is only measured, no dependency): "
            'pip install --no-deps --target benchmarks/work/monai "monai==1.6.1"',
            name="monai",
        ) from error


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


def build_monai(
    monai_class: Any, image_size: tuple[int, ...], encoder: dict[str, int], decoder: dict[str, int]
) -> nn.Module:
    """MONAI's network with the sizes above."""
    return monai_class(
        in_channels=1,
        img_size=image_size,
        patch_size=TOKEN,
        hidden_size=encoder["embed_dim"],
        mlp_dim=4 * encoder["embed_dim"],
        num_layers=encoder["depth"],
        num_heads=encoder["num_heads"],
        masking_ratio=MASK_RATIO,
        decoder_hidden_size=decoder["decoder_dim"],
        decoder_mlp_dim=4 * decoder["decoder_dim"],
        decoder_num_layers=decoder["decoder_depth"],
        decoder_num_heads=decoder["decoder_heads"],
        qkv_bias=True,
    )


def build_ours(stem: str, encoder: dict[str, int], decoder: dict[str, int]) -> nn.Module:
    """Our network with the sizes above."""
    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.config import UMITConfig

    arch_kwargs = {"spacing": [1.0, 1.0, 1.0], "token_size": TOKEN, "stem": stem, **encoder}
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


def measure(monai_class: Any, image_size: tuple[int, ...], repeats: int, warmup: int, kept: bool) -> dict[str, Any]:
    """All arms on images of one size; ``kept`` is only noted."""
    torch.manual_seed(0)
    image = torch.randn(BATCH, 1, *image_size)
    networks = {
        REFERENCE: build_monai(monai_class, image_size, ENCODER, DECODER),
        OURS: build_ours("patch", ENCODER, DECODER),
        "UMIT, narrow decoder": build_ours("patch", ENCODER, NARROW),
        "UMIT, narrow decoder, conv stem": build_ours("conv", ENCODER, NARROW),
    }

    def arm(name: str, network: nn.Module) -> Callable[[], None]:
        if name == REFERENCE:
            return make_step(network, lambda: monai_loss(network(image), image))
        return make_step(network, lambda: network(image).loss)

    steps = {name: arm(name, network) for name, network in networks.items()}
    samples = interleaved(steps, repeats, warmup, repeat_line(repeats))
    return {
        "image_size": list(image_size),
        "tokens": image_size[0] * image_size[1] * image_size[2] // TOKEN**3,
        "encoder": ENCODER,
        "decoder": DECODER,
        "narrow_decoder": NARROW,
        "mask_ratio": MASK_RATIO,
        "batch_size": BATCH,
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": kept,
        "optimiser": {"class": "torch.optim.AdamW", **OPTIMISER},
        "arms": {
            name: summarise(samples[name])
            | {
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "ratio": paired_ratio(samples[name], samples[REFERENCE]),
            }
            for name, network in networks.items()
        },
        **provenance(["monai"]),
    }


def report(run: dict[str, Any]) -> str:
    """Table of one measurement and whether the claim holds."""
    size = " x ".join(map(str, run["image_size"]))
    found = run["arms"][OURS]["ratio"]["cpu"]["median"]
    return (
        f"{run['tokens']} tokens ({size}), batch {run['batch_size']}, {run['threads']} threads, "
        f"{run['arms'][OURS]['repeats']} paired repeats\n{step_table(run['arms'], REFERENCE)}\n"
        f"UMIT / MONAI at equal size = {verdict(found, BAR)}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the image sizes that are not done yet and print their tables."""
    options_parser = parser(__doc__)
    options_parser.epilog = 'MONAI: pip install --no-deps --target benchmarks/work/monai "monai==1.6.1"'
    options_parser.add_argument("--monai", default=None, help="folder that MONAI was installed into (or $UMIT_MONAI)")
    options_parser.add_argument("--repeats", type=int, default=None, help="paired repeats (quick 3 and 1, full 15)")
    options = options_parser.parse_args(arguments)
    kept = prepare_torch(options)
    results = Results("mae_step", CLAIM, options.results)
    mode = "quick" if options.quick else "full"
    for tokens, image_size in IMAGES.items():
        key = f"{mode}/tokens{tokens}/threads{options.threads}" + ("/kept" if kept else "")
        if results.get(key) is None or options.again:
            monai_class = import_monai(options.monai)
            say(f"{key} ...")
            repeats = options.repeats or ((3 if tokens == 512 else 1) if options.quick else 15)
            results.put(key, measure(monai_class, image_size, repeats, 1 if options.quick else 2, kept))
        say(report(results.get(key)))


if __name__ == "__main__":
    main()
