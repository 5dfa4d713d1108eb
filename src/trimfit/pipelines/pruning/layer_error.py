"""How far a layer's outputs are from the dense layer's, on calibration and on held-out tokens."""

import torch
from torch import Tensor

from trimfit.pipelines.pruning.records import LayerError


class LayerErrorMeter:
    """Measures weights against one dense layer by Gram matrices, with no activations kept.

    ‖X(Ŵ − W)ᵀ‖² / T = tr((Ŵ − W) H (Ŵ − W)ᵀ), relative to the same of W itself. Products in float32: nothing cancels.

    - `dense`: W (out, in).
    - `calibration`, `held_out`: (in, in) undamped Gram matrices; `held_out` may be None.
    """

    def __init__(self, dense: Tensor, calibration: Tensor, held_out: Tensor | None):
        self._dense = dense
        self._grams = (calibration, held_out)
        self._energies = [0.0 if gram is None else _energy(dense, gram) for gram in self._grams]

    def measure(self, weight: Tensor) -> LayerError:
        """Errors of `weight` (out, in)."""
        difference = weight.to(self._dense.dtype) - self._dense
        calibration, held_out = (
            None if gram is None else _energy(difference, gram) / energy if energy > 0 else 0.0
            for gram, energy in zip(self._grams, self._energies, strict=True)
        )
        assert calibration is not None
        return LayerError(calibration=calibration, held_out=held_out)


def _energy(rows: Tensor, gram: Tensor) -> float:
    """Σ wᵀ H w over rows (out, in)."""
    return ((rows @ gram.to(rows.dtype)) * rows).sum(1).cpu().to(torch.float64).sum().item()
