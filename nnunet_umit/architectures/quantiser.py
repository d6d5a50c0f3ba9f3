"""Features to tokens: a probability for every code of a codebook (PUMIT's soft tokens, arXiv 2312.07630).

    p_i = softmax(W z_i + b)        z_q,i = sum_k p_ik e_k

The probabilities are the token: differentiable, without straight-through and without a commitment loss. What keeps
them from fading into one another is a start from the data, and the prior-distribution regularisation. At the start the
projection is shifted and scaled once, by the first batch, so that every code's logits have mean 0 and the same spread
over tokens (as Glow starts its layers, arXiv 1807.03039): otherwise what all features share decides, all tokens choose
the same code, and the mixture of all codes tells the decoder nothing. Then two entropies of different things:

    diversity = -H(mean of p_i over all tokens)   in [-log K, 0]    low when all codes are used equally
    sharpness = mean of H(p_i)                    in [0, log K]     low when every token chooses

Both stay finite, with finite gradients, for saturated logits. ``"gumbel"`` (arXiv 1611.01144) and ``"nearest"``
(VQ-VAE, arXiv 1711.00937) are there to be compared with.

Shape legend: B batch, L tokens, E width, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from nnunet_umit.config import QUANTISERS

COMMITMENT = 0.25  # VQ-VAE's beta
START = 3.0  # standard deviation of a code's first logits over tokens: they nearly choose, about a nat of 256 codes
FLAT = 1e-2  # tokens whose logits differ by less tell nothing of their spread
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


def pooled_mean(values: Tensor) -> Tensor:
    """Mean (K,) of (..., K) over the tokens of all ranks, each token counting the same.

    Gradients flow through the own tokens only, scaled so that after the averaging over ranks of a distributed training
    they are those of one process that holds all tokens (ranks may hold different numbers of tokens).
    """
    own = values.flatten(0, -2)
    if not (distributed.is_available() and distributed.is_initialized()):
        return own.mean(0)
    pooled = torch.cat((own.detach().sum(0), own.new_tensor([own.shape[0]])))
    distributed.all_reduce(pooled)
    share = own.sum(0) * (distributed.get_world_size() / pooled[-1])
    return pooled[:-1] / pooled[-1] + share - share.detach()


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

    started: Tensor

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
            self.project = nn.Linear(dim, codes)
            nn.init.xavier_uniform_(self.project.weight)
            nn.init.zeros_(self.project.bias)
            self.register_buffer("started", torch.tensor(False))

    def forward(self, features_BLE: Tensor, temperature: float = 1.0) -> Quantised:
        """``temperature`` is that of the Gumbel noise, in (0, 1]; the other modes have none."""
        none = features_BLE.new_zeros(features_BLE.shape[0], dtype=torch.float32)
        if self.mode == "nearest":
            return self._nearest(features_BLE.float())
        if self.training and not self.started:
            self.start(features_BLE)
        logits = self.project(features_BLE).float()
        probabilities = logits.softmax(-1)
        chosen = probabilities
        if self.mode == "gumbel" and self.training:
            chosen = F.gumbel_softmax(logits, temperature, hard=True)
        return Quantised(self.lookup(chosen), logits, probabilities, none)

    @torch.no_grad()
    def start(self, features_BLE: Tensor) -> None:
        """Shift and scale the projection so that every code's logits have mean 0 and deviation ``START`` over the
        tokens of all ranks; features without any contrast leave it, and the next batch is asked."""
        logits = self.project(features_BLE).float()
        mean = pooled_mean(logits)
        deviation = pooled_mean((logits - mean).square()).sqrt()
        if deviation.mean() < FLAT:
            return
        scale = START / deviation.clamp_min(FLAT)
        self.project.weight.mul_(scale.unsqueeze(-1).to(self.project.weight.dtype))
        self.project.bias.sub_(mean.to(self.project.bias.dtype)).mul_(scale.to(self.project.bias.dtype))
        self.started.fill_(True)

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
