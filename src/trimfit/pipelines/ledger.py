"""What a run leaves behind on its way, so that another can go on from there."""

from collections.abc import Sequence
from typing import Protocol

from trimfit.models import Layer
from trimfit.pipelines.allocate import Allocation
from trimfit.pipelines.records import LayerRecord


class Ledger(Protocol):
    """Keeps what is finished."""

    @property
    def seconds(self) -> float:
        """That earlier runs have spent on what is kept."""
        ...

    @property
    def allocation(self) -> Allocation | None:
        """The one that an earlier run has kept."""
        ...

    def keep_allocation(self, allocation: Allocation) -> None:
        """Keeps how the sparsity is split."""
        ...

    def restore(self, layers: Sequence[Layer], block: Sequence[Layer]) -> list[LayerRecord] | None:
        """Writes the weights of layers that were finished before, and gives their records; None if they were not.

        `block` are all layers of their block: those that were reordered with them are restored too.
        """
        ...

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Keeps the weights and records of layers that are finished, `seconds` after the run began.

        `reordered` are those whose rows or columns changed places at the same time; they may be finished already.
        """
        ...


class Blank:
    """Keeps nothing."""

    seconds = 0.0
    allocation = None

    def keep_allocation(self, allocation: Allocation) -> None:
        """Ignored."""

    def restore(self, layers: Sequence[Layer], block: Sequence[Layer]) -> None:
        """There is nothing."""

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Ignored."""
