"""What selectors need that go over the columns from left to right and let the columns to the right make up for it."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.masks.patterns import NM, Pattern
from trimfit.refit.gram import FactoredGram

log = logging.getLogger(__name__)

BLOCK = 128  # columns, as in SparseGPT
_SMALLEST_PIVOT = 100  # in units of rounding: below, what the factor says of its column is noise
_FIRST_RAISE = 1e-8


def inverse_factor(gram: FactoredGram) -> Tensor:
    """(in, in) upper triangular U with H⁻¹ = UᵀU, for the damped H in its own units; dtype of the Gram matrix.

    For every j, U[j:, j:] is the same factor of the trailing inverse (H[j:, j:])⁻¹, so a sweep over the columns never
    inverts again (SparseGPT, arXiv 2301.00774, Alg. 1). A matrix too close to singular for that is damped more,
    and the reason logged.
    """
    # Factorised from the last column to the first, H = V Vᵀ with V upper triangular, and then U = V⁻¹. The factor of an
    # explicit H⁻¹ is the same on paper, but fails earlier when H is badly conditioned.
    reversed_factor, info = torch.linalg.cholesky_ex(gram.matrix.flip(0, 1))
    pivot = reversed_factor.diagonal().square().min()
    if info.item() != 0 or not pivot > _SMALLEST_PIVOT * torch.finfo(pivot.dtype).eps:
        damping = max(10 * gram.damping, _FIRST_RAISE)
        log.warning(
            "Gram matrix of %d inputs is nearly singular at damping %g; raised to %g while choosing weights",
            gram.size,
            gram.damping,
            damping,
        )
        return inverse_factor(FactoredGram(gram.raw, damping))
    upper = reversed_factor.flip(0, 1)
    identity = torch.eye(gram.size, dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True) * gram.scale


def column_blocks(width: int, block: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a sweep. For N:M they are a multiple of M wide: no group straddles a border."""
    if block < 1:
        raise InputError(f"a block must have at least one column, but the block size is {block}")
    if isinstance(pattern, NM):
        block = pattern.m * max(1, block // pattern.m)
    for start in range(0, width, block):
        yield start, min(start + block, width)
