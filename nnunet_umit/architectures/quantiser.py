"""Features to tokens: a probability for every code of a codebook (PUMIT's soft tokens, arXiv 2312.07630).

    p_i = softmax(W z_i + b)        z_q,i = sum_k p_ik e_k

The probabilities are the token: differentiable, without straight-through and without a commitment loss. Two things keep
them from fading into one another. A code's logits are standardised over tokens, as in batch normalisation (arXiv
1502.03167), with one learned scale for all codes,

    l_ik = scale * (w_k z_i - mean_k) / deviation_k

over the batch in training, and by running statistics of the images' anisotropy level afterwards: W and b are fixed
then, and a token does not depend on its crop. Otherwise what all features share decides, a few steps carry all tokens
to one code, and there the gradients of all entropies vanish. And the prior-distribution regularisation: two entropies
of different things,

    diversity = -H(mean of p_i over all tokens)   in [-log K, 0]    low when all codes are used equally
    sharpness = mean of H(p_i)                    in [0, log K]     low when every token chooses

Both stay finite, with finite gradients, for saturated logits. ``"gumbel"`` (arXiv 1611.01144) and ``"nearest"``
(VQ-VAE, arXiv 1711.00937) are there to be compared with.

Shape legend: B batch, L tokens, E width, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from nnunet_umit.architectures.masking import without_autocast
from nnunet_umit.config import QUANTISERS
from nnunet_umit.spacing import MAX_LEVEL

COMMITMENT = 0.25  # VQ-VAE's beta
SCALE = 3.0  # first standard deviation of a code's logits over tokens: they nearly choose, about a nat of 256 codes
FLAT = 1e-4  # variance of logits that counts as none
SLOWEST = 0.01  # of the running statistics: the mean of all batches at first, then of about the last hundred
SMALLEST = 1e-30  # a probability below this counts as this in a logarithm


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the softmax of (..., K) logits: (...), from 0 to log K."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def negative_entropy(usage: Tensor) -> Tensor:
    """``sum p log p`` of a distribution (K,): the diversity term, -log K for a uniform one and 0 for a single code."""
    return (usage * usage.clamp_min(SMALLEST).log()).sum()


def perplexity(usage: Tensor) -> Tensor:
    """``exp(H)`` of a distribution (K,): how many equally used codes it amounts to."""
    return (-negative_entropy(usage)).exp()


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, whose gradient is summed over ranks too (torch's own is deprecated)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        pooled = values.clone()
        distributed.all_reduce(pooled)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        pooled = gradients[0].clone()
        distributed.all_reduce(pooled)
        return pooled


def pooled_mean(values: Tensor) -> Tensor:
    """Mean (K,) of (..., K) over the tokens of all ranks, each token counting the same.

    After the averaging over ranks of a distributed training, gradients are those of one process that holds all tokens
    (ranks may hold different numbers of tokens): every rank must run its backward pass.
    """
    own = values.flatten(0, -2)
    if not (distributed.is_available() and distributed.is_initialized()):
        return own.mean(0)
    sums = _SumOverRanks.apply(torch.cat((own.sum(0), own.new_tensor([own.shape[0]]))))
    return sums[:-1] / sums[-1]


@torch.no_grad()
def follow(running: Tensor, batch: Tensor, weight: Tensor | float) -> None:
    """Move a running mean by ``weight`` towards a batch; one that is not finite leaves no trace."""
    running.copy_(torch.where(batch.isfinite().all(), running.lerp(batch, weight), running))


@dataclass
class Quantised:
    """Tokens of a batch: ``codes`` (B, L, E) for the decoder; ``logits`` and ``probabilities`` (B, L, K) in float32;
    ``commitment``, the extra loss of ``"nearest"`` for every sample (B,), zero otherwise."""

    codes: Tensor
    logits: Tensor
    probabilities: Tensor
    commitment: Tensor


class Quantiser(nn.Module):
    """Features (B, L, E) to tokens.

    Args:
        dim: width E.
        codes: size K of the codebook.
        mode: ``"soft"``, ``"gumbel"`` (one code is drawn in training, straight-through; probabilities in evaluation) or
            ``"nearest"`` (the code nearest to the feature, straight-through; probabilities are one-hot).
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, dim: int, codes: int, mode: str = "soft") -> None:
        super().__init__()
        if mode not in QUANTISERS:
            raise ValueError(f"quantiser {mode!r} is not one of {', '.join(QUANTISERS)}")
        if codes < 2:
            raise ValueError(f"a codebook of {codes} code(s) says nothing; use 2 or more")
        self.mode = mode
        self.codes = codes
        self.codebook = nn.Parameter(torch.empty(codes, dim))
        if mode == "nearest":
            nn.init.uniform_(self.codebook, -1 / codes, 1 / codes)
        else:
            nn.init.normal_(self.codebook)
            self.project = nn.Linear(dim, codes, bias=False)
            nn.init.xavier_uniform_(self.project.weight)
            self.scale = nn.Parameter(torch.tensor(SCALE))
            levels = MAX_LEVEL + 1  # features of thick slices differ from those of thin ones as a whole
            self.register_buffer("mean", torch.zeros(levels, codes))
            self.register_buffer("variance", torch.ones(levels, codes))
            self.register_buffer("seen", torch.zeros(levels))

    def forward(self, features_BLE: Tensor, temperature: float = 1.0, level: int = 0) -> Quantised:
        """Tokens of a batch.

        Args:
            temperature: of the Gumbel noise, in (0, 1]; the other modes have none.
            level: anisotropy level of the images, 0 to 5; the same on all ranks.
        """
        none = features_BLE.new_zeros(features_BLE.shape[0], dtype=torch.float32)
        with without_autocast(features_BLE.device):  # what all tokens share is large, what tells them apart is small
            if self.mode == "nearest":
                return self._nearest(features_BLE.float())
            raw = self.project(features_BLE.float())
        logits = self.standardised(raw, level)
        probabilities = logits.softmax(-1)
        chosen = probabilities
        if self.mode == "gumbel" and self.training:
            chosen = F.gumbel_softmax(logits, temperature, hard=True)
        return Quantised(self.lookup(chosen), logits, probabilities, none)

    def standardised(self, raw_BLK: Tensor, level: int = 0) -> Tensor:
        """Logits (B, L, K): every code's with mean 0 and one deviation over the tokens of the batch in training, of the
        batches seen at this level, or the nearest that was seen, afterwards. A batch that is not finite leaves no trace
        in the running statistics."""
        if self.training:
            mean = pooled_mean(raw_BLK)
            variance = pooled_mean((raw_BLK - mean).square())
            self.seen[level] += variance.isfinite().all()  # a mean is finite where its variance is
            weight = (1 / self.seen[level].clamp_min(1)).clamp_min(SLOWEST)
            follow(self.mean[level], mean, weight)
            follow(self.variance[level], variance, weight)
        else:
            distance = (torch.arange(len(self.seen), device=self.seen.device) - level).abs()
            nearest = (distance + len(self.seen) * (self.seen == 0)).argmin(0, keepdim=True)
            mean, variance = self.mean.index_select(0, nearest), self.variance.index_select(0, nearest)  # no GPU sync
        return self.scale * (raw_BLK - mean) * (variance + FLAT).rsqrt()

    def lookup(self, probabilities_BLK: Tensor) -> Tensor:
        """The mixture of codes (B, L, E) that probabilities stand for: a point in the convex hull of the codebook."""
        return probabilities_BLK.to(self.codebook.dtype) @ self.codebook

    def _nearest(self, features: Tensor) -> Quantised:
        codebook = self.codebook.float()
        # ||z||^2 is the same for all codes of a token: left out
        logits = 2 * features @ codebook.t() - codebook.square().sum(-1)
        probabilities = F.one_hot(logits.argmax(-1), self.codes).to(logits.dtype)
        found = probabilities @ codebook
        pull = (found - features.detach()).square().mean((1, 2))
        commit = (found.detach() - features).square().mean((1, 2))
        return Quantised(features + (found - features).detach(), logits, probabilities, pull + COMMITMENT * commit)
