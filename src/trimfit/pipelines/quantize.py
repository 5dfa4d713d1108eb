"""Quantize in place, block by block: fold, find the Gram matrices, transform, round. By default without any data."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models import Block, Walker, check_causal, find_blocks, find_flow, find_folds, select_layers, together
from trimfit.pipelines.checks import check_finite, check_tokens
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.quantize_block import BlockWork
from trimfit.pipelines.quantize_config import QuantizeConfig
from trimfit.pipelines.quantize_records import QuantizedRecord, QuantizeReport
from trimfit.pipelines.records import peak_memory, versions
from trimfit.pipelines.weight_moments import WeightMoments
from trimfit.quant import Quantized
from trimfit.quant.blocks import BlockTransform

Sink = Callable[[str, Quantized, BlockTransform | None], None]


def quantize(
    model: PreTrainedModel,
    config: QuantizeConfig | None = None,
    tokens: Tensor | None = None,
    *,
    observer: Observer | None = None,
    sink: Sink | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizeReport:
    """Quantizes the linear layers of a causal LM's decoder blocks in place. Embeddings and head stay as they are.

    Afterwards the model holds the levels as ordinary weights in its own dtype: it computes what the packed model will.

    **Arguments**

    - `model`: any Hugging Face decoder-only LM, on the device on which to work.
    - `config`: see `QuantizeConfig`.
    - `tokens`: (N, L) int64 calibration windows, for Gram matrices of data; None uses no data and runs no forward pass.
    - `observer`: told of each finished layer.
    - `sink`: given the name, codes and online transformation of each layer as soon as they are final.
    - `scale_dtype`: in which scales must be exact, beside the model's own.

    **Returns** a `QuantizeReport`. Raises `InputError` before anything changes when the arguments do not fit together.
    """
    config = config or QuantizeConfig()
    observer = observer or Silent()
    blocks = select_layers(model, find_blocks(model), config.ignore)
    check_finite(model)
    if tokens is None:
        run = QuantizeRun(model, config, blocks, observer, sink, scale_dtype)
        moments = WeightMoments(model)
        for block in blocks:
            run.without_data(block, moments)
        return run.report()
    check_tokens(model, tokens)
    check_causal(model, tokens[0].long())
    run = QuantizeRun(model, config, blocks, observer, sink, scale_dtype)
    observer.stage("reading the calibration windows")
    walker = Walker(model, blocks, {"fit": tokens}, config.batch_size)
    for block in walker:
        run.with_data(block, walker)
    return run.report(windows=len(tokens), window_length=tokens.shape[1])


class QuantizeRun:
    """Quantizes one block after the other, and keeps the records.

    `device` is where the blocks are when their turn comes; where the model is, if None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuantizeConfig,
        blocks: Sequence[Block],
        observer: Observer,
        sink: Sink | None,
        scale_dtype: torch.dtype | None,
        device: torch.device | None = None,
    ):
        self._model, self._config, self._blocks = model, config, blocks
        self._device = device or model.device
        self._observer, self._sink, self._scale_dtype = observer, sink, scale_dtype
        self._start = time.perf_counter()
        self._total = sum(layer.weight.numel() for block in blocks for layer in block.layers)
        self._done = 0
        self._online = 0
        self._records: list[QuantizedRecord] = []
        self._refused: dict[str, None] = {}  # an ordered set

    def without_data(self, block: Block, moments: WeightMoments) -> None:
        """Quantizes a block with what its weights and those before it tell."""
        work = self._begin(block)
        flow = find_flow(self._model, block.name)
        grams: dict[str, Tensor] = {} if flow is None else moments.grams(flow, work.weights)
        for layers in work.groups():
            work.quantize(layers, work.gram_of(layers, grams), data=False)
        if self._config.rounding == "alternating":
            work.round_pairs()
        self._finish(work)

    def with_data(self, block: Block, walker: Walker) -> None:
        """Quantizes a block with Gram matrices of calibration windows, seen through what is quantized already."""
        work = self._begin(block)
        for layer in block.layers:
            layer.write(work.weights[layer.name])  # the norms are folded already, and the inputs seen through them
        for groups in together(walker.groups(block)):
            for group, moments in zip(groups, walker.moments(block, groups, "fit"), strict=True):
                work.quantize_group(group, moments)
                for layer in group.layers:
                    layer.write(work.layers[layer.name].weight)
        self._finish(work)

    def report(self, *, windows: int = 0, window_length: int = 0) -> QuantizeReport:
        """The report, when all blocks are finished."""
        return QuantizeReport(
            config=self._config,
            layers=self._records,
            refused=list(self._refused),
            windows=windows,
            window_length=window_length,
            online_multiply_adds=self._online / max(self._done, 1),
            seconds=time.perf_counter() - self._start,
            peak_memory=peak_memory(self._device),
            versions=versions(),
        )

    def _begin(self, block: Block) -> BlockWork:
        self._observer.stage(f"block {block.index + 1} of {len(self._blocks)}")
        return BlockWork(block, find_folds(self._model, block.name), self._config, self._scale_dtype)

    def _finish(self, work: BlockWork) -> None:
        self._refused |= dict.fromkeys(work.left_out)
        transforms = {id(done.transform): done.transform for done in work.layers.values() if done.transform}
        self._online += sum(transform.multiply_adds for transform in transforms.values())
        for layer in work.block.layers:
            done = work.layers[layer.name]
            layer.write(done.weight)
            if self._sink is not None:
                self._sink(layer.name, done.quantized, done.transform)
            record = work.record(layer.name, layer.weight.device)
            self._records.append(record)
            self._done += layer.weight.numel()
            self._observer.layer(record, self._done / self._total)
