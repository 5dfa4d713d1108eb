"""Quantize in place, block by block: fold, find the Gram matrices, transform, round. By default without any data."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models import (
    IN_MEMORY,
    Block,
    Chain,
    Placement,
    Walker,
    check_causal,
    find_blocks,
    find_flow,
    find_folds,
    select_layers,
    together,
)
from trimfit.pipelines.checks import check_finite, check_tokens
from trimfit.pipelines.environment import peak_memory, versions
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.quantizing.block import BlockWork
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.finished_block import BlockRecord
from trimfit.pipelines.quantizing.ledger import QuantizeLedger, Sink, ToSink
from trimfit.pipelines.quantizing.records import QuantizeReport
from trimfit.pipelines.quantizing.shared import share_state
from trimfit.pipelines.quantizing.weight_moments import WeightMoments
from trimfit.ranks import ALONE, Ranks
from trimfit.timing import Clock, stage


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
    - `scale_dtype`: in which scales are stored; the model's own where None.

    **Returns** a `QuantizeReport`. Raises `InputError` before anything changes when the arguments do not fit together.
    """
    config = config or QuantizeConfig()
    observer = observer or Silent()
    blocks = select_layers(model, find_blocks(model), config.ignore)
    check_finite(model)
    calibration = WeightMoments(model) if tokens is None else tokens
    ledger = ToSink(sink)
    return QuantizeRun(model, blocks, calibration, config, observer, ledger, scale_dtype=scale_dtype).run()


@dataclass
class QuantizeRun:
    """One run over the blocks of a model, wherever it is and whoever keeps what is finished.

    - `blocks`: with the layers to quantize, whose weights are finite.
    - `calibration`: (N, L) int64 windows, or without data what the weights tell of the hidden states.
    - `config`, `observer`, `scale_dtype`: as for `quantize`.
    - `ledger`: asked for what is finished already, and given what is finished; None in processes but the first.
    - `placement`: where weights come from and hidden states wait.
    - `ranks`: the processes that share the run.
    - `device`: where blocks are when their turn comes; where the model is, if None.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    calibration: Tensor | WeightMoments
    config: QuantizeConfig
    observer: Observer
    ledger: QuantizeLedger | None
    placement: Placement = IN_MEMORY
    ranks: Ranks = ALONE
    scale_dtype: torch.dtype | None = None
    device: torch.device | None = None

    def run(self) -> QuantizeReport:
        """Quantizes the blocks in their order. Raises `InputError` before anything changes if something is wrong."""
        start = time.perf_counter() - self.ranks.first(lambda: self._first.seconds)
        tokens = self.calibration if isinstance(self.calibration, Tensor) else None
        total = sum(layer.weight.numel() for block in self.blocks for layer in block.layers)
        done = 0
        blocks: list[BlockRecord] = []
        clock = Clock(self.device or self.model.device)
        with clock.running():
            for record in self._records(start):
                blocks.append(record)
                for layer in record.layers:
                    done += layer.shape[0] * layer.shape[1]
                    self.observer.layer(layer, done / total)
        return QuantizeReport(
            config=self.config,
            layers=[layer for block in blocks for layer in block.layers],
            refused=list(dict.fromkeys(sentence for block in blocks for sentence in block.left_out)),
            windows=0 if tokens is None else len(tokens),
            window_length=0 if tokens is None else tokens.shape[1],
            online_multiply_adds=sum(block.multiply_adds for block in blocks) / max(done, 1),
            stages=clock.seconds,  # first, as it waits for the device
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(self.device or self.model.device),
            versions=versions(),
        )

    def _records(self, start: float) -> Iterator[BlockRecord]:
        if isinstance(self.calibration, Tensor):
            return self._with_data(self.calibration, start)
        return self._without_data(self.calibration, start)

    def _without_data(self, moments: WeightMoments, start: float) -> Iterator[BlockRecord]:
        """Quantizes each block with what its weights and those before it tell."""
        for block in self.blocks:
            with self.placement.loaded(block):
                yield self._finish(block, lambda work: self._round_without_data(work, moments), start)
                moments.stream.moment = self.ranks.same(moments.stream.moment)

    def _round_without_data(self, work: BlockWork, moments: WeightMoments) -> None:
        flow = find_flow(self.model, work.block.name)
        with stage("moments"):
            grams: dict[str, Tensor] = {} if flow is None else moments.grams(flow, work.weights)
        with stage("round"):
            for layers in work.groups():
                work.quantize(layers, work.gram_of(layers, grams), data=False)
            if self.config.rounding == "alternating":
                self.ranks.first_only(work.round_pairs)

    def _with_data(self, tokens: Tensor, start: float) -> Iterator[BlockRecord]:
        """Quantizes each block with Gram matrices of calibration windows, seen through what is quantized already."""
        check_tokens(self.model, tokens)
        with Chain(self.model, self.blocks, self.placement.loaded).loading():
            check_causal(self.model, tokens[0].long())
        self.observer.stage("reading the calibration windows")
        size = self.config.batch_size
        walker = Walker(self.model, self.blocks, {"fit": tokens}, size, placement=self.placement, ranks=self.ranks)
        for block in walker:
            yield self._finish(block, lambda work: _round_with_data(work, walker), start)
            share_state(self.ranks, block)

    def _finish(self, block: Block, quantize: Callable[[BlockWork], None], start: float) -> BlockRecord:
        """The block as an earlier run left it, or as `quantize` makes it now, which is kept.

        Then the model of the first process has it.
        """
        self.observer.stage(f"block {block.index + 1} of {len(self.blocks)}")
        record = self.ranks.first(lambda: self._restore(block))
        if record is None:
            with stage("fold"):
                work = BlockWork(block, find_folds(self.model, block.name), self.config, self.scale_dtype, self.ranks)
            quantize(work)
            record = self.ranks.first(lambda: self._keep(work, start))
        return record

    def _restore(self, block: Block) -> BlockRecord | None:
        finished = self._first.restore(block)
        if finished is None:
            return None
        finished.write(block)
        if isinstance(self.calibration, WeightMoments) and finished.moment is not None:
            self.calibration.stream.moment = finished.moment
        return finished.record

    def _keep(self, work: BlockWork, start: float) -> BlockRecord:
        moment = self.calibration.stream.moment if isinstance(self.calibration, WeightMoments) else None
        finished = work.finished(moment)
        finished.write(work.block)
        with stage("save"):
            self._first.keep(finished, time.perf_counter() - start)
        return finished.record

    @property
    def _first(self) -> QuantizeLedger:
        assert self.ledger is not None
        return self.ledger


def _round_with_data(work: BlockWork, walker: Walker) -> None:
    for layer in work.block.layers:
        layer.write(work.weights[layer.name])  # the norms are folded already, and the inputs seen through them
    for groups in together(walker.groups(work.block)):
        for group, moments in zip(groups, walker.moments(work.block, groups, "fit"), strict=True):
            with stage("round"):
                work.quantize_group(group, moments)
                for layer in group.layers:
                    layer.write(work.layers[layer.name].weight)
