"""Wanda: weights and activations (Sun et al. 2023, arXiv 2306.11695)."""

from torch import Tensor

from trimfit.masks.patterns import Pattern, Scope, keep_best
from trimfit.masks.selection import Selection, usable_weight
from trimfit.refit.gram import FactoredGram

DEFAULT_SCOPE: Scope = "row"


def wanda_scores(weight: Tensor, gram: FactoredGram) -> Tensor:
    """|W_ij|·‖X_j‖ (Wanda, eq. 1), with the norm as √H_jj, undamped. (out, in), in the dtype of `weight`."""
    return weight.abs() * gram.raw.diagonal().sqrt().to(weight.dtype)


def select(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Selection:
    """Keeps the weights with the largest |W_ij|·‖X_j‖ in each row, or in the layer if the pattern says so.

    `weight` is (out, in), any floating dtype; `Selection.weight` is None. Raises `InputError` for shapes that do not
    fit and for NaN or infinite weights.
    """
    return Selection(keep_best(wanda_scores(usable_weight(weight, gram, pattern), gram), pattern), None)
