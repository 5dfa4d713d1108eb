"""Finds the folds of a block: what the family's wiring promises, as far as the block at hand keeps it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimfit.models.experts import ExpertLinear
from trimfit.models.folds import Folds, HiddenScale, InputScale, ValueOutput
from trimfit.models.structure import Layer
from trimfit.models.wiring import FAMILIES, Attention, Mlp, Norm, Wiring
from trimfit.quant.moments import Norm as MomentNorm


class Refused(Exception):
    """Says in one sentence why a fold, or any fold of a block, is not made."""


def find_folds(model: PreTrainedModel, block_name: str) -> Folds:
    """The folds of one decoder block, by its name in the model ("model.layers.0"); changes nothing.

    Nothing is folded in a model of an unknown family, nor where a block is not wired as its family's are: `refused`
    says why, with names within the block, so that a reason reads the same in every block. Q and K are never folded.
    Raises `AttributeError` when the model has no module of that name.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        finder = find_wiring(model, config.model_type, block_name)
    except Refused as reason:
        return Folds(refused=(f"no folds in this block: {reason}",))
    inputs: list[InputScale] = []
    hidden: list[HiddenScale] = []
    pairs: list[ValueOutput] = []
    refused = list(finder.wiring.refused)
    for norm in finder.wiring.norms:
        try:
            inputs.append(finder.input_scale(norm))
        except Refused as reason:
            refused.append(f"{norm.name} takes no scale: {reason}")
    mlp, attention = finder.wiring.mlp, finder.wiring.attention
    try:
        hidden.extend(finder.hidden_scales(mlp))
    except Refused as reason:
        refused.append(f"{mlp.up} and {mlp.down} share no scale: {reason}")
    heads = config.num_attention_heads
    try:
        pairs.append(finder.value_output(attention, heads, getattr(config, "num_key_value_heads", None) or heads))
    except Refused as reason:
        refused.append(f"{attention.value} and {attention.output} are no pair: {reason}")
    return Folds(tuple(inputs), tuple(hidden), tuple(pairs), tuple(refused))


def find_wiring(model: PreTrainedModel, family: str, block_name: str) -> "Finder":
    """The block with its family's wiring. Raises `Refused` where it is not known, or not what the block has."""
    if family not in FAMILIES:
        raise Refused(f"how models of type {family!r} are wired is not known")
    block = model.get_submodule(block_name)
    _check_code(block, family)
    _check_owned(model, block_name, block)
    entry = FAMILIES[family]
    try:
        wiring = entry if isinstance(entry, Wiring) else entry(block)
    except AttributeError as error:
        raise Refused(f"it is not wired as blocks of {family} are: {error}") from None
    finder = Finder(block_name, block, wiring)
    finder.check_complete()
    return finder


def _check_code(block: nn.Module, family: str) -> None:
    """The wiring was read in one file of transformers: whatever has weights must come from there, or from torch."""
    package = family.removesuffix("_text")
    source = f"transformers.models.{package}.modeling_{package}"
    for name, module in block.named_modules():
        if next(module.parameters(), None) is None:
            continue
        plain = type(module) in (nn.Linear, nn.LayerNorm, nn.ModuleList, Conv1D)
        if not plain and type(module).__module__ != source:
            raise Refused(f"{name or 'it'} is a {type(module).__qualname__}, which no block of {family} should be")


