"""The goal of a layer, told by second moments, against the same told by the activations themselves."""

import pytest
import torch
from torch import Tensor

from trimfit.calibration import Drift, InputMoments
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.goal import Goal
from trimfit.pipelines.pruning.layer import _accepted
from trimfit.refit import Cholesky, FactoredGram, refit

TOKENS, INPUTS, OUTPUTS = 400, 12, 7


def data(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(TOKENS, INPUTS) @ normal(INPUTS, INPUTS)
    residual = normal(TOKENS, OUTPUTS)
    return {
        "x": x,
        "dense_x": x + 0.3 * normal(TOKENS, INPUTS) + 0.2 * x.roll(1, 1),
        "residual": residual,
        "dense_residual": residual + 0.5 * x[:, :OUTPUTS],
        "weight": normal(OUTPUTS, INPUTS),
    }


def moments(d: dict[str, Tensor], *, residual: bool = True) -> InputMoments:
    x, dense_x = d["x"], d["dense_x"]
    drift = Drift((x - dense_x).T @ x / TOKENS, None)
    if residual:
        here, dense = d["residual"] + x @ d["weight"].T, d["dense_residual"] + dense_x @ d["weight"].T
        drift = Drift(None, (here - dense).T @ x / TOKENS)
    return InputMoments(x.T @ x / TOKENS, drift, TOKENS)


def goal_outputs(d: dict[str, Tensor], share: float, *, residual: bool = True) -> Tensor:
    """Y (tokens, out)."""
    own, dense = d["x"] @ d["weight"].T, d["dense_x"] @ d["weight"].T
    if residual:
        dense = dense + d["dense_residual"] - d["residual"]
    return (1 - share) * own + share * dense


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_excess_is_the_squared_distance_less_that_of_the_dense_weights(share: float, residual: bool):
    d = data()
    goal = Goal(d["weight"], moments(d, residual=residual), share)
    outputs = goal_outputs(d, share, residual=residual)

    def distance(weight: Tensor) -> Tensor:
        return (d["x"] @ weight.T - outputs).square().sum() / TOKENS

    for weight in (d["weight"] * 0.7, torch.zeros_like(d["weight"])):
        assert goal.excess(weight) == pytest.approx((distance(weight) - distance(d["weight"])).item(), rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_error_is_the_squared_change_of_the_layers_own_outputs(share: float):
    d = data()
    weight = d["weight"] * 0.7
    change = (d["x"] @ (weight - d["weight"]).T).square().sum() / TOKENS
    assert Goal(d["weight"], moments(d), share).error(weight) == pytest.approx(change.item(), rel=1e-9)


@pytest.mark.parametrize(("further", "taken"), [(1e-4, "optimal"), (0.5, "own")])
def test_simpler_weights_are_taken_when_nearer_by_a_part_of_the_error_though_the_excess_is_near_zero(
    further: float, taken: str
):
    """Along a line from the dense weights the excess is t²a + 2tb: as good as they are again at t = −2b/a."""
    d = data()
    seen = moments(d)
    goal, direction = Goal(d["weight"], seen, 0.5), torch.randn_like(d["weight"])
    square = goal.error(d["weight"] + direction)
    back = -(goal.excess(d["weight"] + direction) - square) / square
    optimal, own = (d["weight"] + step * direction for step in (back, back * (1 - further)))
    assert abs(goal.excess(optimal)) < 1e-9 * goal.error(optimal)
    assert goal.excess(own) < goal.excess(optimal)
    config = PruneConfig(dense_share=0.5)
    assert _accepted({"optimal": optimal, "own": own}, d["weight"], seen, config, None) == taken


@pytest.mark.parametrize("heads", [1, OUTPUTS])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_excess_in_a_metric_is_of_errors_weighed_by_it(share: float, heads: int):
    d, size = data(3), OUTPUTS // heads
    factor = torch.randn(heads, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    metric = factor @ factor.mT
    outputs = goal_outputs(d, share)

    def counted(weight: Tensor) -> Tensor:
        errors = (d["x"] @ weight.T - outputs).view(TOKENS, heads, size)
        return torch.einsum("thd,hde,the->", errors, metric, errors) / TOKENS

    goal, weight = Goal(d["weight"], moments(d), share), d["weight"] * 0.7
    assert goal.excess(weight, metric) == pytest.approx((counted(weight) - counted(d["weight"])).item(), rel=1e-9)


def test_refit_to_the_goal_is_the_least_squares_solution_on_the_kept_weights():
    d = data()
    mask = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) < 0.5
    gram = FactoredGram(moments(d).gram, 0.0)
    goal = Goal(d["weight"], moments(d), 0.5).linear_term(gram)
    found = refit(gram, d["weight"], mask, target=goal, solver=Cholesky(1e-12, torch.float64)).weight
    for row, kept in enumerate(mask):
        expected = torch.linalg.lstsq(d["x"][:, kept], goal_outputs(d, 0.5)[:, row]).solution
        torch.testing.assert_close(found[row, kept], expected)


def test_unpruned_weights_are_the_optimum_with_damping_towards_the_dense_weights():
    d, damping = data(), 0.1
    gram = FactoredGram(moments(d).gram, damping)
    pull = damping * gram.raw.diagonal().mean().sqrt() ** 2
    # Damping as rows of data: √(λ·mean(diag H)·T)·I in the inputs, and what the dense weights make of them in the goal.
    extra = (pull * TOKENS).sqrt() * torch.eye(INPUTS, dtype=torch.float64)
    x = torch.cat((d["x"], extra))
    y = torch.cat((goal_outputs(d, 0.5), extra @ d["weight"].T))
    expected = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(Goal(d["weight"], moments(d), 0.5).unpruned(gram), expected)


def test_without_drift_or_share_the_goal_is_what_the_dense_layer_gives():
    d = data()
    gram = FactoredGram(moments(d).gram, 0.01)
    for goal in (
        Goal(d["weight"], moments(d), 0.0),
        Goal(d["weight"], InputMoments(moments(d).gram, None, TOKENS), 0.5),
    ):
        assert goal.shift is None and goal.linear_term(gram) is None
        assert torch.equal(goal.unpruned(gram), d["weight"])
