"""What a quantization leaves behind on its way: for its caller to take, or for another run to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trimfit.checkpoints.packed import BlockPacker
from trimfit.models import Block
from trimfit.pipelines.quantizing.finished_block import BlockRecord, FinishedBlock, read_levels
from trimfit.pipelines.runs.directory import Part, RunDirectory
from trimfit.quant import Grid, Quantized
from trimfit.quant.blocks import BlockTransform

Sink = Callable[[str, Quantized, BlockTransform | None], None]

_PACKED = "packed"  # behind the name of a block, the key of what a packed result holds of it


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
    - `packer`: of a packed result. Levels are then kept in a part of their own, which can be a file of the result.
    """

    def __init__(self, run: RunDirectory, grid: Grid, device: torch.device, packer: BlockPacker | None):
        self._run, self._grid, self._device, self._packer = run, grid, device, packer

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
        state = self._read(part)
        held = state if self._packer is None else self._read(self._run.parts[block.name, _PACKED])
        read = read_levels if self._packer is None else self._packer.unpack
        levels = {one.name: read(one.name, held, self._grid.fitted(one.shape[1])) for one in record.layers}
        return FinishedBlock.read(block.name, state, levels, record)

    def finished(self, block: Block) -> FinishedBlock:
        """A block, when all are finished."""
        found = self.restore(block)
        assert found is not None
        return found

    def packed(self, block: Block) -> tuple[Path, BlockRecord]:
        """The file of what a packed result holds of a block, when all are finished, and what is told of the block."""
        parts = self._run.parts
        file = parts[block.name, _PACKED].file
        assert file is not None
        return file, BlockRecord.model_validate(parts[block.name,].record)

    def keep(self, finished: FinishedBlock, seconds: float) -> None:
        """Writes a block that is finished, and returns when it is on the disk."""
        state = finished.state()
        if self._packer is None:
            state |= finished.levels()
        else:
            quantized = {name: layer.quantized for name, layer in finished.layers.items()}
            inverses = {name: transform.inverses for name, transform in finished.transforms().items()}
            packed = self._packer.pack(quantized, inverses, finished.plain)
            self._run.keep((finished.name, _PACKED), packed, None, seconds)
        self._run.keep((finished.name,), state, finished.record.model_dump(), seconds)

    def _read(self, part: Part) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in part.tensors().items()}
