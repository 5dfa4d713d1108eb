"""Finds decoder blocks and their linear layers in any Hugging Face causal LM, by structure and not by family."""

import copy
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimfit.errors import InputError
from trimfit.models.experts import ExpertLinear, are_experts, expert_linears


@dataclass(frozen=True)
class Layer:
    """One linear map y = W x + b, wherever W is kept: by a module, or as one expert's slice of a parameter.

    `module` is what is called with the layer's inputs; for an expert that is no part of the model.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W of shape (out, in): a view of the model's own parameter."""
        if isinstance(self.module, ExpertLinear):
            return self.module.weight
        parameter = self.module.get_parameter("weight").detach()
        return parameter.T if isinstance(self.module, Conv1D) else parameter  # GPT-2 stores (in, out)

    @property
    def parameter(self) -> str:
        """Name in the model of the parameter that holds W, and for an expert those of its siblings too."""
        if isinstance(self.module, ExpertLinear):
            return f"{self.name.rsplit('.', 2)[0]}.{self.module.parameter}"
        return f"{self.name}.weight"

    @property
    def parameters(self) -> tuple[str, ...]:
        """`parameter`, and that of b where there is one."""
        if self.bias is None:
            return (self.parameter,)
        experts = isinstance(self.module, ExpertLinear)
        return self.parameter, f"{self.parameter}_bias" if experts else f"{self.name}.bias"

    @property
    def bias(self) -> Tensor | None:
        """b of shape (out,), if there is any: a view of the model's own parameter."""
        if isinstance(self.module, ExpertLinear):
            return self.module.bias
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, nn.Parameter) else None

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Stores W (out, in) in the model, rounded to the model's dtype."""
        self.weight.copy_(weight)


@dataclass(frozen=True)
class Block:
    """One decoder block and its linear layers, in the order in which modules are registered."""

    index: int
    name: str
    module: nn.Module
    layers: tuple[Layer, ...]

    def copy(self) -> "Block":
        """A block with the same weights, of its own."""
        module = copy.deepcopy(self.module)
        found = {layer.name: layer for layer in _layers(self.name, module)}
        return replace(self, module=module, layers=tuple(found[layer.name] for layer in self.layers))


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks: the outermost list of modules that hold linear layers, one for each hidden layer.

    What feeds a choice of experts is none of their layers: routers stay as they are. Raises `InputError` for a model
    that is no decoder-only LM or has no such list, with experts in a form that is not known, with layers that share
    their weights, or with weights that are already quantized.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} is not a decoder-only language model (AutoModelForCausalLM)")
    if getattr(model.config, "quantization_config", None):
        raise InputError(f"{type(model).__name__} is already quantized; start from the full model")
    name, stack = _find_stack(model)
    blocks = [_block(index, f"{name}.{index}", module) for index, module in enumerate(stack)]
    owners: dict[int, Layer] = {}
    for layer in (layer for block in blocks for layer in block.layers):
        owner = owners.setdefault(id(model.get_parameter(layer.parameter)), layer)
        if owner.parameter != layer.parameter:
            raise InputError(f"{layer.name} shares its weights with {owner.name}, which this version cannot compress")
    return blocks


def _find_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(child) for child in module.modules())
    ]
    outermost = [c for c in candidates if not any(c[0].startswith(f"{other}.") for other, _ in candidates)]
    exact = [c for c in outermost if len(c[1]) == expected]
    if not exact:
        raise InputError(
            f"no decoder blocks were found in {type(model).__name__}: expected a list of {expected} modules with "
            "linear layers inside; trimfit works on decoder-only language models"
        )
    return max(exact, key=_size)


def _size(candidate: tuple[str, nn.ModuleList]) -> int:
    return sum(parameter.numel() for parameter in candidate[1].parameters())


def _block(index: int, name: str, module: nn.Module) -> Block:
    layers = _layers(name, module)
    for layer in layers:
        if layer.weight.dtype.itemsize < 2 or not layer.weight.is_floating_point():
            raise InputError(f"{layer.name} is already quantized ({layer.weight.dtype}); start from the full model")
    _check_complete(name, module, max((layer.weight.numel() for layer in layers), default=0))
    return Block(index, name, module, layers)


def _layers(name: str, module: nn.Module) -> tuple[Layer, ...]:
    routers = {id(router) for parent in module.modules() for router in _routers(parent)}
    layers: list[Layer] = []
    for inner_name, inner in module.named_modules(prefix=name):
        if _is_linear(inner) and id(inner) not in routers:
            layers.append(Layer(inner_name, inner))
        elif are_experts(inner):
            layers.extend(Layer(f"{inner_name}.{last}", linear) for last, linear in expert_linears(inner))
    return tuple(layers)


def _routers(module: nn.Module) -> list[nn.Module]:
    """The linear layers beside experts that choose among them, or weigh one that all tokens share.

    By their number of outputs: one for each expert, or a single one, and nothing else in the part of the module that
    they are in. Most families have no linear layer for it, but a parameter in a module of its own.
    """
    outputs = {len(child.get_parameter("down_proj")) for child in module.children() if are_experts(child)}
    if not outputs:
        return []
    parts = [[inner for inner in child.modules() if isinstance(inner, nn.Linear)] for child in module.children()]
    return [router for part in parts if {inner.out_features for inner in part} <= {1, *outputs} for router in part]


def _check_complete(name: str, module: nn.Module, largest: int) -> None:
    """Weights that are in no layer that is known: pruning the rest of the block would be half the work."""
    for inner_name, inner in module.named_modules(prefix=name):
        if _is_linear(inner) or are_experts(inner) or isinstance(inner, nn.Conv1d):
            continue
        several = isinstance(inner, nn.ModuleList) and any(_is_linear(child) for child in inner.modules())
        own = inner.parameters(recurse=False)
        if several or any(p.dim() > 2 or (p.dim() == 2 and p.numel() > largest) for p in own):
            what = (
                "a mixture of experts"
                if several or "expert" in f"{inner_name} {type(inner).__name__}".lower()
                else "weights that are not in linear layers"
            )
            raise InputError(f"{inner_name} holds {what}, which this version cannot compress; nothing was changed")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the hidden states between blocks; that of the embedding for a config that does not tell."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "hidden_size", None) or model.get_input_embeddings().get_parameter("weight").shape[1]


def select_layers(
    model: PreTrainedModel, blocks: Sequence[Block], ignore: Iterable[str], option: str = "ignore"
) -> list[Block]:
    """The blocks, each with only those of its layers that no pattern of `ignore` matches.

    A pattern is a glob on the layer's name or on its end ("*.q_proj", "q_proj", "model.layers.0.*"), or a regular
    expression after "re:", searched in the name. Raises `InputError` for a pattern that matches no linear layer, with
    the name of the `option` that it was given to.
    """
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    named = {*linear, *(layer.name for block in find_blocks(model) for layer in block.layers)}  # experts, too
    ignored: set[str] = set()
    for pattern in ignore:
        matched = {name for name in named if _matches(name, pattern, option)}
        if not matched:
            raise InputError(
                f"the {option} pattern {pattern!r} matches no linear layer; names look like {linear[0]!r} "
                f"and {linear[-1]!r}"
            )
        ignored |= matched
    chosen = [
        replace(block, layers=tuple(layer for layer in block.layers if layer.name not in ignored)) for block in blocks
    ]
    if not any(block.layers for block in chosen):
        raise InputError(f"the {option} patterns leave no layer to compress")
    return chosen


def _matches(name: str, pattern: str, option: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"the {option} pattern {pattern!r} is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
