"""Whole-process wall time and peak memory of `trimfit prune`: refitted against mask only, run in turn.

    python benchmarks/prune_time.py [--model demo] [--runs 5]

The ratio is taken pair by pair, so it holds when the machine's speed drifts. Prints a Markdown table.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine

CASES = (("wanda", "--sparsity=0.5"), ("wanda", "--pattern=2:4"), ("sparsegpt", "--sparsity=0.5"))


def measure(model: str, selector: str, pattern: str, refit: str, extra: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    out = Path(tempfile.mkdtemp()) / "out"
    command = [sys.executable, "-c", "from trimfit.cli.main import main; main()", "prune", model, "-o", str(out)]
    command += [pattern, "--selector", selector, "--refit", refit, "--json", *extra]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    shutil.rmtree(out.parent)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    arguments, extra = parser.parse_known_args()
    print(machine())
    print("\n| selector | pattern | mask only, s | refitted, s | time ratio | mask only, MiB | refitted, MiB |")
    print("|---|---|---|---|---|---|---|")
    for selector, pattern in CASES:
        measure(arguments.model, selector, pattern, "none", extra)  # warm-up
        pairs = [
            (
                measure(arguments.model, selector, pattern, "none", extra),
                measure(arguments.model, selector, pattern, "optimal", extra),
            )
            for _ in range(arguments.runs)
        ]
        mask_only, refitted = ([pair[i] for pair in pairs] for i in (0, 1))
        median = statistics.median
        print(
            f"| {selector} | {pattern.split('=')[1]} | {median(s for s, _ in mask_only):.1f} "
            f"| {median(s for s, _ in refitted):.1f} | {median(b[0] / a[0] for a, b in pairs):.2f} "
            f"| {median(m for _, m in mask_only):.0f} | {median(m for _, m in refitted):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
