"""What stands in hidden places: the mask token, and what visible tokens near it suggest."""

from __future__ import annotations

import pytest
import torch

from nnunet_umit.architectures.masking import fill_hidden, random_masking, spread
from nnunet_umit.spacing import TokenGrid

GRIDS = [(5, 7, 5), (1, 6, 9), (3, 1, 4)]


def example(shape: tuple[int, int, int]) -> tuple[TokenGrid, torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = TokenGrid(shape, (1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    visible, hidden = random_masking(2, grid.tokens, 0.7, generator)
    return grid, visible, hidden, torch.randn(2, visible.shape[1], 6, generator=generator)


@pytest.mark.parametrize("shape", GRIDS)
def test_spread_is_the_mean_weighted_by_distance(shape: tuple[int, int, int]) -> None:
    """Against the plain form: a softmax of minus the squared distances."""
    grid, visible, _, tokens = example(shape)
    places = torch.cartesian_prod(*(torch.arange(count, dtype=torch.float64) for count in shape))
    distance = torch.cdist(places.expand(2, -1, -1), places[visible])
    expected = (-distance.square()).softmax(-1) @ tokens.double()
    torch.testing.assert_close(spread(tokens, visible, grid).double(), expected, atol=1e-5, rtol=1e-4)


def test_visible_tokens_stay_and_hidden_ones_get_the_mask_token_on_top() -> None:
    grid, visible, hidden, tokens = example(GRIDS[0])
    mask = torch.randn(6)
    filled = fill_hidden(tokens, visible, mask, grid)
    rows = torch.arange(2)[:, None]
    assert torch.equal(filled[rows, visible], tokens)
    torch.testing.assert_close(filled[rows, hidden], spread(tokens, visible, grid)[rows, hidden] + mask)
    alike = fill_hidden(torch.full_like(tokens, 3.0), visible, mask, grid)
    torch.testing.assert_close(alike[rows, hidden], (3.0 + mask).expand(2, hidden.shape[1], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_far_from_everything_get_the_mask_token_alone(dtype: torch.dtype) -> None:
    """exp(-d^2) is zero in float32 from 11 tokens on, and in float16 from 5; neither may give NaN."""
    grid, visible = TokenGrid((1, 1, 40), (1, 1, 1)), torch.tensor([[0]])
    tokens = torch.full((1, 1, 3), 2.0, dtype=dtype, requires_grad=True)
    filled = fill_hidden(tokens, visible, torch.ones(3), grid)
    assert filled.dtype == dtype
    assert filled[0, 6].tolist() == [3.0] * 3 and filled[0, 39].tolist() == [1.0] * 3
    filled.float().sum().backward()
    assert tokens.grad is not None and bool(torch.isfinite(tokens.grad).all())


def test_autocast_does_not_reach_the_weights() -> None:
    grid, visible, _, tokens = example(GRIDS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spread(tokens, visible, grid)
    assert torch.equal(inside, spread(tokens, visible, grid))
