"""SparseGPT against the optimal brain surgeon written out: one weight at a time, one inverse for each column."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit.masks import NM, Pattern, Unstructured
from trimfit.masks.patterns import prune_counts
from trimfit.masks.sparsegpt import select
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]


def surgeon(weight: Tensor, gram: FactoredGram, pattern: Pattern, block: int) -> tuple[Tensor, Tensor]:
    """(mask, weights) in plain loops. `block` must be a multiple of M."""
    rows, width = weight.shape
    weight = weight.clone()
    weight[:, gram.dead] = 0
    hessian = gram.raw + gram.damping * gram.raw.diagonal().mean() * torch.eye(width)
    for j in range(width):
        if gram.dead[j]:
            hessian[j, :] = hessian[:, j] = 0
            hessian[j, j] = 1
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    mask = torch.ones(rows, width, dtype=torch.bool)

    def prune(places: list[tuple[int, int]], count: int) -> None:
        def rank(place: tuple[int, int]) -> tuple[float, int]:
            row, j = place
            return float(weight[row, j] ** 2 / inverses[j][0, 0]), -places.index(place)

        for row, j in sorted(places, key=rank)[:count]:
            mask[row, j] = False

    for j in range(width):
        if isinstance(pattern, NM):
            if j % pattern.m == 0:
                for row in range(rows):
                    prune([(row, k) for k in range(j, j + pattern.m)], pattern.m - pattern.n)
        elif j % block == 0:
            columns = range(j, min(j + block, width))
            counts = prune_counts(pattern, (rows, width), j, columns.stop).tolist()
            if pattern.scope == "layer":
                prune([(row, k) for row in range(rows) for k in columns], counts[0])
            else:
                for row in range(rows):
                    prune([(row, k) for k in columns], counts[row])
        for row in range(rows):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j].clone() / inverses[j][0, 0] * inverses[j][0]
                weight[row, j] = 0
    return mask, weight


PATTERNS: list[Pattern] = [
    Unstructured(0.5, "layer"),
    Unstructured(0.7, "layer"),
    Unstructured(0.3, "row"),
    Unstructured(0.6, "row"),
    NM(2, 4),
    NM(1, 4),
    NM(2, 3),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block", [12, 24, 128])
@pytest.mark.parametrize("dead", [(), (1, 13)])
def test_equals_the_brute_force(make_layer: MakeLayer, pattern: Pattern, block: int, dead: tuple[int, ...]):
    weight, gram = make_layer(4, 24, seed=block, dead=dead)
    expected_mask, expected = surgeon(weight, gram, pattern, block)
    selection = select(weight, gram, pattern, block=block)
    assert torch.equal(selection.mask, expected_mask)
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.6, "row")], ids=str)
def test_equals_the_brute_force_in_blocks_that_do_not_divide_the_width(make_layer: MakeLayer, pattern: Pattern):
    weight, gram = make_layer(5, 17)
    expected_mask, expected = surgeon(weight, gram, pattern, 5)
    selection = select(weight, gram, pattern, block=5)
    assert torch.equal(selection.mask, expected_mask)
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight, expected)


def test_float32_is_close_to_float64(make_layer: MakeLayer):
    weight, gram = make_layer(8, 24)
    wide, narrow = (select(given, gram, NM(2, 4), block=8) for given in (weight, weight.float()))
    assert torch.equal(wide.mask, narrow.mask)
    assert wide.weight is not None
    assert narrow.weight is not None
    torch.testing.assert_close(narrow.weight, wide.weight.float(), rtol=1e-4, atol=1e-5)


def test_block_size_does_not_change_what_a_group_pattern_gives(make_layer: MakeLayer):
    weight, gram = make_layer(6, 24)  # the mask is chosen group by group, so blocks only save time
    small, large = select(weight, gram, NM(2, 4), block=4), select(weight, gram, NM(2, 4))
    assert torch.equal(small.mask, large.mask)
    assert small.weight is not None
    assert large.weight is not None
    torch.testing.assert_close(small.weight, large.weight)
