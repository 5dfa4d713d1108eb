"""Quantized weights in the format `pack-quantized` of compressed-tensors, which transformers and vLLM load."""

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.packed_experts import check_experts, expert_parts, join_rows, split_rows, stored_names
from trimfit.checkpoints.shards import shard_files
from trimfit.errors import InputError, RunError
from trimfit.quant.grid import Grid, Quantized

ONLINE = "trimfit"  # method, and stem of the files, of checkpoints with online transformations

_ROWS = 64  # packed at a time: the library needs many bytes for each weight while it packs


def packed_tensors(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """What a checkpoint holds instead of `{name}.weight` (out, in); the bias, if any, is stored as ever.

    - `{name}.weight_packed`: (out, ⌈in · bits / 32⌉) int32, the codes of each row one after another, lowest bits first.
    - `{name}.weight_scale`: (out, groups), as it is.
    - `{name}.weight_shape`: (2,) int64, out and in.
    - `{name}.weight_zero_point`: (⌈out · bits / 32⌉, groups) int32, packed along the output; only if asymmetric.

    Raises `InputError` for a symmetric grid with a zero point that is not in the middle, as it would not be stored.
    """
    grid = quantized.grid
    rows = [pack_to_int32(_signed(codes, grid), grid.bits) for codes in quantized.codes.split(_ROWS)]
    tensors = {
        f"{name}.weight_packed": torch.cat(rows),
        f"{name}.weight_scale": quantized.scale,
        f"{name}.weight_shape": torch.tensor(quantized.codes.shape),
    }
    if not grid.symmetric:
        packed = pack_to_int32(_signed(quantized.zero_point, grid), grid.bits, packed_dim=0)
        tensors[f"{name}.weight_zero_point"] = packed
    elif (quantized.zero_point != grid.middle).any():
        raise InputError(f"the grid of {name} is symmetric, but not all of its zero points are {grid.middle}")
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The inverse of `packed_tensors`, bit for bit. `grid` is the one that the layer was packed with."""
    scale = tensors[f"{name}.weight_scale"]
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    codes = _unsigned(unpack_from_int32(tensors[f"{name}.weight_packed"], grid.bits, shape), grid)
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle, dtype=torch.uint8)
    else:
        # Transposed by a copy: of a single row, the library's own transpose has strides that it cannot read.
        columns = tensors[f"{name}.weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
        zero = _unsigned(unpack_from_int32(columns, grid.bits, scale.T.shape), grid).T.contiguous()
    return Quantized(codes, scale, zero, grid)


def quantization_config(layers: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    **Arguments**

    - `layers`: the grid of each quantized layer by its name in the model. At least one, else `InputError`.
    - `ignore`: the names of all other `torch.nn.Linear` modules of the model.
    """
    if not layers:
        raise InputError("no layer is quantized, so there is nothing to pack; save the model as it is")
    names: dict[Grid, list[str]] = {}
    for name, grid in layers.items():
        names.setdefault(grid, []).append(name)
    # One grid has the form that all servers know. Of several, none may name the class: vLLM looks for the class of a
    # fused module (q, k and v in one) before the names of its parts, and would take the wrong grid.
    targets = {grid: ["Linear"] if len(names) == 1 else names[grid] for grid in names}
    return {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,  # before 0.18, bits that do not divide 32 were packed otherwise
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _scheme(grid, targets[grid]) for i, grid in enumerate(names)},
        "ignore": list(ignore),
    }


