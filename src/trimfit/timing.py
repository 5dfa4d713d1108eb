"""Where the time goes: stages are marked in the code, and a clock that is running sums them up."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_running: ContextVar["Clock | None"] = ContextVar("trimfit_clock", default=None)


class Clock:
    """Seconds of each stage; of a stage within another, only the inner one counts them.

    `device` is waited for at the borders of stages, so that what it still computes is counted where it belongs.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """Counts the stages that are reached within the context."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @property
    def stage(self) -> str | None:
        """The inner one of those that last."""
        return self._stack[-1] if self._stack else None

    def enter(self, name: str) -> None:
        """A stage begins."""
        self._count()
        self._stack.append(name)

    def leave(self) -> None:
        """The stage that began last ends."""
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            stage = self._stack[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


@contextmanager
def stage(name: str) -> Generator[None]:
    """Marks what runs within as a stage."""
    clock = _running.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def current_stage() -> str | None:
    """The stage that is being counted, None outside."""
    clock = _running.get()
    return clock and clock.stage
