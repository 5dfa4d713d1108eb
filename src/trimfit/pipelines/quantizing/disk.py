"""Disk that a quantization takes: the result, and until that is whole the finished blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trimfit.checkpoints.shard_writer import SHARD_BYTES
from trimfit.pipelines.quantizing.config import QuantizeConfig

Format = Literal["packed", "dense", "gguf"]


@dataclass(frozen=True)
class QuantizeDisk:
    """Bytes on the disk, from shapes alone.

    - `layers`: (out, in) of those that are quantized.
    - `model`: bytes of all weights; `blocks`: of those in blocks; `itemsize`: of one number.
    - `moments`: bytes of second moments that are kept with the blocks.
    - `format`: of the result. A GGUF file is about as large as a packed one.
    """

    layers: Sequence[tuple[int, int]]
    model: int
    blocks: int
    itemsize: int
    moments: int
    config: QuantizeConfig
    format: Format

    @property
    def parts(self) -> int:
        """Finished blocks: codes and scales, all else that is in the blocks (of a packed result twice), and moments."""
        if self.format == "packed":
            return self._packed_blocks + self._plain + self.moments
        return self._weights + self._groups * (self.itemsize + 1) + self._plain + self.moments

    @property
    def result(self) -> int:
        """The weights that are written."""
        return self.model if self.format == "dense" else self.model - self.blocks + self._packed_blocks

    @property
    def peak(self) -> int:
        """The result beside the parts. Each file of a packed one is there twice while it is written.

        Parts of a large packed result are files of it, and only the rest is written.
        """
        if self.format != "packed":
            return self.parts + self.result
        written = self.model - self.blocks if self._packed_blocks > SHARD_BYTES else self.result
        return self.parts + written + min(written, SHARD_BYTES)

    @property
    def _packed_blocks(self) -> int:
        return self._weights * self.config.bits // 8 + self._groups * self.itemsize + self._plain

    @property
    def _plain(self) -> int:
        return self.blocks - self._weights * self.itemsize

    @property
    def _weights(self) -> int:
        return sum(rows * inputs for rows, inputs in self.layers)

    @property
    def _groups(self) -> int:
        fitted = self.config.grid.fitted
        return sum(rows * (inputs // (fitted(inputs).group_size or inputs)) for rows, inputs in self.layers)
