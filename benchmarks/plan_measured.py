"""What `trimfit prune --plan` and `quantize --plan` say beside what the run takes: CPU seconds and peak of a process.

    python benchmarks/plan_measured.py [--shape 100M --blocks 2] [--cases dense packed ...]

`--shape` is a model from a config with synthetic weights (synthetic.py) and 64 windows of 512 tokens; without it the
embedded model and 64 of 256. Seconds are those beyond a process that only imports. Prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine
from prune_time import write

COMMAND = "from trimfit.cli.main import main; main()"
IMPORTS = "from trimfit import prune_checkpoint, quantize_checkpoint; import trimfit.pipelines.planning.plan"
WINDOWS = ("--calibration", "demo", "--samples", "64", "--sequence-length", "256")
CASES = {
    "prune: Wanda, layer target": ["prune", "--selector", "wanda", "--target", "layer", *WINDOWS],
    "prune: joint, dense target": ["prune", *WINDOWS],
    "prune: joint, offloaded": ["prune", "--offload", *WINDOWS],
    "dense": ["quantize", "--format", "dense"],
    "dense, offloaded": ["quantize", "--format", "dense", "--offload"],
    "packed": ["quantize"],
    "packed, calibrated": ["quantize", *WINDOWS],
    "packed, calibrated, offloaded": ["quantize", *WINDOWS, "--offload"],
    "packed, nearest": ["quantize", "--transform", "none", "--rounding", "nearest"],
    "packed, paper": ["quantize", "--transform", "paper"],
    "packed, symmetric": ["quantize", "--symmetric"],
    "gguf": ["quantize", "--format", "gguf", "--symmetric", "--group-size", "32"],
    "online": ["quantize", "--transform", "online"],
}


def measure(code: str, *arguments: str) -> tuple[float, float]:
    """CPU seconds and peak MiB of a process."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(arguments)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def plan(*arguments: str) -> tuple[float, float, dict[str, float]]:
    """Seconds in all, MiB of the largest stage, and seconds by stage, as they are planned."""
    command = [sys.executable, "-c", COMMAND, *arguments, "--plan", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return sum(found["seconds"].values()), max(one["host"] for one in found["peaks"]) / 2**20, found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    print(
        f"{machine()}\n\n| case | planned, s | measured, s | ratio | planned, MiB | measured, MiB | ratio |", flush=True
    )
    print("|---" * 7 + "|", flush=True)
    start, _ = measure(IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        model, windows = "demo", []
        if arguments.shape:
            model = str(Path(folder) / "model")
            windows = write(arguments.shape, arguments.blocks, Path(folder) / "model")
        stages: dict[str, dict[str, float]] = {}
        for name in arguments.cases:
            verb, *chosen = CASES[name]
            drawn = windows if "--calibration" in chosen else []  # given last, so they replace the case's own
            options = [verb, model, "-o", str(Path(folder) / "out"), "--overwrite", *chosen, *drawn]
            seconds, mebibytes, stages[name] = plan(*options)
            taken, peak = measure(COMMAND, *options, "--json")
            taken -= start
            print(
                f"| {name} | {seconds:.1f} | {taken:.1f} | {seconds / taken:.2f} "
                f"| {mebibytes:.0f} | {peak:.0f} | {mebibytes / peak:.2f} |",
                flush=True,
            )
    for name, found in stages.items():
        print(f"\n{name}, planned: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.items()))


if __name__ == "__main__":
    main()
