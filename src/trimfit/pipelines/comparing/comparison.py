"""What a comparison found, cell by cell and over the seeds."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict

from trimfit.evaluate import Score, TaskScore
from trimfit.masks import NM
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.records import PruneReport
from trimfit.report import Spread


class Cell(BaseModel):
    """One pruned and scored model, or what came of the attempt.

    - `config`, `calibration`, `seed`: how it was pruned, on windows of which source and draw; None for the dense model.
    - `report`: of the pruning; `score`: of the pruned model. None where they were not reached.
    - `tasks`: what it reaches on each task, with standard errors.
    - `failure`: why the cell failed; None for one that is finished.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    config: PruneConfig | None
    seed: int | None
    calibration: str | None = None
    report: PruneReport | None = None
    score: Score | None = None
    tasks: tuple[TaskScore, ...] = ()
    failure: str | None = None

    def record(self) -> dict[str, Any]:
        """For a line of the journal; infinities, which a perplexity can be, as text."""
        return json.loads(self.model_dump_json())


@dataclass(frozen=True)
class Row:
    """The cells of one config, calibrated on one source, over the seeds; those that failed are in `failures` alone."""

    config: PruneConfig
    calibration: str
    cells: tuple[Cell, ...]
    failures: tuple[Cell, ...]

    def spread(self, quantity: Callable[[Cell], float | None]) -> Spread | None:
        """Mean and standard deviation over the seeds; None where no cell has the quantity."""
        return Spread.of([value for cell in self.cells if (value := quantity(cell)) is not None])


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    - `source`: the model; `identity`: fingerprints, texts, versions, all that the numbers depend on.
    - `dense`: the cell of the model as it came.
    - `rows`: one for each config and source of calibration, in the order of the grid.
    - `weights`: number of weights in the linear layers of the blocks, those that stay dense included.
    - `notes`: what a reader of the table must know.
    """

    source: str
    identity: dict[str, Any]
    dense: Cell
    rows: tuple[Row, ...]
    weights: int
    notes: tuple[str, ...]

    @property
    def failures(self) -> list[Cell]:
        """Cells that failed."""
        return [cell for row in self.rows for cell in row.failures]

    @property
    def quantities(self) -> dict[str, Callable[[Cell], float | None]]:
        """How to read each number of a finished, pruned cell, by its name in `comparison.json`."""
        assert self.dense.score is not None
        dense = self.dense.score.nats
        return {
            "perplexity": lambda cell: cell.score and cell.score.perplexity,
            "excess_nats": lambda cell: cell.score and cell.score.nats - dense,
            "layer_error": lambda cell: cell.report and cell.report.mean_error().held_out,
            "zeros": lambda cell: cell.report and _zeros(cell.report) / self.weights,
            "certificate": lambda cell: cell.report and cell.report.certificate,
            "steps": lambda cell: cell.report and (cell.report.steps or None),
            "seconds": lambda cell: cell.report and cell.report.seconds,
            **{task.name: partial(_value, name=task.name) for task in self.dense.tasks},
        }

    def record(self) -> dict[str, Any]:
        """For JSON: the summary of each row and the numbers of each cell. Layers are in the journal."""
        return {
            "source": self.source,
            "identity": self.identity,
            "notes": list(self.notes),
            "dense": {**_numbers(self.dense.score), "tasks": [asdict(task) for task in self.dense.tasks]},
            "rows": [self._row_record(row) for row in self.rows],
        }

    def _row_record(self, row: Row) -> dict[str, Any]:
        numbers = self.quantities
        spreads = {name: row.spread(quantity) for name, quantity in numbers.items()}
        return {
            "config": row.config.model_dump(mode="json"),
            "calibration": row.calibration,
            **{name: None if s is None else {"mean": _finite(s.mean), "std": s.std} for name, s in spreads.items()},
            "cells": [
                {
                    "seed": cell.seed,
                    **{name: _finite(quantity(cell)) for name, quantity in numbers.items()},
                    "tasks": [asdict(task) for task in cell.tasks],
                }
                for cell in row.cells
            ],
            "failures": [{"seed": cell.seed, "failure": cell.failure} for cell in row.failures],
        }


def pattern_name(config: PruneConfig) -> str:
    """As in the papers: "50%" or "2:4"."""
    pattern = config.mask_pattern
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else f"{100 * pattern.sparsity:g}%"


def make_rows(configs: Sequence[PruneConfig], sources: Sequence[str], cells: Sequence[Cell]) -> tuple[Row, ...]:
    """The cells by config and source of calibration."""
    of = {
        (config, source): [cell for cell in cells if (cell.config, cell.calibration) == (config, source)]
        for config, source in itertools.product(configs, sources)
    }
    return tuple(
        Row(*which, tuple(c for c in own if c.failure is None), tuple(c for c in own if c.failure is not None))
        for which, own in of.items()
    )


def _numbers(score: Score | None) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in asdict(score).items()} if score else {}


def _value(cell: Cell, name: str) -> float | None:
    return next((task.value for task in cell.tasks if task.name == name), None)


def _zeros(report: PruneReport) -> float:
    return sum(record.shape[0] * record.shape[1] * record.sparsity for record in report.layers)


def _finite(value: float | None) -> float | None:
    """For JSON, which has no infinity."""
    return value if value is not None and math.isfinite(value) else None
