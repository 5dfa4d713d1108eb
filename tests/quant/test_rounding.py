"""Adaptive rounding against the same algorithm in plain float64 loops, and against every rounding there is."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant import Grid, Levels, Quantized, place_levels
from trimfit.quant.grid import storable_scale
from trimfit.quant.rounding import BLOCK, OTHER_SCALES, gram_error, round_to_gram
from trimfit.refit.gram import FactoredGram

MakeLayer = Callable[..., tuple[Tensor, FactoredGram]]


def damped(gram: FactoredGram) -> Tensor:
    """H with its damping; dead inputs weigh a millionth of others on average and are coupled to none."""
    mean = gram.raw.diagonal().mean()
    hessian = gram.raw + gram.damping * mean * torch.eye(gram.size, dtype=torch.float64)
    for j in range(gram.size):
        if gram.dead[j]:
            hessian[j, :] = hessian[:, j] = 0
            hessian[j, j] = 1e-6 * (mean if mean > 0 else 1)
    return hessian


def exact(quantized: Quantized) -> Tensor:
    """The levels in float64, before they are rounded to the dtype of the scale."""
    return replace(quantized, scale=quantized.scale.double()).dequantize()


def row_errors(quantized: Quantized | Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """(out,) (ŵ − w) H (ŵ − w)ᵀ of each row."""
    levels = quantized if isinstance(quantized, Tensor) else exact(quantized)
    difference = levels - weight.double()
    return ((difference @ hessian) * difference).sum(1)


def reference(weight: Tensor, levels: Levels, gram: FactoredGram, sweeps: int, kept: Tensor | None) -> Quantized:
    """The algorithm one weight at a time, without blocks, each gradient computed from scratch."""
    rows, width = weight.shape
    size = width // levels.scale.shape[1]
    scale, zero = levels.scale.double().clone(), levels.zero_point.double()
    steps = torch.zeros_like(weight)
    hessian = damped(gram)

    def nearest(target: Tensor, j: int) -> Tensor:
        group = j // size
        wish = (target / scale[:, group]).round()
        for row in range(rows):
            low, high = -zero[row, group].item(), levels.grid.largest - zero[row, group].item()
            wish[row] = min(max(wish[row].item(), low), high)
            if kept is not None and not kept[row, j]:
                wish[row] = 0
        steps[:, j] = wish
        return wish * scale[:, group]

    def value() -> Tensor:
        return steps * scale.repeat_interleave(size, 1)

    rest, inverse = weight.clone(), torch.linalg.inv(hessian)
    for j in range(width):
        lost = rest[:, j] - nearest(rest[:, j], j)
        rest[:, j:] -= torch.outer(lost, inverse[0] / inverse[0, 0])
        inverse = (inverse - torch.outer(inverse[0], inverse[0]) / inverse[0, 0])[1:, 1:]
    for _ in range(sweeps):
        for group in range(scale.shape[1]):
            columns = slice(group * size, (group + 1) * size)
            for j in range(columns.start, columns.stop):
                now = value()
                nearest(now[:, j] - (now - weight) @ hessian[:, j] / hessian[j, j], j)
            inside = torch.zeros_like(steps)
            inside[:, columns] = steps[:, columns]
            left = weight - value() + inside * scale[:, group, None]  # what this group is to be
            best = ((inside @ hessian) * left).sum(1) / ((inside @ hessian) * inside).sum(1)
            old, before = scale[:, group].clone(), row_errors(value(), weight, hessian)
            scale[:, group] = storable_scale(best, levels.scale.dtype).double()
            worse = ~(row_errors(value(), weight, hessian) < before)
            scale[worse, group] = old[worse]
    codes = steps + zero.repeat_interleave(size, 1)
    return Quantized(codes.to(torch.uint8), scale.to(levels.scale.dtype), levels.zero_point, levels.grid)


@pytest.mark.parametrize(
    ("width", "group_size"),
    [(20, 5), (130, 32), (130, None), (300, 32), (300, 150), (300, None), (BLOCK, 32), (2 * BLOCK, BLOCK)],
)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_equals_the_plain_algorithm(make_layer: MakeLayer, width: int, group_size: int | None, sweeps: int):
    weight, gram = make_layer(3, width, seed=width, dead=(1, width - 1))
    grid = Grid(3, group_size).fitted(width)
    assert (grid.group_size or width) == {(130, 32): 65, (300, 32): 50}.get((width, group_size), group_size or width)
    kept = torch.rand(3, width, generator=torch.Generator().manual_seed(0)) > 0.3
    for dtype, mask in ((torch.float64, None), (torch.bfloat16, kept)):
        found = round_to_gram(weight, grid, gram, dtype=dtype, kept=mask, sweeps=sweeps)
        plain = round_to_gram(weight, grid, gram, dtype=dtype, kept=mask, sweeps=0)  # has the scales of the start
        expected = reference(weight, plain.levels, gram, sweeps, mask)
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-9 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_each_row_starts_from_the_best_of_several_scales(make_layer: MakeLayer, bits: int):
    weight, gram = make_layer(24, 40)
    grid, hessian = Grid(bits, 8), damped(gram)
    clipped = place_levels(weight, grid)
    starts = [replace(clipped, scale=clipped.scale * ratio) for ratio in (1, *OTHER_SCALES)]
    errors = torch.stack([row_errors(reference(weight, start, gram, 0, None), weight, hessian) for start in starts])
    assert len(errors.argmin(0).unique()) == len(starts)
    found = row_errors(round_to_gram(weight, grid, gram, sweeps=0), weight, hessian)
    torch.testing.assert_close(found, errors.amin(0))


@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([(12, 4), (40, None), (BLOCK + 32, 32), (2 * BLOCK + 6, None)]),
    st.sampled_from([torch.float64, torch.float16, torch.bfloat16]),
    st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_no_sweep_raises_the_error_of_a_row(
    make_layer: MakeLayer,
    seed: int,
    bits: int,
    symmetric: bool,
    shape: tuple[int, int | None],
    dtype: torch.dtype,
    masked: bool,
):
    width, group_size = shape
    weight, gram = make_layer(4, width, seed, damping=0.001, dead=(3,))
    kept = torch.rand(4, width, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    grid, hessian = Grid(bits, group_size, symmetric), damped(gram)
    last = torch.full((4,), torch.inf, dtype=torch.float64)
    for sweeps in range(4):
        rounded = round_to_gram(weight, grid, gram, dtype=dtype, kept=kept, sweeps=sweeps)
        assert rounded.scale.dtype == dtype and (rounded.scale > 0).all() and rounded.scale.isfinite().all()
        assert rounded.codes.max() <= grid.largest
        errors = row_errors(rounded, weight, hessian)
        assert (errors <= last * (1 + 1e-9)).all()
        last = errors


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_step_is_worth_its_time(make_layer: MakeLayer, bits: int, symmetric: bool):
    totals = torch.zeros(4, dtype=torch.float64)
    grid = Grid(bits, 16, symmetric)
    for seed in range(4):
        weight, gram = make_layer(8, 64, seed)
        hessian = damped(gram)
        totals[0] += row_errors(place_levels(weight, grid).nearest(weight), weight, hessian).sum()
        for sweeps in range(3):
            rounded = round_to_gram(weight, grid, gram, sweeps=sweeps)
            totals[sweeps + 1] += row_errors(rounded, weight, hessian).sum()
    nearest, fed_back, once, twice = totals.tolist()
    assert fed_back < 0.75 * nearest
    assert once < 0.95 * fed_back
    assert twice < once


def every_steps(quantized: Quantized) -> Tensor:
    """(rows, 2^(bits·n), n) all steps that a row with one scale can take."""
    count, (_, width) = quantized.grid.largest + 1, quantized.codes.shape
    codes = torch.tensor(list(product(range(count), repeat=width)), dtype=torch.float64)
    return codes - quantized.zero_point.double()[:, :, None]


@pytest.mark.parametrize(("bits", "width"), [(2, 3), (2, 5), (3, 3), (3, 4)])
def test_codes_and_scales_are_near_the_best_of_all(make_layer: MakeLayer, bits: int, width: int):
    found, best, nearest, best_scaled = [], [], [], []
    for seed in range(12):
        weight, gram = make_layer(6, width, seed)
        hessian = damped(gram)
        rounded = round_to_gram(weight, Grid(bits, None), gram)
        steps = every_steps(rounded)
        lost = steps * rounded.scale[:, :, None] - weight[:, None]
        seen = steps @ hessian
        gain = (seen * weight[:, None]).sum(2).clamp(min=0).square() / (seen * steps).sum(2).clamp(min=1e-12)
        found.append(row_errors(rounded, weight, hessian))
        best.append(((lost @ hessian) * lost).sum(2).amin(1))  # with the scales that were found
        nearest.append(row_errors(rounded.levels.nearest(weight), weight, hessian))
        best_scaled.append(((weight @ hessian) * weight).sum(1) - gain.amax(1))  # each choice with its best scale
    found, best, nearest, best_scaled = (torch.cat(parts) for parts in (found, best, nearest, best_scaled))
    assert (found >= best * (1 - 1e-9)).all() and (best >= best_scaled * (1 - 1e-9)).all()
    assert found.sum() < 1.25 * best.sum()
    assert (found <= best * (1 + 1e-9)).double().mean() > 0.8
    assert nearest.sum() > 1.5 * best.sum()
    assert found.sum() < (1.6 if bits == 2 else 2.5) * best_scaled.sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [10, None])
def test_inputs_that_are_not_correlated_leave_nothing_to_feed_back(bits: int, group_size: int | None):
    weight = torch.randn(5, 8 * BLOCK + 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = Grid(bits, group_size).fitted(weight.shape[1])
    gram = FactoredGram(torch.eye(weight.shape[1], dtype=torch.float64))
    rounded = round_to_gram(weight, grid, gram, sweeps=0)
    assert torch.equal(rounded.codes, rounded.levels.nearest(weight).codes)
    swept = round_to_gram(weight, grid, gram)
    assert (exact(swept) - weight).norm() < (exact(place_levels(weight, grid).nearest(weight)) - weight).norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_what_is_pruned_stays_zero_and_the_others_make_up_for_it(make_layer: MakeLayer, symmetric: bool, sweeps: int):
    weight, gram = make_layer(8, 4 * BLOCK + 32, damping=0.001)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    grid, hessian = Grid(4, 32, symmetric), damped(gram)
    rounded = round_to_gram(weight, grid, gram, dtype=torch.bfloat16, kept=kept, sweeps=sweeps)
    assert (rounded.dequantize()[~kept] == 0).all()
    assert (rounded.dequantize()[kept] != 0).double().mean() > 0.8
    masked = torch.where(kept, exact(place_levels(weight, grid).nearest(weight)), 0)
    most = 0.9 if sweeps == 0 else 0.8
    assert row_errors(rounded, weight, hessian).sum() < most * row_errors(masked, weight, hessian).sum()


def test_a_mask_that_keeps_all_changes_nothing(make_layer: MakeLayer):
    weight, gram = make_layer(4, 40)
    plain = round_to_gram(weight, Grid(3, 8), gram)
    masked = round_to_gram(weight, Grid(3, 8), gram, kept=torch.ones(4, 40, dtype=torch.bool))
    assert torch.equal(plain.codes, masked.codes) and torch.equal(plain.scale, masked.scale)
    nothing = round_to_gram(weight, Grid(3, 8), gram, kept=torch.zeros(4, 40, dtype=torch.bool))
    assert (nothing.dequantize() == 0).all()


def test_dead_inputs_are_rounded_to_nearest_and_disturb_no_others(make_layer: MakeLayer):
    dead = (0, 7, 20)
    weight, gram = make_layer(4, 24, dead=dead)
    grid = Grid(3, 1)  # scales of their own
    rounded = round_to_gram(weight, grid, gram, sweeps=0)
    nearest = rounded.levels.nearest(weight)
    assert torch.equal(rounded.codes[:, list(dead)], nearest.codes[:, list(dead)])
    weight[:, list(dead)] += 5
    others = [j for j in range(24) if j not in dead]
    for sweeps in (0, 2):
        before = round_to_gram(weight, grid, gram, sweeps=sweeps)
        weight[:, list(dead)] -= 11
        after = round_to_gram(weight, grid, gram, sweeps=sweeps)
        assert torch.equal(before.codes[:, others], after.codes[:, others])
        assert torch.equal(before.scale[:, others], after.scale[:, others])


def test_inputs_that_are_all_dead_give_the_nearest_levels():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = FactoredGram(torch.zeros(16, 16, dtype=torch.float64), 0.01)
    rounded = round_to_gram(weight, Grid(3, 8), gram, sweeps=0)
    assert torch.equal(rounded.codes, place_levels(weight, Grid(3, 8)).nearest(weight).codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_few_digits_cost_little(make_layer: MakeLayer, dtype: torch.dtype):
    weight, gram = make_layer(16, 64)
    narrow, wide = (round_to_gram(weight, Grid(4, 32), gram, dtype=kind) for kind in (dtype, None))
    assert narrow.scale.dtype == dtype and wide.scale.dtype == torch.float64
    mine, best = (row_errors(q, weight, damped(gram)).sum() for q in (narrow, wide))
    assert mine < 1.05 * best


def test_float32_is_close_to_float64_and_leaves_the_weights_alone(make_layer: MakeLayer):
    weight, gram = make_layer(16, 200, dead=(4,))
    given_weight = weight.float()
    narrow = round_to_gram(given_weight, Grid(4, 50), gram)
    assert narrow.scale.dtype == torch.float32 and torch.equal(given_weight, weight.float())
    wide = round_to_gram(weight, Grid(4, 50), gram)
    mine, best = (row_errors(q, weight, damped(gram)).sum().item() for q in (narrow, wide))
    assert mine == pytest.approx(best, rel=0.02)
    again = round_to_gram(given_weight, Grid(4, 50), gram)
    assert torch.equal(narrow.codes, again.codes) and torch.equal(narrow.scale, again.scale)


def test_rows_are_problems_of_their_own_and_the_unit_of_the_inputs_does_not_matter(make_layer: MakeLayer):
    weight, gram = make_layer(5, 40, dead=(2,))
    whole = round_to_gram(weight, Grid(3, 8), gram)
    scaled = round_to_gram(weight, Grid(3, 8), FactoredGram(gram.raw * 2.0**20, gram.damping))
    assert torch.equal(whole.codes, scaled.codes)
    torch.testing.assert_close(whole.scale, scaled.scale)
    for row in range(5):
        alone = round_to_gram(weight[row : row + 1], Grid(3, 8), gram)
        assert torch.equal(alone.codes[0], whole.codes[row])
        torch.testing.assert_close(alone.scale[0], whole.scale[row])


@pytest.mark.parametrize("kind", ["few tokens", "repeated inputs", "one direction"])
def test_singular_gram_matrices_are_no_obstacle(kind: str):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 48, generator=generator, dtype=torch.float64)
    if kind == "few tokens":
        inputs = inputs[:5]
    elif kind == "repeated inputs":
        inputs[:, 24:] = inputs[:, :24]
    else:
        inputs = inputs[:, :1] * torch.ones(48)
    raw = inputs.T @ inputs / len(inputs)
    weight = torch.randn(6, 48, generator=generator)
    grid = Grid(3, 16)
    rounded = round_to_gram(weight, grid, FactoredGram(raw, 1e-4))
    assert rounded.scale.isfinite().all() and (rounded.scale > 0).all()
    nearest = place_levels(weight, grid).nearest(weight)
    assert row_errors(rounded, weight, raw).sum() < 0.5 * row_errors(nearest, weight, raw).sum()


def test_gram_error_is_the_share_of_the_outputs_energy(make_layer: MakeLayer):
    weight, gram = make_layer(4, 24)
    rounded = round_to_gram(weight, Grid(3, 8), gram)
    factor = torch.linalg.cholesky(gram.raw)
    lost = ((exact(rounded) - weight) @ factor).square().sum() / (weight @ factor).square().sum()
    assert gram_error(rounded.dequantize(), weight, gram.raw) == pytest.approx(lost.item(), rel=1e-12)
    assert gram_error(torch.zeros_like(weight), weight, gram.raw) == pytest.approx(1)
    assert gram_error(weight, weight, gram.raw) == 0
    zeros = torch.zeros_like(weight)
    assert gram_error(zeros, zeros, gram.raw) == 0
    in_half = gram_error(rounded.dequantize().bfloat16(), weight.bfloat16(), gram.raw.float())
    assert math.isclose(in_half, lost.item(), rel_tol=0.05)


@pytest.mark.parametrize(
    ("weight", "grid", "message"),
    [
        (torch.zeros(2, 9), Grid(4, None), "Gram matrix is of 8 inputs, but the weight has 9"),
        (torch.zeros(2, 8), Grid(4, 3), "groups of 3 do not divide 8 inputs"),
        (torch.full((2, 8), torch.nan), Grid(4, None), "NaN or infinite"),
        (torch.zeros(8), Grid(4, None), "floating matrix"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(weight: Tensor, grid: Grid, message: str):
    gram = FactoredGram(torch.eye(8))
    with pytest.raises(InputError, match=message):
        round_to_gram(weight, grid, gram)


@pytest.mark.parametrize(
    "kept", [torch.ones(8, dtype=torch.bool), torch.ones(3, 8, dtype=torch.bool), torch.ones(2, 8)]
)
def test_masks_that_do_not_fit_are_refused(kept: Tensor):
    with pytest.raises(InputError, match=r"the mask of kept weights must be bool of \(2, 8\)"):
        round_to_gram(torch.randn(2, 8), Grid(4, None), FactoredGram(torch.eye(8)), kept=kept)
