"""SparseGPT, Wanda and GPTQ beside llm-compressor's, on the same model, calibration windows and evaluation text.

    pip install llmcompressor==0.14.0.1
    python benchmarks/llmcompressor_baselines.py demo --calibration demo --text demo
    python benchmarks/llmcompressor_baselines.py MODEL --calibration FILE --text FILE

Both packages compress a float32 copy of the model on the same tensor of windows, all of them fitted on. llm-compressor
runs its sequential pipeline, as it does when left alone: one decoder block at a time, statistics of all layers of a
block from one pass before any of them changes, the next block on outputs of the compressed one. That is
`capture="block"` here. Its other defaults are ours or are set: block size 128, damping 0.01, no refit. It rounds the
number of weights to prune down in each row (Wanda), or down and then up by one in each block of columns (SparseGPT);
trimfit prunes exactly s of the layer. The rows "its counts" prune as many as it does.

GPTQ is on the asymmetric grid that trimfit fits to each layer. Left alone it takes scales from the range of a group and
orders columns by activation ("static"). Ours is that of quantize_table.py. Prints Markdown tables; with --task that for
pruning tells the accuracy on a task of `trimfit eval` too.
"""

import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from typing import Any
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from common import PATTERNS, Bench, add_task, machine, mean_std, parser, with_error
from quantize_table import gptq
from torch import Tensor
from transformers import PreTrainedModel

import trimfit
from trimfit.evaluate import Score
from trimfit.masks import SELECTORS, Unstructured
from trimfit.models import Walker, find_blocks
from trimfit.quant import Grid

DAMPING = 0.01
BATCH = 8
HEAD = "re:.*lm_head.*"

Compress = Callable[[PreTrainedModel, Tensor], None]
"""Compresses a model in place on calibration windows (N, L)."""


def oneshot(model: PreTrainedModel, windows: Tensor, modifier: Any) -> None:
    """llm-compressor's own entry point, fed with our windows in their order."""
    from llmcompressor import oneshot as run
    from loguru import logger

    logger.remove()
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(BATCH)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    run(model=model, tokenizer=str(model.config.name_or_path), dataset=loader, recipe=[modifier], pipeline="sequential")


def their_pruner(selector: str, pattern: dict[str, Any]) -> Compress:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    share = {"sparsity": pattern.get("sparsity", 0.5), "mask_structure": pattern.get("pattern", "0:0")}

    def compress(model: PreTrainedModel, windows: Tensor) -> None:
        if selector == "wanda":
            modifier = WandaPruningModifier(**share, targets=["Linear"], ignore=[HEAD])
        else:
            modifier = SparseGPTModifier(
                **share, targets=["Linear"], ignore=[HEAD], block_size=128, dampening_frac=DAMPING
            )
        oneshot(model, windows, modifier)

    return compress


def our_pruner(selector: str, pattern: dict[str, Any]) -> Compress:
    config = trimfit.PruneConfig(
        selector=selector,
        refit="own" if SELECTORS[selector].updates_weights else "none",
        target="layer",  # as the methods were published; the same holds of the next two lines
        row_weights="equal",
        guard=False,
        damping=DAMPING,
        capture="block",
        held_out=0,
        batch_size=BATCH,
        **pattern,
    )

    def compress(model: PreTrainedModel, windows: Tensor) -> None:
        trimfit.prune(model, windows, config)

    return compress


