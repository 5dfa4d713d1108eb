"""The one verb of this room."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.refit.auto import Auto
from trimfit.refit.certificate import Certificate, certify, certify_start
from trimfit.refit.gram import FactoredGram, factorise
from trimfit.refit.problem import Problem, check, make_problem
from trimfit.refit.refinement import RefitSolution, chunks, refine, solution
from trimfit.refit.solver import Solver


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
    gram = factorise(gram, damping)
    check(gram, weight, mask, target, start)
    gram = gram.certifiable
    chosen = solver or Auto()
    if isinstance(chosen, Auto):
        chosen = chosen.choose(gram, mask)
    parts = [
        refine(
            _Alone(make_problem(gram, weight[rows], mask[rows], None if target is None else target[rows])),
            weight[rows],
            None if start is None else start[rows],
            chosen,
        )
        for rows in chunks(len(weight), gram.size)
    ]
    return solution(parts, gram.damping, chosen, weight.device, began)


@dataclass(frozen=True)
class _Alone:
    """`Programs` of one row each."""

    problem: Problem
    depth: int = 1

    def certify(self, weight: Tensor | None) -> tuple[Certificate, Tensor]:
        return certify_start(self.problem) if weight is None else certify(self.problem, weight)

    def correct(self, solver: Solver, residual: Tensor, gain: Tensor, max_steps: int) -> tuple[Tensor, int]:
        return solver.correct(self.problem.gram, residual, self.problem.mask, gain, max_steps)

    def pick(self, index: Tensor) -> "_Alone":
        return _Alone(self.problem.rows(index))
