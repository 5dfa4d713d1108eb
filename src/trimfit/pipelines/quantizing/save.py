"""Puts the blocks that a quantization has kept together to a checkpoint, one of them in memory at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimfit.calibration import CalibrationConfig
from trimfit.checkpoints import save_checkpoint, write_sidecar
from trimfit.checkpoints.gguf import check_gguf, write_gguf
from trimfit.checkpoints.packed import (
    ONLINE,
    BlockPacker,
    check_packable,
    finish_packed,
    plain_tensors,
    transform_name,
)
from trimfit.checkpoints.patch import PatchedShards, check_patchable
from trimfit.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
from trimfit.errors import InputError
from trimfit.models import Block, hidden_size
from trimfit.pipelines.checkpoint_record import CheckpointRecord
from trimfit.pipelines.checks import check_stream
from trimfit.pipelines.opened import InMemory, Offloaded, check_text
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.disk import Format, QuantizeDisk
from trimfit.pipelines.quantizing.ledger import KeptBlocks
from trimfit.pipelines.quantizing.records import QuantizeReport
from trimfit.pipelines.runs.directory import RunDirectory
from trimfit.quant import Grid

_FORMATS: dict[str, Format] = {"packed": "packed", "dense": "dense", "gguf": "gguf"}


def check_format(name: str, config: QuantizeConfig) -> Format:
    """The format of that name; `InputError` for others, and for what it cannot hold."""
    found = _FORMATS.get(name)
    if found is None:
        raise InputError(f"unknown format {name!r}: choose one of {', '.join(_FORMATS)}")
    if found == "gguf" and config.transform == "online":
        raise InputError("a GGUF file cannot hold online transformations: use another --transform, or --format packed")
    if found == "gguf" and not (config.symmetric and config.bits in (4, 8)):
        raise InputError("a GGUF file holds symmetric grids of 4 or 8 bits: give --symmetric, and --bits 4 or 8")
    return found


def check_offload(format: Format, calibration: CalibrationConfig | None) -> None:
    """Raises `InputError` for what a model that is offloaded cannot be written as, or cannot give."""
    if format == "gguf":
        raise InputError("a GGUF file is written from a model in memory: leave out --offload, or use another --format")
    if calibration is not None:
        check_text(calibration)


def check_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    blocks: Sequence[Block],
    format: Format,
    config: QuantizeConfig,
) -> None:
    """Raises `InputError` for a model that the format cannot hold with the layers of `blocks` quantized.

    Names, shapes and dtypes of the model tell; its weights are not looked at. Only GGUF asks for a tokenizer.
    """
    if format == "packed":
        check_packable(model, _grids(blocks, config), online=config.transform == "online")
    if format == "gguf":
        assert tokenizer is not None
        check_gguf(model, tokenizer, _grids(blocks, config))


@dataclass(frozen=True)
class QuantizeRecord(CheckpointRecord):
    """How a quantized model came about; see `CheckpointRecord`."""

    report: QuantizeReport
    file_format: Format = "packed"

    def sidecar(self) -> dict[str, Any]:
        """What `trimfit.json` holds."""
        return {**super().sidecar(), "file_format": self.file_format}

    def zeros(self) -> dict[str, float]:
        """For each quantized weight, by its layer's name and ".weight", the share of zeros that it must have."""
        return {f"{record.name}.weight": record.zeros for record in self.report.layers}


