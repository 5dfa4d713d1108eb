"""Refit against raPDHG of MPAX, set as OPTIMA's released code sets it, and against a loop of float64 dense solves.

    python benchmarks/refit.py [--quick] [--gram FILE.safetensors]

All solve the same quadratic programs: one damped Gram matrix, the same rows and masks (Wanda, 50 %). OPTIMA
(github.com/paramathic/optima at 4120601, weight_update.py) solves for the weight change: pruned entries in a box of
width 1e-4, one empty equality, one inequality that never binds, tolerances of 1e-2, at most 100,000 steps, rows in
batches, float32, pruned entries set to zero afterwards. It calls `vmap` without `jit`, so that every batch compiles
again: that is the time with compilation. The time without is of a second call of the same function under `jit`.

OPTIMA's tolerances are absolute, and raPDHG often stops at its first look. So it is also measured at an accuracy like
ours: tolerances of 1e-5, no slack in the boxes; on the first batch, its time multiplied by the number of batches.

MPAX and JAX are optional: pip install mpax jax.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

import trimfit

DAMPING = 0.01
SPARSITY = 0.5
SOLVERS: dict[str, trimfit.Auto | trimfit.Cholesky | trimfit.ConjugateGradients] = {
    "Cholesky": trimfit.Cholesky(),
    "CG diagonal": trimfit.ConjugateGradients("diagonal"),
    "CG masked inverse": trimfit.ConjugateGradients("masked_inverse"),
    "Auto": trimfit.Auto(),
}


@dataclass(frozen=True)
class Problem:
    """The quadratic programs of one layer: damped Gram matrix (n, n), weights and mask (m, n), all float32 or bool."""

    name: str
    gram: Tensor
    weight: Tensor
    mask: Tensor


Solved: TypeAlias = tuple[Tensor, int]


@dataclass(frozen=True)
class Outcome:
    """What one method took and left behind; `gap` is relative to the gain, over all rows."""

    seconds: float
    gap: float
    steps: int | None = None


def main() -> None:
    arguments = parse_arguments()
    problems = captured_problems(arguments.gram, arguments.rows) if arguments.gram else []
    with_mpax = importlib.util.find_spec("mpax") is not None
    print(describe_machine())
    if not with_mpax:
        print("\nMPAX is not installed (pip install mpax jax): its columns are empty.")
    problems += [synthetic_problem(size, arguments.rows or 256) for size in arguments.sizes]
    rows: list[dict[str, Outcome | str]] = []
    for problem in problems:
        rows.append(measure(problem, with_mpax, arguments.repeats))
        print(f"  {problem.name}: done", flush=True)
    print()
    print(format_table(rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small synthetic problem")
    parser.add_argument("--gram", type=Path, help="tensors NAME.gram (n, n) and NAME.weight (m, n)")
    parser.add_argument("--sizes", type=int, nargs="*", default=None, help="of the synthetic problems")
    parser.add_argument("--rows", type=int, default=None, help="of each problem; else all, or 256 synthetic ones")
    parser.add_argument("--repeats", type=int, default=3, help="of each trimfit measurement; the median counts")
    arguments = parser.parse_args()
    if arguments.sizes is None:
        arguments.sizes = [128] if arguments.quick else [256, 1024, 2048, 4096]
    return arguments


# Problems


def captured_problems(path: Path, rows: int | None) -> list[Problem]:
    """Layers of a real model: Gram matrices of their inputs and the first rows of their weights."""
    tensors = load_file(path)
    names = sorted(key.removesuffix(".gram") for key in tensors if key.endswith(".gram"))
    return [make_problem(name, tensors[f"{name}.gram"], tensors[f"{name}.weight"][:rows]) for name in names]


def synthetic_problem(size: int, rows: int) -> Problem:
    """Inputs as in language models: a spectrum that falls off as 1/k, channels of unlike size, a few outliers."""
    generator = torch.Generator().manual_seed(size)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    spectrum = 1 / torch.arange(1, size + 1)
    spread = torch.exp(torch.randn(size, generator=generator) / 2)
    spread[torch.randperm(size, generator=generator)[: max(1, size // 256)]] *= 20
    gram = (rotation * spectrum) @ rotation.T * spread * spread[:, None]
    gram = (gram + gram.T) / gram.diagonal().mean() / 2
    return make_problem(f"synthetic {size}", gram, torch.randn(rows, size, generator=generator) / 50)


def make_problem(name: str, gram: Tensor, weight: Tensor) -> Problem:
    """Damps H, and keeps the half of each row with the largest |w|·‖x‖."""
    gram, weight = gram.float(), weight.float()
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    score = weight.abs() * gram.diagonal().sqrt()
    pruned = score.argsort(dim=1)[:, : int(SPARSITY * weight.shape[1])]
    return Problem(name, gram, weight, torch.ones_like(weight, dtype=torch.bool).scatter_(1, pruned, False))


# Methods


def solve_in_a_loop(problem: Problem) -> Tensor:
    """(m, n) optimum: for each row a float64 Cholesky factorisation of its part of H."""
    gram, dense = problem.gram.double(), problem.weight.double()
    linear = dense @ gram
    optimum = torch.zeros_like(dense)
    for row, kept in enumerate(problem.mask):
        factor = torch.linalg.cholesky(gram[kept][:, kept])
        optimum[row, kept] = torch.cholesky_solve(linear[row, kept, None], factor)[:, 0]
    return optimum


class Mpax:
    """raPDHG on the quadratic programs of OPTIMA."""

    def __init__(self, problem: Problem, tolerance: float = 1e-2, slack: float = 1e-4):
        import jax
        import jax.numpy as jnp
        from mpax import create_qp, raPDHG

        rows, size = problem.weight.shape
        zeros, ones = jnp.zeros((1, size)), jnp.ones((1, size))

        def solve_row(quadratic: Any, lower: Any, upper: Any) -> Any:
            program = create_qp(
                quadratic, zeros[0], zeros, jnp.zeros(1), ones, jnp.full(1, -1e5), lower, upper, use_sparse_matrix=False
            )
            program.is_lp = False  # as found without jit; under jit it could not be told
            solver = raPDHG(eps_abs=tolerance, eps_rel=tolerance, verbose=False, iteration_limit=100_000)
            result = solver.optimize(program)
            return result.primal_solution, result.iteration_count

        self.as_released = jax.vmap(solve_row, in_axes=(None, 0, 0))
        self.jitted = jax.jit(self.as_released)
        self.slack = slack
        self.gram = jnp.asarray(problem.gram.numpy())
        batch = min(rows, max(1, 128 * 12 * 1024**2 // size**2))
        self.batches = list(zip(problem.weight.split(batch), problem.mask.split(batch), strict=True))
        self.to_jax: Callable[[Tensor], Any] = lambda tensor: jnp.asarray(tensor.numpy())

    def solve(self, function: Callable[[Any, Any, Any], Any], batches: list[tuple[Tensor, Tensor]]) -> Solved:
        """Weights and the most steps of any row."""
        weights, steps = [], 0
        for weight, kept in batches:
            lower = torch.where(kept, -torch.inf, -weight)
            upper = torch.where(kept, torch.inf, self.slack - weight)
            change, count = function(self.gram, self.to_jax(lower), self.to_jax(upper))
            weights.append(torch.where(kept, weight + torch.tensor(change.__array__()), 0))
            steps = max(steps, int(count.max()))
        return torch.cat(weights), steps


# Measurement


def measure(problem: Problem, with_mpax: bool, repeats: int) -> dict[str, Outcome | str]:
    """Every method on one problem, one after the other."""
    seconds, (optimum, _) = timed(lambda: (solve_in_a_loop(problem), 0))
    row: dict[str, Outcome | str] = {
        "problem": f"{problem.name}, {len(problem.weight)} × {len(problem.gram)}",
        "loop": Outcome(seconds, 0.0),
    }
    for name, solver in SOLVERS.items():
        solutions = [
            trimfit.refit(problem.gram, problem.weight, problem.mask, solver=solver) for _ in range(repeats + 1)
        ]  # the first one warms up
        seconds = statistics.median(solution.seconds for solution in solutions[1:])
        row[name] = Outcome(seconds, relative_gap(problem, optimum, solutions[-1].weight), solutions[-1].steps)
        if name == "Auto":
            row["chosen"] = describe_solver(solutions[-1].solver)
    if with_mpax:
        row |= measure_mpax(problem, optimum)
    return row


def measure_mpax(problem: Problem, optimum: Tensor) -> dict[str, Outcome | str]:
    """As released; the second call under jit; and at an accuracy like ours."""
    row: dict[str, Outcome | str] = {}
    released = Mpax(problem)
    batches = released.batches
    for name, function in (("MPAX", released.as_released), ("MPAX jitted", released.jitted)):
        if function is released.jitted:
            released.solve(function, [batches[0], batches[-1]])  # to compile for both shapes
        seconds, (weight, steps) = timed(lambda function=function: released.solve(function, batches))
        row[name] = Outcome(seconds, relative_gap(problem, optimum, weight), steps)
    accurate = Mpax(problem, tolerance=1e-5, slack=0.0)
    accurate.solve(accurate.jitted, batches[:1])
    seconds, (weight, steps) = timed(lambda: accurate.solve(accurate.jitted, batches[:1]))
    rows = slice(0, len(weight))
    first = Problem(problem.name, problem.gram, problem.weight[rows], problem.mask[rows])
    gap = relative_gap(first, optimum[rows], weight)
    row["MPAX accurate"] = Outcome(seconds * len(problem.weight) / len(weight), gap, steps)
    return row


def timed(work: Callable[[], Solved]) -> tuple[float, Solved]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def relative_gap(problem: Problem, optimum: Tensor, weight: Tensor) -> float:
    """(f(w) − f*) / (f(masked) − f*) over all rows, in float64."""
    gram = problem.gram.double()

    def above(w: Tensor) -> float:
        difference = w.double() - optimum
        return ((difference @ gram) * difference).sum().item()

    return above(weight) / above(problem.weight * problem.mask)


# Report


def describe_solver(solver: object) -> str:
    return getattr(solver, "preconditioner", "Cholesky").replace("_", " ")


def describe_machine() -> str:
    """One line for the head of the table."""
    packages = ("trimfit", "torch", "numpy", "jax", "jaxlib", "mpax")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    where = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads"
    return f"{where}; Python {platform.python_version()}, {', '.join(found)}; {datetime.date.today()}"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if (cpuinfo.exists())
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


METHODS = {
    "Cholesky": "Cholesky",
    "CG diagonal": "CG diagonal",
    "CG masked inverse": "CG masked inverse",
    "Auto": "Auto",
    "loop": "float64 loop",
    "MPAX": "raPDHG as released",
    "MPAX jitted": "jitted, second call",
    "MPAX accurate": "jitted, at 1e-5",
}


def format_table(rows: list[dict[str, Outcome | str]]) -> str:
    """Markdown: seconds, steps and true relative gaps; then ratios to Auto."""
    times = [["rows × inputs: seconds (steps) gap", *METHODS.values()]]
    ratios = [["to Auto", *(f"{METHODS[name]}, time" for name in list(METHODS)[4:]), "gap as released"]]
    for row in rows:
        auto = row["Auto"]
        assert isinstance(auto, Outcome)
        name = str(row["problem"])
        times.append([name, *(cell(row.get(method), row["chosen"] if method == "Auto" else "") for method in METHODS)])
        others = [row.get(method) for method in list(METHODS)[4:]]
        ratios.append([name, *(f"{o.seconds / auto.seconds:.3g}" if isinstance(o, Outcome) else "" for o in others)])
        released = row.get("MPAX")
        ratios[-1].append(f"{released.gap / auto.gap:.2g}" if isinstance(released, Outcome) else "")
    return markdown(times) + "\n\n" + markdown(ratios)


def cell(outcome: Outcome | str | None, note: Outcome | str) -> str:
    if not isinstance(outcome, Outcome):
        return ""
    steps = "" if outcome.steps is None else f" ({outcome.steps}) {outcome.gap:.1e}"
    return f"{outcome.seconds:.3g}{steps} {note}".strip()


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
