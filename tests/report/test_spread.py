"""A number measured several times."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimfit.report import Spread


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_mean_and_sample_standard_deviation(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread is not None and spread.std is not None
    mean = math.fsum(values) / len(values)
    assert spread.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert spread.std == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-6)
    assert spread.count == len(values)


def test_what_has_no_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([2.5]) == Spread(2.5, None, 1)
    assert Spread.of([1.0, math.inf]) == Spread(math.inf, None, 2)


def test_text() -> None:
    assert Spread(2.5, None, 1).text(".2f") == "2.50"
    assert Spread.of([1.0, 2.0]) == Spread(1.5, statistics.stdev([1, 2]), 2)
    assert Spread(1.5, 0.25, 2).text(".1f") == "1.5 ± 0.2"
    assert Spread(1.5, 0.25, 2).text("+.1f") == "+1.5 ± 0.2"
