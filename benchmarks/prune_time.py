"""Whole-process wall time, CPU time and peak memory of `trimfit prune`: refitted against mask only, run in turn.

    python benchmarks/prune_time.py [--model demo] [--runs 5]
    python benchmarks/prune_time.py --shape 100M --runs 1 --cases wanda:0.5 [--blocks 2]

The ratio is taken pair by pair, so it holds when the machine's speed drifts; that of CPU seconds holds when other jobs
run. `--shape` is a model from a config with synthetic weights (synthetic.py), 64 windows of 512 tokens; with `--blocks`
only so many of its blocks. Prints Markdown tables: the processes, and the stages of the refitted run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine

CASES = {
    "wanda:0.5": ("wanda", "--sparsity=0.5"),
    "wanda:2:4": ("wanda", "--pattern=2:4"),
    "sparsegpt:0.5": ("sparsegpt", "--sparsity=0.5"),
}
WINDOWS, LENGTH = 64, 512


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak MiB, and what it reported."""

    seconds: float
    cpu: float
    mebibytes: float
    report: dict[str, Any]


def measure(model: str, selector: str, pattern: str, refit: str, extra: list[str]) -> Run:
    """Prunes in a process of its own."""
    out = Path(tempfile.mkdtemp()) / "out"
    command = [sys.executable, "-c", "from trimfit.cli.main import main; main()", "prune", model, "-o", str(out)]
    command += [pattern, "--selector", selector, "--refit", refit, "--json", *extra]
    with tempfile.TemporaryFile("w+") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        printed.seek(0)
        text = printed.read()
    shutil.rmtree(out.parent)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, json.loads(text))


def write(shape: str, blocks: int | None, folder: Path) -> list[str]:
    """Writes a synthetic model to `folder`; returns the options that give its windows."""
    command = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(folder), "--shape", shape]
    command += ["--windows", str(WINDOWS), "--length", str(LENGTH), "--shard-size", "1GB"]
    subprocess.run(command + (["--blocks", str(blocks)] if blocks else []), check=True)
    ids = ["--calibration", str(folder / "tokens.npy")]
    return [*ids, "--samples", str(WINDOWS), "--sequence-length", str(LENGTH)]


def compare(model: str, cases: list[str], runs: int, extra: list[str]) -> None:
    """Prints the tables."""
    print(
        "\n| selector | pattern | mask only, s | refitted, s | ratio | CPU: mask only, s | refitted, s | ratio ", end=""
    )
    print("| mask only, MiB | refitted, MiB |\n|---|---|---|---|---|---|---|---|---|---|")
    stages: dict[str, dict[str, float]] = {}
    for selector, pattern in (CASES[case] for case in cases):
        if runs > 1:
            measure(model, selector, pattern, "none", extra)  # warm-up
        pairs = [
            (measure(model, selector, pattern, "none", extra), measure(model, selector, pattern, "optimal", extra))
            for _ in range(runs)
        ]

        def median(name: str, which: int, pairs: list[tuple[Run, Run]] = pairs) -> float:
            return statistics.median(getattr(pair[which], name) for pair in pairs)

        print(
            f"| {selector} | {pattern.split('=')[1]} | {median('seconds', 0):.1f} | {median('seconds', 1):.1f} "
            f"| {statistics.median(b.seconds / a.seconds for a, b in pairs):.2f} "
            f"| {median('cpu', 0):.1f} | {median('cpu', 1):.1f} "
            f"| {statistics.median(b.cpu / a.cpu for a, b in pairs):.2f} "
            f"| {median('mebibytes', 0):.0f} | {median('mebibytes', 1):.0f} |",
            flush=True,
        )
        report = pairs[-1][1].report
        stages[f"{selector}, {pattern}"] = {**report["stages"], "all of the pruning": report["seconds"]}
    names = list(next(iter(stages.values())))
    print("\n| of the last refitted run, s | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for case, seconds in stages.items():
        print(f"| {case} | " + " | ".join(f"{seconds.get(name, 0.0):.1f}" for name in names) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=5)
    arguments, extra = parser.parse_known_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            arguments.model = str(Path(folder) / "model")
            extra = [*write(arguments.shape, arguments.blocks, Path(folder) / "model"), *extra]
        compare(arguments.model, arguments.cases, arguments.runs, extra)


if __name__ == "__main__":
    main()