def _check_owned(model: PreTrainedModel, block_name: str, block: nn.Module) -> None:
    """Weights that are used elsewhere too would change the model there."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, parameter in block.named_parameters():
        others = [user for user in users[id(parameter)] if user != f"{block_name}.{name}"]
        if others:
            raise Refused(f"{name} shares its weights with {others[0]}")
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise Refused(f"{name} is quantized ({parameter.dtype})")
        if parameter.is_meta:
            raise Refused(f"{name} is not in memory")


@dataclass(frozen=True)
class Finder:
    """A block and its wiring."""

    name: str
    block: nn.Module
    wiring: Wiring

    def check_complete(self) -> None:
        """Every parameter must belong to something that the wiring knows."""
        wiring = self.wiring
        known = {wiring.attention.value, wiring.attention.output, wiring.mlp.up, wiring.mlp.down, *wiring.others}
        for norm in wiring.norms:
            known |= {norm.name, *norm.readers}
        for name, _ in self.block.named_parameters():
            if not any(name == place or name.startswith(f"{place}.") for place in known):
                raise Refused(f"what {name} is for is not known")

    def module(self, name: str) -> nn.Module:
        try:
            return self.block.get_submodule(name)
        except AttributeError:
            raise Refused(f"there is no {name}") from None

    def layers(self, name: str) -> tuple[Layer, ...]:
        """The layer of that name, or one for each expert."""
        holder, _, last = name.rpartition(".")
        parent = self.module(holder)
        found = getattr(parent, last, None)
        if isinstance(found, nn.Parameter) and found.dim() == 3:
            owner = f"{self.name}.{holder}"
            return tuple(Layer(f"{owner}.{i}.{last}", ExpertLinear(parent, last, i)) for i in range(len(found)))
        layer = self.module(name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise Refused(f"{name} has no matrix of weights")
        return (Layer(f"{self.name}.{name}", layer),)

    def layer(self, name: str) -> Layer:
        found = self.layers(name)
        if isinstance(found[0].module, ExpertLinear):
            raise Refused(f"{name} is no single layer")
        return found[0]

    def norm(self, name: str) -> MomentNorm:
        """What a norm does, for second moments."""
        module = self.module(name)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            raise Refused(f"{name} has no vector of weights")
        return MomentNorm(
            weight.detach().float() + self.wiring.offset,
            bias.detach() if isinstance(bias, nn.Parameter) else None,
            centred="LayerNorm" in type(module).__name__,
        )

    def input_scale(self, norm: Norm) -> InputScale:
        module = self.module(norm.name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise Refused("it has no weights")
        readers: list[Layer] = []
        for name in norm.readers:
            readers.extend(layers := self.layers(name))
            if weight.dim() != 1 or any(layer.weight.shape[1] != len(weight) for layer in layers):
                raise Refused(f"its weights {tuple(weight.shape)} do not fit {name}")
        return InputScale(f"{self.name}.{norm.name}", module, self.wiring.offset, tuple(readers))

    def hidden_scales(self, mlp: Mlp) -> list[HiddenScale]:
        if mlp.gate is None:
            activation = self.module(mlp.activation)
            if type(activation) is not nn.ReLU:
                raise Refused(f"{type(activation).__name__} stands between them, with no gate, and is not homogeneous")
        ups, downs = self.layers(mlp.up), self.layers(mlp.down)
        if len(ups) != len(downs):
            raise Refused(f"there are {len(ups)} of the one and {len(downs)} of the other")
        return [self._hidden_scale(mlp, up, down) for up, down in zip(ups, downs, strict=True)]

    def _hidden_scale(self, mlp: Mlp, up: Layer, down: Layer) -> HiddenScale:
        return HiddenScale(up, self.hidden_rows(mlp, up, down), down)

    def hidden_rows(self, mlp: Mlp, up: Layer, down: Layer) -> Tensor:
        """(ffn,) rows of `up` that make the hidden units, which a gate may multiply."""
        width, rows = down.weight.shape[1], len(up.weight)
        if rows != (2 * width if mlp.gate == "stacked" else width):
            raise Refused(f"the {rows} rows of the one do not fit the {width} columns of the other")
        if isinstance(up.module, ExpertLinear) and not up.module.experts.is_concatenated:
            raise Refused("rows of gate and up alternate")
        return torch.arange(rows - width, rows)

    def value_output(self, attention: Attention, heads: int, kv_heads: int) -> ValueOutput:
        """`heads`, `kv_heads`: what the config says, to be found in the widths again."""
        if attention.obstacle:
            raise Refused(attention.obstacle)
        value, output = self.layer(attention.value), self.layer(attention.output)
        module = self.module(attention.output.rpartition(".")[0])
        r = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        if not isinstance(r, int) or heads % kv_heads or output.weight.shape[1] != heads * r:
            raise Refused(f"{output.weight.shape[1]} columns of the latter are not {heads} heads of size {r}")
        if attention.layout == "by head":
            expected, value_rows = 3 * heads * r, torch.arange(3 * heads * r).view(heads, 3, r)[:, 2]
            kv_heads = heads
        else:
            before = 0 if attention.layout == "alone" else (heads + kv_heads) * r
            expected = before + kv_heads * r
            value_rows = torch.arange(before, expected).view(kv_heads, r)
        if len(value.weight) != expected:
            raise Refused(f"{len(value.weight)} rows of the former are not {kv_heads} heads of size {r}")
        return ValueOutput(value, value_rows, output, torch.arange(heads * r).view(kv_heads, heads // kv_heads, r))
