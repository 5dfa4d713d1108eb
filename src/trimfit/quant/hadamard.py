"""Orthogonal matrices that mix: every output takes about the same share of every input."""

import torch
from torch import Tensor

from trimfit.errors import InputError


def mixing_matrix(n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(n, n) orthogonal Q with entries as equal in size as is easily had.

    n is a power of two times an odd m: Q is the Kronecker product of Sylvester's Hadamard matrix and the Hartley
    matrix of order m, whose entries are (cos + sin)(2πjk/m)/√m. Both are symmetric, so Q is its own inverse. For
    powers of two all entries are ±1/√n; otherwise none is larger than √(2/n).

    Computed in float64 and rounded once to `dtype`. Raises `InputError` for n < 1.
    """
    if n < 1:
        raise InputError(f"a mixing matrix has at least one row, but {n} were asked for")
    odd = n
    while odd % 2 == 0:
        odd //= 2
    index = torch.arange(odd)
    # Whole turns are taken off while the angles are integers, or cos and sin of large ones would lose digits.
    angle = (index[:, None] * index % odd).to(torch.float64) * (2 * torch.pi / odd)
    mixing = angle.cos() + angle.sin()
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(mixing) < n:
        mixing = torch.kron(butterfly, mixing)
    return (mixing / n**0.5).to(dtype).to(device)
