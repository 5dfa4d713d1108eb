"""Rounding both factors of a pair so that their product stays: alternately, each to make up for the other's errors.

A (heads, g·d, r) are O's columns and B (heads, r, n) V's rows of each KV head, and the objective is
Σ_heads ‖(A B − Â B̂) C^{1/2}‖² with C the Gram matrix of V's inputs. With either factor fixed the other is an integer
least-squares problem. Here both have the r channels first, Aᵀ and B, and so both problems have one form: over levels X
(heads, r, m), the least

    tr[(X − T)ᵀ H (X − T) W],    T = H⁻¹ · cross · (X before rounding)

    for Âᵀ:  H = B̂ C B̂ᵀ,  cross = B̂ C Bᵀ,  W = I          for B̂:  H = ÂᵀÂ,  cross = ÂᵀA,  W = C

With `round_pair_pseudo_inverse` that is CafeQ's alternation (arXiv 2511.19705, sec. 5), as far as it is known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Levels, Quantized, check_weight, place_levels
from trimfit.refit.gram import widest

_RIDGE = 0.01  # of the mean diagonal: keeps targets near the weights where the other factor hardly sees them
_BLOCK = 32  # channels between two GEMMs of a sweep
_COLUMNS = 128  # inputs that a two-sided sweep goes through diagonally before a GEMM takes its errors to the others


@dataclass(frozen=True)
class Pair:
    """The weights of V and O, and where in them the factors of each KV head are.

    - `value` (out, n) floating: has the rows B of all heads, perhaps among others.
    - `output` (d, in) floating: has the columns A of all heads.
    - `value_rows` (heads, r) int64.
    - `output_columns` (heads, g, r) int64: for each of the g query heads of a KV head.
    """

    value: Tensor
    output: Tensor
    value_rows: Tensor
    output_columns: Tensor

    def __post_init__(self) -> None:
        heads_and_r = (self.output_columns.shape[0], self.output_columns.shape[-1])
        if self.output_columns.dim() != 3 or self.value_rows.shape != heads_and_r or 0 in self.output_columns.shape:
            raise InputError(
                f"rows (heads, r) and columns (heads, g, r) are needed, but these are of "
                f"{tuple(self.value_rows.shape)} and {tuple(self.output_columns.shape)}"
            )
        if self.value_rows.max() >= len(self.value) or self.output_columns.max() >= self.output.shape[1]:
            raise InputError("the pair has rows or columns that its weights do not have")

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
    - `errors`: (sweeps + 1, heads) ‖(A B − Â B̂) C^{1/2}‖² of each head, at the start and after each sweep.
    - `energy`: (heads,) ‖A B C^{1/2}‖².
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

    Levels are taken as they are stored, without what a product of code and scale loses in 16 bits. Computed in float32,
    or float64 if a weight is that; Gram matrices and errors in the widest dtype of the device. Raises `InputError` for
    what does not fit together.
    """
    return _alternate(pair, start, input_gram, sweeps, keep_zeros, _with_feedback)


def round_pair_pseudo_inverse(
    pair: Pair,
    start: tuple[Quantized, Quantized],
    *,
    input_gram: Tensor | None = None,
    sweeps: int = 3,
    keep_zeros: bool = False,
) -> RoundedPair:
    """What CafeQ's Algorithm 1 probably is, for comparisons: the least-squares target of each factor, then the nearest.

    Known of it: it alternates between the matrices, without a Hessian, with the pseudo-inverse (arXiv 2511.19705).
    Ours: targets are rounded to the nearest level, and kept only where that makes the error less. Arguments are those
    of `round_pair`.
    """
    return _alternate(pair, start, input_gram, sweeps, keep_zeros, _nearest_to_pseudo_inverse)


def product_errors(pair: Pair, value: Tensor, output: Tensor, input_gram: Tensor | None = None) -> Tensor:
    """(heads,) ‖(A B − Â B̂) C^{1/2}‖² for other weights of V and O, in the widest dtype of the device."""
    product = _Product(pair, _checked_gram(input_gram, pair))
    return product.errors(pair.gather_output(output), pair.gather_value(value))


