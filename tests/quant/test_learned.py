"""Learned transformations: the true gradient, exact inverses, and never worse than the closed forms."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trimfit.quant import Grid, learned, place_levels
from trimfit.quant.blocks import BlockTransform, best_transform, candidates
from trimfit.quant.learned import ROWS, Surrogate, learned_transform

# width, block, group: equal, smaller, larger, the whole row, overlapping, odd
SHAPES = [(128, 64, 64), (128, 64, 32), (256, 64, 128), (128, 64, None), (24, 8, 6), (172, 43, 86), (172, 86, 43)]


def make_weight(rows: int, width: int, seed: int = 0) -> Tensor:
    """Columns of many sizes, mixed, and some outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * torch.logspace(0, -1, width)
    weight = weight @ torch.randn(width, width, generator=generator) / width**0.5
    weight[:, ::17] *= 5
    return weight


def start_of(weights: list[Tensor], size: int, name: str = "spectrum-hadamard") -> BlockTransform:
    return next(transform for transform in candidates(weights, size) if transform.name == name)


def true_error(transform: BlockTransform, weight: Tensor, grid: Grid) -> float:
    moved = transform.forward(weight)
    lost = transform.backward(place_levels(moved, grid).nearest(moved).dequantize()) - weight
    return lost.square().sum().item()


def round_trip(transform: BlockTransform) -> float:
    """The largest entry of T T⁻¹ − I."""
    product = transform.matrices.double() @ transform.inverses.double()
    return (product - torch.eye(product.shape[1])).abs().max().item()


def direct_value(m: Tensor, weight: Tensor, grid: Grid, start: BlockTransform) -> float:
    """The surrogate by its definition, with plain matrices in float64."""
    t = torch.block_diag(*start.matrices.double()) @ torch.block_diag(*m)
    inverse = torch.linalg.inv(t)
    noise = (inverse @ inverse.T).diagonal()
    moved = weight.double() @ t
    group = grid.group_size or len(t)
    total = 0.0
    for first in range(0, len(t), group):
        part = moved[:, first : first + group]
        if grid.symmetric:
            span = part.abs().pow(8).sum(1).pow(1 / 8)
        else:
            span = part.clamp(min=0).pow(8).sum(1).pow(1 / 8) + (-part).clamp(min=0).pow(8).sum(1).pow(1 / 8)
        total += (span.square().sum() * noise[first : first + group].sum()).item()
    return total


