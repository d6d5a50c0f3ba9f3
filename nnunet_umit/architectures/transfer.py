"""Transfer: any UMIT state dict into the network at hand, with a report, and never silently.

What differs is adapted by one rule each: image channels (n to m), token size (area-preserving resampling of the
projection kernel), decoder (levels of equal shape are taken over, heads never are). Spacing, patch size and 2D or 3D
need no rule: they do not change the shape of a single parameter. Under 90 % of the encoder is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nnunet_umit.files import write_whole

MINIMUM_FRACTION = 0.9
ENCODER_FILE = "encoder.safetensors"
CARD_FILE = "card.json"
FIRST_OF_CONV_STEM, FIRST_OF_PATCH_STEM = "encoder.stem.full.conv.weight", "encoder.stem.project.weight"
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class TransferReport:
    """What happened to every parameter of the target network, and which source parameters found no place.

    ``fraction`` is the share of the encoder's values that was loaded or adapted.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    fraction: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON types, for checkpoints and benchmark results."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"Transfer from {self.source}: {100 * self.fraction:.1f} % of the encoder "
            f"({len(self.loaded)} tensors loaded, {len(self.adapted)} adapted, {len(self.new)} new, "
            f"{len(self.unused)} of the source unused)"
        ]
        lines += [f"  adapted {name}: {how}" for name, how in self.adapted.items()]
        for title, names in (("new", self.new), ("unused", self.unused)):
            if names:
                lines.append(f"  {title}: {', '.join(_summary(names))}")
        return "\n".join(lines)


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint (``.pth``, without executing pickled code) or ``encoder.safetensors`` with its card.

    Returns:
        The state dict (prefixes of DDP and torch.compile removed) and the card, empty for a ``.pth``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, or one that holds no network.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"pre-trained weights {file} do not exist; give checkpoint_final.pth or {ENCODER_FILE}")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as content:
                state = {name: content.get_tensor(name) for name in content.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}); export it again") from error
        card = file.with_name(CARD_FILE)
        return state, json.loads(card.read_text()) if card.is_file() else {}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read safely ({str(error).splitlines()[0]}); UMIT checkpoints hold plain tensors and "
            "numbers only, so this one is damaged or comes from another trainer"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), dict):
        raise ValueError(f"{file} holds no 'network_weights'; give a checkpoint that a UMIT trainer wrote")
    return {_strip(name): value for name, value in content["network_weights"].items()}, {}


def transfer_encoder(
    state: Mapping[str, Tensor],
    network: nn.Module,
    *,
    source: str = "state dict",
    card: Mapping[str, Any] | None = None,
    leave: Sequence[str] = (),
) -> TransferReport:
    """Copy a UMIT state dict into ``network`` (which has ``.encoder``), adapting shapes; prints the report.

    Args:
        leave: first parts of names that are none of this transfer's business, on neither side.

    Raises:
        ValueError: under 90 % of the encoder's values arrived, or the source is deeper; the network is unchanged then.
    """
    if not any(name.startswith("encoder.") for name in state):
        state = {f"encoder.{name}": value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(tuple(leave))}
    report = TransferReport(source)
    target = {name: value for name, value in network.state_dict().items() if not name.startswith(tuple(leave))}
    stems = FIRST_OF_CONV_STEM in state, FIRST_OF_CONV_STEM in target
    first = FIRST_OF_CONV_STEM if stems[1] else FIRST_OF_PATCH_STEM
    values: dict[str, Tensor] = {}
    for name, wanted in target.items():
        found = state.get(name)
        other_stem = stems[0] != stems[1] and name.startswith("encoder.stem.")  # equal names of unlike layers
        if found is None or ".head" in name or other_stem:
            report.new.append(name)
        elif found.shape == wanted.shape:
            values[name] = found
            report.loaded.append(name)
        else:
            adapted = adapt(name, found, wanted, reads_image=name == first)
            if adapted is None:
                report.new.append(name)
            else:
                values[name], report.adapted[name] = adapted
    report.unused = [name for name in state if name not in values]
    encoder = {name: value.numel() for name, value in target.items() if name.startswith("encoder.")}
    report.fraction = sum(size for name, size in encoder.items() if name in values) / sum(encoder.values())
    if report.fraction < MINIMUM_FRACTION:
        raise ValueError(
            f"only {100 * report.fraction:.1f} % of the encoder would come from {source}, at least "
            f"{100 * MINIMUM_FRACTION:.0f} % is needed: it belongs to another architecture. "
            f"{_differences(state, target)}"
            "Plan both with the same size (-pl UMITPlannerS, B or L; umit corpus --size) and stem."
        )
    deeper = [name for name in report.unused if name.startswith("encoder.") and not name.startswith("encoder.stem.")]
    if deeper:
        raise ValueError(
            f"the encoder of {source} is deeper: it has {', '.join(_summary(deeper))} too, and its last norm follows "
            "those. Plan both with the same size (-pl UMITPlannerS, B or L; umit corpus --size) and depth."
        )
    arrived = {name: value.to(target[name].dtype) for name, value in values.items()}
    network.load_state_dict({**network.state_dict(), **arrived})
    print(report, flush=True)
    licence = (card or {}).get("licence")
    if licence:
        print(f"  licence of the pre-training data: {licence}", flush=True)
    return report


