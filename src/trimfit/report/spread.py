"""A number that was measured several times."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Spread:
    """`mean` and sample standard deviation `std` of `count` values; `std` is None where it has no meaning."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None of no values. A single value, or one that is infinite, has no standard deviation."""
        if not values:
            return None
        if not all(math.isfinite(value) for value in values):
            return cls(sum(values), None, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """As in a table, "mean ± std", both in the format `form`; a sign it asks for goes to the mean."""
        return f"{self.mean:{form}}" + ("" if self.std is None else f" ± {self.std:{form.removeprefix('+')}}")
