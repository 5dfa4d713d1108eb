"""Memory and open files of one process that prunes a tiny model 200 times, one time after the other.

    python benchmarks/soak.py

`in memory` calls `trimfit.prune` on a loaded model; the others go from files to files, with all of the model loaded or
one block, with Wanda and, the last, with all defaults: `joint`, dense target, allocation by error. Nothing may grow but
by what the allocator scatters.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import machine, quiet
from synthetic import SHAPES, build, save, tokens
from torch import Tensor

from trimfit import CalibrationConfig, PruneConfig, prune, prune_checkpoint
from trimfit.heap import trim_heap

CPU = torch.device("cpu")
CONFIG = PruneConfig(selector="wanda", target="layer")
WINDOWS, LENGTH = 4, 32


def held() -> tuple[float, int, int, int]:
    """MiB in memory, tensors, open files, and files mapped into memory, once what is not needed was given back."""
    gc.collect()
    trim_heap()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    alive = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
    maps = Path("/proc/self/maps").read_text().splitlines()
    return resident, alive, len(os.listdir("/proc/self/fd")), sum("safetensors" in m or "states-" in m for m in maps)


def ways(folder: Path) -> dict[str, Callable[[], object]]:
    """How a model can be pruned once more."""
    config = SHAPES["tiny"]
    model = build(config, torch.float32, CPU)
    save(model, folder / "model", "1MB")
    windows = tokens(config, WINDOWS, LENGTH)
    np.save(folder / "tokens.npy", windows.numpy())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = CalibrationConfig(source=str(folder / "tokens.npy"), samples=WINDOWS, sequence_length=LENGTH)

    def in_memory() -> None:
        model.load_state_dict(weights)
        prune(model, windows, CONFIG)

    def from_files(offload: bool, config: PruneConfig = CONFIG) -> None:
        source, out, limit = str(folder / "model"), folder / "out", 1000 if offload else None
        options = {"device": CPU, "overwrite": True, "offload": offload, "memory_limit": limit}
        prune_checkpoint(source, out, config, calibration, **options)

    return {
        "in memory": in_memory,
        "from files to files": lambda: from_files(False),
        "… `--offload`, hidden states in files": lambda: from_files(True),
        "… with all defaults": lambda: from_files(True, PruneConfig()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--every", type=int, default=40)
    arguments = parser.parse_args()
    quiet()
    print(f"{machine()}\n\n| way | prunes | memory, MiB | tensors | open files | mapped files |\n{'|---' * 6}|")
    with tempfile.TemporaryDirectory() as folder:
        for name, run in ways(Path(folder)).items():
            for done in range(1, arguments.runs + 1):
                run()
                if done % arguments.every == 0:
                    resident, *counts = held()
                    print(f"| {name} | {done} | {resident:.1f} | {' | '.join(map(str, counts))} |", flush=True)


if __name__ == "__main__":
    main()
