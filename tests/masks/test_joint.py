"""ADMM and swaps: against plain loops, other selectors and, where it can be had, the global optimum."""

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from trimfit.masks import NM, SELECTORS, Pattern, Scope, Unstructured, joint, keep_best
from trimfit.masks.joint import admm, fit, select, stages
from trimfit.refit import Cholesky, ConjugateGradients, refit
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]
PATTERNS: list[Pattern] = [
    Unstructured(0.5, "layer"),
    Unstructured(0.6, "layer"),
    Unstructured(0.7, "layer"),
    Unstructured(0.5, "row"),
    Unstructured(0.7, "row"),
    NM(2, 4),
    NM(1, 4),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def correlated_layer(rows: int, width: int, seed: int, damping: float = 0.01) -> tuple[Tensor, FactoredGram]:
    """Float32 weights, and inputs with a decaying spectrum and a few channels that are far louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.75
    inputs = torch.randn(8 * width, width, generator=generator, dtype=torch.float64) * spectrum @ basis
    inputs[:, :: max(2, width // 4)] *= 5
    return weight, FactoredGram(inputs.T @ inputs / len(inputs), damping)


def damped_error(weight: Tensor, dense: Tensor, gram: FactoredGram) -> float:
    """What selectors and refit minimise: with the damped Gram matrix."""
    change = (weight.double() - dense.double()) / gram.scale
    return float(((change @ gram.matrix) * change).sum())


def refitted_error(mask: Tensor, dense: Tensor, gram: FactoredGram) -> float:
    solution = refit(gram, dense.double(), mask, solver=Cholesky(1e-8, torch.float64))
    return damped_error(solution.weight, dense, gram)


def textbook_admm(dense: Tensor, matrix: Tensor, pattern: Pattern, rho: float) -> tuple[Tensor, Tensor]:
    """ALPS as its authors write it, with W, D and V, and with our schedule of ρ."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    sparse, dual = dense, torch.zeros_like(dense)
    mask = before = keep_best(dense.abs(), pattern)
    for step in range(1, 301):
        weight = (dense @ matrix - dual + rho * sparse) @ torch.linalg.inv(matrix + rho * identity)
        split = weight + dual / rho
        mask = keep_best(split.abs(), pattern)
        sparse = torch.where(mask, split, 0)
        dual = dual + rho * (weight - sparse)
        if step % 5 == 0:
            if int((mask & ~before).sum()) <= 1e-3 * int(mask.sum()):
                break
            before = mask
            rho *= 1.3
    return mask, sparse


@every_pattern
def test_admm_is_the_textbook_one(pattern: Pattern):
    for seed in range(3):
        weight, gram = correlated_layer(6, 24, seed)
        dense = weight.double() / gram.scale
        mask, split = admm(dense, gram.matrix, pattern, 0.05)
        expected_mask, expected_split = textbook_admm(dense, gram.matrix, pattern, 0.05)
        assert torch.equal(mask, expected_mask)
        torch.testing.assert_close(split, expected_split)


@every_pattern
def test_admm_stops_at_its_limit(pattern: Pattern):
    weight, gram = correlated_layer(6, 24, 0)
    dense = weight.double() / gram.scale
    mask, split = admm(dense, gram.matrix, pattern, 0.1, max_steps=1)
    assert torch.equal(mask, keep_best(dense.abs(), pattern))
    assert torch.equal(split, dense * mask)


@every_pattern
def test_fit_comes_near_the_optimum_from_anywhere(pattern: Pattern):
    weight, gram = correlated_layer(16, 48, 1)
    dense = weight.double() / gram.scale
    mask = keep_best(dense.abs(), pattern)
    best = refitted_error(mask, weight, gram)
    for start in (dense, -dense, torch.zeros_like(dense)):
        fitted = fit(dense, start * mask, mask, gram)
        error, before = (damped_error(what * gram.scale, weight, gram) for what in (fitted, start * mask))
        assert error <= best + 1e-3 * before


def test_fit_leaves_rows_alone_that_nothing_can_improve():
    weight, gram = correlated_layer(4, 16, 0)
    dense = weight.double() / gram.scale
    assert torch.equal(fit(dense, dense, torch.ones_like(dense, dtype=torch.bool), gram), dense)


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damped_error_never_rises_from_stage_to_stage_nor_in_the_refit(pattern: Pattern, dtype: torch.dtype):
    for seed in range(3):
        weight, gram = correlated_layer(16, 32, seed)
        passed = list(stages(weight.to(dtype), gram, pattern))
        assert [stage.name for stage in passed] == ["admm", "fitted", "swaps"]
        last = passed[-1]
        solver = ConjugateGradients(tolerance=1e-6, dtype=torch.float64)
        refitted = refit(gram, weight.double(), last.mask, start=last.weight * gram.scale, solver=solver).weight
        errors = [damped_error(w, weight, gram) for w in (*(stage.weight * gram.scale for stage in passed), refitted)]
        assert all(after <= before for before, after in pairwise(errors))
        assert errors[-1] < errors[0]
        for stage in passed:
            assert not stage.weight[~stage.mask].any()


def test_damped_error_does_not_rise_where_nothing_can_be_gained(make_layer: MakeLayer):
    weight, gram = make_layer(6, 12)
    diagonal = FactoredGram(gram.raw.diagonal().diag(), 0.01)
    errors = [
        damped_error(stage.weight * diagonal.scale, weight, diagonal)
        for stage in stages(weight, diagonal, Unstructured(0.5, "layer"))
    ]
    assert all(after <= before for before, after in pairwise(errors))


@every_pattern
def test_weights_are_optimal_on_the_mask(pattern: Pattern):
    weight, gram = correlated_layer(16, 48, 1)
    selection = select(weight, gram, pattern)
    assert selection.weight is not None
    best = refitted_error(selection.mask, weight, gram)
    assert damped_error(selection.weight, weight, gram) <= best * (1 + 3e-3)
    assert not selection.weight[~selection.mask].any()


@every_pattern
def test_no_worse_than_sparsegpt_and_wanda_with_optimal_weights(pattern: Pattern):
    for seed in range(4):
        weight, gram = correlated_layer(24, 48, seed)
        own = refitted_error(select(weight, gram, pattern).mask, weight, gram)
        for name in ("sparsegpt", "wanda"):
            other = refitted_error(SELECTORS[name].select(weight, gram, pattern).mask, weight, gram)
            assert own < other


def test_wide_and_well_conditioned_layers_do_without_swaps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joint, "_SWAPS_UP_TO", 8)
    weight, _ = correlated_layer(8, 16, 0)
    for shared, names in ((9.0, ["admm", "fitted", "swaps"]), (0.0, ["admm", "fitted"])):
        gram = FactoredGram(torch.eye(16) + shared, 0.01)
        passed = stages(weight, gram, Unstructured(0.5, "row"))
        assert [stage.name for stage in passed] == names


