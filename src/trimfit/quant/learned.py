"""Block-diagonal transformations learned by gradient descent: the paper's own form (arXiv 2511.19705, section 4.1).

The paper trains an invertible matrix that need not be orthogonal; its loss and its optimiser are not known, so these
are ours. A rounded weight is off by noise of variance s²/12, where the step s of its group follows the group's range.
With U = W T and inputs that are white noise, the layer's expected error is, up to a constant,

    Σ_groups  (Σ_rows range²(U_{row,group})) · Σ_{j in group} (T⁻¹ T⁻ᵀ)_jj

Closed forms put the mean square of a group in place of its squared range, which knows nothing of outliers. Here it is
the p-norm of the group, a smooth maximum. The straight-through gradient of the true error is that of the plain maximum,
as everything else in it cancels, so nothing is lost by leaving the rounding itself out. A group may span several blocks
or be a part of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimfit.quant.blocks import BlockTransform
from trimfit.quant.grid import Grid
from trimfit.refit.gram import widest

LEARNING_RATE = 2e-2  # of the entries of M, which begins as the identity
ROWS = 1024  # in one step; larger layers have other rows in the next
_LARGEST_CONDITION = 100.0  # of a block of M, in Frobenius norms over b; others stay as they began
_LEAST = 1e-4  # of the largest weight: a range smaller than that cannot matter, and its powers would vanish


def learned_transform(
    weights: Sequence[Tensor],
    grid: Grid,
    start: BlockTransform,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
) -> BlockTransform:
    """`start` times diag(M_1, …, M_k), learned by Adam from M = I at a rate that falls to 0. Deterministic.

    - `weights`: (out, n) each, sharing their inputs.
    - `grid`: fitted to n. `start`: its blocks are those of the result.

    Nothing says that the rounded weights are nearer than with `start`: compare them (`best_transform`).
    """
    surrogate = Surrogate(weights, grid, start)
    count, size, _ = start.matrices.shape
    m = torch.eye(size, device=start.matrices.device).repeat(count, 1, 1)
    optimizer = torch.optim.Adam([m], lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        m.grad = surrogate.value_and_gradient(m, step)[1]
        optimizer.step()
    m = m.to(widest(m.device))
    inverse, _ = torch.linalg.inv_ex(m)
    condition = torch.linalg.matrix_norm(m) * torch.linalg.matrix_norm(inverse) / size
    safe = (condition < _LARGEST_CONDITION)[:, None, None]  # never for NaN
    identity = torch.eye(size, dtype=m.dtype, device=m.device)
    matrices = start.matrices.to(m) @ torch.where(safe, m, identity)
    inverses = torch.where(safe, inverse, identity) @ start.inverses.to(m)
    return BlockTransform(matrices.float(), inverses.float(), f"learned from {start.name}")


class Surrogate:
    """The expected error as a function of M, for U = W · start · M, relative to its value at M = I."""

    def __init__(self, weights: Sequence[Tensor], grid: Grid, start: BlockTransform):
        stacked = torch.cat([weight.detach().float() for weight in weights])
        largest = stacked.abs().amax().clamp(min=torch.finfo(stacked.dtype).tiny)  # or squares vanish or overflow
        self._weight = start.forward(stacked / largest)
        self._batches = -(-len(stacked) // ROWS)
        self._group = grid.group_size or stacked.shape[1]
        self._symmetric = grid.symmetric
        undone = start.inverses
        self._noise = undone @ undone.mT
        self._unit = torch.ones((), device=undone.device)
        unit, _ = self.value_and_gradient(torch.eye(undone.shape[1], device=undone.device).expand_as(undone), 0)
        self._unit = torch.where(unit > 0, unit, self._unit)

    def value_and_gradient(self, m: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Value () and k times the gradient (k, b, b) at M (k, b, b), with the rows whose turn it is in that step."""
        count, size, _ = m.shape
        weight = self._weight[step % self._batches :: self._batches]
        blocks = weight.unflatten(1, (count, size)).transpose(0, 1)  # (k, rows, b)
        moved = (blocks @ m).transpose(0, 1).reshape(len(weight), -1, self._group)
        squares, slope = _squared_ranges(moved, self._symmetric)  # (groups,), (rows, groups, g)

        inverse, _ = torch.linalg.inv_ex(m)
        undone = inverse @ self._noise
        noise = (undone * inverse).sum(2).view(-1, self._group).sum(1)  # (groups,)
        slope = slope.mul_(noise[:, None]).view(len(weight), count, size).transpose(0, 1)
        column = squares.repeat_interleave(self._group).view(count, size, 1)
        gradient = blocks.mT @ slope - inverse.mT @ (2 * column * undone) @ inverse.mT
        return squares @ noise / self._unit, gradient * (count / self._unit)


def _squared_ranges(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Σ_rows range² (G,) of the groups (rows, G, g), and its derivative (rows, G, g).

    The range is ‖positive part‖₈ + ‖negative part‖₈, or ‖all‖₈ on a symmetric grid, up to a factor.
    """
    if symmetric:
        norm, slope = _eighth_norm(groups)
        return norm.square().sum((0, 2)), slope.mul_(2 * norm)
    above = groups.clamp(min=0)
    high, rise = _eighth_norm(above)
    low, fall = _eighth_norm(above.sub_(groups))
    span = high + low
    return span.square().sum((0, 2)), rise.sub_(fall).mul_(2 * span)


def _eighth_norm(groups: Tensor) -> tuple[Tensor, Tensor]:
    """‖·‖₈ (rows, G, 1) of the groups (rows, G, g), and its derivative (rows, G, g)."""
    square = groups * groups
    fourth = square * square
    norm = torch.linalg.vector_norm(fourth, dim=2, keepdim=True).pow_(0.25).clamp_(min=_LEAST)
    return norm, fourth.mul_(square).mul_(groups).div_(norm.pow(7))
