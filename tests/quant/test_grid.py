"""The grid against every level there is, and the placing of levels against the best that exists."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant import Grid, Levels, Quantized, place_levels
from trimfit.quant.grid import storable_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "zeros", "constant", "negative", "outlier", "one-sided", "sparse", "tiny", "huge", "mixed"]

grids = st.builds(Grid, st.integers(2, 8), st.sampled_from([None, 8, 16]), st.booleans())
seeds = st.integers(0, 2**31)


def make_weight(kind: str, seed: int = 0, rows: int = 3, width: int = 32) -> Tensor:
    """Float64 weights whose groups are of one kind, or each row of another."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "zeros":
        weight[:, : width // 2] = 0
    elif kind in ("constant", "negative"):
        weight = weight.mean(1, keepdim=True).abs().expand(rows, width) * (1 if kind == "constant" else -1)
    elif kind == "outlier":
        weight[:, seed % width] = 100
    elif kind == "one-sided":
        weight = weight.abs()
    elif kind == "sparse":
        weight[weight.abs() < 1] = 0
    elif kind in ("tiny", "huge"):
        weight = weight * (1e-30 if kind == "tiny" else 1e30)
    elif kind == "mixed":
        weight = weight * torch.logspace(-30, 30, width, dtype=torch.float64)
    return weight.contiguous()


def squares(error: Tensor, group_size: int | None) -> Tensor:
    """(out, groups) sums of squares."""
    return error.double().square().unflatten(1, (-1, group_size or error.shape[1])).sum(-1)


def exact(quantized: Quantized) -> Tensor:
    """The levels in float64, before they are rounded to the dtype of the scale."""
    return replace(quantized, scale=quantized.scale.double()).dequantize()


def best_squares(weight: Tensor, grid: Grid) -> float:
    """The least squared error of a vector over all scales and zero points, in float64.

    For one zero point the codes change only at scales at which a weight is halfway between two levels. Between two of
    those the error is a parabola of the scale.
    """
    best = weight.square().sum().item()
    for zero in [grid.middle] if grid.symmetric else range(grid.largest + 1):
        low, high = -zero, grid.largest - zero
        halves = torch.arange(low, high, dtype=torch.float64) + 0.5
        breaks = (weight[:, None] / halves).flatten()
        breaks = breaks[breaks > 0].sort().values
        if len(breaks) == 0:
            continue
        scales = torch.cat([breaks[:1] / 2, (breaks[1:] + breaks[:-1]) / 2, breaks[-1:] * 2])[:, None]
        steps = (weight / scales).round().clamp(low, high)
        energy = steps.square().sum(1)
        gain = (steps * weight).sum(1).clamp(min=0).square() / energy.clamp(min=1)
        best = min(best, (weight.square().sum() - gain).min().item())
    return best


@given(st.integers(2, 8), st.integers(1, 300), st.booleans(), st.integers(1, 600))
def test_a_fitted_grid_has_the_smallest_groups_that_need_no_more_scales(
    bits: int, size: int, symmetric: bool, width: int
):
    fitted = Grid(bits, size, symmetric).fitted(width)
    assert (fitted.bits, fitted.symmetric) == (bits, symmetric)
    group = fitted.group_size or width
    assert width % group == 0
    assert (fitted.group_size is None) == (group == width)
    assert group >= size or group == width
    assert not any(width % smaller == 0 for smaller in range(size, group))
    assert fitted.fitted(width) == fitted


def test_a_grid_for_whole_rows_fits_all_widths():
    assert Grid(4, None).fitted(131) == Grid(4, None)
    assert Grid(4, 128).fitted(4096).group_size == 128
    assert Grid(4, 128).fitted(131).group_size is None  # a prime
    assert Grid(4, 128).fitted(344).group_size == 172
    assert Grid(4, 128).fitted(64).group_size is None  # a narrow layer


@given(grids, st.sampled_from(KINDS), st.sampled_from(DTYPES), seeds, st.booleans())
@settings(deadline=None, max_examples=100)
def test_levels_are_sound_for_all_weights(grid: Grid, kind: str, dtype: torch.dtype, seed: int, clip: bool):
    given_weight = make_weight(kind, seed).float()
    weight = given_weight.clone()
    levels = place_levels(weight, grid, clip=clip, dtype=dtype)
    quantized = levels.nearest(weight)
    assert torch.equal(weight, given_weight)
    assert levels.scale.dtype == dtype and levels.zero_point.dtype == quantized.codes.dtype == torch.uint8
    assert levels.scale.shape == levels.zero_point.shape == (3, 32 // (grid.group_size or 32))
    assert (levels.scale > 0).all() and levels.scale.isfinite().all()
    assert levels.zero_point.max() <= grid.largest and quantized.codes.max() <= grid.largest
    if grid.symmetric:
        assert (levels.zero_point == grid.middle).all()
    assert (quantized.dequantize()[weight == 0] == 0).all()
    if kind not in ("huge", "mixed"):
        assert quantized.dequantize().isfinite().all()
    assert torch.equal(quantized.levels.scale, levels.scale)
    again = levels.nearest(exact(quantized))
    assert torch.equal(again.codes, quantized.codes)


@pytest.mark.parametrize("kind", ["normal", "outlier", "constant", "negative", "one-sided"])
@pytest.mark.parametrize("factor", [1e-34, 1e-22, 1e18, 1e34])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_size_of_weights_does_not_matter(kind: str, factor: float, symmetric: bool):
    """Float32 holds weights whose squares it does not hold."""
    weight = make_weight(kind).clamp(-8, 8)
    size = torch.tensor(factor, dtype=torch.float64).log2().round().exp2()
    plain = place_levels(weight.float(), Grid(4, 16, symmetric)).nearest(weight.float())
    scaled = (weight.float().double() * size).float()
    moved = place_levels(scaled, Grid(4, 16, symmetric)).nearest(scaled)
    assert torch.equal(moved.codes, plain.codes)
    torch.testing.assert_close(moved.scale.double() / size, plain.scale.double(), rtol=1e-6, atol=0)


def test_scales_beyond_the_storage_are_the_nearest_that_it_holds():
    scale = torch.tensor([0.0, 1e-30, 1e-4, 1.0, 1e9])
    half = torch.finfo(torch.float16)
    expected = torch.tensor([2**-24, 2**-24, 1e-4, 1.0, half.max], dtype=torch.float16)
    assert torch.equal(storable_scale(scale, torch.float16), expected)


def test_small_weights_lose_nothing_to_scales_in_float16():
    """Steps of 8 bits are below its normal numbers where weights are below 128 · 2⁻¹⁴."""
    weight = make_weight("normal").float() * 2**-11
    half, full = (
        place_levels(weight, Grid(8, 16), dtype=dtype).nearest(weight) for dtype in (torch.float16, torch.float32)
    )
    assert half.scale.max() < torch.finfo(torch.float16).tiny
    assert squares(exact(half) - weight, None).sum() < 1.1 * squares(exact(full) - weight, None).sum()


@given(
    grids,
    st.sampled_from([*DTYPES, torch.float64]),
    st.sampled_from([*DTYPES, torch.float64]),
    seeds,
)
@settings(deadline=None, max_examples=75)
def test_nearest_is_the_nearest_of_all_levels(grid: Grid, weights_in: torch.dtype, scales_in: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = (3 * torch.randn(4, 16, generator=generator)).to(weights_in)
    groups = 16 // (grid.group_size or 16)
    scale = (torch.rand(4, groups, generator=generator) * 2 ** (4 - grid.bits) + 0.01).to(scales_in)
    zero = torch.randint(0, grid.largest + 1, (4, groups), generator=generator).to(torch.uint8)
    quantized = Levels(grid, scale, zero).nearest(weight)
    wide_scale, wide_zero = (part.double().repeat_interleave(16 // groups, 1)[..., None] for part in (scale, zero))
    every = (torch.arange(grid.largest + 1) - wide_zero) * wide_scale
    least = (every - weight.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((exact(quantized) - weight.double()).abs(), least, rtol=0, atol=1e-5)


@given(grids, st.sampled_from(["normal", "constant", "negative", "outlier", "one-sided", "sparse"]), seeds)
@settings(deadline=None, max_examples=50)
def test_without_clipping_the_range_is_covered(grid: Grid, kind: str, seed: int):
    weight = make_weight(kind, seed)
    levels = place_levels(weight, grid, clip=False)
    error = (levels.nearest(weight).dequantize() - weight).abs()
    assert (error <= 0.5 * levels.columns(32)[0] * (1 + 1e-9)).all()


@given(grids, st.sampled_from(KINDS), st.sampled_from(DTYPES), seeds, st.booleans())
@settings(deadline=None, max_examples=75)
def test_clipping_never_raises_the_error(grid: Grid, kind: str, dtype: torch.dtype, seed: int, weighted: bool):
    weight = make_weight(kind, seed).float()
    importance = torch.rand(32, generator=torch.Generator().manual_seed(seed)) if weighted else None
    found = place_levels(weight, grid, importance=importance, dtype=dtype).nearest(weight)
    plain = place_levels(weight, grid, importance=importance, dtype=dtype, clip=False).nearest(weight)
    roots = torch.ones(32, dtype=torch.float64) if importance is None else importance.double().sqrt()
    after, before = (squares((exact(q) - weight.double()) * roots, grid.group_size) for q in (found, plain))
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "most"), [(2, 1.12), (3, 1.1), (4, 1.12)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "outlier", "one-sided"])
def test_placing_is_near_the_best_of_all_scales_and_zero_points(bits: int, most: float, symmetric: bool, kind: str):
    weight = make_weight(kind, bits, rows=12, width=24).clamp(-6, 6)
    grid = Grid(bits, None, symmetric)
    found = squares(place_levels(weight, grid).nearest(weight).dequantize() - weight, None)[:, 0]
    best = torch.tensor([best_squares(row, grid) for row in weight], dtype=torch.float64)
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() <= most * best.sum()


def test_clipping_is_worth_much_at_few_bits():
    weight = make_weight("normal", rows=20, width=128)
    errors = []
    for clip in (True, False):
        quantized = place_levels(weight, Grid(2, None, True), clip=clip).nearest(weight)
        errors.append((quantized.dequantize() - weight).square().sum())
    assert errors[0] < 0.4 * errors[1]


@given(grids, st.sampled_from(["normal", "outlier", "one-sided", "sparse"]), seeds)
@settings(deadline=None, max_examples=50)
def test_importance_counts_columns(grid: Grid, kind: str, seed: int):
    """A column that counts k times is k columns."""
    grid = Grid(grid.bits, None, grid.symmetric)
    weight = make_weight(kind, seed, width=20)
    counts = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(seed))
    counts[0] = 1
    weighted = place_levels(weight, grid, importance=counts.double())
    repeated = place_levels(weight.repeat_interleave(counts, 1), grid)
    torch.testing.assert_close(weighted.scale, repeated.scale, rtol=1e-12, atol=0)
    assert torch.equal(weighted.zero_point, repeated.zero_point)


def test_columns_of_no_importance_do_not_widen_the_range():
    weight = make_weight("normal")
    importance = torch.ones(32)
    importance[5] = 0
    expected = place_levels(weight, Grid(4, 8), importance=importance)
    weight[:, 5] = 1e6
    levels = place_levels(weight, Grid(4, 8), importance=importance)
    assert torch.equal(levels.scale, expected.scale) and torch.equal(levels.zero_point, expected.zero_point)
    nothing = place_levels(weight, Grid(4, 8), importance=torch.zeros(32))
    assert (nothing.scale > 0).all() and nothing.scale.isfinite().all()


@given(grids, st.sampled_from(DTYPES), seeds)
@settings(deadline=None, max_examples=100)
def test_weights_on_a_grid_stay_as_they_are(grid: Grid, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    size = grid.group_size or 32
    codes = torch.randint(0, grid.largest + 1, (3, 32), generator=generator)
    codes[:, ::size], codes[:, 1::size] = 0, grid.largest  # the whole range is used
    scale = (torch.rand(3, 32 // size, generator=generator) + 0.01).to(dtype)
    zero = torch.randint(1, grid.largest + 1, (3, 32 // size), generator=generator)
    if grid.symmetric:
        zero = torch.full_like(zero, grid.middle)
    given_levels = Quantized(codes.to(torch.uint8), scale, zero.to(torch.uint8), grid)
    weight = exact(given_levels).float()
    again = place_levels(weight, grid, dtype=dtype).nearest(weight)
    assert torch.equal(again.codes, given_levels.codes) and torch.equal(again.zero_point, given_levels.zero_point)
    torch.testing.assert_close(again.scale, scale, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_dequantize_computes_what_compressed_tensors_computes(
    dtype: torch.dtype, bits: int, symmetric: bool, group_size: int | None
):
    grid = Grid(bits, group_size, symmetric)
    weight = make_weight("normal", bits)
    quantized = place_levels(weight, grid, dtype=dtype).nearest(weight)
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group_size else "channel", group_size=group_size
    )
    codes, zero = (part.to(torch.int16) - grid.middle for part in (quantized.codes, quantized.zero_point))
    expected = dequantize(codes, quantized.scale, None if symmetric else zero, args)
    assert expected.dtype == quantized.dequantize().dtype == dtype
    assert torch.equal(quantized.dequantize(), expected)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [(1, None, "bits"), (9, 32, "bits"), (4, 0, "group size"), (4, -8, "group size")],
)
def test_grids_that_do_not_exist_are_refused(bits: int, group_size: int | None, message: str):
    with pytest.raises(InputError, match=message):
        Grid(bits, group_size)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "floating matrix"),
        (torch.zeros(2, 3, 8), "floating matrix"),
        (torch.zeros(0, 8), "floating matrix"),
        (torch.zeros(2, 8, dtype=torch.int32), "floating matrix"),
        (torch.zeros(2, 12), r"groups of 8 do not divide 12 inputs; use grid.fitted\(12\)"),
        (torch.full((2, 8), torch.nan), "NaN or infinite"),
        (torch.full((2, 8), -torch.inf), "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(weight: Tensor, message: str):
    with pytest.raises(InputError, match=message):
        place_levels(weight, Grid(4, 8))


@pytest.mark.parametrize(
    "importance",
    [
        torch.ones(7),
        torch.ones(1, 8),
        torch.full((8,), torch.nan),
        torch.full((8,), torch.inf),
        torch.tensor([1.0] * 7 + [-1]),
    ],
)
def test_importance_that_makes_no_sense_is_refused(importance: Tensor):
    with pytest.raises(InputError, match="importance must be 8 finite numbers"):
        place_levels(torch.randn(2, 8), Grid(4, None), importance=importance)
