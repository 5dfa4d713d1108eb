"""What a pruned checkpoint says about itself."""

from dataclasses import dataclass

from trimfit.pipelines.checkpoint_record import CheckpointRecord
from trimfit.pipelines.pruning.records import PruneReport


@dataclass(frozen=True)
class PruneRecord(CheckpointRecord):
    """How a pruned model came about; see `CheckpointRecord`."""

    report: PruneReport

    def zeros(self) -> dict[str, float]:
        """For each pruned weight, by its layer's name and ".weight", the share of zeros that it must have."""
        return {f"{record.name}.weight": record.sparsity for record in self.report.layers}
