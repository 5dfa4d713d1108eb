"""Time by stage, achieved rates and peak memory on this machine's GPU, for the shapes of known models.

    pip install -e .                                                # in a bare checkout; keeps a torch that is there
    python benchmarks/gpu.py [--shapes Llama-3.2-1B Llama-3.1-8B Gemma-2-9B] [--blocks 4] [--windows 128 --length 2048]
    python benchmarks/gpu.py --size tiny                                          # on any CPU, in seconds

Nothing is downloaded: models are built from their configs, with weights whose activations have spectra and outlier
channels like those of trained models (synthetic.py tells how), and written to a temporary directory (--folder), where
there must be room for two of the largest. `--shapes tiny --windows 8 --length 64` is a first try on a
GPU; `--size tiny` stays on the CPU. Each row is a whole `prune --offload` of that checkpoint, from its files to the
output's; "opening and closing" is what is before and behind the blocks: fingerprint, windows, verification. With
--blocks K only the first K blocks are built and pruned; the column "whole model" is then the time multiplied by
blocks / K: an extrapolation, not a measurement. It leaves out what grows with the square of the blocks, the forward
passes of the allocation of `joint`.

Shares are what the arithmetic of docs/scale.md counts for a stage, over the time that the stage took and the rate that
was measured in the same run: of a large matrix product in the dtype concerned ("GEMM"), of a copy ("memory"). Products
within the solver are counted where they are made: on a GPU they are in TF32, or three of it for one, which are three
for the share of the TF32 rate ("of TF32 GEMM": how near the device is to its limit, which is to be half at least) and
one for that of the float32 rate. Of matrices so badly conditioned that the solver works in float64 both say too little.
"""

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import machine, quiet
from synthetic import SHAPES, build, save, tokens
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from trimfit import (
    CalibrationConfig,
    PruneConfig,
    PruneReport,
    QuantizeConfig,
    QuantizeReport,
    prune_checkpoint,
    timing,
)
from trimfit.calibration import held_out_count
from trimfit.models.outline import outline
from trimfit.pipelines import quantize_checkpoint
from trimfit.pipelines.planning.prune_cost import Costs, Job
from trimfit.precision import Factor, tensor_float32
from trimfit.throughput import Throughput, gemm_rate, measure_throughput

STAGES = ("allocation", "forward", "gram", "factorisation", "order", "mask", "refit", "errors", "load", "save")
QUANTIZING = ("fold", "moments", "round")  # `quantize` has these and those two of above that it needs
METHODS = {
    "Wanda + refit": {"selector": "wanda", "target": "layer"},
    "SparseGPT + refit": {"selector": "sparsegpt", "target": "layer"},
    "joint + dense target": {"selector": "joint", "target": "dense"},
}
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}


@dataclass(frozen=True)
class Case:
    """One model on one device: its checkpoint, with `blocks` of the `whole` number of blocks, and its windows."""

    name: str
    config: PreTrainedConfig
    whole: int
    source: Path
    windows: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    rates: Throughput
    tensor_float32: float  # flops per second of a product in TF32, where the device has it

    @property
    def times(self) -> float:
        """What seconds are multiplied by for the whole model."""
        return self.whole / self.config.num_hidden_layers

    @property
    def out(self) -> Path:
        """Where outputs are written, and removed again: there is room for one beside the source."""
        return self.source.with_name("out")


@dataclass
class Products:
    """Flops of a solver within refits: as if each product were one, and as they are multiplied."""

    once: float = 0.0
    in_parts: float = 0.0

    @contextmanager
    def counted(self) -> Generator[None]:
        """Counts while the context lasts."""
        plain = Factor.product

        def counting(factor: Factor, a: Tensor) -> Tensor:
            if timing.current_stage() == "refit":
                flops = 2.0 * a.numel() * a.shape[-1]  # the factor is square
                self.once += flops
                self.in_parts += flops * factor.products
            return plain(factor, a)

        with mock.patch.object(Factor, "product", counting):
            yield


