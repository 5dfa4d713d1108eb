"""Column balance: what it makes equal, what it does not see, and that it is worth something."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit.quant import Grid, place_levels
from trimfit.quant.balance import balance_columns


def uneven(rows: int = 40, width: int = 24, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Weights whose rows and columns differ in size by about e^spread."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(n, generator=generator) for n in (rows, width))
    row, column = ((spread * size).exp() for size in sizes)
    return torch.randn(rows, width, generator=generator) * row[:, None] * column


def plain_balance(weight: Tensor, sweeps: int = 400) -> Tensor:
    """Float64: rows and columns divided by their root mean squares in turn until nothing changes."""
    left, factors = weight.double(), torch.ones(weight.shape[1], dtype=torch.float64)
    for _ in range(sweeps):
        left = left / left.square().mean(1, keepdim=True).sqrt()
        columns = left.square().mean(0).sqrt()
        left, factors = left / columns, factors * columns
    return factors / factors.log().mean().exp()


@given(st.integers(0, 2**31), st.integers(5, 40), st.integers(2, 40), st.floats(0, 1.2))
@settings(deadline=None, max_examples=30)
def test_with_power_one_rows_and_columns_become_equal(seed: int, rows: int, width: int, spread: float):
    weight = uneven(rows, width, seed, spread)
    factors = balance_columns([weight], power=1)
    assert factors.dtype == torch.float32 and factors.shape == (width,)
    expected = plain_balance(weight).float()
    torch.testing.assert_close(factors, expected, rtol=2e-2, atol=0)
    torch.testing.assert_close(factors.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    balanced = weight / expected
    balanced = balanced / balanced.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(balanced.square().mean(0), torch.ones(width), rtol=1e-4, atol=0)
    mine = weight / factors
    mine = mine / mine.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(mine.square().mean(0), torch.ones(width), rtol=0.05, atol=0)


def test_a_weight_of_rank_one_is_seen_through():
    """w_ij = r_i · c_j has columns of the sizes c, whatever the rows."""
    rows, columns = uneven(30, 1).abs(), uneven(1, 12, seed=1).abs()
    expected = columns[0] / columns.log().mean().exp()
    torch.testing.assert_close(balance_columns([rows * columns], power=1), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(balance_columns([rows * columns], power=0.5), expected.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(balance_columns([rows * columns], power=0), torch.ones(12))


def test_the_power_is_one_of_the_factors():
    weight = uneven(spread=0.7)
    whole = balance_columns([weight], power=1)
    torch.testing.assert_close(balance_columns([weight], power=0.3), whole**0.3)
    assert not torch.allclose(balance_columns([weight]), torch.ones(24), rtol=0.1)


def test_sizes_of_rows_and_weights_change_nothing():
    weight, other = uneven(spread=0.7), uneven(16, seed=1, spread=0.7)
    expected = balance_columns([weight, other])
    rows = uneven(40, 1, seed=2).abs()
    torch.testing.assert_close(balance_columns([rows * weight, 1e6 * other]), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(balance_columns([1e-6 * weight, 1e-6 * other]), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(balance_columns([torch.cat([weight, other])]), expected)
    torch.testing.assert_close(balance_columns([other, -weight]), expected)
    in_half = balance_columns([weight.bfloat16(), other.bfloat16()])
    torch.testing.assert_close(in_half, expected, rtol=1e-2, atol=0)


def test_factors_follow_their_columns():
    weight = uneven()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(balance_columns([weight[:, order]]), balance_columns([weight])[order])


def test_dead_columns_and_rows_do_not_matter():
    weight = uneven(spread=0.7)
    expected = balance_columns([weight])
    wider = torch.zeros(43, 26)
    wider[:40, 1:25] = weight
    found = balance_columns([wider])
    assert found[0] == found[25] == 1
    torch.testing.assert_close(found[1:25], expected, rtol=1e-3, atol=0)
    assert torch.equal(balance_columns([torch.zeros(4, 6)]), torch.ones(6))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_columns_out_of_all_proportion_have_bounded_factors_and_leave_the_others_balanced(size: float):
    weight = uneven(spread=0.3)
    others = balance_columns([weight[:, 8:]], power=1)
    weight[:, :8] *= size
    factors = balance_columns([weight], power=1)
    torch.testing.assert_close(factors.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-4)
    ratio = factors[:8] / factors[8:].median()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 64.0 if size > 1 else 1 / 64), rtol=0.5, atol=0)
    torch.testing.assert_close(factors[8:] / factors[8:].log().mean().exp(), others, rtol=0.2, atol=0)


def test_what_is_balanced_already_stays():
    weight = torch.tensor([[1.0, -1, 1], [-2, 2, 2], [0.1, 0.1, -0.1]])
    torch.testing.assert_close(balance_columns([weight]), torch.ones(3))


def test_balanced_columns_lower_the_error_where_inputs_are_small_when_columns_are_large():
    column = torch.logspace(-1, 1, 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator) * column
    seen = 1 / column  # inputs of a trained layer

    def error(factors: Tensor) -> float:
        moved = weight / factors
        lost = place_levels(moved, Grid(4, 32)).nearest(moved).dequantize() * factors - weight
        return (lost * seen).square().sum().item()

    assert error(balance_columns([weight])) < 0.5 * error(torch.ones(64))
