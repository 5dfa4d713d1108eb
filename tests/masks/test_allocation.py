"""Budgets split over layers: exact totals, against brute force on tiny problems."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit.errors import InputError
from trimfit.masks import Unstructured, keep_best
from trimfit.masks.allocation import STEPS, by_error, by_outliers, loss_curve, outlier_ratio, uniform
from trimfit.refit import FactoredGram, refit

layer_sizes = st.lists(st.integers(20, 3000), min_size=1, max_size=6)
percents = st.integers(0, 90).map(lambda percent: percent / 100)


def total(sizes: list[int], sparsity: float) -> int:
    return round(round(100 * sparsity) * sum(sizes) / 100)


def curves(sizes: list[int], seed: int, steps: int = 20) -> list[Tensor]:
    """Rising, not always convex."""
    generator = torch.Generator().manual_seed(seed)
    rises = torch.rand(len(sizes), steps, generator=generator, dtype=torch.float64) ** 3
    return [torch.cat((torch.zeros(1, dtype=torch.float64), rise.cumsum(0))) for rise in rises]


def check(counts: list[int], sizes: list[int], sparsity: float) -> None:
    assert sum(counts) == total(sizes, sparsity)
    assert all(0 <= count <= (1 + sparsity) / 2 * size + 1 for count, size in zip(counts, sizes, strict=True))
    assert all(count < size for count, size in zip(counts, sizes, strict=True))


@settings(max_examples=40, deadline=None)
@given(layer_sizes, percents, st.integers(0, 99))
def test_totals_are_exact_and_no_layer_is_emptied(sizes: list[int], sparsity: float, seed: int):
    ratios = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    check(uniform(sizes, sparsity), sizes, sparsity)
    check(by_outliers(sizes, ratios, sparsity), sizes, sparsity)
    check(by_outliers(sizes, ratios, sparsity, width=0.5), sizes, sparsity)
    for reach in (0.0, 0.1, 1.0):
        counts = by_error(sizes, curves(sizes, seed), sparsity, reach)
        check(counts, sizes, sparsity)
        for count, size in zip(counts, sizes, strict=True):
            assert abs(count - sparsity * size) <= reach * size + 1


def test_what_a_small_layer_cannot_lose_the_others_do():
    assert uniform([7, 1000, 64], 0.995) == [6, 997, 63]
    assert uniform([1, 1, 1, 1, 1000], 0.995) == [0, 0, 0, 0, 999]


@settings(max_examples=40, deadline=None)
@given(layer_sizes, percents)
def test_layers_that_do_not_differ_get_the_same_share(sizes: list[int], sparsity: float):
    curve = torch.linspace(0, 1, 101, dtype=torch.float64) ** 2
    answers = (
        uniform(sizes, sparsity),
        by_outliers(sizes, [0.02] * len(sizes), sparsity),
        by_error(sizes, [size * curve for size in sizes], sparsity),
    )
    for counts in answers:
        assert all(abs(count - sparsity * size) <= 1 for count, size in zip(counts, sizes, strict=True))


def test_uniform_shares_are_whole_where_they_can_be():
    assert uniform([100, 300, 64], 0.5) == [50, 150, 32]
    assert uniform([3, 3, 3, 3], 0.5) == [2, 2, 1, 1]
    assert sum(uniform([45], 0.7)) == 32  # 31.5, half to even, of the decimal that was written


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=2, max_size=3), st.integers(0, 200), st.integers(1, 9))
def test_the_cost_is_the_least_there_is(sizes: list[int], seed: int, tenths: int):
    """With a convex curve for every count: against all ways to split the budget within the limits."""
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(size, generator=generator, dtype=torch.float64).sort().values.cumsum(0) for size in sizes]
    costs = [torch.cat((torch.zeros(1, dtype=torch.float64), cost)) for cost in costs]
    sparsity = tenths / 10
    budget = total(sizes, sparsity)
    most = [min(-(-(10 + tenths) * size // 20), size - 1) for size in sizes]
    splits = [s for s in itertools.product(*(range(m + 1) for m in most)) if sum(s) == budget]
    if not splits:
        with pytest.raises(InputError, match="lower sparsity"):
            by_error(sizes, costs, sparsity, reach=1)
        return

    def cost_of(split: tuple[int, ...]) -> float:
        return sum(cost[count].item() for cost, count in zip(costs, split, strict=True))

    found = by_error(sizes, costs, sparsity, reach=1)
    assert cost_of(tuple(found)) == pytest.approx(min(map(cost_of, splits)), abs=1e-12)


def test_where_the_cost_is_not_convex_its_hull_counts():
    """The second layer is dear to begin with and then free: on the hull it is the cheaper one throughout."""
    straight = torch.tensor([0, 1.0, 2, 3, 4])
    jump = torch.tensor([0, 3.0, 3, 3, 3])
    assert by_error([8, 8], [straight, jump], 0.25, reach=1) == [0, 4]
    assert by_error([8, 8], [straight, jump], 0.5, reach=1) == [2, 6]  # no layer loses more than 3/4 here


@settings(max_examples=40, deadline=None)
@given(layer_sizes, st.integers(0, 50))
def test_a_higher_sparsity_never_gives_a_weight_back(sizes: list[int], seed: int):
    costs = curves(sizes, seed)
    steps = [by_error(sizes, costs, percent / 100, reach=1) for percent in (20, 40, 60, 80)]
    for fewer, more in itertools.pairwise(steps):
        assert all(a <= b + 1 for a, b in zip(fewer, more, strict=True))  # but for rounding


def test_dearer_layers_lose_less():
    curve = torch.linspace(0, 1, 101) ** 2
    counts = by_error([1000, 1000], [curve, 3 * curve], 0.4, reach=1)
    assert counts == [600, 200]  # equal slopes: 2·0.6 = 3·2·0.2
    assert by_error([1000, 1000], [curve, 3 * curve], 0.4, reach=0.1) == [500, 300]


def test_outliers_spread_the_sparsity():
    """The middle one of three equal blocks has a ratio halfway: linear, over 2·λ, around the mean."""
    assert by_outliers([1000, 1000, 1000], [0.0, 0.01, 0.02], 0.5) == [580, 500, 420]
    assert by_outliers([3000, 1000], [0.02, 0.0], 0.5) == [1380, 620]  # the mean is over weights
    assert by_outliers([1000, 1000], [0.0, 1.0], 0.5, width=0.5) == [750, 250]  # the limit; the other takes the rest


def test_the_outlier_ratio_is_of_all_layers_together():
    norms = [torch.ones(4), torch.full((4,), 2.0)]
    weights = [torch.ones(3, 4), torch.ones(3, 4)]
    weights[1][0, 0] = 11  # scores: twelve of 1, eleven of 2, one of 22; the mean is 56 / 24
    assert outlier_ratio(weights, norms) == 1 / 24
    assert outlier_ratio(weights, norms, threshold=10) == 0
    assert outlier_ratio(weights[:1], norms[:1]) == 0


def test_the_loss_curve_is_that_of_a_single_weight_at_its_start(make_layer: Callable[..., tuple[Tensor, FactoredGram]]):
    """Removing the cheapest 1 % = one weight, refitting its row: the exact loss, from the refit itself."""
    weight, gram = make_layer(10, 10, damping=1e-9)
    curve = loss_curve(weight, gram)
    errors = []
    for index in range(100):
        mask = torch.ones(100, dtype=torch.bool)
        mask[index] = False
        fitted = refit(gram, weight, mask.view(10, 10)).weight
        errors.append((gram.energy(fitted - weight) / gram.energy(weight)).item())
    assert curve.shape == (STEPS + 1,)
    assert curve[0] == 0
    assert curve[1].item() == pytest.approx(min(errors), rel=1e-3)
    assert curve[100].item() == pytest.approx(sum(errors), rel=1e-3)
    assert (curve.diff().diff() >= -1e-12).all()


def test_the_loss_curve_ranks_layers_as_their_refits_do(make_layer: Callable[..., tuple[Tensor, FactoredGram]]):
    estimated, true = [], []
    for seed in range(6):
        weight, gram = make_layer(16, 32, seed)
        weight = weight * torch.rand(32, generator=torch.Generator().manual_seed(seed)) ** seed  # ever easier to prune
        fitted = refit(gram, weight, keep_best(weight.abs(), Unstructured(0.5, "layer"))).weight
        estimated.append(loss_curve(weight, gram)[STEPS // 2].item())
        true.append((gram.energy(fitted - weight) / gram.energy(weight)).item())
    assert torch.tensor(estimated).argsort().tolist() == torch.tensor(true).argsort().tolist()


def test_dead_inputs_cost_nothing(make_layer: Callable[..., tuple[Tensor, FactoredGram]]):
    weight, gram = make_layer(10, 10, dead=(0, 3))
    curve = loss_curve(weight, gram)
    assert curve[20] == 0
    assert curve[21] > 0
    assert (loss_curve(torch.zeros(10, 10), gram) == 0).all()


def test_too_high_a_sparsity_for_tiny_layers_is_an_error():
    with pytest.raises(InputError, match="4 of 4 weights"):
        by_error([2, 2], [torch.arange(3.0)] * 2, 0.9)
