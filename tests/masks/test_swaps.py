"""Swaps against dense solves of every support they could lead to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimfit.masks import NM, Pattern, Unstructured, keep_best, swaps
from trimfit.masks.swaps import Tableau, make_tableau, pivot, swap, swap_candidates, swap_changes
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]
PATTERNS: list[Pattern] = [Unstructured(0.5, "row"), Unstructured(0.6, "layer"), NM(2, 4), NM(1, 3)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def optimum(dense: Tensor, mask: Tensor, matrix: Tensor) -> Tensor:
    """(m, n) exact weights on the mask, one dense solve for each row."""
    result = torch.zeros_like(dense)
    for row, kept in enumerate(mask):
        result[row, kept] = torch.linalg.solve(matrix[kept][:, kept], (matrix @ dense[row])[kept])
    return result


def errors(dense: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
    """(m,) ½ (w − ŵ)ᵀ H (w − ŵ)."""
    return torch.einsum("ri,ij,rj->r", weight - dense, matrix, weight - dense) / 2


def whole_tableau(dense: Tensor, mask: Tensor, matrix: Tensor) -> Tableau:
    """With every column a candidate."""
    weight = optimum(dense, mask, matrix)
    return make_tableau(matrix.expand(len(dense), -1, -1), weight, (dense - weight) @ matrix, mask)


def unit_layer(make_layer: MakeLayer, rows: int, width: int, seed: int = 0) -> tuple[Tensor, FactoredGram]:
    weight, gram = make_layer(rows, width, seed)
    return weight / gram.scale, gram


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_coupled_formula_equals_brute_force_for_all_pairs(make_layer: MakeLayer, sparsity: float):
    dense, gram = unit_layer(make_layer, 3, 7)
    mask = keep_best(dense.abs(), Unstructured(sparsity, "layer"))
    tableau = whole_tableau(dense, mask, gram.matrix)
    changes = swap_changes(tableau)
    before = errors(dense, optimum(dense, mask, gram.matrix), gram.matrix)
    for row in range(3):
        for i in range(7):
            for j in range(7):
                if not mask[row, i] or mask[row, j]:
                    assert changes[row, i, j] == torch.inf
                    continue
                swapped = mask[row : row + 1].clone()
                swapped[0, i], swapped[0, j] = False, True
                one = dense[row : row + 1]
                after = errors(one, optimum(one, swapped, gram.matrix), gram.matrix)
                torch.testing.assert_close(changes[row, i, j], (after - before[row])[0])


def test_one_pivot_changes_the_objective_by_the_plain_formulas(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 1, 6)
    mask = torch.tensor([[True, True, False, True, False, False]])
    tableau = whole_tableau(dense, mask, gram.matrix)
    before = errors(dense, optimum(dense, mask, gram.matrix), gram.matrix)
    for k in range(6):
        flipped = mask.clone()
        flipped[0, k] = ~flipped[0, k]
        after = errors(dense, optimum(dense, flipped, gram.matrix), gram.matrix)
        expected = -(tableau.vector[0, k] ** 2) / (2 * tableau.matrix[0, k, k])  # the diagonal is −P where kept
        torch.testing.assert_close((after - before)[0], expected)


def test_pivots_give_the_tableau_of_the_new_support(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 4, 8)
    mask = keep_best(dense.abs(), Unstructured(0.5, "row"))
    tableau = whole_tableau(dense, mask, gram.matrix)
    position = torch.tensor([0, 3, 5, 7])
    pivoted = pivot(tableau, position)
    flipped = mask.clone()
    flipped[torch.arange(4), position] ^= True
    expected = whole_tableau(dense, flipped, gram.matrix)
    assert torch.equal(pivoted.kept, flipped)
    torch.testing.assert_close(pivoted.matrix, expected.matrix)
    torch.testing.assert_close(pivoted.vector, expected.vector)
    back = pivot(pivoted, position)
    torch.testing.assert_close(back.matrix, tableau.matrix)
    torch.testing.assert_close(back.vector, tableau.vector)


def test_eliminated_weights_change_no_swap(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 5, 12)
    mask = keep_best(dense.abs(), Unstructured(0.4, "layer"))
    whole = swap_changes(whole_tableau(dense, mask, gram.matrix))
    weight = optimum(dense, mask, gram.matrix)
    columns = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:6] for i in range(5)])
    others = mask & ~torch.zeros_like(mask).scatter(1, columns, True)
    reduced, _, _ = swaps._eliminate(columns, others, gram)
    residual = (dense - weight) @ gram.matrix
    part = make_tableau(reduced, *(what.gather(1, columns) for what in (weight, residual, mask)))
    rows = torch.arange(5)[:, None, None]
    expected = whole[rows, columns[:, :, None], columns[:, None, :]]
    torch.testing.assert_close(swap_changes(part), expected, rtol=1e-4, atol=1e-5)  # eliminated in float32


def test_swaps_go_on_until_none_helps(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 6, 10)
    mask = keep_best(-dense.abs(), Unstructured(0.5, "row"))  # the worst start
    allowed = torch.ones(6, 10, 10, dtype=torch.bool)
    swapped = swap_candidates(whole_tableau(dense, mask, gram.matrix), allowed, torch.full((6,), 1e-12), 100)
    assert torch.equal(swapped.kept.sum(1), mask.sum(1))
    assert swap_changes(whole_tableau(dense, swapped.kept, gram.matrix)).min() > -1e-11
    torch.testing.assert_close(torch.where(swapped.kept, swapped.vector, 0), optimum(dense, swapped.kept, gram.matrix))


@every_pattern
@pytest.mark.parametrize("candidates", [3, 8, 24])
def test_rows_get_better_and_weights_are_optimal(make_layer: MakeLayer, pattern: Pattern, candidates: int):
    dense, gram = unit_layer(make_layer, 9, 24)
    mask = keep_best(dense.abs(), pattern)
    weight = optimum(dense, mask, gram.matrix)
    new_mask, new = swap(dense, weight, mask, gram, pattern, candidates=candidates)
    before, after = errors(dense, weight, gram.matrix), errors(dense, new, gram.matrix)
    assert (after <= before).all()
    assert after.sum() < before.sum()
    assert torch.equal(new_mask.sum(1), mask.sum(1))
    if isinstance(pattern, NM):
        assert (new_mask.view(9, -1, pattern.m).sum(2) == pattern.n).all()
    torch.testing.assert_close(new, optimum(dense, new_mask, gram.matrix), rtol=1e-4, atol=1e-4)
    assert not new[~new_mask].any()


def test_with_all_columns_as_candidates_no_swap_is_left(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 5, 16)
    mask = keep_best(-dense.abs(), Unstructured(0.5, "row"))
    weight = optimum(dense, mask, gram.matrix)
    new_mask, new = swap(dense, weight, mask, gram, Unstructured(0.5, "row"), candidates=16, limit=100)
    changes = swap_changes(whole_tableau(dense, new_mask, gram.matrix)).flatten(1).min(1).values
    assert (changes > -2e-6 * errors(dense, new, gram.matrix)).all()


def test_no_budget_no_swap(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 4, 8)
    mask = keep_best(-dense.abs(), Unstructured(0.5, "row"))
    weight = optimum(dense, mask, gram.matrix)
    same_mask, same = swap(dense, weight, mask, gram, Unstructured(0.5, "row"), limit=0)
    assert torch.equal(same_mask, mask)
    assert torch.equal(same, weight)
    one_mask, _ = swap(dense, weight, mask, gram, Unstructured(0.5, "row"), limit=1)
    assert ((one_mask != mask).sum(1) <= 2).all()


def test_the_worst_rows_get_what_the_budget_allows(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 6, 24)
    pattern = Unstructured(0.5, "row")
    mask = keep_best(-dense.abs(), pattern)  # each row has much to gain
    weight = optimum(dense, mask, gram.matrix)
    whole = swap(dense, weight, mask, gram, pattern, candidates=12)
    worst = errors(dense, weight, gram.matrix).argsort(descending=True)
    assert (whole[0] != mask).any(1).all()
    others = 12 - 6  # of the 12 kept weights half are candidates, and the others are eliminated
    for rows in range(7):
        part = swap(dense, weight, mask, gram, pattern, candidates=12, budget=(rows + 0.5) * others**3 / 3)
        changed = (part[0] != mask).any(1)
        assert changed.nonzero()[:, 0].tolist() == sorted(worst[:rows].tolist())
        torch.testing.assert_close(part[1][changed], whole[1][changed])


@every_pattern
def test_chunks_change_nothing(make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch, pattern: Pattern):
    dense, gram = unit_layer(make_layer, 9, 24)
    mask = keep_best(dense.abs(), pattern)
    weight = optimum(dense, mask, gram.matrix)
    whole = swap(dense, weight, mask, gram, pattern, candidates=9)
    monkeypatch.setattr(swaps, "_CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(swaps, "_BATCH_ELEMENTS_CPU", 1)
    chunked = swap(dense, weight, mask, gram, pattern, candidates=9)
    assert torch.equal(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1])


def test_rows_with_nothing_kept_or_nothing_pruned_stay(make_layer: MakeLayer):
    dense, gram = unit_layer(make_layer, 3, 6)
    mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3])
    weight = optimum(dense, mask, gram.matrix)
    new_mask, new = swap(dense, weight, mask, gram, Unstructured(0.5, "layer"))
    assert torch.equal(new_mask[:2], mask[:2])
    assert torch.equal(new[:2], weight[:2])


def test_falls_back_to_float64_where_float32_cannot_factorise():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(3, 12, generator=generator, dtype=torch.float64)
    gram = FactoredGram(inputs.T @ inputs / 40, 1e-9)
    columns, others = torch.tensor([[0, 1]]), torch.ones(1, 12, dtype=torch.bool)
    others[:, :2] = False
    places = others.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :10]
    factor, _ = swaps._factorise(columns, places, [10], gram.matrix, gram.matrix.float())
    assert factor.dtype == torch.float64
    assert torch.isfinite(factor).all()
