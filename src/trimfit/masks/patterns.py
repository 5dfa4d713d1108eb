"""What masks are allowed, and the best mask of a pattern for given scores. Counts are exact, to the weight."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trimfit.errors import InputError

Scope: TypeAlias = Literal["row", "layer"]


@dataclass(frozen=True)
class Unstructured:
    """Any weights may go, until `sparsity` of them are gone.

    - `sparsity`: share of the weights to prune, in [0, 1). A `Fraction` k / (out·in) prunes exactly k of a layer.
    - `scope`: where weights compete: "row" prunes equally many in each row, "layer" wherever in the layer is best.

    Raises `InputError` for values outside these.
    """

    sparsity: float | Fraction
    scope: Scope

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, but it is {self.sparsity}")
        if self.scope not in ("row", "layer"):
            raise InputError(f'the scope of a sparsity must be "row" or "layer", but it is {self.scope!r}')


@dataclass(frozen=True)
class NM:
    """`n` weights are kept of each `m` consecutive inputs of a row, 0 < n < m. Raises `InputError` for others."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.n == self.m:
            raise InputError(f"the pattern {self.n}:{self.m} keeps every weight, so there would be nothing to prune")
        if not 0 < self.n < self.m:
            raise InputError(
                f"the pattern {self.n}:{self.m} is impossible: in N:M, N weights are kept of each M, so 0 < N < M"
            )

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned."""
        return 1 - self.n / self.m


Pattern: TypeAlias = Unstructured | NM


def parse_pattern(text: str) -> NM:
    """The N:M pattern written as "2:4". Raises `InputError` when the text is not one."""
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text.strip())
    if match is None:
        raise InputError(f"cannot read the pattern {text!r}: write N:M, such as 2:4 for 2 weights kept of each 4")
    return NM(int(match[1]), int(match[2]))


def check_width(pattern: Pattern, width: int) -> None:
    """Raises `InputError` when a layer of `width` inputs cannot have this pattern."""
    if isinstance(pattern, NM) and width % pattern.m != 0:
        raise InputError(
            f"{width} inputs cannot be split into groups of {pattern.m} for the pattern {pattern.n}:{pattern.m}; "
            f"choose an M that divides {width}, or an unstructured sparsity"
        )


def prune_counts(pattern: Unstructured, shape: tuple[int, int], start: int = 0, stop: int | None = None) -> Tensor:
    """How many weights to prune in columns [start, stop): int64, of shape (out,) for scope "row", (1,) for "layer".

    The counts of adjacent ranges of columns add up: over all columns to round(sparsity·out·in) for both scopes, and in
    each row to its share of that, rounded down or up. `shape` is (out, in); `stop` is `in` when left out.
    """
    rows, width = shape
    stop = width if stop is None else stop
    # The decimal that the user wrote, not the float nearest to it: 0.7 * 45 is 31.5, but 31.499… in floats.
    # A fraction goes through its text unchanged.
    total = round(Fraction(str(pattern.sparsity)) * rows * width)
    groups = 1 if pattern.scope == "layer" else rows
    counts = (torch.arange(groups + 1) * total // groups).diff()
    return counts * stop // width - counts * start // width


def keep_best(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the pattern that keeps the highest scores: (out, in) bool, True = kept.

    `scores` is (out, in), of any real dtype. Of equal scores the one with the lower index is kept.

    Raises `InputError` for NaN scores and for a width that does not suit the pattern.
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise InputError(f"scores must have shape (out, in), but their shape is {tuple(scores.shape)}")
    rows, width = scores.shape
    check_width(pattern, width)
    return prune_lowest(scores, run_counts(pattern, (rows, width)))


def run_counts(pattern: Pattern, shape: tuple[int, int]) -> Tensor:
    """int64, how many weights to prune in each run of a layer (out, in): in it all, in each row, or in each group."""
    if isinstance(pattern, NM):
        return torch.full((shape[0] * shape[1] // pattern.m,), pattern.m - pattern.n)
    return prune_counts(pattern, shape)


def prune_lowest(scores: Tensor, counts: Tensor) -> Tensor:
    """Prunes the `counts[i]` lowest of run i, where the flattened scores are split into `len(counts)` equal runs.

    So (1,) counts let the whole layer compete, (out,) counts each row, and (out·in/m,) counts each group of m.
    Returns a bool mask of the shape and on the device of `scores`, True = kept. Ties and errors as in `keep_best`.
    """
    check_numbers(scores)
    runs = scores.reshape(len(counts), -1)
    kept = runs.shape[1] - counts.to(scores.device)
    # A stable sort is what makes ties deterministic; its descending order puts the lower index first.
    order = runs.sort(dim=1, descending=True, stable=True).indices
    is_kept = torch.arange(runs.shape[1], device=scores.device) < kept[:, None]
    return torch.empty_like(runs, dtype=torch.bool).scatter_(1, order, is_kept).view(scores.shape)


def check_numbers(scores: Tensor) -> None:
    """Raises `InputError` for scores that are NaN."""
    if torch.isnan(scores).any():
        raise InputError("the scores of the weights have NaN entries: the model or the calibration data is damaged")
