"""Block-diagonal transformations on the input side: W T is quantized, and T⁻¹ is applied to the inputs at run time.

A grid errs by the range of its group. A rotation evens out ranges; a transformation that is not orthogonal can give
less range to directions that matter less. For a quantizer whose error follows the second moment of the rows, W T with
S = T Tᵀ costs tr(Σ S)·tr(S⁻¹ C), Σ = WᵀW, C the second moment of the inputs, and the least is at the geometric mean of
Σ⁻¹ and C. With C = I that is T = Σ^{-1/4} times any rotation, and the gain over all rotations is
(tr Σ^{1/2})² / (b·tr Σ) ≤ 1. A flat rotation (Hadamard) after it spreads what outliers remain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.quant.grid import Grid, place_levels
from trimfit.quant.hadamard import mixing_matrix

LARGEST_BLOCK = 128
_FLOOR = 1e-4  # eigenvalues of Σ relative to their mean: bounds the condition of T at 1 / (floor^{1/4}) of the mean


@dataclass(frozen=True)
class BlockTransform:
    """T = diag(T_1, …, T_k), float32.

    - `matrices`: (k, b, b), the blocks of T.
    - `inverses`: (k, b, b), those of T⁻¹.
    - `name`: of the candidate it was made as.
    """

    matrices: Tensor
    inverses: Tensor
    name: str

    @property
    def multiply_adds(self) -> int:
        """For one token, T⁻¹ x."""
        return self.inverses.numel()

    def forward(self, weight: Tensor) -> Tensor:
        """W T for W (out, n)."""
        return _right(weight, self.matrices)

    def backward(self, weight: Tensor) -> Tensor:
        """W T⁻¹ for W (out, n)."""
        return _right(weight, self.inverses)

    def gram(self, gram: Tensor) -> Tensor:
        """T⁻¹ H T⁻ᵀ (n, n), the Gram matrix of T⁻¹ x where H is that of x."""
        undone = self.inverses.transpose(1, 2)
        return _right(_right(gram, undone).T, undone).T

    def inputs(self, x: Tensor) -> Tensor:
        """T⁻¹ x for each x in (…, n)."""
        return _right(x[None].flatten(0, -2), self.inverses.transpose(1, 2)).view_as(x)


def block_size(width: int, largest: int) -> int:
    """The largest divisor of `width` that is at most `largest`."""
    return next(size for size in range(min(width, largest), 0, -1) if width % size == 0)


def candidates(weights: Sequence[Tensor], size: int) -> list[BlockTransform]:
    """The transformations worth trying for layers (out, n) that share their input, in blocks of `size` (divides n).

    Identity; Hadamard; Σ^{-1/4}; Σ^{-1/4}·Hadamard, with Σ summed over the layers.
    """
    stacked = torch.cat([weight.float() for weight in weights]).double()
    blocks = stacked.unflatten(1, (-1, size)).permute(1, 0, 2)  # (k, out, b)
    count = len(blocks)
    identity = torch.eye(size, dtype=blocks.dtype, device=blocks.device).expand(count, size, size)
    mixing = mixing_matrix(size, blocks.dtype, blocks.device).expand(count, size, size)
    values, vectors = torch.linalg.eigh(blocks.transpose(1, 2) @ blocks)
    mean = values.mean(1, keepdim=True)
    spread = torch.where(mean > 0, values / mean, 1).clamp(min=_FLOOR)
    # Blocks keep their sizes relative to each other: where a group spans several, the optimum is one for all of them.
    share = torch.where(mean > 0, mean / mean.mean(), 1).clamp(min=_FLOOR)
    root = (spread * share).pow(0.25)
    root = root / root.log().mean().exp()
    shrink = (vectors / root[:, None, :]) @ vectors.transpose(1, 2)
    grow = (vectors * root[:, None, :]) @ vectors.transpose(1, 2)
    # Mixed in the eigenbasis, in which Σ is diagonal: only there does a flat rotation give equal columns.
    mixed, unmixed = (
        vectors / root[:, None, :] @ mixing,
        mixing.transpose(1, 2) @ (vectors * root[:, None, :]).transpose(1, 2),
    )
    return [
        BlockTransform(identity.float(), identity.float(), "identity"),
        BlockTransform(mixing.float(), mixing.transpose(1, 2).float(), "hadamard"),
        BlockTransform(shrink.float(), grow.float(), "spectrum"),
        BlockTransform(mixed.float(), unmixed.float(), "spectrum-hadamard"),
    ]


def best_transform(
    weights: Sequence[Tensor],
    grid: Grid,
    size: int,
    *,
    learn: Callable[[BlockTransform], BlockTransform] | None = None,
) -> BlockTransform | None:
    """The candidate with the least true error of the quantized weights, rounded to nearest; None for the identity.

    - `weights`: (out, n) each, sharing their inputs, which are taken for white noise.
    - `grid`: fitted to n. `size`: of the blocks, a divisor of n.
    - `learn`: makes one more candidate from the best of the others, such as by `learned_transform`.
    """

    def error(transform: BlockTransform) -> float:
        total = 0.0
        for weight in weights:
            moved = transform.forward(weight)
            lost = transform.backward(place_levels(moved, grid).nearest(moved).dequantize()) - weight
            total += lost.square().sum().item()
        return total

    found = candidates(weights, size)
    errors = [error(transform) for transform in found]
    best = found[errors.index(min(errors))]
    if learn is not None:
        learned = learn(best)
        best = learned if error(learned) < min(errors) else best
    return None if best.name == "identity" else best


def _right(weight: Tensor, blocks: Tensor) -> Tensor:
    """W · diag(blocks) for W (rows, n), blocks (k, b, b)."""
    count, size, _ = blocks.shape
    split = weight.view(len(weight), count, size).transpose(0, 1)
    return (split @ blocks.to(weight)).transpose(0, 1).reshape(weight.shape)
