"""Our best pruning beside the protocols of OPTIMA, SparseGPT and ALPS, in one run on the same windows and text.

    python benchmarks/pruning_targets.py demo --calibration demo --text demo
    python benchmarks/pruning_targets.py MODEL --calibration FIRST_HALF --text SECOND_HALF

- `best`: joint masks with an allocation by measured cost, refit, target "dense": the defaults of `trimfit prune`.
- `best, self`: the same on windows that the model itself wrote.
- `layer target`, `all of the way`, `uniform`, `equal rows`, `given order`: the best with one part changed: the target,
  `dense_share=1`, the allocation, the weights of rows of Q and K, no reordered inputs. Run when named in --methods.
- `OPTIMA`: Wanda's mask per row, optimal refit, target "layer".
- `SparseGPT`: its own mask and update, per layer.
- `ALPS`: ADMM with its own schedule, per layer, and 10 steps of conjugate gradients (benchmarks/alps.py).

All see each group of layers through what is pruned already. Excess is ln perplexity less that of the dense model.
Prints each cell as it comes, then Markdown tables.
"""

import itertools
import json
import math
import statistics
import time
from typing import Any

from alps import alps
from common import PATTERNS, Bench, indivisible, machine, mean_std, parser

import trimfit
from trimfit.masks import SELECTORS, Selector

PLAIN: dict[str, Any] = {"target": "layer", "guard": False}
METHODS: dict[str, dict[str, Any]] = {
    "best": {},
    "best, self": {},
    "layer target": {"target": "layer"},
    "all of the way": {"dense_share": 1.0},
    "uniform": {"allocation": "uniform"},
    "equal rows": {"row_weights": "equal"},
    "given order": {"reorder": False},
    "OPTIMA": {"selector": "wanda", **PLAIN},
    "SparseGPT": {"selector": "sparsegpt", "refit": "own", **PLAIN},
    "ALPS": {"selector": "alps", "refit": "own", **PLAIN},
}
DEFAULT = ["best", "best, self", "OPTIMA", "SparseGPT", "ALPS"]


def main() -> None:
    options = parser(__doc__, seeds=5)
    options.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    options.add_argument("--methods", nargs="*", default=DEFAULT)
    arguments = options.parse_args()
    SELECTORS["alps"] = Selector(alps, "layer", updates_weights=True)
    bench = Bench(arguments)

    cells: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        bench.restore()
        sources = {"self" if name.endswith("self") else arguments.calibration for name in arguments.methods}
        windows = {source: bench.windows(source, seed) for source in sources}
        for label, method in itertools.product(arguments.patterns, arguments.methods):
            bench.restore()
            pattern = PATTERNS[label]
            config = trimfit.PruneConfig.model_validate(
                {"ignore": indivisible(bench.model, pattern), **_possible(METHODS[method], pattern), **pattern}
            )
            start = time.perf_counter()
            trimfit.prune(bench.model, windows["self" if method.endswith("self") else arguments.calibration], config)
            seconds = time.perf_counter() - start
            excess = math.log(bench.score().perplexity / bench.dense.perplexity)
            cells.append({"pattern": label, "method": method, "seed": seed, "excess": excess, "seconds": seconds})
            print(json.dumps(cells[-1]), flush=True)

    print(f"\n{machine()}\n")
    print(
        f"{arguments.model}: {arguments.samples} windows of {bench.length} tokens ({arguments.calibration}), an eighth "
        f"held out; {bench.dense.tokens:,} tokens scored ({arguments.text}); dense perplexity "
        f"{bench.dense.perplexity:.3f}; {arguments.seeds} seeds, mean ± std.\n"
    )
    print(tables(cells))
    if arguments.json:
        arguments.json.write_text(json.dumps({"dense": bench.dense.perplexity, "cells": cells}, indent=1))


def _possible(options: dict[str, Any], pattern: dict[str, Any]) -> dict[str, Any]:
    """N:M leaves nothing to allocate."""
    return {name: value for name, value in options.items() if name != "allocation" or "sparsity" in pattern}


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown: excess nats; what the best has of each other method's; medians of the seconds."""
    patterns, methods = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("pattern", "method"))

    def values(method: str, pattern: str, key: str) -> list[float]:
        return [cell[key] for cell in cells if (cell["method"], cell["pattern"]) == (method, pattern)]

    def line(name: str, entries: list[str]) -> str:
        return f"| {name} | " + " | ".join(entries) + " |"

    def mean(method: str, pattern: str) -> float:
        return statistics.mean(values(method, pattern, "excess"))

    lines = [line("excess nats", patterns), "|---|" + "---|" * len(patterns)]
    for method in methods:
        entries = [mean_std(values(method, p, "excess"), ".4f") for p in patterns]
        lines.append(line(method, entries))
    lines += ["", line("best, as a share of", patterns), "|---|" + "---|" * len(patterns)]
    for method in methods[1:]:
        lines.append(line(method, [f"{mean(methods[0], p) / mean(method, p):.2f}" for p in patterns]))
    lines += ["", line("median seconds", patterns), "|---|" + "---|" * len(patterns)]
    for method in methods:
        lines.append(line(method, [f"{statistics.median(values(method, p, 'seconds')):.1f}" for p in patterns]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
