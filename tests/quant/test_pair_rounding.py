"""Joint rounding of a pair, against products formed head by head and against every rounding there is."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant import nearest_plane
from trimfit.quant.grid import Grid, Quantized
from trimfit.quant.pair_rounding import (
    Pair,
    RoundedPair,
    nearest_pair,
    product_errors,
    round_pair,
)

round_pair_pseudo_inverse = partial(round_pair, solver=nearest_plane.nearest_to_pseudo_inverse)
GRAMS = ["none", "diagonal", "full"]


def make_pair(
    seed: int = 0,
    *,
    heads: int = 3,
    group: int = 2,
    r: int = 8,
    n: int = 24,
    d: int = 20,
    dtype: torch.dtype = torch.float64,
) -> Pair:
    """Heads' rows are scattered over a value layer with others in it, and columns over the output layer."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(heads * r + 4, n, generator=generator, dtype=torch.float64)
    output = torch.randn(d, heads * group * r, generator=generator, dtype=torch.float64)
    output *= torch.logspace(0, -1, heads * group * r, dtype=torch.float64)
    rows = torch.randperm(heads * r + 4, generator=generator)[: heads * r].view(heads, r)
    columns = torch.randperm(heads * group * r, generator=generator).view(heads, group, r)
    return Pair(value.to(dtype), output.to(dtype), rows, columns)


def make_gram(kind: str, n: int, seed: int = 0) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "diagonal":
        return torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    inputs = torch.randn(4 * n, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, n, generator=generator, dtype=torch.float64
    ) + 0.5 * torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs)


def start_of(
    pair: Pair, bits: int = 3, gram: Tensor | None = None, group_size: int | None = 8
) -> tuple[Quantized, Quantized]:
    grid = Grid(bits, group_size)
    return nearest_pair(pair, grid, grid, input_gram=gram)


def plain_errors(pair: Pair, value: Tensor, output: Tensor, gram: Tensor | None) -> Tensor:
    """The definition, one query head at a time."""
    n = value.shape[1]
    gram = torch.eye(n, dtype=torch.float64) if gram is None else gram.diag() if gram.dim() == 1 else gram
    errors = []
    for rows, groups in zip(pair.value_rows, pair.output_columns, strict=True):
        total = 0.0
        for columns in groups:
            lost = pair.output[:, columns].double() @ pair.value[rows].double()
            lost = lost - output[:, columns].double() @ value[rows].double()
            total += torch.trace(lost @ gram @ lost.T)
        errors.append(total)
    return torch.stack(errors)


def errors_of(pair: Pair, rounded: tuple[Quantized, Quantized] | RoundedPair, gram: Tensor | None) -> Tensor:
    value, output = (rounded.value, rounded.output) if isinstance(rounded, RoundedPair) else rounded
    return plain_errors(pair, value.dequantize(), output.dequantize(), gram)


def test_what_is_gathered_can_be_scattered():
    pair = make_pair()
    a, b = pair.gather_output(pair.output), pair.gather_value(pair.value)
    assert a.shape == (3, 8, 40) and b.shape == (3, 8, 24)
    torch.testing.assert_close(a[1, :, 20:].T, pair.output[:, pair.output_columns[1, 1]], rtol=0, atol=0)
    assert torch.equal(pair.scatter_output(a, torch.zeros_like(pair.output)), pair.output)
    value = pair.scatter_value(b + 1, pair.value)
    assert torch.equal(pair.gather_value(value), b + 1)
    assert (value == pair.value).all(1).sum() == 4


