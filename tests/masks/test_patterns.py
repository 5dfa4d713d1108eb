from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimfit.errors import InputError
from trimfit.masks import NM, Scope, Unstructured, keep_best, parse_pattern
from trimfit.masks.patterns import prune_counts, prune_lowest

sizes = st.integers(1, 12)
percents = st.integers(0, 99).map(lambda percent: percent / 100)
sparsities = st.one_of(percents, st.floats(0, 1, exclude_max=True))
scopes = st.sampled_from(["row", "layer"])


def expected_total(sparsity: float, rows: int, width: int) -> int:
    return int((Decimal(str(sparsity)) * rows * width).to_integral_value(ROUND_HALF_EVEN))


def random_scores(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), (" 4:8\n", 4, 8), ("1:16", 1, 16), ("2:3", 2, 3)])
def test_parses_patterns(text: str, n: int, m: int):
    assert parse_pattern(text) == NM(n, m)
    assert parse_pattern(text).sparsity == pytest.approx((m - n) / m)


@pytest.mark.parametrize("text", ["2:3:4", "5:4", "0:4", "a:b", "4:4", "0:0", "", "2", "2:", "-2:4", "2.0:4", "2: 4"])
def test_rejects_what_is_not_a_pattern(text: str):
    with pytest.raises(InputError):
        parse_pattern(text)


def test_says_why_a_pattern_is_rejected():
    with pytest.raises(InputError, match="nothing to prune"):
        parse_pattern("4:4")
    with pytest.raises(InputError, match="5:4 is impossible"):
        parse_pattern("5:4")
    with pytest.raises(InputError, match="such as 2:4"):
        parse_pattern("a:b")
    with pytest.raises(InputError, match="impossible"):
        NM(-1, 4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_rejects_impossible_sparsity(sparsity: float):
    with pytest.raises(InputError, match="sparsity"):
        Unstructured(sparsity, "row")


def test_rejects_unknown_scope():
    with pytest.raises(InputError, match="column"):
        Unstructured(0.5, "column")  # type: ignore[arg-type]


@given(sizes, sizes, sparsities, scopes, st.integers(0, 9))
def test_counts_are_exact_and_the_highest_stay(rows: int, width: int, sparsity: float, scope: Scope, seed: int):
    scores = random_scores(rows, width, seed)
    mask = keep_best(scores, Unstructured(sparsity, scope))
    total = expected_total(sparsity, rows, width)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == total
    per_row = (~mask).sum(1)
    if scope == "row":
        assert set(per_row.tolist()) <= {total // rows, -(-total // rows)}
    groups = [(scores, mask)] if scope == "layer" else list(zip(scores, mask, strict=True))
    for values, kept in groups:
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize(("rows", "width"), [(1, 45), (45, 1), (5, 9)])
def test_counts_follow_the_decimal_not_its_float(scope: Scope, rows: int, width: int):
    assert round(0.7 * 45) == 31  # what floats say of 31.5
    assert int((~keep_best(random_scores(rows, width), Unstructured(0.7, scope))).sum()) == 32


@given(sizes, sizes, scopes, st.data())
def test_a_fraction_carries_an_exact_count(rows: int, width: int, scope: Scope, data: st.DataObject):
    count = data.draw(st.integers(0, rows * width - 1))
    pattern = Unstructured(Fraction(count, rows * width), scope)
    assert int((~keep_best(random_scores(rows, width), pattern)).sum()) == count


def test_uneven_rows_follow_the_documented_spread():
    mask = keep_best(random_scores(4, 5), Unstructured(0.5, "row"))  # 10 over 4 rows
    assert (~mask).sum(1).tolist() == [2, 3, 2, 3]


@given(sizes, st.integers(1, 30), sparsities, scopes, st.data())
def test_counts_of_column_ranges_add_up(rows: int, width: int, sparsity: float, scope: Scope, data: st.DataObject):
    pattern = Unstructured(sparsity, scope)
    cuts = sorted(data.draw(st.sets(st.integers(1, width)))) or [width]
    edges = [0, *cuts] if cuts[-1] == width else [0, *cuts, width]
    parts = [prune_counts(pattern, (rows, width), *edge) for edge in pairwise(edges)]
    assert torch.equal(torch.stack(parts).sum(0), prune_counts(pattern, (rows, width)))
    capacity = 1 if scope == "row" else rows
    for (start, stop), part in zip(pairwise(edges), parts, strict=True):
        assert (part >= 0).all()
        assert (part <= capacity * (stop - start)).all()


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (2, 3)])
def test_every_group_has_its_n_highest(n: int, m: int):
    scores = random_scores(5, 24)
    mask = keep_best(scores, NM(n, m))
    for row in range(5):
        for start in range(0, 24, m):
            group = scores[row, start : start + m].tolist()
            highest = sorted(range(m), key=lambda j: -group[j])[:n]
            assert mask[row, start : start + m].nonzero().flatten().tolist() == sorted(highest)


def test_of_ties_the_lower_index_is_kept():
    equal = torch.ones(4, 100)
    first_half = torch.arange(100) < 50
    assert torch.equal(keep_best(equal, Unstructured(0.5, "row")), first_half.expand(4, 100))
    assert torch.equal(keep_best(equal, Unstructured(0.5, "layer")), torch.arange(400).view(4, 100) < 200)
    assert torch.equal(keep_best(equal, NM(1, 4)), (torch.arange(100) % 4 == 0).expand(4, 100))
    some = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    assert keep_best(some, Unstructured(0.4, "row")).tolist() == [[True, True, False, True, False]]


def test_runs_have_counts_of_their_own():
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    mask = prune_lowest(scores, torch.tensor([1, 2]))
    assert mask.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "layer"), NM(2, 4)])
def test_nan_scores_are_an_error(pattern: Unstructured | NM):
    scores = random_scores(2, 4)
    scores[1, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        keep_best(scores, pattern)


def test_width_must_suit_the_groups():
    with pytest.raises(
        InputError, match=r"10 inputs .* groups of 4 .* 2:4; choose an M that divides 10, or an unstructured sparsity"
    ):
        keep_best(random_scores(2, 10), NM(2, 4))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), (0, 4), (4, 0)])
def test_scores_must_be_a_matrix(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="shape"):
        keep_best(torch.ones(shape), Unstructured(0.5, "row"))


def test_works_on_views_that_are_not_contiguous():
    scores = random_scores(6, 4).T
    for pattern in (Unstructured(0.5, "row"), Unstructured(0.5, "layer"), NM(1, 2)):
        assert torch.equal(keep_best(scores, pattern), keep_best(scores.contiguous(), pattern))
