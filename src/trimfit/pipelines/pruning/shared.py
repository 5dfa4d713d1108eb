"""What the processes of a run share: the rows of a refit, and what the first of them has kept."""

from collections.abc import Sequence

from torch import Tensor

from trimfit.models import Block, Layer
from trimfit.pipelines.pruning.allocate import Allocation
from trimfit.pipelines.pruning.ledger import Ledger
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.ranks import Ranks
from trimfit.refit import (
    Auto,
    Certificate,
    ConjugateGradients,
    FactoredGram,
    RefitSolution,
    Solver,
    Status,
    refit,
    refit_together,
)

_FEWEST_ROWS = {"cpu": 64}  # in a chunk: fewer are no work for a GEMM
_FEWEST_ROWS_ELSEWHERE = 1024
_MOST_CHUNKS = 16  # of a layer


def shared_refit(
    gram: FactoredGram,
    weight: Tensor,
    mask: Tensor,
    *,
    target: Tensor | None,
    start: Tensor | None,
    solver: Solver | Auto,
    metric: Tensor | None,
    ranks: Ranks,
) -> RefitSolution:
    """As `refit`, in chunks of rows that are the same however many processes share them, and so is the result.

    With a `metric` (runs, d, d) as `refit_together`: by conjugate gradients, of `solver` no more than the tolerance.
    """
    together = 1 if metric is None else metric.shape[1]
    iterative = ConjugateGradients(tolerance=solver.tolerance)
    if metric is not None:
        solver = iterative
    elif isinstance(solver, Auto):
        solver = solver.choose(gram.certifiable, mask)  # for all rows
    fewest = _FEWEST_ROWS.get(weight.device.type, _FEWEST_ROWS_ELSEWHERE)
    chosen, size = solver, max(fewest, -(-len(weight) // _MOST_CHUNKS))
    size = -(-size // together) * together

    def solve(rows: slice) -> RefitSolution:
        goal, first = (None if what is None else what[rows] for what in (target, start))
        if metric is None:
            return refit(gram, weight[rows], mask[rows], target=goal, start=first, solver=chosen)
        runs = metric[rows.start // together : rows.stop // together]
        return refit_together(gram, weight[rows], mask[rows], runs, target=goal, start=first, solver=iterative)

    chunks = [slice(first, min(first + size, len(weight))) for first in range(0, len(weight), size)]
    own = [solve(rows) for rows in ranks.share(chunks)]
    statuses, counts = list(Status), [rows.stop - rows.start for rows in chunks]
    certificates = [(part.certificate.gap, part.certificate.gain, part.certificate.scale) for part in own]
    bound, programs = gram.certifiable.raw.new_empty(0), [count // together for count in counts]
    return RefitSolution(
        weight=ranks.gather([part.weight for part in own], counts, weight.float()),
        certificate=Certificate(*(ranks.gather([c[i] for c in certificates], programs, bound) for i in range(3))),
        status=statuses[int(ranks.largest(max((statuses.index(part.status) for part in own), default=0)))],
        steps=int(ranks.largest(max((part.steps for part in own), default=0))),
        damping=gram.certifiable.damping,
        solver=chosen,
        seconds=sum(part.seconds for part in own),
    )


class SharedLedger:
    """The ledger of the first process, which all ask; the others have none."""

    def __init__(self, ledger: Ledger | None, ranks: Ranks):
        self._ledger, self._ranks = ledger, ranks
        self.seconds, self.allocation = ranks.first(lambda: (self._first.seconds, self._first.allocation))

    @property
    def _first(self) -> Ledger:
        assert self._ledger is not None
        return self._ledger

    def keep_allocation(self, allocation: Allocation) -> None:
        """The first process keeps it."""
        self._ranks.first(lambda: self._first.keep_allocation(allocation))

    def restore(self, layers: Sequence[Layer], block: Block) -> list[LayerRecord] | None:
        """What the first process restores, all have."""
        records = self._ranks.first(lambda: self._first.restore(layers, block))
        if records is not None:
            for layer in block.layers:
                layer.write(self._ranks.same(layer.weight.clone()))
                if layer.bias is not None:
                    layer.bias.copy_(self._ranks.same(layer.bias.clone()))
        return records

    def keep(
        self, layers: Sequence[Layer], reordered: Sequence[Layer], records: Sequence[LayerRecord], seconds: float
    ) -> None:
        """The first process keeps them."""
        self._ranks.first(lambda: self._first.keep(layers, reordered, records, seconds))

    def finish(self, block: Block) -> None:
        """The first process takes note."""
        self._ranks.first(lambda: self._first.finish(block))