@dataclass(frozen=True)
class _Lattice:
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

    def channel(self, k: int) -> "_Lattice":
        return _Lattice(self.scale[:, k], self.low[:, k], self.high[:, k])

    def inputs(self, block: slice) -> "_Lattice":
        return _Lattice(self.scale[..., block], self.low[..., block], self.high[..., block])

    def diagonal(self, offset: int) -> "_Lattice":
        return _Lattice(*(bound.diagonal(offset, 1, 2) for bound in (self.scale, self.low, self.high)))


_Solver = Callable[[Tensor, Tensor, Tensor, _Lattice, Tensor | None], Tensor]
"""New levels from H, the cross matrix, the factor itself, its lattice, and the factor L of C if inputs are coupled."""


class _Product:
    """A B C^{1/2} of all heads, and how far other factors are from it. A is transposed, (heads, r, g·d)."""

    def __init__(self, pair: Pair, gram: Tensor | None):
        wide = widest(pair.value.device)
        self.a = pair.gather_output(pair.output.detach()).to(wide)
        self.b = pair.gather_value(pair.value.detach()).to(wide)
        self._gram = gram
        self.seen_b = self.seen(self.b)
        self._gram_a = self.a @ self.a.mT

    def seen(self, b: Tensor) -> Tensor:
        """B C, (heads, r, n)."""
        return _seen(b, self._gram)

    def energy(self) -> Tensor:
        """(heads,) ‖A B C^{1/2}‖²."""
        return (self._gram_a * (self.seen_b @ self.b.mT)).sum((1, 2))

    def errors(self, a_hat: Tensor, b_hat: Tensor, seen_b_hat: Tensor | None = None) -> Tensor:
        """(heads,) ‖(A B − Â B̂) C^{1/2}‖², from differences, so that large terms do not cancel.

        `seen_b_hat` is B̂ C in the widest dtype, if it is known.
        """
        a_hat, b_hat = a_hat.to(self.a), b_hat.to(self.b)
        seen_b_hat = self.seen(b_hat) if seen_b_hat is None else seen_b_hat
        off_a, off_b, seen_off = self.a - a_hat, self.b - b_hat, self.seen_b - seen_b_hat
        terms = (
            (off_a @ off_a.mT) * (seen_b_hat @ b_hat.mT)
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
    solver: _Solver,
) -> RoundedPair:
    _check_start(pair, start)
    gram = _checked_gram(input_gram, pair)
    coupled = _unit_lower(_damped(gram)[0]) if gram is not None and gram.dim() == 2 else None
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
        new = solver(seen @ b_hat.mT, seen @ product.b.mT, product.a, lattice_a, None)
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


def _with_feedback(hessian: Tensor, cross: Tensor, exact: Tensor, lattice: _Lattice, coupled: Tensor | None) -> Tensor:
    damped, ridge = _damped(hessian)
    target = (torch.linalg.solve(damped, cross + ridge) @ exact).to(lattice.scale)
    upper = _unit_lower(damped.flip(-2, -1)).flip(-2, -1)  # damped = upper · diagonal · upperᵀ
    if coupled is not None:
        return _two_sided_sweep(target, upper.to(target), coupled.to(target), lattice)
    rounded = _sweep(target, target, upper.mT.tril(-1).to(target), lattice)
    given_others = damped / damped.diagonal(dim1=-2, dim2=-1)[..., None]
    given_others.diagonal(dim1=-2, dim2=-1).zero_()
    return _sweep(rounded, target, given_others.to(target), lattice)


def _nearest_to_pseudo_inverse(
    hessian: Tensor, cross: Tensor, exact: Tensor, lattice: _Lattice, coupled: Tensor | None
) -> Tensor:
    target = torch.linalg.pinv(hessian, hermitian=True) @ cross @ exact
    return lattice.nearest(target.to(lattice.scale))


