"""Orders of inputs against every order there is, and scores against dense solves."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit import InputError
from trimfit.masks import NM, obs_scores, spread
from trimfit.refit.gram import FactoredGram


def kept(scores: Tensor, order: Tensor, pattern: NM) -> float:
    groups = scores[:, order].reshape(len(scores), -1, pattern.m)
    return groups.sort(dim=2, descending=True).values[:, :, : pattern.n].sum().item()


def best_of_all(scores: Tensor, pattern: NM) -> float:
    """Over all ways to split the inputs into two groups."""
    n = 2 * pattern.m
    halves = (half for half in itertools.combinations(range(n), pattern.m) if 0 in half)
    return max(kept(scores, torch.tensor([*half, *(set(range(n)) - set(half))]), pattern) for half in halves)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(2, 5)], ids=str)
def test_nearly_the_best_of_all_orders(pattern: NM):
    gained = possible = 0.0
    for seed in range(10):
        scores = torch.rand(5, 2 * pattern.m, generator=torch.Generator().manual_seed(seed)) ** 3
        order = spread(scores, pattern)
        assert torch.equal(order.sort().values, torch.arange(2 * pattern.m))
        best, given = best_of_all(scores, pattern), kept(scores, torch.arange(2 * pattern.m), pattern)
        assert given * (1 - 1e-6) <= kept(scores, order, pattern) <= best * (1 + 1e-6)
        gained, possible = gained + kept(scores, order, pattern) - given, possible + best - given
    assert gained > 0.85 * possible


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 2)], ids=str)
def test_nothing_is_lost_where_an_order_without_loss_exists(pattern: NM):
    """n inputs of each m matter, the same for all rows, and all those that matter stand together."""
    width = 8 * pattern.m
    scores = torch.zeros(6, width)
    scores[:, : 8 * pattern.n] = 1 + torch.rand(6, 8 * pattern.n, generator=torch.Generator().manual_seed(0))
    assert kept(scores, spread(scores, pattern), pattern) == pytest.approx(scores.sum().item())


def test_rows_that_need_different_inputs():
    """Even rows need one half of the inputs, odd rows the other: only exchanges tell how to mix them."""
    generator = torch.Generator().manual_seed(0)
    half = torch.arange(32)[torch.randperm(32, generator=generator)] < 16
    scores = torch.where(half == (torch.arange(10)[:, None] % 2 == 0), 1.0, 0.0)
    scores += 0.01 * torch.rand(10, 32, generator=generator)
    groups = half[spread(scores, NM(2, 4))].view(-1, 4)
    assert (groups.sum(1) == 2).all()


def test_a_good_order_stays():
    scores = torch.tensor([[2.0, 2.0, 1.0, 1.0] * 3])
    assert torch.equal(spread(scores, NM(2, 4)), torch.arange(12))
    assert torch.equal(spread(torch.zeros(3, 8), NM(2, 4)), torch.arange(8))


def test_a_width_that_does_not_suit_the_pattern():
    with pytest.raises(InputError, match="6 inputs cannot be split into groups of 4"):
        spread(torch.rand(2, 6), NM(2, 4))


def test_scores_are_what_a_row_loses_when_the_others_make_up_for_it(
    make_layer: Callable[..., tuple[Tensor, FactoredGram]],
):
    weight, gram = make_layer(3, 6, dead=(2,))
    damped = gram.raw + gram.damping_weight * torch.eye(6, dtype=torch.float64)
    scores = obs_scores(weight, gram)
    for j in range(6):
        others = [i for i in range(6) if i != j]
        # The least of (w − v)ᵀ H (w − v) over all v with v_j = 0 is w_j² times the Schur complement of H at j.
        solved = torch.linalg.solve(damped[others][:, others], damped[others, j])
        schur = damped[j, j] - damped[j, others] @ solved
        expected = torch.zeros(3, dtype=torch.float64) if j == 2 else weight[:, j].square() * schur
        torch.testing.assert_close(scores[:, j].double(), expected, rtol=1e-5, atol=0)
