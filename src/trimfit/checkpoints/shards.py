"""How the weights of a checkpoint are split in files."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from trimfit.checkpoints.tensor_bytes import tensor_bytes
from trimfit.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shard_map(directory: Path, stem: str = "model") -> dict[str, str]:
    """Which file holds which weight, by its name; {} for weights that are not split. `InputError` if damaged."""
    index = directory / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        return {name: Path(file).name for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index} is damaged: download the model again") from None


def source_directory(source: str) -> Path | None:
    """Where the files of a directory or hub name are; None for a model that was not loaded from anywhere."""
    try:
        config = cached_file(source, CONFIG_NAME, local_files_only=True)  # in the directory or the cache of the hub
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def shard_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint, [] when it has none."""
    shards = shard_map(directory, stem)
    if shards:
        return [directory / name for name in sorted(set(shards.values()))]
    single = directory / f"{stem}.safetensors"
    return [single] if single.is_file() else []


def merge(parts: Path, directory: Path, shards: Mapping[str, str]) -> None:
    """Moves a checkpoint from `parts` to `directory`, split as in `shards`.

    Each weight of `parts` has a file of its own, but for views of one tensor, which are together: experts, as
    transformers writes them. Weights that `shards` does not know go to its last file. One shard is in memory at a time,
    and on disk twice.
    """
    index: dict[str, Any] = json.loads((parts / INDEX).read_text())
    files: dict[str, str] = index["weight_map"]
    index["weight_map"] = {name: shards.get(name, max(shards.values())) for name in files}
    left = Counter(files.values())
    for shard in sorted(set(index["weight_map"].values())):
        names = [name for name in files if index["weight_map"][name] == shard]
        save_file({name: read_tensor(parts / files[name], name) for name in names}, directory / shard, {"format": "pt"})
        left.subtract(files[name] for name in names)
        for file in {files[name] for name in names if not left[files[name]]}:
            (parts / file).unlink()
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (parts / INDEX).unlink()
    for other in parts.iterdir():
        other.rename(directory / other.name)
    parts.rmdir()


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor, mapped from the file for as long as there is a view of it; what is changed in it stays in memory."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def read_spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where in a safetensors file the bytes of each tensor begin and end.

    The file is the length of a header, the header, and the bytes that it tells of.
    """
    with file.open("rb") as opened:
        start = 8 + (size := int.from_bytes(opened.read(8), "little"))
        header: dict[str, Any] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items()
    }


def tensor_checksum(file: Path, name: str) -> str:
    """SHA-256 of the bytes of a tensor in a safetensors file."""
    return hashlib.sha256(tensor_bytes(read_tensor(file, name))).hexdigest()


def read_ahead(file: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Asks the system to read parts of a file in the background, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    with file.open("rb") as opened:
        for start, end in spans:
            os.posix_fadvise(opened.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
