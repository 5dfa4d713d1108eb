"""Walks a model block by block over calibration windows, holding one block's hidden states and nothing more."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import InputMoments, MomentSum
from trimfit.errors import InputError
from trimfit.mode import evaluation_mode, forward_mode
from trimfit.models.calls import Call, Chain
from trimfit.models.experts import ExpertLinear, each_called
from trimfit.models.groups import Group, find_groups
from trimfit.models.heads import QueryKey
from trimfit.models.logits import LogitCurvature
from trimfit.models.placement import IN_MEMORY, Placement
from trimfit.models.seen import add, add_drifted, see
from trimfit.models.states import Kept, StateStore
from trimfit.models.structure import Block
from trimfit.ranks import ALONE, Ranks
from trimfit.timing import stage

_Streams = dict[str, list[Kept]]


_MOST_PREDICTIONS = 2**24  # numbers that are looked at together


@dataclass
class Walker:
    """Hidden states of several sets of windows, all standing before the same block.

    - `model`: a causal LM; its weights may change behind the walker, block by block.
    - `blocks`: its decoder blocks.
    - `windows`: name of a set → (N, L) token ids, for example the windows to fit on and those held out.
    - `batch_size`: windows in one forward pass.
    - `dense`: also follow the dense model: a second stream of hidden states, through a copy of each block made before
      the block changes.
    - `placement`: where weights come from and hidden states wait; all in memory by default.
    - `ranks`: the processes that share the windows, batch by batch; all of them ask for the same moments.
    - `alone`: names of sets that are not shared: each process has all of their windows.
    - `to_the_end`: also moves the hidden states through the last block, for `logits`.
    - `frozen`: the model does not change; what a block gives for a batch is then kept when its moments are asked for,
      once for all of its groups.

    Raises `InputError` when the blocks, called one after the other, do not give what the model gives, when a layer
    of `blocks` receives no input, and when hidden states are not finite.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    windows: dict[str, Tensor]
    batch_size: int = 8
    dense: bool = False
    placement: Placement = IN_MEMORY
    ranks: Ranks = ALONE
    alone: Collection[str] = ()
    to_the_end: bool = False
    frozen: bool = False
    _store: StateStore = field(init=False, default_factory=StateStore)
    _hidden: _Streams = field(init=False, default_factory=_Streams)
    _dense_hidden: _Streams = field(init=False, default_factory=_Streams)
    _given: dict[tuple[str, int], Kept] = field(init=False, default_factory=dict[tuple[str, int], Kept])
    _branched: _Streams = field(init=False, default_factory=_Streams)
    _ahead: set[str] = field(init=False, default_factory=set[str])
    _dense_block: Block | None = field(init=False, default=None)
    _calls: dict[int, list[Call]] = field(init=False, default_factory=dict[int, list[Call]])
    _groups: dict[int, list[Group]] = field(init=False, default_factory=dict[int, list[Group]])

    def __iter__(self) -> Iterator[Block]:
        """Gives each block in turn; asking for the next moves all hidden states through the block as it then is."""
        with torch.no_grad(), evaluation_mode(self.model):
            with forward_mode(self.model):
                self._start()
            for block in self.blocks:
                with self.placement.loaded(block):
                    self._dense_block = block.copy() if self.dense else None
                    yield block
                    if block is self.blocks[-1] and not self.to_the_end:
                        return
                    self._advance(block, self._hidden)
                    if self._dense_block is not None:
                        behind = {
                            name: hidden for name, hidden in self._dense_hidden.items() if name not in self._ahead
                        }
                        self._advance(self._dense_block, behind)
                        self._ahead.clear()
                self._hidden |= self._branched
                self._branched = {}

    def _advance(self, block: Block, streams: _Streams) -> None:
        for name, hidden in streams.items():
            for i, batch in enumerate(hidden):
                given = self._given.pop((name, i), None)
                hidden[i] = given or self._store.keep(self._run(block, batch.get()))

    def branch(self, block: Block, windows: str, name: str) -> None:
        """Adds a stream to follow: what the block, as it now is, makes of one set of windows. `name` must be new."""
        self._branched[name] = [self._store.keep(self._run(block, batch.get())) for batch in self._hidden[windows]]

    def spans(self, windows: str) -> Iterator[tuple[int, Tensor]]:
        """Number of a batch and some positions in it, until all are gone through: few, as logits take much memory."""
        vocabulary = len(self.model.get_input_embeddings().get_parameter("weight"))
        for number, tokens in enumerate(self._batches(windows)):
            at_once = max(1, _MOST_PREDICTIONS // (len(tokens) * vocabulary))
            for positions in torch.arange(tokens.shape[1]).split(at_once):
                yield number, positions

    def logits(self, name: str, windows: str, number: int, positions: Tensor) -> Tensor:
        """The predictions (B, P, V) at some `spans` of a stream that has passed the last block.

        `windows` is the set that it came from.
        """
        tokens, hidden = self._batches(windows)[number], self._hidden[name][number].get()
        chain = Chain(self.model, self.blocks, self.placement.loaded)
        with torch.no_grad(), forward_mode(self.model):
            return chain.predict(tokens, self._on_device(hidden), self._calls[len(tokens)], positions)

    def groups(self, block: Block) -> list[Group]:
        """The block's layers by shared input, in the order in which a forward pass reaches them."""
        return self._groups[block.index]

    def grams(self, block: Block, groups: Sequence[Group], windows: str) -> list[Tensor]:
        """The Gram matrix (n, n) of each group's input over one set of windows, with the weights as they now are."""
        return [moments.gram for moments in self._moments(block, groups, windows, None)]

    def moments(self, block: Block, groups: Sequence[Group], windows: str) -> list[InputMoments]:
        """The Gram matrices as `grams` gives them; with `dense` also the drift from the dense model.

        With `dense`, those of the group that adds to what the block gives can be had once and as the last of a block:
        the dense stream has then gone through it.
        """
        return self._moments(block, groups, windows, self._dense_block)

    def _moments(
        self, block: Block, groups: Sequence[Group], windows: str, dense_block: Block | None
    ) -> list[InputMoments]:
        dense, last = dense_block is not None, any(group.adds_to == "output" for group in groups)
        if dense and windows in self._ahead:
            raise ValueError(f"the dense stream of {windows!r} has gone through {block.name}")
        sums = [_sum(group, drift=dense) for group in groups]
        for index, kept in enumerate(self._hidden[windows]):
            batch = self._on_device(kept.get())
            seen, states = see(block, groups, self._run, batch, stream=dense, whole=self.frozen or (dense and last))
            if self.frozen and states is not None:
                self._given[windows, index] = self._store.keep(states)
            if dense_block is None:
                add(sums, seen)
                continue
            dense_batch = self._on_device(self._dense_hidden[windows][index].get())
            dense_seen, states = see(dense_block, groups, self._run, dense_batch, stream=True, whole=last)
            if states is not None:
                self._dense_hidden[windows][index] = self._store.keep(states)
            add_drifted(sums, seen, dense_seen)
        if dense and last:
            self._ahead.add(windows)
        with stage("gram"):
            return [total.value(self.model.device, self.ranks) for total in sums]

    def logit_curvature(self, block: Block, pair: QueryKey, windows: str, tokens: int) -> dict[str, Tensor]:
        """What errors in the outputs of Q and K cost, by layer name: see `LogitCurvature`.

        With the weights as they now are, on the first of the windows: as many as hold `tokens` tokens.
        """
        curvature = LogitCurvature(self.model, pair)
        few = -(-tokens // self.windows[windows].shape[1])  # of all ranks, whatever the batches are
        kept = self._hidden[windows]
        places = range(len(kept)) if windows in self.alone else range(self.ranks.rank, few, self.ranks.count)
        for batch, states in zip(places, kept, strict=False):
            first = batch * self.batch_size
            if first >= few:
                break
            here = self._on_device(states.get())[: few - first]
            for number, window in enumerate(here.split(1), start=first):  # logits of more take much memory
                curvature.add(partial(self._run, block, window), seed=number)
        return curvature.value(self.ranks)

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        with stage("forward"), _experts_called([block]), forward_mode(block.module):
            return self._calls[len(hidden)][block.index].run(block.module, self._on_device(hidden))

    def _on_device(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.model.device, non_blocking=hidden.is_pinned())  # the device has other work meanwhile

    def _batches(self, name: str) -> list[Tensor]:
        """Of one set of windows, those that are this process's."""
        batches = self.windows[name].split(self.batch_size)
        return list(batches) if name in self.alone else self.ranks.share(batches)

    def _start(self) -> None:
        """Catches what the first block receives, and how each block is called for each batch size."""
        chain = Chain(self.model, self.blocks, self.placement.loaded)
        every = torch.cat(list(self.windows.values()))
        batches = {name: self._batches(name) for name in self.windows}
        self._check(chain, [every[:1], every[-1:]])
        for size in {len(batch) for name in batches for batch in batches[name]} - {1}:
            self._calls[size] = chain.record(every[:size], self._calls[1])
        self._branched, self._store = {}, self.placement.store()
        self._hidden = {
            name: [self._store.keep(chain.first_input(batch)) for batch in batches[name]] for name in batches
        }
        if self.dense:
            self._dense_hidden = {name: list(hidden) for name, hidden in self._hidden.items()}

    def _check(self, chain: Chain, windows: Sequence[Tensor]) -> None:
        """Arguments recorded once must serve for all windows, taken through each block together. Finds the groups."""
        with _experts_called(self.blocks):  # rounded otherwise, a token could be routed otherwise
            (self._calls[1], first), *others = (chain.trace(window) for window in windows)
        expected = [first, *(states for _, states in others)]
        hidden = [chain.first_input(window) for window in windows]
        if not all(torch.isfinite(states).all() for states in expected):
            raise InputError(
                f"the hidden states of {type(self.model).__name__} have NaN or infinite entries: the model is damaged, "
                f"or overflows in {first.dtype}"
            )
        for block in self.blocks:
            with self.placement.loaded(block):
                self._groups[block.index] = find_groups(block, partial(self._run, block), hidden[0])
                entering, hidden = hidden[0], [self._run(block, states) for states in hidden]
                self._check_experts(block, entering, hidden[0])
        if any(_are_far(states, plain) for states, plain in zip(hidden, expected, strict=True)):
            raise chain.unsuitable()

    def _check_experts(self, block: Block, hidden: Tensor, given: Tensor) -> None:
        """What a block gives must not depend on whether its experts are called one by one."""
        if not any(group.is_expert for group in self.groups(block)):
            return
        if _are_far(given, self._calls[len(hidden)][block.index].run(block.module, hidden)):
            raise InputError(
                f"the experts in {block.name} do not give what they should when they are called one by one, "
                "which calibration needs: this form of experts is not supported"
            )


def _are_far(states: Tensor, others: Tensor) -> bool:
    # Token by token: the few with huge activations, which language models have, must not hide the others.
    return bool(((states - others).float().norm(dim=-1) > 1e-2 * others.float().norm(dim=-1)).any())


def _experts_called(blocks: Sequence[Block]) -> AbstractContextManager[None]:
    layers = (layer.module for block in blocks for layer in block.layers)
    return each_called(module for module in layers if isinstance(module, ExpertLinear))


def _sum(group: Group, *, drift: bool) -> MomentSum:
    outputs, inputs = group.layers[0].weight.shape
    return MomentSum(inputs, drift=drift, outputs=outputs if group.adds_to else None)
