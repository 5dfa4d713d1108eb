"""Second moments summed over calibration tokens as they stream past: nothing but the sums is kept."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimfit.precision import tensor_float32
from trimfit.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Drift:
    """How far the model in work has drifted from the dense model, as far as a layer's inputs X can tell.

    - `inputs`: (n, n) float32 ΔᵀX / T with Δ = X − X̃ and X̃ the inputs of the same layer in the dense model.
    - `residual`: (d, n) float32 (R − R̃)ᵀX / T with R the residual stream to which the layer adds its output, R̃ that of
      the dense model; None for a layer that adds to none.
    """

    inputs: Tensor
    residual: Tensor | None

    def reordered(self, permutation: Tensor) -> "Drift":
        """The drift as it would be with input `permutation[i]` in place i, for a permutation (n,)."""
        residual = None if self.residual is None else self.residual[:, permutation]
        return Drift(self.inputs[permutation][:, permutation], residual)


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


@dataclass(frozen=True)
class Drifted:
    """What came of the same tokens in the dense model, with the shapes of what came of them in the model in work.

    - `inputs`: of the layer.
    - `residual`, `dense_residual`: (..., d) the residual stream in the model in work and in the dense model, or None.
    """

    inputs: Tensor
    residual: Tensor | None
    dense_residual: Tensor | None


class MomentSum:
    """Sums second moments over batches of tokens: products of upcast inputs in float32, their sum in float64.

    So the sum hardly depends on the order of the batches. On a device without float64 it is float32.

    - `outputs`: (d) the width of the residual stream, where one is to be looked at.
    """

    def __init__(self, inputs: int, *, drift: bool = False, outputs: int | None = None):
        self.tokens = self._calls = 0
        self._inputs, self._shapes = inputs, {"gram": inputs}
        if drift:
            self._shapes["inputs"] = inputs
            if outputs is not None:
                self._shapes["residual"] = outputs
        self._sums: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, drifted: Drifted | None = None) -> None:
        """Adds the tokens of `inputs`, of any leading shape (..., n) and floating dtype."""
        x = _rows(inputs)
        self.tokens += len(x)
        self._calls += 1
        with tensor_float32(x.device, allowed=inputs.dtype in (torch.bfloat16, torch.float16)):  # exact for these
            self._add("gram", x, x)
        if drifted is None:
            return
        with tensor_float32(x.device, allowed=False):
            self._add("inputs", x - _rows(drifted.inputs), x)
            if drifted.residual is not None and drifted.dense_residual is not None:
                self._add("residual", _rows(drifted.residual) - _rows(drifted.dense_residual), x)

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
        drift = Drift(mean["inputs"], mean.get("residual")) if "inputs" in mean else None
        return InputMoments(mean["gram"], drift, tokens)

    def _zeros(self, name: str, device: torch.device) -> Tensor:
        wide = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(self._shapes[name], self._inputs, dtype=wide, device=device)


def _rows(states: Tensor) -> Tensor:
    return states.detach().reshape(-1, states.shape[-1]).float()
