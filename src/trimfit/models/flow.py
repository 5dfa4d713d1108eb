"""How the layers of a block hand their outputs on to each other, for what can be told of a model without running it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.models.find_folds import Finder, Refused, find_wiring
from trimfit.models.folds import ValueOutput
from trimfit.models.structure import Layer
from trimfit.quant.moments import Norm


@dataclass(frozen=True, eq=False)
class Hidden:
    """The hidden units of an MLP: rows of `up`, times the activated rows of `gate` or themselves activated."""

    up: Layer
    up_rows: Tensor
    gate: Layer | None
    gate_rows: Tensor
    activation: Callable[[Tensor], Tensor]
    down: Layer


@dataclass(frozen=True, eq=False)
class Flow:
    """One decoder block, from norm to norm.

    - `attention_norm`, `mlp_norm`: what stands before the two, or None where they read the residual stream.
    - `after_attention`, `after_mlp`: norms that their outputs pass, or None.
    - `parallel`: whether the MLP reads the hidden states that enter the block, without what attention adds to them.
    - `residual_scale`: what the outputs of both are multiplied by before they are added to the hidden states.
    """

    attention: ValueOutput
    hidden: Hidden
    attention_norm: Norm | None
    mlp_norm: Norm | None
    after_attention: Norm | None
    after_mlp: Norm | None
    parallel: bool
    residual_scale: float


def find_flow(model: PreTrainedModel, block_name: str) -> Flow | None:
    """The flow of a block, or None where the family is not known or the block is not wired as it should be."""
    config = model.config.get_text_config(decoder=True)
    try:
        finder = find_wiring(model, config.model_type, block_name)
        wiring = finder.wiring
        heads = config.num_attention_heads
        attention = finder.value_output(wiring.attention, heads, getattr(config, "num_key_value_heads", None) or heads)
        before = {name: finder.norm(norm.name) for norm in wiring.norms for name in norm.readers}
        after = [None, None] if wiring.after is None else [finder.norm(name) for name in wiring.after]
        return Flow(
            attention=attention,
            hidden=_hidden(finder),
            attention_norm=before.get(wiring.attention.value),
            mlp_norm=before.get(wiring.mlp.up),
            after_attention=after[0],
            after_mlp=after[1],
            parallel=_is_parallel(finder),
            residual_scale=getattr(finder.block, "residual_multiplier", 1.0),  # of Granite
        )
    except Refused:
        return None


def embedding_scale(model: PreTrainedModel) -> float:
    """What a model multiplies rows of its embedding by, before its first block: √n in Gemma, a number in Granite."""
    config = model.config.get_text_config(decoder=True)
    own = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    return own * getattr(config, "embedding_multiplier", 1.0)


def _is_parallel(finder: Finder) -> bool:
    wiring = finder.wiring
    shared = any({wiring.attention.value, wiring.mlp.up} <= set(norm.readers) for norm in wiring.norms)
    return shared or bool(getattr(finder.block, "use_parallel_residual", False))  # GPT-NeoX has a norm for each


def _hidden(finder: Finder) -> Hidden:
    mlp = finder.wiring.mlp
    up, down = finder.layer(mlp.up), finder.layer(mlp.down)
    width, rows = down.weight.shape[1], len(up.weight)
    activation = finder.module(mlp.activation)
    stacked = mlp.gate == "stacked"
    if rows != (2 * width if stacked else width):
        raise Refused(f"the {rows} rows of {mlp.up} do not fit the {width} columns of {mlp.down}")
    gate = up if stacked else finder.layer(mlp.gate_layer) if mlp.gate == "apart" else None
    return Hidden(up, torch.arange(rows - width, rows), gate, torch.arange(width), activation, down)


def rows_of(layer: Layer, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Some rows of a layer's weight (rows, in), and of its bias if it has one."""
    bias = getattr(layer.module, "bias", None)
    return layer.weight[rows], bias.detach()[rows] if isinstance(bias, nn.Parameter) else None
