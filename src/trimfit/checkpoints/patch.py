"""Copies the files of a checkpoint and puts other bytes in place of some of its weights."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.places import as_stored
from trimfit.checkpoints.save import check_zeros, write_sidecar
from trimfit.checkpoints.shards import INDEX, read_spans, read_tensor
from trimfit.checkpoints.stream import Stream
from trimfit.checkpoints.tensor_bytes import tensor_bytes
from trimfit.errors import InputError, RunError


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


def save_patched(
    stream: Stream,
    directory: Path,
    sidecar: Mapping[str, Any],
    changed: Iterable[dict[str, Tensor]],
    *,
    sparsity: Mapping[str, float],
) -> None:
    """Writes the checkpoint of a stream with other weights: split as it was, some weights in memory at a time.

    - `directory`, `sidecar`, `sparsity`: as for `save_checkpoint`.
    - `changed`: names in the state dict and new weights, of the shape and dtype of the old ones; each mapping is done
      with when the next is asked for. Weights that are stored as one are in one mapping.

    Raises `RunError` when a weight is not the same after writing, or has fewer zeros than it must.
    """
    files = {source.name: source.file for place in stream.places.values() for source in place.sources}
    for file in set(files.values()):
        shutil.copyfile(file, directory / file.name)
    index = next(iter(files.values())).with_name(INDEX)
    if index.is_file():
        shutil.copyfile(index, directory / INDEX)
    left = dict(sparsity)
    for weights in changed:
        for name, tensor in as_stored(stream.checkpoint.model, stream.places, weights).items():
            _overwrite(directory / files[name].name, name, tensor)
        for name, weight in weights.items():
            _verify(stream, directory, name, weight, left.pop(name, 0.0))
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


def _overwrite(file: Path, name: str, tensor: Tensor) -> None:
    start, end = read_spans(file)[name]
    data = tensor_bytes(tensor)
    if end - start != data.nbytes:
        raise RunError(f"{name} has another size than before; nothing was kept, please report this")
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(data)


def _verify(stream: Stream, directory: Path, name: str, weight: Tensor, share: float) -> None:
    written = stream.places[name].moved(directory).read(stream.checkpoint.model)
    if tensor_bytes(written) != tensor_bytes(weight):
        raise RunError(f"{name} is not the same after writing; nothing was kept, please report this")
    check_zeros(name, written, share)
