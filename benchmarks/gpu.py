"""Time by stage, achieved rates and peak memory on this machine's GPU, for the shapes of known models.

    python benchmarks/gpu.py [--shapes Llama-3.2-1B Llama-3.1-8B Gemma-2-9B] [--blocks 4] [--windows 128 --length 2048]
    python benchmarks/gpu.py --size tiny                                          # on any CPU, in seconds

From a bare checkout, with nothing downloaded: models are built from their configs, with weights whose activations have
spectra and outlier channels like those of trained models (synthetic.py tells how). With --blocks K only the first K
blocks are built and pruned; the column "whole model" is then the time multiplied by blocks / K: an extrapolation, not a
measurement. It leaves out what grows with the square of the blocks, the forward passes of the allocation of `joint`.

Shares are what the arithmetic of docs/scale.md counts for a stage, over the time that the stage took and the rate that
was measured in the same run: of a large matrix product in the dtype concerned ("GEMM"), of a copy ("memory").
"""

import argparse
import resource
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from common import machine, quiet
from synthetic import SHAPES, build, fill, tokens
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from trimfit import PruneConfig, PruneReport, QuantizeConfig, prune, quantize
from trimfit.calibration import held_out_count
from trimfit.models.outline import outline
from trimfit.pipelines.cost import Costs, Job, costs
from trimfit.throughput import Throughput, measure_throughput

STAGES = ("forward", "gram", "factorisation", "mask", "refit", "errors", "load")
METHODS = {
    "Wanda + refit": {"selector": "wanda", "target": "layer"},
    "SparseGPT + refit": {"selector": "sparsegpt", "target": "layer"},
    "joint + dense target": {"selector": "joint", "target": "dense"},
}
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}


@dataclass(frozen=True)
class Case:
    """One model on one device: as built, with `blocks` of the `whole` number of blocks, and its windows."""

    name: str
    config: PreTrainedConfig
    whole: int
    model: PreTrainedModel
    windows: torch.Tensor
    rates: Throughput

    @property
    def times(self) -> float:
        """What seconds are multiplied by for the whole model."""
        return self.whole / self.config.num_hidden_layers


def cases(names: list[str], blocks: int | None, shape: tuple[int, int], device: torch.device) -> Iterator[Case]:
    """Each model in turn, on the device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_throughput(device, dtype)
    print(
        f"GEMM: {rates.model / 1e12:.3g} Tflop/s in {dtype}, {rates.float32 / 1e12:.3g} in float32, "
        f"{rates.float64 / 1e12:.3g} in float64; memory {rates.memory / 1e12:.3g} TB/s"
    )
    for name in names:
        config = deepcopy(SHAPES[name])
        whole = config.num_hidden_layers
        config.num_hidden_layers = min(blocks or whole, whole)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        model = build(config, dtype, device)
        yield Case(name, config, whole, model, tokens(config, *shape), rates)


def measure(case: Case, method: Mapping[str, str], pattern: Mapping[str, object], batch: int) -> PruneReport:
    """Prunes the model, as it was built."""
    fill(case.model)
    if case.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return prune(case.model, case.windows, PruneConfig.model_validate({**method, **pattern, "batch_size": batch}))


def row(case: Case, method: str, pattern: str, report: PruneReport) -> list[str]:
    """Of the table."""
    counted = _counted(case, report)
    other = report.seconds - sum(report.stages.values())
    return [
        case.name,
        method,
        pattern,
        f"{case.config.num_hidden_layers} of {case.whole}",
        f"{report.seconds:.1f}",
        f"{report.seconds * case.times:.0f}",
        *(f"{report.stages.get(stage, 0.0):.2f}" for stage in STAGES),
        f"{other:.2f}",
        str(report.steps),
        *(f"{_share(case, counted, report, stage):.0%}" for stage in ("forward", "gram", "refit")),
        f"{_memory_share(case, counted, report):.0%}",
        f"{report.certificate:.0e}",
        *_memory(case),
    ]


HEADER = [
    *("model", "method", "pattern", "blocks", "s", "whole model, s (× blocks)"),
    *(f"{stage}, s" for stage in STAGES),
    *("other, s", "steps", "forward, of GEMM", "Gram, of GEMM", "refit, of GEMM", "refit, of memory"),
    *("certificate", "device, GiB", "host, GiB"),
]


def _counted(case: Case, report: PruneReport) -> Costs:
    """With the steps that were really taken, on average over the layers by size."""
    sizes = [record.shape[0] * record.shape[1] ** 2 for record in report.layers]
    steps = sum(size * (record.steps or 0) for size, record in zip(sizes, report.layers, strict=True)) / sum(sizes)
    count, length = case.windows.shape
    held_out = held_out_count(count, report.config.held_out)
    job = Job(report.config, count - held_out, held_out, solver_steps=round(steps))
    return costs(outline(case.config, case.model.dtype, length), job)


def _share(case: Case, counted: Costs, report: PruneReport, stage: str) -> float:
    """Of the rate of matrix products."""
    rates = {"model": case.rates.model, "float32": case.rates.float32, "float64": case.rates.float64}
    ideal = sum(counted[stage][kind] / rate for kind, rate in rates.items())
    return ideal / max(report.stages.get(stage, 0.0), 1e-9)


def _memory_share(case: Case, counted: Costs, report: PruneReport) -> float:
    return counted["refit"]["memory"] / case.rates.memory / max(report.stages.get("refit", 0.0), 1e-9)


def _memory(case: Case) -> tuple[str, str]:
    """Peaks of the device, and of the process so far."""
    cuda = case.model.device.type == "cuda"
    device = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if cuda else "–"
    return device, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"


def quantize_row(case: Case) -> list[str]:
    """Of the table, for `quantize` with the transform `free`, which reads no data."""
    fill(case.model)
    if case.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    group = min(128, case.config.hidden_size)
    report = quantize(case.model, QuantizeConfig(transform="free", group_size=group))
    whole = f"{report.seconds * case.times:.0f}"
    empty = ["–"] * (len(HEADER) - 8)
    blocks = f"{case.config.num_hidden_layers} of {case.whole}"
    return [case.name, "quantize free", "4 bit", blocks, f"{report.seconds:.1f}", whole, *empty, *_memory(case)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B"])
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: a test of this script")
    parser.add_argument("--blocks", type=int, help="build only so many blocks of each model, and extrapolate")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    a = parser.parse_args()
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.size == "tiny":
        a.shapes, a.windows, a.length, device = ["tiny"], 8, 64, torch.device("cpu")
    print(machine())
    started = False
    for case in cases(a.shapes, a.blocks, (a.windows, a.length), device):
        if not started:
            print(f"{a.windows} windows of {a.length} tokens\n\n| " + " | ".join(HEADER) + " |")
            print("|---" * len(HEADER) + "|")
            started = True
        for method, options in METHODS.items():
            for pattern, sparsity in PATTERNS.items():
                report = measure(case, options, sparsity, a.batch_size)
                print("| " + " | ".join(row(case, method, pattern, report)) + " |", flush=True)
        print("| " + " | ".join(quantize_row(case)) + " |", flush=True)
        del case


if __name__ == "__main__":
    main()
