"""What a selector is, takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.masks.patterns import Pattern, Scope, check_width
from trimfit.refit.gram import FactoredGram


@dataclass(frozen=True)
class Selection:
    """What a selector chose for one layer.

    - `mask`: (out, in) bool, True = kept, on the device of the weights.
    - `weight`: (out, in) the selector's own updated weights, zero where pruned and for dead inputs; float64 if the
      given weights were, else float32. None for a selector that leaves the weights alone.
    """

    mask: Tensor
    weight: Tensor | None


Select: TypeAlias = Callable[[Tensor, FactoredGram, Pattern], Selection]


@dataclass(frozen=True)
class Selector:
    """One line in the table of selectors.

    - `select`: called with weights (out, in), the Gram matrix of the layer's inputs, and a pattern.
    - `default_scope`: of an unstructured sparsity, as the selector's authors use it.
    - `updates_weights`: whether `Selection.weight` is given.
    """

    select: Select
    default_scope: Scope
    updates_weights: bool


def usable_weight(weight: Tensor, gram: FactoredGram, pattern: Pattern) -> Tensor:
    """The weights in the dtype to compute in: float64 stays, all others become float32. Not to be changed in place.

    Raises `InputError` when the weights do not fit the Gram matrix or the pattern, or are not finite.
    """
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != gram.size:
        raise InputError(
            f"the weight must have shape (out, {gram.size}) to fit the Gram matrix, but its shape is "
            f"{tuple(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise InputError("the weight has NaN or infinite entries: the model is damaged")
    check_width(pattern, gram.size)
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
