"""Second moments summed over calibration tokens as they stream past: nothing but the sums is kept."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimfit.precision import by_tensor_cores, split, tensor_float32
from trimfit.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Drift:
    """How far the model in work has drifted from the dense model, as far as a layer's inputs X can tell.

    One of the two, as what comes of a layer is either handed on or added to the residual stream:

    - `inputs`: (n, n) float32 (X − X̃)ᵀX / T with X̃ the inputs of the same layer in the dense model.
    - `stream`: (d, n) float32 (S − S̃)ᵀX / T with S the residual stream once the layer, not pruned yet, has added to it,
      and S̃ that of the dense model.
    """

    inputs: Tensor | None
    stream: Tensor | None

    def reordered(self, permutation: Tensor) -> "Drift":
        """The drift as it would be with input `permutation[i]` in place i, for a permutation (n,)."""
        inputs = None if self.inputs is None else self.inputs[permutation][:, permutation]
        return Drift(inputs, None if self.stream is None else self.stream[:, permutation])


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a layer's inputs X over T tokens.

    - `gram`: (n, n) float32 H = XᵀX / T.
    - `drift`: None when the dense model was not followed.
    - `tokens`: T. Without any, `gram` and `drift` are 0.
    """

    gram: Tensor
    drift: Drift | None
    tokens: int

    def reordered(self, permutation: Tensor) -> "InputMoments":
        """The moments as they would be with input `permutation[i]` in place i, for a permutation (n,)."""
        drift = None if self.drift is None else self.drift.reordered(permutation)
        return replace(self, gram=self.gram[permutation][:, permutation], drift=drift)


class MomentSum:
    """Sums second moments over batches of tokens: products of upcast inputs in float32, their sum in float64.

    So the sum hardly depends on the order of the batches. On a device without float64 it is float32.

    - `drift`: also those with what has drifted from the dense model: the inputs, or the residual stream.
    - `outputs`: (d) the width of the residual stream where it is that.
    """

    def __init__(self, inputs: int, *, drift: bool = False, outputs: int | None = None):
        self.tokens = self._calls = 0
        self._inputs, self._outputs = inputs, outputs
        self._shapes = {"gram": inputs, "drift": outputs or inputs} if drift else {"gram": inputs}
        self._sums: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, here: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Adds the tokens of `inputs`, of any leading shape (..., n) and floating dtype.

        `here` and `dense` (..., n), or (..., d), are what has drifted apart, in the model in work and in the dense one.
        """
        x = _rows(inputs)
        self.tokens += len(x)
        self._calls += 1
        short = inputs.dtype in (torch.bfloat16, torch.float16)
        with tensor_float32(x.device, allowed=short):  # exact for these
            self._add("gram", x, x)
            if here is not None and dense is not None:
                drift = _rows(here) - _rows(dense)
                for part in split(drift) if short and by_tensor_cores(drift) else (drift,):
                    self._add("drift", part, x)

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = self._zeros(name, a.device)
        self._sums[name] += a.T @ b

    def value(self, device: torch.device, ranks: Ranks = ALONE) -> InputMoments:
        """The means over the tokens that all of `ranks` have added; an expert may have been given none."""
        counts = torch.tensor([self.tokens, self._calls])
        ranks.sum(counts)
        tokens, calls = counts.tolist()
        if not calls:
            raise ValueError("nothing was added, not even inputs without tokens")
        mean: dict[str, Tensor] = {}
        for name in self._shapes:
            total = self._sums.pop(name, None)
            total = self._zeros(name, device) if total is None else total
            ranks.sum(total)
            mean[name] = (total / max(1, tokens)).float()
        drift = mean.get("drift")
        if drift is None:
            return InputMoments(mean["gram"], None, tokens)
        return InputMoments(mean["gram"], Drift(None, drift) if self._outputs else Drift(drift, None), tokens)

    def _zeros(self, name: str, device: torch.device) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(self._shapes[name], self._inputs, dtype=wide, device=device)


def _rows(states: Tensor) -> Tensor:
    return states.detach().reshape(-1, states.shape[-1]).float()
