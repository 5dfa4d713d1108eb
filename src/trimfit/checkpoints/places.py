"""Where the weights of a model are in files, under the names and in the pieces from which transformers makes them."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from trimfit.checkpoints.shards import read_tensor


@dataclass(frozen=True)
class Source:
    """A tensor in a file, and as which of a converter's inputs it counts (None where nothing is converted)."""

    file: Path
    name: str
    pattern: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is.

    - `name`: in the state dict; of tied ones, that of the one which is stored.
    - `sources`: what it is made of; one tensor, where nothing is converted.
    - `dtype`: in the model.
    - `converter`: of transformers, makes it of its sources (and others of the same, where they are split).
    """

    name: str
    sources: tuple[Source, ...]
    dtype: torch.dtype
    converter: WeightConverter | None = None

    def read(self, model: PreTrainedModel) -> Tensor:
        """The tensor, on the CPU; mapped from its file where nothing is converted."""
        pieces = [read_tensor(source.file, source.name).to(self.dtype) for source in self.sources]
        return pieces[0] if self.converter is None else self.convert(model, pieces)[self.name]

    def moved(self, directory: Path) -> Self:
        """The same in copies of its files in another directory."""
        return replace(self, sources=tuple(replace(one, file=directory / one.file.name) for one in self.sources))

    def convert(self, model: PreTrainedModel, pieces: Iterable[Tensor]) -> dict[str, Tensor]:
        """All that the converter makes of the sources, by name in the state dict."""
        converter = deepcopy(self.converter)
        assert converter is not None
        made: dict[str, Any] = {}
        for source, piece in zip(self.sources, pieces, strict=True):
            converter.add_tensor(self.name, source.name, source.pattern or "", piece)  # type: ignore[arg-type]
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def find_places(model: PreTrainedModel, files: Iterable[Path]) -> dict[str, Place]:
    """By name in the state dict of a model on the meta device; without those that no file holds in the right shape."""
    shapes: dict[str, list[int]] = {}
    found: dict[str, list[Source]] = {}
    state = model.state_dict(keep_vars=True)
    conversions: list[Any] = getattr(model, "_weight_conversions", None) or []
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118
                shapes[stored] = tensors.get_slice(stored).get_shape()
                name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
                if name not in state and stored in state:
                    name, pattern = stored, None
                found.setdefault(name, []).append(Source(file, stored, pattern))
    places: dict[str, Place] = {}
    for name in state.keys() & found.keys():
        order: dict[str, Any] = {source.name: dot_natural_key(source.name) for source in found[name]}
        sources = sorted(found[name], key=lambda source: order[source.name])  # experts one after the other
        converter = by_pattern.get(sources[0].pattern or "")
        places |= _checked(model, state, Place(name, tuple(sources), state[name].dtype, converter), shapes)
    return _with_tied(state, places)


def as_stored(model: PreTrainedModel, places: Mapping[str, Place], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the state dict under the names and in the pieces in which files hold them.

    Those that are pieces of one stored tensor must be given together.
    """
    stored = {places[name].sources[0].name: tensor for name, tensor in weights.items() if not places[name].converter}
    converted = {name: tensor for name, tensor in weights.items() if places[name].converter}
    return stored | (revert_weight_conversion(model, converted) if converted else {})


def _checked(
    model: PreTrainedModel, state: dict[str, Any], place: Place, shapes: dict[str, list[int]]
) -> dict[str, Place]:
    """The places of all that is made of the same sources, if it has the shapes that it has in the model."""
    pieces = [torch.empty(shapes[source.name], dtype=place.dtype, device="meta") for source in place.sources]
    made = {place.name: pieces[0]} if place.converter is None else place.convert(model, pieces)
    return {
        name: replace(place, name=name)
        for name, tensor in made.items()
        if name in state and tensor.shape == state[name].shape
    }


def _with_tied(state: dict[str, Any], places: dict[str, Place]) -> dict[str, Place]:
    """Those that are not stored are read from where the one is that they share their memory with."""
    stored = {id(state[name]): place for name, place in places.items()}
    return {name: places.get(name) or stored[id(tensor)] for name, tensor in state.items() if id(tensor) in stored}
