"""Mask and weights found together: ADMM (ALPS, Meng et al. 2024, arXiv 2406.07831), then exact 1-swaps.

Everything happens in the coordinates v = w / scale, where the damped Gram matrix has a unit diagonal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.masks.borders import Borders
from trimfit.masks.patterns import Pattern, Scope, run_counts
from trimfit.masks.selection import Selection, usable_weight
from trimfit.masks.swaps import row_errors, swap
from trimfit.precision import Factor
from trimfit.refit.conjugate_gradients import ConjugateGradients
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "layer"
MAX_STEPS = 300
# Measured (docs/benchmarks.md): a first ρ well below the curvature of H finds masks with up to 15 % less error than the
# 0.1 of ALPS where H is badly conditioned; more steps for each ρ then cost less than the inverses of a slower growth.
_FIRST_RHO = (0.003, 0.1)  # least: what float32 still factorises; most: as ALPS
_FIRST_RHO_SHARE = 0.3  # of the harmonic mean of H's eigenvalues
_STEPS_PER_RHO = 5
_RHO_GROWTH = 1.3
_SETTLED = 1e-3  # share of the support that changed while ρ stayed; ALPS goes on to 0
_SWAPS_BELOW = 0.3  # harmonic mean of the eigenvalues: above, swaps gain less than 0.5 % in wide layers
_SWAPS_UP_TO = 256  # inputs: there they are cheap, and gain 1 % whatever the matrix is
SWAP_WORK = 60.0  # flops that swaps may take, in units of m·n²: half of what ADMM takes, as a rule
_TOLERANCE = 1e-3  # of the fit: how far above its optimum the error of a row may be, as a share of that of ADMM's D
_CHUNK_ELEMENTS = 2**25  # of the rows fitted together, to bound memory


@dataclass(frozen=True)
class Stage:
    """A mask (m, n) bool with its weights (m, n) in unit-diagonal coordinates, zero off the mask.

    `name` is "admm", "fitted" or "swaps".
    """

    name: str
    mask: Tensor
    weight: Tensor


@torch.no_grad()
def select(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Selection:
    """ADMM over weights and mask, the optimal weights on that mask, and exact 1-swaps where they promise much.

    Swaps take about half as long as ADMM at most: in wide layers the rows with the largest errors get them.

    `weight` is (out, in), any floating dtype; weights of dead inputs count, and come back, as 0. The weights returned
    are the optimum on the mask, up to a small gap that is not certified. Deterministic.

    Raises `InputError` for shapes that do not fit and for NaN or infinite weights.
    """
    given = torch.where(gram.dead, 0, usable_weight(weight, gram, pattern))
    mask = torch.ones_like(given, dtype=torch.bool)
    if not run_counts(pattern, (len(given), gram.size)).any():
        return Selection(mask, given)
    scale = gram.certifiable.scale
    dense = given.to(scale.device).to(scale.dtype)
    updated = dense
    for stage in stages(given, gram, pattern):
        # As a change of the dense weights: those that nothing can improve stay as they are, to the last bit.
        mask, updated = stage.mask, dense + (stage.weight - dense / scale) * scale
    return Selection(mask.to(given.device), torch.where(mask, updated, 0).to(given.dtype).to(given.device))


def stages(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Iterator[Stage]:
    """What `select` goes through, in order; the damped error of a stage is never above that of the stage before.

    `weight` is (m, n) float32 or float64, zero for dead inputs.
    """
    gram = gram.certifiable
    dense = weight.to(gram.raw.device).to(gram.raw.dtype) / gram.scale
    curvature = gram.size / gram.inverse.diagonal().sum().item()  # 1 for uncorrelated inputs, near 0 at worst
    first_rho = min(max(_FIRST_RHO_SHARE * curvature, _FIRST_RHO[0]), _FIRST_RHO[1])
    mask, split = admm(dense.to(weight.dtype), gram.matrix.to(weight.dtype), pattern, first_rho)
    split = split.to(dense.dtype)
    yield Stage("admm", mask, split)
    fitted = fit(dense, split, mask, gram)
    yield Stage("fitted", mask, fitted)
    if curvature < _SWAPS_BELOW or gram.size <= _SWAPS_UP_TO:
        budget = SWAP_WORK * len(dense) * gram.size**2
        yield Stage("swaps", *swap(dense, fitted, mask, gram, pattern, budget=budget))


def admm(
    dense: Tensor, matrix: Tensor, pattern: Pattern, first_rho: float, max_steps: int = MAX_STEPS
) -> tuple[Tensor, Tensor]:
    """(mask, D), both (m, n), on which ADMM for ½‖X(D − Ŵ)ᵀ‖² settles, with D of the pattern (ALPS, Alg. 1).

    With the dual V, a step is: W = (ŴH − V + ρD)(H + ρI)⁻¹; D = the best of S = W + V/ρ; V = V + ρ(W − D) = ρ(S − D).
    So S and the mask are all its state: D is S where kept, V is ρS where pruned. ρ grows until hardly an entry of the
    support changes.

    `dense` Ŵ is (m, n) and `matrix` H (n, n) with a unit diagonal, both of one dtype.
    """
    goal, borders = dense @ matrix, Borders(run_counts(pattern, (len(dense), len(matrix))), dense.device)
    split, mask = dense, borders.prune_lowest(dense.abs())  # the first step, from D = Ŵ and V = 0
    rho = dual_rho = first_rho
    inverse = Factor(_shifted_inverse(matrix, rho))
    size, before = max(1, int(mask.sum())), mask
    for step in range(2, max_steps + 1):
        kept = split * mask  # D; products, since a choice for each entry takes ten times as long
        dual = (split - kept).mul_(dual_rho / rho)  # V / ρ
        split = inverse.add_product(dual, torch.add(goal, kept - dual, alpha=rho))
        mask = borders.prune_lowest(split.abs())
        dual_rho = rho
        if step % _STEPS_PER_RHO == 0:
            if int((mask & ~before).sum()) <= _SETTLED * size:
                break
            before = mask
            rho *= _RHO_GROWTH
            inverse = Factor(_shifted_inverse(matrix, rho))
    return mask, split * mask


def fit(dense: Tensor, start: Tensor, mask: Tensor, gram: FactoredGram) -> Tensor:
    """(m, n) optimal weights on `mask` (m, n), to 1e-3 of the error of `start` (m, n), which should be close.

    A row begins from the masked `dense` (m, n) where that is no worse, and stays where it would not become better.
    """
    solver = ConjugateGradients("masked_inverse", _TOLERANCE)
    fitted = torch.empty_like(start)
    for rows in torch.arange(len(dense), device=dense.device).split(max(1, _CHUNK_ELEMENTS // gram.size)):
        goal, keep = dense[rows], mask[rows]
        begin, before, product = _better(goal, start[rows], goal * keep, gram)
        residual = product * keep
        unit = residual.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        # The solver's tolerance is put relative to the error, not to a gain: it is what should come close.
        scale = before / unit[:, 0] / unit[:, 0]
        correction, _ = solver.correct(gram, residual / unit, keep, scale, solver.max_steps)
        fitted[rows], _, _ = _better(goal, begin + correction * unit, begin, gram)
    return fitted


def _better(dense: Tensor, first: Tensor, second: Tensor, gram: FactoredGram) -> tuple[Tensor, Tensor, Tensor]:
    """Of two weights (m, n) that with the lower error in each row, the second of equals; its error (m,); (Ŵ − W)H."""
    products = [(dense - weight) @ gram.matrix for weight in (first, second)]
    errors = [row_errors(dense - weight, product) for weight, product in zip((first, second), products, strict=True)]
    choice = errors[0] < errors[1]
    weight, product = (torch.where(choice[:, None], *pair) for pair in ((first, second), products))
    return weight, torch.minimum(*errors), product


def _shifted_inverse(matrix: Tensor, shift: float) -> Tensor:
    """(H + ρI)⁻¹. A Cholesky factor for each ρ: an eigendecomposition for all of them takes longer when n is large."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
