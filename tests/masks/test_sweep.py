import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit.masks import NM, SELECTORS, Unstructured
from trimfit.masks.sweep import column_blocks
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]


def damped(gram: FactoredGram) -> torch.Tensor:
    matrix = gram.raw + gram.damping * gram.raw.diagonal().mean() * torch.eye(gram.size)
    matrix[gram.dead, gram.dead] = 1
    return torch.where((gram.dead[:, None] | gram.dead) & ~torch.eye(gram.size, dtype=torch.bool), 0, matrix)


@pytest.mark.parametrize("dead", [(), (0, 6)])
def test_factor_is_that_of_every_trailing_inverse(make_layer: MakeLayer, dead: tuple[int, ...]):
    _, gram = make_layer(1, 9, dead=dead)
    factor = gram.inverse_factor
    assert torch.equal(factor, factor.triu())
    for start in range(9):
        trailing = factor[start:, start:]
        torch.testing.assert_close(trailing.T @ trailing, torch.linalg.inv(damped(gram)[start:, start:]))


def nearly_singular() -> FactoredGram:
    """Two inputs that differ by rounding only: the factorisation succeeds, by luck."""
    gram = FactoredGram(torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-15]], dtype=torch.float64))
    assert gram.damping == 0
    return gram


def test_nearly_singular_matrix_is_damped_and_the_reason_logged(caplog: pytest.LogCaptureFixture):
    gram = nearly_singular()
    with caplog.at_level(logging.WARNING):
        factor = gram.inverse_factor
    assert "nearly singular at damping 0; raised to 1e-08" in caplog.text
    assert gram.damping == 0  # the caller's matrix is as it was
    expected = FactoredGram(gram.raw, 1e-8).inverse_factor
    assert torch.equal(factor, expected)


@pytest.mark.parametrize("name", ["sparsegpt", "thanos"])
def test_of_two_equal_inputs_one_takes_the_weight_of_the_other(name: str):
    selection = SELECTORS[name].select(torch.tensor([[1.0, 2.0]]), nearly_singular(), Unstructured(0.5, "row"))
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight, torch.tensor([[0.0, 3.0]]))


def test_blocks_cover_the_columns_and_respect_groups():
    half = Unstructured(0.5, "layer")
    assert list(column_blocks(10, 4, half)) == [(0, 4), (4, 8), (8, 10)]
    assert list(column_blocks(3, 128, half)) == [(0, 3)]
    assert list(column_blocks(12, 7, NM(2, 3))) == [(0, 6), (6, 12)]
    assert list(column_blocks(16, 1, NM(4, 8))) == [(0, 8), (8, 16)]
