"""What the outputs of a pruned layer should be, and how far weights are from that, told by second moments alone.

With the inputs X of the layer and the residual stream R to which it adds its output, in the model as pruned so far, and
X̃ and R̃ the same in the dense model, the goal is

    Y = X Wᵀ − s·[(X − X̃) Wᵀ + (R − R̃)],

what the dense layer gives on the same inputs for s = 0 (arXiv 2512.13886), and for s = 1 what makes the residual stream
the dense model's again. The bracket for R is empty for layers that add to no residual stream; for those that do, the
two are S − S̃ with S = R + X Wᵀ, and known together.
"""

import torch
from torch import Tensor

from trimfit.calibration import InputMoments
from trimfit.refit import FactoredGram


class Goal:
    """The goal Y of one layer over one set of windows.

    - `weight`: W (out, in), the dense weights.
    - `moments`: of the layer's inputs; without drift s is 0.
    - `share`: s in [0, 1].
    - `shift`: (out, in) float64, or float32 on a device without it: (X Wᵀ − Y)ᵀX / T. None for s = 0.
    """

    def __init__(self, weight: Tensor, moments: InputMoments, share: float):
        self._weight, self._gram = weight, moments.gram
        self.shift: Tensor | None = None
        if moments.drift is None or share == 0:
            return
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        inputs, stream = moments.drift.inputs, moments.drift.stream
        self.shift = torch.zeros_like(weight, dtype=wide) if stream is None else share * stream.to(wide)
        if inputs is not None:
            self.shift += share * weight.to(wide) @ inputs.to(wide)

    def linear_term(self, gram: FactoredGram) -> Tensor | None:
        """G = YᵀX / T (out, in), the `target` of `refit`; None for s = 0, which is what `refit` assumes."""
        return None if self.shift is None else self._weight.to(gram.raw.dtype) @ gram.raw - self.shift

    def unpruned(self, gram: FactoredGram) -> Tensor:
        """(out, in) the weights that would serve the goal best if none were pruned, in the dtype of the dense weights.

        The goal of any pruned weights is to be near these in the norm of the damped Gram matrix. So they are what a
        mask selector has to be given in place of the dense weights, which they are for s = 0.
        """
        if self.shift is None:
            return self._weight
        return self._weight - gram.solve(self.shift).to(self._weight.dtype)

    def error(self, weight: Tensor, metric: Tensor | None = None) -> float:
        """‖X (Ŵ − W)ᵀ‖² / T of `weight` Ŵ (out, in): what it changes in the layer's own outputs, whatever the goal.

        With a `metric` C (heads, d, d) that is the mean of eᵀ C e over the errors e of all heads and tokens.
        """
        change = self._change(weight)
        square = (change @ self._gram) * _counted(change, metric)
        return square.sum(1).cpu().double().sum().item()

    def excess(self, weight: Tensor, metric: Tensor | None = None) -> float:
        """‖X Ŵᵀ − Y‖² / T of `weight` Ŵ (out, in), less that of the dense weights: negative where Ŵ is nearer.

        With a `metric` as for `error`.
        """
        square = self.error(weight, metric)
        if self.shift is None:
            return square
        counted = _counted(self._change(weight), metric)
        return square + 2 * (counted.to(self.shift.dtype) * self.shift).sum().item()

    def _change(self, weight: Tensor) -> Tensor:
        return weight.to(self._gram.dtype) - self._weight.to(self._gram.dtype)


def _counted(change: Tensor, metric: Tensor | None) -> Tensor:
    """(out, in) changes of rows, each multiplied by what the errors of its head count."""
    if metric is None:
        return change
    return (metric.to(change.dtype) @ change.view(*metric.shape[:2], -1)).flatten(0, 1)
