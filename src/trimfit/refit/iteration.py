"""Preconditioned conjugate gradients on many quadratic programs at once: the mask acts on the residual."""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

_LEAVE_BELOW = 0.75  # finished programs leave the batch when no more than this share of it goes on
_SAFETY = 0.5  # of the tolerance, since residuals are updated here and recomputed by the caller


class System(Protocol):
    """What tensors (b, …, n), one program for each of b, are multiplied with; the mask is not applied."""

    def multiply(self, point: Tensor) -> Tensor:
        """By the matrix A of each program."""
        ...

    def precondition(self, residual: Tensor) -> Tensor | None:
        """By something near A⁻¹; None where that is the identity."""
        ...

    def bound(self, residual: Tensor, product: Tensor) -> Tensor:
        """(b,) bounds ½ rᵀA⁻¹r on what is left to gain; `product` is r·z with the preconditioned residual z."""
        ...

    def rows(self, index: Tensor) -> Self:
        """That of some programs."""
        ...


def iterate(
    system: System,
    residual: Tensor,
    keep: Tensor,
    gain: Tensor,
    *,
    tolerance: float,
    max_steps: int,
    check_every: int = 1,
) -> tuple[Tensor, int]:
    """Corrections for `residual` (b, …, n), which is zero where `keep`, 0 or 1, is; and the steps that were taken.

    `gain` (b,) is what was gained before; a program is finished when what is left is half of `tolerance` times that and
    what is gained here. Works in the dtype of `keep`; bounds are looked at after each `check_every` steps.
    """
    solution, rows = torch.zeros_like(residual), torch.arange(len(residual), device=residual.device)
    x, r, gain = torch.zeros_like(keep), residual.to(keep.dtype, copy=True), gain.to(keep.dtype)
    z = _masked(system.precondition(r), keep, r)
    p, rz = z.clone(), _dot(r, z)
    step, looks = 0, _Looks(late=residual.device.type == "cuda")
    for step in range(1, max_steps + 1):
        q = system.multiply(p).mul_(keep)
        length = _ratio(rz, _dot(p, q))
        x.addcmul_(_wide(length, p), p)
        r.addcmul_(_wide(length, p), q, value=-1)
        gain = gain + length * rz / 2
        z = _masked(system.precondition(r), keep, r)
        before, rz = rz, _dot(r, z)
        p = torch.addcmul(z, _wide(_ratio(rz, before), p), p)
        if step % check_every:
            continue
        bound, enough = system.bound(r, rz), _SAFETY * tolerance * gain
        if looks.expected(bound, enough) > _LEAVE_BELOW * len(rows):
            continue
        unfinished = bound > enough
        count = int(unfinished.sum())
        if count == 0:
            break
        if count <= _LEAVE_BELOW * len(rows):
            solution[rows] = x.to(solution.dtype)
            left = torch.nonzero_static(unfinished, size=count)[:, 0]
            rows, keep, x, r, p, rz, gain = (t[left] for t in (rows, keep, x, r, p, rz, gain))
            system, looks = system.rows(left), looks.rows(left)
    solution[rows] = x.to(solution.dtype)
    return solution, step


class _Looks:
    """When it is worth while to wait for a GPU, and see which programs are finished.

    The GPU has the steps up to this look to do while the host reads what was found at the look before: how many
    programs would not be finished now, if their bounds went on falling as they did.
    """

    def __init__(self, *, late: bool):
        self._late = late
        self._before: Tensor | None = None
        self._pending: Callable[[], int] | None = None

    def expected(self, bound: Tensor, enough: Tensor) -> int:
        """How many programs (b,) go on, as foreseen; 0, for them to be counted, where nothing has to be waited for."""
        if not self._late:
            return 0
        foreseen = bound if self._before is None else bound * _ratio(bound, self._before).clamp(max=1)
        pending, self._before = self._pending, bound
        self._pending = _on_its_way((foreseen > enough).sum())
        return len(bound) if pending is None else pending()

    def rows(self, index: Tensor) -> "_Looks":
        """Those of some programs."""
        part = type(self)(late=self._late)
        part._before = None if self._before is None else self._before[index]
        return part


def _on_its_way(number: Tensor) -> Callable[[], int]:
    """Reads a number later, waiting for no more than what the device had to do until now."""
    if number.device.type != "cuda":
        return lambda: int(number)
    copy, event = number.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record(torch.cuda.current_stream(number.device))  # that of the device, which need not be the current one

    def read() -> int:
        event.synchronize()
        return int(copy)

    return read


def _masked(preconditioned: Tensor | None, keep: Tensor, residual: Tensor) -> Tensor:
    return residual if preconditioned is None else preconditioned.mul_(keep)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(b,) products, program by program."""
    return (a * b).flatten(1).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 for a program with nothing left to do."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """One for each program, to multiply a tensor of that shape with."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))
