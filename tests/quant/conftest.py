"""One small layer for all tests of the quantizer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit.refit.gram import FactoredGram


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., tuple[Tensor, FactoredGram]]:
    """Random float64 weights and the Gram matrix of correlated inputs, some of them dead."""

    def make(
        rows: int, width: int, seed: int = 0, *, damping: float = 0.01, dead: tuple[int, ...] = ()
    ) -> tuple[Tensor, FactoredGram]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        tokens = 4 * width + 1
        inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        inputs = inputs @ (torch.eye(width, dtype=torch.float64) + mixing)
        inputs *= torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
        inputs[:, list(dead)] = 0
        return weight, FactoredGram(inputs.T @ inputs / tokens, damping)

    return make
