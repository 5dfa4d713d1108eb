"""Magnitude pruning: small weights go (Han et al. 2015, arXiv 1506.02626)."""

from torch import Tensor

from trimfit.masks.patterns import Pattern, Scope, keep_best
from trimfit.masks.selection import Selection, usable_weight
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "layer"


def select(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Selection:
    """Keeps the weights with the largest |w|. Needs no data: `gram` is there because every selector gets it.

    `weight` is (out, in), any floating dtype; `Selection.weight` is None. Raises `InputError` for shapes that do not
    fit and for NaN or infinite weights.
    """
    return Selection(keep_best(usable_weight(weight, gram, pattern).abs(), pattern), None)
