"""Quantization side by side with what people use: excess nats over the dense model, in one run on one text.

    pip install hqq==0.2.8.post1 && pip install --no-deps sinq==0.2.0      # peers; those that are missing are left out
    python benchmarks/quantize_table.py demo --calibration demo --text demo
    python benchmarks/quantize_table.py MODEL --calibration FILE --text FILE --groups 64 128 channel

Peers quantize each layer by their own functions with their own defaults, in float32. They have no group size for every
width, so all methods use the grid that trimfit fits to a layer: groups of the smallest divisor of the width that is not
smaller than asked. "GPTQ" is error feedback with clip search on windows of the calibration text, the inputs of each
group of layers seen through what is quantized already: better than GPTQ with its defaults. Prints Markdown tables.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Bench, machine, mean_std, parser
from torch import Tensor
from transformers import PreTrainedModel

import trimfit
from trimfit.calibration import added_tokens, encode_documents, sample_windows
from trimfit.models import Walker, find_blocks, find_folds
from trimfit.pipelines.quantizing.fold_block import balance_hidden, balance_inputs, transform_pair
from trimfit.quant import Grid, Quantized, place_levels
from trimfit.quant.nearest_plane import nearest_to_pseudo_inverse, with_feedback
from trimfit.quant.pair_rounding import Pair, Solver, round_pair
from trimfit.quant.rounding import round_to_gram
from trimfit.refit import FactoredGram

Quantize = Callable[[PreTrainedModel, Grid, Tensor | None], None]
LayerQuantizer = Callable[[Tensor, Grid], Tensor]


def layer_by_layer(function: LayerQuantizer) -> Quantize:
    """Quantizes every layer of the blocks on its own."""

    def quantize(model: PreTrainedModel, grid: Grid, windows: Tensor | None) -> None:
        for layer in (layer for block in find_blocks(model) for layer in block.layers):
            weight = layer.weight.float()
            layer.write(function(weight, grid.fitted(weight.shape[1])))

    return quantize


def nearest(weight: Tensor, grid: Grid, *, clip: bool) -> Tensor:
    return place_levels(weight, grid, clip=clip).nearest(weight).dequantize()


def hqq(weight: Tensor, grid: Grid) -> Tensor:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    size = grid.group_size or weight.shape[1]
    codes, meta = quantizer.quantize(
        weight, nbits=grid.bits, group_size=size, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
    )
    return ((codes.float() - meta["zero"]) * meta["scale"]).reshape(weight.shape)


def sinq(weight: Tensor, grid: Grid, *, method: str) -> Tensor:
    with contextlib.redirect_stdout(io.StringIO()):
        function = importlib.import_module("sinq.dual_shift").quantize_dual_scale_shift
    parts: list[Tensor] = []
    for tile in weight.split(grid.group_size or weight.shape[1], 1):
        codes, rows, columns, zero = function(tile.clone(), [0, grid.largest], method)
        parts.append((codes - zero) * rows * columns)
    return torch.cat(parts, 1)


def gptq(model: PreTrainedModel, grid: Grid, windows: Tensor | None) -> None:
    assert windows is not None
    walker = Walker(model, find_blocks(model), {"fit": windows})
    for block in walker:
        for group in walker.groups(block):
            gram = FactoredGram(walker.grams(block, [group], "fit")[0], 0.01)
            for layer in group.layers:
                weight = layer.weight.float()
                fitted = grid.fitted(weight.shape[1])
                layer.write(round_to_gram(weight, fitted, gram, sweeps=0).dequantize())


def balanced(model: PreTrainedModel, grid: Grid, windows: Tensor | None) -> None:
    """Column balance folded, then nearest: what is between two lines of the ablation."""
    for block in find_blocks(model):
        folds = find_folds(model, block.name)
        weights = {layer.name: layer.weight.float().clone() for layer in block.layers}
        for scale in folds.inputs:
            balance_inputs(scale, weights)
        for scale in folds.hidden:
            balance_hidden(scale, weights)
        for layer in block.layers:
            weight = weights[layer.name]
            layer.write(nearest(weight, grid.fitted(weight.shape[1]), clip=True))


def in_turns(solver: Solver) -> Quantize:
    """The paper's likely system: pairs by its gradients, V and O rounded in turns, all other layers to nearest."""

    def clipped(weight: Tensor, grid: Grid) -> Quantized:
        return place_levels(weight, grid.fitted(weight.shape[1])).nearest(weight)

    def quantize(model: PreTrainedModel, grid: Grid, windows: Tensor | None) -> None:
        asked = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric, "transform": "paper"}
        config = trimfit.QuantizeConfig.model_validate(asked)
        for block in find_blocks(model):
            folds = find_folds(model, block.name)
            weights = {layer.name: layer.weight.float().clone() for layer in block.layers}
            rounded: dict[str, Quantized] = {}
            for pair in folds.pairs:
                names = transform_pair(pair, folds, weights, config)
                value, output = (weights[name] for name in names)
                given = Pair(value, output, pair.value_rows, pair.output_columns, pair.bias())
                found = round_pair(given, (clipped(value, grid), clipped(output, grid)), solver=solver)
                rounded |= dict(zip(names, (found.value, found.output), strict=True))
            for layer in block.layers:
                layer.write((rounded.get(layer.name) or clipped(weights[layer.name], grid)).dequantize())

    return quantize


