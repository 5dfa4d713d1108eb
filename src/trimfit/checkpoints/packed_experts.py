"""Experts in packed checkpoints: in the model all share a tensor, in files each of their layers has its own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Quantized

_ROWS = 4  # of an expert, enough to tell its two halves from rows that alternate


def expert_parts(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The layers, one after the other, that files hold in place of each layer of an expert, by its name in the model.

    Rows of `experts.0.gate_up_proj` are those of `experts.0.gate_proj` and then of `experts.0.up_proj`, or however the
    family calls them. Experts that files hold in one tensor, too, are not in it.
    """
    parts: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            parts |= _parts(model, name, len(parameter))
    return parts


def _parts(model: PreTrainedModel, name: str, experts: int) -> dict[str, tuple[str, ...]]:
    """Those of one parameter (experts, out, in), seen by where transformers would store numbered rows."""
    rows = torch.arange(experts * _ROWS).view(experts, _ROWS, 1).repeat(1, 1, 2)  # dimensions of 1 would be squeezed
    owner, _, last = name.rpartition(".")
    found: dict[str, dict[int, str]] = {}
    for stored, held in revert_weight_conversion(model, {name: rows}).items():
        first = int(held.flatten()[0])
        if not stored.endswith(".weight") or not torch.equal(held, rows.flatten(0, 1)[first : first + len(held)]):
            return {}
        found.setdefault(f"{owner}.{first // _ROWS}.{last}", {})[first] = stored.removesuffix(".weight")
    return {layer: tuple(names[first] for first in sorted(names)) for layer, names in found.items()}


def split_rows(quantized: Quantized, count: int) -> list[Quantized]:
    """A layer in as many parts of equally many rows."""
    tensors = (quantized.codes.chunk(count), quantized.scale.chunk(count), quantized.zero_point.chunk(count))
    return [
        replace(quantized, codes=codes, scale=scale, zero_point=zero)
        for codes, scale, zero in zip(*tensors, strict=True)
    ]


def join_rows(parts: Sequence[Quantized]) -> Quantized:
    """The inverse of `split_rows`."""
    codes, scale, zero = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero_point")
    )
    return replace(parts[0], codes=codes, scale=scale, zero_point=zero)


def stored_names(
    model: PreTrainedModel, parts: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors that are not packed under the names that files of the family have, if it has experts of `parts`.

    Experts are left as they are: transformers would look for packed ones under the names that those have in files.
    """
    if not parts:
        return dict(tensors)
    experts = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 3}
    return experts | revert_weight_conversion(model, {n: t for n, t in tensors.items() if n not in experts})


def check_experts(experts: Collection[str], layers: Mapping[str, Grid], *, online: bool) -> None:
    """Raises `InputError` for experts on grids that transformers does not read: it knows one, without zero points.

    `experts` are the names of all that files hold one by one; the rest as for `check_packable`.
    """
    grids = {name: layers[name] for name in experts if name in layers}
    if not grids:
        return
    if online:
        raise InputError("packed experts take no online transformations: use another --transform, or --format dense")
    if not all(grid.symmetric for grid in grids.values()):
        raise InputError("packed experts cannot have zero points: give --symmetric, or --format dense")
    if left := [name for name in experts if name not in grids]:
        raise InputError(
            f"{left[0]} stays as it is, but transformers reads packed experts only if all are: ignore all or none of "
            "them, or give --format dense"
        )
    sizes = {grid.group_size: name for name, grid in grids.items()}
    if len(sizes) > 1:
        (size, name), (other_size, other), *_ = sizes.items()
        raise InputError(
            f"packed experts have one group size, but that of {name} is {size or 'the whole row'} and that of {other} "
            f"{other_size or 'the whole row'}: give a smaller --group-size that divides the inputs of both, or "
            "--format dense"
        )
