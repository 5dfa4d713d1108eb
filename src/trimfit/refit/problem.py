"""The quadratic programs of one layer (OPTIMA, arXiv 2512.13886; docs/method.md).

For each row r with kept set S:  minimise ½ wᵀ H w − g_rᵀ w  subject to  w_j = 0 for j ∉ S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.refit.gram import FactoredGram


@dataclass(frozen=True)
class Problem:
    """m rows sharing one matrix, in the coordinates v = w / scale where the matrix has a unit diagonal.

    - `gram`: the damped, factorised Gram matrix.
    - `linear`: (m, n) g in these coordinates, 0 for dead inputs.
    - `rounding`: (m,) bound on the 2-norm of the rounding error in `linear`.
    - `mask`: (m, n) bool, True = kept; dead inputs are never kept.
    - `start`: (m, n) the masked weights, from which gains are counted.
    - `start_gradient`: (m, n) `linear − start · matrix`.
    """

    gram: FactoredGram
    linear: Tensor
    rounding: Tensor
    mask: Tensor
    start: Tensor
    start_gradient: Tensor

    def rows(self, index: Tensor) -> "Problem":
        """The programs of some rows."""
        parts = (self.linear, self.rounding, self.mask, self.start, self.start_gradient)
        return Problem(self.gram, *(part[index] for part in parts))


def make_problem(gram: FactoredGram, weight: Tensor, mask: Tensor, target: Tensor | None) -> Problem:
    """Brings everything to the unit-diagonal coordinates, in the dtype and on the device of the Gram matrix.

    `target` is G of shape (m, n), the undamped linear term; None is the paper's choice G = W H, the outputs of the
    dense layer on the same inputs. Damping pulls towards `weight` in both cases.
    """
    alive = ~gram.dead
    weight, mask = _like(weight, gram.raw), mask.to(gram.raw.device) & alive
    dense = weight / gram.scale * alive
    goal = (weight @ gram.raw if target is None else _like(target, gram.raw)) * gram.scale * alive
    pull = gram.damping_weight * gram.scale**2 * dense
    linear = goal + pull
    terms = goal.norm(dim=1) + pull.norm(dim=1)
    if target is None:  # n products were summed
        terms = terms + gram.size * dense.norm(dim=1) * gram.norm
    start = dense * mask
    problem = Problem(gram, linear, 8 * unit_rounding(linear) * terms, mask, start, linear - start @ gram.matrix)
    if not torch.isfinite(problem.rounding).all():
        raise InputError("the weights are so large that their products with the Gram matrix overflow: scale them down")
    return problem


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """On the device and then, since a device may lack it, in the dtype of `other`."""
    return tensor.to(other.device).to(other.dtype)


def unit_rounding(tensor: Tensor) -> float:
    """Relative error of one operation in the dtype of `tensor`."""
    return torch.finfo(tensor.dtype).eps / 2


def check(gram: FactoredGram, weight: Tensor, mask: Tensor, target: Tensor | None, start: Tensor | None) -> None:
    """Raises `InputError` for shapes, dtypes and devices that do not fit and for NaN or infinite entries."""
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != gram.size:
        raise InputError(
            f"the weight must have shape (rows, {gram.size}) to fit the Gram matrix, but its shape is "
            f"{tuple(weight.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise InputError(
            f"the mask must be boolean of shape {tuple(weight.shape)} (True = kept), but it is {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if target is not None and target.shape != weight.shape:
        raise InputError(f"the target must have shape {tuple(weight.shape)}, but its shape is {tuple(target.shape)}")
    named = {"Gram matrix": gram.raw, "weight": weight, "mask": mask} | ({} if target is None else {"target": target})
    if len({tensor.device for tensor in named.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in named.items())
        raise InputError(f"all tensors must be on one device, but they are: {places}")
    for name in named.keys() & {"weight", "target"}:
        if not named[name].is_floating_point():
            raise InputError(f"the {name} must have a floating dtype, but it has {named[name].dtype}")
        if not torch.isfinite(named[name]).all():
            raise InputError(f"the {name} has NaN or infinite entries: the model or an earlier step is damaged")
    if start is not None:
        _check_start(start, weight)


def _check_start(start: Tensor, weight: Tensor) -> None:
    """Raises `InputError` where `start` could not stand in for `weight`."""
    if start.shape != weight.shape or not start.is_floating_point() or start.device != weight.device:
        raise InputError(
            f"the start must be floating, of shape {tuple(weight.shape)} and on {weight.device} as the weight is, but "
            f"it is {start.dtype} of shape {tuple(start.shape)} on {start.device}"
        )
    if not torch.isfinite(start).all():
        raise InputError("the start has NaN or infinite entries: leave it out, or mend the selector that made it")
