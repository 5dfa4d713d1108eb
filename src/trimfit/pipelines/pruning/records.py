"""What a run leaves behind about itself."""

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from trimfit.pipelines.pruning.allocate import BlockBudget
from trimfit.pipelines.pruning.config import PruneConfig

# The weights that a layer was given: those of the optimal refit, the selector's own, or the dense ones under the mask.
Accepted: TypeAlias = Literal["optimal", "own", "none"]


class LayerError(BaseModel):
    """Relative output error ‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² against the dense layer on the same inputs.

    `held_out` is None when no windows were held out.
    """

    model_config = ConfigDict(frozen=True)

    calibration: float
    held_out: float | None


class LayerRecord(BaseModel):
    """What was done to one layer and what is known of it.

    - `masked`, `final`: error with the dense weights under the mask, and with the weights as computed.
    - `stored`: error of the final weights once rounded to the model's dtype.
    - `accepted`: the weights that the layer was given. Not those asked for where simpler ones were nearer to the target
      on held-out windows: the refit had fitted too few tokens too closely. `certificate` and all of the solver are None
      then.
    - `certificate`: proven bound on the distance to the optimum relative to the gain over the masked weights, of the
      whole layer; `worst_row` the largest of a single row, or head of Q and K. None where nothing was refitted.
    - `rows`: what errors of its rows counted: the same, or in heads of Q and K what "attention" makes of them. "equal"
      also where attention is of its own kind and tells nothing.
    - `tokens`: of calibration, which the Gram matrix is of. `few_tokens` says of an expert that they are too few for
      the damping asked for: it was damped more or, without any token, masked by magnitude; its errors are of weights.
    - `damping`: λ used; it is above the λ asked for when the Gram matrix was singular, and for experts with few tokens.
    - `seconds`: mask and refit of this layer, without the forward passes that its group shares.
    - `peak_memory`: bytes, the largest so far of this process (or of the device where it counts its own).
    """

    model_config = ConfigDict(frozen=True)

    name: str
    block: int
    shape: tuple[int, int]
    sparsity: float
    masked: LayerError
    final: LayerError
    stored: LayerError
    accepted: Accepted
    rows: Literal["equal", "attention"] = "equal"
    certificate: float | None
    worst_row: float | None
    status: str | None
    solver: str | None
    steps: int | None
    tokens: int
    few_tokens: bool
    damping: float
    seconds: float
    peak_memory: int

    @property
    def error(self) -> float:
        """Of the final weights on held-out tokens, or on those of calibration where none were held out."""
        return self.final.calibration if self.final.held_out is None else self.final.held_out


class PruneReport(BaseModel):
    """All that a prune run tells: its config and a record for each layer it changed.

    - `allocation`: what each block was to lose; None for an N:M pattern.
    - `seconds`: of the whole run, those before an interruption included.
    - `stages`: seconds by stage, of what was done since the last interruption.
    """

    model_config = ConfigDict(frozen=True)

    config: PruneConfig
    layers: list[LayerRecord]
    allocation: list[BlockBudget] | None = None
    windows: int
    held_out_windows: int
    window_length: int
    seconds: float
    stages: dict[str, float] = {}
    peak_memory: int
    versions: dict[str, str]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights of the layers, those that were to stay dense too."""
        sizes = [record.shape[0] * record.shape[1] for record in self.layers]
        return sum(size * r.sparsity for size, r in zip(sizes, self.layers, strict=True)) / sum(sizes)

    @property
    def certificate(self) -> float | None:
        """The largest layer certificate; None where nothing was refitted."""
        return max((r.certificate for r in self.layers if r.certificate is not None), default=None)

    @property
    def steps(self) -> int:
        """Most solver steps of a layer."""
        return max((r.steps or 0 for r in self.layers), default=0)

    def mean_error(self, stage: str = "final") -> LayerError:
        """Mean over the layers of `masked`, `final` or `stored`."""
        errors: list[LayerError] = [getattr(record, stage) for record in self.layers]
        held_out = [e.held_out for e in errors if e.held_out is not None]
        return LayerError(
            calibration=sum(e.calibration for e in errors) / len(errors),
            held_out=sum(held_out) / len(held_out) if held_out else None,
        )
