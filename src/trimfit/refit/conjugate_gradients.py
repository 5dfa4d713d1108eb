"""Preconditioned conjugate gradients on all rows at once: the mask acts on the residual, a step is one GEMM."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.refit.gram import FactoredGram
from trimfit.refit.solver import check_settings, working_dtype

_CHECK_EVERY = {"diagonal": 4, "masked_inverse": 1}  # steps between looks at the certificate, there a GEMM, here free
_LEAVE_BELOW = 0.75  # finished rows leave the batch when no more than this share of it goes on
_SAFETY = 0.5  # of the tolerance, since residuals are updated here and recomputed by the caller


@dataclass(frozen=True)
class ConjugateGradients:
    """One GEMM (m×n)·(n×n) for each step, one more with the masked inverse, whatever the masks are.

    - `preconditioner`: "diagonal" (the matrix already has a unit diagonal) or "masked_inverse", z = (r H⁻¹) ∘ M,
      which needs far fewer steps and gives the certificate ½ r·z at each of them.
    - `tolerance`: relative gap at which a row is finished; finished rows leave the batch.
    - `max_steps`: step limit of a whole refit.
    - `dtype`: of the iteration, torch.float32 or torch.float64; float64 in any case for a matrix so badly conditioned
      that float32 would take several times the steps.
    """

    preconditioner: Literal["diagonal", "masked_inverse"] = "masked_inverse"
    tolerance: float = 1e-4
    max_steps: int = 500
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_settings(self.tolerance, self.dtype, self.max_steps)
        if self.preconditioner not in ("diagonal", "masked_inverse"):
            raise InputError(f'the preconditioner is "diagonal" or "masked_inverse", not {self.preconditioner!r}')

    def correct(
        self, gram: FactoredGram, residual: Tensor, mask: Tensor, gain: Tensor, max_steps: int
    ) -> tuple[Tensor, int]:
        """See `Solver.correct`."""
        dtype = working_dtype(gram, self.dtype)
        matrix, inverse = gram.matrix.to(dtype), gram.inverse.to(dtype)
        masked_inverse = self.preconditioner == "masked_inverse"
        solution = torch.zeros_like(residual)
        rows = torch.arange(len(mask), device=mask.device)
        x, r = torch.zeros_like(residual, dtype=dtype), residual.to(dtype, copy=True)
        keep, gain = mask.to(dtype), gain.to(dtype)
        z = (r @ inverse).mul_(keep) if masked_inverse else r
        p, rz = z.clone(), _dot(r, z)
        step = 0
        for step in range(1, max_steps + 1):
            q = (p @ matrix).mul_(keep)
            length = _ratio(rz, _dot(p, q))
            x.addcmul_(length[:, None], p)
            r.addcmul_(length[:, None], q, value=-1)
            gain = gain + length * rz / 2
            z = (r @ inverse).mul_(keep) if masked_inverse else r
            before, rz = rz, _dot(r, z)
            p = torch.addcmul(z, _ratio(rz, before)[:, None], p)
            if step % _CHECK_EVERY[self.preconditioner]:
                continue
            bound = (rz if masked_inverse else _dot(r @ inverse, r)) / 2
            unfinished = bound > _SAFETY * self.tolerance * gain
            count = int(unfinished.sum())
            if count == 0:
                break
            if count <= _LEAVE_BELOW * len(rows):
                solution[rows] = x.to(solution.dtype)
                rows, keep, x, r, p, rz, gain = (t[unfinished] for t in (rows, keep, x, r, p, rz, gain))
        solution[rows] = x.to(solution.dtype)
        return solution, step


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(m,) products of the rows."""
    return (a * b).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 for a row with nothing left to do."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
