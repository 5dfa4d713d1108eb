"""Where the time goes: stages are marked in the code, and a clock that is running sums them up."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

Mark = float | torch.cuda.Event

_MOST_SPANS = 2**12

_running: ContextVar["Clock | None"] = ContextVar("trimfit_clock", default=None)


class Clock:
    """Seconds of each stage; of a stage within another, only the inner one counts them.

    On a GPU the borders of stages are marks in what it has to do, so that nothing waits for it there: a stage has the
    seconds that the GPU took for it, and those in which it waited for the host.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since: Mark | None = None
        self._spans: list[tuple[str, Mark, Mark]] = []  # not summed up yet

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage until now; waits for the device."""
        for name, start, end in self._spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + _between(start, end)
        self._spans.clear()
        return dict(self._seconds)

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
        now = _mark(self._device)
        if self._stack and self._since is not None:
            self._spans.append((self._stack[-1], self._since, now))
            if len(self._spans) == _MOST_SPANS:
                _ = self.seconds
        self._since = now


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000  # of milliseconds
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


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
