"""Prune in place: for each block, for each group of layers with the same input: Gram matrix, mask, refit."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import split_held_out
from trimfit.masks import SELECTORS, Selection, check_width
from trimfit.models import Block, Group, Layer, Walker, check_causal, find_blocks, select_layers
from trimfit.pipelines.checks import check_finite, check_tokens, naming
from trimfit.pipelines.config import PruneConfig
from trimfit.pipelines.layer_error import LayerErrorMeter
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.records import LayerRecord, PruneReport, peak_memory, versions
from trimfit.refit import FactoredGram, RefitSolution, refit


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
    windows = {"fit": fit, "held_out": held_out} if len(held_out) else {"fit": fit}

    total = sum(layer.weight.numel() for block in blocks for layer in block.layers)
    done = 0
    records: list[LayerRecord] = []
    walker = Walker(model, blocks, windows, config.batch_size)
    observer.stage("reading the calibration windows")
    for block in walker:
        observer.stage(f"block {block.index + 1} of {len(blocks)}")
        groups = walker.groups(block)
        together = [groups] if groups and config.capture == "block" else [[group] for group in groups]
        for part in together:
            for record in _prune_groups(walker, block, part, config):
                records.append(record)
                done += record.shape[0] * record.shape[1]
                observer.layer(record, done / total)
    return PruneReport(
        config=config,
        layers=records,
        windows=len(fit),
        held_out_windows=len(held_out),
        window_length=tokens.shape[1],
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(model.device),
        versions=versions(),
    )


@dataclass(frozen=True)
class _Inputs:
    """What is known of a group's inputs: the factorised Gram matrix, and the plain ones to measure errors with."""

    factored: FactoredGram
    calibration: Tensor
    held_out: Tensor | None


def _prune_groups(walker: Walker, block: Block, groups: Sequence[Group], config: PruneConfig) -> Iterator[LayerRecord]:
    """Prunes groups whose inputs are captured together; the Gram matrices live no longer than this generator."""
    grams = {name: walker.grams(block, groups, name) for name in walker.windows}
    for group in groups:
        gram, *held_out = (grams[name].pop(0) for name in walker.windows)
        with naming(group.layers[0]):
            inputs = _Inputs(FactoredGram(gram, config.damping), gram, held_out[0] if held_out else None)
        for layer in group.layers:
            yield _prune_layer(layer, block.index, inputs, config, walker.model.device)


def _prune_layer(layer: Layer, block: int, inputs: _Inputs, config: PruneConfig, device: torch.device) -> LayerRecord:
    start = time.perf_counter()
    dense = layer.weight.float().clone(memory_format=torch.contiguous_format)  # GPT-2 keeps it transposed
    with naming(layer):
        selection = SELECTORS[config.selector].select(dense, inputs.factored, config.mask_pattern)
        weight, solution = _weights(dense, selection, inputs.factored, config)
    layer.write(weight)
    errors = LayerErrorMeter(dense, inputs.calibration, inputs.held_out)
    return LayerRecord(
        name=layer.name,
        block=block,
        shape=(dense.shape[0], dense.shape[1]),
        sparsity=1 - int(selection.mask.sum()) / selection.mask.numel(),
        masked=errors.measure(_masked(dense, selection)),
        final=errors.measure(weight),
        stored=errors.measure(layer.weight),
        certificate=solution.certificate.layer if solution else None,
        worst_row=solution.certificate.relative.max().item() if solution else None,
        status=solution.status.value if solution else None,
        solver=type(solution.solver).__name__ if solution else None,
        steps=solution.steps if solution else None,
        damping=solution.damping if solution else inputs.factored.damping,
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(device),
    )


def _weights(
    dense: Tensor, selection: Selection, gram: FactoredGram, config: PruneConfig
) -> tuple[Tensor, RefitSolution | None]:
    """The layer's new weights; with the solution where they were refitted."""
    if config.refit == "none":
        return _masked(dense, selection), None
    if config.refit == "own":
        assert selection.weight is not None  # the config refuses selectors without an update
        return selection.weight, None
    solution = refit(gram, dense, selection.mask, solver=config.make_solver())
    return solution.weight, solution


def _masked(dense: Tensor, selection: Selection) -> Tensor:
    return torch.where(selection.mask, dense, 0.0)


def _check(model: PreTrainedModel, tokens: Tensor, blocks: list[Block], config: PruneConfig) -> None:
    """Raises `InputError` for whatever can be seen to be wrong before anything changes."""
    check_tokens(model, tokens)
    for layer in (layer for block in blocks for layer in block.layers):
        with naming(layer):
            check_width(config.mask_pattern, layer.weight.shape[1])
    check_finite(model)
    check_causal(model, tokens[0].long())
