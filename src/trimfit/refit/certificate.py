"""A proven bound on how far weights are from the optimum of their quadratic programs.

With r = (g − H w)_S the residual on the kept set S, f(w) − f* = ½ r_Sᵀ (H_SS)⁻¹ r_S ≤ ½ rᵀ H⁻¹ r, because the
inverse of a principal submatrix is bounded above by the principal submatrix of the inverse. One Cholesky factor
of H therefore certifies every row, whatever its mask. Proof: docs/method.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.refit.problem import Problem, unit_rounding

SMALLEST_GAIN = 1e-8  # of |f|: below it a gain is lost in the rounding of stored weights


@dataclass(frozen=True)
class Certificate:
    """Bounds for each of m rows, or runs of rows that were refitted together, in the units of the objective.

    For rows that is half a squared output per token.

    - `gap`: (m,) float64, a proven upper bound on f(w) − f*, rounding of its own evaluation included.
    - `gain`: (m,) float64, f(masked weights) − f(w), less what rounding may have added to it.
    - `scale`: (m,) float64, the gain that `gap` is compared with: `gain`, or where that is larger 1e-8 of |f(w)|, or of
      what the best single weight could gain.
    """

    gap: Tensor
    gain: Tensor
    scale: Tensor

    @property
    def relative(self) -> Tensor:
        """(m,) `gap / scale`, 0 where both are 0."""
        return torch.where(self.gap == 0, 0.0, self.gap / self.scale)

    @property
    def layer(self) -> float:
        """The same for the whole layer: Σ gap / Σ scale."""
        gap = self.gap.sum().item()
        scale = self.scale.sum().item()
        return gap / scale if scale else 0.0

    def replace(self, rows: Tensor, new: "Certificate") -> "Certificate":
        """These bounds, but those in `new` for some rows."""
        return Certificate(
            self.gap.index_copy(0, rows, new.gap),
            self.gain.index_copy(0, rows, new.gain),
            self.scale.index_copy(0, rows, new.scale),
        )

    def rows(self, index: Tensor) -> "Certificate":
        """The bounds of some rows."""
        return Certificate(self.gap[index], self.gain[index], self.scale[index])

    @staticmethod
    def concatenate(parts: "list[Certificate]") -> "Certificate":
        """The certificate of all rows from those of parts of them."""
        return Certificate(*(torch.cat([getattr(p, name) for p in parts]) for name in ("gap", "gain", "scale")))


def certify_start(problem: Problem) -> tuple[Certificate, Tensor]:
    """Certificate and residual (m, n) of the masked weights."""
    return _certify(problem, problem.start, problem.start_gradient)


def certify(problem: Problem, weight: Tensor) -> tuple[Certificate, Tensor]:
    """Certificate of `weight` (m, n), which is zero off the mask, and its residual (m, n).

    The residual is minus the gradient of f on the kept set, in the problem's coordinates.
    """
    point = weight.to(problem.linear.dtype) / problem.gram.scale
    return _certify(problem, point, problem.linear - point @ problem.gram.matrix)


def _certify(problem: Problem, point: Tensor, gradient: Tensor) -> tuple[Certificate, Tensor]:
    gram = problem.gram
    residual = gradient * problem.mask
    rounding = rounding_of_gradient(problem, point)
    whitened = torch.linalg.solve_triangular(gram.cholesky, residual.T, upper=False).norm(dim=0)
    # ‖δ‖ in the H⁻¹-norm is at most ‖δ‖₂·√‖H⁻¹‖₂.
    gap = (whitened + rounding * gram.inverse_norm**0.5).square() / (2 * (1 - gram.slack))
    gap = torch.where(problem.mask.any(1), gap, 0.0)  # nothing is free in a row without kept weights
    change, slope = point - problem.start, gradient + problem.start_gradient
    lost = (
        rounding
        + rounding_of_gradient(problem, problem.start)
        + (gram.size + 8) * unit_rounding(slope) * slope.norm(dim=1)
    )
    gain = ((change * slope).sum(1) - change.norm(dim=1) * lost) / 2
    objective = -(point * (gradient + problem.linear)).sum(1) / 2
    single = problem.linear.square().amax(1) / 2  # with a unit diagonal; not 0 where f(w) is, unless the row is
    floor = SMALLEST_GAIN * torch.maximum(objective.abs(), single)
    return Certificate(gap, gain, torch.maximum(gain, floor)), residual


def rounding_of_gradient(problem: Problem, point: Tensor) -> Tensor:
    """(m,) bound on the 2-norm of the rounding error in the gradient.

    A product of k kept weights with a column of H errs by at most k·u·Σ|v_i·H_ij|, over all columns in the 2-norm by
    k·u·‖v‖₂·‖H‖_F.
    """
    terms = point.norm(dim=1) * problem.gram.norm + problem.linear.norm(dim=1)
    return (problem.mask.sum(1) + 8) * unit_rounding(point) * terms + problem.rounding
