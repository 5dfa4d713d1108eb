"""What memory `trimfit prune` takes as models get more blocks and calibration more windows.

    python benchmarks/scale.py [--blocks 4 8 16 32 48] [--windows 64 128 256 512 1024]

Models are written from a config (synthetic.py): hidden 256, 3 MiB a block in float32, in shards of 10 MB. Each cell
is a process of its own; its memory is the largest resident size that the operating system saw. Blocks vary at 64
windows of 32 tokens, windows at 4 blocks. Prints two Markdown tables, and the slopes by least squares.

Nothing heavy is imported here: a new process begins with the peak of the one that it was forked from.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LENGTH = 32
LIMIT = "4MiB"
MODES = {
    "in memory": (),
    "`--offload`": ("--offload",),
    f"`--offload --memory-limit {LIMIT}`": ("--offload", "--memory-limit", LIMIT),
}
PRUNE = "from trimfit.cli.main import main; main()"
MACHINE = "from common import machine; print(machine())"


def peak(model: Path, options: tuple[str, ...]) -> float:
    """MiB of one process that prunes."""
    out = model.parent / "out"
    windows = ["--calibration", str(model / "tokens.npy"), "--sequence-length", str(LENGTH)]
    command = [sys.executable, "-c", PRUNE, "prune", str(model), "-o", str(out), "--json", *windows, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    shutil.rmtree(out)
    return usage.ru_maxrss / 1024


def series(name: str, counts: list[int], extra: list[str]) -> None:
    """A table row by row: one count, and the peak of each mode."""
    print(f"\n| {name} | " + " | ".join(f"{mode}, MiB" for mode in MODES) + " |")
    print("|---" * (1 + len(MODES)) + "|")
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write = [
                sys.executable,
                str(HERE / "synthetic.py"),
                str(model),
                f"--{name}",
                str(count),
                "--length",
                str(LENGTH),
            ]
            subprocess.run(write, check=True)
            for mode, options in MODES.items():
                samples = ["--samples", str(count if name == "windows" else 64)]
                found[mode].append(peak(model, (*options, *samples, *extra)))
        print(f"| {count} | " + " | ".join(f"{peaks[-1]:.0f}" for peaks in found.values()) + " |", flush=True)
    slopes = [statistics.linear_regression(counts, peaks).slope for peaks in found.values()]
    print(f"| slope, MiB for each of the {name} | " + " | ".join(f"{slope:.3f}" for slope in slopes) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32, 48])
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--only", choices=("blocks", "windows"))
    arguments, extra = parser.parse_known_args()
    line = subprocess.run([sys.executable, "-c", MACHINE], cwd=HERE, check=True, capture_output=True, text=True).stdout
    print(line.strip())
    for name in ("blocks", "windows"):
        if arguments.only in (None, name):
            series(name, getattr(arguments, name), extra)


if __name__ == "__main__":
    main()
