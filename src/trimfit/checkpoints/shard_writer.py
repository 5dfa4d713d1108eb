"""Writes the weights of a checkpoint as they come, and keeps none of them in memory."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trimfit.checkpoints.shards import read_spans, read_tensor, shard_files
from trimfit.checkpoints.tensor_bytes import tensor_bytes, tensor_digest
from trimfit.errors import RunError

SHARD_BYTES = 4 * 2**30
_CHUNK = 2**24  # bytes in memory while a file is put together


@dataclass(frozen=True)
class _Waiting:
    """A tensor whose bytes wait for the file that they belong to, from `start` on in the file of all that wait."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class ShardWriter:
    """Writes `model.safetensors`, or `model-0000i-of-0000N.safetensors` and their index.

    - `directory`: there already, without weights. Until `finish` the files in it have other names.
    - `shard_bytes`: of tensors, the most that a file holds; a tensor larger than that has a file of its own.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_bytes = 0
        self._waiting_file = directory / "waiting.part"
        self._digests: dict[str, bytes] = {}
        self._shard_of: dict[str, int] = {}  # of each name, from 1
        self._shards = 0
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of any dtype on any device, and is done with them.

        Raises `ValueError` for a name that was added before.
        """
        for name, tensor in tensors.items():
            self._register(name, tensor)
            if self._waiting_bytes + tensor.nbytes > self._shard_bytes:
                self._write()
            with self._waiting_file.open("ab") as file:
                file.write(tensor_bytes(tensor))
            self._waiting[name] = _Waiting(tensor.dtype, tuple(tensor.shape), self._waiting_bytes, tensor.nbytes)
            self._waiting_bytes += tensor.nbytes

    def add_file(self, source: Path) -> None:
        """Takes a safetensors file, as it is, for one of those to write. It stays where it is, too.

        Raises `ValueError` for a name that was added before.
        """
        names = list(read_spans(source))
        for name in names:
            self._register(name, read_tensor(source, name))
        self._write()
        self._shards += 1
        self._shard_of |= dict.fromkeys(names, self._shards)
        _link(source, self._part(self._shards))

    def finish(self, stem: str = "model") -> None:
        """Writes what is left and gives all files their names, which only now can tell how many there are.

        `stem` is what they begin with; transformers loads those called "model". Everything is read again; raises
        `RunError` when it is not what was added.
        """
        self._write()
        if self._shards == 1:
            self._part(1).rename(self._directory / f"{stem}.safetensors")
        else:
            self._name_shards(stem)
        self._verify(stem)

    def _register(self, name: str, tensor: Tensor) -> None:
        if name in self._digests:
            raise ValueError(f"{name} was added already")
        self._digests[name] = tensor_digest(tensor)
        self._total_bytes += tensor.nbytes

    def _name_shards(self, stem: str) -> None:
        files = {i: f"{stem}-{i:05d}-of-{self._shards:05d}.safetensors" for i in range(1, self._shards + 1)}
        for i, file in files.items():
            self._part(i).rename(self._directory / file)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: files[i] for name, i in self._shard_of.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        """One file as safetensors are: the length of a header, the header, and the bytes that it tells of.

        Tensors with larger items come first, so that each begins at a multiple of the size of its items.
        """
        if not self._waiting:
            return
        self._shards += 1
        order = sorted(self._waiting.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in order:
            offsets = [end, end := end + tensor.size]
            header[name] = {"dtype": _dtype(tensor.dtype), "shape": tensor.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self._part(self._shards).open("wb") as file, self._waiting_file.open("rb") as waiting:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in order:
                waiting.seek(tensor.start)
                _copy(waiting, file, tensor.size)
        self._waiting_file.unlink()
        self._shard_of |= dict.fromkeys(self._waiting, self._shards)
        self._waiting = {}
        self._waiting_bytes = 0

    def _verify(self, stem: str) -> None:
        for file in shard_files(self._directory, stem):
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                if tensor_digest(read_tensor(file, name)) != self._digests.pop(name, None):
                    raise RunError(f"{name} is not the same after writing; nothing was kept, please report this")
        if self._digests:
            raise RunError(f"{min(self._digests)} is not there after writing; nothing was kept, please report this")

    def _part(self, number: int) -> Path:
        return self._directory / f"{number:05d}.part"


def _link(source: Path, target: Path) -> None:
    """One more name for a file; where the file system has no such, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _dtype(dtype: torch.dtype) -> str:
    """As the format calls it, which the library tells in the header of a file."""
    return json.loads(save({"": torch.empty(0, dtype=dtype)})[8:])[""]["dtype"]


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, _CHUNK))
        if not chunk:
            raise RunError("weights that were written cannot be read again; nothing was kept")
        target.write(chunk)
        size -= len(chunk)
