"""The grid: the levels that the weights of a group can take, and how to place them with the least squared error."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimfit.errors import InputError

_CLIP_RATIOS = tuple(1.0 - 0.04 * step for step in range(16))  # of the range of the group: 1.00 … 0.40


@dataclass(frozen=True)
class Grid:
    """Which levels a quantizer may use.

    - `bits`: 2 to 8, for 2**bits levels.
    - `group_size`: weights along the input that share a scale and a zero point; None is the whole row ("channel").
    - `symmetric`: the zero point is in the middle, 2**(bits-1), and not stored.

    Levels are scale · (code − zero point), so 0 is always one of them: pruned weights stay pruned.
    """

    bits: int
    group_size: int | None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits must be from 2 to 8, but they are {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"the group size must be positive, but it is {self.group_size}")

    @property
    def largest(self) -> int:
        """The largest code, 2**bits − 1; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def fitted(self, width: int) -> "Grid":
        """This grid for rows of `width` weights: the group is the smallest divisor of the width that is no smaller.

        Never more scales than were asked for; narrow layers have one group for each row.
        """
        if self.group_size is None or self.group_size >= width:
            return replace(self, group_size=None)
        size = next(size for size in range(self.group_size, width + 1) if width % size == 0)
        return replace(self, group_size=None if size == width else size)


@dataclass(frozen=True)
class Levels:
    """A scale and a zero point for each group.

    - `scale`: (out, groups), positive, in the dtype in which it is stored.
    - `zero_point`: (out, groups) uint8 codes of the level 0.
    """

    grid: Grid
    scale: Tensor
    zero_point: Tensor

    def columns(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each weight, (out, width), in the dtype of the scale."""
        repeat = width // self.scale.shape[1]
        zero = self.zero_point.to(self.scale.dtype)
        return self.scale.repeat_interleave(repeat, 1), zero.repeat_interleave(repeat, 1)

    def nearest(self, weight: Tensor) -> "Quantized":
        """Each weight (out, in) at its nearest level, found in float32 or better."""
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        scale, zero = (part.to(wide) for part in self.columns(weight.shape[1]))
        codes = (weight / scale).round_().add_(zero).clamp_(0, self.grid.largest)
        return Quantized(codes.to(torch.uint8), self.scale, self.zero_point, self.grid)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: level = (code − zero point) · scale.

    - `codes`: (out, in) uint8 in [0, 2**bits − 1].
    - `scale`: (out, groups) in the dtype in which it is stored.
    - `zero_point`: (out, groups) uint8 in [0, 2**bits − 1]; 2**(bits − 1) everywhere for a symmetric grid.
    - `grid`: the grid, whose group size divides `in`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    @property
    def levels(self) -> Levels:
        """Scale and zero point alone."""
        return Levels(self.grid, self.scale, self.zero_point)

    def dequantize(self) -> Tensor:
        """(out, in) weights in the dtype of the scale."""
        scale, zero = self.levels.columns(self.codes.shape[1])
        return (self.codes.to(scale.dtype) - zero) * scale


def place_levels(
    weight: Tensor,
    grid: Grid,
    *,
    importance: Tensor | None = None,
    clip: bool = True,
    dtype: torch.dtype | None = None,
) -> Levels:
    """Scale and zero point of each group with the least Σ importance · (w − nearest level)².

    **Arguments**

    - `weight`: (out, in) floating; computed in float32, or float64 if it is that.
    - `grid`: fitted to `in`.
    - `importance`: (in,) ≥ 0 weights of the squared errors, 1 where None.
    - `clip`: whether to search how much of the range to give up; otherwise the range is covered.
    - `dtype`: in which scales are stored and therefore rounded before the search; that of `weight` where None.
    """
    check_weight(weight, grid)
    if importance is not None and not _are_costs(importance, weight.shape[1]):
        raise InputError(f"the importance must be {weight.shape[1]} finite numbers that are not negative")
    dtype = dtype or weight.dtype
    work = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    groups = work.unflatten(1, (-1, grid.group_size or work.shape[1]))
    cost = None if importance is None else importance.to(work).view(groups.shape[1:])
    counted = groups if cost is None else groups * (cost > 0)
    low, high = counted.amin(-1).clamp_(max=0), counted.amax(-1).clamp_(min=0)
    unit = _unit(torch.maximum(-low, high))[..., None]
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.full_like(low, 0 if not grid.symmetric else grid.middle)
    for ratio in _CLIP_RATIOS if clip else (1.0,):
        step, point = _spread(low * ratio, high * ratio, grid)
        for _ in range(2 if clip else 1):
            step = storable_scale(step, dtype).to(work)
            steps = (groups / step[..., None]).round_().add_(point[..., None]).clamp_(0, grid.largest)
            steps.sub_(point[..., None])
            error = _squares((steps * step[..., None]).sub_(groups).div_(unit), cost)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, step, scale)
            zero = torch.where(better, point, zero)
            step = _least_squares(steps, groups, cost, step)
    return Levels(grid, scale.to(dtype), zero.to(torch.uint8))


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as `dtype` holds them, never 0 or infinite: the least number stands for all that is smaller.

    In float16 it is the least of all, as steps of 8 bits are often below the normal ones; elsewhere the least normal.
    """
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    return scale.clamp(least, limits.max).to(dtype)


def check_weight(weight: Tensor, grid: Grid) -> None:
    """Raises `InputError` for weights that cannot be quantized on the grid."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise InputError(
            f"the weight must be a floating matrix (out, in), but it is {weight.dtype} of {tuple(weight.shape)}"
        )
    if grid.group_size is not None and weight.shape[1] % grid.group_size:
        raise InputError(
            f"groups of {grid.group_size} do not divide {weight.shape[1]} inputs; use grid.fitted({weight.shape[1]})"
        )
    if not torch.isfinite(weight).all():
        raise InputError("the weight has NaN or infinite entries: the model is damaged")


def _are_costs(importance: Tensor, width: int) -> bool:
    return importance.shape == (width,) and bool((importance.isfinite() & (importance >= 0)).all())


def _spread(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which the levels reach from `low` ≤ 0 to `high` ≥ 0."""
    if grid.symmetric:
        step = torch.maximum(-low / grid.middle, high / (grid.largest - grid.middle))
        return _positive(step), torch.full_like(low, grid.middle)
    step = _positive((high - low) / grid.largest)
    return step, (-low / step).round_().clamp_(0, grid.largest)


def _positive(step: Tensor) -> Tensor:
    """A group of zeros has no range; any scale serves it."""
    return torch.where(step > 0, step, 1)


def _unit(largest: Tensor) -> Tensor:
    """A power of two near the largest magnitude: in it, squares neither overflow nor vanish, and digits stay."""
    limits = torch.finfo(largest.dtype)
    return _positive(largest).clamp(limits.tiny, limits.max / 2).log2().floor().exp2()


def _squares(error: Tensor, cost: Tensor | None) -> Tensor:
    squares = error.square_()
    return (squares if cost is None else squares.mul_(cost)).sum(-1)


def _least_squares(steps: Tensor, groups: Tensor, cost: Tensor | None, step: Tensor) -> Tensor:
    """The best scale for these codes; the old one where all of them are 0."""
    weighted = steps if cost is None else steps * cost
    new = (weighted * groups).sum(-1) / (weighted * steps).sum(-1)
    return torch.where(torch.isfinite(new) & (new > 0), new, step)