@pytest.mark.parametrize(("width", "size", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_surrogate_is_what_it_says_and_so_is_its_gradient(
    width: int, size: int, group: int | None, symmetric: bool
):
    weight, grid = make_weight(40, width), Grid(4, group, symmetric)
    start = start_of([weight], size)
    count = width // size
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    m = torch.eye(size, dtype=torch.float64) + 0.2 / size**0.5 * noise
    value, gradient = Surrogate([weight], grid, start).value_and_gradient(m.float(), 0)

    unit = direct_value(torch.eye(size).double().expand(count, size, size), weight, grid, start)
    assert value.item() == pytest.approx(direct_value(m, weight, grid, start) / unit, rel=1e-4)
    way = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    ahead, behind = (direct_value(m + h * way, weight, grid, start) / unit for h in (1e-5, -1e-5))
    assert (gradient * way).sum().item() / count == pytest.approx((ahead - behind) / 2e-5, rel=3e-3, abs=1e-3)


@pytest.mark.parametrize(("width", "size", "group"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_learning_lowers_the_surrogate_and_the_true_error(width: int, size: int, group: int | None, symmetric: bool):
    weight, grid = make_weight(96, width), Grid(3, group, symmetric)
    start = start_of([weight], size)
    errors = [true_error(start, weight, grid)]
    for steps in (10, 60):
        transform = learned_transform([weight], grid, start, steps=steps)
        assert round_trip(transform) < 1e-5
        again = Surrogate([weight], grid, transform)
        before = Surrogate([weight], grid, start)
        eye = torch.eye(size).repeat(width // size, 1, 1)
        change = torch.linalg.solve(start.matrices, transform.matrices)
        assert before.value_and_gradient(change, 0)[0] < before.value_and_gradient(eye, 0)[0]
        assert again.value_and_gradient(eye, 0)[0].item() == pytest.approx(1)
        errors.append(true_error(transform, weight, grid))
    assert all(after < 0.99 * before for before, after in pairwise(errors))


@pytest.mark.parametrize("name", ["identity", "hadamard", "spectrum", "spectrum-hadamard"])
def test_it_starts_anywhere_and_says_where(name: str):
    weight, grid = make_weight(96, 64), Grid(3, 32)
    start = start_of([weight], 32, name)
    transform = learned_transform([weight], grid, start, steps=40)
    assert transform.name == f"learned from {name}"
    assert true_error(transform, weight, grid) < 0.9 * true_error(start, weight, grid)
    unmoved = learned_transform([weight], grid, start, steps=0)
    torch.testing.assert_close(unmoved.matrices, start.matrices, rtol=0, atol=0)
    torch.testing.assert_close(unmoved.inverses, start.inverses, rtol=0, atol=0)


def test_layers_that_share_an_input_are_learned_together():
    first, second = make_weight(64, 64), make_weight(96, 64, seed=5)
    grid, start = Grid(3, 64), start_of([first, second], 64)
    together = learned_transform([first, second], grid, start, steps=40)
    stacked = learned_transform([torch.cat([first, second])], grid, start, steps=40)
    torch.testing.assert_close(together.matrices, stacked.matrices, rtol=0, atol=0)
    for weight in (first, second):
        assert true_error(together, weight, grid) < true_error(start, weight, grid)


def test_it_is_deterministic_and_leaves_random_numbers_and_weights_alone():
    weight, grid = make_weight(48, 64), Grid(4, 64)
    start, kept = start_of([weight], 64), weight.clone()
    state = torch.random.get_rng_state()
    first, second = (learned_transform([weight], grid, start, steps=20) for _ in range(2))
    assert torch.equal(first.matrices, second.matrices) and torch.equal(first.inverses, second.inverses)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weight, kept)


def test_it_needs_no_gradients():
    with torch.inference_mode():
        weight, grid = make_weight(48, 64), Grid(4, 64)
        start = start_of([weight], 64)
        inferred = learned_transform([weight], grid, start, steps=10)
    with torch.no_grad():
        plain = learned_transform([make_weight(48, 64)], grid, start, steps=10)
    assert torch.equal(inferred.matrices, plain.matrices)
    asked = make_weight(48, 64).requires_grad_()
    learnt = learned_transform([asked], grid, start, steps=10)
    assert torch.equal(learnt.matrices, plain.matrices) and not learnt.matrices.requires_grad


def test_large_layers_are_seen_in_turns(monkeypatch: pytest.MonkeyPatch):
    weight, grid = make_weight(160, 32), Grid(3, 32)
    start = start_of([weight], 32)
    monkeypatch.setattr(learned, "ROWS", 64)
    surrogate = Surrogate([weight], grid, start)
    eye = torch.eye(32)[None]
    values = [surrogate.value_and_gradient(eye, step)[0].item() for step in range(6)]
    assert values[:3] == values[3:] and len(set(values)) == 3
    unit = direct_value(eye.double(), weight[::3], grid, start)
    parts = [direct_value(eye.double(), weight[turn::3], grid, start) / unit for turn in range(3)]
    assert values[:3] == pytest.approx(parts, rel=1e-4)
    transform = learned_transform([weight], grid, start, steps=60)
    assert true_error(transform, weight, grid) < 0.9 * true_error(start, weight, grid)
    assert ROWS >= 512  # fewer say too little of a block of 128


@pytest.mark.parametrize("kind", ["zero columns", "zero block", "zero", "few rows", "tiny", "huge", "one sign"])
@pytest.mark.parametrize("group", [16, 64, None])
def test_degenerate_weights_stay_finite_and_invertible(kind: str, group: int | None):
    weight = make_weight(48, 64)
    if kind == "zero columns":
        weight[:, ::3] = 0
    elif kind == "zero block":
        weight[:, :32] = 0
    elif kind == "zero":
        weight.zero_()
    elif kind == "few rows":
        weight = weight[:2]
    elif kind in ("tiny", "huge"):
        weight *= 1e-15 if kind == "tiny" else 1e15
    elif kind == "one sign":
        weight.abs_()
    start = start_of([weight], 32)
    transform = learned_transform([weight], Grid(3, group), start, steps=100)
    assert transform.matrices.isfinite().all() and transform.inverses.isfinite().all()
    assert round_trip(transform) < 1e-4
    assert torch.linalg.cond(torch.linalg.solve(start.matrices, transform.matrices)).max() < 1000


def test_blocks_that_fail_stay_as_they_began():
    weight, grid = make_weight(48, 64), Grid(3, 32)
    start = start_of([weight], 32)
    for rate in (1e3, 1e30):
        transform = learned_transform([weight], grid, start, steps=20, learning_rate=rate)
        assert transform.matrices.isfinite().all() and round_trip(transform) < 1e-3


@pytest.mark.parametrize("width", [43, 64, 86])
def test_the_best_is_never_worse_than_the_closed_forms(width: int):
    weight, grid = make_weight(64, width), Grid(3, None)
    closed = best_transform([weight], grid, width)
    assert closed is not None

    def learn(start: BlockTransform, rate: float = 2e-2) -> BlockTransform:
        assert start.name == closed.name
        return learned_transform([weight], grid, start, steps=30, learning_rate=rate)

    best = best_transform([weight], grid, width, learn=learn)
    assert best is not None and best.name == f"learned from {closed.name}"
    assert true_error(best, weight, grid) < true_error(closed, weight, grid)

    def spoil(start: BlockTransform) -> BlockTransform:
        return BlockTransform(start.matrices * torch.logspace(0, 3, width), start.inverses, "spoilt")

    kept = best_transform([weight], grid, width, learn=spoil)
    assert kept is not None and kept.name == closed.name
