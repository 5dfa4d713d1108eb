"""What memory `trimfit prune` takes as models get more blocks and calibration more windows.

    python benchmarks/scale.py [--blocks 4 8 16 32 48] [--windows 64 128 256 512 1024]
    python benchmarks/scale.py --within 48

Models are written from a config (synthetic.py): hidden 256, 3 MiB a block in float32, in shards of 10 MB. Each cell
is a process of its own; its memory is the largest resident size that the operating system saw. Blocks vary at 64
windows of 32 tokens, windows at 4 blocks. Prints two Markdown tables, and the slopes by least squares.

`--within` follows one run with `--offload` on a model of so many blocks: the largest resident size in each twelfth of
its time, as it was looked at every 20 ms (Linux). What leaks rises from one to the next; what only varies from block
to block does not, though it lifts the peak of a longer run.

Nothing heavy is imported here: a new process begins with the peak of the one that it was forked from.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LENGTH = 32
LIMIT = "4MiB"
SLICES = 12
MODES = {
    "in memory": (),
    "`--offload`": ("--offload",),
    f"`--offload --memory-limit {LIMIT}`": ("--offload", "--memory-limit", LIMIT),
}
PRUNE = "from trimfit.cli.main import main; main()"
MACHINE = "from common import machine; print(machine())"


def write(model: Path, name: str, count: int) -> None:
    """Writes a model with so many blocks, or calibration with so many windows."""
    script = [sys.executable, str(HERE / "synthetic.py"), str(model)]
    subprocess.run([*script, f"--{name}", str(count), "--length", str(LENGTH)], check=True)


def prune(model: Path, options: tuple[str, ...]) -> list[str]:
    """The command that prunes a model into the directory `out` beside it."""
    windows = ["--calibration", str(model / "tokens.npy"), "--sequence-length", str(LENGTH)]
    out = model.parent / "out"
    return [sys.executable, "-c", PRUNE, "prune", str(model), "-o", str(out), "--json", *windows, *options]


def peak(model: Path, options: tuple[str, ...]) -> float:
    """MiB of one process that prunes."""
    command = prune(model, options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed with status {status}: {' '.join(command)}")
    shutil.rmtree(model.parent / "out")
    return usage.ru_maxrss / 1024


def within(blocks: int, extra: list[str]) -> None:
    """The peaks of one run, by the twelfths of its time."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write(model, "blocks", blocks)
        process = subprocess.Popen(prune(model, ("--offload", "--samples", "64", *extra)), stdout=subprocess.DEVNULL)
        seen: list[float] = []
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"VmRSS:\s+(\d+)", status)
            seen += [int(found[1]) / 1024] if found else []
            time.sleep(0.02)
    if process.returncode != 0:
        raise SystemExit(f"failed with status {process.returncode}")
    step = -(-len(seen) // SLICES)
    peaks = [max(seen[start : start + step]) for start in range(0, len(seen), step)]
    print(f"\n| {blocks} blocks, twelfth of the time | " + " | ".join(str(i + 1) for i in range(len(peaks))) + " |")
    print("|---" * (1 + len(peaks)) + "|")
    print("| `--offload`, MiB | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")


def series(name: str, counts: list[int], extra: list[str]) -> None:
    """A table row by row: one count, and the peak of each mode."""
    print(f"\n| {name} | " + " | ".join(f"{mode}, MiB" for mode in MODES) + " |")
    print("|---" * (1 + len(MODES)) + "|")
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write(model, name, count)
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
    parser.add_argument("--within", type=int, metavar="BLOCKS", help="follow one run in place of the tables")
    arguments, extra = parser.parse_known_args()
    line = subprocess.run([sys.executable, "-c", MACHINE], cwd=HERE, check=True, capture_output=True, text=True).stdout
    print(line.strip())
    if arguments.within:
        within(arguments.within, extra)
    for name in () if arguments.within else ("blocks", "windows"):
        if arguments.only in (None, name):
            series(name, getattr(arguments, name), extra)


if __name__ == "__main__":
    main()
