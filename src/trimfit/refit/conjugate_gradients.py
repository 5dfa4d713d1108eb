"""Preconditioned conjugate gradients on all rows at once: the mask acts on the residual, a step is one GEMM."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.precision import tensor_float32
from trimfit.refit.gram import FactoredGram
from trimfit.refit.solver import check_settings, working_dtype

_CHECK_EVERY = {"diagonal": 4, "masked_inverse": 1}  # steps between looks at the certificate, there a GEMM, here free
_LEAVE_BELOW = 0.75  # finished rows leave the batch when no more than this share of it goes on
_TF32_SUFFICES = 2e3  # ‖H⁻¹‖_F at unit diagonal: below, products in TF32 took at most a quarter more steps
_SAFETY = 0.5  # of the tolerance, since residuals are updated here and recomputed by the caller


@dataclass(frozen=True)
class ConjugateGradients:
    """One GEMM (m×n)·(n×n) for each step, one more with the masked inverse, whatever the masks are.

    - `preconditioner`: "diagonal" (the matrix already has a unit diagonal) or "masked_inverse", z = (r H⁻¹) ∘ M,
      which needs far fewer steps and gives the certificate ½ r·z at each of them.
    - `tolerance`: relative gap at which a row is finished; finished rows leave the batch.
    - `max_steps`: step limit of a whole refit.
    - `dtype`: of the iteration, torch.float32 or torch.float64; float64 in any case for a matrix so badly conditioned
      that float32 would take several times the steps. On CUDA, products of float32 are TF32 for one so well conditioned
      that this costs few steps; the caller's residuals and certificates never are.
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
        with tensor_float32(residual.device, allowed=gram.inverse_norm <= _TF32_SUFFICES):
            return self._iterate(gram, residual, mask, gain, max_steps)

    def _iterate(
        self, gram: FactoredGram, residual: Tensor, mask: Tensor, gain: Tensor, max_steps: int
    ) -> tuple[Tensor, int]:
        dtype = working_dtype(gram, self.dtype)
        matrix, inverse = gram.matrix.to(dtype), gram.inverse.to(dtype)
        masked_inverse = self.preconditioner == "masked_inverse"
        solution = torch.zeros_like(residual)
        rows = torch.arange(len(mask), device=mask.device)
        x, r = torch.zeros_like(residual, dtype=dtype), residual.to(dtype, copy=True)
        keep, gain = mask.to(dtype), gain.to(dtype)
        z = (r @ inverse).mul_(keep) if masked_inverse else r
        p, rz = z.clone(), _dot(r, z)
        step, looks = 0, _Looks(residual.device)
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
            unfinished, count = looks.take(bound > _SAFETY * self.tolerance * gain)
            if count == 0:
                break
            if count <= _LEAVE_BELOW * len(rows):
                solution[rows] = x.to(solution.dtype)
                left = torch.nonzero_static(unfinished, size=count)[:, 0]
                rows, keep, x, r, p, rz, gain = (t[left] for t in (rows, keep, x, r, p, rz, gain))
                looks = _Looks(residual.device)
        solution[rows] = x.to(solution.dtype)
        return solution, step


class _Looks:
    """How many rows go on, without waiting for the device: on a GPU what is seen is one look old.

    The GPU has the next step to do while the host reads the count of the one before; nothing is lost by a step more.
    """

    def __init__(self, device: torch.device):
        self._late = device.type == "cuda"
        self._pending: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    def take(self, unfinished: Tensor) -> tuple[Tensor, int]:
        """The rows (m,) that go on, and their number: now, or at the last look (all of them if there was none)."""
        if not self._late:
            return unfinished, int(unfinished.sum())
        seen, event = self._pending, torch.cuda.Event()
        self._pending = unfinished, unfinished.sum().to("cpu", non_blocking=True), event
        event.record()
        if seen is None:
            return unfinished, len(unfinished)
        seen[2].synchronize()
        return seen[0], int(seen[1])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(m,) products of the rows."""
    return (a * b).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 for a row with nothing left to do."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