def test_near_the_global_optimum_on_tiny_rows():
    ratios: list[float] = []
    for seed in range(10):
        weight, gram = correlated_layer(4, 8, seed)
        own = select(weight, gram, Unstructured(0.5, "row")).mask
        for row in range(4):
            one = weight[row : row + 1]
            masks = torch.zeros(70, 8, dtype=torch.bool)
            for index, kept in enumerate(combinations(range(8), 4)):
                masks[index, list(kept)] = True
            every = refit(gram, one.double().expand(70, -1), masks, solver=Cholesky(1e-8, torch.float64)).weight
            change = (every - one) / gram.scale
            best = ((change @ gram.matrix) * change).sum(1).min().item()
            ratios.append(refitted_error(own[row : row + 1], one, gram) / best)
    assert min(ratios) > 1 - 1e-6
    assert sum(ratio < 1 + 1e-6 for ratio in ratios) >= 0.9 * len(ratios)
    assert sum(ratios) / len(ratios) < 1.05


@every_pattern
def test_the_same_input_gives_the_same_result(pattern: Pattern):
    weight, gram = correlated_layer(16, 32, 0)
    one, other = select(weight, gram, pattern), select(weight, gram, pattern)
    assert torch.equal(one.mask, other.mask)
    assert one.weight is not None
    assert other.weight is not None
    assert torch.equal(one.weight, other.weight)


@every_pattern
def test_singular_matrix(pattern: Pattern):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 16, generator=generator)  # fewer tokens than inputs
    weight = torch.randn(8, 16, generator=generator)
    for damping in (0.0, 0.01):
        gram = FactoredGram(inputs.T @ inputs / 5, damping)
        selection = select(weight, gram, pattern)
        assert selection.weight is not None
        assert torch.isfinite(selection.weight).all()
        assert gram.energy(selection.weight - weight) < 0.2 * gram.energy(weight)


@every_pattern
def test_many_dead_inputs(make_layer: MakeLayer, pattern: Pattern):
    weight, gram = make_layer(6, 16, dead=(0, 1, 2, 9, 15))
    selection = select(weight, gram, pattern)
    assert selection.weight is not None
    assert not selection.weight[:, gram.dead].any()
    if not isinstance(pattern, NM):
        assert not selection.mask[:, gram.dead].any() or pattern.sparsity < 5 / 16


def test_all_inputs_dead():
    gram = FactoredGram(torch.zeros(8, 8), 0.01)
    selection = select(torch.ones(3, 8), gram, NM(2, 4))
    assert selection.weight is not None
    assert not selection.weight.any()
    assert (selection.mask.view(3, 2, 4).sum(2) == 2).all()


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_everything_may_be_pruned(scope: Scope):
    weight, gram = correlated_layer(2, 6, 0)
    selection = select(weight, gram, Unstructured(0.99, scope))
    assert not selection.mask.any()
    assert selection.weight is not None
    assert not selection.weight.any()


def test_sparsity_zero_and_dead_inputs(make_layer: MakeLayer):
    weight, gram = make_layer(3, 6, dead=(2,))
    selection = select(weight, gram, Unstructured(0.0, "layer"))
    assert selection.mask.all()
    assert selection.weight is not None
    assert torch.equal(selection.weight, torch.where(gram.dead, 0, weight))
    selection.weight.fill_(7)
    assert not (weight == 7).any()
