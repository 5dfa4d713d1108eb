"""Thanos against the definition: each block's removal is a least-squares problem with equality constraints."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit.masks import NM, Pattern, Unstructured, thanos
from trimfit.masks.patterns import prune_counts
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]


def minimiser(weight: Tensor, hessian: Tensor, forced: list[int]) -> Tensor:
    """The v nearest to w in (v − w)ᵀ H (v − w) with v = 0 at `forced`: the saddle point system, solved as it stands."""
    width, count = len(weight), len(forced)
    system = torch.zeros(width + count, width + count, dtype=torch.float64)
    system[:width, :width] = hessian
    for i, j in enumerate(forced):
        system[width + i, j] = system[j, width + i] = 1
    right = torch.cat([hessian @ weight, torch.zeros(count, dtype=torch.float64)])
    solution = torch.linalg.solve(system, right)[:width]
    solution[forced] = 0
    return solution


def by_definition(weight: Tensor, gram: FactoredGram, pattern: Pattern, block: int) -> tuple[Tensor, Tensor]:
    """(mask, weights) in plain loops. `block` must be a multiple of M."""
    rows, width = weight.shape
    weight = weight.clone()
    weight[:, gram.dead] = 0
    hessian = gram.raw + gram.damping * gram.raw.diagonal().mean() * torch.eye(width)
    for j in range(width):
        if gram.dead[j]:
            hessian[j, :] = hessian[:, j] = 0
            hessian[j, j] = 1
    norms = gram.raw.diagonal().sqrt()
    mask = torch.ones(rows, width, dtype=torch.bool)

    def lowest(places: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        ranked = sorted(range(len(places)), key=lambda i: (float(weight[places[i]].abs() * norms[places[i][1]]), -i))
        return [places[i] for i in ranked[:count]]

    for start in range(0, width, block):
        stop = min(start + block, width)
        if isinstance(pattern, NM):
            n, m = pattern.n, pattern.m
            groups = [[(row, j + k) for k in range(m)] for row in range(rows) for j in range(start, stop, m)]
            pruned = [place for group in groups for place in lowest(group, m - n)]
        elif pattern.scope == "layer":
            left = int(prune_counts(pattern, (rows, width))) - int((~mask).sum())
            pruned = lowest([(row, j) for row in range(rows) for j in range(start, width)], left)
        else:
            left_of = prune_counts(pattern, (rows, width)) - (~mask).sum(1)
            runs = [[(row, j) for j in range(start, width)] for row in range(rows)]
            pruned = [place for row, run in enumerate(runs) for place in lowest(run, int(left_of[row]))]
        for row, j in pruned:
            if j < stop:
                mask[row, j] = False
        for row in range(rows):
            forced = [j - start for j in range(start, stop) if not mask[row, j]]
            weight[row, start:] = minimiser(weight[row, start:], hessian[start:, start:], forced)
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
def test_equals_the_definition(make_layer: MakeLayer, pattern: Pattern, block: int, dead: tuple[int, ...]):
    weight, gram = make_layer(4, 24, seed=block, dead=dead)
    expected_mask, expected = by_definition(weight, gram, pattern, min(block, 24))
    selection = thanos.select(weight, gram, pattern, block=block)
    assert torch.equal(selection.mask, expected_mask)
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight, expected)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.6, "row")], ids=str)
def test_equals_the_definition_in_blocks_that_do_not_divide_the_width(make_layer: MakeLayer, pattern: Pattern):
    weight, gram = make_layer(5, 17)
    expected_mask, expected = by_definition(weight, gram, pattern, 5)
    selection = thanos.select(weight, gram, pattern, block=5)
    assert torch.equal(selection.mask, expected_mask)
    assert selection.weight is not None
    torch.testing.assert_close(selection.weight, expected)


def test_one_block_is_the_optimum_for_its_mask(make_layer: MakeLayer):
    weight, gram = make_layer(6, 16, damping=0)
    selection = thanos.select(weight, gram, Unstructured(0.5, "layer"))
    assert selection.weight is not None
    gradient = (selection.weight - weight) @ gram.raw
    assert gradient[selection.mask].abs().max() < 1e-12 * gradient.abs().max()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_chunks_of_rows_change_nothing(make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch, pattern: Pattern):
    weight, gram = make_layer(7, 24)
    whole = thanos.select(weight, gram, pattern, block=12)
    monkeypatch.setattr(thanos, "_BATCH_ELEMENTS_CPU", 200)
    chunked = thanos.select(weight, gram, pattern, block=12)
    assert torch.equal(whole.mask, chunked.mask)
    assert whole.weight is not None
    assert chunked.weight is not None
    torch.testing.assert_close(whole.weight, chunked.weight)


def test_float32_is_close_to_float64(make_layer: MakeLayer):
    weight, gram = make_layer(8, 24)
    wide, narrow = (thanos.select(given, gram, NM(2, 4), block=8) for given in (weight, weight.float()))
    assert torch.equal(wide.mask, narrow.mask)
    assert wide.weight is not None
    assert narrow.weight is not None
    torch.testing.assert_close(narrow.weight, wide.weight.float(), rtol=1e-4, atol=1e-5)
