"""Second moments summed over calibration tokens as they stream past: nothing but (n, n) sums is kept."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How a layer's inputs X differ from those X̃ of the same layer in the dense model: Δ = X − X̃.

    - `cross`: (n, n) float32 XᵀΔ / T.
    - `square`: (n, n) float32 ΔᵀΔ / T.
    """

    cross: Tensor
    square: Tensor


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's inputs X over T tokens.

    - `gram`: (n, n) float32 H = XᵀX / T.
    - `drift`: from the dense model's inputs; None when these are not known.
    """

    gram: Tensor
    drift: Drift | None


class MomentSum:
    """Sums second moments in float32 from upcast inputs, which have any leading shape (..., n) and floating dtype."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Adds the tokens of `inputs` (..., n); `dense` is what the layer receives for them in the dense model."""
        rows = _rows(inputs)
        self._gram = _add_product(self._gram, rows, rows)
        if dense is not None:
            drift = rows - _rows(dense)
            self._cross = _add_product(self._cross, rows, drift)
            self._square = _add_product(self._square, drift, drift)
        self.tokens += len(rows)

    @property
    def value(self) -> InputMoments:
        """The means over the tokens."""
        if self._gram is None:
            raise ValueError("no tokens were added")
        if self._cross is None or self._square is None:
            return InputMoments(self._gram / self.tokens, None)
        return InputMoments(self._gram / self.tokens, Drift(self._cross / self.tokens, self._square / self.tokens))


def _rows(inputs: Tensor) -> Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1]).float()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b if total is None else torch.addmm(total, a.T, b, out=total)