def sparsegpt_with_their_counts(pattern: dict[str, Any]) -> Compress:
    """Our SparseGPT, with ⌊s·out·columns⌋ + 1 weights pruned in each block of columns, as llm-compressor does."""

    def counts(_: object, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        return torch.tensor([int(shape[0] * (stop - start) * pattern["sparsity"]) + 1])

    def compress(model: PreTrainedModel, windows: Tensor) -> None:
        with mock.patch("trimfit.masks.sparsegpt.prune_counts", counts):
            our_pruner("sparsegpt", pattern)(model, windows)

    return compress


def wanda_with_their_counts(sparsity: float) -> Compress:
    """Our Wanda, with ⌊s·in⌋ weights pruned in each row as llm-compressor counts them."""

    def compress(model: PreTrainedModel, windows: Tensor) -> None:
        walker = Walker(model, find_blocks(model), {"fit": windows}, BATCH)
        for block in walker:
            groups = walker.groups(block)
            for group, gram in zip(groups, walker.grams(block, groups, "fit"), strict=True):
                factored = trimfit.FactoredGram(gram, DAMPING)
                pattern = Unstructured(int(len(gram) * sparsity) / len(gram), "row")
                for layer in group.layers:
                    mask = SELECTORS["wanda"].select(layer.weight, factored, pattern).mask
                    layer.write(layer.weight * mask)

    return compress


def their_gptq(bits: int, group_size: int, observer: str | None = None, **order: Any) -> Compress:
    """`observer` places scales, by their range where None; `order` is `actorder`, where it is not to be "static"."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    def compress(model: PreTrainedModel, windows: Tensor) -> None:
        names: dict[int, list[str]] = {}
        for layer in (layer for block in find_blocks(model) for layer in block.layers):
            width = layer.weight.shape[1]
            names.setdefault(Grid(bits, group_size).fitted(width).group_size or width, []).append(layer.name)
        groups = {
            f"group_{size}": QuantizationScheme(
                targets=targets,
                weights=QuantizationArgs(
                    num_bits=bits, symmetric=False, strategy="group", group_size=size, observer=observer
                ),
            )
            for size, targets in names.items()
        }
        oneshot(model, windows, GPTQModifier(config_groups=groups, ignore=[HEAD], dampening_frac=DAMPING, **order))

    return compress


def divides(bench: Bench, sparsity: float) -> bool:
    """Whether this share of each row is a whole number of weights in every layer."""
    widths = {layer.weight.shape[1] for block in find_blocks(bench.model) for layer in block.layers}
    return all((Fraction(str(sparsity)) * width).denominator == 1 for width in widths)


@dataclass(frozen=True)
class Measured:
    """The score of a compressed model, its accuracy where asked for, and where each layer's weights are not zero."""

    score: Score
    accuracy: float | None
    masks: list[Tensor]


def measure(bench: Bench, compress: Compress, windows: Tensor, task: str | None = None) -> Measured:
    """On a copy: llm-compressor leaves more behind in a model than other weights."""
    model = copy.deepcopy(bench.model)
    compress(model, windows)
    layers = [layer for block in find_blocks(model) for layer in block.layers]
    accuracy = bench.accuracy(task, model)
    masks = [layer.weight != 0 for layer in layers]
    return Measured(bench.score(model), None if accuracy is None else accuracy.value, masks)


def prune_cells(
    bench: Bench, windows: Sequence[Tensor], patterns: Sequence[str], task: str | None
) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for label in patterns:
        pattern = PATTERNS[label]
        for selector in ("sparsegpt", "wanda"):
            ours = {selector: our_pruner(selector, pattern)}
            if selector == "sparsegpt" and "sparsity" in pattern:
                ours["sparsegpt, its counts"] = sparsegpt_with_their_counts(pattern)
            if selector == "wanda" and not divides(bench, pattern.get("sparsity", 0)):
                ours["wanda, its counts"] = wanda_with_their_counts(pattern["sparsity"])
            for seed, tokens in enumerate(windows):
                theirs = measure(bench, their_pruner(selector, pattern), tokens, task)
                for name, compress in ours.items():
                    found = measure(bench, compress, tokens, task)
                    cell: dict[str, Any] = {"method": name, "pattern": label, "seed": seed}
                    cell |= {"theirs": theirs.score.perplexity, "ours": found.score.perplexity}
                    cell |= {"their_accuracy": theirs.accuracy, "accuracy": found.accuracy}
                    cell |= {"their_zeros": zeros(theirs.masks), "zeros": zeros(found.masks)}
                    cell |= {"same": agreement(found.masks, theirs.masks)}
                    cells.append(cell)
                    print(json.dumps(cell), flush=True)
    return cells


def zeros(masks: Sequence[Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def agreement(masks: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Share of the weights that both keep or both prune."""
    same = sum(int((mask == other).sum()) for mask, other in zip(masks, others, strict=True))
    return same / sum(mask.numel() for mask in masks)


def gptq_cells(bench: Bench, windows: Sequence[Tensor], bits: Sequence[int], group: int) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = []
    for width in bits:
        methods: dict[str, Compress] = {
            "GPTQ, llm-compressor": their_gptq(width, group),
            "GPTQ, llm-compressor, no order": their_gptq(width, group, actorder=None),
            "GPTQ, llm-compressor, MSE scales": their_gptq(width, group, observer="memoryless_mse"),
            "GPTQ, ours": lambda model, tokens, width=width: gptq(model, Grid(width, group), tokens),
        }
        for name, compress in methods.items():
            for seed, tokens in enumerate(windows):
                score = measure(bench, compress, tokens).score
                cell = {"method": name, "bits": width, "seed": seed, "excess": score.nats - bench.dense.nats}
                cells.append(cell)
                print(json.dumps(cell), flush=True)
    return cells


def prune_table(cells: list[dict[str, Any]]) -> str:
    heads = "method | pattern | llm-compressor | trimfit | difference | zeros, theirs / ours | same mask | accuracy"
    lines = [f"| {heads} |", "|---|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((cell["method"], cell["pattern"]) for cell in cells):
        found = [cell for cell in cells if (cell["method"], cell["pattern"]) == key]
        differences = [100 * (cell["ours"] / cell["theirs"] - 1) for cell in found]
        shares = [100 * statistics.mean(cell[name] for cell in found) for name in ("their_zeros", "zeros", "same")]
        lines.append(
            f"| {key[0]} | {key[1]} | {mean_std([cell['theirs'] for cell in found], '.3f')} | "
            f"{mean_std([cell['ours'] for cell in found], '.3f')} | {mean_std(differences, '+.2f')} % | "
            f"{shares[0]:.2f} / {shares[1]:.2f} % | {shares[2]:.2f} % | "
            f"{accuracies(found, 'their_accuracy')} / {accuracies(found, 'accuracy')} |"
        )
    return "\n".join(lines)


def accuracies(cells: list[dict[str, Any]], key: str) -> str:
    return mean_std([cell[key] for cell in cells if cell[key] is not None], ".3f")


def gptq_table(cells: list[dict[str, Any]]) -> str:
    bits = list(dict.fromkeys(cell["bits"] for cell in cells))
    lines = ["| method | " + " | ".join(f"{b} bit" for b in bits) + " |", "|---|" + "---|" * len(bits)]
    for name in dict.fromkeys(cell["method"] for cell in cells):
        row = [[cell["excess"] for cell in cells if (cell["method"], cell["bits"]) == (name, b)] for b in bits]
        lines.append(f"| {name} | " + " | ".join(mean_std(values, ".4f") for values in row) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, seeds=3)
    options.add_argument("--patterns", nargs="*", choices=PATTERNS, default=["50%", "60%", "2:4"])
    options.add_argument("--bits", type=int, nargs="*", default=[3, 4])
    options.add_argument("--group", type=int, default=64)
    add_task(options)
    arguments = options.parse_args()
    bench = Bench(arguments, float32=True)
    windows = [bench.windows(arguments.calibration, seed) for seed in range(arguments.seeds)]
    dense = bench.accuracy(arguments.task)
    pruned = prune_cells(bench, windows, arguments.patterns, arguments.task)
    quantized = gptq_cells(bench, windows, arguments.bits, arguments.group)

    print(f"\n{machine()}, llmcompressor {version('llmcompressor')}\n")
    print(
        f"{arguments.model}, {arguments.samples} calibration windows of {arguments.sequence_length} tokens "
        f"({arguments.calibration}), scored on {bench.dense.tokens:,} tokens ({arguments.text}); dense perplexity "
        f"{bench.dense.perplexity:.3f}; {arguments.seeds} seeds, mean ± std.\n"
    )
    print(prune_table(pruned))
    if dense is not None:
        print(f"\nAccuracy, theirs / ours, on {arguments.task}: dense {with_error(dense)}.")
    if quantized:
        print(f"\nGPTQ, asymmetric, groups of {arguments.group}: excess nats per token over dense:\n")
        print(gptq_table(quantized))
    if arguments.json:
        arguments.json.write_text(json.dumps({"pruned": pruned, "quantized": quantized}, indent=1))


if __name__ == "__main__":
    main()
