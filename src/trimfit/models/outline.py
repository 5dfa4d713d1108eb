"""What a model will be asked to compute, learned from its config alone: no weight is loaded, nothing is computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from trimfit.models.experts import ExpertLinear, first_called
from trimfit.models.find_folds import find_folds
from trimfit.models.flow import find_flow
from trimfit.models.groups import AT_ONCE
from trimfit.models.heads import QueryKey, find_query_key
from trimfit.models.hooks import before
from trimfit.models.structure import Block, Layer, find_blocks, hidden_size, select_layers


@dataclass(frozen=True)
class GroupOutline:
    """Layers that share an input.

    - `rows`: outputs of each layer; `inputs`: of all of them.
    - `flops_before`: of a forward pass of the block over one window, until the group's input is there; 0 for an expert
      that is seen in the same pass as the one before it.
    - `adds`: whether its one layer is as wide as the residual stream, to which it then adds its output; not one expert.
    - `share`: of the tokens, that the group sees: less than 1 for an expert.
    - `together`: how many groups are seen in that pass, this one included.
    - `query_heads`, `query_key`: where Q and K are among the layers, the heads of Q, and the rows of Q and those of K.
    """

    rows: tuple[int, ...]
    inputs: int
    flops_before: int
    adds: bool
    share: float = 1.0
    together: int = 1
    query_heads: int = 0
    query_key: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class HeadsOutline:
    """V and O where they can be taken as pairs: `count` KV heads of width `size`, each of `group` query heads."""

    count: int
    group: int
    size: int

    @property
    def value(self) -> int:
        """Rows of V."""
        return self.count * self.size

    @property
    def output(self) -> int:
        """Columns of O."""
        return self.value * self.group


@dataclass(frozen=True)
class BlockOutline:
    """One decoder block.

    - `flops`: of a forward pass over one window.
    - `bytes`: of all its weights; `largest`: of the widest activation of one token, in numbers.
    - `heads`: None where V and O are no pairs.
    - `units`: hidden ones of its MLP, where second moments can be followed through the block; else 0.
    """

    groups: tuple[GroupOutline, ...]
    flops: int
    bytes: int
    largest: int
    heads: HeadsOutline | None = None
    units: int = 0


@dataclass(frozen=True)
class Outline:
    """A model.

    - `dtype`: of its weights; `bytes`: of all of them.
    - `hidden`: width of the residual stream; `vocabulary`: rows of the embedding.
    - `length`: tokens of the window that flops are counted for.
    """

    blocks: tuple[BlockOutline, ...]
    dtype: torch.dtype
    bytes: int
    hidden: int
    vocabulary: int
    length: int

    @property
    def weights(self) -> int:
        """Numbers in the layers of the blocks."""
        return sum(rows * group.inputs for block in self.blocks for group in block.groups for rows in group.rows)


def outline(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    length: int,
    ignore: Iterable[str] = (),
    check: Callable[[PreTrainedModel, Sequence[Block]], None] = lambda model, blocks: None,
) -> Outline:
    """Builds the model without memory for its weights and takes one window of `length` tokens through it.

    Layers that `ignore` matches are in no group. Errors are those of `find_blocks`, `select_layers`, and of `check`,
    which is given the model and its blocks.
    """
    without_values = FakeTensorMode(allow_non_fake_inputs=True)
    with without_values:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    every = find_blocks(model)
    chosen = select_layers(model, every, ignore)
    check(model, chosen)  # which may look at values of its own
    with without_values, torch.no_grad():
        size = {block.name: sum(p.nbytes for p in block.module.parameters()) for block in every}
        embedding = model.get_input_embeddings().get_parameter("weight")
        traced = _trace(model.eval(), every, length)
        hidden = hidden_size(model)
        return Outline(
            tuple(
                _wired(
                    model, block, _block(block, traced, size[block.name], hidden, length, find_query_key(model, block))
                )
                for block in chosen
            ),
            dtype,
            sum(p.nbytes for p in model.parameters()),
            hidden,
            embedding.shape[0],
            length,
        )


@dataclass
class _Trace:
    """By name of the module, and for experts of their parameter: the input, and flops counted until it is there."""

    inputs: dict[str, Tensor]
    before: dict[str, int]
    end: dict[str, int]


def _trace(model: PreTrainedModel, blocks: Sequence[Block], length: int) -> _Trace | None:
    """None for a model that looks at values, which are not there."""
    trace = _Trace({}, {}, {})
    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the counter does not know
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})

    def receive(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            trace.inputs.setdefault(_traced(layer), arguments[0])
            trace.before.setdefault(_traced(layer), counter.get_total_flops())

        return hook

    def enter(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            trace.before.setdefault(block.name, counter.get_total_flops())

        return hook

    layers = [layer for block in blocks for layer in block.layers]
    experts = [layer.module for layer in layers if isinstance(layer.module, ExpertLinear)]
    modules = [(layer.module, receive(layer)) for layer in layers]
    modules += [(block.module, enter(block)) for block in blocks]
    try:
        with before(modules), first_called(experts), counter:
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    except DataDependentOutputException:
        return None
    starts = [trace.before[block.name] for block in blocks[1:]]
    head = 2 * length * model.get_input_embeddings().get_parameter("weight").numel()
    ends = [*starts, counter.get_total_flops() - head]
    trace.end = {block.name: end for block, end in zip(blocks, ends, strict=True)}
    return trace


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes (batch, heads, tokens, width): of the logits, and of the sums of values."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


def _block(
    block: Block, trace: _Trace | None, size: int, hidden: int, length: int, pair: QueryKey | None
) -> BlockOutline:
    largest = max((max(layer.weight.shape) for layer in block.layers), default=hidden)
    if trace is None:  # as if every layer had an input of its own: that costs more than it will
        flops = 2 * length * sum(layer.weight.numel() for layer in block.layers)
        groups = [_group([layer], flops, hidden) for layer in block.layers]
        return BlockOutline(tuple(groups), flops, size, largest)
    start = trace.before[block.name]
    plain = [layer for layer in block.layers if not isinstance(layer.module, ExpertLinear)]
    shared: dict[int, list[Layer]] = {}
    for layer in sorted(plain, key=lambda layer: trace.before[layer.name]):
        shared.setdefault(id(trace.inputs[layer.name]), []).append(layer)
    groups = [
        _with_pair(_group(layers, trace.before[layers[0].name] - start, hidden), layers, pair)
        for layers in shared.values()
    ]
    side_by_side: dict[str, list[Layer]] = {}
    for layer in (layer for layer in block.layers if layer not in plain):
        side_by_side.setdefault(layer.parameter, []).append(layer)
    for parameter, layers in side_by_side.items():
        share = len(trace.inputs[parameter]) / length / _experts(layers[0])
        groups += _expert_groups(layers, trace.before[parameter] - start, share, hidden)
    return BlockOutline(tuple(groups), trace.end[block.name] - start, size, largest)


def _with_pair(group: GroupOutline, layers: Sequence[Layer], pair: QueryKey | None) -> GroupOutline:
    """With Q and K, if they are among the layers of the group."""
    if pair is None or pair.query not in layers or pair.key not in layers:
        return group
    return replace(group, query_heads=pair.query_heads, query_key=(len(pair.query.weight), len(pair.key.weight)))


def _wired(model: PreTrainedModel, block: Block, found: BlockOutline) -> BlockOutline:
    """With what its family's wiring tells."""
    flow, pairs = find_flow(model, block.name), find_folds(model, block.name).pairs
    heads = HeadsOutline(*pairs[0].output_columns.shape) if pairs else None
    return replace(found, heads=heads, units=0 if flow is None else flow.hidden.down.weight.shape[1])


def _expert_groups(layers: Sequence[Layer], flops_before: int, share: float, hidden: int) -> Iterator[GroupOutline]:
    """Each expert's layer, in the runs in which their inputs are captured."""
    most = max(1, AT_ONCE // layers[0].weight.shape[1] ** 2)
    for number, layer in enumerate(layers):
        first = number % most == 0
        group = _group([layer], flops_before if first else 0, hidden)
        yield replace(group, adds=False, share=share, together=min(most, len(layers) - number) if first else 1)


def _experts(layer: Layer) -> int:
    """How many there are beside a layer of an expert, itself included."""
    assert isinstance(layer.module, ExpertLinear)
    return len(layer.module.experts.get_parameter(layer.module.parameter))


def _traced(layer: Layer) -> str:
    """Under which name a layer is traced."""
    return layer.parameter if isinstance(layer.module, ExpertLinear) else layer.name


def _group(layers: Sequence[Layer], flops_before: int, hidden: int) -> GroupOutline:
    shapes = [layer.weight.shape for layer in layers]
    adds = len(layers) == 1 and shapes[0][0] == hidden
    return GroupOutline(tuple(rows for rows, _ in shapes), shapes[0][1], flops_before, adds)
