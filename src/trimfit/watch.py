"""Ends a process that waits for its device in vain, because another process of the run has died.

NCCL puts its work into a queue: where a process is gone the others wait for their GPU, and nothing is raised there, nor
does a signal come through. So each process waits, in a thread beside its work, for a word of the next one over gloo,
whose connections break when an end dies.
"""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ANOTHER_ENDED = (
    "another process of this run has ended or cannot be reached, so it cannot go on; start it again to go on from what "
    "is finished (--debug shows what the network said)"
)
GRACE = 20.0  # seconds in which a process that can say so itself has done it


class Watch:
    """Over the next of the processes, of which this is number `rank` of `count`; each of them has to have one.

    `silence`: the longest time that a run may take.
    """

    def __init__(self, rank: int, count: int, silence: timedelta):
        self._next, self._previous = (rank + 1) % count, (rank - 1) % count
        self._group: Any = dist.new_group(backend="gloo", timeout=silence)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def end(self, *, well: bool) -> None:
        """Nothing is ended from now on. A process that ends `well` waits until the next one does."""
        self._ending.set()
        if well:
            with suppress(RuntimeError):  # the previous one has died, which no longer matters here
                dist.send(torch.zeros(1), self._previous, self._group)
            self._thread.join()

    def _wait(self) -> None:
        try:
            dist.recv(torch.zeros(1), self._next, self._group)
        except RuntimeError:
            if not self._ending.wait(GRACE):
                print(f"error: {ANOTHER_ENDED}", file=sys.stderr, flush=True)
                os._exit(1)  # the thread that works cannot be reached; what is finished is on the disk
