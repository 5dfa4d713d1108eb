"""Preconditioned conjugate gradients on all rows at once: the mask acts on the residual, a step is one GEMM."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.precision import Factor
from trimfit.refit.gram import FactoredGram
from trimfit.refit.iteration import iterate
from trimfit.refit.solver import check_settings, working_dtype

_CHECK_EVERY = {"diagonal": 4, "masked_inverse": 1}  # steps between looks at the certificate, there a GEMM, here free
_TF32_SUFFICES = 2e3  # ‖H⁻¹‖_F at unit diagonal: below, products in TF32 took at most a quarter more steps


@dataclass(frozen=True)
class ConjugateGradients:
    """One GEMM (m×n)·(n×n) for each step, one more with the masked inverse, whatever the masks are.

    - `preconditioner`: "diagonal" (the matrix already has a unit diagonal) or "masked_inverse", z = (r H⁻¹) ∘ M,
      which needs far fewer steps and gives the certificate ½ r·z at each of them.
    - `tolerance`: relative gap at which a row is finished; finished rows leave the batch.
    - `max_steps`: step limit of a whole refit.
    - `dtype`: of the iteration, torch.float32 or torch.float64; float64 in any case for a matrix so badly conditioned
      that float32 would take several times the steps. On CUDA, products of float32 are TF32 for one so well conditioned
      that this costs few steps, else three of TF32; the caller's residuals and certificates never are.
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
        rounded = gram.inverse_norm <= _TF32_SUFFICES
        matrix, inverse = (Factor(one.to(dtype), rounded=rounded) for one in (gram.matrix, gram.inverse))
        return iterate(
            _Rows(matrix, inverse, self.preconditioner == "masked_inverse"),
            residual,
            mask.to(dtype),
            gain,
            tolerance=self.tolerance,
            max_steps=max_steps,
            check_every=_CHECK_EVERY[self.preconditioner],
        )


@dataclass(frozen=True)
class _Rows:
    """A `System` of rows (m, n) that share a matrix (n, n) and its inverse."""

    matrix: Factor
    inverse: Factor
    masked_inverse: bool

    def multiply(self, point: Tensor) -> Tensor:
        return self.matrix.product(point)

    def precondition(self, residual: Tensor) -> Tensor | None:
        return self.inverse.product(residual) if self.masked_inverse else None

    def bound(self, residual: Tensor, product: Tensor) -> Tensor:
        return (product if self.masked_inverse else (self.inverse.product(residual) * residual).sum(1)) / 2

    def rows(self, index: Tensor) -> "_Rows":
        return self
