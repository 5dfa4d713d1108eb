"""The ledger of a prune, kept in its run directory: a part for each set of layers that are finished together."""

from collections.abc import Sequence

from torch import nn

from trimfit.checkpoints.patch import PatchedShards
from trimfit.models import Block, Layer
from trimfit.pipelines.pruning.allocate import Allocation
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.pipelines.runs.directory import Part, RunDirectory
from trimfit.timing import stage

_ALLOCATION = "allocation"


class PruneLedger:
    """A `Ledger` in an open `RunDirectory`.

    - `shards`: the files of the result; None when nothing is in them.
    - `grows`: each block that is finished goes into them. Otherwise the whole model is written at the end.
    """

    def __init__(self, run: RunDirectory, shards: PatchedShards | None, *, grows: bool):
        self._run, self._shards, self._grows = run, shards, grows

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

    def restore(self, layers: Sequence[Layer], block: Block) -> list[LayerRecord] | None:
        """Writes the weights of layers of a block that were finished before, and gives their records; None if not.

        Those that were reordered with them are restored too; of a block that is in the result, all are.
        """
        part = self._run.parts.get(_key(layers))
        if part is None:
            return None
        if part.file is None:
            self._read_back(block)
        else:
            _restore(part, block.layers)
        return [LayerRecord.model_validate(record) for record in part.record]

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """Keeps the weights and records of layers that are finished, and the weights of those that were reordered."""
        tensors = {f"{layer.name}.weight": layer.weight for layer in (*layers, *reordered)}
        tensors |= {f"{layer.name}.bias": layer.bias for layer in reordered if layer.bias is not None}
        with stage("save"):
            self._run.keep(_key(layers), tensors, [record.model_dump() for record in records], seconds)

    def finish(self, block: Block) -> None:
        """Puts a block into a result that grows, and removes what was kept of it so far."""
        names = {layer.name for layer in block.layers}
        parts = {key: part for key, part in self._run.parts.items() if part.file and names.intersection(key)}
        if self._shards is None or not self._grows or not parts:
            return
        zeros = {f"{record['name']}.weight": record["sparsity"] for part in parts.values() for record in part.record}
        weights = {name: parameter.detach().cpu() for name, parameter in _parameters(block).items()}
        with stage("save"):
            self._run.move(parts, self._shards.write(weights, zeros))

    def _read_back(self, block: Block) -> None:
        assert self._shards is not None
        for name, parameter in _parameters(block).items():
            parameter.detach().copy_(self._shards.read(name))


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """Those of the layers of a block, by their names in the model."""
    names = dict.fromkeys(name for layer in block.layers for name in layer.parameters)
    return {name: block.module.get_parameter(name.removeprefix(f"{block.name}.")) for name in names}


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
