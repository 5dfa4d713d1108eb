"""What the cells of a small comparison compute alike, and what share of the time of the grid that is.

    python benchmarks/compare_shares.py demo --calibration demo --text demo

The grid: the selectors wanda and joint at 50 % and 60 %, optimal refit, target dense. Prints processor seconds of each
cell, scoring included, and of what all of them, or those with an allocation by cost, have in common: how the blocks are
called, the first Gram matrix with its factors, and what the allocation goes by.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

from common import Bench, machine, parser

import trimfit
from trimfit.calibration import split_held_out
from trimfit.models import Walker, find_blocks
from trimfit.pipelines.pruning.allocate import measure
from trimfit.refit import FactoredGram


def main() -> None:
    arguments = parser(__doc__, seeds=1).parse_args()
    bench = Bench(arguments)
    tokens = bench.windows(arguments.calibration, 0)
    print(f"{machine()}\n")

    parts = {"finding how blocks are called, first hidden states": seconds(lambda: next(iter(walk(bench, tokens))))}
    walker = walk(bench, tokens)
    block = next(iter(walker))
    first = walker.groups(block)[:1]
    parts["first Gram matrix, factorised"] = seconds(
        lambda: FactoredGram(walker.moments(block, first, "fit")[0].gram, 0.01).inverse
    )
    parts["costs for the allocation"] = seconds(
        lambda: measure(bench.model, find_blocks(bench.model), split_held_out(tokens, 0.125)[0], method="error")
    )
    total = 0.0
    for selector, sparsity in itertools.product(("wanda", "joint"), (0.5, 0.6)):
        bench.restore()
        config = trimfit.PruneConfig(selector=selector, sparsity=sparsity, guard=False)
        cell = seconds(lambda config=config: (trimfit.prune(bench.model, tokens, config), bench.score()))
        print(f"{selector} at {sparsity:.0%}: {cell:.1f} s")
        total += cell
    print(f"all cells: {total:.1f} s\n")
    for name, part in parts.items():
        again = 1 if "allocation" in name else 3  # of four cells; only those of joint ask for an allocation
        print(f"{name}: {part:.2f} s, {again * part / total:.1%} of the grid is done again")


def walk(bench: Bench, tokens: Any) -> Walker:
    """As `prune` walks for the target dense."""
    fit, held_out = split_held_out(tokens, 0.125)
    return Walker(bench.model, find_blocks(bench.model), {"fit": fit, "held_out": held_out}, dense=True)


def seconds(work: Callable[[], Any]) -> float:
    """Processor seconds that it takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
