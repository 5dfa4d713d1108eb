"""Iterative refinement: weights are corrected by what their exact residual shows, until each program is certified."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, Self

import torch
from torch import Tensor

from trimfit.refit.certificate import Certificate
from trimfit.refit.problem import Problem
from trimfit.refit.solver import Solver

_CHUNK_ELEMENTS = 2**25  # of the rows solved together, to bound memory: 256 MiB for each float64 tensor


class Status(Enum):
    """How a refit ended."""

    OPTIMAL = "optimal"
    STEP_LIMIT = "tolerance not reached within the step limit"
    PRECISION_LIMIT = "tolerance not reachable in this precision"


@dataclass(frozen=True)
class RefitSolution:
    """Refitted weights and what is known of them.

    - `weight`: (m, n), float64 if the given weight was, else float32; exactly zero off the mask and for dead inputs.
    - `certificate`: proven bounds for each row, or run of rows, and for the layer, of this very `weight`.
    - `status`: the worst of all rows.
    - `steps`: most solver steps that any row needed.
    - `damping`: the λ used; above the λ asked for when the Gram matrix could not be factorised.
    - `solver`: the solver used.
    - `seconds`: wall time.
    """

    weight: Tensor
    certificate: Certificate
    status: Status
    steps: int
    damping: float
    solver: Solver
    seconds: float


class Programs(Protocol):
    """b quadratic programs, each of `depth` consecutive rows of a layer.

    - `problem`: all m = b · depth rows.
    """

    @property
    def problem(self) -> Problem: ...

    @property
    def depth(self) -> int: ...

    def certify(self, weight: Tensor | None) -> tuple[Certificate, Tensor]:
        """Certificate (b,) of `weight` (m, n), or of the masked weights, and the residual (m, n)."""
        ...

    def correct(self, solver: Solver, residual: Tensor, gain: Tensor, max_steps: int) -> tuple[Tensor, int]:
        """As `Solver.correct`: the correction (m, n) in the problem's coordinates, and the steps it took."""
        ...

    def pick(self, index: Tensor) -> Self:
        """Some of them."""
        ...


def chunks(rows: int, columns: int, depth: int = 1) -> Iterator[slice]:
    """Rows to solve together, in whole programs of `depth` rows."""
    step = depth * max(1, _CHUNK_ELEMENTS // (depth * columns))
    return (slice(first, first + step) for first in range(0, rows, step))


@dataclass(frozen=True)
class Part:
    """What became of some rows of a layer."""

    weight: Tensor
    certificate: Certificate
    status: Status
    steps: int


def refine(programs: Programs, dense: Tensor, start: Tensor | None, solver: Solver) -> Part:
    """Corrects the masked weights, or `start` where that is better, until every program is certified.

    Weights are held in the dtype in which they are returned, so that certificates are of these very weights.
    """
    problem, depth = programs.problem, programs.depth
    scale, dtype = problem.gram.scale, torch.promote_types(dense.dtype, torch.float32)
    state = _State(_masked(problem, dense, dtype), *programs.certify(None), depth)
    if start is not None:
        every = torch.arange(len(state.weight) // depth, device=state.weight.device)
        state.improve(programs, every, _masked(problem, start, dtype))
    steps, status = 0, Status.OPTIMAL
    unfinished = (~(state.certificate.relative <= solver.tolerance)).nonzero()[:, 0]
    while len(unfinished):
        if steps >= solver.max_steps:
            status = _worst([status, Status.STEP_LIMIT])
            break
        part, before = programs.pick(unfinished), state.certificate.rows(unfinished)
        rows = program_rows(unfinished, depth)
        residual = state.residual[rows]
        unit = residual.view(len(unfinished), -1).abs().amax(1)
        unit = torch.where(unit > 0, unit, 1.0)  # so that nothing overflows or vanishes in the solver's dtype
        wide = unit.repeat_interleave(depth)[:, None]
        with torch.autocast(residual.device.type, enabled=False):  # never half precision inside the solve
            correction, taken = part.correct(
                solver, residual / wide, before.scale / unit / unit, solver.max_steps - steps
            )
        steps += taken
        better = state.improve(part, unfinished, (state.weight[rows] + correction * wide * scale).to(dtype))
        after = state.certificate.rows(unfinished)
        finished = better & (after.relative <= solver.tolerance)
        # A solver that stopped by itself has done what its precision allows; one that hit the limit could go on.
        stuck = ~finished & ~(after.gap <= before.gap / 2) & (steps < solver.max_steps)
        if stuck.any():
            status = Status.PRECISION_LIMIT
        unfinished = unfinished[~finished & ~stuck]
    return Part(state.weight, state.certificate, status, steps)


def solution(
    parts: Sequence[Part], damping: float, solver: Solver, device: torch.device, began: float
) -> RefitSolution:
    """Of a whole layer, on `device`; `began` is what `time.perf_counter` said."""
    return RefitSolution(
        weight=torch.cat([part.weight for part in parts]).to(device),
        certificate=Certificate.concatenate([part.certificate for part in parts]),
        status=_worst([part.status for part in parts]),
        steps=max(part.steps for part in parts),
        damping=damping,
        solver=solver,
        seconds=time.perf_counter() - began,
    )


@dataclass
class _State:
    """Weights (m, n), the certificate (b,) and residual (m, n) of these very weights."""

    weight: Tensor
    certificate: Certificate
    residual: Tensor
    depth: int

    def improve(self, part: Programs, index: Tensor, weight: Tensor) -> Tensor:
        """Takes the `weight` of the programs `part`, those at `index`, where they gain more or are proven nearer.

        Returns which of them were taken.
        """
        (after, residual), before = part.certify(weight), self.certificate.rows(index)
        nearer = (after.gap < before.gap) & (after.gain >= 0)
        better = torch.isfinite(after.gap) & ((after.gain > before.gain) | nearer)
        taken = better.nonzero()[:, 0]
        here, there = program_rows(index[taken], self.depth), program_rows(taken, self.depth)
        self.weight[here], self.residual[here] = weight[there], residual[there]
        self.certificate = self.certificate.replace(index[taken], after.rows(taken))
        return better


def _masked(problem: Problem, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(problem.mask, weight.to(problem.mask.device), 0).to(dtype)


def program_rows(index: Tensor, depth: int) -> Tensor:
    """Which rows some programs have."""
    return (index[:, None] * depth + torch.arange(depth, device=index.device)).flatten()


def _worst(statuses: Sequence[Status]) -> Status:
    return max(statuses, key=list(Status).index)
