"""Whatever the solver: the answer is the optimum, and never worse than the masked weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refit_reference import Reference, make_layer
from torch import Tensor

from trimfit import Auto, Cholesky, ConjugateGradients, FactoredGram, RefitSolution, Status, refit
from trimfit.refit import Solver

FLOAT32, FLOAT64 = torch.float32, torch.float64
SOLVERS = {
    "auto": Auto(),
    "auto64": Auto(dtype=FLOAT64),
    "cholesky": Cholesky(),
    "cholesky64": Cholesky(dtype=FLOAT64),
    "diagonal": ConjugateGradients("diagonal"),
    "diagonal64": ConjugateGradients("diagonal", dtype=FLOAT64),
    "masked_inverse": ConjugateGradients("masked_inverse"),
    "masked_inverse64": ConjugateGradients("masked_inverse", dtype=FLOAT64),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
three_solvers = pytest.mark.parametrize(
    "solver", [SOLVERS[name] for name in ("cholesky", "diagonal", "masked_inverse")], ids=lambda s: str(s)[:28]
)


def assert_right(solution: RefitSolution, reference: Reference, tolerance: float = 1e-4) -> None:
    """Optimal to the tolerance, certified, zero off the mask, and no worse than the masked weights in any row."""
    noise = 1e-13 * reference.objective(reference.optimum).abs()
    gap = reference.gap(solution.weight)
    assert solution.status is Status.OPTIMAL
    assert (solution.certificate.relative <= tolerance).all()
    assert (solution.certificate.gap >= gap - noise).all()
    assert (gap <= tolerance * torch.maximum(reference.gain, 1e-8 * reference.objective(solution.weight).abs())).all()
    assert (gap <= reference.gain + noise).all()
    assert (solution.weight[~reference.mask] == 0).all()
    gain = reference.gain - gap
    assert (solution.certificate.gain <= gain + noise).all()
    assert (solution.certificate.gain >= gain * (1 - 1e-6) - 100 * noise).all()


@every_solver
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("dense_target", [False, True], ids=["layer", "dense"])
def test_the_answer_is_the_optimum(solver: Solver | Auto, dtype: torch.dtype, damping: float, dense_target: bool):
    gram, weight, mask = make_layer(7, 24, decay=1.0)
    weight = weight.to(dtype)
    target = weight.double() @ (gram + 0.1 * gram.roll(1, 0)) if dense_target else None
    solution = refit(gram, weight, mask, target=target, damping=damping, solver=solver)
    assert solution.weight.dtype == dtype
    assert solution.damping == damping
    assert solution.steps >= 1
    assert solution.seconds > 0
    assert_right(solution, Reference(gram, weight, mask, target, damping))


@three_solvers
def test_a_factored_gram_matrix_gives_the_same_answer(solver: Solver):
    gram, weight, mask = make_layer(5, 12)
    shared = FactoredGram(gram, 0.01)
    expected = refit(gram, weight, mask, damping=0.01, solver=solver)
    for _ in range(2):
        assert torch.equal(refit(shared, weight, mask, solver=solver).weight, expected.weight)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-10])
@pytest.mark.parametrize("name", ["cholesky", "diagonal", "masked_inverse"])
def test_every_tolerance_is_met(name: str, tolerance: float):
    gram, weight, mask = make_layer(6, 32, decay=2.0)
    kinds = {"cholesky": Cholesky(tolerance)} | {
        kind: ConjugateGradients(kind, tolerance) for kind in ("diagonal", "masked_inverse")
    }
    solution = refit(gram, weight, mask, solver=kinds[name])
    assert_right(solution, Reference(gram, weight, mask), tolerance)
    assert solution.weight.dtype == FLOAT64


@three_solvers
@pytest.mark.parametrize(("rows", "size", "tokens"), [(1, 1, 3), (1, 9, 40), (9, 1, 3), (40, 3, 9), (3, 40, 200)])
def test_every_shape(solver: Solver, rows: int, size: int, tokens: int):
    gram, weight, mask = make_layer(rows, size, tokens=tokens, kept=0.6)
    assert_right(refit(gram, weight, mask, solver=solver), Reference(gram, weight, mask))


@three_solvers
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_rows_of_every_kind_in_one_layer(solver: Solver, dtype: torch.dtype):
    gram, weight, mask = make_layer(12, 16, decay=1.0)
    for row in range(12):  # 0, 1, 2, …, 11 kept
        mask[row] = torch.randperm(16, generator=torch.Generator().manual_seed(row)) < row
    mask[11] = True
    weight[5] = 0
    weight[6] *= mask[6]  # sparse before: nothing to gain
    weight[7] *= ~mask[7]  # every kept weight is zero
    weight = weight.to(dtype)
    solution = refit(gram, weight, mask, solver=solver)
    assert_right(solution, Reference(gram, weight, mask))
    for row in (0, 5, 6, 11):
        assert torch.equal(solution.weight[row], weight[row] * mask[row])


@three_solvers
def test_dead_inputs_get_zero_wherever_the_mask_is(solver: Solver):
    gram, weight, mask = make_layer(6, 12)
    dead = torch.tensor([0, 5, 11])
    gram[dead] = 0
    gram[:, dead] = 0
    weight[:, 5] = 1e6  # of no consequence
    mask[0] = False
    mask[0, dead] = True
    mask[1, dead] = True
    solution = refit(gram, weight, mask, damping=0.01, solver=solver)
    assert (solution.weight[:, dead] == 0).all()
    assert_right(solution, Reference(gram, weight, mask, damping=0.01))


@three_solvers
def test_all_inputs_dead(solver: Solver):
    solution = refit(torch.zeros(4, 4), torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool), solver=solver)
    assert torch.equal(solution.weight, torch.zeros(3, 4))
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.layer == 0


@three_solvers
@pytest.mark.parametrize("keep", [False, True])
def test_all_pruned_and_all_kept(solver: Solver, keep: bool):
    gram, weight, mask = make_layer(4, 8)
    mask[:] = keep
    solution = refit(gram, weight.float(), mask, solver=solver)
    assert torch.equal(solution.weight, weight.float() * keep)
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.layer <= 1e-4


@every_solver
@pytest.mark.parametrize("decay", [1.0, 3.0])
def test_fewer_tokens_than_inputs(solver: Solver | Auto, decay: float):
    gram, weight, mask = make_layer(6, 40, tokens=15, decay=decay)
    solution = refit(gram, weight, mask, solver=solver)
    assert 0 < solution.damping <= 1e-4
    assert_right(solution, Reference(gram, weight, mask, damping=solution.damping))


@every_solver
def test_equal_inputs(solver: Solver | Auto):
    gram, weight, mask = make_layer(6, 10)
    copy = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    gram = gram[copy][:, copy]
    solution = refit(gram, weight, mask, solver=solver)
    assert 0 < solution.damping <= 1e-6
    assert_right(solution, Reference(gram, weight, mask, damping=solution.damping))


@every_solver
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_inputs_from_a_millionth_to_a_million(solver: Solver | Auto, dtype: torch.dtype):
    gram, weight, mask = make_layer(6, 20, decay=1.0)
    spread = torch.logspace(-6, 6, 20, dtype=FLOAT64)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    gram = gram * spread * spread[:, None]
    weight = (weight / spread).to(dtype)
    solution = refit(gram, weight, mask, solver=solver)
    assert solution.damping == 0
    assert_right(solution, Reference(gram, weight, mask))


@every_solver
@pytest.mark.parametrize("unit", [1e-30, 1e30])
@pytest.mark.parametrize("of", ["gram", "weight", "both"])
def test_tiny_and_huge_units(solver: Solver | Auto, unit: float, of: str):
    gram, weight, mask = make_layer(5, 12, decay=1.0)
    gram = gram * (unit if of != "weight" else 1)
    weight = (weight * (unit if of != "gram" else 1)).float()
    assert_right(refit(gram, weight, mask, solver=solver), Reference(gram, weight, mask))


@three_solvers
def test_rows_of_very_different_size_do_not_disturb_each_other(solver: Solver):
    gram, weight, mask = make_layer(6, 24, decay=2.0)
    weight *= torch.tensor([1e-20, 1e-10, 1.0, 1e10, 1e20, 1.0], dtype=FLOAT64)[:, None]
    together = refit(gram, weight, mask, solver=solver)
    assert_right(together, Reference(gram, weight, mask))
    for row in range(6):
        assert refit(gram, weight[[row]], mask[[row]], solver=solver).status is Status.OPTIMAL


@three_solvers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_upcast_before_the_solve(solver: Solver, dtype: torch.dtype):
    gram, weight, mask = make_layer(5, 16)
    gram, weight = gram.to(dtype), weight.to(dtype)
    solution = refit(gram, weight, mask, solver=solver)
    assert solution.weight.dtype == FLOAT32
    assert_right(solution, Reference((gram.double() + gram.double().T) / 2, weight, mask, damping=solution.damping))


@three_solvers
def test_autocast_does_not_reach_the_solve(solver: Solver):
    gram, weight, mask = make_layer(8, 48, decay=2.0)
    expected = refit(gram, weight.float(), mask, solver=solver)
    with torch.autocast("cpu", torch.bfloat16):
        solution = refit(gram, weight.float(), mask, solver=solver)
    assert torch.equal(solution.weight, expected.weight)


@three_solvers
def test_gradients_are_not_tracked_and_inputs_not_changed(solver: Solver):
    gram, weight, mask = make_layer(4, 8)
    gram.requires_grad_()
    weight.requires_grad_()
    before = gram.detach().clone(), weight.detach().clone(), mask.clone()
    solution = refit(gram, weight, mask, solver=solver)
    assert not solution.weight.requires_grad
    assert not solution.certificate.gap.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (gram, weight, mask), strict=True))


@three_solvers
def test_tensors_that_are_not_contiguous(solver: Solver):
    gram, weight, mask = make_layer(12, 12)
    expected = refit(gram, weight.T.contiguous(), mask.T.contiguous(), solver=solver)
    solution = refit(gram.T, weight.T, mask.T, solver=solver)
    torch.testing.assert_close(solution.weight, expected.weight)


@three_solvers
def test_no_negative_zeros_are_left_off_the_mask(solver: Solver):
    gram, weight, mask = make_layer(4, 16)
    solution = refit(gram, -weight.abs(), mask, solver=solver)
    assert not torch.signbit(solution.weight[~mask]).any()


# Properties, over whatever layers hypothesis thinks of.


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = draw(st.integers(1, 6)), draw(st.integers(1, 16))
    gram, weight, mask = make_layer(
        rows,
        size,
        draw(st.integers(0, 10**6)),
        tokens=size + draw(st.integers(2, 40)),
        decay=draw(st.sampled_from([0.0, 1.0, 2.0])),
        kept=draw(st.sampled_from([0.1, 0.5, 0.9])),
    )
    units = 10.0 ** torch.tensor(draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size)), dtype=FLOAT64)
    return gram * units * units[:, None], weight / units, mask


solvers = st.sampled_from([SOLVERS[name] for name in ("cholesky", "diagonal", "masked_inverse")])
some = settings(max_examples=100, deadline=None, derandomize=True)


@some
@given(layers(), solvers, st.booleans())
def test_any_layer(layer: tuple[Tensor, Tensor, Tensor], solver: Solver, single: bool):
    gram, weight, mask = layer
    weight = weight.float() if single else weight
    solution = refit(gram, weight, mask, solver=solver)
    assert_right(solution, Reference(gram, weight, mask, damping=solution.damping))


@some
@given(layers(), solvers, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(layer: tuple[Tensor, Tensor, Tensor], solver: Solver, random):
    gram, weight, mask = layer
    order = torch.tensor(random.sample(range(len(weight)), len(weight)))
    straight = refit(gram, weight, mask, solver=solver)
    shuffled = refit(gram, weight[order], mask[order], solver=solver)
    reference = Reference(gram, weight, mask)
    gap = reference.gap(straight.weight)[order] + reference.gap(shuffled.weight[order.argsort()])[order]
    assert (gap <= 2e-4 * reference.gain[order] + 1e-12 * reference.objective(reference.optimum)[order].abs()).all()


@some
@given(layers(), solvers, st.integers(-40, 40), st.integers(-40, 40), st.booleans())
def test_units_scale_the_answer(
    layer: tuple[Tensor, Tensor, Tensor], solver: Solver, gram_power: int, weight_power: int, dense_target: bool
):
    gram, weight, mask = layer
    target = 1.1 * (weight @ gram) if dense_target else None
    unit, other = 4.0**gram_power, 2.0**weight_power  # powers of two: no rounding
    plain = refit(gram, weight, mask, target=target, solver=solver)
    scaled = refit(
        unit * gram, other * weight, mask, target=None if target is None else unit * other * target, solver=solver
    )
    assert torch.equal(scaled.weight, other * plain.weight)
    assert torch.equal(scaled.certificate.gap, unit * other**2 * plain.certificate.gap)
    assert scaled.status is plain.status


@some
@given(layers(), solvers)
def test_refitting_the_answer_changes_nothing(layer: tuple[Tensor, Tensor, Tensor], solver: Solver):
    gram, weight, mask = layer
    first = refit(gram, weight, mask, solver=solver).weight
    second = refit(gram, first, mask, solver=solver)
    assert torch.equal(first, second.weight)
    assert second.status is Status.OPTIMAL
