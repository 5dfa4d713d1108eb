"""How a refit ends: every way out, with the right name on it."""

import pytest
import torch
from refit_reference import Reference, make_layer
from torch import Tensor

from trimfit import Auto, Cholesky, ConjugateGradients, FactoredGram, Status, refit


@pytest.mark.parametrize("name", ["diagonal", "masked_inverse"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_limit(name: str, steps: int, dtype: torch.dtype):
    gram, weight, mask = make_layer(5, 40, decay=2.0)
    solution = refit(gram, weight, mask, solver=ConjugateGradients(name, 1e-10, steps, dtype))
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps == steps
    reference = Reference(gram, weight, mask)
    assert (reference.gap(solution.weight) < reference.gain).all()  # what was found in time is kept
    assert (solution.certificate.gap >= reference.gap(solution.weight)).all()


def test_precision_limit_of_stored_weights():
    gram, weight, mask = make_layer(5, 24, decay=2.0)
    solution = refit(gram, weight.float(), mask, solver=Cholesky(1e-16, torch.float64))
    assert solution.status is Status.PRECISION_LIMIT
    assert solution.steps < 8
    assert (solution.certificate.relative < 1e-8).all()


@pytest.mark.parametrize(
    "solver", [Cholesky(1e-25), ConjugateGradients("masked_inverse", 1e-25)], ids=lambda s: str(s)[:8]
)
def test_precision_limit_of_the_certificate(solver: Cholesky | ConjugateGradients):
    gram, weight, mask = make_layer(5, 24)
    solution = refit(gram, weight, mask, solver=solver)
    assert solution.status is Status.PRECISION_LIMIT
    assert solution.certificate.layer < 1e-12


def test_a_row_at_the_limit_of_precision_does_not_stop_the_others():
    """Row 0 has next to nothing to gain, less than float32 can store, and is by far the largest."""
    gram, weight, mask = make_layer(6, 32, decay=2.0)
    weight[0] *= 1e10
    weight[0, ~mask[0]] *= 1e-6
    weight = weight.float()
    solver = ConjugateGradients("diagonal", 1e-9)
    together = refit(gram, weight, mask, solver=solver)
    assert together.status is Status.PRECISION_LIMIT
    assert together.certificate.relative[0] > 1e-9
    assert (together.certificate.relative[1:] <= 1e-9).all()
    assert refit(gram, weight[1:], mask[1:], solver=solver).status is Status.OPTIMAL


@pytest.mark.usefixtures("chunked")
def test_the_status_is_the_worst_of_all_rows():
    gram, weight, mask = make_layer(6, 32, decay=2.0)
    mask[3:] = True
    solution = refit(gram, weight, mask, solver=ConjugateGradients("diagonal", max_steps=2))
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps == 2


class Useless:
    """Returns what it was told to, whatever the problem."""

    tolerance = 1e-4
    dtype = torch.float32
    max_steps = 50

    def __init__(self, value: float):
        self.value = value
        self.calls = 0

    def correct(
        self, gram: FactoredGram, residual: Tensor, mask: Tensor, gain: Tensor, max_steps: int
    ) -> tuple[Tensor, int]:
        self.calls += 1
        return torch.full_like(residual, self.value) * mask, 1


@pytest.mark.parametrize("value", [0.0, 1e6, 1e300, float("nan"), float("inf"), -float("inf")])
def test_no_solver_can_make_it_worse_or_go_on_for_ever(value: float):
    gram, weight, mask = make_layer(5, 12)
    solver = Useless(value)
    solution = refit(gram, weight, mask, solver=solver)
    assert torch.equal(solution.weight, weight * mask)
    assert torch.isfinite(solution.certificate.relative).all()
    assert solution.status is Status.PRECISION_LIMIT
    assert solver.calls == 1


def test_weights_too_large_to_be_stored_are_not_returned():
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]], dtype=torch.float64)
    weight = torch.tensor([[1e38, 3e38]])
    target = torch.tensor([[1e38, 3e38]], dtype=torch.float64)  # the optimum is near 1e44
    solution = refit(gram, weight, torch.ones(1, 2, dtype=torch.bool), target=target)
    assert torch.isfinite(solution.weight).all()
    assert solution.status is Status.PRECISION_LIMIT


@pytest.mark.parametrize("solver", [Auto(), Cholesky(), ConjugateGradients()], ids=lambda s: str(s)[:8])
def test_no_steps_where_there_is_nothing_to_do(solver: Auto | Cholesky | ConjugateGradients):
    gram, weight, mask = make_layer(5, 12)
    for done in (weight * mask, torch.zeros_like(weight)):
        solution = refit(gram, done, mask, solver=solver)
        assert solution.steps == 0
        assert solution.status is Status.OPTIMAL
        assert torch.equal(solution.weight, done)


def test_the_solver_used_is_told():
    gram, weight, mask = make_layer(5, 12)
    assert isinstance(refit(gram, weight, mask).solver, Cholesky | ConjugateGradients)
    solver = Cholesky(1e-3)
    assert refit(gram, weight, mask, solver=solver).solver is solver
