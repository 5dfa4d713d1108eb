"""Finds, by running a block, which of its layers share an input, and which add to the residual stream."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimfit.errors import InputError
from trimfit.models.experts import ExpertLinear
from trimfit.models.hooks import after, before
from trimfit.models.structure import Block, Layer

AT_ONCE = 2**28  # entries of Gram matrices: 2 GiB of sums, and once more with the drift
_CLOSE = 0.03  # relative: differences of sums in bfloat16 come within 0.01, and what is no plain sum is far off


@dataclass(frozen=True)
class Group:
    """Layers of a block that receive the same input, and therefore share a Gram matrix.

    - `calls`: of the first layer in one forward pass. Of experts too it is the same for any input: they are called
      with no token rather than not at all.
    - `adds_to`: where the residual stream can be seen to which the only layer of the group adds its output as it is:
      "input", it is the block's input; "output", it is what the block gives, less the layer's output. None for layers
      whose output goes elsewhere, or through a norm first.
    """

    layers: tuple[Layer, ...]
    calls: int
    adds_to: Literal["input", "output"] | None = None

    @property
    def is_expert(self) -> bool:
        """Whether it is a layer of an expert, which sees only the tokens that are routed to it."""
        return isinstance(self.layers[0].module, ExpertLinear)


def find_groups(block: Block, run: Callable[[Tensor], Tensor], hidden: Tensor) -> list[Group]:
    """The groups in the order in which a forward pass reaches them.

    `run` takes hidden states through the block, `hidden` is an example. Raises `InputError` for a layer that receives
    no input.
    """
    groups = _shared_inputs(block, lambda: run(hidden))
    return [
        Group(group.layers, group.calls, _adds_to(group, groups[i + 1 :], run, hidden))
        for i, group in enumerate(groups)
    ]


def together(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups in their order, in runs of which none changes the inputs of another: experts side by side.

    A run is so short that its Gram matrices fit into a few GiB.
    """
    return _runs(groups, lambda first, group: _beside(first) is not None and _beside(first) == _beside(group))


def at_once(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups in their order, in runs so short that their Gram matrices fit into a few GiB; for a model at rest."""
    return _runs(groups, lambda first, group: True)


def _runs(groups: Sequence[Group], belong: Callable[[Group, Group], bool]) -> Iterator[list[Group]]:
    run: list[Group] = []
    for group in groups:
        if run and not (belong(run[0], group) and _entries([*run, group]) <= AT_ONCE):
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _beside(group: Group) -> str | None:
    """The parameter that holds the weights of the group's experts."""
    return group.layers[0].parameter if group.is_expert else None


def _entries(groups: Sequence[Group]) -> int:
    return sum(group.layers[0].weight.shape[1] ** 2 for group in groups)


def _shared_inputs(block: Block, forward: Callable[[], Tensor]) -> list[Group]:
    seen: list[tuple[Tensor, list[Layer]]] = []
    calls = dict.fromkeys((layer.name for layer in block.layers), 0)

    def record(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            calls[layer.name] += 1
            if calls[layer.name] > 1:
                return
            same = next((layers for x, layers in seen if _same_tensor(x, arguments[0])), None)
            if same is None:
                seen.append((arguments[0], [layer]))
            else:
                same.append(layer)

        return hook

    with before([(layer.module, record(layer)) for layer in block.layers]):
        forward()
    missed = [name for name, count in calls.items() if count == 0]
    if missed:
        raise InputError(f"{missed[0]} receives no input in a forward pass, so there is nothing to calibrate it on")
    return [Group(tuple(layers), calls[layers[0].name]) for _, layers in seen]


def _adds_to(
    group: Group, later: Sequence[Group], run: Callable[[Tensor], Tensor], hidden: Tensor
) -> Literal["input", "output"] | None:
    """Puts other outputs in place of the layer's and looks where they come out."""
    (layer, *others), width = group.layers, hidden.shape[-1]
    if others or group.calls != 1 or layer.weight.shape[0] != width or isinstance(layer.module, ExpertLinear):
        return None  # an expert's output is one of several that are weighed and summed
    other = hidden.roll(1, dims=-1)  # anything of the size of the hidden states

    def given(output: Tensor, silent: Sequence[Layer]) -> Tensor:
        def put(module: nn.Module, arguments: Any, own: Tensor) -> Tensor:
            return output.clone().view_as(own)  # some models go on in place

        def zero(module: nn.Module, arguments: Any, own: Tensor) -> Tensor:
            return torch.zeros_like(own)

        with after([(layer.module, put), *((quiet.module, zero) for quiet in silent)]):
            return run(hidden)

    if later and _close(given(other, [layer for group in later for layer in group.layers]), hidden + other):
        return "input"
    if not later and _close(given(other, []) - given(torch.zeros_like(other), []), other):
        return "output"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).float().norm() <= _CLOSE * b.float().norm())


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return same and a.numel() > 0  # tensors without entries are all at the same place
