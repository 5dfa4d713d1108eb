"""The damping under which refitted weights do best on tokens that they were not fitted to."""

from collections.abc import Sequence

from torch import Tensor

from trimfit.calibration import InputMoments
from trimfit.masks import SELECTORS, Pattern
from trimfit.pipelines.pruning.goal import Goal
from trimfit.refit import Auto, FactoredGram, refit

DEFAULT_DAMPING = 0.01
CANDIDATES = (0.001, DEFAULT_DAMPING, 0.1)
_TOLERANCE = 1e-2  # of the trial refits


def choose_damping(
    weights: Sequence[Tensor], patterns: Sequence[Pattern], fit: InputMoments, held_out: InputMoments, share: float
) -> FactoredGram:
    """The Gram matrix of a group's inputs, with that damping of `CANDIDATES` which serves its layers best.

    Each layer is pruned by Wanda, which is quick, and refitted with each damping on `fit`; the refits are compared by
    how near they come to the goal on `held_out`, relative to the size of the layer's outputs, over all layers.

    `weights` are the dense weights (out, in) of the group's layers, `patterns` those of their masks; `share` as in
    `Goal`.
    """
    best: tuple[float, FactoredGram] | None = None
    for damping in CANDIDATES:
        gram = FactoredGram(fit.gram, damping)
        error = 0.0
        for dense, pattern in zip(weights, patterns, strict=True):
            goal = Goal(dense, fit, share)
            mask = SELECTORS["wanda"].select(goal.unpruned(gram), gram, pattern).mask
            refitted = refit(gram, dense, mask, target=goal.linear_term(gram), solver=Auto(_TOLERANCE)).weight
            energy = ((dense @ held_out.gram) * dense).sum().item()
            error += Goal(dense, held_out, share).excess(refitted) / energy if energy > 0 else 0.0
        if best is None or error < best[0]:
            best = (error, gram)
    assert best is not None
    return best[1]
