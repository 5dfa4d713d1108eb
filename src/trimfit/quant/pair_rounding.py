"""Rounding both factors of a pair so that their product stays: alternately, each to make up for the other's errors.

A (heads, g·d, r) are O's columns and B (heads, r, n) V's rows of each KV head, and the objective is
Σ_heads ‖(A B − Â B̂) C^{1/2}‖² + ‖(A − Â) β‖² with C the Gram matrix of V's inputs and β its bias. With either factor
fixed the other is an integer least-squares problem. Here both have the r channels first, Aᵀ and B, and so both problems
have one form: over levels X (heads, r, m), the least

    tr[(X − T)ᵀ H (X − T) W],    T = H⁻¹ · cross · (X before rounding)

    for Âᵀ:  H = B̂ C B̂ᵀ + β βᵀ,  cross = B̂ C Bᵀ + β βᵀ,  W = I      for B̂:  H = ÂᵀÂ,  cross = ÂᵀA,  W = C

With `nearest_to_pseudo_inverse` that is CafeQ's alternation (arXiv 2511.19705, sec. 5), as far as it is known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Quantized, check_weight, place_levels
from trimfit.quant.nearest_plane import Lattice, unit_lower, with_feedback, with_ridge
from trimfit.refit.gram import widest

Solver = Callable[[Tensor, Tensor, Tensor, Lattice, Tensor | None], Tensor]
"""New levels from H, the cross matrix, the factor itself, its lattice, and the factor L of C if inputs are coupled."""


@dataclass(frozen=True)
class Pair:
    """The weights of V and O, and where in them the factors of each KV head are.

    - `value` (out, n) floating: has the rows B of all heads, perhaps among others.
    - `output` (d, in) floating: has the columns A of all heads.
    - `value_rows` (heads, r) int64.
    - `output_columns` (heads, g, r) int64: for each of the g query heads of a KV head.
    - `bias` (heads, r): what is added to the values of each head, or None. It is not rounded.
    """

    value: Tensor
    output: Tensor
    value_rows: Tensor
    output_columns: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        heads_and_r = (self.output_columns.shape[0], self.output_columns.shape[-1])
        if self.output_columns.dim() != 3 or self.value_rows.shape != heads_and_r or 0 in self.output_columns.shape:
            raise InputError(
                f"rows (heads, r) and columns (heads, g, r) are needed, but these are of "
                f"{tuple(self.value_rows.shape)} and {tuple(self.output_columns.shape)}"
            )
        if self.value_rows.max() >= len(self.value) or self.output_columns.max() >= self.output.shape[1]:
            raise InputError("the pair has rows or columns that its weights do not have")
        if self.bias is not None and self.bias.shape != self.value_rows.shape:
            raise InputError(f"biases {tuple(self.value_rows.shape)} are needed, not {tuple(self.bias.shape)}")

    def gather_value(self, matrix: Tensor) -> Tensor:
        """(heads, r, n) out of anything shaped as `value`: B, for the weights."""
        return matrix[self.value_rows]

    def gather_output(self, matrix: Tensor) -> Tensor:
        """(heads, r, g·d) out of anything shaped as `output`: Aᵀ, for the weights."""
        return matrix[:, self.output_columns].permute(1, 3, 2, 0).flatten(2)

    def scatter_value(self, factor: Tensor, matrix: Tensor) -> Tensor:
        """A copy of `matrix`, shaped as `value`, with the heads' rows from `factor` (heads, r, n)."""
        matrix = matrix.clone()
        matrix[self.value_rows] = factor.to(matrix)
        return matrix

    def scatter_output(self, factor: Tensor, matrix: Tensor) -> Tensor:
        """A copy of `matrix`, shaped as `output`, with the heads' columns from `factor` (heads, r, g·d)."""
        matrix = matrix.clone()
        group = self.output_columns.shape[1]
        matrix[:, self.output_columns] = factor.unflatten(2, (group, -1)).permute(3, 0, 2, 1).to(matrix)
        return matrix


@dataclass(frozen=True)
class RoundedPair:
    """Both layers with all of their rows and columns, and how the product's error went.

    - `value`, `output`: the quantized layers.
    - `errors`: (sweeps + 1, heads) ‖(A B − Â B̂) C^{1/2}‖² + ‖(A − Â) β‖² at the start and after each sweep.
    - `energy`: (heads,) ‖A B C^{1/2}‖² + ‖A β‖².
    """

    value: Quantized
    output: Quantized
    errors: Tensor
    energy: Tensor

    @property
    def relative_error(self) -> float:
        """The error of all heads over their energy; 0 where there is no energy."""
        energy = self.energy.sum().item()
        return self.errors[-1].sum().item() / energy if energy > 0 else 0.0


