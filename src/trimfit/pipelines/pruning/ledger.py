"""What a run leaves behind on its way, so that another can go on from there."""

from collections.abc import Sequence
from typing import Protocol

from trimfit.models import Block, Layer
from trimfit.pipelines.pruning.allocate import Allocation
from trimfit.pipelines.pruning.records import LayerRecord


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

    def restore(self, layers: Sequence[Layer], block: Block) -> list[LayerRecord] | None:
        """Writes the weights of layers of a block that were finished before, and gives their records; None if not.

        Others of the block may be restored with them.
        """
        ...

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Keeps the weights and records of layers that are finished, `seconds` after the run began.

        `reordered` are those whose rows or columns changed places at the same time; they may be finished already.
        """
        ...

    def finish(self, block: Block) -> None:
        """Takes note that all layers of a block are finished, while its weights are there."""
        ...


class Blank:
    """Keeps nothing."""

    seconds = 0.0
    allocation = None

    def keep_allocation(self, allocation: Allocation) -> None:
        """Ignored."""

    def restore(self, layers: Sequence[Layer], block: Block) -> None:
        """There is nothing."""

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Ignored."""

    def finish(self, block: Block) -> None:
        """Ignored."""
