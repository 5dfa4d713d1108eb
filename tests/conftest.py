"""What several rooms need. Being here also puts `families` on the path."""

import os
from collections.abc import Callable

import pytest
import torch
from families import make_word_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimfit.refit import FactoredGram

# Tests run side by side, and so do the processes that they start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that fits the models of `families`."""
    return make_word_tokenizer()


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
