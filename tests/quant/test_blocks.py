"""Block transformations: exact inverses, one convention, and the optimum that the closed form promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimfit.quant import Grid, place_levels
from trimfit.quant.blocks import LARGEST_BLOCK, BlockTransform, best_transform, block_size, candidates

SIZES = [(32, 8), (172, 86), (172, 43), (86, 43), (43, 43), (24, 1), (256, 128)]  # width, block
WEIGHTS = ["anisotropic", "outliers", "zero columns", "zero block", "rank", "few rows", "nothing", "tiny", "huge"]
NAMES = {"identity", "hadamard", "spectrum", "spectrum-hadamard"}


def make_weight(kind: str = "anisotropic", rows: int = 96, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -1.5, width)[:, None]
    weight = weight @ mixing / width**0.5
    if kind == "outliers":
        weight[:, :: max(width // 3, 1)] *= 20
    elif kind == "zero columns":
        weight[:, 1::3] = 0
    elif kind == "zero block":
        weight[:, : width // 2] = 0
    elif kind == "rank":
        weight = weight[:, :1] * mixing[:1] + weight[:, -1:] * mixing[1 % width]
    elif kind == "few rows":
        weight = weight[:2]
    elif kind == "nothing":
        weight = torch.zeros(rows, width)
    elif kind in ("tiny", "huge"):
        weight = weight * (1e-15 if kind == "tiny" else 1e15)
    return weight


def dense(transform: BlockTransform) -> tuple[Tensor, Tensor]:
    """T and T⁻¹ (n, n) in float64."""
    return (
        torch.block_diag(*transform.matrices.double()),
        torch.block_diag(*transform.inverses.double()),
    )


def named(weights: list[Tensor], size: int) -> dict[str, BlockTransform]:
    return {transform.name: transform for transform in candidates(weights, size)}


def true_error(transform: BlockTransform, weight: Tensor, grid: Grid) -> float:
    """Of the quantized W T behind T⁻¹, all in plain matrices."""
    there, back = dense(transform)
    moved = (weight.double() @ there).float()
    lost = place_levels(moved, grid).nearest(moved).dequantize().double() @ back - weight
    return lost.square().sum().item()


@given(st.integers(1, 600), st.integers(1, 200))
def test_blocks_are_the_largest_that_divide_the_width(width: int, largest: int):
    size = block_size(width, largest)
    assert size <= largest and width % size == 0
    assert not any(width % larger == 0 for larger in range(size + 1, min(width, largest) + 1))


def test_blocks_of_usual_widths():
    sizes = {(172, 128): 86, (172, 64): 43, (86, 64): 43, (43, 64): 43, (4096, 64): 64, (11008, LARGEST_BLOCK): 128}
    assert {key: block_size(*key) for key in sizes} == sizes


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("width", "size"), SIZES)
def test_every_candidate_is_undone_exactly_and_well_conditioned(kind: str, width: int, size: int):
    found = candidates([make_weight(kind, width=width)], size)
    assert {transform.name for transform in found} >= NAMES
    for transform in found:
        assert transform.matrices.shape == transform.inverses.shape == (width // size, size, size)
        assert transform.matrices.dtype == transform.inverses.dtype == torch.float32
        assert transform.multiply_adds == width * size
        there, back = transform.matrices.double(), transform.inverses.double()
        condition = torch.linalg.cond(there)
        assert (condition <= 1.01 * (size / 1e-4) ** 0.25).all()
        identity = torch.eye(size, dtype=torch.float64).expand_as(there)
        torch.testing.assert_close(there @ back, identity, rtol=0, atol=3e-7 * condition.max().item())
        torch.testing.assert_close(back @ there, identity, rtol=0, atol=3e-7 * condition.max().item())


@pytest.mark.parametrize(("width", "size"), SIZES)
def test_all_sides_of_a_transformation_agree(width: int, size: int):
    weight = make_weight(width=width)
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    gram = torch.einsum("abi,abj->ij", x, x) / 15
    for transform in candidates([weight], size):
        there, back = dense(transform)
        close = {"rtol": 1e-4, "atol": 1e-4 * torch.linalg.cond(there).item()}
        torch.testing.assert_close(transform.forward(weight), (weight.double() @ there).float(), **close)
        torch.testing.assert_close(transform.backward(weight), (weight.double() @ back).float(), **close)
        torch.testing.assert_close(transform.backward(transform.forward(weight)), weight, **close)
        torch.testing.assert_close(transform.inputs(x), (x.double() @ back.T).float(), **close)
        torch.testing.assert_close(transform.gram(gram), (back @ gram.double() @ back.T).float(), **close)
        moved = transform.inputs(x).flatten(0, 1)
        torch.testing.assert_close(transform.gram(gram), moved.T @ moved / 15, **close)
        output = transform.inputs(x) @ transform.forward(weight).T
        torch.testing.assert_close(output, x @ weight.T, **close)


def test_inputs_have_any_number_of_dimensions_and_keep_their_dtype():
    transform = named([make_weight()], 8)["spectrum-hadamard"]
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    expected = transform.inputs(x)
    torch.testing.assert_close(transform.inputs(x[1, 2]), expected[1, 2])
    torch.testing.assert_close(transform.inputs(x[1, 2, 3]), expected[1, 2, 3])
    assert transform.inputs(x[:0]).shape == (0, 3, 4, 32)
    torch.testing.assert_close(transform.inputs(x.transpose(0, 2)), expected.transpose(0, 2))
    in_half = transform.inputs(x.bfloat16())
    assert in_half.dtype == torch.bfloat16
    torch.testing.assert_close(in_half.float(), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(transform.forward(x[0, 0].double()).float(), transform.forward(x[0, 0]))


def cost(second_moment: Tensor, s: Tensor) -> Tensor:
    """What W T is to lose if errors follow the second moment of its rows: tr(Σ S)·tr(S⁻¹), S = T Tᵀ."""
    return (second_moment @ s).diagonal(dim1=-2, dim2=-1).sum(-1) * torch.linalg.inv(s).diagonal(dim1=-2, dim2=-1).sum(
        -1
    )


@pytest.mark.parametrize("size", [8, 16, 43])
def test_the_spectrum_meets_the_lower_bound_of_the_second_moment_model(size: int):
    weight = make_weight(rows=200, width=2 * size)
    parts = weight.double().unflatten(1, (2, size)).transpose(0, 1)
    second_moment = parts.transpose(1, 2) @ parts
    values = torch.linalg.eigvalsh(second_moment)
    assert (values > 1e-4 * values.mean(1, keepdim=True)).all()  # the floor has nothing to do
    bound = values.sqrt().sum(1).square()
    transforms = named([weight], size)
    costs = {}
    for name, transform in transforms.items():
        t = transform.matrices.double()
        costs[name] = cost(second_moment, t @ t.transpose(1, 2))
        assert (costs[name] >= bound * (1 - 1e-5)).all()
    for name in ("spectrum", "spectrum-hadamard"):
        torch.testing.assert_close(costs[name], bound, rtol=1e-4, atol=0)
    for name in ("identity", "hadamard"):
        torch.testing.assert_close(costs[name], size * values.sum(1), rtol=1e-4, atol=0)
    best = costs["spectrum"] * (1 - 1e-5)
    t = transforms["spectrum"].matrices.double()
    generator = torch.Generator().manual_seed(0)
    for distance in (1e-2, 0.1, 1.0):
        for _ in range(10):
            other = t + distance * torch.randn(t.shape, generator=generator, dtype=t.dtype) @ t / size**0.5
            assert (cost(second_moment, other @ other.transpose(1, 2)) > best).all()


def test_groups_of_several_blocks_have_one_optimum():
    """With one scale for a row, the bound is that of the whole block-diagonal T, and blocks are scaled to meet it."""
    weight = make_weight(rows=200, width=64) * torch.logspace(0, -1.5, 4).repeat_interleave(16)
    parts = weight.double().unflatten(1, (4, 16)).transpose(0, 1)
    bound = torch.linalg.matrix_norm(parts, "nuc").sum().square()  # (Σ tr Σ_k^{1/2})²
    transforms = named([weight], 16)
    for name, transform in transforms.items():
        there, back = dense(transform)
        total = (weight.double() @ there).square().sum() * back.square().sum()
        assert total >= bound * (1 - 1e-5)
        if name.startswith("spectrum"):
            torch.testing.assert_close(total, bound, rtol=1e-4, atol=0)
    spectrum, plain = (true_error(transforms[name], weight, Grid(3, None)) for name in ("spectrum", "hadamard"))
    assert spectrum < 0.7 * plain


@pytest.mark.parametrize("size", [8, 64])
def test_mixing_in_the_eigenbasis_gives_equal_columns(size: int):
    """For powers of two: every column of W T and every row of T⁻¹ then has the same size."""
    weight = make_weight(rows=200, width=2 * size)
    transform = named([weight], size)["spectrum-hadamard"]
    for squares in (transform.forward(weight).square().sum(0).view(2, size), transform.inverses.square().sum(2)):
        torch.testing.assert_close(squares, squares.mean(1, keepdim=True).expand_as(squares), rtol=2e-2, atol=0)
    before = weight.square().sum(0)
    assert before.max() > 1.5 * before.min()


def test_layers_that_share_inputs_share_the_spectrum_of_all():
    first, second = make_weight(), make_weight("outliers", rows=30, seed=1)
    for together, stacked in zip(
        candidates([first, second], 8), candidates([torch.cat([first, second])], 8), strict=True
    ):
        torch.testing.assert_close(together.matrices, stacked.matrices)
    alone = named([first], 8)["spectrum"].matrices
    assert not torch.allclose(named([first, second], 8)["spectrum"].matrices, alone, rtol=0.1)


def test_the_size_of_weights_does_not_change_the_transformation():
    weight = make_weight()
    scaled = named([weight * 2.0**40], 8)
    for name, transform in named([weight], 8).items():
        if name in NAMES:
            torch.testing.assert_close(scaled[name].matrices, transform.matrices, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["anisotropic", "outliers", "zero columns", "rank", "nothing", "few rows"])
@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(4, None, True)], ids=str)
def test_the_choice_is_never_worse_than_none(kind: str, grid: Grid):
    weight = make_weight(kind)
    chosen = best_transform([weight], grid, 8)
    found = candidates([weight], 8)
    errors = {transform.name: true_error(transform, weight, grid) for transform in found}
    mine = errors["identity"] if chosen is None else true_error(chosen, weight, grid)
    assert mine <= errors["identity"] * (1 + 1e-4)
    assert mine <= min(errors.values()) * 1.01


def test_outliers_are_worth_a_transformation_and_what_is_even_is_not():
    assert best_transform([torch.zeros(8, 32)], Grid(3, 16), 8) is None
    outliers = make_weight("outliers", rows=256, width=64)
    grid = Grid(3, 64)
    chosen = best_transform([outliers], grid, 64)
    assert chosen is not None
    identity = named([outliers], 64)["identity"]
    assert true_error(chosen, outliers, grid) < 0.5 * true_error(identity, outliers, grid)
    on_grid = torch.randint(-4, 4, (64, 32), generator=torch.Generator().manual_seed(0)).float()
    assert best_transform([on_grid], Grid(3, None, True), 8) is None