@pytest.mark.parametrize("kind", GRAMS)
def test_product_errors_are_those_of_the_products(kind: str):
    pair, gram = make_pair(), make_gram(kind, 24)
    value, output = (quantized.dequantize() for quantized in start_of(pair))
    expected = plain_errors(pair, value, output, gram)
    torch.testing.assert_close(product_errors(pair, value, output, gram), expected, rtol=1e-10, atol=0)
    if kind == "full" and gram is not None:  # what is not symmetric in it weighs nothing
        skewed = gram + gram.triu(1) / 10 - gram.tril(-1) / 10
        torch.testing.assert_close(product_errors(pair, value, output, skewed), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("rounding", [round_pair, round_pair_pseudo_inverse])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_sweep_keeps_or_lowers_the_error_of_every_head(kind: str, rounding, bits: int):
    pair, gram = make_pair(), make_gram(kind, 24)
    start = start_of(pair, bits, gram)
    rounded = rounding(pair, start, input_gram=gram, sweeps=4)
    assert (rounded.errors.diff(dim=0) <= 0).all()
    torch.testing.assert_close(rounded.errors[0], errors_of(pair, start, gram), rtol=1e-9, atol=0)
    torch.testing.assert_close(rounded.errors[-1], errors_of(pair, rounded, gram), rtol=1e-9, atol=0)
    zeros = torch.zeros_like(pair.value), torch.zeros_like(pair.output)
    energy = plain_errors(pair, *zeros, gram)
    torch.testing.assert_close(rounded.energy, energy)
    assert rounded.relative_error == pytest.approx(errors_of(pair, rounded, gram).sum() / energy.sum())


@pytest.mark.parametrize(("kind", "most"), [("none", 0.7), ("diagonal", 0.7), ("full", 0.45)])
def test_feedback_is_better_than_the_pseudo_inverse_which_is_better_than_nothing(kind: str, most: float):
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(4):
        pair, gram = make_pair(seed, r=16, n=48), make_gram(kind, 48, seed)
        start = start_of(pair, 3, gram, 16)
        for index, rounding in enumerate((round_pair_pseudo_inverse, round_pair)):
            totals[index + 1] += rounding(pair, start, input_gram=gram).relative_error
        totals[0] += round_pair(pair, start, input_gram=gram, sweeps=0).relative_error
    nearest, pseudo_inverse, feedback = totals.tolist()
    assert pseudo_inverse < nearest
    assert feedback < most * nearest
    assert feedback < 0.8 * pseudo_inverse


def test_coupled_inputs_are_worth_knowing():
    with_all, with_diagonal = 0.0, 0.0
    for seed in range(4):
        pair, gram = make_pair(seed), make_gram("full", 24, seed)
        assert gram is not None
        start = start_of(pair, 3, gram)
        with_all += errors_of(pair, round_pair(pair, start, input_gram=gram), gram).sum()
        with_diagonal += errors_of(pair, round_pair(pair, start, input_gram=gram.diagonal()), gram).sum()
    assert with_all < 0.6 * with_diagonal


def test_each_head_starts_from_the_better_of_the_start_and_the_nearest_levels():
    pair = make_pair()
    nearest = start_of(pair)
    good = round_pair(pair, nearest)
    value, output = good.value, good.output
    # Spoil the first head; the others keep what was found.
    codes = pair.scatter_value(torch.full((3, 8, 24), 7), value.codes)
    codes[pair.value_rows[1:]] = value.codes[pair.value_rows[1:]]
    mixed = round_pair(pair, (replace(value, codes=codes), output), sweeps=0)
    error = errors_of(pair, mixed, None)
    torch.testing.assert_close(error[0], errors_of(pair, nearest, None)[0])
    torch.testing.assert_close(error[1:], good.errors[-1][1:])
    assert torch.equal(pair.gather_value(mixed.value.codes)[0], pair.gather_value(nearest[0].codes)[0])
    assert torch.equal(pair.gather_output(mixed.output.codes)[0], pair.gather_output(nearest[1].codes)[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_and_what_is_in_no_pair_stay(symmetric: bool, dtype: torch.dtype):
    pair = make_pair(dtype=dtype)
    grid = Grid(3, 8, symmetric)
    start = nearest_pair(pair, grid, grid, dtype=torch.float16)
    rounded = round_pair(pair, start)
    for before, after in zip(start, (rounded.value, rounded.output), strict=True):
        assert torch.equal(before.scale, after.scale) and torch.equal(before.zero_point, after.zero_point)
        assert after.grid == before.grid and after.codes.dtype == torch.uint8
        assert after.codes.max() <= 7 and not torch.equal(after.codes, before.codes)
    others = torch.ones(len(pair.value), dtype=torch.bool)
    others[pair.value_rows] = False
    assert others.sum() == 4
    assert torch.equal(rounded.value.codes[others], start[0].codes[others])
    exact = Pair(pair.value.double(), pair.output.double(), pair.value_rows, pair.output_columns)
    in_double = (replace(q, scale=q.scale.double()) for q in (rounded.value, rounded.output))
    value, output = (quantized.dequantize() for quantized in in_double)
    torch.testing.assert_close(rounded.errors[-1], plain_errors(exact, value, output, None), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("rounding", [round_pair, round_pair_pseudo_inverse])
def test_zeros_stay_zero_where_asked(kind: str, rounding):
    pair, gram = make_pair(), make_gram(kind, 24)
    for weight in (pair.value, pair.output):
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    start = start_of(pair, 3, gram)
    spoiled = tuple(replace(q, codes=(q.codes + 1).clamp(max=7)) for q in start)
    for first in (start, spoiled):
        rounded = rounding(pair, first, input_gram=gram, keep_zeros=True)
        value, output = rounded.value.dequantize(), rounded.output.dequantize()
        assert (pair.gather_value(value)[pair.gather_value(pair.value) == 0] == 0).all()
        assert (output[pair.output == 0] == 0).all()
        assert (rounded.errors[-1] < rounded.errors[0]).all()
    filled = round_pair(pair, start, input_gram=gram)
    assert (filled.output.dequantize()[pair.output == 0] != 0).any()
    assert filled.relative_error < rounded.relative_error


def test_levels_are_placed_by_what_the_inputs_weigh():
    pair = make_pair()
    gram = make_gram("full", 24)
    assert gram is not None
    diagonal = torch.zeros(24, dtype=torch.float64)
    diagonal[:3] = 1  # nothing else of V matters, and scales follow
    value, _ = nearest_pair(pair, Grid(2, None), Grid(2, None), input_gram=diagonal)
    plain, output = start_of(pair, 2, None, None)
    lost = [(q.dequantize() - pair.value)[:, :3].square().sum() for q in (value, plain)]
    assert lost[0] < 0.7 * lost[1]
    small = replace(pair, value=pair.value.clone())
    small.value[pair.value_rows[:2]] *= 1e-4  # now only the third head's columns matter in O
    _, weighted = nearest_pair(small, Grid(2, None), Grid(2, None))
    third = pair.output_columns[2].flatten()
    lost = [(q.dequantize() - pair.output)[:, third].square().sum() for q in (weighted, output)]
    assert lost[0] < 0.9 * lost[1]
    of_full, of_diagonal = (nearest_pair(pair, Grid(3, 8), Grid(3, 8), input_gram=g) for g in (gram, gram.diagonal()))
    assert torch.equal(of_full[0].scale, of_diagonal[0].scale)


def random_problem(seed: int, r: int, m: int) -> tuple[Tensor, Tensor, Tensor, nearest_plane.Lattice]:
    """H and the cross matrix, of correlated rows, a factor (1, r, m) before rounding and the 2-bit levels around it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, r, 2 * r, generator=generator, dtype=torch.float64)
    rows = rows + 1.5 * torch.randn(1, 1, 2 * r, generator=generator, dtype=torch.float64)
    other = rows + 0.2 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(1, r, m, generator=generator, dtype=torch.float64) + 0.5
    low = -torch.randint(0, 4, (1, r, m), generator=generator).double()
    exact = (low + 3 * torch.rand(1, r, m, generator=generator, dtype=torch.float64)) * scale
    return rows @ rows.mT, rows @ other.mT, exact, nearest_plane.Lattice(scale, low, low + 3)


def damped_problem(hessian: Tensor, cross: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """H with its ridge, and the target that the ridge pulls to the exact factor."""
    ridge = 0.01 * hessian[0].diagonal().mean() * torch.eye(hessian.shape[-1], dtype=torch.float64)
    return hessian[0] + ridge, torch.linalg.solve(hessian[0] + ridge, (cross[0] + ridge) @ exact[0])


def test_with_one_factor_fixed_rounding_is_near_the_best_there_is():
    found, best, nearest = [], [], []
    for seed in range(10):
        hessian, cross, exact, lattice = random_problem(seed, 3, 20)
        damped, target = damped_problem(hessian, cross, exact)
        choices = torch.tensor(list(product(range(4), repeat=3)), dtype=torch.float64)
        every = (choices[:, :, None] + lattice.low) * lattice.scale  # (64, 3, 20)

        def objective(x: Tensor, damped: Tensor = damped, target: Tensor = target) -> Tensor:
            return ((x - target) * (damped @ (x - target))).sum(-2)

        rounded = nearest_plane.with_feedback(hessian, cross, exact, lattice, None)
        found.append(objective(rounded)[0])
        best.append(objective(every).amin(0))
        nearest.append(objective(lattice.nearest(target))[0])
    found, best, nearest = torch.cat(found), torch.cat(best), torch.cat(nearest)
    assert (found > best * (1 - 1e-9)).all()
    assert found.sum() < 1.15 * best.sum()
    assert (found < best * (1 + 1e-9)).double().mean() > 0.7
    assert nearest.sum() > 1.5 * best.sum()


def test_with_coupled_inputs_rounding_is_near_the_best_there_is():
    found, best, nearest = 0.0, 0.0, 0.0
    every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.float64).view(-1, 2, 3)
    for seed in range(12):
        hessian, cross, exact, lattice = random_problem(seed, 2, 3)
        gram = random_problem(100 + seed, 3, 1)[0][0]
        damped, target = damped_problem(hessian, cross, exact)

        def objective(x: Tensor, damped: Tensor = damped, target: Tensor = target, gram: Tensor = gram) -> Tensor:
            return ((x - target) * (damped @ (x - target) @ gram)).sum((-2, -1))

        rounded = nearest_plane.with_feedback(hessian, cross, exact, lattice, nearest_plane.unit_lower(gram))
        least = objective((every + lattice.low) * lattice.scale).min().item()
        assert objective(rounded).item() > least * (1 - 1e-9)
        found += objective(rounded).item()
        best += least
        nearest += objective(lattice.nearest(target)).item()
    assert found < 1.8 * best  # half of the weights are at the border of the few levels there are
    assert nearest > 3.3 * best


def test_the_two_sided_sweep_is_the_nearest_plane_of_the_kronecker_product(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nearest_plane, "COLUMNS", 3)
    r, n = 4, 8
    hessian, cross, exact, lattice = random_problem(0, r, n)
    gram = random_problem(1, n, 1)[0][0]
    damped, target = damped_problem(hessian, cross, exact)
    lower = nearest_plane.unit_lower(gram)
    swept = nearest_plane.with_feedback(hessian, cross, exact, lattice, lower)[0]
    # One weight at a time, from the last input to the first and within it from the first channel to the last: what is
    # left to choose makes up for the errors so far at best, so a weight goes to where it then would be.
    order = [i * n + j for j in reversed(range(n)) for i in range(r)]
    whole = torch.kron(damped, gram)[order][:, order]
    wish, level = target.flatten()[order], torch.empty(r * n, dtype=torch.float64)
    scale, low = lattice.scale.flatten()[order], lattice.low.flatten()[order]
    for k in range(r * n):
        inverse = torch.linalg.inv(whole[k:, k:])
        level[k] = ((wish[k] / scale[k]).round().clamp(low[k], low[k] + 3)) * scale[k]
        wish[k:] = wish[k:] + (level[k] - wish[k]) * inverse[0] / inverse[0, 0]
    torch.testing.assert_close(swept.flatten()[order], level, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 32])
def test_blocks_of_a_sweep_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int):
    hessian, cross, exact, lattice = random_problem(0, 10, 15)
    expected = nearest_plane.with_feedback(hessian, cross, exact, lattice, None)
    monkeypatch.setattr(nearest_plane, "BLOCK", block)
    monkeypatch.setattr(nearest_plane, "COLUMNS", block)
    torch.testing.assert_close(nearest_plane.with_feedback(hessian, cross, exact, lattice, None), expected)
    gram = random_problem(1, 15, 1)[0][0]
    lower = nearest_plane.unit_lower(gram)
    coupled = nearest_plane.with_feedback(hessian, cross, exact, lattice, lower)
    monkeypatch.undo()
    torch.testing.assert_close(nearest_plane.with_feedback(hessian, cross, exact, lattice, lower), coupled)


@pytest.mark.parametrize("kind", GRAMS)
def test_a_second_run_gives_the_same(kind: str):
    pair, gram = make_pair(dtype=torch.float32), make_gram(kind, 24)
    start = start_of(pair, 3, gram)
    first, second = (round_pair(pair, start, input_gram=gram) for _ in range(2))
    assert torch.equal(first.value.codes, second.value.codes) and torch.equal(first.output.codes, second.output.codes)
    assert torch.equal(first.errors, second.errors)


@pytest.mark.parametrize("rounding", [round_pair, round_pair_pseudo_inverse])
@pytest.mark.parametrize("kind", GRAMS)
def test_heads_and_inputs_of_zeros_do_no_harm(rounding, kind: str):
    pair, gram = make_pair(dtype=torch.float32), make_gram(kind, 24)
    pair.value[pair.value_rows[0]] = 0
    pair.value[pair.value_rows[1, :3]] = 0
    pair.output[:, pair.output_columns[1, :, 5]] = 0
    pair.output[:, pair.output_columns[2]] = 0
    if gram is not None:
        gram[..., 4], gram[4] = 0, 0
    rounded = rounding(pair, start_of(pair, 3, gram), input_gram=gram)
    assert (rounded.errors[-1][[0, 2]] == 0).all()
    assert 0 < rounded.errors[-1][1] < 0.1 * rounded.energy[1]
    nothing = None if gram is None else torch.zeros_like(gram)
    unseen = rounding(pair, start_of(pair, 3, nothing), input_gram=nothing)
    assert unseen.relative_error == 0 if nothing is not None else unseen.relative_error > 0


def test_exact_levels_stay_and_the_search_ends():
    pair = make_pair()
    start = start_of(pair, 4)
    exact = Pair(start[0].dequantize(), start[1].dequantize(), pair.value_rows, pair.output_columns)
    rounded = round_pair(exact, start, sweeps=9)
    assert rounded.errors.shape == (2, 3) and (rounded.errors == 0).all()
    assert torch.equal(rounded.value.codes, start[0].codes) and torch.equal(rounded.output.codes, start[1].codes)


def test_biases_of_the_values_are_part_of_what_stays():
    plain = make_pair()
    pair = replace(plain, bias=5 * torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    start = start_of(plain)

    def biased_errors(rounded: RoundedPair) -> Tensor:
        lost = (pair.output - rounded.output.dequantize())[:, pair.output_columns]  # (d, heads, g, r)
        constant = (lost * pair.bias[:, None]).sum(3).square().sum((0, 2))
        return plain_errors(pair, rounded.value.dequantize(), rounded.output.dequantize(), None) + constant

    heeded, ignored = round_pair(pair, start), round_pair(plain, start)
    torch.testing.assert_close(heeded.errors[-1], biased_errors(heeded), rtol=1e-9, atol=0)
    assert (heeded.errors.diff(dim=0) <= 0).all()
    assert biased_errors(heeded).sum() < 0.8 * biased_errors(ignored).sum()


def test_bad_input_is_refused():
    pair = make_pair()
    start = start_of(pair)
    with pytest.raises(InputError, match=r"rows \(heads, r\) and columns \(heads, g, r\) are needed"):
        replace(pair, value_rows=pair.value_rows[:2])
    with pytest.raises(InputError, match="that its weights do not have"):
        replace(pair, value=pair.value[:20])
    with pytest.raises(InputError, match="biases"):
        replace(pair, bias=torch.zeros(3))
    with pytest.raises(InputError, match="V is of"):
        round_pair(pair, (start[1], start[1]))
    with pytest.raises(InputError, match="NaN or infinite"):
        round_pair(replace(pair, value=torch.full_like(pair.value, torch.nan)), start)
    with pytest.raises(InputError, match="Gram matrix is of shape"):
        round_pair(pair, start, input_gram=torch.ones(3))
    with pytest.raises(InputError, match="squares that are negative"):
        round_pair(pair, start, input_gram=-torch.ones(24))
    indefinite = torch.eye(24) + 5 * torch.eye(24).flip(0)
    with pytest.raises(InputError, match="not positive semi-definite"):
        round_pair(pair, start, input_gram=indefinite)
