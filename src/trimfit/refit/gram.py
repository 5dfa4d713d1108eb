"""The Gram matrix of a layer's inputs, damped, scaled to unit diagonal and factorised once for all rows."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from trimfit.errors import InputError

log = logging.getLogger(__name__)

_FIRST_RAISE = 1e-8  # relative to the mean diagonal: the damping tried first when none was asked for
_LARGEST_DAMPING = 0.1  # a matrix that needs more has negative eigenvalues that rounding does not explain
_LARGEST_SLACK = 0.5
_SMALLEST_PIVOT = 100  # in units of rounding: below, what a factor says of its column is noise


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype of the device."""
    return torch.float32 if device.type == "mps" else torch.float64


class FactoredGram:
    """H + λ·mean(diag H)·I, ready to be used by every layer that shares the input.

    **Arguments**

    - `gram`: H = XᵀX / T of shape (n, n), symmetric, positive semi-definite, any floating dtype.
    - `damping`: λ ≥ 0, dimensionless. It is raised, and the reason logged, when the matrix cannot be factorised.

    **Attributes**

    - `raw`: (n, n) H, symmetrised.
    - `damping`: the λ that was used.
    - `damping_weight`: λ·mean(diag H), what was added to the diagonal, in the units of H.
    - `dead`: (n,) bool, inputs that were zero on every calibration token.
    - `scale`: (n,) the s that makes s_i·H_ij·s_j have a unit diagonal (1 for dead inputs).
    - `matrix`: (n, n) the damped Gram matrix scaled so; dead inputs are unit rows.
    - `cholesky`: (n, n) lower factor of `matrix`.

    Tensors have the widest dtype of the device. Raises `InputError` for a matrix that is not a Gram matrix.
    """

    damping_weight: float
    scale: Tensor
    matrix: Tensor
    cholesky: Tensor

    def __init__(self, gram: Tensor, damping: float = 0.0):
        _check(gram, damping)
        gram = gram.detach().to(widest(gram.device))
        self.raw = gram / 2 + gram.T / 2
        self.dead = self.raw.diagonal() == 0
        self.raw[self.dead, :] = 0
        self.raw[:, self.dead] = 0
        self.mean_diagonal = self.raw.diagonal().mean().item()
        self.damping = damping
        while not self._factorise():
            self.damping = _raised(self, "cannot be factorised")

    def _factorise(self) -> bool:
        self.damping_weight = self.damping * self.mean_diagonal
        damped = self.raw.clone()
        damped.diagonal().add_(self.damping_weight)
        damped.diagonal()[self.dead] = 1
        self.scale = damped.diagonal().rsqrt()
        self.matrix = damped * self.scale[:, None] * self.scale[None, :]
        self.cholesky, info = torch.linalg.cholesky_ex(self.matrix)
        return info.item() == 0 and bool(torch.isfinite(self.cholesky).all())

    @property
    def size(self) -> int:
        """n, the number of inputs."""
        return len(self.dead)

    @cached_property
    def inverse(self) -> Tensor:
        """(n, n) inverse of `matrix`."""
        return torch.cholesky_inverse(self.cholesky)

    @cached_property
    def inverse_norm(self) -> float:
        """Frobenius norm of `inverse`, an upper bound on 1 / λ_min(`matrix`)."""
        return self.inverse.norm().item()

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of `matrix`."""
        return self.matrix.norm().item()

    @cached_property
    def slack(self) -> float:
        """ε such that rᵀ(L Lᵀ)⁻¹r, as computed with the factor L, is at least (1 − ε)·rᵀH⁻¹r.

        L is the exact factor of H + E with ‖E‖₂ ≤ (n + 1)·u·‖L‖²_F, and ‖L‖²_F = n; entries of H are off by a few u.
        The factor 2 covers the triangular solves and the computed inverse.
        """
        unit = torch.finfo(self.matrix.dtype).eps / 2
        return 2 * (self.size + 8) * self.size * unit * self.inverse_norm

    @property
    def certifiable(self) -> "FactoredGram":
        """This matrix in float64, on the CPU for a device that has none, and damped enough to prove something."""
        if self.raw.dtype == torch.float64 and self.slack <= _LARGEST_SLACK:
            return self  # not kept in itself: a cycle would outlive its last use
        return self._made_certifiable

    @cached_property
    def _made_certifiable(self) -> "FactoredGram":
        gram = self if self.raw.dtype == torch.float64 else FactoredGram(self.raw.cpu(), self.damping)
        while not gram.slack <= _LARGEST_SLACK:
            gram = FactoredGram(gram.raw, _raised(gram, "is singular to working precision"))
        return gram

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(n, n) upper triangular U with H⁻¹ = UᵀU, for the damped H in its own units.

        For every j, U[j:, j:] is the same factor of the trailing inverse (H[j:, j:])⁻¹, so a sweep over the columns
        never inverts again (SparseGPT, arXiv 2301.00774, Alg. 1). A matrix too close to singular for that is damped
        more, and the reason logged.
        """
        # Factorised from the last column to the first, H = V Vᵀ with V upper triangular, and then U = V⁻¹. The factor
        # of an explicit H⁻¹ is the same on paper, but fails earlier when H is badly conditioned.
        reversed_factor, info = torch.linalg.cholesky_ex(self.matrix.flip(0, 1))
        pivot = reversed_factor.diagonal().square().min()
        if info.item() != 0 or not pivot > _SMALLEST_PIVOT * torch.finfo(pivot.dtype).eps:
            return FactoredGram(self.raw, _raised(self, "is nearly singular")).inverse_factor
        upper = reversed_factor.flip(0, 1)
        identity = torch.eye(self.size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True) * self.scale

    def solve(self, rows: Tensor) -> Tensor:
        """(m, n) rows times the inverse of the damped H, in its own units and dtype; zero for dead inputs."""
        scaled = torch.where(self.dead, 0, rows.to(self.raw.dtype) * self.scale)
        return torch.cholesky_solve(scaled.T, self.cholesky).T * self.scale

    def energy(self, rows: Tensor) -> Tensor:
        """Σ_rows w H wᵀ with the undamped H, for rows of shape (m, n): the squared output norm per token."""
        rows = rows.to(self.raw.dtype)
        return ((rows @ self.raw) * rows).sum()


