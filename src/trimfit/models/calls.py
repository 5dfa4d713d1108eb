"""A causal LM as three parts: what comes before its decoder blocks, the blocks in a row, what comes behind them.

How each block is called is learned by looking: no argument of any family is known by name, but for the hidden states.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models.hooks import Stop, after, before, instead
from trimfit.models.placement import Loaded, resident
from trimfit.models.structure import Block


@dataclass(frozen=True)
class Call:
    """How a block is called and what it gives, but for the hidden states.

    - `beside`: what it gives behind the hidden states, and in what; None when it gives these alone.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    beside: tuple[Any, ...] | list[Any] | None = None

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What the block makes of hidden states."""
        if "hidden_states" in self.keywords:
            output = module(*self.arguments, **{**self.keywords, "hidden_states": hidden})
        else:
            output = module(hidden, *self.arguments, **self.keywords)
        return _states(output)

    def give(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the block gives them."""
        match self.beside:
            case None:
                return hidden
            case tuple():
                return (hidden, *self.beside)
            case list():
                return [hidden, *self.beside]


class Chain:
    """A model around its decoder blocks. Raises `InputError` where they do not form a chain.

    `loaded` puts the weights of a block in place for as long as it runs.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], loaded: Loaded = resident):
        self._model, self._blocks, self._loaded = model, blocks, loaded

    def trace(self, batch: Tensor) -> tuple[list[Call], Tensor]:
        """How each block is called in a plain forward pass of the whole model, and what the last block gives."""
        calls: list[Call] = []
        outputs: list[Tensor] = []

        def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            calls.append(self._call(arguments, keywords)[1])

        def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs[:] = [_states(output)]
            beside = type(output)(output[1:]) if isinstance(output, tuple | list) else None
            calls[-1] = Call(calls[-1].arguments, calls[-1].keywords, beside)
            if module is self._blocks[-1].module:
                raise Stop

        modules = [block.module for block in self._blocks]
        with (
            self.loading(),
            before([(module, enter) for module in modules], with_kwargs=True),
            after([(module, leave) for module in modules]),
            suppress(Stop),
        ):
            self._forward(batch)
        # Gemma 3n has streams before the batch; others call their blocks in another order, several times or not at all.
        if len(calls) != len(self._blocks) or not outputs or outputs[0].shape[:2] != batch.shape:
            raise self.unsuitable()
        return calls, outputs[0]

    def record(self, batch: Tensor, like: Sequence[Call]) -> list[Call]:
        """How each block is called for another batch. The blocks do not run; what they give has the form of `like`."""
        calls: list[Call] = []

        def stub(expected: Call) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                hidden, call = self._call(arguments, keywords)
                calls.append(Call(call.arguments, call.keywords, expected.beside))
                if expected is like[-1]:
                    raise Stop
                return expected.give(hidden)

            return forward

        with self._without_blocks([stub(expected) for expected in like]), suppress(Stop):
            self._forward(batch)
        return calls

    def first_input(self, batch: Tensor) -> Tensor:
        """The hidden states (B, L, d) before the first block."""
        caught: list[Tensor] = []

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(keywords["hidden_states"] if "hidden_states" in keywords else arguments[0])
            raise Stop

        with before([(self._blocks[0].module, hook)], with_kwargs=True), suppress(Stop):
            self._forward(batch)
        return caught[0]

    def predict(self, batch: Tensor, hidden: Tensor, calls: Sequence[Call], positions: Tensor) -> Tensor:
        """The logits (B, P, V) at P positions for hidden states behind the last block.

        `batch` and `calls` are of the shape of the hidden states.
        """

        def stub(call: Call) -> Callable[..., Any]:
            return lambda *arguments, **keywords: call.give(hidden)

        with self._without_blocks([stub(call) for call in calls]):
            return logits_at(self._model, batch.to(self._model.device, torch.int64), positions)

    @contextmanager
    def loading(self) -> Generator[None]:
        """Each block finds its weights whenever the whole model runs."""
        with ExitStack() as hooks, ExitStack() as weights:

            def enter(block: Block) -> Callable[..., None]:
                def hook(module: nn.Module, arguments: Any) -> None:
                    weights.close()  # those of the block before
                    weights.enter_context(self._loaded(block))

                return hook

            hooks.enter_context(before([(block.module, enter(block)) for block in self._blocks]))
            yield

    def unsuitable(self) -> InputError:
        """What to say of a model that cannot be taken through block by block."""
        return InputError(
            f"the decoder blocks of {type(self._model).__name__} exchange data beside the hidden states, or are not "
            "called one after the other, which block-by-block calibration cannot follow"
        )

    def _without_blocks(self, stubs: Sequence[Callable[..., Any]]) -> AbstractContextManager[None]:
        return instead([(block.module, stub) for block, stub in zip(self._blocks, stubs, strict=True)])

    def _call(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states that a block was given, and all else."""
        if "hidden_states" in keywords:
            return keywords["hidden_states"], Call(arguments, {**keywords, "hidden_states": None})
        if not arguments:
            raise self.unsuitable()
        return arguments[0], Call(arguments[1:], keywords)

    def _forward(self, batch: Tensor) -> None:
        self._model(input_ids=batch.to(self._model.device, torch.int64), use_cache=False)


def logits_at(model: PreTrainedModel, batch: Tensor, positions: Tensor) -> Tensor:
    """The predictions (B, P, V) at P positions of a batch (B, L); no others are computed, where the model can do so."""
    positions = positions.to(batch.device)
    if "logits_to_keep" in signature(model.forward).parameters:
        return model(input_ids=batch, use_cache=False, logits_to_keep=positions).logits
    return model(input_ids=batch, use_cache=False).logits[:, positions]


def _states(output: Any) -> Tensor:
    """The hidden states in what a block gives: alone, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output
