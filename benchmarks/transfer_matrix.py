"""Which part of a pre-trained encoder arrives: every checkpoint into the network of every plan.

    python -m benchmarks.transfer_matrix --full \\
        --checkpoint hippocampus=.../checkpoint_final.pth --checkpoint acdc=... \\
        --plans hippocampus=.../UMITPlans.json:3d_fullres --plans busi=.../UMITPlans.json:2d

A plans file is read where nnU-Net keeps it, beside ``dataset.json`` (preprocessed folder or trained model folder); the
number of channels and classes comes from there. Each cell builds the network anew and calls the same transfer as
``nnUNetv2_train -pretrained_weights``. ``--quick`` needs nothing: it writes four random encoders (isotropic, thick
slices with two channels, 2D, and a larger token) and crosses them.

Claim: every cell loads or adapts at least 99 % of the encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Results, parser, provenance, say, table, verdict

CLAIM = "every pre-training checkpoint loads >= 99 % of the encoder (loaded or adapted) into every network"
BAR = 0.99
QUICK_SIZE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "stem": "conv"}
QUICK_NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "isotropic": (1, {"spacing": [1.0, 1.0, 1.0], "token_size": 8}),
    "thick, 2 channels": (2, {"spacing": [10.0, 1.5, 1.5], "token_size": 8}),
    "2D": (1, {"spacing": [1.0, 1.0], "token_size": 8}),
    "token 16": (1, {"spacing": [2.0, 1.0, 1.0], "token_size": 16}),
}


def named(text: str) -> tuple[str, str]:
    """``NAME=value`` -> (name, value)."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, value


def network_of(target: str) -> nn.Module:
    """The network of ``plans.json[:configuration]`` (default 3d_fullres), with the channels and classes of its dataset.

    Raises:
        FileNotFoundError: no dataset.json beside the plans file.
        KeyError: the plans have no such configuration; lists those they have.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    path, separator, configuration = target.rpartition(":")
    if not separator or configuration.endswith(".json"):
        path, configuration = target, "3d_fullres"
    beside = Path(path).with_name("dataset.json")
    if not beside.is_file():
        raise FileNotFoundError(f"{beside} is missing; give the plans file in nnU-Net's preprocessed or model folder")
    dataset = json.loads(beside.read_text(encoding="utf-8"))
    plans = PlansManager(path)
    known = plans.available_configurations
    if configuration not in known:
        raise KeyError(f"{path} has no configuration {configuration!r}, only {', '.join(known)}")
    manager = plans.get_configuration(configuration)
    return get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, manager, dataset),
        plans.get_label_manager(dataset).num_segmentation_heads,
        allow_init=True,
        deep_supervision=False,
    )


def cross(checkpoints: Mapping[str, str], networks: Mapping[str, Callable[[], nn.Module]]) -> dict[str, dict[str, Any]]:
    """Load every checkpoint into every network: ``{checkpoint: {network: report}}``, reports printed as they come.

    A transfer that is refused is a cell with fraction 0 and the refusal as ``error``.
    """
    cells: dict[str, dict[str, Any]] = {}
    for source, path in checkpoints.items():
        cells[source] = {}
        for target, build in networks.items():
            say(f"--- {source} -> {target}")
            network: Any = build()
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # it prints its report itself; printed once, below
                    outcome = network.load_umit_pretrained(path)
            except ValueError as error:
                say(f"refused: {error}")
                cells[source][target] = {"fraction": 0.0, "error": str(error).replace(path, source)}
                continue
            say(outcome)
            cells[source][target] = outcome.to_dict() | {"source": source}
    return cells


def quick_networks(folder: Path) -> tuple[dict[str, str], dict[str, Callable[[], nn.Module]]]:
    """Four small networks, and a random encoder of each on disk."""
    from nnunet_umit.architectures.transfer import save_encoder
    from nnunet_umit.architectures.unetr import UMITSegmenter

    checkpoints: dict[str, str] = {}
    networks: dict[str, Callable[[], nn.Module]] = {}
    for name, (channels, arguments) in QUICK_NETWORKS.items():
        kwargs: dict[str, Any] = {**QUICK_SIZE, **arguments}
        networks[name] = functools.partial(UMITSegmenter, channels, 3, **kwargs)
        target = folder / name.replace(" ", "_").replace(",", "")
        encoder: Any = networks[name]().encoder
        checkpoints[name] = str(save_encoder(encoder, target, {"method": "random"}))
    return checkpoints, networks


def report(run: dict[str, Any]) -> str:
    """The matrix of fractions, and whether the claim holds."""
    cells = run["cells"]
    targets = list(next(iter(cells.values())))
    rows = [[source, *(percent(row[target]) for target in targets)] for source, row in cells.items()]
    worst = min(row[target]["fraction"] for row in cells.values() for target in targets)
    matrix = table(["checkpoint \\ network", *targets], rows)
    return f"{matrix}\nsmallest fraction of the encoder: {verdict(worst, BAR, at_most=False)}"


def percent(cell: dict[str, Any]) -> str:
    """``100.0 % (3 adapted)``."""
    if "error" in cell:
        return "refused"
    adapted = len(cell["adapted"])
    return f"{100 * cell['fraction']:.1f} %" + (f" ({adapted} adapted)" if adapted else "")


def main(arguments: list[str] | None = None) -> None:
    """Cross the checkpoints with the plans and print the matrix."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--checkpoint", action="append", type=named, default=[], metavar="NAME=PATH", help="pre-training checkpoint")
    add("--plans", action="append", type=named, default=[], metavar="NAME=PLANS.json[:CONFIGURATION]")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = Results.of(options, "transfer_matrix", CLAIM)
    if options.quick:
        key = "quick"
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, networks = quick_networks(Path(folder))
            cells = cross(checkpoints, networks)
    else:
        if not options.checkpoint or not options.plans:
            options_parser.error("--full needs --checkpoint NAME=PATH and --plans NAME=PLANS.json, one or more of each")
        checkpoints = dict(options.checkpoint)
        networks = {name: functools.partial(network_of, target) for name, target in options.plans}
        key = f"full/{'+'.join(checkpoints)}/{'+'.join(networks)}"
        if not results.left(key):
            say(report(results.get(key)))
            return
        cells = cross(checkpoints, networks)
    results.put(key, {"cells": cells, **provenance()})
    say(report(results.get(key)))


if __name__ == "__main__":
    main()
