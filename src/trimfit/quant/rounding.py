"""Adaptive rounding against a Gram matrix: the least ‖(Ŵ − W) X‖² that codes and scales on a grid can be brought to.

Three steps, of which the later ones never raise the error of a row:
1. error feedback: columns from first to last; what rounding one loses, the ones to its right make up for. This is LDLQ
   (QuIP, arXiv 2307.13304), known as GPTQ (arXiv 2210.17323) when the Gram matrix is that of data. From finer and
   coarser scales than those of the clip search too, as what is made up for needs other scales; the best for each row;
2. coordinate descent: each code in turn to the level nearest to its optimum, all others fixed, all rows at once;
3. with it, each scale to its optimum, all codes fixed.
"""

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Levels, Quantized, check_weight, place_levels, storable_scale
from trimfit.refit.gram import FactoredGram

BLOCK = 32  # columns that are updated one by one before the rest is, by one GEMM
SWEEPS = 2  # of coordinate descent; later ones change little
_DEAD = 1e-6  # what a dead input counts, of a mean one: it is rounded to nearest and does not move a scale
OTHER_SCALES = (0.9, 1.1)  # times those of the clip search, tried beside them; measured: closer or more gain no more


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
    """Steps (code − zero point) and scales of one layer, all in the dtype of the work, and how they are improved.

    Everything is transposed, (in, out) or (groups, out): what is done to one input at a time is then contiguous.
    """

    def __init__(self, weight: Tensor, levels: Levels, gram: FactoredGram, kept: Tensor | None):
        self._levels = levels
        self._weight = weight.T.contiguous()
        self._kept = None if kept is None else kept.T.to(weight).contiguous()
        self._scale = self._scaled(1.0)
        self._low = -levels.zero_point.T.to(weight).contiguous()
        self._high = self._low + levels.grid.largest
        self._steps = torch.empty_like(self._weight)
        hessian = gram.raw.to(weight, copy=True)
        hessian.diagonal().add_(gram.damping_weight)
        hessian.diagonal()[gram.dead] = _DEAD * (gram.mean_diagonal or 1.0)
        self._counts = torch.where(gram.dead, hessian.diagonal(), 1.0)  # over U_jj, which is 1 for a dead input
        self._hessian = hessian
        self._group = len(self._weight) // len(self._scale)

    def quantized(self, dtype: torch.dtype) -> Quantized:
        codes = (self._steps - self._low.repeat_interleave(self._group, 0)).T.to(torch.uint8)
        scale = self._scale.T.to(dtype)
        return Quantized(codes.contiguous(), scale.contiguous(), self._levels.zero_point, self._levels.grid)

    def feed_back(self, factor: Tensor) -> None:
        """Error feedback with the upper factor U (in, in) of the inverse Gram matrix, from several scales."""
        least = self._feed_back(factor)
        for ratio in OTHER_SCALES:
            before = self._scale, self._steps
            self._scale, self._steps = self._scaled(ratio), torch.empty_like(self._steps)
            error = self._feed_back(factor)
            better, least = error < least, torch.minimum(error, least)
            after = self._scale, self._steps
            self._scale, self._steps = (torch.where(better, new, old) for new, old in zip(after, before, strict=True))

    def _scaled(self, ratio: float) -> Tensor:
        """The scales (groups, out) of the clip search, multiplied, as they can be stored."""
        scale = self._levels.scale.T.to(self._weight) * ratio
        return storable_scale(scale, self._levels.scale.dtype).to(scale).contiguous()

    def _feed_back(self, factor: Tensor) -> Tensor:
        """Rounds once. Returns each row's error (out,): Σ e_j², e_j being what column j loses, over U_jj."""
        target = self._weight.clone()
        total = torch.zeros_like(target[0])
        width = len(target)
        errors = torch.empty_like(target[:BLOCK])
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            block = target[start:stop]
            diagonal = factor[start:stop, start:stop]
            for j, row in enumerate(block):
                torch.sub(row, self._nearest(row, start + j), out=errors[j]).div_(diagonal[j, j])
                block[j + 1 :].addr_(diagonal[j, j + 1 :], errors[j], alpha=-1)
            target[stop:].addmm_(factor[start:stop, stop:].T, errors[: len(block)], alpha=-1)
            total += self._counts[start:stop] @ errors[: len(block)].square()
        return total

    def descend(self) -> None:
        """One sweep of coordinate descent over all codes and, group by group, over the scales."""
        width = len(self._weight)
        difference = self._value(0, width).sub_(self._weight)
        for start in range(0, width, self._group):
            stop = start + self._group
            gradient = self._hessian[start:stop] @ difference
            for first in range(start, stop, BLOCK):
                self._descend_block(gradient, start, first, min(first + BLOCK, stop))
            self._move_scale(gradient, start, stop)
            torch.sub(self._value(start, stop), self._weight[start:stop], out=difference[start:stop])

    def _descend_block(self, gradient: Tensor, start: int, first: int, last: int) -> None:
        """Codes of the inputs [first, last); `gradient` is that of their group, which begins at `start`."""
        stop = start + len(gradient)
        hessian = self._hessian[first:last, first:last]
        slope = gradient[first - start : last - start].clone()
        before = self._value(first, last)
        change = torch.empty_like(before)
        for j, old in enumerate(before):
            level = self._nearest(old - slope[j] / hessian[j, j], first + j)
            torch.sub(level, old, out=change[j])
            slope[j + 1 :].addr_(hessian[j, j + 1 :], change[j])
        gradient.addmm_(self._hessian[start:stop, first:last], change)

    def _move_scale(self, gradient: Tensor, start: int, stop: int) -> None:
        """The scale of a group to its optimum, where the scale as stored lowers the error."""
        steps = self._steps[start:stop]
        slope = (steps * gradient).sum(0)
        curvature = (steps * (self._hessian[start:stop, start:stop] @ steps)).sum(0)
        old = self._scale[start // self._group]
        new = storable_scale(old - slope / curvature, self._levels.scale.dtype).to(old)
        move = new - old
        better = move * (2 * slope + move * curvature) < 0  # never where the curvature is 0: the comparison is with NaN
        self._scale[start // self._group] = torch.where(better, new, old)

    def _nearest(self, target: Tensor, row: int) -> Tensor:
        """Rounds the weights (out,) of one input to their levels and keeps the steps; returns the values."""
        group = row // self._group
        scale, steps = self._scale[group], self._steps[row]
        torch.div(target, scale, out=steps).round_()
        torch.clamp(steps, self._low[group], self._high[group], out=steps)
        if self._kept is not None:
            steps *= self._kept[row]
        return steps * scale

    def _value(self, start: int, stop: int) -> Tensor:
        """The weights of the inputs [start, stop) as they are now."""
        groups = torch.arange(start, stop, device=self._scale.device) // self._group
        return self._steps[start:stop] * self._scale[groups]


def gram_error(quantized: Tensor, weight: Tensor, gram: Tensor) -> float:
    """tr((Ŵ − W) H (Ŵ − W)ᵀ) relative to tr(W H Wᵀ), for weights (out, in) and a Gram matrix (in, in)."""
    difference = (quantized.to(weight.dtype) - weight).to(gram.dtype)
    reference = weight.to(gram.dtype)
    energy = ((reference @ gram) * reference).sum()
    return (((difference @ gram) * difference).sum() / energy).item() if energy > 0 else 0.0


__all__ = ["BLOCK", "OTHER_SCALES", "SWEEPS", "gram_error", "round_to_gram"]
