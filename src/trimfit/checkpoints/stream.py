"""A checkpoint whose weights stay in their files: a model without any, into which one block after the other is read."""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.checkpoints.load import Checkpoint, load_checkpoint
from trimfit.checkpoints.shards import (
    INDEX,
    SINGLE,
    read_ahead,
    read_spans,
    read_tensor,
    shard_files,
    source_directory,
)
from trimfit.timing import stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is: in which file, under which name; and its dtype in the model."""

    file: Path
    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Stream:
    """A checkpoint that is read piece by piece.

    - `checkpoint`: with a model whose weights are on the meta device, all but those of blocks that are `loaded`.
    - `device`: of blocks that are `loaded`.
    - `places`: of each tensor in the state dict of the model; of tied ones, that of the one which is stored.
    - `buffers`: those that no file holds, by name.
    """

    checkpoint: Checkpoint
    device: torch.device
    places: dict[str, Place]
    buffers: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """One tensor of the state dict in the dtype that it has in the model, on the CPU."""
        place = self.places[name]
        return read_tensor(place.file, place.name).to(place.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the state dict, sorted by name, each of them read when its turn comes."""
        return ((name, self.read(name)) for name in sorted(self.places))

    @contextmanager
    def loaded(self, block: str, then: str | None = None) -> Generator[None]:
        """Puts the weights of a submodule into the model while the context lasts; what becomes of them ends with it.

        The system reads those of the submodule `then` in the background meanwhile.
        """
        module = self.checkpoint.model.get_submodule(block)
        with stage("load"):
            weights = {name: self.read(f"{block}.{name}").to(self.device) for name in module.state_dict()}
            module.load_state_dict(weights, assign=True)
            self._put_buffers(f"{block}.")
        del weights
        if then is not None:
            self._read_ahead(f"{then}.")
        try:
            yield
        finally:
            module.to("meta")

    def _read_ahead(self, prefix: str) -> None:
        names: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            if name.startswith(prefix):
                names.setdefault(place.file, []).append(place.name)
        for file, stored in names.items():
            spans = read_spans(file)
            read_ahead(file, [spans[name] for name in stored])

    def load_all_but(self, blocks: Sequence[str]) -> None:
        """Puts everything else into the model, for as long as it lives: with one block `loaded` it can run."""
        model = self.checkpoint.model
        inside = tuple(f"{block}." for block in blocks)
        names = [name for name in model.state_dict() if not name.startswith(inside)]
        model.load_state_dict({name: self.read(name).to(self.device) for name in names}, strict=False, assign=True)
        model.tie_weights(recompute_mapping=False)
        self._put_buffers("")

    def _put_buffers(self, prefix: str) -> None:
        for name, buffer in self.buffers.items():
            if name.startswith(prefix):
                path, _, last = name.rpartition(".")
                module = self.checkpoint.model.get_submodule(path)
                module.register_buffer(last, buffer.to(self.device), persistent=False)


def open_stream(source: str, device: torch.device) -> Stream | None:
    """As `find_stream`, with None for a checkpoint that has to be loaded; the log says why."""
    found = find_stream(source, device)
    if isinstance(found, Stream):
        return found
    log.info("%s is loaded as a whole: %s", source, found)
    return None


def find_stream(source: str, device: torch.device) -> Stream | str:
    """The checkpoint with its weights left in their files, or why they have to be loaded.

    They can stay there when safetensors files hold each under the name and in the shape that it has in the model.
    Blocks are to be on `device`. `source` and errors are those of `load_checkpoint`.
    """
    directory = Path(source).expanduser()
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        return "its weights are not in safetensors files"
    checkpoint = load_checkpoint(source)  # from files that are mapped, so hardly any is read
    model: Any = checkpoint.model
    stored = model.state_dict()
    buffers = {name: one for name, one in model.named_buffers(remove_duplicate=False) if name not in stored}
    del stored
    model.to("meta")
    checkpoint.model.tie_weights(recompute_mapping=False)  # what was tied is not any more after it was moved
    found = source_directory(checkpoint.source)
    files = [] if found is None else shard_files(found)
    if found is None or not files:
        return "its weights are not in safetensors files"
    if (found / SINGLE).is_file() and (found / INDEX).is_file():
        return f"it has both {SINGLE} and {INDEX}"
    if getattr(checkpoint.model.config, "transformers_weights", None):
        return "its config names the file of its weights"
    if getattr(checkpoint.model, "_weight_conversions", None):
        return "transformers converts its weights when it loads them"
    places = _places(checkpoint.model, files)
    lost = [name for name in checkpoint.model.state_dict() if name not in places]
    if lost:
        return f"no file holds {lost[0]} as it is in the model"
    return Stream(checkpoint, torch.empty(0, device=device).device, places, buffers)  # "cuda" is now "cuda:0"


def _places(model: PreTrainedModel, files: list[Path]) -> dict[str, Place]:
    """By name in the state dict; without those that no file holds in the right shape."""
    stored: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: (file, tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    state = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    places: dict[str, Place] = {}
    for name, tensor in state.items():
        for candidate in (name, *tied[id(tensor)]):
            if candidate in stored and stored[candidate][1] == list(tensor.shape):
                places[name] = Place(stored[candidate][0], candidate, tensor.dtype)
                break
    return places