def nearest_pair(
    pair: Pair,
    value_grid: Grid,
    output_grid: Grid,
    *,
    input_gram: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Quantized, Quantized]:
    """V and O at their nearest levels, which are placed with errors weighted by the mean squares of the inputs.

    Those of V are the diagonal of C, `input_gram` as in `round_pair`; those of O the diagonals of B C Bᵀ, as if every
    query attended to one token. Grids are fitted to the layers; `dtype` is as in `place_levels`.
    """
    gram = _checked_gram(input_gram, pair)
    b = pair.gather_value(pair.value.detach()).to(widest(pair.value.device))
    energy = (_seen(b, gram) * b).sum(-1).clamp_(min=0)  # rounding may leave less
    energy = energy if pair.bias is None else energy + pair.bias.to(energy).square()
    seen = torch.zeros(pair.output.shape[1], dtype=b.dtype, device=b.device)
    for columns in pair.output_columns.unbind(1):
        seen[columns] = energy
    value_grid, output_grid = value_grid.fitted(pair.value.shape[1]), output_grid.fitted(pair.output.shape[1])
    inputs = gram.diagonal() if gram is not None and gram.dim() == 2 else gram
    return (
        place_levels(pair.value, value_grid, importance=inputs, dtype=dtype).nearest(pair.value),
        place_levels(pair.output, output_grid, importance=seen, dtype=dtype).nearest(pair.output),
    )


def round_pair(
    pair: Pair,
    start: tuple[Quantized, Quantized],
    *,
    input_gram: Tensor | None = None,
    sweeps: int = 3,
    keep_zeros: bool = False,
    solver: Solver = with_feedback,
) -> RoundedPair:
    """Alternates between the factors by error feedback; keeps, head by head, only what makes the product's error less.

    With the other factor fixed, a target is set that makes up for its errors; then the r channels are rounded one after
    the other, each to make up for the errors of those before it (LDLQ, arXiv 2307.13304), and once more, each given all
    others. Where C is more than a diagonal, errors of B are fed back along its inputs too, in place of the second pass.

    **Arguments**

    - `start`: V and O, from `nearest_pair` or rounded in any other way. Their scales and zero points stay, and so do
      the codes of what is in no pair. A head starts from the nearest of these levels if that is better.
    - `input_gram`: C (n, n), or its diagonal (n,), or None for the identity.
    - `sweeps`: how often both factors are rounded. It ends earlier when nothing changes any more.
    - `keep_zeros`: whether the pair's weights that are exactly 0 become, and stay, 0.
    - `solver`: of one factor's problem; `nearest_to_pseudo_inverse`, for comparisons, is the paper's likely form.

    Levels are taken as they are stored, without what a product of code and scale loses in 16 bits. Computed in float32,
    or float64 if a weight is that; Gram matrices and errors in the widest dtype of the device. Raises `InputError` for
    what does not fit together.
    """
    return _alternate(pair, start, input_gram, sweeps, keep_zeros, solver)


def product_errors(pair: Pair, value: Tensor, output: Tensor, input_gram: Tensor | None = None) -> Tensor:
    """(heads,) ‖(A B − Â B̂) C^{1/2}‖² + ‖(A − Â) β‖² for other weights of V and O, in the widest dtype."""
    product = _Product(pair, _checked_gram(input_gram, pair))
    return product.errors(pair.gather_output(output), pair.gather_value(value))


class _Product:
    """A [B C^{1/2}, β] of all heads, and how far other factors are from it. A is transposed, (heads, r, g·d)."""

    def __init__(self, pair: Pair, gram: Tensor | None):
        wide = widest(pair.value.device)
        self.a = pair.gather_output(pair.output.detach()).to(wide)
        self.b = pair.gather_value(pair.value.detach()).to(wide)
        self._gram = gram
        bias = torch.zeros_like(self.b[..., 0]) if pair.bias is None else pair.bias.detach().to(self.b)
        self._constant = bias[:, :, None] * bias[:, None, :]  # of the values' second moment
        self.seen_b = self.seen(self.b)
        self._gram_a = self.a @ self.a.mT

    def seen(self, b: Tensor) -> Tensor:
        """B C, (heads, r, n)."""
        return _seen(b, self._gram)

    def energy(self) -> Tensor:
        """(heads,) ‖A B C^{1/2}‖² + ‖A β‖²."""
        return (self._gram_a * (self.seen_b @ self.b.mT + self._constant)).sum((1, 2))

    def around(self, b_hat: Tensor, seen_b_hat: Tensor) -> tuple[Tensor, Tensor]:
        """H and the cross matrix for Âᵀ, given B̂ and B̂ C: what the biases give to the product is to stay as well."""
        return seen_b_hat @ b_hat.mT + self._constant, seen_b_hat @ self.b.mT + self._constant

    def errors(self, a_hat: Tensor, b_hat: Tensor, seen_b_hat: Tensor | None = None) -> Tensor:
        """(heads,) ‖(A B − Â B̂) C^{1/2}‖² + ‖(A − Â) β‖², from differences, so that large terms do not cancel.

        `seen_b_hat` is B̂ C in the widest dtype, if it is known.
        """
        a_hat, b_hat = a_hat.to(self.a), b_hat.to(self.b)
        seen_b_hat = self.seen(b_hat) if seen_b_hat is None else seen_b_hat
        off_a, off_b, seen_off = self.a - a_hat, self.b - b_hat, self.seen_b - seen_b_hat
        terms = (
            (off_a @ off_a.mT) * (seen_b_hat @ b_hat.mT + self._constant)
            + 2 * (off_a @ self.a.mT) * (seen_b_hat @ off_b.mT)
            + self._gram_a * (seen_off @ off_b.mT)
        )
        return terms.sum((1, 2))


