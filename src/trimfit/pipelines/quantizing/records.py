"""What a quantization leaves behind about itself."""

from pydantic import BaseModel, ConfigDict

from trimfit.pipelines.quantizing.config import QuantizeConfig


class QuantizedRecord(BaseModel):
    """What was done to one layer and what is known of it.

    - `group_size`: of its grid; None is the whole row, also for layers narrower than the group asked for.
    - `bits_per_weight`: with scales, zero points and the layer's share of online transformations.
    - `transform`: names of what was done to it before rounding, "" for nothing.
    - `zeros`: share of its weights that are exactly 0, all of which stay 0 if `pruned`.
    - `weight_error`: ‖Ŵ − W‖² / ‖W‖², of the transformed weights where there is an online transformation undone again.
    - `output_error`: tr((Ŵ − W) H (Ŵ − W)ᵀ) / tr(W H Wᵀ) with the Gram matrix of calibration; None without.
    - `tokens`: of calibration, which the Gram matrix is of; None without data. `few_tokens` says of an expert that they
      are too few for the damping asked for: it was damped more or, without any token, rounded as without data.
    - `seconds`: of this layer alone. `peak_memory`: bytes, the largest so far.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    block: int
    shape: tuple[int, int]
    group_size: int | None
    bits_per_weight: float
    transform: str
    zeros: float
    pruned: bool
    weight_error: float
    output_error: float | None
    tokens: int | None
    few_tokens: bool
    seconds: float
    peak_memory: int

    @property
    def error(self) -> float:
        """The error to show while the run goes on."""
        return self.weight_error if self.output_error is None else self.output_error


class QuantizeReport(BaseModel):
    """All that a quantization tells: its config and a record for each layer it changed.

    - `refused`: why transformations were left out, a sentence each.
    - `windows`, `window_length`: of calibration; 0 where no data was used.
    - `online_multiply_adds`: of online transformations, relative to those of the quantized layers.
    - `stages`: seconds by what they were spent on; of this run alone, if it went on with an earlier one.
    """

    model_config = ConfigDict(frozen=True)

    config: QuantizeConfig
    layers: list[QuantizedRecord]
    refused: list[str]
    windows: int
    window_length: int
    online_multiply_adds: float
    seconds: float
    stages: dict[str, float]
    peak_memory: int
    versions: dict[str, str]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of the quantized layers."""
        sizes = [record.shape[0] * record.shape[1] for record in self.layers]
        return sum(size * r.bits_per_weight for size, r in zip(sizes, self.layers, strict=True)) / sum(sizes)

    @property
    def weight_error(self) -> float:
        """Mean over the layers."""
        return sum(record.weight_error for record in self.layers) / len(self.layers)
