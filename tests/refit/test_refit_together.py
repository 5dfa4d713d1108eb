"""Rows refitted together, against a dense float64 solve of the whole run, and as what they are for single rows."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit import InputError
from trimfit.refit import ConjugateGradients, FactoredGram, Status, refit, refit_together

TIGHT = ConjugateGradients(tolerance=1e-9, dtype=torch.float64)


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
    monkeypatch.setattr(importlib.import_module("trimfit.refit.together"), "_CHUNK_ELEMENTS", 80)  # two runs
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
    for bad in (float("nan"), -1.0):
        metric = case.metric.clone()
        metric[0, 0, 0] = bad
        with pytest.raises(InputError, match="the metric has NaN, infinite or negative diagonal entries"):
            refit_together(case.gram, case.weight, case.mask, metric)
