"""ALPS as published (Meng et al. 2024, arXiv 2406.07831), and its layer errors beside those of `joint`.

    python benchmarks/capture_grams.py demo demo.safetensors --blocks 0 1 2 3 4 5
    python benchmarks/alps.py demo.safetensors

ADMM by Algorithm 1 with its schedule of ρ (from 0.1; after every third step times 1.3, 1.2 or 1.1 by how much of the
support changed; until none does, 300 steps at most), then 10 steps of conjugate gradients on the support.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import machine
from safetensors.torch import load_file
from torch import Tensor

from trimfit.masks import NM, SELECTORS, Pattern, Selection, Unstructured, keep_best
from trimfit.refit import FactoredGram, refit

FIRST_RHO = 0.1
STEPS_PER_RHO = 3
RHO_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (share of the support that changed, at least; factor)
MAX_STEPS = 300
CG_STEPS = 10
PATTERNS: dict[str, Pattern] = {
    "50 %": Unstructured(0.5, "layer"),
    "60 %": Unstructured(0.6, "layer"),
    "70 %": Unstructured(0.7, "layer"),
    "50 % by row": Unstructured(0.5, "row"),
    "60 % by row": Unstructured(0.6, "row"),
    "70 % by row": Unstructured(0.7, "row"),
    "2:4": NM(2, 4),
}


@torch.no_grad()
def alps(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Selection:
    """Mask and weights of ALPS for `weight` (out, in), in float64 as in the authors' code."""
    dense = weight.to(gram.matrix.dtype) / gram.scale  # a unit diagonal, as the authors do
    dense[:, gram.dead] = 0
    mask, sparse = admm(dense, gram.matrix, pattern)
    found = conjugate_gradients(dense, sparse, mask, gram.matrix) * gram.scale
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Selection(mask, found.to(dtype))


def admm(dense: Tensor, matrix: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Algorithm 1: the support (m, n) bool, and D (m, n) on it."""
    values, vectors = torch.linalg.eigh(matrix)
    goal = dense @ matrix
    sparse, dual, rho = dense, torch.zeros_like(dense), FIRST_RHO
    support = before = keep_best(dense.abs(), pattern)
    for step in range(1, MAX_STEPS + 1):
        split = ((goal - dual + rho * sparse) @ vectors / (values + rho)) @ vectors.T  # W
        support = keep_best((split + dual / rho).abs(), pattern)
        sparse = torch.where(support, split + dual / rho, 0)
        dual = dual + rho * (split - sparse)
        if step % STEPS_PER_RHO == 0:
            changed = int((support & ~before).sum()) / max(1, int(support.sum()))
            if changed == 0:
                break
            rho *= next(factor for share, factor in RHO_GROWTH if changed >= share)
            before = support
    return support, sparse


def conjugate_gradients(dense: Tensor, start: Tensor, support: Tensor, matrix: Tensor) -> Tensor:
    """10 steps from `start` (m, n), every row with its own step length as in the authors' code."""
    weight = start
    residual = ((dense - weight) @ matrix) * support
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(CG_STEPS):
        product = (direction @ matrix) * support
        length = size / (direction * product).sum(1, keepdim=True).clamp_min(1e-300)
        weight, residual = weight + length * direction, residual - length * product
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp_min(1e-300) * direction
    return weight


def relative_error(change: Tensor, dense: Tensor, gram: FactoredGram) -> float:
    """‖X cᵀ‖² / ‖X Wᵀ‖² with the damped Gram matrix, which is what both methods minimise."""
    change, dense = change.double() / gram.scale, dense.double() / gram.scale
    return float((change @ gram.matrix * change).sum() / (dense @ gram.matrix * dense).sum())


def compare(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> tuple[list[float], list[float]]:
    """Errors of ALPS, of `joint` alone and of `joint` + refit, and the CPU seconds of ALPS and of `joint` + refit."""
    clock = [time.process_time()]
    original = alps(weight, gram, pattern)
    clock.append(time.process_time())
    ours = SELECTORS["joint"].select(weight, gram, pattern)
    refitted = refit(gram, weight, ours.mask).weight
    clock.append(time.process_time())
    found = (original.weight, ours.weight, refitted)
    errors = [relative_error(what - weight, weight, gram) for what in found if what is not None]
    return errors, [clock[1] - clock[0], clock[2] - clock[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grams", type=Path)
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=["50 %", "60 %", "70 %", "2:4"])
    parser.add_argument("--damping", type=float, default=0.01)
    arguments = parser.parse_args()

    tensors = load_file(arguments.grams)
    names = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    print(machine() + "\n\n| layer | " + " | ".join(arguments.patterns) + " |")
    print("|---|" + "---|" * len(arguments.patterns))
    ratios: dict[str, list[float]] = {pattern: [] for pattern in arguments.patterns}
    seconds = [0.0, 0.0]
    for name in names:
        gram, cells = FactoredGram(tensors[f"{name}.gram"], arguments.damping), list[str]()
        for pattern in arguments.patterns:
            errors, spent = compare(tensors[f"{name}.weight"], gram, PATTERNS[pattern])
            ratios[pattern].append(errors[2] / errors[0])
            seconds = [total + part for total, part in zip(seconds, spent, strict=True)]
            cells.append(f"{errors[0]:.5f} → {errors[2]:.5f} ({errors[2] / errors[0]:.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for label, summary in (("mean", statistics.fmean), ("largest", max)):
        print(f"| {label} ratio | " + " | ".join(f"{summary(ratios[p]):.3f}" for p in arguments.patterns) + " |")
    print(f"\nCPU seconds: {seconds[0]:.1f} ALPS, {seconds[1]:.1f} joint and refit")


if __name__ == "__main__":
    main()
