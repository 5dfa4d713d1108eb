"""Quantized checkpoints with online transformations: layers whose inputs go through T⁻¹ at run time.

Plain transformers refuses such a directory, as no file in it has a name that it looks for. `trimfit.load` makes of it a
model with ordinary weights W T in the model's dtype, in which each transformed layer is a `TransformedLinear`. It is
deliberately no `torch.nn.Linear`: what looks for those, to prune them, to merge adapters, takes their weights for what
the layer multiplies its inputs by.
"""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.packed import ONLINE, unpack
from trimfit.checkpoints.shards import read_tensor, shard_files
from trimfit.errors import InputError
from trimfit.quant.blocks import BlockTransform
from trimfit.quant.grid import Grid


@dataclass(frozen=True)
class OnlineWeights:
    """What such a directory holds.

    - `weights`: dense, by their names in the model; tied ones once. Of a transformed layer W T, or W if merged.
    - `inverses`: T⁻¹ (k, b, b) by the name of the layer; layers that share one have the same tensor.
    """

    weights: dict[str, Tensor]
    inverses: dict[str, Tensor]


def is_online(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint with this config has online transformations."""
    quantization: Any = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == ONLINE


def read_online(directory: Path, config: PreTrainedConfig, *, merged: bool = False) -> OnlineWeights:
    """Reads and dequantizes one layer after the other, so that no more than one is in memory twice.

    `merged` multiplies by T⁻¹ what was multiplied by T, in float32. The files must be there and readable; raises
    `InputError` when tensors are missing or do not fit each other, or the config does not say how to read them.
    """
    stored = _Stored(directory)
    try:
        packed: Mapping[str, Any] = config.quantization_config["packed"]
        transforms: Mapping[str, str] = dict(config.quantization_config["transforms"])
        names = {*transforms, *stored.packed_layers()}
        grids = {name: _grid(packed, name) for name in sorted(names)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"the quantization_config of {directory} is damaged: quantize the model again") from None
    inverses = {tensor: stored.take(tensor) for tensor in sorted(set(transforms.values()))}
    weights: dict[str, Tensor] = {}
    for name, grid in grids.items():
        weight = stored.take_layer(name, grid)
        if name in transforms:
            inverse = inverses[transforms[name]]
            _check_blocks(directory, transforms[name], inverse, weight.shape[1])
            if merged:
                undone = inverse.float()
                blocks = BlockTransform(torch.linalg.inv(undone), undone, transforms[name])
                weight = blocks.backward(weight.float()).to(weight.dtype)
        weights[f"{name}.weight"] = weight
    weights |= {name: stored.take(name) for name in stored.left()}
    return OnlineWeights(weights, {} if merged else {name: inverses[transforms[name]] for name in transforms})


def build_model(directory: Path, config: PreTrainedConfig, weights: dict[str, Tensor]) -> tuple[PreTrainedModel, Any]:
    """The model that holds just these tensors, without copies, and what transformers says of names and shapes."""
    config = copy.deepcopy(config)
    delattr(config, "quantization_config")
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    loaded: Any = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=config.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, info = loaded
    if (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, info


class InputTransform(nn.Module):
    """x ↦ T⁻¹ x, once for all layers that read the same x.

    The last result is kept until its input is freed or another comes. It is taken for the very same tensor only, in the
    same version, which everything that modifies a tensor raises, and never without a gradient where one is wanted.
    Threads may share a model: at worst one computes again what another has replaced. In inference mode tensors have no
    version and compilers see none, so there each layer computes its own: right before cheap.

    - `inverse`: (k, b, b), in the dtype of the inputs.
    - `readers`: how many layers share it.
    """

    inverse: Tensor

    def __init__(self, inverse: Tensor, readers: int) -> None:
        super().__init__()
        self.register_buffer("inverse", inverse)
        self.readers = readers
        self._last: _Last | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, n), of the dtype of x."""
        if self.readers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return self.apply_blocks(x)
        state = (x._version, x.requires_grad and torch.is_grad_enabled())
        last = self._last  # read once: another thread may replace it
        if last is not None and last.x() is x and last.state == state:
            return last.result
        result = self.apply_blocks(x)
        self._last = _Last(weakref.ref(x, self._forget), state, result)
        return result

    def apply_blocks(self, x: Tensor) -> Tensor:
        """T⁻¹ x computed anew."""
        blocks = x.reshape(-1, *self.inverse.shape[:2]).transpose(0, 1)  # (k, tokens, b)
        return torch.bmm(blocks, self.inverse.transpose(1, 2)).transpose(0, 1).reshape(x.shape)

    def extra_repr(self) -> str:
        """As torch shows it."""
        return f"blocks={self.inverse.shape[0]}, size={self.inverse.shape[1]}, readers={self.readers}"

    def _forget(self, x: "weakref.ref[Tensor]") -> None:
        last = self._last
        if last is not None and last.x is x:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold a weak reference."""
        return {**self.__dict__, "_last": None}


@dataclass(frozen=True)
class _Last:
    x: "weakref.ref[Tensor]"
    state: tuple[int, bool]
    result: Tensor


class TransformedLinear(nn.Module):
    """y = (W T)(T⁻¹ x) + b, in place of a linear layer, with its weight W T (out, n) and bias under the same names."""

    def __init__(self, linear: nn.Linear, input_transform: InputTransform) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.input_transform = input_transform

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) for x (…, n)."""
        return nn.functional.linear(self.input_transform(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """As torch shows it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def attach_transforms(model: PreTrainedModel, inverses: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> None:
    """Puts a `TransformedLinear` in place of each layer of `inverses`, and makes the model refuse to be saved.

    Its config gets `quantization`, by which pruning and quantizing see that it is no model to start from.
    """
    readers = Counter(id(inverse) for inverse in inverses.values())
    shared: dict[int, InputTransform] = {}
    for name, inverse in inverses.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{name} is a {type(linear).__name__}, which takes no online transformation")
        if id(inverse) not in shared:
            shared[id(inverse)] = InputTransform(inverse.to(linear.weight), readers[id(inverse)])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TransformedLinear(linear, shared[id(inverse)]))
    model.config.quantization_config = dict(quantization)
    vars(model)["save_pretrained"] = _refuse_to_save


def _refuse_to_save(*arguments: object, **options: object) -> NoReturn:
    """Instead of `save_pretrained`: a plain checkpoint has no place for transformations, and is wrong without them."""
    raise InputError(
        "a model with online transformations cannot be saved as a plain checkpoint; copy the directory that it was "
        "loaded from, or load it with merged=True, which gives ordinary weights"
    )


class _Stored:
    """The tensors of a directory by name, each of them read when it is taken, and its file closed again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, Path] = {}
        for file in shard_files(directory, ONLINE):
            with safe_open(file, framework="pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), file)

    def packed_layers(self) -> list[str]:
        return [name.removesuffix(".weight_packed") for name in self._file_of if name.endswith(".weight_packed")]

    def left(self) -> list[str]:
        """Names not taken so far."""
        return sorted(self._file_of)

    def take(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise InputError(f"{self._directory} lacks {name}: the checkpoint is incomplete, copy it again")
        return read_tensor(self._file_of.pop(name), name).clone()  # a tensor of its own, not a view of the file

    def take_layer(self, name: str, grid: Grid) -> Tensor:
        """The dequantized weight (out, in)."""
        parts = ("packed", "scale", "shape") if grid.symmetric else ("packed", "scale", "shape", "zero_point")
        tensors = {f"{name}.weight_{part}": self.take(f"{name}.weight_{part}") for part in parts}
        shape = tensors[f"{name}.weight_shape"]
        _check_shape(self._directory, f"{name}.weight_shape", shape, (2,))
        out, width = shape.tolist()
        for part, expected in _shapes(out, width, grid).items():
            if part in parts:
                _check_shape(self._directory, f"{name}.weight_{part}", tensors[f"{name}.weight_{part}"], expected)
        return unpack(name, tensors, grid).dequantize()


def _grid(packed: Mapping[str, Any], name: str) -> Grid:
    """That of a layer; `KeyError` when the config tells none."""
    for group in packed["config_groups"].values():
        if name in group["targets"] or "Linear" in group["targets"]:
            weights = group["weights"]
            return Grid(weights["num_bits"], weights["group_size"], weights["symmetric"])
    raise KeyError(name)


def _shapes(out: int, width: int, grid: Grid) -> dict[str, tuple[int, ...]]:
    """Of what stands for a weight (out, width)."""
    groups = math.ceil(width / (grid.group_size or width or 1))
    return {
        "packed": (out, math.ceil(width * grid.bits / 32)),
        "scale": (out, groups),
        "zero_point": (math.ceil(out * grid.bits / 32), groups),
    }


def _check_shape(directory: Path, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise InputError(
            f"{name} of {directory} is {tuple(tensor.shape)} instead of {expected}: the checkpoint is damaged, "
            "quantize the model again"
        )


def _check_blocks(directory: Path, name: str, inverse: Tensor, width: int) -> None:
    if inverse.dim() != 3 or inverse.shape[1] != inverse.shape[2] or math.prod(inverse.shape[:2]) != width:
        raise InputError(
            f"{name} of {directory} is {tuple(inverse.shape)}, which are no square blocks for {width} inputs: the "
            "checkpoint is damaged, quantize the model again"
        )
