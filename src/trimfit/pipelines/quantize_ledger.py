"""What a quantization leaves behind on its way: for its caller to take, or for another run to go on from."""

from collections.abc import Callable
from typing import Protocol

import torch

from trimfit.models import Block
from trimfit.pipelines.finished_block import BlockRecord, FinishedBlock
from trimfit.pipelines.run_directory import RunDirectory
from trimfit.quant import Grid, Quantized
from trimfit.quant.blocks import BlockTransform

Sink = Callable[[str, Quantized, BlockTransform | None], None]


class QuantizeLedger(Protocol):
    """Keeps what is finished."""

    @property
    def seconds(self) -> float:
        """That earlier runs have spent on what is kept."""
        ...

    def restore(self, block: Block) -> FinishedBlock | None:
        """A block that was finished before; None if it was not."""
        ...

    def keep(self, finished: FinishedBlock, seconds: float) -> None:
        """Keeps a block that is finished, `seconds` after the run began."""
        ...


class ToSink:
    """Keeps nothing, but hands each layer on."""

    seconds = 0.0

    def __init__(self, sink: Sink | None):
        self._sink = sink

    def restore(self, block: Block) -> None:
        """There is nothing."""

    def keep(self, finished: FinishedBlock, seconds: float) -> None:
        """Hands its layers on."""
        for name, layer in finished.layers.items():
            if self._sink is not None:
                self._sink(name, layer.quantized, layer.transform)


class KeptBlocks:
    """Blocks in the parts of an open run directory.

    - `grid`: the one asked for. `device`: where blocks are put when they are read.
    """

    def __init__(self, run: RunDirectory, grid: Grid, device: torch.device):
        self._run, self._grid, self._device = run, grid, device

    @property
    def seconds(self) -> float:
        """That earlier runs have spent on what is kept."""
        return self._run.seconds

    def restore(self, block: Block) -> FinishedBlock | None:
        """A block that was finished before; None if it was not."""
        part = self._run.parts.get((block.name,))
        if part is None:
            return None
        record = BlockRecord.model_validate(part.record)
        return FinishedBlock.read(block.name, part.tensors(), record, self._grid, self._device)

    def finished(self, block: Block) -> FinishedBlock:
        """A block, when all are finished."""
        found = self.restore(block)
        assert found is not None
        return found

    def keep(self, finished: FinishedBlock, seconds: float) -> None:
        """Writes a block that is finished, and returns when it is on the disk."""
        self._run.keep((finished.name,), finished.tensors(), finished.record.model_dump(), seconds)
