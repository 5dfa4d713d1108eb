"""What a quantization is asked to do: frozen, validated, serialisable."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimfit.quant import Grid
from trimfit.quant.blocks import LARGEST_BLOCK

Transform = Literal["none", "pairs", "free", "online", "paper"]

_DAMPING_OF_DATA = 0.01  # as everybody's
_DAMPING_WITHOUT = 0.5  # moments told by weights alone are a rough guess: measured, 0.1 to 2 are alike, 0.02 is worse


class QuantizeConfig(BaseModel):
    """How to quantize.

    - `bits`: 2 to 8.
    - `group_size`: weights along the input that share a scale; None is the whole row.
    - `symmetric`: no zero points.
    - `transform`: "free" folds column balance into norms and MLPs, and V/O pairs where they help, at no cost at
      inference; "pairs" only V/O pairs, in closed form; "paper" V/O pairs by CafeQ's gradient form; "online"
      block-diagonal transformations that the inputs go through at run time; "none" nothing.
    - `rounding`: "alternating" is error feedback against the layer's Gram matrix, with V and O in turns; "nearest".
    - `block_size`: of online transformations, at most 128; the largest divisor of the width that is no larger.
    - `learned_steps`: of gradient descent for online transformations; with 0 only closed forms are tried.
    - `damping`: λ in H + λ·mean(diag H)·I; None is 0.01 with calibration and 0.5 without.
    - `ignore`: layers that stay as they are, as globs or "re:" patterns.
    - `batch_size`: windows in one forward pass, with calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=4, ge=2, le=8)
    group_size: int | None = Field(default=128, ge=2)
    symmetric: bool = False
    transform: Transform = "free"
    rounding: Literal["nearest", "alternating"] = "alternating"
    block_size: int = Field(default=128, ge=2, le=LARGEST_BLOCK)
    learned_steps: int = Field(default=100, ge=0, le=2**20)
    damping: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    ignore: tuple[str, ...] = ()
    batch_size: int = Field(default=8, ge=1, le=2**20)

    @model_validator(mode="before")
    @classmethod
    def _channel(cls, data: dict[str, Any]) -> dict[str, Any]:
        size = data.get("group_size")
        if size == "channel":
            return {**data, "group_size": None}
        if isinstance(size, str) and not size.removeprefix("-").isdecimal():
            raise ValueError(f"the group size is a number of inputs or 'channel', but it is {size!r}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size is not None and self.group_size > 2**20:
            raise ValueError("the group size is larger than any layer: use 'channel'")
        return self

    @property
    def grid(self) -> Grid:
        """The grid asked for, not yet fitted to a width."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def damping_for(self, *, data: bool) -> float:
        """λ, by where the Gram matrices come from."""
        if self.damping is not None:
            return self.damping
        return _DAMPING_OF_DATA if data else _DAMPING_WITHOUT
