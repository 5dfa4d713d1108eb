"""What the refit is measured against: one dense float64 solve a row, and one in rational numbers, without rounding."""

from fractions import Fraction

import torch
from torch import Tensor

EPS = 2.0**-52


def make_layer(
    rows: int, size: int, seed: int = 0, *, tokens: int | None = None, decay: float = 0.0, kept: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 Gram matrix, weights and mask. The spectrum of the inputs falls off as k^(-decay)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * size + 3
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** (-decay / 2)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64) * spectrum @ mixing
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64) / 50
    mask = torch.rand(rows, size, generator=generator, dtype=torch.float64) < kept
    return inputs.T @ inputs / tokens, weight, mask


class Reference:
    """The quadratic programs of a layer, row by row, in float64."""

    def __init__(self, gram: Tensor, weight: Tensor, mask: Tensor, target: Tensor | None = None, damping: float = 0.0):
        gram, self.weight = gram.double(), weight.double()
        self.alive = gram.diagonal() > 0
        self.mask = mask & self.alive
        pull = damping * gram.diagonal().mean()
        self.gram = gram + pull * torch.eye(len(gram), dtype=torch.float64)
        self.linear = (self.weight @ gram if target is None else target.double()) + pull * self.weight
        self.optimum = torch.zeros_like(self.weight)
        for row, kept in enumerate(self.mask):
            if kept.any():
                root = self.gram[kept][:, kept].diagonal().sqrt()
                matrix = self.gram[kept][:, kept] / root / root[:, None]
                self.optimum[row, kept] = torch.linalg.solve(matrix, self.linear[row, kept] / root) / root

    def objective(self, weight: Tensor) -> Tensor:
        weight = weight.double()
        return ((weight @ self.gram / 2 - self.linear) * weight).sum(1)

    def gap(self, weight: Tensor) -> Tensor:
        """(rows,) f(w) − f*, without the cancellation of the difference."""
        difference = (weight.double() - self.optimum) * self.mask
        return ((difference @ self.gram) * difference).sum(1) / 2

    @property
    def gain(self) -> Tensor:
        """(rows,) what the optimum gains over the masked weights."""
        return self.gap(self.weight * self.mask)


def exact_gap(gram: Tensor, pull: float, weight: Tensor, mask: Tensor, refitted: Tensor) -> list[Fraction]:
    """f(w) − f* of every row for G = W (H + pull·I), in rational numbers."""
    matrix = [[Fraction(x) for x in row] for row in gram.double().tolist()]
    for i in range(len(matrix)):
        matrix[i][i] += Fraction(pull)
    return [
        _exact_row_gap(matrix, [Fraction(x) for x in dense], [i for i, keep in enumerate(kept) if keep], found)
        for dense, kept, found in zip(weight.double().tolist(), mask.tolist(), refitted.double().tolist(), strict=True)
    ]


def _exact_row_gap(matrix: list[list[Fraction]], dense: list[Fraction], kept: list[int], found: list[float]):
    point = [Fraction(x) for x in found]
    residual = [sum((matrix[i][j] * (dense[j] - point[j]) for j in range(len(dense))), Fraction(0)) for i in kept]
    step = _solve([[matrix[i][j] for j in kept] for i in kept], residual)
    return sum((r * s for r, s in zip(residual, step, strict=True)), Fraction(0)) / 2


def _solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gauss-Jordan elimination of a positive definite system."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        rows[i] = pivot = [x / pivot[i] for x in pivot]
        for k, other in enumerate(rows):
            if k != i and other[i]:
                factor = other[i]
                rows[k] = [x - factor * y for x, y in zip(other, pivot, strict=True)]
    return [row[-1] for row in rows]
