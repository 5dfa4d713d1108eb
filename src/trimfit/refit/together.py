"""Rows that count together, such as those of an attention head: one quadratic program for all rows of a run.

For each run of d rows W with kept set S, and a metric C (d, d) of what errors in their outputs cost, positive definite:

    minimise  ½ tr(C W H Wᵀ) − tr(C G Wᵀ)  subject to  W = 0 off S.

The matrix of its d·n unknowns is C ⊗ H, and with the residual R = (C (G − W H))_S the proof of docs/method.md gives
f(W) − f* ≤ ½ tr(C⁻¹ R H⁻¹ Rᵀ). With C = I these are the programs of `refit`, row by row.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.precision import Factor, tensor_float32
from trimfit.refit.certificate import SMALLEST_GAIN, Certificate, rounding_of_gradient
from trimfit.refit.conjugate_gradients import ConjugateGradients
from trimfit.refit.gram import FactoredGram, factorise
from trimfit.refit.iteration import iterate
from trimfit.refit.problem import Problem, check, make_problem, unit_rounding
from trimfit.refit.refinement import RefitSolution, chunks, program_rows, refine, solution
from trimfit.refit.solver import Solver, working_dtype

_DAMPING = 0.01  # of the mean diagonal of C: draws that it is the mean of are few in some directions


@torch.no_grad()
def refit_together(
    gram: Tensor | FactoredGram,
    weight: Tensor,
    mask: Tensor,
    metric: Tensor,
    *,
    target: Tensor | None = None,
    start: Tensor | None = None,
    damping: float | None = None,
    solver: Solver | None = None,
) -> RefitSolution:
    """Optimal weights for a given mask where errors of d rows count together.

    **Arguments**

    - `metric`: (b, d, d) C of each of b = m / d runs of consecutive rows, symmetric, positive semi-definite. Only its
      shape counts, not its size; 0.01 of its mean diagonal is added to the diagonal. A run of zeros counts as C = I.
    - `gram`, `weight` (m, n), `mask`, `target`, `start`, `damping`: as for `refit`.
    - `solver`: `ConjugateGradients`, of which tolerance and step limit count: always preconditioned with C⁻¹ ⊗ H⁻¹.

    **Returns** a `RefitSolution` whose certificate is of the b runs, never worse than the masked weights.

    Raises `InputError` for shapes that do not fit and for NaN or infinite entries.
    """
    began = time.perf_counter()
    solver = solver or ConjugateGradients()
    if not isinstance(solver, ConjugateGradients):
        raise InputError(f"rows together are refitted by ConjugateGradients, but the solver is {solver!r}")
    gram = factorise(gram, damping)
    check(gram, weight, mask, target, start)
    _check_metric(metric, weight)
    gram, depth = gram.certifiable, metric.shape[1]
    parts = [
        refine(
            _Together.of(
                make_problem(gram, weight[rows], mask[rows], None if target is None else target[rows]),
                metric[rows.start // depth : rows.stop // depth],
            ),
            weight[rows],
            None if start is None else start[rows],
            solver,
        )
        for rows in chunks(len(weight), gram.size, depth)
    ]
    return solution(parts, gram.damping, solver, weight.device, began)


@dataclass(frozen=True)
class _Together:
    """`Programs` of b runs of d rows, in unit-diagonal coordinates.

    - `problem`: of the rows, as if each counted alone.
    - `metric`, `factor`, `inverse`: (b, d, d) damped C, its lower Cholesky factor, and C⁻¹.
    """

    problem: Problem
    metric: Tensor
    factor: Tensor
    inverse: Tensor

    @staticmethod
    def of(problem: Problem, metric: Tensor) -> "_Together":
        """Raises `InputError` for a metric that is not positive semi-definite."""
        metric = _damped(metric.to(problem.linear.device).to(problem.linear.dtype))
        factor, info = torch.linalg.cholesky_ex(metric)
        if failed := int((info > 0).sum()):
            raise InputError(
                f"the metric of {failed} of {len(metric)} runs of rows is not positive semi-definite, so it is no mean "
                "of squares: check how it was accumulated"
            )
        return _Together(problem, metric, factor, torch.cholesky_inverse(factor))

    @property
    def depth(self) -> int:
        return self.metric.shape[1]

    def pick(self, index: Tensor) -> "_Together":
        problem = self.problem.rows(program_rows(index, self.depth))
        return _Together(problem, self.metric[index], self.factor[index], self.inverse[index])

    def by_run(self, rows: Tensor) -> Tensor:
        """Rows (m, n) as (b, d, n)."""
        return rows.view(*self.metric.shape[:2], -1)

    def certify(self, weight: Tensor | None) -> tuple[Certificate, Tensor]:
        problem, gram = self.problem, self.problem.gram
        point, plain = problem.start, problem.start_gradient
        if weight is not None:
            point = weight.to(problem.linear.dtype) / gram.scale
            plain = problem.linear - point @ gram.matrix
        gradient = self.metric @ self.by_run(plain)
        mask = self.by_run(problem.mask)
        residual = gradient * mask
        norm, inverse_norm = (_norm(matrix) for matrix in (self.metric, self.inverse))
        lost = self._lost(point, plain, norm)
        half = torch.linalg.solve_triangular(gram.cholesky, residual.flatten(0, 1).T, upper=False).T
        whitened = _norm(torch.linalg.solve_triangular(self.factor, self.by_run(half), upper=False))
        # As for one row: ‖δ‖ in the norm of (C ⊗ H)⁻¹ is at most ‖δ‖₂·√(‖C⁻¹‖‖H⁻¹‖).
        size, unit = self.metric.shape[1], unit_rounding(point)
        slack = 2 * (size + 8) * self.metric.diagonal(dim1=1, dim2=2).sum(1) * unit * inverse_norm
        bound = whitened + lost * (inverse_norm * gram.inverse_norm).sqrt()
        gap = bound.square() / (2 * (1 - gram.slack) * (1 - slack))
        gap = torch.where(mask.flatten(1).any(1), gap, 0.0)
        point = self.by_run(point)
        linear = self.metric @ self.by_run(problem.linear)
        change = point - self.by_run(problem.start)
        slope = gradient + self.metric @ self.by_run(problem.start_gradient)
        lost = lost + self._lost(problem.start, problem.start_gradient, norm)
        lost = lost + (slope[0].numel() + 8) * unit * _norm(slope)
        gain = (_dot(change, slope) - _norm(change) * lost) / 2
        objective = -_dot(point, gradient + linear) / 2
        single = (linear.square() / self.metric.diagonal(dim1=1, dim2=2)[..., None]).flatten(1).amax(1) / 2
        floor = SMALLEST_GAIN * torch.maximum(objective.abs(), single)
        return Certificate(gap, gain, torch.maximum(gain, floor)), residual.flatten(0, 1)

    def correct(self, solver: Solver, residual: Tensor, gain: Tensor, max_steps: int) -> tuple[Tensor, int]:
        """By conjugate gradients, preconditioned with C⁻¹ ⊗ H⁻¹ on the mask."""
        gram = self.problem.gram
        dtype = working_dtype(gram, solver.dtype)
        matrix, inverse = Factor(gram.matrix.to(dtype)), Factor(gram.inverse.to(dtype))
        system = _Runs(matrix, inverse, self.metric.to(dtype), self.inverse.to(dtype))
        with tensor_float32(residual.device, allowed=False):
            correction, steps = iterate(
                system,
                self.by_run(residual),
                self.by_run(self.problem.mask).to(dtype),
                gain,
                tolerance=solver.tolerance,
                max_steps=max_steps,
            )
        return correction.flatten(0, 1), steps

    def _lost(self, point: Tensor, plain: Tensor, norm: Tensor) -> Tensor:
        """(b,) bound on the 2-norm of the rounding error in C·`plain`, the gradient at `point`."""
        rows = rounding_of_gradient(self.problem, point).view(self.metric.shape[:2])
        product = (self.metric.shape[1] + 8) * unit_rounding(point) * _norm(self.by_run(plain))
        return norm * (rows.norm(dim=1) + product)


@dataclass(frozen=True)
class _Runs:
    """A `System` of runs (b, d, n): C ⊗ H and its inverse, whose product with the residual is the bound."""

    matrix: Factor
    inverse: Factor
    metric: Tensor
    metric_inverse: Tensor

    def multiply(self, point: Tensor) -> Tensor:
        return self.metric @ _by_rows(self.matrix, point)

    def precondition(self, residual: Tensor) -> Tensor:
        return self.metric_inverse @ _by_rows(self.inverse, residual)

    def bound(self, residual: Tensor, product: Tensor) -> Tensor:
        return product / 2

    def rows(self, index: Tensor) -> "_Runs":
        return _Runs(self.matrix, self.inverse, self.metric[index], self.metric_inverse[index])


def _by_rows(matrix: Factor, runs: Tensor) -> Tensor:
    """The product of each row of runs (b, d, n)."""
    return matrix.product(runs.flatten(0, 1)).view_as(runs)


def _damped(metric: Tensor) -> Tensor:
    """With mean diagonal 1 and some damping; the identity where it was 0."""
    identity = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
    largest = metric.flatten(1).abs().amax(1)[:, None, None]
    metric = torch.where(largest > 0, metric / largest, identity)  # sums of very large entries would overflow
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # 0 with entries beside it is refused behind this
    return torch.where(mean > 0, (metric + metric.mT) / (2 * mean), -identity) + _DAMPING * identity


def _check_metric(metric: Tensor, weight: Tensor) -> None:
    if metric.dim() != 3 or metric.shape[1] != metric.shape[2] or metric.shape[0] * metric.shape[1] != len(weight):
        raise InputError(
            f"the metric must have shape (runs, d, d) with runs · d = {len(weight)} rows, but its shape is "
            f"{tuple(metric.shape)}"
        )
    if not torch.isfinite(metric).all() or (metric.diagonal(dim1=1, dim2=2) < 0).any():
        raise InputError("the metric has NaN, infinite or negative diagonal entries: it is no mean of squares")
    if (metric - metric.mT).abs().max() > 1e-3 * metric.abs().max():
        raise InputError("the metric is not symmetric, so it is no mean of squares")


def _norm(runs: Tensor) -> Tensor:
    """(b,) Frobenius norms."""
    return runs.flatten(1).norm(dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(b,) products of the runs."""
    return (a * b).flatten(1).sum(1)
