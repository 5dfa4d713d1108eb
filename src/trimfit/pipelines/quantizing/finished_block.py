"""A block that is quantized: all that a later block, the checkpoint or another run needs of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from trimfit.models import Block
from trimfit.pipelines.quantizing.records import QuantizedRecord
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

    def levels(self) -> dict[str, Tensor]:
        """Of all layers, for a file; `read_levels` is the inverse."""
        parts = ("codes", "scale", "zero_point")
        return {f"{part}:{name}": getattr(one.quantized, part) for name, one in self.layers.items() for part in parts}

    def transforms(self) -> dict[str, BlockTransform]:
        """Online transformations, by the first of the layers that share them."""
        owners = {owner for owner, _ in self.record.transforms.values()}
        shared = {name: layer.transform for name, layer in self.layers.items() if name in owners}
        return {name: transform for name, transform in shared.items() if transform is not None}

    def state(self) -> dict[str, Tensor]:
        """All but the levels, for a file; `read` is the inverse."""
        found = {f"plain:{name}": tensor for name, tensor in self.plain.items()}
        for name, transform in self.transforms().items():
            found |= {f"{part}:{name}": getattr(transform, part) for part in ("matrices", "inverses")}
        return found if self.moment is None else {**found, "moment": self.moment}

    @classmethod
    def read(cls, name: str, state: Mapping[str, Tensor], levels: Mapping[str, Quantized], record: BlockRecord) -> Self:
        """The block of that name; `levels` are those of its layers, by name."""
        transforms = {
            owner: BlockTransform(state[f"matrices:{owner}"], state[f"inverses:{owner}"], kind)
            for owner, kind in record.transforms.values()
        }
        layers: dict[str, QuantizedWeight] = {}
        for layer in record.layers:
            owner, _ = record.transforms.get(layer.name, (None, None))
            layers[layer.name] = QuantizedWeight(levels[layer.name], transforms[owner] if owner else None)
        plain = {key.removeprefix("plain:"): tensor for key, tensor in state.items() if key.startswith("plain:")}
        return cls(name, record, layers, plain, state.get("moment"))


def read_levels(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """Those of one layer; `grid` is fitted to it."""
    return Quantized(tensors[f"codes:{name}"], tensors[f"scale:{name}"], tensors[f"zero_point:{name}"], grid)


def plain_state(block: Block) -> dict[str, Tensor]:
    """The tensors of a block's state dict that hold none of its layers' weights, by name in the model."""
    quantized = {layer.parameter for layer in block.layers}
    state = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in quantized}
