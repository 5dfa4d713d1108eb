"""Thanos: prunes a block of columns at a time, all weights of a row together (Ilin & Richtárik, arXiv 2504.05346)."""

import torch
from torch import Tensor

from trimfit.masks.patterns import NM, Pattern, Scope, keep_best, prune_counts, prune_lowest
from trimfit.masks.selection import Selection, usable_weight
from trimfit.masks.sweep import BLOCK, column_blocks
from trimfit.masks.wanda import wanda_scores
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "layer"
_BATCH_ELEMENTS = 2**24  # of the small systems held at once
_BATCH_ELEMENTS_CPU = 2**20  # about what its caches hold: measured twice as fast


def select(weight: Tensor, gram: FactoredGram, pattern: Pattern, *, block: int = BLOCK) -> Selection:
    """Prunes `block` columns at a time, and lets all columns from the block's first on make up for it.

    In each block those weights go that are in the residual mask: the lowest |W_ij|·‖X_j‖ among all columns that remain,
    with the weights as updated so far, and as many as are still to prune. N:M patterns choose in every group of the
    block, in all rows. Each row then gets the update that is optimal for removing its weights of the block together.

    `weight` is (out, in), any floating dtype; weights of dead inputs count, and come back, as 0. Raises `InputError`
    for shapes that do not fit and for NaN or infinite weights.
    """
    given = usable_weight(weight, gram, pattern)
    current = torch.where(gram.dead, 0, given)
    factor = gram.inverse_factor
    mask = torch.empty_like(current, dtype=torch.bool)
    to_prune = None if isinstance(pattern, NM) else prune_counts(pattern, (len(current), gram.size)).to(current.device)
    for start, stop in column_blocks(gram.size, block, pattern):
        scores = wanda_scores(current, gram)[:, start:]
        if to_prune is None:
            kept = keep_best(scores[:, : stop - start], pattern)
        else:
            kept = prune_lowest(scores, to_prune)[:, : stop - start]
            to_prune = to_prune - (~kept).reshape(len(to_prune), -1).sum(1)
        mask[:, start:stop] = kept
        current[:, start:] -= _update(current[:, start:stop], ~kept, factor[start:stop, start:])
        current[:, start:stop].masked_fill_(~kept, 0)  # what rounding left
    return Selection(mask, current)


def _update(weight: Tensor, pruned: Tensor, factor: Tensor) -> Tensor:
    """What to subtract from the trailing columns: u R̂⁻¹ R for each row.

    `weight` and `pruned` are (out, block); `factor` is (block, trailing), the block's rows of U. With C the pruned
    columns of U's corner, the rows of the trailing inverse are R = Cᵀ U, and R̂ = Cᵀ C. The update is
    (C R̂⁻¹ u)ᵀ U: a small system for each row, then one GEMM for all rows.
    """
    corner = factor[:, : pruned.shape[1]]
    multipliers = _solve(corner.T @ corner, weight.to(factor.dtype), pruned)
    return (multipliers @ corner.T).to(weight.dtype) @ factor.to(weight.dtype)


def _solve(matrix: Tensor, weight: Tensor, pruned: Tensor) -> Tensor:
    """(out, block) solutions z of R̂ z = u at the pruned weights, zero elsewhere; R̂ is a submatrix of `matrix`."""
    counts = pruned.sum(1)
    largest = int(counts.max())
    # Pruned columns first; rows with fewer are padded by kept columns, whose equations are made z = 0.
    columns = pruned.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :largest]
    real = torch.arange(largest, device=pruned.device) < counts[:, None]
    values = torch.where(real, weight.gather(1, columns), 0)
    identity = torch.eye(largest, dtype=matrix.dtype, device=matrix.device)
    solution = torch.zeros_like(weight)
    elements = _BATCH_ELEMENTS_CPU if weight.device.type == "cpu" else _BATCH_ELEMENTS
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, elements // max(1, largest**2))):
        index, is_real = columns[rows], real[rows]
        systems = matrix[index[:, :, None], index[:, None, :]]
        systems = torch.where(is_real[:, :, None] & is_real[:, None, :], systems, identity)
        solved = torch.cholesky_solve(values[rows, :, None], torch.linalg.cholesky(systems))[:, :, 0]
        solution[rows] = solution[rows].scatter(1, index, solved)
    return solution
