"""The table of the paper, with our own protocol: mask selector × weight update × sparsity, mean ± std over seeds.

    python benchmarks/paper_table.py demo --calibration demo --text demo
    python benchmarks/paper_table.py MODEL --calibration FILE --text FILE

Every cell prunes the dense model anew, each group of layers on inputs from the already pruned ones, and scores the
result on the same text. A seed chooses the calibration windows. With --task there is the accuracy of the first seed's
cells too. Prints Markdown tables; --json also keeps the raw numbers.
"""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import PATTERNS, Bench, add_task, indivisible, machine, mean_std, parser, with_error

import trimfit

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
    options = parser(__doc__, seeds=3)
    options.add_argument("--selectors", nargs="*", default=list(dict.fromkeys(name for name, _ in VARIANTS)))
    options.add_argument("--patterns", nargs="*", help="such as 50%% 2:4; all five when left out")
    add_task(options)
    arguments = options.parse_args()
    bench = Bench(arguments)
    dense = bench.accuracy(arguments.task)

    cells: list[dict[str, Any]] = []
    chosen = arguments.patterns or list(PATTERNS)
    variants = [variant for variant in VARIANTS if variant[0] in arguments.selectors]
    for seed, label, (selector, update) in itertools.product(range(arguments.seeds), chosen, variants):
        pattern = PATTERNS[label]
        bench.restore()
        windows = bench.windows(arguments.calibration, seed)
        start = time.perf_counter()
        config = trimfit.PruneConfig.model_validate(
            {"selector": selector, "refit": update, "ignore": indivisible(bench.model, pattern), **PLAIN, **pattern}
        )
        report = trimfit.prune(bench.model, windows, config)
        seconds = time.perf_counter() - start
        score = bench.score()
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
        if seed == 0 and (reached := bench.accuracy(arguments.task)) is not None:
            cell["accuracy"] = with_error(reached)
        cells.append(cell)
        print(json.dumps(cell), flush=True)

    print()
    print(machine())
    print(
        f"\n{arguments.model}, {arguments.samples} calibration windows of {bench.length} tokens "
        f"({arguments.calibration}), an eighth held out; scored on {bench.dense.tokens:,} tokens ({arguments.text}), "
        f"windows of {bench.length}; dense perplexity {bench.dense.perplexity:.3f}. {arguments.seeds} seeds, "
        "mean ± std.\n"
    )
    print(table(cells, lambda of: mean_std([cell["perplexity"] for cell in of], ".2f")))
    print("\nMean relative layer error on held-out tokens:\n")
    print(table(cells, lambda of: mean_std([cell["held_out_error"] for cell in of], ".4f")))
    if dense is not None:
        print(
            f"\nAccuracy on {arguments.task}, first seed, ± standard error over its {dense.examples} questions; dense "
            f"{with_error(dense)}:\n"
        )
        print(table(cells, lambda of: of[0]["accuracy"]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"dense": bench.dense.perplexity, "cells": cells}, indent=1))


def table(cells: list[dict[str, Any]], entry: Callable[[list[dict[str, Any]]], str]) -> str:
    """Markdown: a row for each selector and update, a column for each sparsity; `entry` tells of all seeds' cells."""
    patterns = list(dict.fromkeys(cell["pattern"] for cell in cells))
    lines = ["| mask | update | " + " | ".join(patterns) + " |", "|---|---|" + "---|" * len(patterns)]
    for selector, update in VARIANTS:
        if not any((cell["selector"], cell["update"]) == (selector, update) for cell in cells):
            continue
        row = [
            [cell for cell in cells if (cell["selector"], cell["update"], cell["pattern"]) == which]
            for which in ((selector, update, pattern) for pattern in patterns)
        ]
        entries = [entry(of) for of in row]
        lines.append(f"| {selector} | {UPDATE[update]} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
