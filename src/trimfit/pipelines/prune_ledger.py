"""The ledger of a prune, kept in its run directory: a part for each set of layers that are finished together."""

from collections.abc import Sequence

from trimfit.models import Layer
from trimfit.pipelines.allocate import Allocation
from trimfit.pipelines.records import LayerRecord
from trimfit.pipelines.run_directory import Part, RunDirectory

_ALLOCATION = "allocation"


class PruneLedger:
    """A `Ledger` in an open `RunDirectory`."""

    def __init__(self, run: RunDirectory):
        self._run = run

    @property
    def seconds(self) -> float:
        """That earlier runs have spent on what is kept."""
        return self._run.seconds

    @property
    def allocation(self) -> Allocation | None:
        """The one that an earlier run has kept."""
        kept = self._run.notes.get(_ALLOCATION)
        return None if kept is None else Allocation.model_validate(kept)

    def keep_allocation(self, allocation: Allocation) -> None:
        """Keeps how the sparsity is split."""
        self._run.note(_ALLOCATION, allocation.model_dump(), costly=allocation.method != "uniform")

    def restore(self, layers: Sequence[Layer], block: Sequence[Layer]) -> list[LayerRecord] | None:
        """Writes the weights of layers that were finished before, and gives their records; None if they were not.

        `block` are all layers of their block: those that were reordered with them are restored too.
        """
        part = self._run.parts.get(_key(layers))
        if part is None:
            return None
        _restore(part, block)
        return [LayerRecord.model_validate(record) for record in part.record]

    def restore_all(self, block: Sequence[Layer]) -> None:
        """Writes the weights of a block that is finished, all its layers."""
        names = {layer.name for layer in block}
        for key, part in self._run.parts.items():  # a later one may hold layers of an earlier one again, reordered
            if names.intersection(key):
                _restore(part, block)

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Keeps the weights and records of layers that are finished, and the weights of those that were reordered."""
        tensors = {f"{layer.name}.weight": layer.weight for layer in (*layers, *reordered)}
        tensors |= {f"{layer.name}.bias": layer.bias for layer in reordered if layer.bias is not None}
        self._run.keep(_key(layers), tensors, [record.model_dump() for record in records], seconds)


def _key(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _restore(part: Part, block: Sequence[Layer]) -> None:
    """Writes the weights and biases of a part into the layers of a block."""
    tensors = part.tensors()
    for layer in block:
        if (weight := tensors.get(f"{layer.name}.weight")) is not None:
            layer.write(weight)
        if layer.bias is not None and (bias := tensors.get(f"{layer.name}.bias")) is not None:
            layer.bias.copy_(bias)
