"""Writes the weights of a checkpoint as they come, with no more in memory than one file holds."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30


class ShardWriter:
    """Writes `model.safetensors`, or `model-0000i-of-0000N.safetensors` and their index.

    - `directory`: there already, without weights. Until `finish` the files in it have other names.
    - `stem`: what the files are called; transformers loads those called "model".
    - `shard_bytes`: of tensors, the most that a file holds; a tensor larger than that has a file of its own.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES, stem: str = "model") -> None:
        self._directory = directory
        self._stem = stem
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shard_of: dict[str, int] = {}  # of each name, from 1
        self._shards = 0
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors of any dtype on any device; they must not change before `finish`.

        Raises `ValueError` for a name that was added before.
        """
        for name, tensor in tensors.items():
            if name in self._shard_of or name in self._waiting:
                raise ValueError(f"{name} was added already")
            tensor = tensor.detach().cpu().contiguous()
            if self._waiting_bytes + tensor.nbytes > self._shard_bytes:
                self._write()
            self._waiting[name] = tensor
            self._waiting_bytes += tensor.nbytes
            self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes what is left and gives all files their names, which only now can tell how many there are."""
        self._write()
        if self._shards == 1:
            self._part(1).rename(self._directory / f"{self._stem}.safetensors")
            return
        files = {i: f"{self._stem}-{i:05d}-of-{self._shards:05d}.safetensors" for i in range(1, self._shards + 1)}
        for i, file in files.items():
            self._part(i).rename(self._directory / file)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: files[i] for name, i in self._shard_of.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / f"{self._stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        if not self._waiting:
            return
        self._shards += 1
        save_file(self._waiting, self._part(self._shards), {"format": "pt"})
        self._shard_of |= dict.fromkeys(self._waiting, self._shards)
        self._waiting = {}
        self._waiting_bytes = 0

    def _part(self, number: int) -> Path:
        return self._directory / f"{self._stem}-{number:05d}.part"
