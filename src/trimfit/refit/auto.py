"""The solver for a problem of this size on this device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.refit.cholesky import Cholesky
from trimfit.refit.conjugate_gradients import ConjugateGradients
from trimfit.refit.gram import FactoredGram
from trimfit.refit.solver import Solver, check_settings

# In flops of a large GEMM: one flop of a small factorisation; one entry gathered, copied and masked for it; what is
# done once for each row. Measured on a CPU with benchmarks/refit.py; the flop on other devices is an estimate.
_CHOLESKY_FLOP = {"cpu": 4.0}
_CHOLESKY_FLOP_ELSEWHERE = 10.0
_CHOLESKY_ENTRY = 1e3
_CHOLESKY_ROW = 1e6
# Steps of conjugate gradients to a relative gap of 1e-4: this times ∛‖H⁻¹‖_F, within a factor of two on matrices
# with ‖H⁻¹‖_F from 30 to 10⁶ at unit diagonal.
_CG_STEPS = 4.0


@dataclass(frozen=True)
class Auto:
    """Chooses `ConjugateGradients` with the masked inverse, or `Cholesky` where few weights are kept or the matrix is
    badly conditioned.

    - `tolerance`: relative gap that the certificate must meet.
    - `dtype`: of the solver's arithmetic.
    """

    tolerance: float = 1e-4
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_settings(self.tolerance, self.dtype)

    def choose(self, gram: FactoredGram, mask: Tensor) -> Solver:
        """The cheaper solver for masks (m, n), by what each is expected to cost."""
        kept = mask.sum(1).to(gram.raw.device).double()
        flop = _CHOLESKY_FLOP.get(gram.raw.device.type, _CHOLESKY_FLOP_ELSEWHERE)
        cholesky = (flop * kept**3 / 3 + _CHOLESKY_ENTRY * kept**2 + _CHOLESKY_ROW).sum().item()
        step = 2 * 2 * mask.shape[0] * mask.shape[1] ** 2
        if cholesky <= _CG_STEPS * gram.inverse_norm ** (1 / 3) * step:
            return Cholesky(self.tolerance, self.dtype)
        return ConjugateGradients("masked_inverse", self.tolerance, dtype=self.dtype)
