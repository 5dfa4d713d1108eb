"""Seconds of stages, those of a GPU by marks in what it has to do."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimfit import timing
from trimfit.timing import Clock, current_stage, stage

CPU = torch.device("cpu")


def test_only_the_inner_one_of_two_stages_counts() -> None:
    clock = Clock(CPU)
    with stage("nobody looks"):
        assert current_stage() is None
    start = time.perf_counter()
    with clock.running():
        with stage("outer"):
            time.sleep(0.02)
            with stage("inner"):
                assert current_stage() == "inner"
                time.sleep(0.03)
            assert current_stage() == "outer"
        with pytest.raises(KeyboardInterrupt), stage("inner"):
            raise KeyboardInterrupt
        assert current_stage() is None
    passed = time.perf_counter() - start
    assert clock.seconds.keys() == {"outer", "inner"}
    assert clock.seconds["outer"] >= 0.02 and clock.seconds["inner"] >= 0.03
    assert sum(clock.seconds.values()) <= passed


class Event:
    """Of a GPU that does a millisecond of work between any two marks."""

    recorded = 0
    waited = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self, stream: object) -> None:
        assert stream == "its own"
        Event.recorded += 1
        self.at = float(Event.recorded)

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_a_gpu_is_not_waited_for_at_the_borders_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Any = SimpleNamespace(Event=Event, current_stream=lambda device: {"cuda:1": "its own"}[str(device)])
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    monkeypatch.setattr(timing, "_MOST_SPANS", 50)
    clock = Clock(torch.device("cuda:1"))
    with clock.running():
        for _ in range(10):
            with stage("outer"), stage("inner"):
                pass
    assert (Event.recorded, Event.waited) == (40, 0)
    assert clock.seconds == pytest.approx({"outer": 0.02, "inner": 0.01})
    with clock.running():
        for _ in range(20):
            with stage("outer"), stage("inner"):
                pass
    assert clock.seconds == pytest.approx({"outer": 0.06, "inner": 0.03})  # many are summed up on the way