def check_packable(model: PreTrainedModel, grids: Mapping[str, Grid], *, online: bool = False) -> None:
    """Raises `InputError` for layers the format cannot hold.

    It holds each `torch.nn.Linear` itself with weights of its own, and experts as `check_experts` says.

    - `model`: tells names, shapes and dtypes; its weights are not looked at.
    - `grids`: the grid of each layer, by its name in the model; `online`: whether they have online transformations.
    """
    tied = _tied(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    parts = expert_parts(model)
    for name in grids:
        if name in parts:
            continue
        if name not in modules:
            raise InputError(
                f"{name} is one of several experts in one tensor, but the pack-quantized format holds torch.nn.Linear "
                "only: this model cannot be packed; --format dense holds the same weights"
            )
        module = modules[name]
        if type(module) is not nn.Linear:  # nor a subclass: transformers does not load Falcon's, packed
            raise InputError(
                f"{name} is a {type(module).__name__}, but the pack-quantized format holds torch.nn.Linear only: "
                "this model cannot be packed; --format dense holds the same weights"
            )
        if f"{name}.weight" in tied:
            raise InputError(f"{name} shares its weights with the embedding, so it cannot be packed; leave it as it is")
    check_experts(parts, grids, online=online)


def plain_tensors(model: PreTrainedModel, layers: Collection[str]) -> dict[str, Tensor]:
    """What a checkpoint holds beside the packed `layers`: norms, embeddings, biases; tied weights once.

    Tensors are the model's own.
    """
    state = model.state_dict()
    left_out = {_holder(state, name) for name in layers} | _tied(model)
    return {name: tensor for name, tensor in state.items() if name not in left_out}


class BlockPacker:
    """Makes of blocks of a model what a checkpoint holds of them.

    A layer may have an online transformation T: its packed weight is W T, and T⁻¹ (k, b, b), which its inputs go
    through, is stored once for all layers that share it. The format knows no such thing, and loading without it would
    give a wrong model, so the files then have a name of their own that only `trimfit.load` looks for.

    - `model`: tells names, shapes and dtypes; its weights are not looked at.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._parts = model, expert_parts(model)

    def pack(
        self, layers: Mapping[str, Quantized], inverses: Mapping[str, Tensor], plain: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors by their names in files.

        - `layers`: by name. `inverses`: T⁻¹ by the name of one of the layers that share it, see `transform_name`.
        - `plain`: tensors that are not packed, by name in the model.

        Raises `RunError` for a layer that cannot be unpacked again as it was.
        """
        found = {transform_name(owner): inverse.to(self._model.dtype) for owner, inverse in inverses.items()}
        for name, quantized in layers.items():
            stored = self._stored(name)
            for part, rows in zip(stored, split_rows(quantized, len(stored)), strict=True):
                tensors = packed_tensors(part, rows)
                _check_packed(part, tensors, rows)
                found |= tensors
        return found | self.plain(plain)

    def plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not packed, by name in the model, under their names in files."""
        return stored_names(self._model, self._parts, tensors)

    def unpack(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """The layer of that name, bit for bit as it was packed with this grid."""
        return join_rows([unpack(part, tensors, grid) for part in self._stored(name)])

    def _stored(self, name: str) -> tuple[str, ...]:
        return self._parts.get(name, (name,))


def transform_name(layer: str) -> str:
    """Of the T⁻¹ that files hold for a layer and those that share it."""
    return f"{layer}.input_transform"


def finish_packed(
    model: PreTrainedModel, layers: Mapping[str, Grid], directory: Path, transforms: Mapping[str, str] | None = None
) -> None:
    """Writes config and generation config beside the weights in `directory`, and checks that the weights are all there.

    `model` tells names, shapes and dtypes; its weights may be on the meta device. It is not changed. Raises
    `InputError` as `check_packable` does, `RunError` when weights are missing, unknown or with scales that are not in
    the dtype of the model, in which they would be loaded.
    """
    check_packable(model, layers)
    transforms = transforms or {}
    parts = expert_parts(model)
    # Experts first: among several grids, transformers takes the first for theirs.
    ordered = sorted(layers, key=lambda name: name not in parts)
    stored = {part: layers[name] for name in ordered for part in parts.get(name, (name,))}
    plain = stored_names(model, parts, plain_tensors(model, layers))
    _check_written(model, plain, stored, transforms, shard_files(directory, ONLINE if transforms else "model"))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = [name for name in linear if name not in layers]
    if parts:  # routers are linear layers elsewhere, under the names that they have in files
        left += [name.removesuffix(".weight") for name, tensor in plain.items() if tensor.dim() == 2]
    config = copy.deepcopy(model.config)
    packed = quantization_config(stored, list(dict.fromkeys(left)))
    config.quantization_config = (
        {"quant_method": ONLINE, "packed": packed, "transforms": dict(transforms)} if transforms else packed
    )
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.to_json_file(directory / GENERATION_CONFIG_NAME)


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    """int8 as the library wants it, 0 in the middle: uint8 wraps around where int8 is negative."""
    return (codes - grid.middle).view(torch.int8)


def _unsigned(signed: Tensor, grid: Grid) -> Tensor:
    return signed.view(torch.uint8) + grid.middle


def _scheme(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of weights that are stored under another name."""
    pairs = model.all_tied_weights_keys.items()
    return {name for name, source in pairs if model.get_parameter(name) is model.get_parameter(source)}


def _holder(state: Mapping[str, Tensor], name: str) -> str:
    """The name in the state dict of the tensor that holds the weight of a layer, and of an expert those of all."""
    owner, _, rest = name.rpartition(".")
    return f"{name}.weight" if f"{name}.weight" in state else f"{owner.rpartition('.')[0]}.{rest}"


def _check_written(
    model: PreTrainedModel,
    plain: Mapping[str, Tensor],
    layers: Mapping[str, Grid],
    transforms: Mapping[str, str],
    shards: Sequence[Path],
) -> None:
    """`plain` and `layers` by their names in the files."""
    expected = set(plain) | set(transforms.values())
    for name, grid in layers.items():
        parts = ("packed", "scale", "shape") if grid.symmetric else ("packed", "scale", "shape", "zero_point")
        expected |= {f"{name}.weight_{part}" for part in parts}
    written: set[str] = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names = set(file.keys())
            scales = {name: file.get_slice(name)[:0].dtype for name in names if name.endswith(".weight_scale")}
        written |= names
        for name, dtype in scales.items():
            if dtype != model.dtype:
                raise RunError(f"{name} is {dtype} but the model {model.dtype}; nothing was kept, please report this")
    wrong = sorted(expected ^ written)
    if wrong:
        what = "unknown to" if wrong[0] in written else "missing from"
        raise RunError(f"{wrong[0]} is {what} the quantized checkpoint; nothing was kept, please report this")


def _check_packed(name: str, tensors: Mapping[str, Tensor], quantized: Quantized) -> None:
    found = unpack(name, tensors, quantized.grid)
    pairs = ((found.codes, quantized.codes), (found.scale, quantized.scale), (found.zero_point, quantized.zero_point))
    if not all(torch.equal(*pair) for pair in pairs):
        raise RunError(f"{name} is not the same after packing; nothing was kept, please report this")
