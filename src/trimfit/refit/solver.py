"""What a solver is: something that reduces a residual."""

from typing import Protocol

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.refit.gram import FactoredGram

_WELL_CONDITIONED = 1e5  # ‖H⁻¹‖_F at unit diagonal: above, float32 took three times the steps of float64 and more


class Solver(Protocol):
    """Approximate minimiser of ½ d H dᵀ − r dᵀ over the kept entries, for many rows at once.

    `refit` adds corrections until the certificate, evaluated in float64, meets `tolerance`; a solver may therefore
    work in a faster dtype. Solvers are frozen dataclasses: settings only, no state.
    """

    @property
    def tolerance(self) -> float:
        """Relative gap at which a row is finished."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the solver's arithmetic."""
        ...

    @property
    def max_steps(self) -> int:
        """Step limit of a whole refit."""
        ...

    def correct(
        self, gram: FactoredGram, residual: Tensor, mask: Tensor, gain: Tensor, max_steps: int
    ) -> tuple[Tensor, int]:
        """Correction (m, n) for `residual` (m, n), which is zero off `mask`, and the steps it took.

        Every row of `residual` has the largest entry 1. `gain` (m,) is what earlier corrections gained, on the same
        scale; a row is finished when its gap is at most `tolerance` times all that was gained.
        """
        ...


def working_dtype(gram: FactoredGram, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float64 where directions lost to rounding would have to be found again and again."""
    return torch.float64 if gram.inverse_norm > _WELL_CONDITIONED else dtype


def check_settings(tolerance: float, dtype: torch.dtype, max_steps: int = 1) -> None:
    """Raises `InputError` for settings with which no solver can work."""
    if not 0 < tolerance < float("inf"):
        raise InputError(f"the tolerance must be positive, but it is {tolerance}")
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"a solver works in torch.float32 or torch.float64, but its dtype is {dtype}")
    if max_steps < 1:
        raise InputError(f"a solver needs at least one step, but max_steps is {max_steps}")
