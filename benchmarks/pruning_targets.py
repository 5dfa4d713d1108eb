"""Our best pruning beside the protocols of OPTIMA, SparseGPT and ALPS, in one run on the same windows and text.

    python benchmarks/pruning_targets.py demo --calibration demo --text demo
    python benchmarks/pruning_targets.py MODEL --calibration FIRST_HALF --text SECOND_HALF \
        --task continuation:SECOND_HALF

- `best`: joint masks with an allocation by measured cost, refit, target "dense": the defaults of `trimfit prune`.
- `best, self`: the same on windows that the model itself wrote; `best, own too`: on as many of these beside the others.
- `layer target`, `all of the way`, `uniform`, `equal rows`, `given order`, `auto damping`, `left alone`: the best with
  one part changed: the target, `dense_share=1`, the allocation, the weights of rows of Q and K, no reordered inputs,
  damping chosen on held-out windows, no refit of layers that an N:M pattern does not divide. Run when they are named
  in --methods.
- `OPTIMA`: Wanda's mask per row, optimal refit, target "layer".
- `SparseGPT`: its own mask and update, per layer.
- `ALPS`: ADMM with its own schedule, per layer, and 10 steps of conjugate gradients (benchmarks/alps.py).

All see each group of layers through what is pruned already. Layers that an N:M pattern does not divide stay dense;
`best` refits them (`keep_dense`), and with the target "layer" of the other protocols there is nothing to refit.
Excess is ln perplexity less that of the dense model.
With --task there is the accuracy on a task of `trimfit eval` too; with --divergence the mean KL divergence from the
dense model's predictions, in nats.
Prints each cell as it comes, then Markdown tables.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from typing import Any

from alps import alps
from common import PATTERNS, Bench, add_task, indivisible, machine, mean_std, parser
from torch import Tensor

import trimfit
from trimfit.masks import SELECTORS, Selector

PLAIN: dict[str, Any] = {"target": "layer", "guard": False}
METHODS: dict[str, dict[str, Any]] = {
    "best": {},
    "best, self": {},
    "best, own too": {},
    "layer target": {"target": "layer"},
    "all of the way": {"dense_share": 1.0},
    "uniform": {"allocation": "uniform"},
    "equal rows": {"row_weights": "equal"},
    "given order": {"reorder": False},
    "auto damping": {"damping": "auto"},
    "left alone": {},
    "OPTIMA": {"selector": "wanda", **PLAIN},
    "SparseGPT": {"selector": "sparsegpt", "refit": "own", **PLAIN},
    "ALPS": {"selector": "alps", "refit": "own", **PLAIN},
}
DEFAULT = ["best", "best, self", "OPTIMA", "SparseGPT", "ALPS"]


def main() -> None:
    options = parser(__doc__, seeds=5)
    options.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    options.add_argument("--methods", nargs="*", default=DEFAULT)
    add_task(options)
    options.add_argument("--divergence", action="store_true", help="from the dense model's predictions, too")
    arguments = options.parse_args()
    SELECTORS["alps"] = Selector(alps, "layer", updates_weights=True)
    bench = Bench(arguments)
    dense = bench.accuracy(arguments.task)

    cells: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        bench.restore()
        windows = {name: _windows(bench, arguments, name, seed) for name in arguments.methods}
        for label, method in itertools.product(arguments.patterns, arguments.methods):
            bench.restore()
            pattern = PATTERNS[label]
            kept = "ignore" if method == "left alone" else "keep_dense"
            config = trimfit.PruneConfig.model_validate(
                {kept: indivisible(bench.model, pattern), **_possible(METHODS[method], pattern), **pattern}
            )
            start, processor = time.perf_counter(), time.process_time()
            trimfit.prune(bench.model, windows[method], config)
            seconds, processor = time.perf_counter() - start, time.process_time() - processor
            excess = math.log(bench.score().perplexity / bench.dense.perplexity)
            cell = {"pattern": label, "method": method, "seed": seed, "excess": excess, "seconds": seconds}
            cell["processor_seconds"] = processor  # what other work on the machine lengthens least
            if (reached := bench.accuracy(arguments.task)) is not None:
                cell["accuracy"] = reached.value
            if arguments.divergence:
                cell["divergence"] = bench.divergence()
            cells.append(cell)
            print(json.dumps(cells[-1]), flush=True)

    print(f"\n{machine()}\n")
    print(
        f"{arguments.model}: {arguments.samples} windows of {bench.length} tokens ({arguments.calibration}), an eighth "
        f"held out; {bench.dense.tokens:,} tokens scored ({arguments.text}); dense perplexity "
        f"{bench.dense.perplexity:.3f}; {arguments.seeds} seeds, mean ± std.\n"
    )
    print(tables(cells))
    if arguments.divergence:
        print("\n" + table(cells, "divergence", ".4f"))
    if dense is not None:
        print(f"\nAccuracy on {arguments.task}: dense {dense.value:.3f} ± {dense.standard_error:.3f}.\n")
        print(table(cells, "accuracy", ".3f"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"dense": bench.dense.perplexity, "cells": cells}, indent=1))


def _windows(bench: Bench, arguments: argparse.Namespace, method: str, seed: int) -> Tensor:
    own = arguments.samples if method.endswith("own too") else 0
    return bench.windows("self" if method.endswith("self") else arguments.calibration, seed, own=own)


def _possible(options: dict[str, Any], pattern: dict[str, Any]) -> dict[str, Any]:
    """N:M leaves nothing to allocate."""
    return {name: value for name, value in options.items() if name != "allocation" or "sparsity" in pattern}


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown: excess nats; what the best has of each other method's; medians of the seconds."""
    patterns, methods = _axes(cells)

    def mean(method: str, pattern: str) -> float:
        return statistics.mean(_values(cells, method, pattern, "excess"))

    shares = [_line("best, as a share of", patterns), _rule(patterns)]
    for method in methods[1:]:
        shares.append(_line(method, [f"{mean(methods[0], p) / mean(method, p):.2f}" for p in patterns]))
    times: list[str] = []
    for key in ("seconds", "processor_seconds"):
        times += ["", _line(f"median {key.replace('_', ' ')}", patterns), _rule(patterns)]
        for method in methods:
            times.append(_line(method, [f"{statistics.median(_values(cells, method, p, key)):.1f}" for p in patterns]))
    return "\n".join([table(cells, "excess", ".4f", "excess nats"), "", *shares, *times])


def table(cells: list[dict[str, Any]], key: str, form: str, title: str | None = None) -> str:
    """Markdown: one figure of the cells, mean ± std over the seeds."""
    patterns, methods = _axes(cells)
    lines = [_line(title or key, patterns), _rule(patterns)]
    lines += [_line(method, [mean_std(_values(cells, method, p, key), form) for p in patterns]) for method in methods]
    return "\n".join(lines)


def _axes(cells: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    patterns, methods = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("pattern", "method"))
    return patterns, methods


def _values(cells: list[dict[str, Any]], method: str, pattern: str, key: str) -> list[float]:
    return [cell[key] for cell in cells if (cell["method"], cell["pattern"]) == (method, pattern)]


def _line(name: str, entries: list[str]) -> str:
    return f"| {name} | " + " | ".join(entries) + " |"


def _rule(patterns: list[str]) -> str:
    return "|---|" + "---|" * len(patterns)


if __name__ == "__main__":
    main()
