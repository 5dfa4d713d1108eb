"""Prune in place: for each block, for each group of layers with the same input: Gram matrix, mask, refit."""

import time
from collections.abc import Iterator, Sequence
from fractions import Fraction

from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import InputMoments, split_held_out
from trimfit.errors import InputError
from trimfit.masks import NM, Pattern, Unstructured, check_width
from trimfit.models import Block, Group, Layer, Walker, check_causal, find_blocks, find_query_key, select_layers
from trimfit.pipelines.allocate import Allocation, allocate
from trimfit.pipelines.checks import check_finite, check_tokens, naming
from trimfit.pipelines.config import PruneConfig
from trimfit.pipelines.damping import DEFAULT_DAMPING, choose_damping
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.prune_layer import Inputs, prune_layer
from trimfit.pipelines.records import LayerRecord, PruneReport, peak_memory, versions
from trimfit.pipelines.row_weights import attention_row_weights
from trimfit.refit import FactoredGram


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    config: PruneConfig | None = None,
    *,
    observer: Observer | None = None,
) -> PruneReport:
    """Prunes the linear layers of a causal LM's decoder blocks in place. Embeddings and head stay dense.

    **Arguments**

    - `model`: any Hugging Face decoder-only LM, on the device on which to work.
    - `tokens`: (N, L) int64, calibration windows of L token ids each.
    - `config`: see `PruneConfig`.
    - `observer`: told of each finished layer.

    **Returns** a `PruneReport`. Deterministic: the same input gives the same weights on the same machine.

    Raises `InputError` before anything changes when model, tokens and config do not fit together.
    """
    config = config or PruneConfig()
    observer = observer or Silent()
    start = time.perf_counter()
    blocks = select_layers(model, find_blocks(model), config.ignore)
    _check(model, tokens, blocks, config)
    fit, held_out = split_held_out(tokens, config.held_out)
    if config.damping == "auto" and not len(held_out):
        raise InputError(
            f"damping 'auto' is chosen on held-out windows, but a share of {config.held_out} of {len(tokens)} windows "
            "is none; give more windows or a larger share"
        )
    windows = {"fit": fit, "held_out": held_out} if len(held_out) else {"fit": fit}

    allocation = _allocation(model, blocks, fit, config, observer)
    total = sum(layer.weight.numel() for block in blocks for layer in block.layers)
    done = 0
    records: list[LayerRecord] = []
    walker = Walker(model, blocks, windows, config.batch_size, dense=config.target == "dense")
    observer.stage("reading the calibration windows")
    for block in walker:
        observer.stage(f"block {block.index + 1} of {len(blocks)}")
        groups = walker.groups(block)
        together = [groups] if groups and config.capture == "block" else [[group] for group in groups]
        for part in together:
            for record in _prune_groups(walker, block, part, config, allocation):
                records.append(record)
                done += record.shape[0] * record.shape[1]
                observer.layer(record, done / total)
    return PruneReport(
        config=config,
        layers=records,
        allocation=allocation.blocks if allocation else None,
        windows=len(fit),
        held_out_windows=len(held_out),
        window_length=tokens.shape[1],
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(model.device),
        versions=versions(),
    )


def _allocation(
    model: PreTrainedModel, blocks: Sequence[Block], windows: Tensor, config: PruneConfig, observer: Observer
) -> Allocation | None:
    """How the sparsity is split over the layers; None for N:M, which leaves nothing to split."""
    if config.sparsity is None:
        return None
    damping = DEFAULT_DAMPING if config.damping == "auto" else config.damping
    return allocate(
        model,
        blocks,
        windows,
        method=config.split,
        sparsity=config.sparsity,
        damping=damping,
        batch_size=config.batch_size,
        observer=observer,
    )


def _pattern(layer: Layer, config: PruneConfig, allocation: Allocation | None) -> Pattern:
    pattern = config.mask_pattern
    if allocation is None or isinstance(pattern, NM):
        return pattern
    return Unstructured(Fraction(allocation.pruned[layer.name], layer.weight.numel()), pattern.scope)


def _prune_groups(
    walker: Walker, block: Block, groups: Sequence[Group], config: PruneConfig, allocation: Allocation | None
) -> Iterator[LayerRecord]:
    """Prunes groups whose inputs are captured together; their second moments live no longer than this generator."""
    moments = {name: walker.moments(block, groups, name) for name in walker.windows}
    for group in groups:
        fit, *rest = (moments[name].pop(0) for name in walker.windows)
        held_out = rest[0] if rest else None
        with naming(group.layers[0]):
            row_weights = _row_weights(walker, block, group, fit) if config.weighs_rows else {}
            patterns = [_pattern(layer, config, allocation) for layer in group.layers]
            inputs = Inputs(_factorise(group, patterns, fit, held_out, config), fit, held_out, row_weights)
        for layer, pattern in zip(group.layers, patterns, strict=True):
            yield prune_layer(layer, block.index, inputs, config, pattern)


def _row_weights(walker: Walker, block: Block, group: Group, fit: InputMoments) -> dict[str, Tensor]:
    pair = find_query_key(walker.model, block)
    names = {layer.name for layer in group.layers}
    if pair is None or not {pair.query.name, pair.key.name} <= names:
        return {}
    return attention_row_weights(pair, fit.gram)


def _factorise(
    group: Group, patterns: Sequence[Pattern], fit: InputMoments, held_out: InputMoments | None, config: PruneConfig
) -> FactoredGram:
    if config.damping != "auto":
        return FactoredGram(fit.gram, config.damping)
    assert held_out is not None  # the config refuses "auto" without a share, and `_check` a share without a window
    weights = [layer.weight.float() for layer in group.layers]
    return choose_damping(weights, patterns, fit, held_out, config.share)


def _check(model: PreTrainedModel, tokens: Tensor, blocks: list[Block], config: PruneConfig) -> None:
    """Raises `InputError` for whatever can be seen to be wrong before anything changes."""
    check_tokens(model, tokens)
    for layer in (layer for block in blocks for layer in block.layers):
        with naming(layer):
            check_width(config.mask_pattern, layer.weight.shape[1])
    check_finite(model)
    check_causal(model, tokens[0].long())
