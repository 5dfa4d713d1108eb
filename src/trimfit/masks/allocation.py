"""How many weights each layer loses when only the total is given. Exact, to the weight.

Three answers: the same share everywhere; less where a block has many outliers (OWL, Yin et al. 2023, arXiv
2310.05175); or what minimises a sum of measured layer errors.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.masks.borders import sort
from trimfit.refit.gram import FactoredGram

OUTLIER = 5.0  # M: times the mean score of the block
RANGE = 0.08  # λ: how far sparsities may be from the mean
STEPS = 100  # points of a loss curve
_TIE = 1e-9  # relative: marginal costs as close as this are the same but for rounding
_ROUNDING = 1e-12  # relative: of sums of counts in float64


def outlier_ratio(weights: Sequence[Tensor], norms: Sequence[Tensor], threshold: float = OUTLIER) -> float:
    """Share of the scores |W_ij|·‖X_j‖ of some layers that exceed `threshold` times the mean of them all (OWL, eq. 1).

    `weights` are (out, in), and `norms` (in,) those of their inputs, all by the same factor.
    """

    def scores() -> Iterator[Tensor]:
        return (weight.float().abs() * norm.float() for weight, norm in zip(weights, norms, strict=True))

    size = sum(weight.numel() for weight in weights)
    limit = threshold * sum(score.sum(dtype=torch.float64).item() for score in scores()) / size
    return sum(int((score > limit).sum()) for score in scores()) / size


def loss_curve(weight: Tensor, gram: FactoredGram) -> Tensor:
    """(STEPS + 1,) float64: estimated relative layer error once 0, 1/STEPS, …, all of the weights are pruned.

    The optimal brain surgeon's loss of a weight alone, w² / [H⁻¹]_jj, summed from the lowest on, as a share of the
    layer's energy ‖XWᵀ‖². Losses do not add up, so the estimate falls short of the true error, the more the higher the
    sparsity; but the layers come in the right order (docs/method.md, section 9). `weight` is (out, in).
    """
    weight = torch.where(gram.dead, 0, weight.float())
    spread = gram.inverse.diagonal() * gram.scale.square()  # [H⁻¹]_jj of the damped H, in its own units
    losses = sort((weight.square() / spread.to(weight.dtype)).flatten())
    sums = torch.cat((losses.new_zeros(1, dtype=torch.float64), losses.cumsum(0, dtype=torch.float64))).cpu()
    energy = gram.energy(weight).item()
    points = (torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) * len(losses)).round().long()
    return sums[points] / energy if energy > 0 else torch.zeros(STEPS + 1, dtype=torch.float64)


def uniform(sizes: Sequence[int], sparsity: float) -> list[int]:
    """The same share of each layer, up to one weight. `sizes` are numbers of weights."""
    size, total = _sizes(sizes), _total(sizes, sparsity)
    most = _most(size, 1.0, total)
    return _whole((size * sparsity).minimum(most), total, most)


def by_outliers(sizes: Sequence[int], ratios: Sequence[float], sparsity: float, width: float = RANGE) -> list[int]:
    """OWL: sparsity falls linearly with the outlier ratio, over a range of 2·`width`; the mean over weights is kept.

    Shares are never below 0 or above (1 + sparsity) / 2: what a layer cannot take, the others do.
    """
    size, ratio = _sizes(sizes), torch.tensor(ratios, dtype=torch.float64)
    spread = ratio.max() - ratio.min()
    share = -2 * width * (ratio - ratio.min()) / spread if spread > 0 else torch.zeros_like(ratio)
    total = _total(sizes, sparsity)
    most = _most(size, (1 + sparsity) / 2, total)
    low, high = -1.0, 1.0 + 2 * width  # shifts at which nothing is pruned, and all that may be
    for _ in range(100):
        middle = (low + high) / 2
        pruned = (size * (share + middle)).clamp(min=0).minimum(most).sum()
        low, high = (middle, high) if pruned < total else (low, middle)
    return _whole((size * (share + low)).clamp(min=0).minimum(most), total, most)


def by_error(sizes: Sequence[int], costs: Sequence[Tensor], sparsity: float, reach: float = RANGE) -> list[int]:
    """The counts that minimise the sum of the layers' costs.

    - `costs`: for each layer its cost with 0, 1/n, 2/n, …, all of its weights pruned: (n + 1,), for any n ≥ 1. In
      between it is linear; where it is not convex its convex hull counts.
    - `reach`: how far the sparsity of a layer may be from the mean. It is never above (1 + sparsity) / 2.

    At the optimum the next weight costs the same everywhere, so weights go in the order of their marginal costs; where
    these are equal, layers share in proportion. Equal curves, weighted by size, give the uniform answer.
    """
    size, total = _sizes(sizes), _total(sizes, sparsity)
    least = (size * max(0.0, sparsity - reach)).floor()
    most = _most(size, min((1 + sparsity) / 2, sparsity + reach), total)
    slopes, lengths, owners = zip(*(_segments(i, size, least, most, cost) for i, cost in enumerate(costs)), strict=True)
    slope, length, owner = torch.cat(slopes), torch.cat(lengths), torch.cat(owners)
    rest = total - least.sum()
    order = slope.argsort(stable=True)
    marginal = slope[order[length[order].cumsum(0) >= rest * (1 - _ROUNDING)][0]]
    tie = _TIE * marginal.abs()
    cheaper = least.index_add(0, owner, torch.where(slope < marginal - tie, length, 0))
    tied = torch.zeros_like(size).index_add(0, owner, torch.where((slope - marginal).abs() <= tie, length, 0))
    share = (total - cheaper.sum()) / tied.sum().clamp(min=1)
    return _whole(cheaper + tied * share, total, most)


def _segments(layer: int, size: Tensor, least: Tensor, most: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer's convex hull, piece by piece: cost of a weight, weights between the limits, the layer's number."""
    steps = len(cost) - 1
    ends = torch.arange(steps + 1, dtype=torch.float64) * size[layer] / steps
    length = ends.clamp(least[layer].item(), most[layer].item()).diff()
    return _convex(cost.double().diff()) * steps / size[layer], length, torch.full((steps,), layer)


def _convex(slopes: Tensor) -> Tensor:
    """Slopes of the convex hull from those of a curve at equal steps: neighbours that fall are pooled."""
    pools: list[tuple[float, int]] = []
    for slope in slopes.tolist():
        mean, count = slope, 1
        while pools and pools[-1][0] > mean:
            before, length = pools.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        pools.append((mean, count))
    return torch.tensor([mean for mean, count in pools for _ in range(count)], dtype=slopes.dtype)


def _sizes(sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.float64)


def _total(sizes: Sequence[int], sparsity: float) -> int:
    """Weights to prune: of the decimal that was written, as in `prune_counts`."""
    return round(Fraction(str(sparsity)) * sum(sizes))


def _most(size: Tensor, share: float, total: int) -> Tensor:
    """The most weights that each layer may lose: never all of them."""
    most = torch.minimum((size * share).ceil(), size - 1)
    if most.sum() < total:
        raise InputError(
            f"{total} of {int(size.sum())} weights cannot be pruned with no layer losing all of its own; "
            "choose a lower sparsity"
        )
    return most


def _whole(counts: Tensor, total: int, most: Tensor) -> list[int]:
    """Rounded down, and up where the fraction is largest, so that the sum is `total` and none is above `most`."""
    whole = counts.floor()
    order = (counts - whole).argsort(descending=True, stable=True)
    while rest := total - int(whole.sum()):
        whole[order[(whole < most)[order]][:rest]] += 1
    return [int(count) for count in whole.tolist()]
