"""1-swaps: in a row, one kept weight goes and one pruned weight comes, when the refitted row is better for it.

With the optimal weights w on the kept set S of a row, residual r = g − Hw and P = (H_SS)⁻¹,

- dropping i ∈ S costs w_i² / 2P_ii, and adding j ∉ S gains r_j² / 2s_j with s_j = H_jj − H_jS P H_Sj;
- dropping i and adding j together changes the objective by
  w_i² / 2P_ii − (r_j + t_ij w_i / P_ii)² / 2(s_j + t_ij² / P_ii)  with t_ij = (P H_Sj)_i,

all other weights of the row being optimal before and after. What a swap needs, P, t and s, is the symmetric sweep
tableau of H on S, and a swap is two pivots of it (Goodnight 1979, doi 10.1080/00031305.1979.10482685).

The tableau of a whole row is too much to pivot on. For each row some promising candidates C are chosen, and
the other kept weights K = S \\ C are eliminated: the Schur complement H_CC − H_CK (H_KK)⁻¹ H_KC is all that swaps among
candidates can ask of them, so the formulas hold for the row and the tableau has |C|² entries.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.masks.patterns import NM, Pattern
from trimfit.refit.gram import FactoredGram
from trimfit.refit.solver import working_dtype

CANDIDATES = 24  # of each row, kept and pruned ones together
SWAPS = 12  # of each row, at most
_CHUNK_ELEMENTS = 2**26  # of what is kept of the eliminations while swaps are made
_BATCH_ELEMENTS = 2**25  # of the kept submatrices held at once
_BATCH_ELEMENTS_CPU = 2**20  # about what its caches hold
_SMALLEST_DECREASE = 1e-6  # of the row's error: below it a swap is rounding


@dataclass(frozen=True)
class Tableau:
    """The problem of m rows in c candidates each, everything else eliminated, pivoted on the kept ones.

    - `matrix`: (m, c, c) symmetric: −P for kept pairs, t for mixed ones, the Schur complement s for pruned ones.
    - `vector`: (m, c) the weight of a kept candidate, the residual of a pruned one.
    - `kept`: (m, c) bool.
    """

    matrix: Tensor
    vector: Tensor
    kept: Tensor


def make_tableau(reduced: Tensor, weight: Tensor, residual: Tensor, kept: Tensor) -> Tableau:
    """From the reduced matrix (m, c, c), and the weights and residuals (m, c) of the optimum on the kept set."""
    both = kept[:, :, None] & kept[:, None, :]
    identity = torch.eye(kept.shape[1], dtype=reduced.dtype, device=reduced.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.where(both, reduced, identity)))
    inverse = torch.where(both, inverse, 0)
    mixed = inverse @ reduced
    matrix = reduced - reduced @ mixed
    matrix = torch.where(kept[:, :, None], mixed, torch.where(kept[:, None, :], mixed.mT, matrix))
    return Tableau(torch.where(both, -inverse, matrix), torch.where(kept, weight, residual), kept)


def swap_changes(tableau: Tableau) -> Tensor:
    """(m, c, c) change of the objective when kept i goes and pruned j comes; infinite for other pairs."""
    scale = -tableau.matrix.diagonal(dim1=1, dim2=2)  # P_ii where kept, −s_j where pruned
    weight, drop = tableau.vector[:, :, None], scale[:, :, None]
    gain = tableau.vector[:, None, :] + tableau.matrix * weight / drop
    slope = -scale[:, None, :] + tableau.matrix**2 / drop
    change = (weight**2 / drop - gain**2 / slope) / 2
    return change.masked_fill_(~(tableau.kept[:, :, None] & ~tableau.kept[:, None, :]), torch.inf)


def pivot(tableau: Tableau, position: Tensor) -> Tableau:
    """Each row drops its candidate at `position` (m,) if it is kept, and adds it if it is pruned."""
    rows = torch.arange(len(position), device=position.device)
    sign = torch.where(tableau.kept[rows, position], -1.0, 1.0).to(tableau.vector.dtype)[:, None]
    column = tableau.matrix[rows, position]
    diagonal = column[rows, position][:, None]
    value = tableau.vector[rows, position][:, None]
    scaled = column / diagonal
    matrix = torch.baddbmm(tableau.matrix, column[:, :, None], scaled[:, None, :], alpha=-1)
    vector = tableau.vector - scaled * value
    matrix[rows, position] = matrix[rows, :, position] = sign * scaled
    matrix[rows, position, position] = -1 / diagonal[:, 0]
    vector[rows, position] = (sign * value / diagonal)[:, 0]
    kept = tableau.kept.clone()
    kept[rows, position] = ~kept[rows, position]
    return Tableau(matrix, vector, kept)


def swap_candidates(tableau: Tableau, allowed: Tensor, least: Tensor, limit: int) -> Tableau:
    """Makes the best swap of each row until none decreases the objective by more than `least` (m,), or `limit`.

    `allowed` is (m, c, c) bool, the pairs that the pattern lets swap. Rows that are finished leave the batch.
    """
    matrix, vector, kept = tableau.matrix.clone(), tableau.vector.clone(), tableau.kept.clone()
    rows = torch.arange(len(kept), device=kept.device)
    for _ in range(limit):
        change, pair = torch.where(allowed, swap_changes(tableau), torch.inf).flatten(1).min(1)
        better = change < -least
        if not better.any():
            break
        rows, allowed, least, pair = rows[better], allowed[better], least[better], pair[better]
        tableau = Tableau(tableau.matrix[better], tableau.vector[better], tableau.kept[better])
        tableau = pivot(pivot(tableau, pair // kept.shape[1]), pair % kept.shape[1])
        matrix[rows], vector[rows], kept[rows] = tableau.matrix, tableau.vector, tableau.kept
    return Tableau(matrix, vector, kept)


def swap(
    dense: Tensor,
    weight: Tensor,
    mask: Tensor,
    gram: FactoredGram,
    pattern: Pattern,
    *,
    candidates: int = CANDIDATES,
    limit: int = SWAPS,
    budget: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """(mask, weights) after the swaps that make rows better; counts per row, and per group of N:M, stay.

    `budget` limits the flops of all eliminations, k³/3 for a row that keeps k: rows with large errors come first.

    `dense` (m, n) is what to reproduce and `weight` (m, n) the optimum on `mask`, both divided by `gram.scale`, in the
    dtype of the Gram matrix. The weights returned are the optimum on the new mask. A row changes only if its error,
    computed afresh, is lower.
    """
    residual = (dense - weight) @ gram.matrix
    before = row_errors(dense - weight, residual)
    columns = _promising(weight, residual, mask, gram, pattern, candidates)
    elements = torch.zeros_like(mask).scatter_(1, columns, True)
    others = mask & ~elements
    counts = others.sum(1)
    worst = before.argsort(descending=True)
    affordable = worst[(counts[worst].double() ** 3 / 3).cumsum(0) <= budget]
    if not len(affordable):
        return mask, weight
    order = affordable[counts[affordable].argsort()]  # rows of a chunk are padded to the widest of them
    new_mask, new_weight = mask.clone(), weight.clone()
    for rows in order.split(max(1, _CHUNK_ELEMENTS // (columns.shape[1] * max(1, int(counts.max()))))):
        part = (weight[rows], residual[rows], mask[rows], columns[rows], others[rows])
        new_mask[rows], new_weight[rows] = _swap_rows(*part, before[rows], gram, pattern, limit)
    change = dense - new_weight
    better = row_errors(change, change @ gram.matrix) < before
    return torch.where(better[:, None], new_mask, mask), torch.where(better[:, None], new_weight, weight)


def row_errors(difference: Tensor, product: Tensor) -> Tensor:
    """(m,) half the squared error per token, ½ d H dᵀ, of rows d (m, n), given `product` d H."""
    return (difference * product).sum(1) / 2


def _swap_rows(
    weight: Tensor,
    residual: Tensor,
    mask: Tensor,
    columns: Tensor,
    others: Tensor,
    error: Tensor,
    gram: FactoredGram,
    pattern: Pattern,
    limit: int,
) -> tuple[Tensor, Tensor]:
    """(mask, weights) of some rows, of shape (m, n) like most arguments; `columns` is (m, c), `error` (m,)."""
    reduced, influence, places = _eliminate(columns, others, gram)
    kept = mask.gather(1, columns)
    tableau = make_tableau(reduced, weight.gather(1, columns), residual.gather(1, columns), kept)
    if isinstance(pattern, NM):
        group = columns // pattern.m
        allowed = group[:, :, None] == group[:, None, :]
    else:
        allowed = torch.ones_like(reduced, dtype=torch.bool)
    swapped = swap_candidates(tableau, allowed, _SMALLEST_DECREASE * error, limit)
    value = torch.where(swapped.kept, swapped.vector, 0)
    change = value - torch.where(kept, tableau.vector, 0)
    # The optimum of the eliminated weights follows the candidates: H_KK dx_K = -H_KC dx_C. Padding adds zero.
    rest = torch.bmm(influence, change.to(influence.dtype)[:, :, None])[:, :, 0].to(weight.dtype)
    weight = weight.scatter_add(1, places, -rest).scatter(1, columns, value)
    return mask.scatter(1, columns, swapped.kept), weight


def _eliminate(columns: Tensor, others: Tensor, gram: FactoredGram) -> tuple[Tensor, Tensor, Tensor]:
    """For candidates (m, c) and other kept weights (m, n) bool: what is left of H for the candidates.

    Returns the Schur complement (m, c, c), the influence (H_KK)⁻¹ H_KC (m, k, c), and the columns (m, k) of the others.
    Rows with fewer others than k are padded: there, the influence is zero.
    """
    counts = others.sum(1)
    width = max(1, int(counts.max()))
    places = others.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    matrices = (gram.matrix, gram.matrix.to(working_dtype(gram, torch.float32)))
    reduced = gram.matrix[columns[:, :, None], columns[:, None, :]]
    influence = matrices[1].new_empty(len(columns), width, columns.shape[1])
    elements = _BATCH_ELEMENTS_CPU if columns.device.type == "cpu" else _BATCH_ELEMENTS
    for rows in torch.arange(len(columns), device=columns.device).split(max(1, elements // width**2)):
        factor, mixed = _factorise(columns[rows], places[rows], counts[rows].tolist(), *matrices)
        half = torch.linalg.solve_triangular(factor, mixed, upper=False)
        reduced[rows] -= (half.mT @ half).to(reduced.dtype)
        influence[rows] = torch.linalg.solve_triangular(factor.mT, half, upper=True).to(influence.dtype)
    return reduced, influence, places


def _factorise(
    columns: Tensor, places: Tensor, counts: list[int], matrix: Tensor, faster: Tensor
) -> tuple[Tensor, Tensor]:
    """Cholesky factors of H_KK (m, k, k), padded with the identity, and H_KC (m, k, c), padded with zeros."""
    kept = torch.eye(places.shape[1], dtype=faster.dtype, device=faster.device).repeat(len(columns), 1, 1)
    mixed = faster.new_zeros(*places.shape, columns.shape[1])
    for row, count in enumerate(counts):  # one gather for all rows goes entry by entry: slower than to factorise
        selected = faster.index_select(0, places[row, :count])
        kept[row, :count, :count] = selected.index_select(1, places[row, :count])
        mixed[row, :count] = selected.index_select(1, columns[row])
    factor, info = torch.linalg.cholesky_ex(kept)
    if not info.any():
        return factor, mixed
    if faster.dtype == matrix.dtype:
        raise AssertionError("a principal submatrix of a positive definite matrix cannot be factorised")
    return _factorise(columns, places, counts, matrix, matrix)  # positive definite, but not after rounding


def _promising(
    weight: Tensor, residual: Tensor, mask: Tensor, gram: FactoredGram, pattern: Pattern, count: int
) -> Tensor:
    """(m, c) columns, each at most once in a row: those cheapest to drop and best to add, by bounds of both.

    The bounds put (H⁻¹)_ii for P_ii and 1 / (H⁻¹)_jj for s_j, which no mask can exceed or fall below.
    """
    spread = gram.inverse.diagonal()
    cost = torch.where(mask, weight.square() / spread, torch.inf)
    gain = torch.where(mask, -torch.inf, residual.square() * spread)
    width = gram.size
    if isinstance(pattern, NM):
        m = pattern.m
        groups = cost.view(-1, width // m, m).amin(2) - gain.view(-1, width // m, m).amax(2)
        best = groups.topk(min(max(1, count // m), width // m), largest=False).indices
        return (best[:, :, None] * m + torch.arange(m, device=best.device)).flatten(1)
    # A rank among the kept or among the pruned; the first of both lists are taken until there are enough.
    count = min(count, width)
    ranks = torch.where(mask, _ranks(cost, count), _ranks(-gain, count))
    return ranks.topk(count, largest=False, sorted=False).indices


def _ranks(values: Tensor, count: int) -> Tensor:
    """(m, n) the place of each value in the rising order of its row: 0, 1, …; `count` for all behind the first ones."""
    first = values.topk(count, largest=False).indices
    places = torch.arange(count, device=values.device).expand_as(first)
    return torch.full_like(values, count, dtype=torch.int64).scatter_(1, first, places)