def ours(**options: Any) -> Quantize:
    def quantize(model: PreTrainedModel, grid: Grid, windows: Tensor | None) -> None:
        asked = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric, **options}
        trimfit.quantize(model, trimfit.QuantizeConfig.model_validate(asked), windows)

    return quantize


# name → (how, what data: "" none, "self" its own, "text" the calibration text)
PEERS: dict[str, tuple[Quantize, str]] = {
    "round to nearest": (layer_by_layer(lambda w, g: nearest(w, g, clip=False)), ""),
    "hqq": (layer_by_layer(hqq), ""),
    "sinq": (layer_by_layer(lambda w, g: sinq(w, g, method="sinq")), ""),
    "sinq + hqq": (layer_by_layer(lambda w, g: sinq(w, g, method="sinq_hqq")), ""),
    "GPTQ": (gptq, "text"),
}
OURS: dict[str, tuple[Quantize, str]] = {
    "free": (ours(transform="free"), ""),
    "online": (ours(transform="online", learned_steps=0), ""),
    "online, learned": (ours(transform="online"), ""),
    "free, self": (ours(transform="free"), "self"),
    "online, self": (ours(transform="online", learned_steps=0), "self"),
    "online, learned, self": (ours(transform="online"), "self"),
    "free, text": (ours(transform="free"), "text"),
    "online, text": (ours(transform="online", learned_steps=0), "text"),
}
ABLATION: dict[str, tuple[Quantize, str]] = {
    "nearest": (layer_by_layer(lambda w, g: nearest(w, g, clip=False)), ""),
    "+ clip search": (ours(transform="none", rounding="nearest"), ""),
    "+ column balance": (balanced, ""),
    "+ pairs where they help": (ours(transform="free", rounding="nearest"), ""),
    "+ alternating rounding (= free)": (ours(transform="free"), ""),
    "clip search, pairs always": (ours(transform="pairs", rounding="nearest"), ""),
    "clip search, pairs by the paper's gradients": (ours(transform="paper", rounding="nearest"), ""),
    "and V and O in turns, by pseudo-inverse and nearest": (in_turns(nearest_to_pseudo_inverse), ""),
    "and V and O in turns, by error feedback": (in_turns(with_feedback), ""),
    "alternating rounding alone": (ours(transform="none"), ""),
    "alternating rounding, pairs": (ours(transform="pairs"), ""),
    "alternating rounding, the paper's pairs": (ours(transform="paper"), ""),
    "online, nearest": (ours(transform="online", rounding="nearest", learned_steps=0), ""),
    "online, alternating": (ours(transform="online", learned_steps=0), ""),
    "online, blocks of 32": (ours(transform="online", block_size=32, learned_steps=0), ""),
}
SETS = {"peers": {**PEERS, **OURS}, "ablation": ABLATION}
CALIBRATION_FREE = ("round to nearest", "hqq", "sinq", "sinq + hqq")


