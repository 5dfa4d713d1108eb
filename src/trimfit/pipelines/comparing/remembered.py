"""What an allocation goes by, measured once for all runs over one model and one draw of windows."""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models import Block
from trimfit.pipelines.pruning.allocate import AllocationName, Measured, measure
from trimfit.pipelines.pruning.records import PruneReport
from trimfit.timing import Clock


@dataclass(frozen=True)
class _Timed:
    """`seconds` in all, and by stage."""

    found: Measured
    seconds: float
    stages: dict[str, float]


class Remembered:
    """A `measure` that knows what it has measured before. The sparsity is no part of that, nor is the selector."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Timed] = {}
        self._used: _Timed | None = None  # by the run in work
        self._spared = 0.0

    def __call__(
        self, model: PreTrainedModel, blocks: Sequence[Block], windows: Tensor, *, method: AllocationName, **how: Any
    ) -> Measured:
        """See `measure`."""
        layers = tuple(layer.name for block in blocks for layer in block.layers)
        key = (layers, len(windows), method, how["damping"], how["batch_size"])
        known = self._known.get(key)
        if known is None:
            start, clock = time.perf_counter(), Clock(model.device)
            with clock.running():
                found = measure(model, blocks, windows, method=method, **how)
            stages = clock.seconds
            self._known[key] = _Timed(found, time.perf_counter() - start, stages)
        self._used, self._spared = self._known[key], 0.0 if known is None else known.seconds
        return self._used.found

    def begin(self) -> None:
        """Another run: what an earlier one used, and did not tell as it failed, is none of its business."""
        self._used, self._spared = None, 0.0

    def told(self, report: PruneReport) -> PruneReport:
        """The report of the run in work, with the time that it would have taken on its own."""
        if self._used is None:
            return report
        stages = dict(Counter(report.stages) + Counter(self._used.stages))
        return report.model_copy(update={"seconds": report.seconds + self._spared, "stages": stages})
