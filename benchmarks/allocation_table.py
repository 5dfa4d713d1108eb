"""Excess nats of pruning with a sparsity that is uniform, allocated by outliers (OWL), or by estimated error.

    python benchmarks/allocation_table.py demo --calibration demo --text demo --characters 4000
    python benchmarks/allocation_table.py MODEL --calibration FILE --text FILE --skip 0.85

Each cell prunes the dense model anew and refits it. Prints a Markdown table: excess nats per token over the dense
model, mean over the seeds, which choose the calibration windows; below it each seed's difference to uniform.
With --task there is a second table, of the accuracy on a task of `trimfit eval`.
"""

import itertools
import json
import statistics

from common import Bench, add_task, machine, mean_std, parser, with_error

import trimfit

METHODS = ("uniform", "owl", "error")


def main() -> None:
    options = parser(__doc__, seeds=2)
    options.add_argument("--selectors", nargs="*", default=["wanda", "sparsegpt"])
    options.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    add_task(options)
    arguments = options.parse_args()
    bench = Bench(arguments)
    excess: dict[tuple[str, float, str], list[float]] = {}
    accuracy: dict[tuple[str, float, str], list[float]] = {}
    dense_accuracy = bench.accuracy(arguments.task)
    cells = itertools.product(arguments.selectors, arguments.sparsities, range(arguments.seeds), METHODS)
    for selector, sparsity, seed, method in cells:
        bench.restore()
        asked = {"selector": selector, "sparsity": sparsity, "allocation": method, "target": "layer", "guard": False}
        config = trimfit.PruneConfig.model_validate(asked)
        trimfit.prune(bench.model, bench.windows(arguments.calibration, seed), config)
        nats = bench.score().nats - bench.dense.nats
        excess.setdefault((selector, sparsity, method), []).append(nats)
        if (reached := bench.accuracy(arguments.task)) is not None:
            accuracy.setdefault((selector, sparsity, method), []).append(reached.value)
        print(selector, sparsity, seed, method, f"{nats:.4f}", flush=True)

    dense = bench.dense
    print(f"\n{machine()}\n\n{dense.tokens:,} tokens scored, dense {dense.nats:.4f} nats; {arguments.seeds} seeds.\n")
    print("| mask | sparsity | " + " | ".join(METHODS) + " | owl − uniform | error − uniform |")
    print("|---|---|" + "---|" * (len(METHODS) + 2))
    for selector, sparsity in itertools.product(arguments.selectors, arguments.sparsities):
        columns = [excess[selector, sparsity, method] for method in METHODS]
        means = [f"{statistics.mean(values):.4f}" for values in columns]
        gains = [", ".join(f"{b - a:+.4f}" for a, b in zip(columns[0], c, strict=True)) for c in columns[1:]]
        print(f"| {selector} | {sparsity:.0%} | " + " | ".join(means + gains) + " |")
    if dense_accuracy is not None:
        print(f"\nAccuracy on {arguments.task}: dense {with_error(dense_accuracy)}.\n")
        print("| mask | sparsity | " + " | ".join(METHODS) + " |\n|---|---|" + "---|" * len(METHODS))
        for selector, sparsity in itertools.product(arguments.selectors, arguments.sparsities):
            spreads = [mean_std(accuracy[selector, sparsity, method], ".3f") for method in METHODS]
            print(f"| {selector} | {sparsity:.0%} | " + " | ".join(spreads) + " |")
    if arguments.json:
        cells = [{"selector": s, "sparsity": p, "method": m, "excess": values} for (s, p, m), values in excess.items()]
        arguments.json.write_text(json.dumps({"dense": dense.nats, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
