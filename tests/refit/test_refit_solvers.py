"""What is particular to a solver, to the choice between them, and to the chunks they work in."""

import importlib

import pytest
import torch
from refit_reference import Reference, make_layer

from trimfit import Auto, Cholesky, ConjugateGradients, FactoredGram, InputError, Status, refit
from trimfit.refit import Solver

THREE: list[Solver] = [Cholesky(), ConjugateGradients("diagonal"), ConjugateGradients("masked_inverse")]
EXACT: list[Solver] = [
    Cholesky(1e-12, torch.float64),
    ConjugateGradients("diagonal", 1e-12, dtype=torch.float64),
    ConjugateGradients("masked_inverse", 1e-12, dtype=torch.float64),
]


@pytest.mark.parametrize("solver", EXACT, ids=["cholesky", "diagonal", "masked_inverse"])
@pytest.mark.parametrize("dense_target", [False, True])
def test_chunks_change_nothing(request: pytest.FixtureRequest, solver: Solver, dense_target: bool):
    gram, weight, mask = make_layer(23, 16, decay=1.0)
    mask[3], mask[7] = True, False
    target = weight @ gram * 1.1 if dense_target else None
    whole = refit(gram, weight, mask, target=target, solver=solver)
    request.getfixturevalue("chunked")
    parts = refit(gram, weight, mask, target=target, solver=solver)
    assert parts.status is whole.status is Status.OPTIMAL
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-8)
    assert parts.certificate.gap.shape == (23,)


