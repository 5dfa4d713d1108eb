"""A checkpoint whose weights stay in their files: a model without any, into which one block after the other is read."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.checkpoints.ahead import Ahead
from trimfit.checkpoints.load import Checkpoint, load_checkpoint
from trimfit.checkpoints.places import Place, find_places
from trimfit.checkpoints.shards import INDEX, SINGLE, read_ahead, read_spans, shard_files, source_directory
from trimfit.timing import stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """A checkpoint that is read piece by piece.

    - `checkpoint`: with a model whose weights are on the meta device, all but those of blocks that are `loaded`.
    - `device`: of blocks that are `loaded`.
    - `places`: of each tensor in the state dict of the model.
    - `buffers`: those that no file holds, by name.
    - `ahead`: for a device that works while the host reads; None where the system's own reading ahead will do, as
      weights are mapped from their files.
    """

    checkpoint: Checkpoint
    device: torch.device
    places: dict[str, Place]
    buffers: dict[str, Tensor]
    ahead: Ahead | None = None

    def read(self, name: str) -> Tensor:
        """One tensor of the state dict in the dtype that it has in the model, on the CPU."""
        return self.places[name].read(self.checkpoint.model)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the state dict, sorted by name, each of them read when its turn comes."""
        return ((name, self.read(name)) for name in sorted(self.places))

    @contextmanager
    def loaded(self, block: str, then: str | None = None) -> Generator[None]:
        """Puts the weights of a submodule into the model while the context lasts; what becomes of them ends with it.

        Those of the submodule `then` are read in the background meanwhile.
        """
        module = self.checkpoint.model.get_submodule(block)
        with stage("load"):
            weights = {name: self._on_device(f"{block}.{name}") for name in module.state_dict()}
            module.load_state_dict(weights, assign=True)
            self._put_buffers(f"{block}.")
        del weights
        if then is not None:
            self._begin([name for name in self.places if name.startswith(f"{then}.")])
        try:
            yield
        except BaseException:
            if self.ahead:
                self.ahead.forget()  # or the process would end no sooner than all of it is read
            raise
        finally:
            module.to("meta")

    def _on_device(self, name: str) -> Tensor:
        tensor = self.ahead.take(name) if self.ahead else None
        tensor = self.read(name) if tensor is None else tensor
        return tensor.to(self.device, non_blocking=tensor.is_pinned())

    def _begin(self, names: Sequence[str]) -> None:
        if self.ahead:
            self.ahead.begin(names, self.read)
            return
        stored: dict[Path, set[str]] = {}
        for name in names:
            for source in self.places[name].sources:
                stored.setdefault(source.file, set()).add(source.name)
        for file, wanted in stored.items():
            spans = read_spans(file)
            read_ahead(file, [spans[one] for one in wanted])

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

    They can stay there when safetensors files hold each as it is in the model, or as transformers can convert it.
    Blocks are to be on `device`. `source` and errors are those of `load_checkpoint`.
    """
    directory = Path(source).expanduser()
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        return "its weights are not in safetensors files"
    checkpoint = load_checkpoint(source, torch.device("meta"))
    found = source_directory(checkpoint.source)
    files = [] if found is None else shard_files(found)
    if found is None or not files:
        return "its weights are not in safetensors files"
    if (found / SINGLE).is_file() and (found / INDEX).is_file():
        return f"it has both {SINGLE} and {INDEX}"
    if getattr(checkpoint.model.config, "transformers_weights", None):
        return "its config names the file of its weights"
    places = find_places(checkpoint.model, files)
    _tie(checkpoint.model, places)
    lost = [name for name in checkpoint.model.state_dict() if name not in places]
    if lost:
        return f"no file holds {lost[0]} as it is in the model"
    device = torch.empty(0, device=device).device  # "cuda" is now "cuda:0"
    return Stream(checkpoint, device, places, _buffers(checkpoint.model), Ahead() if device.type == "cuda" else None)


def _tie(model: PreTrainedModel, places: Mapping[str, Place]) -> None:
    """What transformers leaves open without values: weights to be tied that are stored twice are, if they are equal."""
    for target, kept in list(model.all_tied_weights_keys.items()):
        both = [places[name] for name in (target, kept) if name in places]
        if len(both) == 2 and both[0] != both[1] and not torch.equal(both[0].read(model), both[1].read(model)):
            del model.all_tied_weights_keys[target]
    model.tie_weights(recompute_mapping=False)


def _buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that no file holds, such as frequencies of rotary embeddings, computed from the config."""
    kept = model.state_dict()
    wanted = {name: one for name, one in model.named_buffers(remove_duplicate=False) if name not in kept}
    with init_empty_weights(include_buffers=False):
        computed: Any = type(model)(model.config)
    found = dict(computed.named_buffers(remove_duplicate=False))
    return {name: found[name].to(one.dtype) for name, one in wanted.items()}
