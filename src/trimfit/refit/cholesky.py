"""Exact refit: every row's kept submatrix is gathered and factorised, many rows in one batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.refit.gram import FactoredGram
from trimfit.refit.solver import check_settings

_BATCH_ELEMENTS = 2**25  # of the gathered submatrices held at once


@dataclass(frozen=True)
class Cholesky:
    """Solves H_SS w_S = g_S directly; cost m·k³/3 for m rows with k kept weights.

    - `tolerance`: relative gap that the certificate must meet.
    - `dtype`: of the factorisation, torch.float32 or torch.float64.
    - `max_steps`: how often to factorise and solve again for what rounding left.
    """

    tolerance: float = 1e-4
    dtype: torch.dtype = torch.float32
    max_steps: int = 8

    def __post_init__(self) -> None:
        check_settings(self.tolerance, self.dtype, self.max_steps)

    def correct(
        self, gram: FactoredGram, residual: Tensor, mask: Tensor, gain: Tensor, max_steps: int
    ) -> tuple[Tensor, int]:
        """See `Solver.correct`."""
        kept, order = mask.sum(1).sort()  # rows of a batch are padded to the widest of them
        columns = mask[order].to(torch.int8).argsort(dim=1, descending=True, stable=True)  # the kept ones first
        counts = kept.tolist()
        solution = torch.zeros_like(residual)
        faster = gram.matrix.to(self.dtype)
        end = len(counts)
        while end:
            width = max(1, counts[end - 1])
            start = max(0, end - max(1, _BATCH_ELEMENTS // width**2))
            indices = [columns[row, : counts[row]] for row in range(start, end)]
            rows, places = order[start:end], columns[start:end, :width]
            values = residual[rows].gather(1, places)  # 0 on the padding, which is off the mask
            part = _solve(_gather(faster, indices, width), values)
            if part is None:  # positive definite, but not after rounding to the faster dtype
                part = _solve(_gather(gram.matrix, indices, width), values)
            if part is not None:
                solution[rows] = solution[rows].scatter(1, places, part)
            end = start
        return solution, 1


def _gather(matrix: Tensor, indices: list[Tensor], width: int) -> Tensor:
    """(rows, width, width) principal submatrices, padded with the identity.

    A loop, since one gather for all rows goes entry by entry and takes longer than to factorise.
    """
    gathered = torch.eye(width, dtype=matrix.dtype, device=matrix.device).repeat(len(indices), 1, 1)
    for part, index in zip(gathered, indices, strict=True):
        part[: len(index), : len(index)] = matrix.index_select(0, index).index_select(1, index)
    return gathered


def _solve(matrices: Tensor, values: Tensor) -> Tensor | None:
    """(rows, k) solutions in the dtype of `values`; None when one of the matrices cannot be factorised."""
    factors, info = torch.linalg.cholesky_ex(matrices)
    if info.any():
        return None
    return torch.cholesky_solve(values.to(factors.dtype)[:, :, None], factors)[:, :, 0].to(values.dtype)
