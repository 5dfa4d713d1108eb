"""Walks a model block by block over calibration windows, holding one block's hidden states and nothing more.

Block inputs are caught by hooks, and every other argument is replayed verbatim, per block: no argument of any
family is known by name, but for the hidden states.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.calibration import Drifted, InputMoments, MomentSum
from trimfit.errors import InputError
from trimfit.models.groups import Group, find_groups
from trimfit.models.hooks import Stop, after, before
from trimfit.models.mode import evaluation_mode
from trimfit.models.structure import Block, Layer


@dataclass
class _Call:
    """How a block is called: everything but the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        if "hidden_states" in self.keywords:
            output = module(*self.arguments, **{**self.keywords, "hidden_states": hidden})
        else:
            output = module(hidden, *self.arguments, **self.keywords)
        return _states(output)


@dataclass
class _Seen:
    """What a group sees in one forward pass: its inputs, call by call, and the residual stream it adds to."""

    inputs: list[Tensor] = field(default_factory=list[Tensor])
    output: Tensor | None = None
    residual: Tensor | None = None


@dataclass
class Walker:
    """Hidden states of several sets of windows, all standing before the same block.

    - `model`: a causal LM; its weights may change behind the walker, block by block.
    - `blocks`: its decoder blocks.
    - `windows`: name of a set → (N, L) token ids, for example the windows to fit on and those held out.
    - `batch_size`: windows in one forward pass.
    - `dense`: also follow the dense model: a second stream of hidden states, through a copy of each block made before
      the block changes.

    Raises `InputError` when the blocks, called one after the other, do not give what the model gives, when a layer
    of `blocks` receives no input, and when hidden states are not finite.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    windows: dict[str, Tensor]
    batch_size: int = 8
    dense: bool = False
    _hidden: dict[str, list[Tensor]] = field(init=False, default_factory=dict[str, list[Tensor]])
    _dense_hidden: dict[str, list[Tensor]] = field(init=False, default_factory=dict[str, list[Tensor]])
    _dense_block: Block | None = field(init=False, default=None)
    _calls: dict[int, list[_Call]] = field(init=False, default_factory=dict[int, list[_Call]])
    _groups: dict[int, list[Group]] = field(init=False, default_factory=dict[int, list[Group]])

    def __iter__(self) -> Iterator[Block]:
        """Gives each block in turn; asking for the next moves all hidden states through the block as it then is."""
        with torch.no_grad(), evaluation_mode(self.model):
            self._start()
            for block in self.blocks:
                self._dense_block = _copy(block) if self.dense else None
                yield block
                if block is self.blocks[-1]:
                    return
                self._advance(block, self._hidden)
                if self._dense_block is not None:
                    self._advance(self._dense_block, self._dense_hidden)

    def _advance(self, block: Block, streams: dict[str, list[Tensor]]) -> None:
        for hidden in streams.values():
            for i, batch in enumerate(hidden):
                hidden[i] = self._run(block, batch)

    def groups(self, block: Block) -> list[Group]:
        """The block's layers by shared input, in the order in which a forward pass reaches them."""
        return self._groups[block.index]

    def grams(self, block: Block, groups: Sequence[Group], windows: str) -> list[Tensor]:
        """The Gram matrix (n, n) of each group's input over one set of windows, with the weights as they now are."""
        return [moments.gram for moments in self._moments(block, groups, windows, None)]

    def moments(self, block: Block, groups: Sequence[Group], windows: str) -> list[InputMoments]:
        """The Gram matrices as `grams` gives them; with `dense` also the drift of the inputs from the dense model's."""
        return self._moments(block, groups, windows, self._dense_block)

    def _moments(
        self, block: Block, groups: Sequence[Group], windows: str, dense_block: Block | None
    ) -> list[InputMoments]:
        sums = [MomentSum() for _ in groups]
        for index, batch in enumerate(self._hidden[windows]):
            seen = self._see(block, groups, batch, residual=dense_block is not None)
            if dense_block is None:
                for total, one in zip(sums, seen, strict=True):
                    for inputs in one.inputs:
                        total.add(inputs)
                continue
            dense_seen = self._see(dense_block, groups, self._dense_hidden[windows][index], residual=True)
            for total, one, dense in zip(sums, seen, dense_seen, strict=True):
                for inputs, dense_inputs in zip(one.inputs, dense.inputs, strict=True):
                    total.add(inputs, Drifted(dense_inputs, one.residual, dense.residual))
        return [total.value for total in sums]

    def _see(self, block: Block, groups: Sequence[Group], batch: Tensor, *, residual: bool) -> list[_Seen]:
        """What groups see in a forward pass, which ends as soon as the last of them was reached.

        `block` is that of the groups, or its copy.
        """
        seen = [_Seen() for _ in groups]
        remaining = sum(group.calls for group in groups)
        to_the_end = residual and any(group.adds_to == "output" for group in groups)

        def receive(one: _Seen) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                nonlocal remaining
                one.inputs.append(arguments[0].clone())  # some models go on in place
                remaining -= 1
                if remaining == 0 and not to_the_end:
                    raise Stop

            return hook

        def give(one: _Seen) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
                one.output = output.clone()

            return hook

        modules = {layer.name: layer.module for layer in block.layers}
        firsts = [modules[group.layers[0].name] for group in groups]
        with (
            before([(module, receive(one)) for module, one in zip(firsts, seen, strict=True)]),
            after([(module, give(one)) for module, one in zip(firsts, seen, strict=True)] if to_the_end else []),
            suppress(Stop),
        ):
            states = self._run(block, batch)
            for group, one in zip(groups, seen, strict=True):
                if group.adds_to == "output" and one.output is not None:
                    one.residual = states.float() - one.output.view_as(states).float()
        for group, one in zip(groups, seen, strict=True):
            if residual and group.adds_to == "input":
                one.residual = batch
        return seen

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        return self._calls[len(hidden)][block.index].run(block.module, hidden)

    def _start(self) -> None:
        """Catches what the first block receives, and how each block is called for each batch size."""
        every = torch.cat(list(self.windows.values()))
        batches = {name: windows.split(self.batch_size) for name, windows in self.windows.items()}
        for size in {1, *(len(batch) for name in batches for batch in batches[name])}:
            self._calls[size], _ = self._record(every[:size])
        self._check([every[:1], every[-1:]])
        self._hidden = {name: [self._first_input(batch) for batch in batches[name]] for name in batches}
        if self.dense:
            self._dense_hidden = {name: list(hidden) for name, hidden in self._hidden.items()}

    def _check(self, windows: Sequence[Tensor]) -> None:
        """Arguments recorded once must serve for all windows, taken through each block together. Finds the groups."""
        expected = [self._record(window)[1] for window in windows]
        hidden = [self._first_input(window) for window in windows]
        if not all(torch.isfinite(states).all() for states in expected):
            raise InputError(
                f"the hidden states of {type(self.model).__name__} have NaN or infinite entries: the model is damaged, "
                f"or overflows in {expected[0].dtype}"
            )
        for block in self.blocks:
            self._groups[block.index] = find_groups(block, partial(self._run, block), hidden[0])
            hidden = [self._run(block, states) for states in hidden]
        for states, plain in zip(hidden, expected, strict=True):
            # Token by token: the few with huge activations, which language models have, must not hide the others.
            if ((states - plain).float().norm(dim=-1) > 1e-2 * plain.float().norm(dim=-1)).any():
                raise self._unsuitable()

    def _first_input(self, batch: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            caught.append(keywords["hidden_states"] if "hidden_states" in keywords else arguments[0])
            raise Stop

        with before([(self.blocks[0].module, hook)], with_kwargs=True), suppress(Stop):
            self._forward(batch)
        return caught[0]

    def _record(self, batch: Tensor) -> tuple[list[_Call], Tensor]:
        """How each block is called in a forward pass of the whole model, and what the last block gives."""
        calls: list[_Call] = []
        outputs: list[Tensor] = []

        def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if "hidden_states" in keywords:
                calls.append(_Call(arguments, {**keywords, "hidden_states": None}))
            elif arguments:
                calls.append(_Call(arguments[1:], keywords))
            else:
                raise self._unsuitable()

        def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs.append(_states(output))
            raise Stop

        with (
            before([(block.module, enter) for block in self.blocks], with_kwargs=True),
            after([(self.blocks[-1].module, leave)]),
            suppress(Stop),
        ):
            self._forward(batch)
        # Gemma 3n has streams before the batch; others call their blocks in another order, several times or not at all.
        if len(calls) != len(self.blocks) or not outputs or outputs[0].shape[:2] != batch.shape:
            raise self._unsuitable()
        return calls, outputs[0]

    def _unsuitable(self) -> InputError:
        return InputError(
            f"the decoder blocks of {type(self.model).__name__} exchange data beside the hidden states, or are not "
            "called one after the other, which block-by-block calibration cannot follow"
        )

    def _forward(self, batch: Tensor) -> None:
        self.model(input_ids=batch.to(self.model.device, torch.int64), use_cache=False)


def _states(output: Any) -> Tensor:
    """The hidden states in what a block gives: alone, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def _copy(block: Block) -> Block:
    """A block with the same weights, of its own."""
    module = copy.deepcopy(block.module)
    layers = [
        Layer(layer.name, module.get_submodule(layer.name.removeprefix(f"{block.name}."))) for layer in block.layers
    ]
    return Block(block.index, block.name, module, tuple(layers))
