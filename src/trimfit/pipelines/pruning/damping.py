"""The damping under which refitted weights do best on tokens that they were not fitted to."""

from collections.abc import Sequence

from torch import Tensor

from trimfit.calibration import InputMoments, held_out_count
from trimfit.errors import InputError
from trimfit.masks import SELECTORS, Pattern
from trimfit.pipelines.pruning.goal import Goal
from trimfit.refit import Auto, FactoredGram, refit

DEFAULT_DAMPING = 0.01
CANDIDATES = (0.001, 0.003, DEFAULT_DAMPING, 0.03, 0.1, 0.3, 1.0)
_TOLERANCE = 1e-2  # of the trial refits


def check_damping(damping: float | str, held_out: float, windows: int) -> None:
    """Raises `InputError` when the damping is to be chosen on held-out windows, but of so many windows none are."""
    if damping == "auto" and not held_out_count(windows, held_out):
        raise InputError(
            f"damping 'auto' is chosen on held-out windows, but a share of {held_out} of {windows} windows is none; "
            "give more windows or a larger share"
        )


def choose_damping(
    weights: Sequence[Tensor], patterns: Sequence[Pattern], fit: InputMoments, held_out: InputMoments, share: float
) -> FactoredGram:
    """The Gram matrix of a group's inputs, with that damping of `CANDIDATES` which serves its layers best.

    Each layer is pruned by Wanda, which is quick, and refitted on `fit`; refits are compared by how near they come to
    the goal on `held_out`, relative to the size of the layer's outputs, over all layers. From the default the damping
    grows for as long as that helps; where it does not, it shrinks.

    `weights` are the dense weights (out, in) of the group's layers, `patterns` those of their masks; `share` as in
    `Goal`.
    """

    def tried(damping: float) -> tuple[float, FactoredGram]:
        gram = FactoredGram(fit.gram, damping)
        error = 0.0
        for dense, pattern in zip(weights, patterns, strict=True):
            goal = Goal(dense, fit, share)
            mask = SELECTORS["wanda"].select(goal.unpruned(gram), gram, pattern).mask
            refitted = refit(gram, dense, mask, target=goal.linear_term(gram), solver=Auto(_TOLERANCE)).weight
            energy = ((dense @ held_out.gram) * dense).sum().item()
            error += Goal(dense, held_out, share).excess(refitted) / energy if energy > 0 else 0.0
        return error, gram

    default = CANDIDATES.index(DEFAULT_DAMPING)
    chosen, best = DEFAULT_DAMPING, tried(DEFAULT_DAMPING)
    for way in (CANDIDATES[default + 1 :], CANDIDATES[:default][::-1]):
        for damping in way:
            found = tried(damping)
            if found[0] >= best[0]:
                break
            chosen, best = damping, found
        if chosen != DEFAULT_DAMPING:
            break
    return best[1]
