"""What a comparison is asked to do: axes whose product is the grid of prune configs."""

import itertools
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trimfit.errors import InputError
from trimfit.masks import SELECTORS
from trimfit.pipelines.pruning.config import PruneConfig

# From the axis to the field of `PruneConfig` that it varies. Sparsity and pattern are one axis: a config has either.
AXES = {
    "selectors": "selector",
    "updates": "refit",
    "targets": "target",
    "allocations": "allocation",
    "row_weights": "row_weights",
    "reorder": "reorder",
    "sparsity": "sparsity",
    "patterns": "pattern",
}

# A row of the table is what its labels say, and its held-out error is of windows that chose nothing.
_DEFAULTS = {"guard": False}


class CompareConfig(BaseModel):
    """Axes of a comparison; each holds values of one field of `PruneConfig`, which see, or a single one.

    - `selectors`, `updates` (field `refit`), `targets`, `allocations`, `row_weights`: an axis without values has
      `PruneConfig`'s, which for the last two depends on the selector.
    - `reorder`: for N:M alone, without values as for `PruneConfig`.
    - `sparsity`, `patterns`: one axis, one after the other; sparsity 0.5 when neither is given.
    - `seeds`: how many draws of the calibration windows, at least 1; spreads need two.
    - `common`: other fields of `PruneConfig`, the same in every cell. `scope` is for unstructured sparsity only, and
      `guard` is False unless it is given here.

    A value that no `PruneConfig` takes is refused. Values that cannot be combined are no error: `grid` leaves them out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    selectors: tuple[str, ...] = tuple(SELECTORS)
    updates: tuple[str, ...] = ("none", "own", "optimal")
    targets: tuple[str, ...] = ()
    allocations: tuple[str, ...] = ()
    row_weights: tuple[str, ...] = ()
    reorder: tuple[bool, ...] = ()
    sparsity: tuple[float, ...] = ()
    patterns: tuple[str, ...] = ()
    seeds: int = Field(default=5, ge=1, le=1000)
    common: dict[str, Any] = Field(default_factory=dict[str, Any])

    @field_validator(*AXES, mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | float | bool) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for axis, field in AXES.items():
            for value in getattr(self, axis):
                _check(axis, {field: value} | ({"pattern": "2:4"} if axis == "reorder" else {}))
        taken = sorted(set(AXES.values()).intersection(self.common))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be common to all cells: it is an axis of the comparison")
        for field, value in self.common.items():
            _check(field, {field: value})
        return self

    @property
    def settings(self) -> PruneConfig:
        """A config with the fields that all cells have in common; those of the axes mean nothing in it."""
        return PruneConfig.model_validate(_DEFAULTS | self.common)

    def grid(self) -> "Grid":
        """All configs that exist, in the order of the axes. Raises `InputError` when there is none."""
        patterns = [{"sparsity": s} for s in self.sparsity] + [{"pattern": p} for p in self.patterns]
        names = [axis for axis in AXES if axis not in ("sparsity", "patterns") and getattr(self, axis)]
        configs: dict[PruneConfig, None] = {}  # as an ordered set
        left_out: dict[str, None] = {}
        for pattern, *values in itertools.product(patterns or [{"sparsity": 0.5}], *(getattr(self, a) for a in names)):
            chosen = dict(zip((AXES[axis] for axis in names), values, strict=True))
            try:
                config = PruneConfig.model_validate(_DEFAULTS | self.common | chosen | pattern | _moot(pattern))
                configs[config if config.rows_matter else config.model_copy(update={"row_weights": None})] = None
            except ValidationError as error:
                left_out[_reason(error)] = None
        if not configs:
            raise InputError(f"no combination of the axes exists: {'; '.join(left_out)}")
        return Grid(tuple(configs), tuple(left_out))


@dataclass(frozen=True)
class Grid:
    """`configs` that exist, each once; `left_out`: why others do not."""

    configs: tuple[PruneConfig, ...]
    left_out: tuple[str, ...]


def _moot(pattern: dict[str, Any]) -> dict[str, Any]:
    """Fields without a meaning beside the ones chosen, so that cells which would be equal are one."""
    return {"scope": None} if "pattern" in pattern else {"reorder": None}


def _check(name: str, fields: dict[str, Any]) -> None:
    """Raises `ValueError` for a value that is wrong whatever else is chosen."""
    try:
        PruneConfig.model_validate(fields)
    except ValidationError as error:
        ours = error.errors()[0]["type"] == "value_error"  # a sentence that names the value
        given = "" if ours else f", but it is {next(iter(fields.values()))!r}"
        raise ValueError(f"{name}: {_reason(error)}{given}") from None


def _reason(error: ValidationError) -> str:
    message = error.errors()[0]["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]