def _alternate(
    pair: Pair,
    start: tuple[Quantized, Quantized],
    input_gram: Tensor | None,
    sweeps: int,
    keep_zeros: bool,
    solver: Solver,
) -> RoundedPair:
    _check_start(pair, start)
    gram = _checked_gram(input_gram, pair)
    coupled = unit_lower(with_ridge(gram)[0]) if gram is not None and gram.dim() == 2 else None
    work = torch.float64 if torch.float64 in (pair.value.dtype, pair.output.dtype) else torch.float32
    lattice_b = _lattice(pair.value, start[0], pair.gather_value, keep_zeros, work)
    lattice_a = _lattice(pair.output, start[1], pair.gather_output, keep_zeros, work)
    product = _Product(pair, gram)

    a, b = lattice_a.nearest(product.a.to(work)), lattice_b.nearest(product.b.to(work))
    error = product.errors(a, b)
    given_a = lattice_a.nearest(pair.gather_output(_dequantized(start[1], work)))
    given_b = lattice_b.nearest(pair.gather_value(_dequantized(start[0], work)))
    given = product.errors(given_a, given_b)
    a, b = _better(given, error, given_a, a), _better(given, error, given_b, b)
    error = torch.fmin(error, given)
    history = [error]
    for _ in range(sweeps):
        b_hat = b.to(product.b)
        seen = product.seen(b_hat)
        new = solver(*product.around(b_hat, seen), product.a, lattice_a, None)
        after = product.errors(new, b_hat, seen)
        a, error = _better(after, error, new, a), torch.fmin(error, after)
        a_hat = a.to(product.a)
        new = solver(a_hat @ a_hat.mT, a_hat @ product.a.mT, product.b, lattice_b, coupled)
        after = product.errors(a_hat, new)
        b, error = _better(after, error, new, b), torch.fmin(error, after)
        history.append(error)
        if torch.equal(error, history[-2]):
            break  # the next sweep would try the same again
    value = _with_steps(start[0], lattice_b.steps(b), pair.gather_value, pair.scatter_value)
    output = _with_steps(start[1], lattice_a.steps(a), pair.gather_output, pair.scatter_output)
    return RoundedPair(value, output, torch.stack(history), product.energy())


def _seen(b: Tensor, gram: Tensor | None) -> Tensor:
    """B C."""
    return b if gram is None else b * gram if gram.dim() == 1 else b @ gram


def _better(new_error: Tensor, error: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where((new_error < error)[:, None, None], new, old)


def _lattice(
    weight: Tensor, start: Quantized, gather: Callable[[Tensor], Tensor], keep_zeros: bool, dtype: torch.dtype
) -> Lattice:
    scale, zero = (gather(part).to(dtype) for part in start.levels.columns(weight.shape[1]))
    low, high = -zero, start.grid.largest - zero
    if keep_zeros:
        low, high = (torch.where(gather(weight) == 0, 0, bound) for bound in (low, high))
    return Lattice(scale, low, high)


def _dequantized(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Weights in the precision of `dtype`, which may be more than that of the scales."""
    scale, zero = quantized.levels.columns(quantized.codes.shape[1])
    return (quantized.codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)


def _with_steps(
    start: Quantized, steps: Tensor, gather: Callable[[Tensor], Tensor], scatter: Callable[[Tensor, Tensor], Tensor]
) -> Quantized:
    """The pair's codes from its steps (heads, r, m), and all others from `start`."""
    _, zero = start.levels.columns(start.codes.shape[1])
    return replace(start, codes=scatter(steps + gather(zero).to(steps), start.codes))


def _check_start(pair: Pair, start: tuple[Quantized, Quantized]) -> None:
    for name, weight, quantized in (("V", pair.value, start[0]), ("O", pair.output, start[1])):
        check_weight(weight, quantized.grid)
        groups = weight.shape[1] // (quantized.grid.group_size or weight.shape[1])
        if quantized.codes.shape != weight.shape or quantized.scale.shape != (len(weight), groups):
            raise InputError(
                f"{name} is of {tuple(weight.shape)}, but its start has {tuple(quantized.codes.shape)} codes and "
                f"{tuple(quantized.scale.shape)} scales"
            )


def _checked_gram(input_gram: Tensor | None, pair: Pair) -> Tensor | None:
    """C, symmetric, or its diagonal, in the widest dtype."""
    if input_gram is None:
        return None
    n = pair.value.shape[1]
    if input_gram.shape not in ((n,), (n, n)):
        raise InputError(f"V has {n} inputs, but their Gram matrix is of shape {tuple(input_gram.shape)}")
    gram = input_gram.detach().to(pair.value.device, widest(pair.value.device))
    if not gram.isfinite().all() or ((gram if gram.dim() == 1 else gram.diagonal()) < 0).any():
        raise InputError("the Gram matrix of the inputs has entries that are not finite, or squares that are negative")
    return gram if gram.dim() == 1 else gram / 2 + gram.mT / 2
