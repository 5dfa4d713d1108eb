"""Where a model is while it is worked on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from trimfit.heap import trim_heap
from trimfit.models.states import StateStore
from trimfit.models.structure import Block

# Puts the weights of a block in place while a context lasts, for models that do not hold them all the time.
Loaded = Callable[[Block], AbstractContextManager[None]]


def resident(block: Block) -> AbstractContextManager[None]:
    """For models in memory: the weights are where they belong already."""
    return nullcontext()


@dataclass(frozen=True)
class Placement:
    """Where the weights of blocks come from, and where hidden states wait between two blocks.

    - `loaded`: see `Loaded`; the model holds all its weights by default.
    - `states`, `limit`, `folder`: device, bytes and directory, as for a `StateStore`.
    """

    loaded: Loaded = resident
    states: torch.device | None = None
    limit: int | None = None
    folder: Path | None = None

    def store(self) -> StateStore:
        """A store for hidden states."""
        return StateStore(self.states, self.limit, self.folder)

    def within(self, size: int) -> Self:
        """The same, but blocks that come one by one leave no more than `size` bytes of hidden states in memory."""
        if self.loaded is resident:
            return self
        return replace(self, limit=size if self.limit is None else min(size, self.limit))

    def release(self) -> None:
        """Gives freed memory back to the system, at some cost of time, where blocks come one by one."""
        if self.loaded is not resident:
            trim_heap()


IN_MEMORY = Placement()
