"""Splits a sparsity over a model's layers by what one pass through the dense model tells of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import InputMoments
from trimfit.masks.allocation import STEPS, by_error, by_outliers, loss_curve, outlier_ratio, uniform
from trimfit.models import IN_MEMORY, Block, Group, Placement, Walker, at_once
from trimfit.pipelines.checks import naming
from trimfit.pipelines.few_tokens import of_no_tokens, raised_damping
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.pruning.sensitivity import Probe, looked_at
from trimfit.ranks import ALONE, Ranks
from trimfit.refit import FactoredGram

AllocationName = Literal["uniform", "owl", "error"]
DEPTH = 8  # tokens for each input: what is asked of a Gram matrix here is an order of weights, not their values


class BlockBudget(BaseModel):
    """What one block is to lose.

    - `weights`, `pruned`: numbers, over the block's layers.
    - `outliers`: OWL's outlier ratio; None for other methods.
    - `cost`: estimated nats per token for pruning this block to its budget and nothing else; None for other methods.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    weights: int
    pruned: int
    outliers: float | None = None
    cost: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of the block's weights to prune."""
        return self.pruned / self.weights


class Allocation(BaseModel):
    """How a sparsity is split.

    - `pruned`: weights to prune in each layer, by its name; they add up to round(sparsity · weights) exactly.
    - `blocks`: the same per block, without blocks that have no layer to prune.
    """

    model_config = ConfigDict(frozen=True)

    method: AllocationName
    pruned: dict[str, int]
    blocks: list[BlockBudget]


@dataclass(frozen=True)
class Measured:
    """What the layers of a dense model tell on some windows: an allocation goes by it at any sparsity.

    - `outliers`: OWL's outlier ratio of each block that has layers, by its index; None for other methods.
    - `costs`: of each layer, by its name, (STEPS + 1,) estimated nats per token by the share that is pruned; or None.
    """

    outliers: dict[int, float] | None = None
    costs: dict[str, Tensor] | None = None


Measure: TypeAlias = Callable[..., Measured]  # `measure`, or what knows what that would give


def measure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Tensor,
    *,
    method: AllocationName,
    damping: float = 0.01,
    batch_size: int = 8,
    placement: Placement = IN_MEMORY,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Measured:
    """What `allocate` needs to know. Nothing is changed; the model must still be dense.

    - `blocks`: with the layers to prune.
    - `windows`: (N, L) int64 calibration windows; "uniform" does not look at them.
    - `method`: see `allocate`; "error" takes one pass, with a stream of few windows for each layer.
    - `damping`, `batch_size`: as for `prune`; `placement`, `ranks`: as for `Walker`.

    Raises `InputError` as `Walker` does.
    """
    if method == "uniform":
        return Measured()
    (observer or Silent()).stage(f"allocating the sparsity ({method})")
    if method == "owl":
        walker = Walker(model, blocks, {"all": windows}, batch_size, placement=placement, ranks=ranks, frozen=True)
        return Measured(outliers=_outliers(walker))
    sets = {"all": _enough(windows, blocks), "few": looked_at(windows)}
    alone = ("few",)  # noise has to be the same, whoever makes it
    walker = Walker(model, blocks, sets, batch_size, False, placement, ranks, alone, to_the_end=True, frozen=True)
    return Measured(costs=_costs(walker, Probe(walker, "few"), damping))


def allocate(blocks: Sequence[Block], measured: Measured, *, method: AllocationName, sparsity: float) -> Allocation:
    """How many weights each layer loses.

    - `blocks`: with the layers to prune.
    - `method`: "uniform", the same share everywhere; "owl", by blocks, less where there are many outliers; "error", by
      layers, so that the estimated cost in nats is least.
    - `measured`: by the same method.

    Raises `InputError` for layers so small that some would lose all their weights.
    """
    sizes = {layer.name: layer.weight.numel() for block in blocks for layer in block.layers}
    if measured.outliers is not None:
        ratios = [measured.outliers[block.index] for block in blocks for _ in block.layers]
        counts = by_outliers(list(sizes.values()), ratios, sparsity)
    elif measured.costs is not None:
        counts = by_error(list(sizes.values()), [measured.costs[name] for name in sizes], sparsity)
    else:
        counts = uniform(list(sizes.values()), sparsity)
    return _allocation(method, blocks, sizes, dict(zip(sizes, counts, strict=True)), measured)


def _outliers(walker: Walker) -> dict[int, float]:
    """Outlier ratio of each block that has layers."""
    ratios: dict[int, float] = {}
    for block in walker:
        norms = {
            layer.name: seen.gram.diagonal().sqrt() for group, seen in _seen(walker, block) for layer in group.layers
        }
        if norms:
            ratios[block.index] = outlier_ratio(
                [layer.weight for layer in block.layers], [norms[layer.name] for layer in block.layers]
            )
    return ratios


def _costs(walker: Walker, probe: Probe, damping: float) -> dict[str, Tensor]:
    """(STEPS + 1,) estimated nats per token of each layer, by the share of its weights that is pruned."""
    losses: dict[str, Tensor] = {}
    for block in walker:
        probe.disturb(block)
        for group, seen in _seen(walker, block):
            share = seen.tokens / walker.windows["all"].numel()  # of all tokens; an expert has some of them
            losses |= {name: loss * share for name, loss in _losses(group, seen, damping).items()}
    sensitivities = probe.sensitivities()
    return {name: loss * sensitivities[name] for name, loss in losses.items()}


def _losses(group: Group, seen: InputMoments, damping: float) -> dict[str, Tensor]:
    """Estimated squared error of each layer for each token, by the share of its weights that is pruned."""
    with naming(group.layers[0]):
        gram = FactoredGram(seen.gram, raised_damping(damping, group, seen.tokens))
    energies = {layer.name: gram.energy(layer.weight.float()).item() for layer in group.layers}
    return {layer.name: loss_curve(layer.weight, gram) * energies[layer.name] for layer in group.layers}


def _seen(walker: Walker, block: Block) -> Iterator[tuple[Group, InputMoments]]:
    """The groups of a block with what their inputs were; few are in memory at a time."""
    for groups in at_once(walker.groups(block)):
        every = walker.moments(block, groups, "all")
        for group in groups:
            moments = every.pop(0)
            yield group, moments if moments.tokens else of_no_tokens(group, moments)


def _enough(windows: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The first of the windows, with `DEPTH` tokens for each input of the widest layer."""
    widest = max(layer.weight.shape[1] for block in blocks for layer in block.layers)
    return windows[: -(-DEPTH * widest // windows.shape[1])]


def _allocation(
    method: AllocationName,
    blocks: Sequence[Block],
    sizes: dict[str, int],
    pruned: dict[str, int],
    measured: Measured,
) -> Allocation:
    outliers, costs = measured.outliers, measured.costs
    budgets = [
        BlockBudget(
            block=block.index,
            weights=sum(sizes[layer.name] for layer in block.layers),
            pruned=sum(pruned[layer.name] for layer in block.layers),
            outliers=outliers[block.index] if outliers else None,
            cost=sum(_cost_at(costs[la.name], pruned[la.name] / sizes[la.name]) for la in block.layers)
            if costs
            else None,
        )
        for block in blocks
        if block.layers
    ]
    return Allocation(method=method, pruned=pruned, blocks=budgets)


def _cost_at(curve: Tensor, share: float) -> float:
    below = min(int(share * STEPS), STEPS - 1)
    return torch.lerp(curve[below], curve[below + 1], share * STEPS - below).item()
