"""Adaptive rounding against a Gram matrix: the least ‖(Ŵ − W) X‖² that codes and scales on a grid can be brought to.

Three steps, each of which only lowers the error that it leaves:
1. error feedback: columns from first to last; what rounding one loses, the ones to its right make up for. This is LDLQ
   (QuIP, arXiv 2307.13304), known as GPTQ (arXiv 2210.17323) when the Gram matrix is that of data;
2. coordinate descent: each code in turn to the level nearest to its optimum, all others fixed, all rows at once;
3. with it, each scale to its optimum, all codes fixed.
"""

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Levels, Quantized, check_weight, place_levels, storable_scale
from trimfit.refit.gram import FactoredGram

BLOCK = 128  # columns that are updated one by one before the rest is, by one GEMM
SWEEPS = 2  # of coordinate descent; later ones change little


def round_to_gram(
    weight: Tensor,
    grid: Grid,
    gram: FactoredGram,
    *,
    dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
    sweeps: int = SWEEPS,
) -> Quantized:
    """Codes and scales for the least tr((Ŵ − W) H (Ŵ − W)ᵀ), H being the damped Gram matrix.

    **Arguments**

    - `weight`: W (out, in) floating.
    - `grid`: fitted to `in`.
    - `gram`: of the layer's inputs, (in, in), on the device of the weight.
    - `dtype`: in which scales are stored; that of `weight` where None.
    - `kept`: (out, in) bool; where it is False the level is 0, and the others make up for what that loses.
    - `sweeps`: of coordinate descent over codes and scales after the error feedback.

    **Returns** the quantized weight; zero points are those of the plain clip search. Raises `InputError` for tensors
    that do not fit together.
    """
    check_weight(weight, grid)
    if gram.size != weight.shape[1]:
        raise InputError(f"the Gram matrix is of {gram.size} inputs, but the weight has {weight.shape[1]}")
    if kept is not None and (kept.shape != weight.shape or kept.dtype != torch.bool):
        raise InputError(
            f"the mask of kept weights must be bool of {tuple(weight.shape)}, but it is {kept.dtype} of "
            f"{tuple(kept.shape)}"
        )
    dtype = dtype or weight.dtype
    work = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    levels = place_levels(work, grid, dtype=dtype)
    solution = _Solution(work, levels, gram, kept)
    solution.feed_back(gram.inverse_factor.to(work))
    for _ in range(sweeps):
        solution.descend()
    return solution.quantized(dtype)


class _Solution:
    """Steps (code − zero point) and scales of one layer, all in the dtype of the work, and how they are improved."""

    def __init__(self, weight: Tensor, levels: Levels, gram: FactoredGram, kept: Tensor | None):
        self._weight, self._levels = weight, levels
        self._storage = levels.scale.dtype
        self._kept = None if kept is None else kept.to(weight)
        self._scale = levels.scale.to(weight)
        self._zero = levels.zero_point.to(weight)
        self._steps = torch.zeros_like(weight)
        hessian = gram.raw.clone()
        hessian.diagonal().add_(gram.damping_weight)
        hessian.diagonal()[gram.dead] = gram.mean_diagonal or 1.0  # a dead input is rounded to nearest
        self._hessian = hessian.to(weight)
        self._group = weight.shape[1] // levels.scale.shape[1]

    def quantized(self, dtype: torch.dtype) -> Quantized:
        codes = self._steps + self._zero.repeat_interleave(self._group, 1)
        return Quantized(codes.to(torch.uint8), self._scale.to(dtype), self._levels.zero_point, self._levels.grid)

    def feed_back(self, factor: Tensor) -> None:
        """Error feedback with the upper factor U (in, in) of the inverse Gram matrix."""
        target = self._weight.clone()
        width = target.shape[1]
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            errors = torch.zeros_like(target[:, start:stop])
            for column in range(start, stop):
                rounded = self._nearest(target[:, column], column)
                error = (target[:, column] - rounded) / factor[column, column]
                target[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
                errors[:, column - start] = error
            target[:, stop:] -= errors @ factor[start:stop, stop:]

    def descend(self) -> None:
        """One sweep of coordinate descent over all codes and, group by group, over the scales."""
        width = self._weight.shape[1]
        gradient = (self._value(0, width) - self._weight) @ self._hessian
        for start in range(0, width, self._group):
            stop = start + self._group
            before = self._value(start, stop)
            inner = gradient[:, start:stop].clone()
            for first in range(start, stop, BLOCK):
                self._descend_block(inner, start, first, min(first + BLOCK, stop))
            self._move_scale(inner, start, stop)
            if stop < width:  # columns to the left are not visited again in this sweep
                change = self._value(start, stop) - before
                gradient[:, stop:] += change @ self._hessian[start:stop, stop:]

    def _descend_block(self, inner: Tensor, start: int, first: int, last: int) -> None:
        """Codes of columns [first, last); `inner` is the gradient of their group, which begins at `start`."""
        before = self._value(first, last)
        hessian = self._hessian[first:last, first:last]
        block = inner[:, first - start : last - start].clone()
        current = before.clone()
        for j in range(last - first):
            optimum = current[:, j] - block[:, j] / hessian[j, j]
            change = self._nearest(optimum, first + j) - current[:, j]
            block += torch.outer(change, hessian[j])
            current[:, j] += change
        stop = start + inner.shape[1]
        inner += (current - before) @ self._hessian[first:last, start:stop]

    def _move_scale(self, inner: Tensor, start: int, stop: int) -> None:
        """The scale of a group to its optimum, where the scale as stored lowers the error."""
        steps = self._steps[:, start:stop]
        slope = (steps * inner).sum(1)
        curvature = ((steps @ self._hessian[start:stop, start:stop]) * steps).sum(1)
        old = self._scale[:, start // self._group]
        new = storable_scale(old - slope / curvature, self._storage).to(old)
        move = new - old
        better = move * (2 * slope + move * curvature) < 0  # never where the curvature is 0: the comparison is with NaN
        self._scale[:, start // self._group] = torch.where(better, new, old)

    def _nearest(self, target: Tensor, column: int) -> Tensor:
        """Rounds one column to its levels and keeps the steps; returns the values."""
        scale, zero = self._scale[:, column // self._group], self._zero[:, column // self._group]
        steps = (target / scale).round_()
        steps = torch.minimum(torch.maximum(steps, -zero), self._levels.grid.largest - zero)
        if self._kept is not None:
            steps *= self._kept[:, column]
        self._steps[:, column] = steps
        return steps * scale

    def _value(self, start: int, stop: int) -> Tensor:
        """The weights of columns [start, stop) as they are now; `start` begins a group, or all are in one."""
        groups = torch.arange(start, stop, device=self._scale.device) // self._group
        return self._steps[:, start:stop] * self._scale[:, groups]


def gram_error(quantized: Tensor, weight: Tensor, gram: Tensor) -> float:
    """tr((Ŵ − W) H (Ŵ − W)ᵀ) relative to tr(W H Wᵀ), for weights (out, in) and a Gram matrix (in, in)."""
    difference = (quantized.to(weight.dtype) - weight).to(gram.dtype)
    reference = weight.to(gram.dtype)
    energy = ((reference @ gram) * reference).sum()
    return (((difference @ gram) * difference).sum() / energy).item() if energy > 0 else 0.0


__all__ = ["BLOCK", "SWEEPS", "Levels", "gram_error", "round_to_gram"]
