"""What holds for every selector, and the two that only score."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit.errors import InputError
from trimfit.masks import NM, SELECTORS, Pattern, Scope, Selection, Unstructured
from trimfit.masks.patterns import prune_counts
from trimfit.masks.sparsegpt import select as sparsegpt
from trimfit.masks.thanos import select as thanos
from trimfit.refit.gram import FactoredGram

every_selector = pytest.mark.parametrize("name", list(SELECTORS))
updating = pytest.mark.parametrize("name", [name for name, selector in SELECTORS.items() if selector.updates_weights])
PATTERNS: list[Pattern] = [Unstructured(0.5, "row"), Unstructured(0.5, "layer"), NM(2, 4)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]


def run(name: str, weight: Tensor, gram: FactoredGram, pattern: Pattern, block: int = 128) -> Selection:
    """The selector of that name; those that go block by block get the block size."""
    if name == "sparsegpt":
        return sparsegpt(weight, gram, pattern, block=block)
    if name == "thanos":
        return thanos(weight, gram, pattern, block=block)
    return SELECTORS[name].select(weight, gram, pattern)


def test_the_table():
    assert set(SELECTORS) == {"magnitude", "wanda", "sparsegpt", "thanos", "joint"}
    assert {name: selector.default_scope for name, selector in SELECTORS.items()} == {
        "magnitude": "layer",
        "wanda": "row",
        "sparsegpt": "layer",
        "thanos": "layer",
        "joint": "layer",
    }


@every_selector
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 13),
    percent=st.integers(0, 99),
    scope=st.sampled_from(["row", "layer"]),
    block=st.integers(1, 14),
    dead=st.booleans(),
)
def test_counts_are_exact(
    make_layer: MakeLayer, name: str, rows: int, width: int, percent: int, scope: Scope, block: int, dead: bool
):
    weight, gram = make_layer(rows, width, seed=percent, dead=(width // 2,) if dead else ())
    pattern = Unstructured(percent / 100, scope)
    selection = run(name, weight, gram, pattern, block)
    counts = prune_counts(pattern, (rows, width))
    assert torch.equal((~selection.mask).reshape(len(counts), -1).sum(1), counts)
    if selection.weight is not None:
        assert not selection.weight[~selection.mask].any()


@every_selector
@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (2, 3)])
def test_every_group_of_every_row_keeps_n(make_layer: MakeLayer, name: str, n: int, m: int, block: int):
    weight, gram = make_layer(10, 24, dead=(3,))
    weight[0] *= 100  # an outlier row is pruned like the others
    selection = run(name, weight, gram, NM(n, m), block)
    assert (selection.mask.view(10, 24 // m, m).sum(2) == n).all()
    if selection.weight is not None:
        assert not selection.weight[~selection.mask].any()


@every_selector
@every_pattern
def test_permuting_rows_permutes_the_result(make_layer: MakeLayer, name: str, pattern: Pattern):
    weight, gram = make_layer(6, 12)  # 36 of 72 pruned: equally many in each row
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = run(name, weight, gram, pattern, 5), run(name, weight[order], gram, pattern, 5)
    assert torch.equal(one.mask[order], other.mask)
    if one.weight is not None and other.weight is not None:
        torch.testing.assert_close(one.weight[order], other.weight)


@every_selector
@every_pattern
def test_scaling_the_weights_scales_the_result(make_layer: MakeLayer, name: str, pattern: Pattern):
    weight, gram = make_layer(6, 12)
    one, other = run(name, weight, gram, pattern, 5), run(name, -4 * weight, gram, pattern, 5)  # exact in binary
    assert torch.equal(one.mask, other.mask)
    if one.weight is not None and other.weight is not None:
        assert torch.equal(-4 * one.weight, other.weight)


@every_selector
@every_pattern
@pytest.mark.parametrize("factor", [2.0**-60, 16.0])
def test_the_unit_of_the_inputs_does_not_matter(make_layer: MakeLayer, name: str, pattern: Pattern, factor: float):
    weight, gram = make_layer(6, 12)
    weight = weight.float()
    scaled = FactoredGram(gram.raw * factor, gram.damping)
    one, other = run(name, weight, gram, pattern, 5), run(name, weight, scaled, pattern, 5)
    assert torch.equal(one.mask, other.mask)
    if one.weight is not None and other.weight is not None:
        torch.testing.assert_close(one.weight, other.weight)


@every_selector
@every_pattern
def test_equal_weights_and_inputs_keep_the_lower_index(name: str, pattern: Pattern):
    gram = FactoredGram(torch.eye(8), 0.01)
    mask = run(name, torch.ones(4, 8), gram, pattern).mask
    column = torch.arange(8)
    if isinstance(pattern, NM):
        expected = (column % 4 < 2).expand(4, 8)
    elif pattern.scope == "row":
        expected = (column < 4).expand(4, 8)
    else:
        expected = (torch.arange(4) < 2)[:, None].expand(4, 8)
    assert torch.equal(mask, expected)


@every_selector
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_sparsity_zero_keeps_all_and_changes_nothing(make_layer: MakeLayer, name: str, scope: Scope):
    weight, gram = make_layer(3, 9)
    selection = run(name, weight, gram, Unstructured(0, scope), 4)
    assert selection.mask.all()
    assert selection.weight is None or torch.equal(selection.weight, weight)


@every_selector
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8])
def test_one_input(make_layer: MakeLayer, name: str, sparsity: float):
    weight, gram = make_layer(5, 1)
    selection = run(name, weight, gram, Unstructured(sparsity, "layer"))
    smallest = weight.abs().flatten().argsort()[: round(sparsity * 5)]
    expected = torch.ones(5, dtype=torch.bool)
    expected[smallest] = False
    assert torch.equal(selection.mask[:, 0], expected)
    if selection.weight is not None:  # no other input could make up for anything
        assert torch.equal(selection.weight, weight * expected[:, None])


@every_selector
@every_pattern
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_is_computed_in_float32(make_layer: MakeLayer, name: str, pattern: Pattern, dtype: torch.dtype):
    weight, gram = make_layer(6, 12)
    weight = weight.to(dtype)
    wide = weight if dtype == torch.float64 else weight.float()
    selection, expected = run(name, weight, gram, pattern, 5), run(name, wide, gram, pattern, 5)
    assert torch.equal(selection.mask, expected.mask)
    assert (selection.weight is not None) == SELECTORS[name].updates_weights
    if selection.weight is not None and expected.weight is not None:
        assert selection.weight.dtype == wide.dtype
        assert torch.equal(selection.weight, expected.weight)


@every_selector
@every_pattern
def test_inputs_are_left_alone(make_layer: MakeLayer, name: str, pattern: Pattern):
    weight, gram = make_layer(6, 12, dead=(2,))
    parameter = torch.nn.Parameter(weight.clone())
    before = {what: value.clone() for what, value in vars(gram).items() if isinstance(value, Tensor)}
    selection = run(name, parameter, gram, pattern, 5)
    assert torch.equal(parameter, weight)
    assert all(torch.equal(getattr(gram, what), value) for what, value in before.items())
    if selection.weight is not None:
        assert not selection.weight.requires_grad
        selection.weight.fill_(7)
        assert torch.equal(parameter, weight)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "thanos"])
@every_pattern
def test_dead_inputs_are_pruned_first(make_layer: MakeLayer, name: str, pattern: Pattern):
    weight, gram = make_layer(6, 12, dead=(0, 5))
    weight[:, [0, 5]] *= 1000
    selection = run(name, weight, gram, pattern)
    assert not selection.mask[:, [0, 5]].any()


@updating
def test_dead_inputs_that_stay_get_weight_zero_and_disturb_nothing(make_layer: MakeLayer, name: str):
    weight, gram = make_layer(4, 8, dead=(0, 1, 2))
    kept = run(name, weight, gram, NM(2, 4))  # three of the first four are dead, two must stay
    assert (kept.mask[:, :4].sum(1) == 2).all()
    assert kept.weight is not None
    assert not kept.weight[:, :3].any()
    louder = weight.clone()
    louder[:, :3] = 100
    again = run(name, louder, gram, NM(2, 4))
    assert again.weight is not None
    assert torch.equal(kept.weight, again.weight)


@updating
@every_pattern
def test_own_updates_reduce_the_layer_error(make_layer: MakeLayer, name: str, pattern: Pattern):
    for seed in range(5):
        weight, gram = make_layer(8, 24, seed)
        selection = run(name, weight, gram, pattern, 8)
        assert selection.weight is not None
        mask_only = gram.energy(weight * selection.mask - weight)
        assert gram.energy(selection.weight - weight) < 0.9 * mask_only


@updating
@every_pattern
def test_uncorrelated_inputs_need_no_updates(make_layer: MakeLayer, name: str, pattern: Pattern):
    weight, gram = make_layer(6, 12)
    diagonal = FactoredGram(gram.raw.diagonal().diag(), 0.01)
    selection = run(name, weight, diagonal, pattern, 5)
    assert selection.weight is not None
    assert torch.equal(selection.weight, weight * selection.mask)


@every_selector
def test_rejects_what_does_not_fit(make_layer: MakeLayer, name: str):
    weight, gram = make_layer(4, 10)
    half = Unstructured(0.5, "layer")
    for wrong in (weight[:, :9], weight[0], weight[:0], weight[None]):
        with pytest.raises(InputError, match=r"\(out, 10\)"):
            run(name, wrong, gram, half)
    for value in (float("nan"), float("inf")):
        damaged = weight.clone()
        damaged[3, 9] = value
        with pytest.raises(InputError, match="NaN or infinite"):
            run(name, damaged, gram, half)
    with pytest.raises(InputError, match="10 inputs cannot be split into groups of 4"):
        run(name, weight, gram, NM(2, 4))


@pytest.mark.parametrize("name", ["sparsegpt", "thanos"])
def test_rejects_empty_blocks(make_layer: MakeLayer, name: str):
    weight, gram = make_layer(4, 8)
    for pattern in PATTERNS:
        with pytest.raises(InputError, match="block"):
            run(name, weight, gram, pattern, 0)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_magnitude_is_by_the_definition(make_layer: MakeLayer, sparsity: float):
    weight, gram = make_layer(6, 8)
    mask = SELECTORS["magnitude"].select(weight, gram, Unstructured(sparsity, "layer")).mask
    threshold = sorted(abs(value) for value in weight.flatten().tolist())[round(sparsity * 48)]
    assert mask.tolist() == [[abs(value) >= threshold for value in row] for row in weight.tolist()]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_wanda_is_by_the_definition(make_layer: MakeLayer, sparsity: float):
    weight, gram = make_layer(6, 8, damping=1.0)  # which must not count
    mask = SELECTORS["wanda"].select(weight, gram, Unstructured(sparsity, "row")).mask
    for row in range(6):
        scores = [abs(weight[row, j].item()) * gram.raw[j, j].item() ** 0.5 for j in range(8)]
        threshold = sorted(scores)[round(sparsity * 8)]
        assert mask[row].tolist() == [score >= threshold for score in scores]


def test_wanda_sees_the_inputs():
    gram = FactoredGram(torch.diag(torch.tensor([100.0, 1.0])))
    weight = torch.tensor([[0.5, 1.0]])
    assert SELECTORS["wanda"].select(weight, gram, Unstructured(0.5, "row")).mask.tolist() == [[True, False]]
    assert SELECTORS["magnitude"].select(weight, gram, Unstructured(0.5, "row")).mask.tolist() == [[False, True]]