def main() -> None:
    options = parser(__doc__, seeds=3, samples=128)
    options.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    options.add_argument("--groups", nargs="*", default=["64"])
    options.add_argument("--set", choices=SETS, default="peers")
    options.add_argument("--methods", nargs="*", help="rows of the table; all of the set if left out")
    arguments = options.parse_args()
    bench = Bench(arguments, float32=True)
    divergence = Divergence(bench)

    windows: dict[tuple[str, int], Tensor | None] = {("", 0): None}
    for seed in range(arguments.seeds):
        for data, source in (("text", arguments.calibration), ("self", "self")):
            windows[data, seed] = bench.windows(source, seed)

    cells: list[dict[str, Any]] = []
    for name, bits, group, seed in _grid(arguments):
        quantize, data = SETS[arguments.set][name]
        if (data, seed) not in windows:
            continue
        bench.restore()
        start = time.perf_counter()
        try:
            quantize(bench.model, Grid(bits, None if group == "channel" else int(group)), windows[data, seed])
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        score = bench.score()
        cell = {
            "method": name,
            "bits": bits,
            "group": group,
            "seed": seed,
            "excess": score.nats - bench.dense.nats,
            "divergence": divergence.measure(),
            "seconds": seconds,
        }
        cells.append(cell)
        print(json.dumps(cell), flush=True)

    print(f"\n{machine()}\n")
    print(
        f"{arguments.model}, {arguments.samples} calibration windows of {bench.length} tokens where data is used, "
        f"{arguments.seeds} seeds, mean ± std; scored on {bench.dense.tokens:,} tokens ({arguments.text}), windows "
        f"of {bench.length}; dense perplexity {bench.dense.perplexity:.3f}. Excess nats per token over dense, [as a "
        "share of the best calibration-free peer's], (KL divergence to dense); seconds.\n"
    )
    print(table(cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"dense": bench.dense.perplexity, "cells": cells}, indent=1))


def _grid(arguments: argparse.Namespace) -> Iterator[tuple[str, int, str, int]]:
    for group in arguments.groups:
        for bits in arguments.bits:
            for name in arguments.methods or SETS[arguments.set]:
                _, data = SETS[arguments.set][name]
                for seed in range(arguments.seeds if data else 1):
                    yield name, bits, group, seed


class Divergence:
    """Mean KL divergence of the dense model's predictions to the quantized one's, on windows of the text."""

    def __init__(self, bench: Bench):
        encoded = encode_documents(bench.tokenizer, bench.texts)
        bos = added_tokens(bench.tokenizer).bos
        self._model = bench.model
        self._windows = sample_windows(encoded, samples=32, length=bench.length, seed=0, bos=bos).split(8)
        self._dense = [self._predict(batch) for batch in self._windows]

    def measure(self) -> float:
        total = sum(
            (dense.exp() * (dense - self._predict(batch))).sum(-1).mean().item()
            for batch, dense in zip(self._windows, self._dense, strict=True)
        )
        return total / len(self._windows)

    @torch.no_grad()
    def _predict(self, batch: Tensor) -> Tensor:
        return torch.log_softmax(self._model(batch).logits.float(), -1)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method, a column for each grid; shares of the best calibration-free peer in brackets."""
    grids = list(dict.fromkeys((cell["bits"], cell["group"]) for cell in cells))
    lines = [
        "| method | " + " | ".join(f"{bits} bit, {group}" for bits, group in grids) + " | seconds |",
        "|---|" + "---|" * (len(grids) + 1),
    ]
    best = {
        grid: min(
            (c["excess"] for c in cells if (c["bits"], c["group"]) == grid and c["method"] in CALIBRATION_FREE),
            default=math.nan,
        )
        for grid in grids
    }
    for name in dict.fromkeys(cell["method"] for cell in cells):
        row: list[str] = []
        for grid in grids:
            found = [c for c in cells if c["method"] == name and (c["bits"], c["group"]) == grid]
            excess = [cell["excess"] for cell in found]
            text = mean_std(excess, ".4f")
            if not math.isnan(best[grid]):
                text += f" [{statistics.mean(excess) / best[grid]:.2f}]"
            row.append(f"{text} ({statistics.mean(cell['divergence'] for cell in found):.4f})")
        seconds = statistics.median(cell["seconds"] for cell in cells if cell["method"] == name)
        lines.append(f"| {name} | " + " | ".join(row) + f" | {seconds:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
