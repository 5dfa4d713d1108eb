"""The one verb of this room."""

import time
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.refit.auto import Auto
from trimfit.refit.certificate import Certificate, certify, certify_start
from trimfit.refit.gram import FactoredGram
from trimfit.refit.problem import Problem, check, make_problem
from trimfit.refit.solver import Solver

_CHUNK_ELEMENTS = 2**25  # of the rows solved together, to bound memory: 256 MiB for each float64 tensor


class Status(Enum):
    """How a refit ended."""

    OPTIMAL = "optimal"
    STEP_LIMIT = "tolerance not reached within the step limit"
    PRECISION_LIMIT = "tolerance not reachable in this precision"


@dataclass(frozen=True)
class RefitSolution:
    """Refitted weights and what is known of them.

    - `weight`: (m, n), float64 if the given weight was, else float32; exactly zero off the mask and for dead inputs.
    - `certificate`: proven bounds for each row and for the layer, of this very `weight`.
    - `status`: the worst of all rows.
    - `steps`: most solver steps that any row needed.
    - `damping`: the λ used; above the λ asked for when the Gram matrix could not be factorised.
    - `solver`: the solver used.
    - `seconds`: wall time.
    """

    weight: Tensor
    certificate: Certificate
    status: Status
    steps: int
    damping: float
    solver: Solver
    seconds: float


@torch.no_grad()
def refit(
    gram: Tensor | FactoredGram,
    weight: Tensor,
    mask: Tensor,
    *,
    target: Tensor | None = None,
    start: Tensor | None = None,
    damping: float | None = None,
    solver: Solver | Auto | None = None,
) -> RefitSolution:
    """Optimal weights for a given mask: every row the minimum of its quadratic program (arXiv 2512.13886).

    minimise ½ wᵀ H w − g_rᵀ w  subject to  w_j = 0 where the mask is False, for each row r.

    **Arguments**

    - `gram`: H = XᵀX / T of shape (n, n), or a `FactoredGram`, which layers with the same input share.
    - `weight`: (m, n) dense weights, as in y = W x.
    - `mask`: (m, n) bool, True = kept.
    - `target`: (m, n) the linear term G. None is G = W H: reproduce the dense layer on the same inputs.
    - `start`: (m, n) weights to begin from, such as a selector's own; entries off the mask do not count. A row begins
    from the masked weights where those are better. Certificates mean the same with and without it.
    - `damping`: λ ≥ 0 in H + λ·mean(diag H)·I, which pulls towards `weight`; 0 by default. Raised, and the reason
      logged, when the matrix cannot be factorised. Not to be given with a `FactoredGram`, which has its own.
    - `solver`: `Auto()`, `Cholesky()` or `ConjugateGradients()`, with the tolerance on the relative gap.

    **Returns**

    A `RefitSolution`. Its weights are never worse than the masked weights. Inputs that were zero on every token
    get weight 0.

    Raises `InputError` for shapes that do not fit and for NaN or infinite entries.
    """
    began = time.perf_counter()
    if not isinstance(gram, FactoredGram):
        gram = FactoredGram(gram, damping or 0.0)
    elif damping is not None:
        raise InputError("damping belongs to the FactoredGram when one is given: leave it out here")
    check(gram, weight, mask, target)
    if start is not None:
        check_start(start, weight)
    gram = gram.certifiable
    chosen = solver or Auto()
    if isinstance(chosen, Auto):
        chosen = chosen.choose(gram, mask)
    size = max(1, _CHUNK_ELEMENTS // gram.size)
    targets, starts = ([None] * len(weight) if what is None else list(what.split(size)) for what in (target, start))
    parts = [
        _solve(make_problem(gram, dense, kept, goal), dense, first, chosen)
        for dense, kept, goal, first in zip(weight.split(size), mask.split(size), targets, starts, strict=False)
    ]
    return RefitSolution(
        weight=torch.cat([part.weight for part in parts]).to(weight.device),
        certificate=Certificate.concatenate([part.certificate for part in parts]),
        status=max((part.status for part in parts), key=list(Status).index),
        steps=max(part.steps for part in parts),
        damping=gram.damping,
        solver=chosen,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Part:
    weight: Tensor
    certificate: Certificate
    status: Status
    steps: int


def _solve(problem: Problem, dense: Tensor, start: Tensor | None, solver: Solver) -> _Part:
    """Corrects what the exact residual shows until every row is certified: iterative refinement.

    Weights are held in the dtype in which they are returned, so that certificates are of these very weights.
    """
    dtype = torch.promote_types(dense.dtype, torch.float32)
    weight = torch.where(problem.mask, dense.to(problem.mask.device), 0).to(dtype)
    certificate, residual = certify_start(problem)
    if start is not None:
        candidate = torch.where(problem.mask, start.to(weight.device), 0).to(dtype)
        after, new_residual = certify(problem, candidate)
        rows = (torch.isfinite(after.gap) & (after.gain > 0)).nonzero()[:, 0]
        weight[rows], residual[rows] = candidate[rows], new_residual[rows]
        certificate = certificate.replace(rows, after.rows(rows))
    steps, status = 0, Status.OPTIMAL
    unfinished = (~(certificate.relative <= solver.tolerance)).nonzero()[:, 0]
    while len(unfinished):
        if steps >= solver.max_steps:
            status = max(status, Status.STEP_LIMIT, key=list(Status).index)
            break
        part, before = problem.rows(unfinished), certificate.rows(unfinished)
        correction, taken = _correct(part, residual[unfinished], before.scale, solver, solver.max_steps - steps)
        steps += taken
        candidate = (weight[unfinished] + correction).to(dtype)
        after, new_residual = certify(part, candidate)
        better = torch.isfinite(after.gap) & (
            (after.gain > before.gain) | ((after.gap < before.gap) & (after.gain >= 0))
        )
        rows = unfinished[better]
        weight[rows], residual[rows] = candidate[better], new_residual[better]
        certificate = certificate.replace(rows, after.rows(better))
        finished = better & (after.relative <= solver.tolerance)
        # A solver that stopped by itself has done what its precision allows; one that hit the limit could go on.
        stuck = ~finished & ~(after.gap <= before.gap / 2) & (steps < solver.max_steps)
        if stuck.any():
            status = Status.PRECISION_LIMIT
        unfinished = unfinished[~finished & ~stuck]
    return _Part(weight, certificate, status, steps)


def _correct(problem: Problem, residual: Tensor, gain: Tensor, solver: Solver, max_steps: int) -> tuple[Tensor, int]:
    """The solver's correction (m, n) of the weights, and the steps it took."""
    unit = residual.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)  # so that no row overflows or vanishes in the solver's dtype
    with torch.autocast(residual.device.type, enabled=False):  # never half precision inside the solve
        correction, taken = solver.correct(
            problem.gram, residual / unit, problem.mask, gain / unit[:, 0] / unit[:, 0], max_steps
        )
    return correction * unit * problem.gram.scale, taken


def check_start(start: Tensor, weight: Tensor) -> None:
    """Raises `InputError` where `start` could not stand in for `weight`."""
    if start.shape != weight.shape or not start.is_floating_point() or start.device != weight.device:
        raise InputError(
            f"the start must be floating, of shape {tuple(weight.shape)} and on {weight.device} as the weight is, but "
            f"it is {start.dtype} of shape {tuple(start.shape)} on {start.device}"
        )
    if not torch.isfinite(start).all():
        raise InputError("the start has NaN or infinite entries: leave it out, or mend the selector that made it")
