"""Rows refitted together, against a dense float64 solve of the whole run, and as what they are for single rows."""

import importlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit import InputError
from trimfit.refit import Cholesky, ConjugateGradients, FactoredGram, Status, refit, refit_together

TIGHT = ConjugateGradients(tolerance=1e-13, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """b runs of d rows over n inputs."""

    gram: FactoredGram
    weight: Tensor
    mask: Tensor
    metric: Tensor

    @staticmethod
    def draw(seed: int, b: int = 3, d: int = 4, n: int = 10, kept: float = 0.5) -> "Case":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs, factor = normal(60, n) @ normal(n, n), normal(b, d, d)
        mask = torch.rand(b * d, n, generator=generator) < kept
        return Case(FactoredGram(inputs.T @ inputs / 60, 0.01), normal(b * d, n), mask, factor @ factor.mT)

    def program(self, run: int, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, linear term and mask of all unknowns of a run, as the docstring has them."""
        d = self.metric.shape[1]
        rows = slice(run * d, (run + 1) * d)
        metric = self.metric[run] / self.metric[run].diagonal().mean() + 0.01 * torch.eye(d, dtype=torch.float64)
        gram, pull = self.gram.raw.clone(), self.gram.damping_weight
        goal = self.weight[rows] @ gram if target is None else target[rows]
        gram.diagonal().add_(pull)
        linear = metric @ (goal + pull * self.weight[rows])
        return torch.kron(metric, gram), linear.flatten(), self.mask[rows].flatten()

    def optimum(self, run: int, target: Tensor | None = None) -> tuple[Tensor, float]:
        """The optimal rows of a run, and the objective there."""
        matrix, linear, mask = self.program(run, target)
        best = torch.zeros_like(linear)
        best[mask] = torch.linalg.solve(matrix[mask][:, mask], linear[mask])
        return best.view(-1, self.weight.shape[1]), self.objective(run, best, target)

    def objective(self, run: int, rows: Tensor, target: Tensor | None = None) -> float:
        matrix, linear, _ = self.program(run, target)
        point = rows.double().flatten()
        return (point @ matrix @ point / 2 - linear @ point).item()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_it_is_the_optimum_of_each_run(seed: int, b: int, d: int, n: int, kept: float):
    case = Case.draw(seed, b, d, n, kept)
    target = torch.randn(b * d, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for goal in (None, target):
        solution = refit_together(case.gram, case.weight, case.mask, case.metric, target=goal, solver=TIGHT)
        assert not solution.weight[~case.mask].any()
        for run in range(b):
            best, least = case.optimum(run, goal)
            found = solution.weight[run * d : (run + 1) * d]
            torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3 * (1 + best.abs().max().item()))
            excess = case.objective(run, found, goal) - least
            assert excess <= solution.certificate.gap[run] + 1e-12 * (1 + abs(least))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_the_certificate_holds_wherever_it_stops(seed: int, steps: int):
    case = Case.draw(seed)
    stopped = ConjugateGradients(tolerance=1e-12, max_steps=max(1, steps))
    start = case.weight + 0.1 * torch.randn_like(case.weight)
    solution = refit_together(case.gram, case.weight, case.mask, case.metric, start=start, solver=stopped)
    masked = case.weight * case.mask
    for run in range(3):
        rows = slice(4 * run, 4 * run + 4)
        excess = case.objective(run, solution.weight[rows]) - case.optimum(run)[1]
        gained = case.objective(run, masked[rows]) - case.objective(run, solution.weight[rows])
        assert excess <= solution.certificate.gap[run].item() * (1 + 1e-9) + 1e-12
        assert solution.certificate.gain[run].item() <= gained + 1e-9 * (1 + abs(gained))
        assert gained >= -1e-12


def test_one_row_a_run_is_a_plain_refit():
    case = Case.draw(0, b=12, d=1)
    plain = refit(case.gram, case.weight, case.mask, solver=TIGHT)
    together = refit_together(case.gram, case.weight, case.mask, case.metric, solver=TIGHT)
    torch.testing.assert_close(together.weight, plain.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_one_row_a_run_takes_the_steps_of_a_plain_refit(tolerance: float):
    """What was gained on the way counts for the tolerance, from the first step on."""
    case, solver = Case.draw(1, b=24, d=1, n=48), ConjugateGradients(tolerance=tolerance, dtype=torch.float64)
    plain = refit(case.gram, case.weight, case.mask, solver=solver)
    assert refit_together(case.gram, case.weight, case.mask, case.metric, solver=solver).steps == plain.steps


def test_finished_runs_cost_nothing_more(monkeypatch: pytest.MonkeyPatch):
    """Neither those that others outlast nor those that their start has finished."""
    case = Case.draw(7, b=6, n=24)
    best = refit_together(case.gram, case.weight, case.mask, case.metric, solver=TIGHT).weight
    start = torch.where(torch.arange(24)[:, None] < 12, best, case.weight)  # of 4 rows a run
    runs: list[int] = []
    system = importlib.import_module("trimfit.refit.together")._Runs
    own = system.multiply

    def multiply(self: object, point: Tensor) -> Tensor:
        runs.append(len(point))
        return own(self, point)

    monkeypatch.setattr(system, "multiply", multiply)
    assert refit_together(case.gram, case.weight, case.mask, case.metric, start=start).status is Status.OPTIMAL
    assert runs[0] == 3
    runs.clear()
    mixed = case.metric.clone()
    mixed[:5] = torch.eye(4, dtype=torch.float64)
    refit_together(case.gram, case.weight, case.mask, mixed, solver=TIGHT)
    assert runs[0] == 6 and runs[-1] < 6


def test_errors_that_rows_share_cancel():
    """With a metric that sees their sum alone, rows make up for each other, which no row can do alone."""
    case = Case.draw(1, b=1)
    ones = torch.ones(1, 4, 4, dtype=torch.float64)
    alone = refit(case.gram, case.weight, case.mask).weight
    together = refit_together(case.gram, case.weight, case.mask, ones).weight
    errors = [case.gram.energy((w - case.weight).sum(0, keepdim=True)).item() for w in (alone, together)]
    assert errors[1] < 0.1 * errors[0]


def test_the_size_of_a_metric_does_not_count_and_none_is_the_identity():
    case = Case.draw(2)
    first, second = (refit_together(case.gram, case.weight, case.mask, s * case.metric, solver=TIGHT) for s in (1, 1e6))
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-6, atol=1e-8)
    zero = refit_together(case.gram, case.weight, case.mask, torch.zeros_like(case.metric), solver=TIGHT)
    plain = refit(case.gram, case.weight, case.mask, solver=TIGHT)
    torch.testing.assert_close(zero.weight, plain.weight, rtol=1e-6, atol=1e-7)


def test_runs_in_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch):
    case = Case.draw(3, b=5)
    whole = refit_together(case.gram, case.weight, case.mask, case.metric, solver=TIGHT)
    # By name: as an attribute of the package, trimfit.refit is the function.
    monkeypatch.setattr(importlib.import_module("trimfit.refit.refinement"), "_CHUNK_ELEMENTS", 80)  # two runs
    parts = refit_together(case.gram, case.weight, case.mask, case.metric, solver=TIGHT)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-8)
    assert parts.certificate.gap.shape == (5,) and parts.status is Status.OPTIMAL


def test_float32_weights_meet_the_tolerance():
    case = Case.draw(4, b=4, d=8, n=48)
    solution = refit_together(case.gram, case.weight.float(), case.mask, case.metric)
    assert solution.weight.dtype == torch.float32 and solution.status is Status.OPTIMAL
    assert solution.certificate.relative.max() <= 1e-4
    few = refit_together(case.gram, case.weight.float(), case.mask, case.metric, solver=ConjugateGradients(max_steps=1))
    assert few.status is Status.STEP_LIMIT and few.steps == 1


def test_a_gram_matrix_may_be_a_tensor():
    case = Case.draw(4)
    plain = refit_together(case.gram.raw, case.weight, case.mask, case.metric)
    factored = refit_together(FactoredGram(case.gram.raw), case.weight, case.mask, case.metric)
    assert plain.damping == 0 and torch.equal(plain.weight, factored.weight)
    damped = refit_together(case.gram.raw, case.weight, case.mask, case.metric, damping=0.1)
    factored = refit_together(FactoredGram(case.gram.raw, 0.1), case.weight, case.mask, case.metric)
    assert damped.damping == 0.1 and torch.equal(damped.weight, factored.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"damping": 0.1}, "damping belongs to the FactoredGram"), ({"solver": Cholesky()}, "the solver is Cholesky")],
)
def test_options_that_would_not_count_are_refused(options: dict[str, Any], words: str):
    case = Case.draw(4)
    with pytest.raises(InputError, match=words):
        refit_together(case.gram, case.weight, case.mask, case.metric, **options)


def test_dead_inputs_get_no_weight():
    case = Case.draw(5)
    gram = case.gram.raw.clone()
    gram[3], gram[:, 3] = 0, 0
    solution = refit_together(FactoredGram(gram, 0.01), case.weight, case.mask, case.metric)
    assert not solution.weight[:, 3].any() and solution.status is Status.OPTIMAL


def test_metrics_that_do_not_fit_are_refused():
    case = Case.draw(6)
    for metric in (case.metric[:2], case.metric[..., :3], case.metric[0]):
        with pytest.raises(InputError, match=r"the metric must have shape \(runs, d, d\) with runs · d = 12 rows"):
            refit_together(case.gram, case.weight, case.mask, metric)
    negative = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    negative[1, 0, 1] = negative[1, 1, 0] = 5
    lopsided = case.metric.clone()
    lopsided[0, 0, 1] += 1
    with pytest.raises(InputError, match="the metric is not symmetric"):
        refit_together(case.gram, case.weight, case.mask, lopsided)
    hollow = torch.ones(3, 4, 4, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    for metric, count in ((negative, 1), (hollow, 3)):
        with pytest.raises(InputError, match=f"the metric of {count} of 3 runs of rows is not positive semi-definite"):
            refit_together(case.gram, case.weight, case.mask, metric)
    for bad in (float("nan"), -1.0):
        metric = case.metric.clone()
        metric[0, 0, 0] = bad
        with pytest.raises(InputError, match="the metric has NaN, infinite or negative diagonal entries"):
            refit_together(case.gram, case.weight, case.mask, metric)


def exactly(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def solved(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """By elimination, without rounding; the matrix is positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        for below in rows[i + 1 :]:
            factor = below[i] / rows[i][i]
            for j in range(i, len(below)):
                below[j] -= factor * rows[i][j]
    found = [Fraction(0)] * len(rows)
    for i in reversed(range(len(rows))):
        found[i] = (rows[i][-1] - sum((rows[i][j] * found[j] for j in range(i + 1, len(rows))), Fraction(0))) / rows[i][
            i
        ]
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_certificate_holds_without_any_rounding(seed: int):
    """Against exact arithmetic, for runs so badly conditioned that rounding counts: no slack is granted here."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d, n = 1 + seed % 3, 2 + seed % 4
    inputs = normal(n + 2, n) @ torch.diag(torch.logspace(0, -2.5 * (seed % 5), n, dtype=torch.float64)) @ normal(n, n)
    factor = normal(d, 1 + seed % d)
    metric = factor @ factor.T
    weight, mask = normal(d, n) * 10.0 ** (seed % 7 - 3), torch.rand(d, n, generator=generator) < 0.6
    gram = FactoredGram(inputs.T @ inputs / len(inputs), (0.0, 1e-8, 0.01)[seed % 3]).certifiable
    tolerance, steps = (1e-1, 1e-4, 1e-12, 1e-15)[seed % 4], (1, 5, 500)[seed % 3]
    solver = ConjugateGradients(tolerance=tolerance, max_steps=steps, dtype=torch.float64)
    solution = refit_together(gram, weight, mask, (metric / 2 + metric.T / 2)[None], solver=solver)

    h, w, found, c = (exactly(part) for part in (gram.raw, weight, solution.weight, metric / 2 + metric.T / 2))
    pull = Fraction(gram.damping) * sum(h[i][i] for i in range(n)) / n
    goal = [[sum(w[i][k] * h[k][j] for k in range(n)) + pull * w[i][j] for j in range(n)] for i in range(d)]
    mean = sum(c[i][i] for i in range(d)) / d
    c = [[c[i][k] / mean + (Fraction(0.01) if i == k else 0) for k in range(d)] for i in range(d)]
    h = [[h[j][k] + (pull if j == k else 0) for k in range(n)] for j in range(n)]
    free = [(i, j) for i in range(d) for j in range(n) if mask[i, j]]
    matrix = [[c[i][k] * h[j][m] for k, m in free] for i, j in free]
    right = [sum(c[i][k] * goal[k][j] for k in range(d)) for i, j in free]

    def objective(point: list[Fraction]) -> Fraction:
        product = [sum((a * x for a, x in zip(row, point, strict=True)), Fraction(0)) for row in matrix]
        return sum((x * (a / 2 - b) for x, a, b in zip(point, product, right, strict=True)), Fraction(0))

    reached = objective([found[i][j] for i, j in free])
    certificate = solution.certificate
    assert reached - objective(solved(matrix, right)) <= Fraction(certificate.gap.item())
    gained = objective([w[i][j] for i, j in free]) - reached
    assert Fraction(certificate.gain.item()) <= gained or certificate.gain.item() == 0
