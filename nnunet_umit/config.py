"""The ``umit`` block of a plans file: every hyper-parameter, validated, in one place.

The block lives in ``plans["configurations"][NAME]["umit"]``. Edit the JSON to change a run; there are no subclasses
for hyper-parameters. Unknown keys are refused with the nearest known name, so a typing error cannot pass silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

VERSION = 1
SIZE_NAMES = ("tiny", "XS", "S", "B", "L")
AUGMENTATIONS = ("auto", "nnunet", "light", "none")
QUANTISERS = ("soft", "gumbel", "nearest")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training of this package has in common. Fractions are of the whole schedule.

    ``learning_rate`` is that of convolutions; a transformer, if there is one, learns at ``transformer_rate`` times it.
    ``mirror_axes`` are the axes that training mirrors, and prediction may mirror too; None: all.
    ``thicken`` (``3d_native`` only) is the probability that an image without thick slices is given some, by averaging 2
    to ``thickest`` neighbouring slices along a random axis.
    """

    epochs: int = 250
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 25
    learning_rate: float = 1e-3
    transformer_rate: float = 1.0
    minimum_learning_rate_fraction: float = 0.01
    warmup_fraction: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    drop_path: float = 0.0
    seed: int = 2333
    save_every: int = 1
    max_nonfinite: int = 10
    oversample_foreground: float = 0.0
    thicken: float = 0.0
    thickest: int = 6
    mirror_axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations_per_epoch", "val_iterations_per_epoch", "save_every", "max_nonfinite"):
            _require(
                self, name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number >= 1"
            )
        _require(self, "seed", isinstance(self.seed, int) and self.seed >= 0, "a whole number >= 0")
        for name in ("learning_rate", "transformer_rate", "clip_norm"):
            _require(self, name, _number(getattr(self, name)) and getattr(self, name) > 0, "a number > 0")
        for name in (
            "minimum_learning_rate_fraction",
            "warmup_fraction",
            "drop_path",
            "oversample_foreground",
            "thicken",
        ):
            _require(self, name, _number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, "from 0 to 1")
        _require(self, "weight_decay", _number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        _require(self, "drop_path", self.drop_path < 1, "below 1")
        _require(self, "thickest", isinstance(self.thickest, int) and self.thickest >= 2, "a whole number >= 2")
        _require(self, "schedule", self.schedule in ("cosine", "poly"), "'cosine' or 'poly'")
        _require(self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.mirror_axes is not None:
            _require(self, "mirror_axes", all(a in (0, 1, 2) for a in self.mirror_axes), "null or axes out of 0, 1, 2")
            object.__setattr__(self, "mirror_axes", tuple(self.mirror_axes))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Masked pre-training: a masked autoencoder (SelfMedMAE, arXiv 2203.05573; MAE, arXiv 2111.06377), or soft tokens
    (PUMIT, arXiv 2312.07630).

    ``decoder_*`` are the masked autoencoder's. Soft-token pre-training has ``mask_layers``, the number of last blocks
    that see mask tokens; ``mask_positions``, whether mask tokens carry an absolute position beside the rotary one; and
    ``tokenizer``, the path of a tokenizer's checkpoint, where ``-pretrained_weights`` names none. PUMIT hides 0.55.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    mask_ratio: float = 0.75
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    mask_layers: int = 2
    mask_positions: bool = True
    tokenizer: str | None = None
    picture_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self, "mask_ratio", _number(self.mask_ratio) and 0 < self.mask_ratio < 1, "between 0 and 1, both excluded"
        )
        for name in ("decoder_dim", "decoder_depth", "decoder_heads", "mask_layers", "picture_every"):
            _require(
                self, name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number >= 1"
            )
        _require(self, "mask_positions", isinstance(self.mask_positions, bool), "true or false")
        _require(self, "tokenizer", self.tokenizer is None or isinstance(self.tokenizer, str), "null or a path")
        _require(
            self, "decoder_heads", self.decoder_dim % (4 * self.decoder_heads) == 0, "a divisor of decoder_dim / 4"
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(TrainingConfig):
    """Visual tokenizer with soft tokens (PUMIT, arXiv 2312.07630).

    Args:
        dim: width at the token grid.
        codes: size of the codebook.
        quantiser: ``"soft"``, or ``"gumbel"`` and ``"nearest"`` for comparison.
        sharpness, diversity: weights of the two halves of the prior-distribution regularisation (PUMIT: 1.0 and 0.03).
        usage_momentum: moving average of the mean distribution that diversity looks at; 0: this batch only.
        gradient, similarity: weights of the multi-scale gradient and the SSIM-like term; 0: off.
        perceptual: weight of the distance between features of the encoder in ``perceptual_weights``; 0: off.
        perceptual_weights: path of an ``encoder.safetensors``.
        discriminator: weight of the hinge discriminator (PUMIT: 0.003); 0: off.
        discriminator_learning_rate: its learning rate.
        smallest_perplexity: share of the codebook below which a collapse is warned of.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    dim: int = 256
    codes: int = 256
    quantiser: str = "soft"
    sharpness: float = 0.03
    diversity: float = 0.1
    usage_momentum: float = 0.9
    gradient: float = 0.0
    similarity: float = 0.0
    perceptual: float = 0.0
    perceptual_weights: str | None = None
    discriminator: float = 0.0
    discriminator_learning_rate: float = 1e-3
    smallest_perplexity: float = 0.1
    picture_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dim", 8), ("codes", 2), ("picture_every", 1)):
            value = getattr(self, name)
            _require(self, name, isinstance(value, int) and value >= least, f"a whole number >= {least}")
        _require(self, "quantiser", self.quantiser in QUANTISERS, f"one of {', '.join(QUANTISERS)}")
        for name in ("sharpness", "diversity", "gradient", "similarity", "perceptual", "discriminator"):
            _require(self, name, _number(getattr(self, name)) and getattr(self, name) >= 0, "a number >= 0")
        for name in ("usage_momentum", "smallest_perplexity"):
            _require(self, name, _number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "from 0 to below 1")
        rate = self.discriminator_learning_rate
        _require(self, "discriminator_learning_rate", _number(rate) and rate > 0, "a number > 0")
        named = isinstance(self.perceptual_weights, str)
        _require(
            self,
            "perceptual_weights",
            named if self.perceptual else self.perceptual_weights is None,
            "the path of an encoder.safetensors where perceptual is above 0, and null where it is 0",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Supervised training, from scratch or from a pre-trained encoder.

    ``balance`` is the share of the schedule in which a class-balanced cross-entropy fades from weight 1 to 0.
    """

    epochs: int = 500
    drop_path: float = 0.1
    oversample_foreground: float = 0.33
    balance: float = 0.5
    layer_decay: float = 0.9
    freeze: str = "none"
    freeze_epochs: int = 0
    augmentation: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "layer_decay", _number(self.layer_decay) and 0 < self.layer_decay <= 1, "above 0, at most 1")
        _require(self, "balance", _number(self.balance) and 0 <= self.balance <= 1, "from 0 to 1")
        _require(self, "freeze", self.freeze in ("none", "encoder", "stem"), "'none', 'encoder' or 'stem'")
        least = 0 if self.freeze == "none" else 1
        _require(
            self,
            "freeze_epochs",
            isinstance(self.freeze_epochs, int) and self.freeze_epochs >= least,
            f"a whole number >= {least} where freeze is {self.freeze!r}",
        )
        _require(self, "augmentation", self.augmentation in AUGMENTATIONS, "'auto', 'nnunet', 'light' or 'none'")


@dataclass(frozen=True, kw_only=True)
class UMITConfig:
    """The whole block: the size of the network and why, and one section for each kind of training."""

    version: int = VERSION
    size: str = "XS"
    why: str = ""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        _require(self, "version", self.version == VERSION, f"{VERSION} (plan again with this version of nnunet-umit)")
        _require(self, "size", self.size in SIZE_NAMES, f"one of {', '.join(SIZE_NAMES)}")

    @classmethod
    def for_size(
        cls, size: str, why: str = "", thicken: float = 0.0, mirror_axes: tuple[int, ...] | None = None
    ) -> UMITConfig:
        """Defaults for a network size; wider networks take smaller learning rates and more drop path."""
        learning_rate, finetuning_rate, drop_path = _SIZE_DEFAULTS.get(size, _SIZE_DEFAULTS["XS"])
        dim, codes = _TOKENIZER_DEFAULTS.get(size, _TOKENIZER_DEFAULTS["XS"])
        data: dict[str, Any] = {"thicken": thicken, "mirror_axes": mirror_axes}
        return cls(
            size=size,
            why=why,
            pretrain=PretrainConfig(learning_rate=learning_rate, **data),
            tokenizer=TokenizerConfig(dim=dim, codes=codes, **data),
            finetune=FinetuneConfig(
                learning_rate=finetuning_rate, transformer_rate=TRANSFORMER_RATE, drop_path=drop_path, **data
            ),
        )

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> UMITConfig:
        """Read and validate a ``umit`` block.

        Raises:
            ValueError: an unknown key (the nearest known one is named) or a value out of its range.
        """
        values = dict(block)
        for name, section in _SECTIONS.items():
            values[name] = _build(section, values.get(name, {}), f"umit.{name}")
        return _build(cls, values, "umit")

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return _plain(dataclasses.asdict(self))


_SECTIONS: dict[str, type[TrainingConfig]] = {
    "pretrain": PretrainConfig,
    "tokenizer": TokenizerConfig,
    "finetune": FinetuneConfig,
}
_TOKENIZER_DEFAULTS = {"tiny": (32, 16), "XS": (256, 256), "S": (384, 512), "B": (512, 1024), "L": (512, 1024)}
TRANSFORMER_RATE = 0.25  # of fine-tuning: docs/results.md, "What the defaults were chosen by"
_SIZE_DEFAULTS = {  # learning rates of pre-training and fine-tuning, drop path of fine-tuning
    "tiny": (2e-3, 8e-3, 0.0),
    "XS": (1e-3, 8e-3, 0.05),
    "S": (5e-4, 2e-3, 0.1),
    "B": (3e-4, 1.2e-3, 0.2),
    "L": (2e-4, 8e-4, 0.3),
}


def get_umit_config(configuration_manager: Any) -> UMITConfig:
    """The block of an nnU-Net ``ConfigurationManager`` (or of a configuration dictionary).

    Raises:
        ValueError: the plans come from another planner.
    """
    configuration = getattr(configuration_manager, "configuration", configuration_manager)
    if "umit" not in configuration:
        raise ValueError(
            "these plans have no 'umit' block, so they were made by another planner; plan with "
            "`nnUNetv2_plan_and_preprocess -d DATASET -pl UMITPlanner` and train with `-p UMITPlans`"
        )
    return UMITConfig.from_dict(configuration["umit"])


def _build(section: type[_T], values: Any, where: str) -> _T:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a JSON object, not {values!r}")
    known = [f.name for f in dataclasses.fields(section)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown key {where}.{key} in the plans; did you mean {where}.{near[0]}? Known: {', '.join(known)}"
            )
    try:
        return section(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _require(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(config, name)!r} but must be {rule}; edit the umit block of the plans")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