def factorise(gram: Tensor | FactoredGram, damping: float | None) -> FactoredGram:
    """A Gram matrix with its factors, as a caller of a refit gives it. Raises `InputError` for two dampings."""
    if not isinstance(gram, FactoredGram):
        return FactoredGram(gram, damping or 0.0)
    if damping is not None:
        raise InputError("damping belongs to the FactoredGram when one is given: leave it out here")
    return gram


def _raised(gram: FactoredGram, reason: str) -> float:
    """The next larger damping to try."""
    raised = max(10 * gram.damping, _FIRST_RAISE)
    if raised > _LARGEST_DAMPING:
        raise InputError(
            f"the Gram matrix ({gram.size} inputs) cannot be factorised even with damping {gram.damping:g}: "
            "it is not positive semi-definite; check how it was accumulated"
        )
    log.warning("Gram matrix of %d inputs %s at damping %g; raised to %g", gram.size, reason, gram.damping, raised)
    return raised


def _check(gram: Tensor, damping: float) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise InputError(f"the Gram matrix must be square (inputs, inputs), but its shape is {tuple(gram.shape)}")
    if not gram.is_floating_point():
        raise InputError(f"the Gram matrix must have a floating dtype, but it has {gram.dtype}")
    if not torch.isfinite(gram).all():
        raise InputError(
            "the Gram matrix has NaN or infinite entries: check the model's weights and the calibration data"
        )
    if (gram.diagonal() < 0).any():
        raise InputError("the Gram matrix has a negative diagonal entry, so it is not of the form XᵀX")
    if gram[gram.diagonal() == 0].any():
        raise InputError(
            "the Gram matrix has a zero on its diagonal but not in its whole row, so it is not of the form XᵀX"
        )
    if (gram - gram.T).abs().max() > 1e-3 * gram.abs().max():
        raise InputError("the Gram matrix is not symmetric, so it is not of the form XᵀX")
    if not 0 <= damping < float("inf"):
        raise InputError(f"damping must be a number that is not negative, but it is {damping}")
