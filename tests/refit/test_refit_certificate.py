"""The certificate is never below the true gap: against rational arithmetic, where nothing is rounded."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refit_reference import EPS, Reference, exact_gap, make_layer
from torch import Tensor

from trimfit import Certificate, Cholesky, ConjugateGradients, FactoredGram, InputError, Status, refit
from trimfit.refit import Solver

SOLVERS: list[Solver] = [
    Cholesky(),
    Cholesky(1e-10, torch.float64),
    ConjugateGradients("diagonal", max_steps=1),
    ConjugateGradients("diagonal", max_steps=3),
    ConjugateGradients("masked_inverse", max_steps=1),
    ConjugateGradients("masked_inverse", 1e-2),
    ConjugateGradients("masked_inverse", 1e-10, dtype=torch.float64),
]


def assert_proven(gram: Tensor, weight: Tensor, mask: Tensor, solver: Solver, damping: float) -> None:
    try:
        factored = FactoredGram(gram, damping).certifiable
    except InputError:
        return  # not positive semi-definite after rounding: nothing is claimed
    solution = refit(factored, weight, mask, solver=solver)
    alive = mask & ~factored.dead
    true = exact_gap(factored.raw, factored.damping_weight, weight, alive, solution.weight)
    for bound, gap in zip(solution.certificate.gap.tolist(), true, strict=True):
        assert Fraction(bound) >= gap


@st.composite
def nasty_layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Up to 6 inputs, some of them almost the same, in units that differ by up to 10¹²; weights that cancel."""
    size, rows = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    numbers = st.integers(-8, 8).map(float)
    tokens = draw(st.integers(1, 8))
    inputs = torch.tensor(draw(st.lists(numbers, min_size=size * tokens, max_size=size * tokens)), dtype=torch.float64)
    inputs = inputs.view(tokens, size)
    for column in range(1, size):
        if draw(st.booleans()):
            closeness = 10.0 ** -draw(st.integers(1, 9))
            inputs[:, column] = inputs[:, column - 1] + closeness * inputs[:, column]
    inputs *= 10.0 ** torch.tensor(draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size)))
    weight = torch.tensor(draw(st.lists(numbers, min_size=size * rows, max_size=size * rows)), dtype=torch.float64)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size * rows, max_size=size * rows)))
    gram = inputs.T @ inputs / tokens
    return (gram + gram.T) / 2, weight.view(rows, size), mask.view(rows, size)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(nasty_layers(), st.sampled_from(SOLVERS), st.sampled_from([0.0, 1e-12, 1e-6, 0.01]), st.booleans())
def test_the_bound_holds_exactly(layer: tuple[Tensor, Tensor, Tensor], solver: Solver, damping: float, single: bool):
    gram, weight, mask = layer
    assert_proven(gram, weight.float() if single else weight, mask, solver, damping)


@pytest.mark.parametrize("closeness", [1e-3, 1e-6, 1e-7, 1e-8, 1e-9, 1e-12])
def test_the_bound_holds_for_inputs_that_are_almost_equal(closeness: float):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    inputs = torch.cat([base, base + closeness * torch.randn(9, 3, generator=generator, dtype=torch.float64)], dim=1)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    for solver in SOLVERS:
        assert_proven(inputs.T @ inputs / 9, weight, mask, solver, 0.0)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.01])
@pytest.mark.parametrize("name", ["diagonal", "masked_inverse"])
def test_the_bound_holds_and_gaps_shrink_along_the_way(decay: float, damping: float, name: str):
    gram, weight, mask = make_layer(4, 24, decay=decay)
    reference = Reference(gram, weight, mask, damping=damping)
    gaps: list[Tensor] = []
    for steps in (1, 2, 3, 5, 9, 17):
        solver = ConjugateGradients(name, 1e-12, steps, torch.float64)
        solution = refit(gram, weight, mask, damping=damping, solver=solver)
        gaps.append(reference.gap(solution.weight))
        assert (solution.certificate.gap >= gaps[-1]).all()
        assert (solution.certificate.relative >= gaps[-1] / reference.gain).all()
    assert all((after <= before + 1e-12 * reference.gain).all() for before, after in pairwise(gaps))


def test_gain_and_scale_are_what_they_are_said_to_be():
    gram, weight, mask = make_layer(6, 16)
    mask[0] = True
    reference = Reference(gram, weight, mask)
    solution = refit(gram, weight, mask)
    objective = reference.objective(solution.weight)
    gain = reference.objective(weight * mask) - objective
    torch.testing.assert_close(solution.certificate.gain, gain, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(solution.certificate.scale, torch.maximum(gain, 1e-8 * objective.abs()))
    assert solution.certificate.gain[0] == 0
    assert solution.certificate.gap.dtype == torch.float64
    assert solution.certificate.gap.shape == (6,)


def test_the_certificate_of_the_layer_weighs_the_rows():
    certificate = Certificate(*torch.tensor([[1.0, 0, 3], [10, 0, 10], [10, 0, 30]]).double())
    assert certificate.relative.tolist() == [0.1, 0.0, 0.1]
    assert certificate.layer == pytest.approx(0.1)
    assert Certificate(*torch.zeros(3, 2)).layer == 0
    joined = Certificate.concatenate([certificate.rows(torch.tensor([0])), certificate.rows(torch.tensor([1, 2]))])
    assert torch.equal(joined.gap, certificate.gap)


def test_it_certifies_the_weights_that_are_returned():
    """In float32 the bound cannot be better than the rounding of the stored weights."""
    gram, weight, mask = make_layer(4, 12, decay=1.0)
    double = refit(gram, weight, mask, solver=Cholesky(1e-10, torch.float64))
    single = refit(gram, weight.float(), mask, solver=Cholesky(1e-10, torch.float64))
    assert single.weight.dtype == torch.float32
    assert (single.certificate.gap > 100 * double.certificate.gap).all()
    assert (single.certificate.gap >= Reference(gram, weight.float(), mask).gap(single.weight)).all()


def test_a_gap_within_rounding_is_not_called_zero():
    gram, weight, _ = make_layer(3, 8)
    solution = refit(gram, weight, torch.ones(3, 8, dtype=torch.bool))
    assert (solution.certificate.gap > 0).all()
    assert (solution.certificate.gap < 64 * EPS * Reference(gram, weight, weight == weight).linear.norm()).all()
    assert solution.status is Status.OPTIMAL
