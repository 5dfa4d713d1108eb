"""What groups of layers see in one forward pass through their block, and the second moments of that."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trimfit.calibration import MomentSum
from trimfit.models.experts import ExpertLinear, matched
from trimfit.models.groups import Group
from trimfit.models.hooks import Stop, after, before
from trimfit.models.structure import Block
from trimfit.timing import stage


@dataclass
class Seen:
    """Of one group: its inputs, call by call, and the residual stream once it has added to it.

    - `tokens`: of an expert, the numbers of the tokens that it was given.
    """

    inputs: list[Tensor] = field(default_factory=list[Tensor])
    tokens: list[Tensor] = field(default_factory=list[Tensor])
    stream: Tensor | None = None


def see(
    block: Block,
    groups: Sequence[Group],
    run: Callable[[Block, Tensor], Tensor],
    batch: Tensor,
    *,
    stream: bool,
    whole: bool,
) -> tuple[list[Seen], Tensor | None]:
    """What each group sees; and what the block gives, if the pass goes through the `whole` of it.

    - `block`: that of the groups, or a copy of it; `run` takes hidden states (B, L, d) such as `batch` through it.
    - `stream`: also the residual stream, for groups that add to it; for some of them the pass must be whole.
    """
    seen = [Seen() for _ in groups]
    states: Tensor | None = None
    remaining = sum(group.calls for group in groups)

    def receive(one: Seen, awaited: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal remaining
            one.inputs.append(arguments[0].clone())  # some models go on in place
            if isinstance(module, ExpertLinear):
                one.tokens.append(arguments[1])
            remaining -= 1
            if remaining == 0 and not awaited and not whole:
                raise Stop

        return hook

    def give(one: Seen) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            one.stream = batch.float() + output.view_as(batch).float()
            if remaining == 0 and not whole:
                raise Stop

        return hook

    modules = {layer.name: layer.module for layer in block.layers}
    firsts = [modules[group.layers[0].name] for group in groups]
    awaited = [stream and group.adds_to == "input" for group in groups]
    with (
        before([(first, receive(one, waits)) for first, one, waits in zip(firsts, seen, awaited, strict=True)]),
        after([(first, give(one)) for first, one, waits in zip(firsts, seen, awaited, strict=True) if waits]),
        suppress(Stop),
    ):
        states = run(block, batch)
    for group, one in zip(groups, seen, strict=True):
        if stream and group.adds_to == "output":
            one.stream = states
    return seen, states


def add(sums: Sequence[MomentSum], seen: Sequence[Seen]) -> None:
    """Adds to the second moments of each group what it saw."""
    with stage("gram"):
        for total, one in zip(sums, seen, strict=True):
            for inputs in one.inputs:
                total.add(inputs)


def add_drifted(sums: Sequence[MomentSum], seen: Sequence[Seen], dense: Sequence[Seen]) -> None:
    """The same with the drift, from what each group saw of the same windows in the dense model."""
    with stage("gram"):
        for total, one, other in zip(sums, seen, dense, strict=True):
            if one.stream is not None:
                total.add(one.inputs[0], one.stream, other.stream)
                continue
            for inputs, dense_inputs in zip(one.inputs, _beside(one, other), strict=True):
                total.add(inputs, inputs, dense_inputs)


def _beside(one: Seen, dense: Seen) -> list[Tensor]:
    """The inputs in the dense model, of the same tokens: where it routes one elsewhere, it counts as not drifted."""
    if not one.tokens:
        return dense.inputs
    calls = zip(one.inputs, one.tokens, dense.inputs, dense.tokens, strict=True)
    return [matched(*call) for call in calls]
