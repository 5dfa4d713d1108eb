"""A block that is quantized: all that a later block, the checkpoint or another run needs of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from trimfit.models import Block
from trimfit.pipelines.quantize_records import QuantizedRecord
from trimfit.quant import Grid, Quantized
from trimfit.quant.blocks import BlockTransform


@dataclass
class QuantizedWeight:
    """A layer's weight: `quantized` is W T, where there is an online transformation T, else W."""

    quantized: Quantized
    transform: BlockTransform | None

    @property
    def weight(self) -> Tensor:
        """(out, in) what the layer multiplies its inputs by, transformation included."""
        weight = self.quantized.dequantize()
        return weight if self.transform is None else self.transform.backward(weight.float())


class BlockRecord(BaseModel):
    """What is told of a finished block.

    - `left_out`: why transformations were, a sentence each.
    - `transforms`: of each layer with an online transformation, the first layer that shares it, and its name.
    - `multiply_adds`: of online transformations, for one token.
    """

    model_config = ConfigDict(frozen=True)

    layers: list[QuantizedRecord]
    left_out: list[str]
    transforms: dict[str, tuple[str, str]]
    multiply_adds: int


@dataclass(frozen=True)
class FinishedBlock:
    """A quantized block.

    - `layers`: by name.
    - `plain`: all tensors of the block that hold no quantized weight, by name in the model: folds changed some of them.
    - `moment`: (n, n) of the hidden states behind the block, as its weights tell it; None with calibration.
    """

    name: str
    record: BlockRecord
    layers: Mapping[str, QuantizedWeight]
    plain: Mapping[str, Tensor]
    moment: Tensor | None

    def write(self, block: Block) -> None:
        """Stores all of it in the model."""
        for layer in block.layers:
            layer.write(self.layers[layer.name].weight)
        for name, tensor in plain_state(block).items():
            tensor.copy_(self.plain[name])

    def tensors(self) -> dict[str, Tensor]:
        """For a file; `read` is the inverse."""
        found = {f"plain:{name}": tensor for name, tensor in self.plain.items()}
        for name, layer in self.layers.items():
            found |= {f"{part}:{name}": getattr(layer.quantized, part) for part in ("codes", "scale", "zero_point")}
            if layer.transform is not None and self.record.transforms[name][0] == name:
                found |= {f"{part}:{name}": getattr(layer.transform, part) for part in ("matrices", "inverses")}
        return found if self.moment is None else {**found, "moment": self.moment}

    @classmethod
    def read(
        cls, name: str, tensors: Mapping[str, Tensor], record: BlockRecord, grid: Grid, device: torch.device
    ) -> Self:
        """The block of that name on `device`. `grid` is the one asked for."""
        found = {key: tensor.to(device) for key, tensor in tensors.items()}
        transforms = {
            owner: BlockTransform(found[f"matrices:{owner}"], found[f"inverses:{owner}"], kind)
            for owner, kind in record.transforms.values()
        }
        layers: dict[str, QuantizedWeight] = {}
        for layer in record.layers:
            codes, scale, zero = (found[f"{part}:{layer.name}"] for part in ("codes", "scale", "zero_point"))
            owner, _ = record.transforms.get(layer.name, (None, None))
            quantized = Quantized(codes, scale, zero, grid.fitted(codes.shape[1]))
            layers[layer.name] = QuantizedWeight(quantized, transforms[owner] if owner else None)
        plain = {key.removeprefix("plain:"): tensor for key, tensor in found.items() if key.startswith("plain:")}
        return cls(name, record, layers, plain, found.get("moment"))


def plain_state(block: Block) -> dict[str, Tensor]:
    """The tensors of a block's state dict that hold none of its layers' weights, by name in the model."""
    quantized = {layer.parameter for layer in block.layers}
    state = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in quantized}
