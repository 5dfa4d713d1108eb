"""Disk that a quantization takes: the result, and until that is whole the finished blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimfit.pipelines.quantize_config import QuantizeConfig


@dataclass(frozen=True)
class QuantizeDisk:
    """Bytes on the disk, from shapes alone.

    - `layers`: (out, in) of those that are quantized.
    - `model`: bytes of all weights; `blocks`: of those in blocks; `itemsize`: of one number.
    - `moments`: bytes of second moments that are kept with the blocks.
    - `dense`: whether the result is a dense checkpoint; else it holds codes.
    """

    layers: Sequence[tuple[int, int]]
    model: int
    blocks: int
    itemsize: int
    moments: int
    config: QuantizeConfig
    dense: bool

    @property
    def parts(self) -> int:
        """Finished blocks: a byte for each weight, scales with zero points, and all else that is in the blocks."""
        plain = self.blocks - self._weights * self.itemsize
        return self._weights + self._groups * (self.itemsize + 1) + plain + self.moments

    @property
    def result(self) -> int:
        """The weights that are written."""
        if self.dense:
            return self.model
        packed = self._weights * self.config.bits // 8 + self._groups * self.itemsize
        return self.model - self._weights * self.itemsize + packed

    @property
    def peak(self) -> int:
        """The result beside the parts; not the one file, of 4 GiB at most, that is there twice while it is written."""
        return self.parts + self.result

    @property
    def _weights(self) -> int:
        return sum(rows * inputs for rows, inputs in self.layers)

    @property
    def _groups(self) -> int:
        fitted = self.config.grid.fitted
        return sum(rows * (inputs // (fitted(inputs).group_size or inputs)) for rows, inputs in self.layers)
