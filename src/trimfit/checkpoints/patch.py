"""Copies of the files of a checkpoint, with other bytes in place of some of its weights."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.atomic import rename_durably
from trimfit.checkpoints.places import as_stored
from trimfit.checkpoints.save import check_zeros, write_sidecar
from trimfit.checkpoints.shards import INDEX, read_spans, read_tensor, tensor_checksum
from trimfit.checkpoints.stream import Stream
from trimfit.checkpoints.tensor_bytes import tensor_bytes
from trimfit.errors import InputError, RunError

Checksums = Mapping[str, Mapping[str, str]]  # file → tensor in it → SHA-256 of its bytes


def check_patchable(stream: Stream, names: Iterable[str]) -> None:
    """Raises `InputError` when other weights cannot be put in place of those of these names in the state dict."""
    places = {name: stream.places[name] for name in names}
    for name, place in places.items():
        for source in place.sources:
            stored = read_tensor(source.file, source.name).dtype
            if stored != place.dtype:
                raise InputError(
                    f"{name} is stored as {stored} but the model computes in {place.dtype}, so its files cannot be "
                    "taken over: leave out --offload"
                )
    model = stream.checkpoint.model
    held = {source.name for place in places.values() for source in place.sources}
    if held != as_stored(model, places, {name: model.get_parameter(name) for name in places}).keys():
        raise InputError(
            f"weights of {stream.checkpoint.source} are converted when they are loaded, and cannot be converted back: "
            "leave out --offload"
        )


class PatchedShards:
    """Copies of a stream's files with other weights in them, which are written one part after the other.

    - `directory`: where they are; those of an earlier run are gone on with.

    A file is copied when the first weight is written to it. What was written can be told by its checksums, so that a
    later run knows whether it is whole.
    """

    def __init__(self, stream: Stream, directory: Path):
        self._stream, self._directory = stream, directory
        self._model = stream.checkpoint.model
        sources = [source for place in stream.places.values() for source in place.sources]
        self._files = {source.name: source.file for source in sources}

    def write(self, weights: Mapping[str, Tensor], sparsity: Mapping[str, float]) -> Checksums:
        """Writes weights, of the shape and dtype of the old ones, and waits until they are on the disk.

        - `weights`: by name in the state dict. Those that are stored as one must be given together.
        - `sparsity`: name of a weight → the share of zeros that it must have.

        **Returns** the checksums of what was written. Raises `RunError` when a weight is not the same when it is read
        again, or has fewer zeros than it must.
        """
        stored: dict[Path, dict[str, Tensor]] = {}
        for name, tensor in as_stored(self._model, self._stream.places, weights).items():
            stored.setdefault(self._files[name], {})[name] = tensor
        checksums: dict[str, dict[str, str]] = {}
        for file, tensors in stored.items():
            copy = self._copied(file)
            _overwrite(copy, tensors)
            checksums[file.name] = {name: tensor_checksum(copy, name) for name in tensors}
        for name, weight in weights.items():
            written = self.read(name)
            if tensor_bytes(written) != tensor_bytes(weight):
                raise RunError(f"{name} is not the same after writing; nothing was kept, please report this")
            if name in sparsity:
                check_zeros(name, written, sparsity[name])
        return checksums

    def read(self, name: str) -> Tensor:
        """A weight that was written."""
        return self._stream.places[name].moved(self._directory).read(self._model)

    def finish(self, sidecar: Mapping[str, Any], written: Checksums) -> None:
        """Makes a checkpoint of them: with all other weights as they were, and what is beside weights.

        `sidecar`: as for `save_checkpoint`; `written`: all checksums. Raises `RunError` for a file that has changed.
        """
        files = set(self._files.values())
        index = min(files).with_name(INDEX)
        if index.is_file():
            shutil.copyfile(index, self._directory / INDEX)
        for file in sorted(files):
            copy, known = self._copied(file), written.get(file.name, {})
            for name in read_spans(file):
                if tensor_checksum(copy, name) != (known.get(name) or tensor_checksum(file, name)):
                    copy.unlink()
                    raise RunError(f"{name} in {copy} has changed since it was written; run again to go on")
        checkpoint = self._stream.checkpoint
        checkpoint.model.config.save_pretrained(self._directory)
        if checkpoint.model.can_generate():
            checkpoint.model.generation_config.to_json_file(self._directory / GENERATION_CONFIG_NAME)
        checkpoint.tokenizer.save_pretrained(self._directory)
        write_sidecar(self._directory, sidecar)

    def _copied(self, file: Path) -> Path:
        copy = self._directory / file.name
        if not copy.exists():
            self._directory.mkdir(exist_ok=True)
            beside = copy.with_name(f"{copy.name}.tmp")
            shutil.copyfile(file, beside)
            rename_durably(beside, copy)
        return copy


def _overwrite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    spans = read_spans(file)
    with file.open("r+b") as opened:
        for name, tensor in tensors.items():
            start, end = spans[name]
            data = tensor_bytes(tensor)
            if end - start != data.nbytes:
                raise RunError(f"{name} has another size than before; nothing was kept, please report this")
            opened.seek(start)
            opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