@dataclass(frozen=True)
class Measured:
    """A run: its report, what its refits multiplied, seconds from its start to its end, and peaks of memory in GiB."""

    report: PruneReport
    products: Products
    seconds: float
    device: str
    host: str


def cases(
    names: list[str], blocks: int | None, windows: tuple[int, int], device: torch.device, folder: str | None
) -> Iterator[Case]:
    """Each model in turn, in files that are there until the next is asked for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_throughput(device, dtype)
    with tensor_float32(device, allowed=True):
        quick = gemm_rate(device, torch.float32)
    print(
        f"GEMM: {rates.model / 1e12:.3g} Tflop/s in {dtype}, {quick / 1e12:.3g} in TF32, "
        f"{rates.float32 / 1e12:.3g} in float32, {rates.float64 / 1e12:.3g} in float64; "
        f"memory {rates.memory / 1e12:.3g} TB/s"
    )
    for name in names:
        config = deepcopy(SHAPES[name])
        whole = config.num_hidden_layers
        config.num_hidden_layers = min(blocks or whole, whole)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        with tempfile.TemporaryDirectory(dir=folder) as there:
            source = Path(there) / "model"
            save(build(config, dtype, device), source, "5GB")
            np.save(source / "tokens.npy", tokens(config, *windows).numpy())
            yield Case(name, config, whole, source, windows, dtype, device, rates, quick)


def measure(case: Case, method: Mapping[str, str], pattern: Mapping[str, object], batch: int) -> Measured:
    """Prunes the checkpoint, one block in memory at a time."""
    config = PruneConfig.model_validate({**method, **pattern, "batch_size": batch})
    count, length = case.windows
    calibration = CalibrationConfig(source=str(case.source / "tokens.npy"), samples=count, sequence_length=length)
    _reset_peaks(case.device)
    start, products = time.perf_counter(), Products()
    with products.counted():
        report = prune_checkpoint(str(case.source), case.out, config, calibration, device=case.device, offload=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(case.out)
    return Measured(report, products, seconds, *_peaks(case.device))


def row(case: Case, method: str, pattern: str, measured: Measured) -> list[str]:
    """Of the table."""
    report, products = measured.report, measured.products
    counted = _counted(case, report)
    return [
        case.name,
        method,
        pattern,
        f"{case.config.num_hidden_layers} of {case.whole}",
        f"{measured.seconds:.1f}",
        f"{measured.seconds * case.times:.0f}",
        *_stages(report),
        f"{report.seconds - sum(report.stages.values()):.2f}",
        f"{measured.seconds - report.seconds:.2f}",
        str(report.steps),
        f"{_share(case, counted, report, 'forward', case.rates.float32):.0%}",
        f"{_share(case, counted, report, 'gram', case.tensor_float32):.0%}",
        f"{_refit_share(case, counted, report, products.in_parts / case.tensor_float32):.0%}",
        f"{_refit_share(case, counted, report, products.once / case.rates.float32):.0%}",
        f"{_memory_share(case, counted, report):.0%}",
        f"{report.certificate:.0e}",
        measured.device,
        measured.host,
    ]


HEADER = [
    *("model", "method", "pattern", "blocks", "s", "whole model, s (× blocks)"),
    *(f"{stage}, s" for stage in (*STAGES, *QUANTIZING)),
    *("other, s", "opening and closing, s", "steps"),
    *("forward, of GEMM", "Gram, of TF32 GEMM", "refit, of TF32 GEMM", "refit, of float32 GEMM", "refit, of memory"),
    *("certificate", "device, GiB", "host, GiB"),
]


def _stages(report: PruneReport | QuantizeReport) -> list[str]:
    return [f"{report.stages[stage]:.2f}" if stage in report.stages else "–" for stage in (*STAGES, *QUANTIZING)]


def _counted(case: Case, report: PruneReport) -> Costs:
    """With the steps that were really taken, on average over the layers by size; the plan adds those of Q and K."""
    alone = [record for record in report.layers if record.rows == "equal"]
    sizes = [record.shape[0] * record.shape[1] ** 2 for record in alone]
    steps = sum(size * (record.steps or 0) for size, record in zip(sizes, alone, strict=True)) / sum(sizes)
    count, length = case.windows
    held_out = held_out_count(count, report.config.held_out)
    job = Job(report.config, count - held_out, held_out, offload=True, solver_steps=round(steps))
    return job.costs(outline(case.config, case.dtype, length))


def _share(case: Case, counted: Costs, report: PruneReport, stage: str, float32: float) -> float:
    """Of the rate of matrix products, those of float32 numbers taken to run at the rate `float32`."""
    rates = {"model": case.rates.model, "float32": float32, "float64": case.rates.float64}
    ideal = sum(counted[stage][kind] / rate for kind, rate in rates.items())
    return ideal / max(report.stages.get(stage, 0.0), 1e-9)


def _refit_share(case: Case, counted: Costs, report: PruneReport, solver: float) -> float:
    """Of the rate of matrix products, those of the solver taking so many seconds; certificates are in float64."""
    ideal = solver + counted["refit"]["float64"] / case.rates.float64
    return ideal / max(report.stages.get("refit", 0.0), 1e-9)


def _memory_share(case: Case, counted: Costs, report: PruneReport) -> float:
    return counted["refit"]["memory"] / case.rates.memory / max(report.stages.get("refit", 0.0), 1e-9)


def _reset_peaks(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # of this process; Linux


def _peaks(device: torch.device) -> tuple[str, str]:
    """Of the device and of the host, in GiB, since they were reset."""
    on_device = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device.type == "cuda" else "–"
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return on_device, f"{int(status['VmHWM'].split()[0]) / 2**20:.2f}"


def quantize_row(case: Case) -> list[str]:
    """Of the table, for `quantize` with the transform `free`, which reads no data."""
    config = QuantizeConfig(transform="free", group_size=min(128, case.config.hidden_size))
    _reset_peaks(case.device)
    start = time.perf_counter()
    report = quantize_checkpoint(str(case.source), case.out, config, device=case.device)
    seconds = time.perf_counter() - start
    shutil.rmtree(case.out)
    blocks, whole = f"{case.config.num_hidden_layers} of {case.whole}", f"{seconds * case.times:.0f}"
    timed = [*_stages(report), f"{report.seconds - sum(report.stages.values()):.2f}", f"{seconds - report.seconds:.2f}"]
    row = [case.name, "quantize free", "4 bit", blocks, f"{seconds:.1f}", whole, *timed]
    return [*row, *["–"] * (len(HEADER) - len(row) - 2), *_peaks(case.device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B"])
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: a test of this script")
    parser.add_argument("--blocks", type=int, help="build only so many blocks of each model, and extrapolate")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", help="for the models; that of temporary files by default")
    a = parser.parse_args()
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.size == "tiny":
        a.shapes, a.windows, a.length, device = ["tiny"], 8, 64, torch.device("cpu")
    print(machine())
    started = False
    for case in cases(a.shapes, a.blocks, (a.windows, a.length), device, a.folder):
        if not started:
            print(f"{a.windows} windows of {a.length} tokens\n\n| " + " | ".join(HEADER) + " |")
            print("|---" * len(HEADER) + "|")
            started = True
        for method, options in METHODS.items():
            for pattern, sparsity in PATTERNS.items():
                measured = measure(case, options, sparsity, a.batch_size)
                print("| " + " | ".join(row(case, method, pattern, measured)) + " |", flush=True)
        print("| " + " | ".join(quantize_row(case)) + " |", flush=True)


if __name__ == "__main__":
    main()
