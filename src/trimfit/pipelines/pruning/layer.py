"""One layer: mask, refit, and whether the refit holds on tokens that it has not seen."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.calibration import InputMoments
from trimfit.masks import NM, SELECTORS, Pattern, Selection
from trimfit.models import Layer
from trimfit.pipelines.checks import naming
from trimfit.pipelines.environment import peak_memory
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.goal import Goal
from trimfit.pipelines.pruning.layer_error import LayerErrorMeter
from trimfit.pipelines.pruning.records import Accepted, LayerRecord
from trimfit.pipelines.pruning.shared import shared_refit
from trimfit.ranks import ALONE, Ranks
from trimfit.refit import FactoredGram, RefitSolution
from trimfit.timing import stage

_CLEARLY = 0.01  # of the layer's error: a selector's own weights may be the optimum too, but for rounding


@dataclass(frozen=True)
class Inputs:
    """What is known of a group's inputs: the factorised Gram matrix, and the second moments it was made of.

    `metrics`, by layer name, are (heads, d, d) what errors in the outputs of each head cost, for layers whose rows do
    not count the same. `few_tokens` is told to the record. Where `calibration` is of no tokens at all there is nothing
    to refit to.
    """

    factored: FactoredGram
    calibration: InputMoments
    held_out: InputMoments | None
    metrics: dict[str, Tensor]
    few_tokens: bool = False


@dataclass(frozen=True)
class _Tried:
    """What a layer may become.

    - `candidates`: weights (out, in), those asked for first and simpler ones behind them; `mask` (out, in) is of all.
    - `solution`: of the refit, which gave the candidate "optimal"; None where there was none.
    - `done`: whether there is nothing to do, as no weight goes and the goal is what the dense layer gives.
    """

    mask: Tensor
    candidates: dict[Accepted, Tensor]
    solution: RefitSolution | None
    done: bool


def prune_layer(
    layer: Layer, block: int, inputs: Inputs, config: PruneConfig, pattern: Pattern, ranks: Ranks = ALONE
) -> LayerRecord:
    """Prunes one layer in place; all of `ranks` prune it alike."""
    start = time.perf_counter()
    dense = layer.weight.float().clone(memory_format=torch.contiguous_format)  # GPT-2 keeps it transposed
    metric = inputs.metrics.get(layer.name)
    with naming(layer):
        tried = _try(dense, inputs, config, pattern, metric, ranks)
    candidates, solution = tried.candidates, tried.solution
    accepted: Accepted = ranks.first(lambda: _accepted(candidates, dense, inputs.held_out, config, metric))
    if accepted != "optimal":
        solution = None
    weight = candidates[accepted]
    layer.write(weight)
    with stage("errors"):
        meter = LayerErrorMeter(dense, inputs.calibration.gram, inputs.held_out.gram if inputs.held_out else None)
        errors = {
            name: meter.measure(w)
            for name, w in (("masked", candidates["none"]), ("final", weight), ("stored", layer.weight))
        }
    return LayerRecord(
        name=layer.name,
        block=block,
        shape=(dense.shape[0], dense.shape[1]),
        sparsity=1 - int(tried.mask.sum()) / tried.mask.numel(),
        **errors,
        accepted=accepted,
        rows="equal" if metric is None or tried.done else "attention",
        certificate=solution.certificate.layer if solution else None,
        worst_row=solution.certificate.relative.max().item() if solution else None,
        status=solution.status.value if solution else None,
        solver=type(solution.solver).__name__ if solution else None,
        steps=solution.steps if solution else None,
        tokens=inputs.calibration.tokens,
        few_tokens=inputs.few_tokens,
        damping=solution.damping if solution else inputs.factored.damping,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(layer.weight.device),
    )


def _try(
    dense: Tensor, inputs: Inputs, config: PruneConfig, pattern: Pattern, metric: Tensor | None, ranks: Ranks
) -> _Tried:
    """Chooses the mask of `dense` (out, in), and finds the weights that the config asks for."""
    goal = Goal(dense, inputs.calibration, config.share)
    with stage("mask"):
        unpruned = goal.unpruned(inputs.factored)
        selection = _same(_select(unpruned, inputs.factored, config.selector, pattern, metric), ranks)
    whole = bool(selection.mask.all())
    done = whole and config.share == 0  # the dense weights are the optimum
    candidates: dict[Accepted, Tensor] = {"none": torch.where(selection.mask, dense, 0.0)}
    solution: RefitSolution | None = None
    if config.refit != "none" and not done and inputs.calibration.tokens:
        if selection.weight is not None:
            candidates = {"own": selection.weight, **candidates}
        if config.refit == "optimal":
            target = goal.linear_term(inputs.factored)
            with stage("refit"):
                solution = shared_refit(
                    inputs.factored,
                    dense,
                    selection.mask,
                    target=target,
                    solver=config.make_solver(),
                    start=selection.weight,
                    metric=metric,
                    ranks=ranks,
                )
            candidates = {"optimal": solution.weight, **candidates}
    if whole:  # the optimum for a dead input is its dense weight, and none is to be lost
        candidates = {name: torch.where(inputs.factored.dead, dense, w) for name, w in candidates.items()}
    return _Tried(selection.mask, candidates, solution, done)


def _select(weight: Tensor, gram: FactoredGram, selector: str, pattern: Pattern, metric: Tensor | None) -> Selection:
    """Rows that compete and count differently are multiplied, while the mask is chosen, by what each counts alone."""
    select = SELECTORS[selector].select
    if metric is None or isinstance(pattern, NM) or pattern.scope == "row":
        return select(weight, gram, pattern)
    scale = row_scale(metric).to(weight.dtype)
    chosen = select(weight * scale, gram, pattern)
    return Selection(chosen.mask, None if chosen.weight is None else chosen.weight / scale)


def row_scale(metric: Tensor) -> Tensor:
    """(out, 1) root of what each row counts, relative to the mean; none so small that the row vanishes."""
    counts = metric.diagonal(dim1=1, dim2=2).flatten().clamp_min(0).sqrt()
    mean = counts.mean()
    return (counts / mean).clamp_min(1e-4)[:, None] if mean > 0 else torch.ones_like(counts)[:, None]


def _same(selection: Selection, ranks: Ranks) -> Selection:
    """The first process's: a tie that rounding decides is then decided once."""
    weight = selection.weight
    return Selection(ranks.same(selection.mask), None if weight is None else ranks.same(weight))


def _accepted(
    candidates: dict[Accepted, Tensor],
    dense: Tensor,
    held_out: InputMoments | None,
    config: PruneConfig,
    metric: Tensor | None,
) -> Accepted:
    """The first of the candidates, unless a simpler one behind it is clearly nearer to the goal on held-out tokens."""
    first = next(iter(candidates))
    if held_out is None or not config.guard:
        return first
    goal = Goal(dense, held_out, config.share)
    excess: dict[Accepted, float] = {name: goal.excess(weight, metric) for name, weight in candidates.items()}
    best = min(excess, key=lambda name: excess[name])
    return best if excess[first] - excess[best] > _CLEARLY * goal.error(candidates[first], metric) else first
