"""Inputs of a layer whose order is free: what makes them can be put in the same order, and the model stays as it is.

Hidden units of an MLP are such inputs, and so are the dimensions of the values within a KV head. Reordering is exact:
weights and biases move, none of them changes, and nothing is left to do at inference.
"""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models.find_folds import Finder, Refused, find_wiring
from trimfit.models.structure import Block, Layer
from trimfit.models.wiring import Mlp


@dataclass(frozen=True, eq=False)
class FreeOrder:
    """Sets of r inputs of a layer, each of which can be put in any order.

    - `reader`: the layer (out, n) whose inputs they are.
    - `columns`: (sets, copies, r) int64, the inputs; copies, such as query heads with one KV head, keep the same order.
    - `makers`: layers with their rows (sets, r) int64 that make these inputs, one weight and bias for each.
    """

    reader: Layer
    columns: Tensor
    makers: tuple[tuple[Layer, Tensor], ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All that a new order changes."""
        return self.reader, *dict.fromkeys(maker for maker, _ in self.makers)

    def scores(self, scores: Tensor) -> Tensor:
        """Scores (out, n) of the reader's weights, set by set: (sets, out · copies, r)."""
        chosen = scores[:, self.columns.to(scores.device)]
        return chosen.permute(1, 0, 2, 3).flatten(1, 2)

    @torch.no_grad()
    def apply(self, order: Tensor) -> Tensor:
        """Puts each set into its `order` (sets, r) int64, in reader and makers; returns the permutation (n,) of inputs.

        Input i of the reader is now the former input `permutation[i]`.
        """
        order = order.cpu()
        for maker, rows in self.makers:
            source = rows.gather(1, order)
            weight = maker.weight.clone()
            weight[rows] = maker.weight[source]
            maker.write(weight)
            if maker.bias is not None:
                maker.bias[rows] = maker.bias[source]
        permutation = torch.arange(self.reader.weight.shape[1])
        permutation[self.columns] = self.columns.gather(2, order[:, None, :].expand_as(self.columns))
        self.reader.write(self.reader.weight[:, permutation])
        return permutation


def find_free_orders(model: PreTrainedModel, block: Block) -> dict[str, FreeOrder]:
    """The free orders of a block by the names of their readers; none that would touch a layer not in `block.layers`.

    Like folds, they are known for the families of `wiring.FAMILIES` alone.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    found: list[FreeOrder] = []
    with suppress(Refused):
        finder = find_wiring(model, config.model_type, block.name)
        with suppress(Refused):
            found.append(_values(finder, heads, kv_heads))
        with suppress(Refused):
            found.extend(_hidden_units(finder))
    present = {layer.name for layer in block.layers}
    return {order.reader.name: order for order in found if {layer.name for layer in order.layers} <= present}


def _values(finder: Finder, heads: int, kv_heads: int) -> FreeOrder:
    pair = finder.value_output(finder.wiring.attention, heads, kv_heads)
    return FreeOrder(pair.output_layer, pair.output_columns, ((pair.value_layer, pair.value_rows),))


def _hidden_units(finder: Finder) -> list[FreeOrder]:
    """Those of the MLP, or of each of its experts."""
    mlp = finder.wiring.mlp
    ups, downs = finder.layers(mlp.up), finder.layers(mlp.down)
    return [_units(finder, mlp, up, down) for up, down in zip(ups, downs, strict=True)]


def _units(finder: Finder, mlp: Mlp, up: Layer, down: Layer) -> FreeOrder:
    units = torch.arange(down.weight.shape[1])[None]
    up_rows = finder.hidden_rows(mlp, up, down)[None]
    makers = [(up, up_rows)]
    if mlp.gate == "apart":
        gate = finder.layer(mlp.gate_layer)
        if len(gate.weight) != units.numel():
            raise Refused(f"the {len(gate.weight)} rows of {mlp.gate_layer} do not fit {mlp.down}")
        makers.append((gate, units))
    elif mlp.gate == "stacked":
        makers.append((up, units))  # the first half of the rows
    return FreeOrder(down, units[None], tuple(makers))
