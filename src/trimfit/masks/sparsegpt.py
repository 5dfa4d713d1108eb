"""SparseGPT: an optimal brain surgeon that prunes column by column (Frantar & Alistarh 2023, arXiv 2301.00774)."""

import torch
from torch import Tensor

from trimfit.masks.patterns import NM, Pattern, Scope, keep_best, prune_counts, prune_lowest
from trimfit.masks.selection import Selection, usable_weight
from trimfit.masks.sweep import BLOCK, column_blocks
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "layer"


def select(weight: Tensor, gram: FactoredGram, pattern: Pattern, *, block: int = BLOCK) -> Selection:
    """Prunes from the first column to the last; what a column loses, the columns to its right make up for (Alg. 1).

    The mask adapts to the weights as updated so far: it is chosen for `block` columns at a time, or for one group of
    an N:M pattern, by w² / [H⁻¹]_jj with the inverse of the trailing, damped H. Each block prunes its share of the
    sparsity, so the counts are exact in total, and in every row with scope "row".

    `weight` is (out, in), any floating dtype; weights of dead inputs count, and come back, as 0. Raises `InputError`
    for shapes that do not fit and for NaN or infinite weights.
    """
    given = usable_weight(weight, gram, pattern)
    current = torch.where(gram.dead, 0, given)
    factor = gram.inverse_factor.to(current.dtype)
    mask = torch.empty_like(current, dtype=torch.bool)
    for start, stop in column_blocks(gram.size, block, pattern):
        if not isinstance(pattern, NM):
            counts = prune_counts(pattern, (len(current), gram.size), start, stop)
            mask[:, start:stop] = prune_lowest(_scores(current, factor, start, stop), counts)
        errors = torch.zeros_like(current[:, start:stop])
        for column in range(start, stop):
            if isinstance(pattern, NM) and column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                mask[:, group] = keep_best(_scores(current, factor, group.start, group.stop), pattern)
            error = torch.where(mask[:, column], 0, current[:, column]) / factor[column, column]
            current[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        # Columns beyond the block get the updates of its columns at once: one GEMM in place of many rank-1 updates.
        current[:, stop:] -= errors @ factor[start:stop, stop:]
    return Selection(mask, torch.where(mask, current, 0))


def _scores(current: Tensor, factor: Tensor, start: int, stop: int) -> Tensor:
    """|w| / U_jj for columns [start, stop): the order of w² / [H⁻¹]_jj, and no square to underflow."""
    return current[:, start:stop].abs() / factor.diagonal()[start:stop]
