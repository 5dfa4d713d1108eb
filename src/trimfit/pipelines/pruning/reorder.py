"""Before the mask of a layer is chosen, its inputs are put in the order that suits N:M, where that order is free."""

from collections.abc import Sequence

import torch

from trimfit.calibration import InputMoments
from trimfit.masks import NM, obs_scores, spread
from trimfit.models import FreeOrder
from trimfit.pipelines.pruning.goal import Goal
from trimfit.ranks import Ranks
from trimfit.refit import FactoredGram


def reorder(
    order: FreeOrder, pattern: NM, moments: Sequence[InputMoments], share: float, damping: float, ranks: Ranks
) -> list[InputMoments]:
    """Reorders the inputs of a layer, in the model, and in their moments, of which the first set decides the order.

    - `share`: how far the goal is towards the dense model, as for `Goal`.
    - `damping`: as for `FactoredGram`.
    - `ranks`: all of them take the order that the first one finds.
    """
    if order.columns.shape[2] % pattern.m != 0:
        return list(moments)  # groups would reach over two sets
    gram = FactoredGram(moments[0].gram, damping)
    goal = Goal(order.reader.weight.float(), moments[0], share)
    scores = obs_scores(goal.unpruned(gram), gram)
    spreads = torch.stack([spread(one, pattern) for one in order.scores(scores)])
    permutation = order.apply(ranks.same(spreads))
    return [one.reordered(permutation.to(one.gram.device)) for one in moments]
