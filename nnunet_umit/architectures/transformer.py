"""One transformer block and one stack of them (pre-norm, SwiGLU with inner norm: EVA-02, arXiv 2303.11331).

Shape legend: B batch, L tokens, E width, h width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_umit.architectures.rope import rotate

NEAR = 3.0  # first bias of queries and keys where rotary positions turn fastest
NEAR_PAIRS = 2  # channel pairs that have it, of rows and of columns


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Drop a residual branch for whole samples, rescaled to keep the mean (stochastic depth, arXiv 1603.09382)."""
    if rate == 0.0 or not training:
        return branch
    keep = torch.rand(branch.shape[0], *(1,) * (branch.dim() - 1), device=branch.device) >= rate
    return branch * (keep / (1.0 - rate)).to(branch.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection and rotary positions on queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BLE: Tensor, rope: Tensor | None, queries: Tensor | None = None) -> Tensor:
        """``queries``: (B, Q) token indices that need an output; the others still serve as keys and values."""
        batch, length, dim = tokens_BLE.shape
        qkv = self.qkv(tokens_BLE).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        parts = qkv.permute(2, 0, 3, 1, 4)
        query, key = (parts[:2] if rope is None else rotate(parts[:2], rope)).unbind(0)
        value = parts[2]
        if queries is not None:
            query = query.gather(2, queries[:, None, :, None].expand(-1, self.num_heads, -1, query.shape[-1]))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, -1, dim))


class SwiGLU(nn.Module):
    """``w3(LN(SiLU(w1 x) * w2 x))`` with w1 and w2 in one matrix (arXiv 2002.05202; the inner norm is EVA-02's)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        gate, value = self.w12(tokens_BLE).chunk(2, -1)
        return self.w3(self.norm(F.silu(gate) * value))


class Block(nn.Module):
    """``x += attention(LN(x)); x += mlp(LN(x))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim, int(dim * mlp_ratio))
        self.drop_path = 0.0

    def forward(self, tokens_BLE: Tensor, rope: Tensor | None, queries: Tensor | None = None) -> Tensor:
        mixed = self.attn(self.norm1(tokens_BLE), rope, queries)
        if queries is not None:
            tokens_BLE = tokens_BLE.gather(1, queries.unsqueeze(-1).expand(-1, -1, tokens_BLE.shape[-1]))
        tokens_BLE = tokens_BLE + drop_path(mixed, self.drop_path, self.training)
        return tokens_BLE + drop_path(self.mlp(self.norm2(tokens_BLE)), self.drop_path, self.training)


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        checkpointing: recompute each block in the backward pass: less memory for about a third more time.
        cpu_bfloat16: on a CPU, multiply in bfloat16. It pays where the CPU has avx512_bf16 or AMX; elsewhere it is
            emulated, slowly. Weights, residuals and norms of them stay float32, and so do all convolutions, which a
            CPU has no fast bfloat16 for: a training's autocast must not reach them.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 8 / 3,
        checkpointing: bool = False,
        cpu_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.checkpointing = checkpointing
        self.cpu_bfloat16 = cpu_bfloat16
        self.apply(_initialise)
        for block in self.blocks:
            _start_small(block, depth)  # type: ignore[arg-type]
            _start_near(block.attn)  # type: ignore[arg-type]

    def set_drop_path(self, rate: float) -> None:
        """Drop path that grows linearly from 0 in the first block to ``rate`` in the last."""
        for index, block in enumerate(self.blocks):
            block.drop_path = rate * index / max(len(self.blocks) - 1, 1)  # type: ignore[assignment]

    def forward(
        self,
        tokens_BLE: Tensor,
        rope: Tensor | None,
        *,
        taps: Sequence[int] = (),
        queries: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the normalised output and the outputs of the zero-based blocks ``taps``.

        With ``queries`` (B, Q) the last block, and so the output (B, Q, E), is computed for those tokens only.
        """
        outputs: dict[int, Tensor] = {}
        for index in range(len(self.blocks)):
            tokens_BLE = self.run(tokens_BLE, rope, range(index, index + 1), queries)
            if index in taps:
                outputs[index] = tokens_BLE
        return self.norm(tokens_BLE), [outputs[tap] for tap in taps]

    def run(self, tokens_BLE: Tensor, rope: Tensor | None, blocks: range, queries: Tensor | None = None) -> Tensor:
        """Some of the blocks, without the final norm; ``queries`` as in :meth:`forward`.

        Residuals have the precision of the weights: under a GPU's autocast the projection before gives half of it.
        """
        tokens_BLE = tokens_BLE.to(self.norm.weight.dtype)
        with self._precision(tokens_BLE.device):
            for index in blocks:
                wanted = queries if index == len(self.blocks) - 1 else None
                if self.checkpointing and torch.is_grad_enabled():
                    tokens_BLE = checkpoint(self.blocks[index], tokens_BLE, rope, wanted, use_reentrant=False)
                else:
                    tokens_BLE = self.blocks[index](tokens_BLE, rope, wanted)
        return tokens_BLE

    def _precision(self, device: torch.device) -> AbstractContextManager:
        if self.cpu_bfloat16 and device.type == "cpu":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _start_small(block: Block, depth: int) -> None:
    """Scale what a block adds to its input, so that the sum over all blocks does not grow with the depth (GPT-2)."""
    for layer in (block.attn.proj, block.mlp.w3):
        layer.weight.mul_((2 * depth) ** -0.5)


@torch.no_grad()
def _start_near(attention: Attention) -> None:
    """Let every token look at its neighbours first. Where queries and keys have the same constant in a channel pair,
    rotary positions make of it a logit proportional to the cosine of the distance times the pair's frequency; the
    fastest pairs have it, so that it falls from one token to the next. Learned from images, attention gets there by
    itself, late (a start after the image of learned weights: arXiv 2305.09828)."""
    bias = attention.qkv.bias.view(3, attention.num_heads, -1, 2)
    rows_and_columns = bias.shape[2] // 2
    for first in (0, rows_and_columns):
        bias[:2, :, first : first + min(NEAR_PAIRS, rows_and_columns), 0] = NEAR
