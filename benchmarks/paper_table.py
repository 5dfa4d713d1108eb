"""The table of the paper, with our own protocol: mask selector × weight update × sparsity, mean ± std over seeds.

    python benchmarks/paper_table.py demo --calibration demo --text demo
    python benchmarks/paper_table.py MODEL --calibration FILE --text FILE

Every cell prunes the dense model anew, each group of layers on inputs from the already pruned ones, and scores the
result on the same text. A seed chooses the calibration windows. Prints a Markdown table; --json also keeps the raw
numbers.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from common import documents, machine, quiet
from transformers import PreTrainedModel

import trimfit
from trimfit.calibration import CalibrationConfig
from trimfit.demo.run import model_path
from trimfit.evaluate import score_text
from trimfit.masks import parse_pattern
from trimfit.models import find_blocks

PATTERNS: dict[str, dict[str, float | str]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
VARIANTS = (
    ("magnitude", "none"),
    ("magnitude", "optimal"),
    ("wanda", "none"),
    ("wanda", "optimal"),
    ("sparsegpt", "none"),
    ("sparsegpt", "own"),
    ("sparsegpt", "optimal"),
    ("thanos", "none"),
    ("thanos", "own"),
    ("thanos", "optimal"),
    ("joint", "none"),
    ("joint", "optimal"),
)
# The paper's protocol: every layer at the same sparsity, its own outputs as the target, rows that count the same.
PLAIN = {"target": "layer", "allocation": "uniform", "row_weights": "equal", "guard": False}
UPDATE = {"none": "none", "own": "own", "optimal": "optimal refit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument(
        "--skip", type=float, default=0.0, help="share of the text's documents, from its start, to skip"
    )
    parser.add_argument("--characters", type=int, help="of each document to score, from its middle")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selectors", nargs="*", default=list(dict.fromkeys(name for name, _ in VARIANTS)))
    parser.add_argument("--patterns", nargs="*", help="such as 50% 2:4; all five when left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    quiet()
    source = str(model_path()) if arguments.model == "demo" else arguments.model
    checkpoint = trimfit.load_checkpoint(source)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    texts = documents(arguments.text, arguments.characters, arguments.skip)
    length = arguments.sequence_length
    dense_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = score_text(model, tokenizer, texts, length=length)

    cells: list[dict[str, object]] = []
    chosen = arguments.patterns or list(PATTERNS)
    variants = [variant for variant in VARIANTS if variant[0] in arguments.selectors]
    for seed, label, (selector, update) in itertools.product(range(arguments.seeds), chosen, variants):
        pattern = PATTERNS[label]
        calibration = CalibrationConfig(
            source=arguments.calibration, samples=arguments.samples, sequence_length=length, seed=seed
        )
        windows = calibration.windows(tokenizer, model)
        model.load_state_dict(dense_state)
        start = time.perf_counter()
        config = trimfit.PruneConfig.model_validate(
            {"selector": selector, "refit": update, "ignore": indivisible(model, pattern), **PLAIN, **pattern}
        )
        report = trimfit.prune(model, windows, config)
        seconds = time.perf_counter() - start
        score = score_text(model, tokenizer, texts, length=length)
        error = report.mean_error().held_out
        cell = {
            "pattern": label,
            "selector": selector,
            "update": update,
            "seed": seed,
            "perplexity": score.perplexity,
            "held_out_error": error,
            "certificate": report.certificate,
            "seconds": seconds,
        }
        cells.append(cell)
        print(json.dumps(cell), flush=True)

    print()
    print(machine())
    print(
        f"\n{arguments.model}, {arguments.samples} calibration windows of {length} tokens ({arguments.calibration}), "
        f"an eighth held out; scored on {dense.tokens:,} tokens ({arguments.text}), windows of {length}; "
        f"dense perplexity {dense.perplexity:.3f}. {arguments.seeds} seeds, mean ± std.\n"
    )
    print(table(cells, "perplexity", ".2f"))
    print("\nMean relative layer error on held-out tokens:\n")
    print(table(cells, "held_out_error", ".4f"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"dense": dense.perplexity, "cells": cells}, indent=1))


def indivisible(model: PreTrainedModel, pattern: dict[str, float | str]) -> tuple[str, ...]:
    """Layers whose width the pattern does not divide; they stay dense."""
    if "pattern" not in pattern:
        return ()
    m = parse_pattern(str(pattern["pattern"])).m
    layers = [layer for block in find_blocks(model) for layer in block.layers if layer.weight.shape[1] % m]
    return tuple(layer.name for layer in layers)


def table(cells: list[dict[str, object]], quantity: str, form: str) -> str:
    """Markdown: a row for each selector and update, a column for each sparsity, mean ± std of `quantity`."""
    patterns = list(dict.fromkeys(str(cell["pattern"]) for cell in cells))
    lines = ["| mask | update | " + " | ".join(patterns) + " |", "|---|---|" + "---|" * len(patterns)]
    for selector, update in VARIANTS:
        if not any((cell["selector"], cell["update"]) == (selector, update) for cell in cells):
            continue
        row = []
        for pattern in patterns:
            values = [
                float(str(cell[quantity]))
                for cell in cells
                if (cell["selector"], cell["update"], cell["pattern"]) == (selector, update, pattern)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):{form}} ± {spread:{form}}")
        lines.append(f"| {selector} | {UPDATE[update]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
