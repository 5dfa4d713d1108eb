"""Gram matrices summed over calibration tokens as they stream past: nothing but the (n, n) sum is kept."""

from torch import Tensor


class GramSum:
    """H = XᵀX / T over all tokens seen, in float32 from upcast inputs.

    Inputs of any leading shape (..., n) are taken, and any floating dtype.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Adds the tokens of `inputs` (..., n)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._sum is None:
            self._sum = rows.T @ rows
        else:
            self._sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    @property
    def value(self) -> Tensor:
        """(n, n) float32 mean over the tokens."""
        if self._sum is None:
            raise ValueError("no tokens were added")
        return self._sum / self.tokens
