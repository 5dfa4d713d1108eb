"""Copies the files of a checkpoint and puts other bytes in place of some of its weights."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.save import check_zeros, write_sidecar
from trimfit.checkpoints.shards import INDEX, read_spans, read_tensor
from trimfit.checkpoints.stream import Place, Stream
from trimfit.checkpoints.tensor_bytes import tensor_bytes
from trimfit.errors import InputError, RunError


def check_patchable(stream: Stream) -> None:
    """Raises `InputError` for weights that are not stored in the dtype which they have in the model."""
    for name, place in stream.places.items():
        stored = read_tensor(place.file, place.name).dtype
        if stored != place.dtype:
            raise InputError(
                f"{name} is stored as {stored} but the model computes in {place.dtype}, so its files cannot be taken "
                "over: leave out --offload"
            )


def save_patched(
    stream: Stream,
    directory: Path,
    sidecar: Mapping[str, Any],
    changed: Iterable[tuple[str, Tensor]],
    *,
    sparsity: Mapping[str, float],
) -> None:
    """Writes the checkpoint of a stream with other weights: split as it was, one weight in memory at a time.

    - `directory`, `sidecar`, `sparsity`: as for `save_checkpoint`.
    - `changed`: names in the state dict and their new weights, of the shape and dtype of the old ones; each is done
      with when the next is asked for.

    Raises `RunError` when a weight is not the same after writing, or has fewer zeros than it must.
    """
    for file in {place.file for place in stream.places.values()}:
        shutil.copyfile(file, directory / file.name)
    index = next(iter(stream.places.values())).file.with_name(INDEX)
    if index.is_file():
        shutil.copyfile(index, directory / INDEX)
    left = dict(sparsity)
    for name, weight in changed:
        place = stream.places[name]
        _overwrite(directory / place.file.name, place, weight)
        _verify(directory / place.file.name, name, place, weight, left.pop(name, 0.0))
    if left:
        raise RunError(f"{min(left)} was not written; nothing was kept, please report this")
    _save_rest(stream, directory, sidecar)


def _save_rest(stream: Stream, directory: Path, sidecar: Mapping[str, Any]) -> None:
    model = stream.checkpoint.model
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.to_json_file(directory / GENERATION_CONFIG_NAME)
    stream.checkpoint.tokenizer.save_pretrained(directory)
    write_sidecar(directory, sidecar)


def _overwrite(file: Path, place: Place, weight: Tensor) -> None:
    start, end = read_spans(file)[place.name]
    data = tensor_bytes(weight)
    if end - start != data.nbytes:
        raise RunError(f"{place.name} has another size than before; nothing was kept, please report this")
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(data)


def _verify(file: Path, name: str, place: Place, weight: Tensor, share: float) -> None:
    written = read_tensor(file, place.name)
    if tensor_bytes(written) != tensor_bytes(weight):
        raise RunError(f"{name} is not the same after writing; nothing was kept, please report this")
    check_zeros(name, written, share)
