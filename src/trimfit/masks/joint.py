"""Mask and weights found together: ADMM (ALPS, Meng et al. 2024, arXiv 2406.07831), then exact 1-swaps.

Everything happens in the coordinates v = w / scale, where the damped Gram matrix has a unit diagonal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.masks import sparsegpt
from trimfit.masks.patterns import NM, Pattern, Scope, keep_best, prune_counts
from trimfit.masks.selection import Selection, usable_weight
from trimfit.masks.swaps import row_errors, swap
from trimfit.refit.auto import Auto
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "layer"
MAX_STEPS = 300
_FIRST_RHO = 0.1
_STEPS_PER_RHO = 3
_RHO_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (share of the support that changed, at least; factor)
_SETTLED = 1e-3  # share of the support; ALPS goes on to 0, measured: a third more time for 0.05 % of the layer error
_TOLERANCE = 1e-4  # of the fits on a mask: the relative gap that is aimed at
_CHUNK_ELEMENTS = 2**25  # of the rows fitted together, to bound memory


@dataclass(frozen=True)
class Stage:
    """A mask (m, n) bool with its weights (m, n) in unit-diagonal coordinates, zero off the mask.

    `name` is "sparsegpt", "fitted", "admm" or "swaps".
    """

    name: str
    mask: Tensor
    weight: Tensor


@torch.no_grad()
def select(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Selection:
    """ADMM over weights and mask, then exact 1-swaps; never worse than SparseGPT's mask, both with optimal weights.

    `weight` is (out, in), any floating dtype; weights of dead inputs count, and come back, as 0. The weights returned
    are the optimum on the mask, up to a small gap that is not certified. Deterministic.

    Raises `InputError` for shapes that do not fit and for NaN or infinite weights.
    """
    given = torch.where(gram.dead, 0, usable_weight(weight, gram, pattern))
    mask = keep_best(torch.zeros_like(given), pattern)
    if mask.all():
        return Selection(mask, given)
    scale = gram.certifiable.scale
    dense = given.to(scale.device).to(scale.dtype)
    updated = dense
    for stage in stages(given, gram, pattern):
        # As a change of the dense weights: those that nothing can improve stay as they are, to the last bit.
        mask, updated = stage.mask, dense + (stage.weight - dense / scale) * scale
    return Selection(mask.to(given.device), torch.where(mask, updated, 0).to(given.dtype).to(given.device))


def stages(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Iterator[Stage]:
    """What `select` goes through, in order; the layer error of a stage is never above that of the stage before.

    `weight` is (m, n) float32 or float64, zero for dead inputs.
    """
    start = sparsegpt.select(weight, gram, pattern)
    assert start.weight is not None
    gram = gram.certifiable
    dense, own = (part.to(gram.raw.device).to(gram.raw.dtype) / gram.scale for part in (weight, start.weight))
    mask = start.mask.to(dense.device)
    yield Stage("sparsegpt", mask, own)
    best = _better(dense, gram, (mask, own), (mask, fit(dense, mask, gram)), by_row=True)
    yield Stage("fitted", *best)
    mask = admm_mask(dense.to(weight.dtype), gram.matrix.to(weight.dtype), pattern)
    # Rows of two masks cannot be mixed where only their total is given.
    by_row = isinstance(pattern, NM) or pattern.scope == "row"
    mask, fitted = _better(dense, gram, best, (mask, fit(dense, mask, gram)), by_row=by_row)
    yield Stage("admm", mask, fitted)
    yield Stage("swaps", *swap(dense, fitted, mask, gram, pattern))


def admm_mask(dense: Tensor, matrix: Tensor, pattern: Pattern, max_steps: int = MAX_STEPS) -> Tensor:
    """The mask (m, n) on which ADMM for ½‖X(D − Ŵ)ᵀ‖² settles, with D of the pattern (ALPS, Alg. 1).

    With the dual V, a step is: W = (ŴH − V + ρD)(H + ρI)⁻¹; D = the best of S = W + V/ρ; V = V + ρ(W − D) = ρ(S − D).
    So S and the mask are all its state: D is S where kept, V is ρS where pruned. ρ grows, the slower the fewer
    entries of the support change; the steps end when none does.

    `dense` Ŵ is (m, n) and `matrix` H (n, n) with a unit diagonal, both of one dtype.
    """
    goal = dense @ matrix
    split, mask = dense, project(dense.abs(), pattern)  # the first step, from D = Ŵ and V = 0
    rho = dual_rho = _FIRST_RHO
    inverse = _shifted_inverse(matrix, rho)
    size, before = max(1, int(mask.sum())), mask
    for step in range(2, max_steps + 1):
        kept = split * mask  # D; products, since a choice for each entry takes ten times as long
        dual = (split - kept).mul_(dual_rho / rho)  # V / ρ
        split = torch.addmm(dual, torch.add(goal, kept - dual, alpha=rho), inverse)
        mask = project(split.abs(), pattern)
        dual_rho = rho
        if step % _STEPS_PER_RHO == 0:
            changed = int((mask & ~before).sum()) / size
            if changed <= _SETTLED:
                break
            before = mask
            rho *= next(factor for share, factor in _RHO_GROWTH if changed >= share)
            inverse = _shifted_inverse(matrix, rho)
    return mask


def project(scores: Tensor, pattern: Pattern) -> Tensor:
    """`keep_best` without a sort where no scores are tied at the border. `scores` are (m, n), not negative."""
    if isinstance(pattern, NM):
        counts = torch.tensor([pattern.m - pattern.n], device=scores.device)
        runs = scores.reshape(-1, pattern.m)
    else:
        counts = prune_counts(pattern, (scores.shape[0], scores.shape[1])).to(scores.device)
        runs = scores.reshape(len(counts), -1)
    lowest, highest = int(counts.min()), int(counts.max())  # they differ by one at most
    if lowest == 0:
        return keep_best(scores, pattern)
    border = _kth_lowest(runs, lowest)
    if highest > lowest:
        border = torch.where(counts == highest, _kth_lowest(runs, highest), border)
    mask = runs > border[:, None]
    if ((~mask).sum(1) == counts).all():
        return mask.view(scores.shape)
    return keep_best(scores, pattern)


def _kth_lowest(runs: Tensor, k: int) -> Tensor:
    """The k-th lowest value of each row of (m, n), k from 1."""
    if runs.device.type == "cpu":
        return runs.kthvalue(k, dim=1).values
    return runs.sort(dim=1).values[:, k - 1]  # there kthvalue goes through each row, here a layer, with one block


def fit(dense: Tensor, mask: Tensor, gram: FactoredGram) -> Tensor:
    """(m, n) optimal weights on `mask` (m, n), as `refit` finds them, without its certificate."""
    solver = Auto(_TOLERANCE).choose(gram, mask)
    fitted = dense * mask
    for rows in torch.arange(len(dense), device=dense.device).split(max(1, _CHUNK_ELEMENTS // gram.size)):
        residual = ((dense[rows] - fitted[rows]) @ gram.matrix) * mask[rows]
        unit = residual.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        gain = torch.zeros_like(unit[:, 0])
        correction, _ = solver.correct(gram, residual / unit, mask[rows], gain, solver.max_steps)
        fitted[rows] += correction * unit
    return fitted


def _shifted_inverse(matrix: Tensor, shift: float) -> Tensor:
    """(H + ρI)⁻¹. A Cholesky factor for each ρ: an eigendecomposition for all of them takes longer when n is large."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _better(
    dense: Tensor, gram: FactoredGram, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Of two (mask, weights) that with the lower error, for each row or for all together; the first of equals."""
    errors = [row_errors(change, change @ gram.matrix) for change in (dense - first[1], dense - second[1])]
    if not by_row:
        errors = [error.sum().expand(len(dense)) for error in errors]
    choice = (errors[1] < errors[0])[:, None]
    return torch.where(choice, second[0], first[0]), torch.where(choice, second[1], first[1])
