"""One block being quantized: its folded weights, and what has become of each layer."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trimfit.calibration import InputMoments
from trimfit.errors import RunError
from trimfit.models import Block, Folds, Group, Layer, ValueOutput
from trimfit.pipelines.checks import naming
from trimfit.pipelines.environment import peak_memory
from trimfit.pipelines.few_tokens import has_few, raised_damping
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.finished_block import BlockRecord, FinishedBlock, QuantizedWeight, plain_state
from trimfit.pipelines.quantizing.fold_block import fold_block, is_pruned
from trimfit.pipelines.quantizing.records import QuantizedRecord
from trimfit.pipelines.quantizing.shared import share_state, shared_rounding, shared_transform
from trimfit.quant import Grid, Quantized, place_levels
from trimfit.quant.blocks import BlockTransform, best_transform, block_size
from trimfit.quant.learned import learned_transform
from trimfit.quant.pair_rounding import Pair, round_pair
from trimfit.quant.rounding import gram_error, round_to_gram
from trimfit.ranks import ALONE, Ranks
from trimfit.refit import FactoredGram
from trimfit.refit.gram import widest

RUN = 1024  # columns

_KEPT_ZEROS = "a pruned layer takes no online transformation: mixing its inputs would fill its zeros"


@dataclass
class QuantizedLayer(QuantizedWeight):
    """What has become of a layer.

    - `gram`: (in, in) of its inputs before any T, or None; `data`, whether it is of calibration windows, and then
      `tokens` of them.
    """

    gram: Tensor | None
    data: bool
    seconds: float
    tokens: int | None = None
    few_tokens: bool = False


@dataclass
class BlockWork:
    """Float32 copies of a block's weights, folded, and the layers quantized so far.

    - `scale_dtype`: in which scales are stored; the model's where None.
    - `ranks`: the processes that share the block: the first folds and finds transformations, all round rows of layers.

    Making one folds transformations into the norms and biases of the model, as far as the config wants them.
    """

    block: Block
    folds: Folds
    config: QuantizeConfig
    scale_dtype: torch.dtype | None = None
    ranks: Ranks = ALONE
    weights: dict[str, Tensor] = field(init=False)
    layers: dict[str, QuantizedLayer] = field(init=False, default_factory=dict[str, QuantizedLayer])
    left_out: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {layer.name: layer for layer in self.block.layers}
        self.weights = {
            name: layer.weight.to(torch.float32, copy=True).contiguous() for name, layer in self._by_name.items()
        }
        self._dtypes = {name: layer.weight.dtype for name, layer in self._by_name.items()}
        self._pruned = {name: is_pruned(weight) for name, weight in self.weights.items()}
        self._folded, left_out = self.ranks.first(lambda: fold_block(self.folds, self.weights, self.config))
        share_state(self.ranks, self.block, self.weights.values())
        self.left_out = [] if self.config.transform == "none" else [*self.folds.refused, *left_out]

    def groups(self) -> Iterator[tuple[Layer, ...]]:
        """Layers that read one norm, and then each of the others: all that can be told without a forward pass."""
        seen: set[str] = set()
        for layer in self.block.layers:
            if layer.name in seen:
                continue
            readers = self._readers(layer)
            seen.update(readers)
            yield tuple(self._by_name[name] for name in readers if name in self._by_name)

    def gram_of(self, layers: Sequence[Layer], grams: Mapping[str, Tensor]) -> Tensor | None:
        """That of layers that share their input, known by the name of any that reads it, quantized or not."""
        return next((grams[name] for name in self._readers(layers[0]) if name in grams), None)

    def _readers(self, layer: Layer) -> tuple[str, ...]:
        return next((scale.readers for scale in self.folds.inputs if layer.name in scale.readers), (layer.name,))

    def quantize_group(self, group: Group, moments: InputMoments) -> None:
        """Quantizes layers that share their input, with the moments of that input over calibration windows.

        An expert with few tokens gets more damping, and one without any is rounded as without data.
        """
        gram = moments.gram if moments.tokens else None
        damping = raised_damping(self.config.damping_for(data=True), group, moments.tokens)
        self.quantize(group.layers, gram, data=gram is not None, damping=damping)
        for layer in group.layers:
            done = self.layers[layer.name]
            done.tokens, done.few_tokens = moments.tokens, has_few(group, moments.tokens)

    def quantize(
        self, layers: Sequence[Layer], gram: Tensor | None, *, data: bool, damping: float | None = None
    ) -> None:
        """Quantizes layers that share their input, with the Gram matrix (in, in) of that input if there is one.

        `data` says whether it is one of calibration windows. Transformations are chosen without it: by the error of
        nearest rounding a Gram matrix favours those that leave error feedback less to do (docs/quantization.md).
        """
        damping = self.config.damping_for(data=data) if damping is None else damping
        start = time.perf_counter()
        transform = shared_transform(lambda: self._find_transform(layers), self.weights[layers[0].name], self.ranks)
        factored: list[FactoredGram] = []
        if self.config.rounding == "alternating" and (gram is not None or transform is not None):
            damped = _damped(gram, layers[0].weight, damping)
            damped = damped if transform is None else transform.gram(damped)
            factored = [FactoredGram(damped[part, part]) for part in self._parts(len(damped), data=data)]
        for layer in layers:
            quantized = self._round_layer(layer, transform, factored)
            self.layers[layer.name] = QuantizedLayer(quantized, transform, gram, data, time.perf_counter() - start)
            start = time.perf_counter()

    def _round_layer(
        self, layer: Layer, transform: BlockTransform | None, factored: Sequence[FactoredGram]
    ) -> Quantized:
        weight, stored = self.weights[layer.name], self._dtypes[layer.name]
        weight = weight if transform is None else transform.forward(weight)
        grid = self.config.grid.fitted(weight.shape[1])
        dtype = self.scale_dtype or stored
        kept = weight != 0 if self._pruned[layer.name] else None

        def round_rows(rows: slice) -> Quantized:
            return _round(weight[rows], grid, factored, dtype, None if kept is None else kept[rows])

        with naming(layer):
            quantized = shared_rounding(round_rows, weight, grid, dtype, self.ranks)
        return replace(quantized, scale=quantized.scale.to(torch.promote_types(dtype, stored)))

    def round_pairs(self) -> None:
        """Rounds V and O of each pair in turns, against each other; kept where their product gets nearer.

        Only without data: inputs of O that were seen tell more than the product does.
        """
        for pair in self.folds.pairs:
            names = pair.value_layer.name, pair.output_layer.name
            if not set(names) <= self.layers.keys() or any(self.layers[name].transform for name in names):
                continue
            self._round_pair(pair, *names)

    def _round_pair(self, pair: ValueOutput, value: str, output: str) -> None:
        start = time.perf_counter()
        first, second = self.layers[value], self.layers[output]
        rounded = round_pair(
            Pair(self.weights[value], self.weights[output], pair.value_rows, pair.output_columns, pair.bias()),
            (first.quantized, second.quantized),
            input_gram=_damped(first.gram, self.weights[value], self.config.damping_for(data=False)),
            keep_zeros=self._pruned[value] or self._pruned[output],
        )
        first.quantized, second.quantized = rounded.value, rounded.output
        second.seconds += time.perf_counter() - start

    def _parts(self, width: int, *, data: bool) -> list[slice]:
        """Runs of columns that error feedback stays within: all at once, but in wide layers without data.

        There the cost of a weight would grow with the width for the sake of moments that are rough anyway.
        """
        group = self.config.grid.fitted(width).group_size
        if data or group is None:
            return [slice(0, width)]
        run = max(1, RUN // group) * group
        return [slice(start, min(start + run, width)) for start in range(0, width, run)]

    def _find_transform(self, layers: Sequence[Layer]) -> BlockTransform | None:
        if self.config.transform != "online":
            return None
        if any(self._pruned[layer.name] for layer in layers):
            if _KEPT_ZEROS not in self.left_out:
                self.left_out.append(_KEPT_ZEROS)
            return None
        weights = [self.weights[layer.name] for layer in layers]
        width = weights[0].shape[1]
        size = block_size(width, self.config.block_size)
        grid, steps = self.config.grid.fitted(width), self.config.learned_steps

        def learn(start: BlockTransform) -> BlockTransform:
            return learned_transform(weights, grid, start, steps=steps)

        best = best_transform(weights, grid, size, learn=learn if steps else None)
        return None if best is None else _as_stored(best, self._dtypes[layers[0].name])

    def finished(self, moment: Tensor | None) -> FinishedBlock:
        """The block, when all its layers are quantized. `moment`: of the hidden states behind it, where it is followed.

        Raises `RunError` if a zero of a pruned layer is none any more.
        """
        done = {layer.name: self.layers[layer.name] for layer in self.block.layers}
        owners: dict[int, str] = {}
        transforms: dict[str, tuple[str, str]] = {}
        multiply_adds = 0
        for name, transform in ((name, layer.transform) for name, layer in done.items() if layer.transform):
            multiply_adds += 0 if id(transform) in owners else transform.multiply_adds
            transforms[name] = owners.setdefault(id(transform), name), transform.name
        record = BlockRecord(
            layers=[self._record(layer.name, layer.weight.device) for layer in self.block.layers],
            left_out=self.left_out,
            transforms=transforms,
            multiply_adds=multiply_adds,
        )
        return FinishedBlock(self.block.name, record, done, plain_state(self.block), moment)

    def _record(self, name: str, device: torch.device) -> QuantizedRecord:
        done, exact = self.layers[name], self.weights[name]
        weight = done.weight.float()
        grid = done.quantized.grid
        rows, width = exact.shape
        if self._pruned[name] and (weight[exact == 0] != 0).any():
            raise RunError(f"{name} lost zeros of its pattern in quantization; nothing was kept, please report this")
        zeros = (weight == 0).float().mean().item()
        applied = [*self._folded[name], *([] if done.transform is None else [f"online {done.transform.name}"])]
        return QuantizedRecord(
            name=name,
            block=self.block.index,
            shape=(rows, width),
            group_size=grid.group_size,
            bits_per_weight=_bits(done.quantized, self.scale_dtype or self._dtypes[name])
            + self._online_bits(done.transform),
            transform=", ".join(applied),
            zeros=zeros,
            pruned=self._pruned[name],
            weight_error=((weight - exact).square().sum() / exact.square().sum().clamp(min=1e-30)).item(),
            output_error=gram_error(weight, exact, done.gram) if done.data and done.gram is not None else None,
            tokens=done.tokens,
            few_tokens=done.few_tokens,
            seconds=done.seconds,
            peak_memory=peak_memory(device),
        )

    def _online_bits(self, transform: BlockTransform | None) -> float:
        """Of a transformation, for each weight of the layers that share it."""
        if transform is None:
            return 0.0
        shared = sum(done.quantized.codes.numel() for done in self.layers.values() if done.transform is transform)
        bits = next(iter(self._dtypes.values())).itemsize * 8  # stored in the dtype of the model
        return transform.inverses.numel() * bits / shared


def _as_stored(transform: BlockTransform, dtype: torch.dtype) -> BlockTransform:
    """With T⁻¹ rounded to the dtype that it is stored and applied in, and T its inverse, so that they still cancel."""
    if dtype.itemsize >= 4:
        return transform
    inverses = transform.inverses.to(dtype)
    matrices = torch.linalg.inv(inverses.to(widest(inverses.device)))
    return replace(transform, matrices=matrices.float(), inverses=inverses.float())


def _round(
    weight: Tensor, grid: Grid, grams: Sequence[FactoredGram], dtype: torch.dtype, kept: Tensor | None
) -> Quantized:
    """Error feedback within runs of columns, each with its own Gram matrix; to nearest without any."""
    if not grams:
        return place_levels(weight, grid, dtype=dtype).nearest(weight)
    widths = [gram.size for gram in grams]
    kepts = [None] * len(grams) if kept is None else kept.split(widths, 1)
    parts = [
        round_to_gram(columns, grid.fitted(columns.shape[1]), gram, dtype=dtype, kept=part)
        for columns, gram, part in zip(weight.split(widths, 1), grams, kepts, strict=True)
    ]
    return Quantized(
        torch.cat([part.codes for part in parts], 1),
        torch.cat([part.scale for part in parts], 1),
        torch.cat([part.zero_point for part in parts], 1),
        grid,
    )


def _damped(gram: Tensor | None, weight: Tensor, damping: float) -> Tensor:
    """Damped before it is transformed: the prior, white noise, is one about the inputs as they are."""
    if gram is None:
        return torch.eye(weight.shape[1], device=weight.device)
    gram = gram.to(torch.float32, copy=True)
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram


def _bits(quantized: Quantized, scale_dtype: torch.dtype) -> float:
    """Bits for each weight with scales and zero points."""
    grid = quantized.grid
    extra = scale_dtype.itemsize * 8 + (0 if grid.symmetric else grid.bits)
    return grid.bits + extra * quantized.scale.numel() / quantized.codes.numel()
