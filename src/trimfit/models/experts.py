"""Experts that share one parameter, (experts, out, in), as linear layers: each slice is one, seen like any other.

A forward pass multiplies by such a parameter as a whole, so no hook on a module ever sees what one expert receives.
While a context lasts, each expert is called on its own, and even one without tokens is: a hook that is not called is
a mistake then, and no sign that an expert is not used.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimfit.models.hooks import instead


class ExpertLinear(nn.Module):
    """One expert's linear map y = W x + b, out of parameters that hold those of all experts.

    No part of the model, and without parameters of its own. It is called with the expert's inputs (T, in) and the
    numbers (T,) of the tokens that they belong to.

    - `experts`: a module for which `are_experts` holds.
    - `parameter`: name of the parameter in it, with a slice for each expert.
    """

    def __init__(self, experts: nn.Module, parameter: str, expert: int):
        super().__init__()
        self.parameter, self.expert = parameter, expert
        self._owner = (experts,)  # in a tuple, or it would become a part of this module

    @property
    def experts(self) -> nn.Module:
        """The module that holds all of them."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """W of shape (out, in): a view of the model's own parameter."""
        weight = self.experts.get_parameter(self.parameter).detach()[self.expert]
        return weight.T if self.experts.is_transposed else weight  # GPT-OSS stores (in, out)

    @property
    def bias(self) -> Tensor | None:
        """b (out,): a view of the model's own parameter."""
        if not self.experts.has_bias:
            return None
        return self.experts.get_parameter(f"{self.parameter}_bias").detach()[self.expert]

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        """(T, out)."""
        return nn.functional.linear(inputs, self.weight, self.bias)


def are_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the form that transformers has for them, whatever the family."""
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    return known and all(getattr(module, name, torch.empty(0)).dim() == 3 for name in _parameters(module))


def expert_linears(experts: nn.Module) -> Iterable[tuple[str, ExpertLinear]]:
    """All layers of a module for which `are_experts` holds, by name within it ("3.down_proj"), as they are called."""
    for parameter in _parameters(experts):
        for expert in range(len(experts.get_parameter(parameter))):
            yield f"{expert}.{parameter}", ExpertLinear(experts, parameter, expert)


@contextmanager
def each_called(linears: Iterable[ExpertLinear]) -> Generator[None]:
    """Forward passes of the modules that hold `linears` call all of their experts, one by one; these by these objects.

    First all experts' first layers are called, in order, and then all second ones.
    """
    by_owner: dict[nn.Module, dict[tuple[str, int], ExpertLinear]] = {}
    for linear in linears:
        by_owner.setdefault(linear.experts, {})[linear.parameter, linear.expert] = linear
    pairs = [(experts, partial(_forward, experts, given)) for experts, given in by_owner.items()]
    with instead(pairs):
        yield


@contextmanager
def first_called(linears: Iterable[ExpertLinear]) -> Generator[None]:
    """Forward passes of the modules that hold `linears` call the first expert alone, with the inputs of all of them.

    What is computed is as much as it should be, and needs no values: it tells what a pass costs.
    """
    by_owner: dict[nn.Module, dict[str, ExpertLinear]] = {}
    for linear in linears:
        by_owner.setdefault(linear.experts, {}).setdefault(linear.parameter, linear)
    with instead([(experts, partial(_forward_first, experts, given)) for experts, given in by_owner.items()]):
        yield


def matched(inputs: Tensor, tokens: Tensor, others: Tensor, other_tokens: Tensor) -> Tensor:
    """(T, n) what an expert receives of the same tokens elsewhere; its own `inputs` (T, n) for tokens it does not get.

    `tokens` (T,) belong to `inputs`, `other_tokens` (S,) to `others` (S, n). A token comes no more than once.
    """
    same, place = (tokens[:, None] == other_tokens).nonzero(as_tuple=True)
    return inputs.index_copy(0, same, others[place])


def _parameters(experts: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _forward(
    experts: nn.Module,
    given: dict[tuple[str, int], ExpertLinear],
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What transformers' own forward passes of experts do, sums included, but for the calls."""
    first, second = (
        [given.get((name, i)) or ExpertLinear(experts, name, i) for i in range(len(experts.get_parameter(name)))]
        for name in _parameters(experts)
    )
    slots = top_k_index.flatten()
    counts = slots.bincount(minlength=len(first))[: len(first)]  # those behind belong to another machine
    order = slots.sort(stable=True).indices[: int(counts.sum())]
    tokens = (order // top_k_index.shape[1]).split(counts.tolist())
    gate = _gate(experts)
    units = [gate(linear(hidden[which], which)) for linear, which in zip(first, tokens, strict=True)]
    outputs = [linear(unit, which) for linear, unit, which in zip(second, units, tokens, strict=True)]
    by_slot = hidden.new_zeros(len(slots), outputs[0].shape[1]).index_copy(0, order, torch.cat(outputs))
    weighted = by_slot * top_k_weights.reshape(-1, 1)
    return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden.dtype)


def _forward_first(
    experts: nn.Module,
    given: dict[str, ExpertLinear],
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The shapes and the work of `_forward`, for all tokens by the first expert."""
    first, second = (given.get(name) or ExpertLinear(experts, name, 0) for name in _parameters(experts))
    slots = hidden.repeat_interleave(top_k_index.shape[1], 0)
    outputs = second(_gate(experts)(first(slots, slots)), slots)
    return outputs.view(*top_k_index.shape, -1).sum(1)


def _gate(experts: nn.Module) -> Any:
    """What is between an expert's two layers."""
    return cast(Any, experts)._apply_gate if experts.has_gate else cast(Any, experts).act_fn
