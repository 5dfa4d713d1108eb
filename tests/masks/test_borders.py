"""Masks and values at a border against those that a sort gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimfit import InputError
from trimfit.masks import NM, Pattern, Scope, Unstructured, keep_best
from trimfit.masks.borders import Borders, kth_lowest, sort
from trimfit.masks.patterns import run_counts


def masked(scores: Tensor, pattern: Pattern) -> Tensor:
    return Borders(run_counts(pattern, (scores.shape[0], scores.shape[1])), scores.device).prune_lowest(scores)


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 99),
    st.sampled_from(["row", "layer"]),
    st.sampled_from([2, 5, 1000]),
)
def test_the_mask_is_that_of_keep_best(rows: int, width: int, percent: int, scope: Scope, levels: int):
    generator = torch.Generator().manual_seed(percent)
    scores = torch.randint(levels, (rows, width), generator=generator).float()  # with many ties, or few
    pattern = Unstructured(percent / 100, scope)
    assert torch.equal(masked(scores, pattern), keep_best(scores, pattern))
    if width % 3 == 0:
        assert torch.equal(masked(scores, NM(1, 3)), keep_best(scores, NM(1, 3)))


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.7, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("levels", [4, 10000], ids=["ties", "no-ties"])
def test_nothing_is_sorted(pattern: Pattern, levels: int, monkeypatch: pytest.MonkeyPatch):
    """For a mask sort takes most of the time, and weights in 16 bits are always tied."""
    scores = torch.randint(levels, (6, 40), generator=torch.Generator().manual_seed(0)).float()
    expected = keep_best(scores, pattern)
    for name in ("sort", "argsort"):
        monkeypatch.setattr(Tensor, name, None)
    assert torch.equal(masked(scores, pattern), expected)


def test_scores_that_are_no_numbers():
    scores = torch.rand(4, 8)
    scores[1, 2] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        masked(scores, Unstructured(0.5, "layer"))


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 99))
def test_values_at_a_border(rows: int, width: int, seed: int):
    runs = torch.randint(20, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    sorted_runs = runs.sort(dim=1).values
    for k in range(1, width + 1):
        assert torch.equal(kth_lowest(runs, k), sorted_runs[:, k - 1])
    assert torch.equal(sort(runs[0]), sorted_runs[0])
