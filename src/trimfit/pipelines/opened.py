"""A checkpoint that is open to be worked on: in memory, or one block after the other from its files."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from trimfit.calibration import CalibrationConfig
from trimfit.checkpoints import Checkpoint, atomic_directory, check_space, fingerprint, save_checkpoint
from trimfit.checkpoints.patch import PatchedShards, check_patchable
from trimfit.checkpoints.stream import Stream, find_stream
from trimfit.errors import InputError
from trimfit.heap import trim_heap
from trimfit.models import Block, Placement
from trimfit.pipelines.checks import check_finite, check_stream
from trimfit.pipelines.pruning.checkpoint_record import PruneRecord
from trimfit.pipelines.pruning.kept_ledger import PruneLedger
from trimfit.pipelines.runs.directory import RunDirectory


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

    def ledger(self, run: RunDirectory) -> PruneLedger:
        """Keeps what is finished until the model is written, and reads what an offloaded run has left."""
        stream = find_stream(self.checkpoint.source, self.device) if run.in_result else None
        shards = PatchedShards(stream, run.result) if isinstance(stream, Stream) else None
        return PruneLedger(run, shards, grows=False)

    def disk(self, blocks: Sequence[Block]) -> int:
        """Bytes that a run writes: the model and, until it is finished, the pruned layers."""
        layers = [layer.weight for block in blocks for layer in block.layers]
        return sum(tensor.nbytes for tensor in (*self.checkpoint.model.parameters(), *layers))

    def save(self, out: Path, overwrite: bool, record: PruneRecord, run: RunDirectory) -> None:
        """Writes the model as it is now."""
        beside = run.whole if run.in_result else run.result  # what is in the result stays until then
        save_pruned(self.checkpoint, out, record, overwrite=overwrite, beside=beside)


def save_pruned(
    checkpoint: Checkpoint, out: Path, record: PruneRecord, *, overwrite: bool, beside: Path | None = None
) -> None:
    """Writes a pruned model with the record of how it came about, and checks its zeros.

    `beside`: as for `atomic_directory`.
    """
    with atomic_directory(out, overwrite, beside) as directory:
        save_checkpoint(checkpoint, directory, record.sidecar(), sparsity=record.zeros())
        record.save_windows(directory)


@dataclass(frozen=True)
class Offloaded:
    """One block at a time is loaded; what is pruned lies in the run directory."""

    stream: Stream

    @classmethod
    def open(cls, source: str, device: torch.device, calibration: CalibrationConfig | None) -> Self:
        """Raises `InputError` for a checkpoint that has to be loaded as a whole."""
        if calibration is not None:
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

    def ledger(self, run: RunDirectory) -> PruneLedger:
        """Keeps what is finished, and puts each finished block into the files of the result."""
        return PruneLedger(run, PatchedShards(self.stream, run.result), grows=True)

    def disk(self, blocks: Sequence[Block]) -> int:
        """Bytes that a run writes: the model and, until it is finished, one block."""
        largest = max((sum(layer.weight.nbytes for layer in block.layers) for block in blocks), default=0)
        return largest + sum(parameter.nbytes for parameter in self.checkpoint.model.parameters())

    def save(self, out: Path, overwrite: bool, record: PruneRecord, run: RunDirectory) -> None:
        """Completes the files of the result."""
        with atomic_directory(out, overwrite, run.result, begun=True) as directory:
            PatchedShards(self.stream, directory).finish(record.sidecar(), run.in_result)
            record.save_windows(directory)


def check_text(calibration: CalibrationConfig) -> None:
    """Raises `InputError` for calibration that a model cannot give while it is offloaded."""
    if calibration.written:
        instead = "leave out --own-samples" if calibration.own_samples else "give --calibration a text"
        raise InputError(
            "a model that is offloaded cannot write its own windows, as each token would read all of its weights: "
            f"{instead}, or leave out --offload"
        )


def check_run_space(out: Path, needed: int, run: RunDirectory) -> None:
    """Raises `RunError` when the disk has no room for so many bytes, less those that an earlier run has written."""
    check_space(out.absolute().parent, needed - run.written)