@dataclass(frozen=True)
class Result:
    """The checkpoint to write: of which model, in which format, on which grid."""

    opened: InMemory | Offloaded
    blocks: Sequence[Block]
    format: Format
    config: QuantizeConfig

    def check(self) -> None:
        """Raises `InputError` for a model that the format cannot hold."""
        check_result(self._model, self.opened.checkpoint.tokenizer, self.blocks, self.format, self.config)

    def prepare(self, *, data: bool) -> str:
        """The fingerprint of the model. With `data` it can be run when a block is loaded.

        Raises `InputError` for weights that are not finite, and for files that cannot be taken over.
        """
        if isinstance(self.opened, InMemory):
            return self.opened.prepare(self.blocks)
        stream = self.opened.stream
        if self.format == "dense":
            check_patchable(stream, [name for block in self.blocks for name in _parameters(block)])
        found = check_stream(stream)
        if data:
            stream.load_all_but([block.name for block in self.blocks])
        return found

    def disk(self, *, data: bool) -> int:
        """Bytes that a run has on the disk at one time: the result and, until it is finished, the blocks."""
        layers = [(len(layer.weight), layer.weight.shape[1]) for block in self.blocks for layer in block.layers]
        inside = [parameter for block in self.blocks for parameter in block.module.parameters()]
        whole, in_blocks = (sum(one.nbytes for one in some) for some in (self._model.parameters(), inside))
        width = 0 if data else hidden_size(self._model)
        moments, itemsize = 4 * width**2 * len(self.blocks), self._model.dtype.itemsize
        return QuantizeDisk(layers, whole, in_blocks, itemsize, moments, self.config, self.format).peak

    def kept(self, run: RunDirectory) -> KeptBlocks:
        """What is finished of it in the directory of its run."""
        packer = self._packer if self.format == "packed" else None
        return KeptBlocks(run, self.config.grid, self.opened.device, packer)

    def save(self, directory: Path, kept: KeptBlocks, record: QuantizeRecord) -> None:
        """Writes it with its records. Errors are those of the writers."""
        if self.format == "dense" and isinstance(self.opened, Offloaded):
            self._patch(self.opened, directory, kept, record)
            return
        if self.format == "dense":
            save_checkpoint(self.opened.checkpoint, directory, record.sidecar(), sparsity=record.zeros())
            return
        if self.format == "packed":
            self._pack(directory, kept)
        else:
            finished = (kept.finished(block) for block in self.blocks)
            layers = ((name, layer.quantized) for one in finished for name, layer in one.layers.items())
            tokenizer = self.opened.checkpoint.tokenizer
            write_gguf(self._model, tokenizer, _grids(self.blocks, self.config), layers, directory / "model.gguf")
        self.opened.checkpoint.tokenizer.save_pretrained(directory)
        write_sidecar(directory, record.sidecar())

    def _patch(self, opened: Offloaded, directory: Path, kept: KeptBlocks, record: QuantizeRecord) -> None:
        shards, placement = PatchedShards(opened.stream, directory), opened.placement(None, None)
        written: dict[str, dict[str, str]] = {}
        for block in self.blocks:
            with placement.loaded(block):
                kept.finished(block).write(block)
                weights = {name: parameter.detach().cpu() for name, parameter in _parameters(block).items()}
                zeros = {name: share for name, share in record.zeros().items() if name in weights}
                for file, checksums in shards.write(weights, zeros).items():
                    written.setdefault(file, {}).update(checksums)
        shards.finish(record.sidecar(), written)

    def _pack(self, directory: Path, kept: KeptBlocks) -> None:
        writer = ShardWriter(directory)
        blocks = [kept.packed(block) for block in self.blocks]
        small = sum(file.stat().st_size for file, _ in blocks) <= SHARD_BYTES
        transforms: dict[str, str] = {}
        for file, record in blocks:
            transforms |= {layer: transform_name(owner) for layer, (owner, _) in record.transforms.items()}
            if small:
                writer.add(load_file(file))
            else:
                writer.add_file(file)
        for name, tensor in self._outside():
            writer.add(self._packer.plain({name: tensor}))
        writer.finish(ONLINE if transforms else "model")
        finish_packed(self._model, _grids(self.blocks, self.config), directory, transforms)

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """What is in no block, one tensor after the other."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        for name, tensor in plain_tensors(self._model, ()).items():
            if not name.startswith(inside):
                yield name, self.opened.stream.read(name) if isinstance(self.opened, Offloaded) else tensor

    @cached_property
    def _packer(self) -> BlockPacker:
        return BlockPacker(self._model)

    @property
    def _model(self) -> Any:
        return self.opened.checkpoint.model


def _grids(blocks: Sequence[Block], config: QuantizeConfig) -> dict[str, Grid]:
    layers = [layer for block in blocks for layer in block.layers]
    return {layer.name: config.grid.fitted(layer.weight.shape[1]) for layer in layers}


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """All parameters of a block, by name in the model."""
    return dict(block.module.named_parameters(prefix=block.name))
