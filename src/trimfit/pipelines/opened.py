"""A checkpoint that is open to be pruned: in memory, or one block after the other from its files."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import CalibrationConfig
from trimfit.calibration.config import SELF
from trimfit.checkpoints import Checkpoint, check_space, fingerprint, save_checkpoint
from trimfit.checkpoints.patch import check_patchable, save_patched
from trimfit.checkpoints.stream import Stream, find_stream
from trimfit.errors import InputError
from trimfit.heap import trim_heap
from trimfit.models import Block, Placement
from trimfit.pipelines.checks import check_finite, check_stream
from trimfit.pipelines.prune_ledger import PruneLedger
from trimfit.pipelines.prune_record import PruneRecord


@dataclass(frozen=True)
class InMemory:
    """All of the model is loaded."""

    checkpoint: Checkpoint

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.checkpoint.model.device

    def prepare(self, blocks: Sequence[Block]) -> str:
        """The fingerprint of the model. Raises `InputError` for weights that are not finite."""
        check_finite(self.checkpoint.model)
        return fingerprint(self.checkpoint.model)

    def placement(self, limit: int | None, folder: Path | None) -> Placement:
        """Hidden states are where the model is, or in files where they are too many."""
        return Placement(limit=limit, folder=folder)

    def save(self, directory: Path, record: PruneRecord, blocks: Sequence[Block], kept: PruneLedger) -> None:
        """Writes the model as it is now."""
        save_checkpoint(self.checkpoint, directory, record.sidecar(), sparsity=record.zeros())


@dataclass(frozen=True)
class Offloaded:
    """One block at a time is loaded; what is pruned lies in the run directory."""

    stream: Stream

    @classmethod
    def open(cls, source: str, device: torch.device, calibration: CalibrationConfig) -> Self:
        """Raises `InputError` for a checkpoint that has to be loaded as a whole."""
        check_text(calibration)
        stream = find_stream(source, device)
        if isinstance(stream, str):
            raise InputError(f"{source} cannot be offloaded, as {stream}: leave out --offload")
        return cls(stream)

    @property
    def checkpoint(self) -> Checkpoint:
        """With a model that holds the weights of the block that is loaded, and what is in no block."""
        return self.stream.checkpoint

    @property
    def device(self) -> torch.device:
        """Where blocks are while they are loaded."""
        return self.stream.device

    def prepare(self, blocks: Sequence[Block]) -> str:
        """As in memory; and loads what is in no block. `InputError` also for files that cannot be taken over."""
        check_patchable(self.stream, {n for block in blocks for layer in block.layers for n in layer.parameters})
        found = check_stream(self.stream)
        self.stream.load_all_but([block.name for block in blocks])
        return found

    def placement(self, limit: int | None, folder: Path | None) -> Placement:
        """Hidden states wait on the CPU, or in files where they are too many."""
        return Placement(self._loaded, torch.device("cpu"), limit, folder)

    @contextmanager
    def _loaded(self, block: Block) -> Generator[None]:
        """With the block behind it on its way; nothing of the block stays."""
        stack, _, number = block.name.rpartition(".")
        with self.stream.loaded(block.name, then=f"{stack}.{int(number) + 1}"):
            yield
        trim_heap()

    def save(self, directory: Path, record: PruneRecord, blocks: Sequence[Block], kept: PruneLedger) -> None:
        """Writes the source's files with the pruned weights in them."""
        whole = {name: share for name, share in record.zeros().items() if name in self.stream.places}
        save_patched(self.stream, directory, record.sidecar(), self._pruned(blocks, kept), sparsity=whole)

    def _pruned(self, blocks: Sequence[Block], kept: PruneLedger) -> Iterator[dict[str, Tensor]]:
        model = self.checkpoint.model
        for block in blocks:
            with self._loaded(block):
                kept.restore_all(block.layers)
                names = dict.fromkeys(name for layer in block.layers for name in layer.parameters)
                yield {name: model.get_parameter(name).detach() for name in names}


def check_text(calibration: CalibrationConfig) -> None:
    """Raises `InputError` for calibration that a model cannot give while it is offloaded."""
    if calibration.source == SELF:
        raise InputError(
            "a model that is offloaded cannot write its own windows, as each token would read all of its weights: "
            "give --calibration a text, or leave out --offload"
        )


def check_run_space(out: Path, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Raises `RunError` when the disk cannot hold the model and, until it is finished, the pruned layers."""
    layers = [layer.weight for block in blocks for layer in block.layers]
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *layers))
    check_space(out.absolute().parent, needed)
