"""Prune in place: for each block, for each group of layers with the same input: Gram matrix, mask, refit."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import CURVATURE_TOKENS, InputMoments, split_held_out
from trimfit.masks import NM, Pattern, Unstructured
from trimfit.mode import autograd_possible
from trimfit.models import (
    IN_MEMORY,
    Block,
    Chain,
    FreeOrder,
    Group,
    Layer,
    Placement,
    Walker,
    check_causal,
    find_blocks,
    find_free_orders,
    find_query_key,
    hidden_size,
    select_layers,
    together,
)
from trimfit.pipelines.checks import check_finite, check_tokens, naming
from trimfit.pipelines.environment import peak_memory, versions
from trimfit.pipelines.few_tokens import has_few, of_no_tokens, raised_damping
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.pruning.allocate import Allocation, Measure, allocate, measure
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.damping import DEFAULT_DAMPING, check_damping, choose_damping
from trimfit.pipelines.pruning.layer import Inputs, prune_layer
from trimfit.pipelines.pruning.ledger import Blank, Ledger
from trimfit.pipelines.pruning.losing import select_losing
from trimfit.pipelines.pruning.records import LayerRecord, PruneReport
from trimfit.pipelines.pruning.reorder import reorder
from trimfit.ranks import ALONE, Ranks
from trimfit.refit import FactoredGram
from trimfit.timing import Clock, stage

_LOSES_NOTHING = Unstructured(0, "layer")


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    config: PruneConfig | None = None,
    *,
    observer: Observer | None = None,
    measure: Measure = measure,
) -> PruneReport:
    """Prunes the linear layers of a causal LM's decoder blocks in place. Embeddings and head stay dense.

    **Arguments**

    - `model`: any Hugging Face decoder-only LM, on the device on which to work.
    - `tokens`: (N, L) int64, calibration windows of L token ids each.
    - `config`: see `PruneConfig`.
    - `observer`: told of each finished layer.
    - `measure`: asked for what an allocation goes by; for whoever prunes the same model again and again.

    **Returns** a `PruneReport`. Deterministic: the same input gives the same weights on the same machine.

    Raises `InputError` before anything changes when model, tokens and config do not fit together.
    """
    config = config or PruneConfig()
    blocks = select_layers(model, find_blocks(model), config.ignore)
    check_finite(model)
    return PruneRun(model, blocks, tokens, config, observer or Silent(), measure=measure).run()


@dataclass
class PruneRun:
    """One run over the blocks of a model, wherever it is and whoever keeps what is finished.

    - `blocks`: with the layers to prune, whose weights are finite.
    - `tokens`, `config`, `observer`: as for `prune`.
    - `placement`: where weights come from and hidden states wait.
    - `ranks`: the processes that share the run.
    - `ledger`: asked for what is finished already, and given what is finished.
    - `measure`: as for `prune`.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    tokens: Tensor
    config: PruneConfig
    observer: Observer
    placement: Placement = IN_MEMORY
    ranks: Ranks = ALONE
    ledger: Ledger = field(default_factory=Blank)
    measure: Measure = measure

    def run(self) -> PruneReport:
        """Prunes the blocks in their order. Raises `InputError` before anything changes if something does not fit."""
        start = time.perf_counter() - self.ledger.seconds
        clock = Clock(self.model.device)
        with autograd_possible(self.model, self.config.weighs_rows), clock.running():
            windows = self.ranks.everywhere(self._windows)
            allocation = self._allocation(windows["fit"])
            records = list(self._records(windows, self._patterns(allocation), start))
        return PruneReport(
            config=self.config,
            layers=records,
            allocation=allocation.blocks if allocation else None,
            windows=len(windows["fit"]),
            held_out_windows=len(windows["held_out"]) if "held_out" in windows else 0,
            window_length=self.tokens.shape[1],
            stages=clock.seconds,  # first, as it waits for the device
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(self.model.device),
            versions=versions(),
        )

    def _windows(self) -> dict[str, Tensor]:
        """Windows to fit on and windows held out, when everything is in order."""
        check_tokens(self.model, self.tokens)
        check_damping(self.config.damping, self.config.held_out, len(self.tokens))
        self._losing()
        with stage("forward"), Chain(self.model, self.blocks, self.placement.loaded).loading():
            check_causal(self.model, self.tokens[0].long())
        fit, held_out = split_held_out(self.tokens, self.config.held_out)
        return {"fit": fit, "held_out": held_out} if len(held_out) else {"fit": fit}

    def _losing(self) -> list[Block]:
        """The blocks with those layers alone that lose weights."""
        return select_losing(self.model, self.blocks, self.config)

    def _allocation(self, windows: Tensor) -> Allocation | None:
        """How the sparsity is split over the layers; None for N:M, which leaves nothing to split."""
        if self.config.sparsity is None:
            return None
        if self.ledger.allocation is not None:
            return self.ledger.allocation
        losing = self._losing()
        measured = self.measure(
            self.model,
            losing,
            windows,
            method=self.config.split,
            damping=DEFAULT_DAMPING if self.config.damping == "auto" else self.config.damping,
            batch_size=self.config.batch_size,
            placement=self.placement.within(self._state_bytes),
            ranks=self.ranks,
            observer=self.observer,
        )
        allocation = allocate(losing, measured, method=self.config.split, sparsity=self.config.sparsity)
        self.ledger.keep_allocation(allocation)
        return allocation

    @property
    def _state_bytes(self) -> int:
        """Of the hidden states that wait here between two blocks that are pruned. Allocating is to take no more."""
        streams = 2 if self.config.target == "dense" else 1
        states = streams * self.tokens.numel() * hidden_size(self.model)
        return states * self.model.dtype.itemsize // self.ranks.count

    def _patterns(self, allocation: Allocation | None) -> dict[str, Pattern]:
        """What the mask of each layer must follow, by its name."""
        layers = [layer for block in self.blocks for layer in block.layers]
        losing = {layer.name for block in self._losing() for layer in block.layers}
        return {
            layer.name: _pattern(layer, self.config, allocation) if layer.name in losing else _LOSES_NOTHING
            for layer in layers
        }

    def _records(
        self, windows: dict[str, Tensor], patterns: Mapping[str, Pattern], start: float
    ) -> Iterator[LayerRecord]:
        total = sum(layer.weight.numel() for block in self.blocks for layer in block.layers)
        done = 0
        dense = self.config.target == "dense"
        walker = Walker(self.model, self.blocks, windows, self.config.batch_size, dense, self.placement, self.ranks)
        self.observer.stage("reading the calibration windows")
        for block in walker:
            self.observer.stage(f"block {block.index + 1} of {len(self.blocks)}")
            orders = find_free_orders(self.model, block) if self.config.reorders else {}
            orders = {name: order for name, order in orders.items() if isinstance(patterns[name], NM)}
            for groups in self._together(walker.groups(block)):
                layers = [layer for group in groups for layer in group.layers]
                records = self.ledger.restore(layers, block)
                finished = iter(records or _prune_groups(walker, block, groups, orders, self.config, patterns))
                kept: list[LayerRecord] = []
                for record in finished:
                    kept.append(record)
                    done += record.shape[0] * record.shape[1]
                    self.observer.layer(record, done / total)
                if records is None:
                    reordered = [one for layer in layers if layer.name in orders for one in orders[layer.name].layers]
                    self.ledger.keep(layers, reordered, kept, time.perf_counter() - start)
                yield from kept
            self.ledger.finish(block)

    def _together(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """The groups of a block in the parts whose inputs are captured together."""
        if not groups:
            return []
        return [groups] if self.config.capture == "block" else list(together(groups))


def _pattern(layer: Layer, config: PruneConfig, allocation: Allocation | None) -> Pattern:
    pattern = config.mask_pattern
    if allocation is None or isinstance(pattern, NM):
        return pattern
    return Unstructured(Fraction(allocation.pruned[layer.name], layer.weight.numel()), pattern.scope)


def _prune_groups(
    walker: Walker,
    block: Block,
    groups: Sequence[Group],
    orders: Mapping[str, FreeOrder],
    config: PruneConfig,
    patterns: Mapping[str, Pattern],
) -> Iterator[LayerRecord]:
    """Prunes groups whose inputs are captured together; their second moments live no longer than this generator."""
    moments = {name: walker.moments(block, groups, name) for name in walker.windows}
    for group in groups:
        fit, *rest = (moments[name].pop(0) for name in walker.windows)
        few = has_few(group, fit.tokens)
        fit = fit if fit.tokens else of_no_tokens(group, fit)
        with naming(group.layers[0]):
            fit, *rest = _reordered(group, orders, [fit, *rest], config, walker.ranks)
            held_out = rest[0] if rest and rest[0].tokens else None
            metrics = _metrics(walker, block, group) if config.weighs_rows else {}
            factored = _factorise(group, patterns, fit, held_out, config, walker.ranks)
            inputs = Inputs(factored, fit, held_out, metrics, few)
        for layer in group.layers:
            walker.placement.release()  # what the last layer left in pieces adds up over a block
            yield prune_layer(layer, block.index, inputs, config, patterns[layer.name], walker.ranks)


def _reordered(
    group: Group, orders: Mapping[str, FreeOrder], moments: list[InputMoments], config: PruneConfig, ranks: Ranks
) -> list[InputMoments]:
    """The moments of a group, after the inputs of its only layer were reordered, if their order is free."""
    order = orders.get(group.layers[0].name) if len(group.layers) == 1 else None
    if order is None or not isinstance(config.mask_pattern, NM):
        return moments
    damping = DEFAULT_DAMPING if config.damping == "auto" else config.damping
    damping = raised_damping(damping, group, moments[0].tokens)
    with stage("order"):
        return reorder(order, config.mask_pattern, moments, config.share, damping, ranks)


def _metrics(walker: Walker, block: Block, group: Group) -> dict[str, Tensor]:
    """What errors in the outputs of Q and K do to attention, where the group is theirs."""
    pair = find_query_key(walker.model, block)
    names = {layer.name for layer in group.layers}
    if pair is None or not {pair.query.name, pair.key.name} <= names:
        return {}
    return walker.logit_curvature(block, pair, "fit", CURVATURE_TOKENS)


def _factorise(
    group: Group,
    patterns: Mapping[str, Pattern],
    fit: InputMoments,
    held_out: InputMoments | None,
    config: PruneConfig,
    ranks: Ranks,
) -> FactoredGram:
    with stage("factorisation"):
        if config.damping != "auto" or has_few(group, fit.tokens):
            damping = DEFAULT_DAMPING if config.damping == "auto" else config.damping
            return FactoredGram(fit.gram, raised_damping(damping, group, fit.tokens))
        if held_out is None:  # a run without any is refused, but an expert may get none of them
            return FactoredGram(fit.gram, DEFAULT_DAMPING)
        weights = [layer.weight.float() for layer in group.layers]
        asked = [patterns[layer.name] for layer in group.layers]
        chosen = ranks.first_only(lambda: choose_damping(weights, asked, fit, held_out, config.share))
        damping = ranks.first(lambda: chosen.damping if chosen else 0.0)
        return chosen or FactoredGram(fit.gram, damping)