class Transferable(nn.Module):
    """A network with an ``encoder`` that stock ``-pretrained_weights`` can fill; the report of it is kept."""

    transfer_report: TransferReport | None = None

    def load_umit_pretrained(self, path: str) -> TransferReport:
        """Load a pre-trained encoder (``checkpoint_*.pth`` or ``encoder.safetensors``), adapting what differs; other
        parameters of equal name and shape come too, segmentation heads never.

        Raises:
            ValueError: under 90 % of the encoder arrived; the network is unchanged then.
        """
        state, card = load_state(path)
        self.transfer_report = transfer_encoder(state, self, source=str(path), card=card)
        return self.transfer_report


def adapt(name: str, found: Tensor, wanted: Tensor, reads_image: bool) -> tuple[Tensor, str] | None:
    """Change a stem kernel (O, C, k, k, k) to the wanted channels, if they are the image's (``reads_image``), and size;
    None where no rule applies."""
    if not name.startswith("encoder.stem.") or found.dim() != 5 or found.shape[0] != wanted.shape[0]:
        return None
    steps = []
    value = found.float()
    if found.shape[1] != wanted.shape[1]:
        if not reads_image:
            return None
        value = adapt_channels(value, wanted.shape[1])
        steps.append(f"channels {found.shape[1]} -> {wanted.shape[1]}")
    if found.shape[2:] != wanted.shape[2:]:
        if not name.endswith("project.weight"):
            return None
        value = resize_kernel(value, wanted.shape[-1])
        steps.append(f"token kernel {tuple(found.shape[2:])} -> {tuple(wanted.shape[2:])}")
    return value, ", ".join(steps)


def adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """(O, C, ...) -> (O, channels, ...): the sum over old channels, shared equally by the new ones (pumit.md §1.4).

    A grey image replicated over the new channels gives what the old network gives on its replicated channels.
    """
    total = kernel.sum(1, keepdim=True) / channels
    return total.expand(-1, channels, *kernel.shape[2:]).clone()


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """(O, C, k, k, k) -> (O, C, size, size, size), area-preserving: taps are shared out or joined, so the sum stays and
    an image enlarged by the same factor gives the same tokens."""
    old = kernel.shape[-1]
    if size == old:
        return kernel
    if size % old == 0:
        factor = size // old
        for axis in (2, 3, 4):
            kernel = kernel.repeat_interleave(factor, axis)
        return kernel / factor**3
    return F.adaptive_avg_pool3d(kernel, size) * (old / size) ** 3


def save_encoder(encoder: nn.Module, folder: str | os.PathLike[str], card: Mapping[str, Any]) -> Path:
    """Write ``encoder.safetensors`` and ``card.json`` (each complete or not at all); returns the former's path."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    write_whole(target / ENCODER_FILE, lambda part: save_file(state, str(part)))
    write_whole(target / CARD_FILE, lambda part: part.write_text(json.dumps(dict(card), indent=2)))
    return target / ENCODER_FILE


def _strip(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _summary(names: list[str]) -> list[str]:
    counts: dict[str, int] = {}
    for name in names:
        stem = ".".join(name.split(".")[:3])
        counts[stem] = counts.get(stem, 0) + 1
    return [f"{stem} ({count})" if count > 1 else stem for stem, count in counts.items()]


def _differences(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    for name, wanted in target.items():
        if name.startswith("encoder.") and name in state and state[name].shape != wanted.shape:
            return f"First difference: {name} is {tuple(state[name].shape)} there and {tuple(wanted.shape)} here. "
    return "It shares no parameter names with this network. "