def nearly_singular(size: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    inputs = base + 1e-5 * torch.randn(40, size, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / 40


def test_cholesky_falls_back_to_float64(monkeypatch: pytest.MonkeyPatch):
    gram = nearly_singular()
    dtypes: list[torch.dtype] = []
    factorise = torch.linalg.cholesky_ex

    def watched(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtypes.append(matrix.dtype)
        return factorise(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", watched)
    factored = FactoredGram(gram)
    _, weight, mask = make_layer(5, 12)
    solution = refit(factored, weight, mask, solver=Cholesky())
    assert dtypes[-2:] == [torch.float32, torch.float64]
    assert solution.damping == 0
    assert solution.status is Status.OPTIMAL
    reference = Reference(gram, weight, mask)
    assert (reference.gap(solution.weight) <= 1e-4 * reference.gain).all()


@pytest.mark.parametrize("name", ["diagonal", "masked_inverse"])
def test_gradients_fall_back_to_float64(name: str):
    gram = nearly_singular()
    _, weight, mask = make_layer(5, 12)
    solution = refit(gram, weight, mask, solver=ConjugateGradients(name))
    assert solution.damping == 0
    assert solution.status is Status.OPTIMAL
    reference = Reference(gram, weight, mask)
    assert (reference.gap(solution.weight) <= 1e-4 * reference.gain).all()


def test_the_masked_inverse_needs_fewer_steps():
    gram, weight, mask = make_layer(20, 64, decay=2.0)
    steps = [refit(gram, weight, mask, solver=solver).steps for solver in THREE]
    assert steps[0] == 1
    assert steps[2] < steps[1]


def test_rows_that_are_finished_leave_the_batch(monkeypatch: pytest.MonkeyPatch):
    gram, weight, mask = make_layer(40, 32, decay=2.0)
    mask[:36] = True
    mask[:36, 0] = False  # easy rows
    expected = Reference(gram, weight, mask)
    for name in ("diagonal", "masked_inverse"):
        solution = refit(gram, weight, mask, solver=ConjugateGradients(name))
        assert solution.status is Status.OPTIMAL
        assert (expected.gap(solution.weight) <= 1e-4 * expected.gain).all()


def chosen(gram: torch.Tensor, mask: torch.Tensor, damping: float = 0.01) -> Solver:
    return Auto(1e-3, torch.float64).choose(FactoredGram(gram, damping), mask)


def test_the_automatic_choice():
    gram, _, half = make_layer(16, 256, decay=1.0)
    assert chosen(gram, half) == ConjugateGradients("masked_inverse", 1e-3, dtype=torch.float64)
    few = torch.arange(256).expand(16, 256) < 8
    assert chosen(gram, few) == Cholesky(1e-3, torch.float64)
    singular, _, _ = make_layer(1, 256, tokens=40)
    assert chosen(singular, half, 1e-8) == Cholesky(1e-3, torch.float64)
    assert isinstance(chosen(gram, torch.zeros(3, 256, dtype=torch.bool)), Cholesky)


@pytest.mark.parametrize("make", [Auto, Cholesky, ConjugateGradients])
def test_settings_with_which_nothing_can_be_solved(make: type[Auto] | type[Cholesky] | type[ConjugateGradients]):
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="tolerance must be positive, but it is"):
            make(tolerance=tolerance)
    with pytest.raises(InputError, match=r"torch.float32 or torch.float64, but its dtype is torch.bfloat16"):
        make(dtype=torch.bfloat16)


def test_settings_of_some_solvers():
    for make in (Cholesky, ConjugateGradients):
        with pytest.raises(InputError, match="at least one step, but max_steps is 0"):
            make(max_steps=0)
    with pytest.raises(InputError, match='"diagonal" or "masked_inverse", not \'none\''):
        ConjugateGradients("none")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["diagonal", "masked_inverse"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-7])
def test_what_was_foreseen_a_look_before_changes_nothing_but_steps(
    monkeypatch: pytest.MonkeyPatch, name: str, tolerance: float
):
    """As on a GPU, which always has a step to do while the host reads what goes on."""
    gram, weight, mask = make_layer(23, 32, decay=1.0)
    mask[:8, 3:] = False  # rows that are finished long before the others
    solver = ConjugateGradients(name, tolerance)
    in_time = refit(gram, weight, mask, solver=solver)
    module = importlib.import_module("trimfit.refit.iteration")
    looks, made = module._Looks, list[object]()
    monkeypatch.setattr(module, "_Looks", lambda late: made.append(looks(late=True)) or made[-1])
    late = refit(gram, weight, mask, solver=solver)
    assert made and late.status is in_time.status is Status.OPTIMAL
    assert in_time.steps <= late.steps <= in_time.steps + 2 * (4 if name == "diagonal" else 1)
    reference = Reference(gram, weight, mask)
    assert (reference.gap(late.weight) <= tolerance * reference.gain).all()


def test_a_look_foresees_by_how_bounds_fall():
    """Of three programs one falls tenfold a look, one rises, one is at 0. What is foreseen is told at the next look."""
    module = importlib.import_module("trimfit.refit.iteration")
    looks, enough = module._Looks(late=True), torch.full((3,), 0.5)
    assert looks.expected(torch.tensor([100.0, 1.0, 0.0]), enough) == 3  # nothing was seen before
    assert looks.expected(torch.tensor([10.0, 2.0, 0.0]), enough) == 2  # those of the first look
    assert looks.expected(torch.tensor([4.0, 2.0, 0.0]), enough) == 2  # 10 would be 1 now
    assert looks.expected(torch.tensor([0.9, 2.0, 0.0]), enough) == 2  # 4 would be 1.6
    assert looks.rows(torch.tensor([0, 1])).expected(torch.tensor([0.9, 2.0]), enough[:2]) == 2
    assert looks.expected(torch.tensor([0.6, 2.0, 0.0]), enough) == 1  # 0.9 would be 0.2
    assert module._Looks(late=False).expected(torch.ones(3), enough) == 0


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_no_row_leaves_because_it_was_foreseen_to_be_finished(monkeypatch: pytest.MonkeyPatch, tolerance: float):
    """Else rows that were foreseen too well would count as stuck."""
    module = importlib.import_module("trimfit.refit.iteration")
    looks = module._Looks
    monkeypatch.setattr(module, "_Looks", lambda late: looks(late=True))
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(400, 96, generator=generator, dtype=torch.float64)
        inputs = inputs @ torch.randn(96, 96, generator=generator, dtype=torch.float64)
        weight = torch.randn(256, 96, generator=generator)
        mask = weight.abs() >= weight.abs().median(1, keepdim=True).values
        gram = inputs.T @ inputs / len(inputs)
        solution = refit(gram, weight, mask, damping=0.01, solver=ConjugateGradients(tolerance=tolerance))
        assert solution.status is Status.OPTIMAL