def _sweep(start: Tensor, target: Tensor, coupling: Tensor, lattice: _Lattice) -> Tensor:
    """Rounds channel after channel, k to the level nearest to target_k − Σ_j coupling_kj · (x_j − target_j).

    - `start`, `target`: (heads, r, m). Channels that are not yet rounded are those of `start`.
    - `coupling`: (heads, r, r) with a diagonal of zeros. Strictly lower, Uᵀ − I from H = U D Uᵀ: the nearest plane
      algorithm. H over its diagonal, − I: the best level of each channel given all others, which makes nothing worse.
    """
    x = start.clone()
    for first in range(0, x.shape[1], _BLOCK):
        block = slice(first, min(first + _BLOCK, x.shape[1]))
        wish = target[:, block] - coupling[:, block] @ (x - target)
        for k in range(block.start, block.stop):
            level = lattice.channel(k).nearest(wish[:, k - first])
            rest = coupling[:, k + 1 : block.stop, k, None]
            wish[:, k - first + 1 :] -= rest * (level - x[:, k])[:, None]
            x[:, k] = level
    return x


def _two_sided_sweep(target: Tensor, upper: Tensor, lower: Tensor, lattice: _Lattice) -> Tensor:
    """The nearest plane algorithm for tr[Eᵀ H E C], E = X − target, with errors fed back along channels and inputs.

    With H = U D Uᵀ and C = L D' Lᵀ the objective is Σ_ij D_i D'_j (Uᵀ E L)²_ij, and (Uᵀ E L)_ij is E_ij and terms in
    E_kl with k ≤ i and l ≥ j. So rounding goes from the first channel to the last and from the last input to the first,
    all entries (i, i + offset) of one diagonal at a time: none of them needs another.

    - `target`: (heads, r, n). `upper`: (heads, r, r) U, `lower`: (n, n) L, both with a unit diagonal.
    """
    _, r, n = target.shape
    upper, lower = upper.triu(1), lower.tril(-1)
    x, error, mixed = target.clone(), torch.zeros_like(target), torch.zeros_like(target)  # mixed is UᵀE
    for first in reversed(range(0, n, _COLUMNS)):
        block = slice(first, min(first + _COLUMNS, n))
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


def _seen(b: Tensor, gram: Tensor | None) -> Tensor:
    """B C."""
    return b if gram is None else b * gram if gram.dim() == 1 else b @ gram


def _better(new_error: Tensor, error: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where((new_error < error)[:, None, None], new, old)


def _damped(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (..., r, r) with a ridge, and the ridge; one where there is nothing to be relative to."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(mean > 0, _RIDGE * mean, 1.0)[..., None, None]
    ridge = ridge * torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return hessian + ridge, ridge


def _unit_lower(matrix: Tensor) -> Tensor:
    """L with a unit diagonal such that the matrix (..., r, r) is L D Lᵀ."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        raise InputError("the Gram matrix of the inputs is not positive semi-definite; check how it was accumulated")
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]


def _lattice(
    weight: Tensor, start: Quantized, gather: Callable[[Tensor], Tensor], keep_zeros: bool, dtype: torch.dtype
) -> _Lattice:
    scale, zero = (gather(part).to(dtype) for part in _levels(start).columns(weight.shape[1]))
    low, high = -zero, start.grid.largest - zero
    if keep_zeros:
        low, high = (torch.where(gather(weight) == 0, 0, bound) for bound in (low, high))
    return _Lattice(scale, low, high)


def _levels(quantized: Quantized) -> Levels:
    return Levels(quantized.grid, quantized.scale, quantized.zero_point)


def _dequantized(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Weights in the precision of `dtype`, which may be more than that of the scales."""
    scale, zero = _levels(quantized).columns(quantized.codes.shape[1])
    return (quantized.codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)


def _with_steps(
    start: Quantized, steps: Tensor, gather: Callable[[Tensor], Tensor], scatter: Callable[[Tensor, Tensor], Tensor]
) -> Quantized:
    """The pair's codes from its steps (heads, r, m), and all others from `start`."""
    _, zero = _levels(start).columns(start.codes.shape[1])
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
