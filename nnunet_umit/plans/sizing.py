"""How large: token, patch, batch and network size. Pure functions of numbers; the planner feeds them.

Shapes are voxels per axis of the planned (transposed) volume: (depth, height, width) in 3D, (height, width) in 2D.
Memory enters only as a predicate or as bytes, so every rule here can be tested without a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nnunet_umit.spacing import Anisotropy

TOKEN_SIZES = (4, 8, 16)
DEFAULT_TOKEN_SIZE = 8  # what Primus uses (PUMIT: 16); smaller tokens segment better and cost more
FEWEST_TOKENS = 64  # below this a sequence is too short for attention to relate anything: use smaller tokens
MOST_TOKENS_3D = 4096  # 16 per axis: 128^3 voxels with 8-voxel tokens; from here on attention outweighs the rest
MOST_TOKENS_2D = 1024  # 32 per axis: a 2D batch of 16 then costs what a 3D batch of 4 costs
TOKEN_SLACK = 1.25  # up to a quarter over the limit the patch is trimmed: a doubled token would blur it by 4 to 8

SMALLEST_BATCH = 2  # nnU-Net's own: a gradient from a single sample is too noisy
LARGEST_BATCH_3D = 4  # AdamW with warm-up takes small batches well
STEP_TOKENS_3D = 1024  # no third and fourth sample where two bring as many: steps are worth more than samples
LARGEST_BATCH_2D = 16  # a slice carries far less than a volume
DATASET_FRACTION = 0.05  # nnU-Net's own: one step shall not see more than 5 % of all voxels of the dataset

TOKENS_FOR_S = 2_000_000  # training tokens; fewer are fitted (and, on a CPU, afforded) by the 7 million weights of XS
TOKENS_FOR_B = 50_000_000  # training tokens; fewer do not occupy the 85 million weights of B

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SizeChoice:
    """A network size and the sentence that goes into the plans as ``umit.why``."""

    size: str
    why: str


def token_shape(token_size: int, anisotropy: Anisotropy, axes: int) -> Shape:
    """Token extent in voxels with as many axes as the image has: (d, T, T), or (T, T) in 2D.

    The anisotropy does not tell: volumes with slices of a hundred pixels' thickness are planar too.
    """
    return anisotropy.token(token_size)[3 - axes :]


def pad_to_tokens(shape: Sequence[float], token: Shape) -> Shape:
    """The smallest whole number of tokens that holds `shape` on every axis; never less than one token."""
    return tuple(max(math.ceil(size / step), 1) * step for size, step in zip(shape, token, strict=True))


def count_tokens(patch: Shape, token: Shape) -> int:
    """Tokens in a patch that is a whole number of tokens."""
    return math.prod(size // step for size, step in zip(patch, token, strict=True))


def token_limit(anisotropy: Anisotropy) -> int:
    """The most tokens a patch may hold."""
    return MOST_TOKENS_2D if anisotropy.planar else MOST_TOKENS_3D


def choose_token_size(patch_of_default_tokens: Shape, anisotropy: Anisotropy) -> int:
    """In-plane token extent T in voxels, from the patch that image size and memory would allow with 8-voxel tokens.

    8 unless that patch would have fewer than 64 tokens (then 4: a small organ must not become eight tokens) or clearly
    more than the limit (then 16). The depth of the token follows from the spacing (`Anisotropy.token`).
    """
    axes = len(patch_of_default_tokens)
    tokens = count_tokens(patch_of_default_tokens, token_shape(DEFAULT_TOKEN_SIZE, anisotropy, axes))
    if tokens < FEWEST_TOKENS:
        return 4
    return 16 if tokens > token_limit(anisotropy) * TOKEN_SLACK else DEFAULT_TOKEN_SIZE


def fit_patch(median_shape: Sequence[float], token: Shape, fits: Callable[[Shape], bool]) -> Shape:
    """The largest patch of whole tokens that `fits`, grown from the median image of the dataset.

    Starts at the median shape padded to whole tokens and removes one token at a time from the axis that keeps the
    largest share of the median after the cut, so the patch keeps the proportions of the image.

    Raises:
        ValueError: not even one token per axis fits.
    """
    patch = pad_to_tokens(median_shape, token)
    while not fits(patch):
        cuttable = [axis for axis, size in enumerate(patch) if size > token[axis]]
        if not cuttable:
            raise ValueError(f"not even a patch of one token {token} fits")
        axis = max(cuttable, key=lambda a: (patch[a] - token[a]) / median_shape[a])
        patch = tuple(size - token[axis] if a == axis else size for a, size in enumerate(patch))
    return patch


def check_patch(patch: Sequence[int], token: Shape) -> None:
    """Refuse a patch smaller than one token, which happens when a plans file is edited by hand.

    Raises:
        ValueError: naming patch, token, axis and fix.
    """
    if len(patch) != len(token):
        raise ValueError(f"patch {tuple(patch)} has {len(patch)} axes, the token {token} has {len(token)}; set as many")
    for axis, (size, step) in enumerate(zip(patch, token, strict=True)):
        if size < step:
            raise ValueError(
                f"patch {tuple(patch)} is smaller than one token {token} along axis {axis} ({size} < {step}); plan "
                f"with -pl UMITPlanner, or set patch_size[{axis}] in the plans to a multiple of {step}"
            )


def choose_batch_size(patch: Shape, tokens: int, dataset_voxels: float, fitting: int, planar: bool) -> int:
    """Samples per step: what memory allows (`fitting`), at most 5 % of the dataset, within nnU-Net's and our bounds; in
    3D no more than `STEP_TOKENS_3D` ask for, with `tokens` in a patch."""
    covered = round(dataset_voxels * DATASET_FRACTION / math.prod(patch))
    most = LARGEST_BATCH_2D if planar else min(LARGEST_BATCH_3D, round(STEP_TOKENS_3D / tokens))
    return max(min(fitting, covered, most), SMALLEST_BATCH)


def choose_size(dataset_tokens: float, base_fits: Callable[[], bool]) -> SizeChoice:
    """XS, S or B from the number of training tokens; `base_fits` tells whether B fits memory (asked only if needed)."""
    amount = f"the training set holds about {_count(dataset_tokens)} tokens"
    if dataset_tokens < TOKENS_FOR_S:
        return SizeChoice("XS", f"XS because {amount}, fewer than the {_count(TOKENS_FOR_S)} from which S pays.")
    if dataset_tokens < TOKENS_FOR_B:
        return SizeChoice("S", f"S because {amount}, fewer than the {_count(TOKENS_FOR_B)} from which B pays.")
    if base_fits():
        return SizeChoice("B", f"B because {amount}, more than {_count(TOKENS_FOR_B)}, and it fits the memory target.")
    return SizeChoice("S", f"S because {amount}, enough for B, but B does not fit the memory target with this patch.")


def _count(number: float) -> str:
    for limit, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"
