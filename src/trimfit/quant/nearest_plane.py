"""The nearest plane algorithm for one factor of a pair: levels X (heads, r, m) for the least tr[(X − T)ᵀ H (X − T) W].

H (heads, r, r) couples the channels, which are rounded one after the other, each to make up for the errors of those
before it. W is the identity, or the Gram matrix of the m inputs, along which errors then are fed back as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.errors import InputError

RIDGE = 0.01  # of the mean diagonal: keeps targets near the weights where the other factor hardly sees them
BLOCK = 32  # channels between two GEMMs of a sweep
COLUMNS = 128  # inputs that a two-sided sweep goes through diagonally before a GEMM takes its errors to the others


@dataclass(frozen=True)
class Lattice:
    """The levels of a factor, (heads, r, m) each, or of a part of it: scale · an integer from `low` to `high`.

    Weights that must stay 0 have low = high = 0.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def steps(self, wish: Tensor) -> Tensor:
        """The integers of the nearest levels."""
        return torch.clamp((wish / self.scale).round_(), self.low, self.high)

    def nearest(self, wish: Tensor) -> Tensor:
        return self.steps(wish) * self.scale

    def channel(self, k: int) -> "Lattice":
        return Lattice(self.scale[:, k], self.low[:, k], self.high[:, k])

    def inputs(self, block: slice) -> "Lattice":
        return Lattice(self.scale[..., block], self.low[..., block], self.high[..., block])

    def diagonal(self, offset: int) -> "Lattice":
        return Lattice(*(bound.diagonal(offset, 1, 2) for bound in (self.scale, self.low, self.high)))


def with_feedback(hessian: Tensor, cross: Tensor, exact: Tensor, lattice: Lattice, coupled: Tensor | None) -> Tensor:
    """The least-squares target, rounded by error feedback: `Solver` in `pair_rounding` says what the arguments are."""
    damped, ridge = with_ridge(hessian)
    target = (torch.linalg.solve(damped, cross + ridge) @ exact).to(lattice.scale)
    upper = unit_lower(damped.flip(-2, -1)).flip(-2, -1)  # damped = upper · diagonal · upperᵀ
    if coupled is not None:
        return _two_sided_sweep(target, upper.to(target), coupled.to(target), lattice)
    rounded = _sweep(target, target, upper.mT.tril(-1).to(target), lattice)
    given_others = damped / damped.diagonal(dim1=-2, dim2=-1)[..., None]
    given_others.diagonal(dim1=-2, dim2=-1).zero_()
    return _sweep(rounded, target, given_others.to(target), lattice)


def nearest_to_pseudo_inverse(
    hessian: Tensor, cross: Tensor, exact: Tensor, lattice: Lattice, coupled: Tensor | None
) -> Tensor:
    """What CafeQ's Algorithm 1 probably is, for comparisons: the least-squares target, then its nearest levels.

    Known of it: it alternates between the matrices, without a Hessian, with the pseudo-inverse (arXiv 2511.19705).
    """
    target = torch.linalg.pinv(hessian, hermitian=True) @ cross @ exact
    return lattice.nearest(target.to(lattice.scale))


def _sweep(start: Tensor, target: Tensor, coupling: Tensor, lattice: Lattice) -> Tensor:
    """Rounds channel after channel, k to the level nearest to target_k − Σ_j coupling_kj · (x_j − target_j).

    - `start`, `target`: (heads, r, m). Channels that are not yet rounded are those of `start`.
    - `coupling`: (heads, r, r) with a diagonal of zeros. Strictly lower, Uᵀ − I from H = U D Uᵀ: the nearest plane
      algorithm. H over its diagonal, − I: the best level of each channel given all others, which makes nothing worse.
    """
    x = start.clone()
    for first in range(0, x.shape[1], BLOCK):
        block = slice(first, min(first + BLOCK, x.shape[1]))
        wish = target[:, block] - coupling[:, block] @ (x - target)
        for k in range(block.start, block.stop):
            level = lattice.channel(k).nearest(wish[:, k - first])
            rest = coupling[:, k + 1 : block.stop, k, None]
            wish[:, k - first + 1 :] -= rest * (level - x[:, k])[:, None]
            x[:, k] = level
    return x


def _two_sided_sweep(target: Tensor, upper: Tensor, lower: Tensor, lattice: Lattice) -> Tensor:
    """The nearest plane algorithm for tr[Eᵀ H E C], E = X − target, with errors fed back along channels and inputs.

    With H = U D Uᵀ and C = L D' Lᵀ the objective is Σ_ij D_i D'_j (Uᵀ E L)²_ij, and (Uᵀ E L)_ij is E_ij and terms in
    E_kl with k ≤ i and l ≥ j. So rounding goes from the first channel to the last and from the last input to the first,
    all entries (i, i + offset) of one diagonal at a time: none of them needs another.

    - `target`: (heads, r, n). `upper`: (heads, r, r) U, `lower`: (n, n) L, both with a unit diagonal.
    """
    _, r, n = target.shape
    upper, lower = upper.triu(1), lower.tril(-1)
    x, error, mixed = target.clone(), torch.zeros_like(target), torch.zeros_like(target)  # mixed is UᵀE
    for first in reversed(range(0, n, COLUMNS)):
        block = slice(first, min(first + COLUMNS, n))
        width = block.stop - first
        beyond = mixed[..., block.stop :] @ lower[block.stop :, block]
        along = lower[block, block].mT.contiguous()
        places = lattice.inputs(block)
        aims, levels, errors, mixes = (part[..., block] for part in (target, x, error, mixed))
        for offset in reversed(range(1 - r, width)):
            rows = slice(max(0, -offset), min(r, width - offset))
            columns = slice(rows.start + offset, rows.stop + offset)
            aim = aims.diagonal(offset, 1, 2)
            above = (upper[:, :, rows] * errors[:, :, columns]).sum(1)
            right = (mixes[:, rows] * along[columns]).sum(2) + beyond.diagonal(offset, 1, 2)
            level = places.diagonal(offset).nearest(aim - above - right)
            levels.diagonal(offset, 1, 2).copy_(level)
            errors.diagonal(offset, 1, 2).copy_(level - aim)
            mixes.diagonal(offset, 1, 2).copy_(level - aim + above)
    return x


def with_ridge(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (..., r, r) with a ridge, and the ridge; one where there is nothing to be relative to."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, RIDGE * mean, 1.0)[..., None, None]
    ridge = ridge * torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return hessian + ridge, ridge


def unit_lower(matrix: Tensor) -> Tensor:
    """L with a unit diagonal such that the matrix (..., r, r) is L D Lᵀ."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        raise InputError("the Gram matrix of the inputs is not positive semi-definite; check how it was accumulated")
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
