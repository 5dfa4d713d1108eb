"""Moments told by weights, against samples, quadrature and closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, relu, rms_norm, silu

from trimfit.quant import moments
from trimfit.quant.moments import Norm, ResidualStream, attention_moment, mlp_moment


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def assert_is_moment(moment: Tensor) -> None:
    torch.testing.assert_close(moment, moment.T)
    assert torch.linalg.eigvalsh(moment).min() > -1e-5 * moment.diagonal().max()


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SAMPLES", 2**17)


@pytest.mark.parametrize("biased", [False, True])
def test_an_rms_norm_of_inputs_of_equal_size_is_exact(biased: bool):
    n = 12
    x = randn(500, n) @ randn(n, n, seed=1)
    x = 3 * x / x.norm(dim=1, keepdim=True)
    x = torch.cat([x, -x])  # mean 0
    weight, bias = randn(n, seed=2), randn(n, seed=3) if biased else None
    y = rms_norm(x, (n,), weight, eps=1e-12) + (0 if bias is None else bias)
    torch.testing.assert_close(Norm(weight, bias).moment(moment_of(x)), moment_of(y))


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_norm_of_inputs_of_equal_spread_is_exact_whatever_their_means(biased: bool):
    n = 12
    x = randn(500, n) @ randn(n, n, seed=1)
    x = x - x.mean(1, keepdim=True)
    x = 0.3 * x / x.norm(dim=1, keepdim=True) + 5 * randn(500, 1, seed=4)
    x = torch.cat([x, -x])
    weight, bias = randn(n, seed=2), randn(n, seed=3) if biased else None
    y = layer_norm(x, (n,), weight, bias, eps=1e-12)
    torch.testing.assert_close(Norm(weight, bias, centred=True).moment(moment_of(x)), moment_of(y))


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_of_gaussian_inputs_is_near(centred: bool):
    n = 64
    factor = randn(n, n, seed=1) * torch.logspace(0, -0.5, n, dtype=torch.float64) + 0.1
    x = randn(40_000, n) @ factor
    weight, bias = randn(n, seed=2) + 1, 0.3 * randn(n, seed=3)
    norm = layer_norm(x, (n,), weight, bias) if centred else rms_norm(x, (n,), weight) + bias
    assert distance(Norm(weight, bias, centred).moment(factor.T @ factor), moment_of(norm)) < 0.05


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_does_not_see_the_size_of_its_inputs(centred: bool):
    moment = moment_of(randn(50, 8))
    norm = Norm(randn(8, seed=1), randn(8, seed=2), centred)
    expected = norm.moment(moment)
    assert_is_moment(expected)
    torch.testing.assert_close(norm.moment(1e9 * moment), expected)
    torch.testing.assert_close(norm.moment(torch.zeros(8, 8)), torch.outer(norm.bias, norm.bias).float())
    assert norm.moment(moment.float()).dtype == torch.float32


def test_the_residual_stream_is_the_sum_of_what_is_written():
    stream = ResidualStream(6, 0.25, torch.device("cpu"))
    torch.testing.assert_close(stream.moment, 0.25 * torch.eye(6))
    weight, inputs = randn(6, 9).float(), moment_of(randn(30, 9, seed=1)).float()
    written = weight @ inputs @ weight.T
    stream.add(weight, inputs)
    torch.testing.assert_close(stream.moment, 0.25 * torch.eye(6) + written)
    norm = Norm(randn(6, seed=2), centred=True)
    stream.add(weight.bfloat16().float(), inputs, norm)
    centring = torch.eye(6) - 1 / 6
    spread = centring @ weight.bfloat16().float() @ inputs @ weight.bfloat16().float().T @ centring
    normed = norm.weight[:, None] * (spread / spread.trace() * 6) * norm.weight
    torch.testing.assert_close(stream.moment, (0.25 * torch.eye(6) + written + normed).float())
    assert_is_moment(stream.moment)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 2), (1, 4, 3)])
def test_attention_puts_every_query_head_where_the_output_projection_reads_it(
    biased: bool, shape: tuple[int, int, int]
):
    heads, group, size = shape
    width = heads * group * size
    inputs, values = moment_of(randn(40, 10)), randn(heads, size, 10, seed=1)
    bias = randn(heads, size, seed=2) if biased else None
    columns = torch.randperm(width, generator=torch.Generator().manual_seed(3)).view(heads, group, size)
    expected = torch.zeros(width, width, dtype=torch.float64)
    places = [(h, q, i) for h in range(heads) for q in range(group) for i in range(size)]
    for h, q, i in places:
        for other_h, other_q, j in places:
            entry = values[h, i] @ inputs @ values[other_h, j] * moments._KEPT_BY_AVERAGE
            if (h, q) != (other_h, other_q):
                entry = entry * moments._SHARED_BY_HEADS
            if bias is not None:
                entry = entry + bias[h, i] * bias[other_h, j]
            expected[columns[h, q, i], columns[other_h, other_q, j]] = entry
    found = attention_moment(inputs, values, bias, columns)
    torch.testing.assert_close(found, expected)
    assert_is_moment(found)


def test_heads_that_average_several_tokens_keep_all_of_the_bias():
    """Two query heads that each average two tokens, one of them the same: half of the energy is kept, half shared."""
    inputs, values, bias = moment_of(randn(40, 5)), randn(1, 3, 5, seed=1), randn(1, 3, seed=2)
    tokens = randn(100_000, 3, 5, seed=3) @ torch.linalg.cholesky(inputs).T
    seen = tokens @ values[0].T + bias[0]
    y = torch.cat([seen[:, :2].mean(1), seen[:, 1:].mean(1)], dim=1)
    found = attention_moment(inputs, values, bias, torch.arange(6).view(1, 2, 3))
    assert distance(found, moment_of(y)) < 0.02


def preactivations(ffn: int = 7, n: int = 5, biased: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Moment of the inputs, up with bias, gate with bias."""
    biases = (0.5 * randn(ffn, seed=5), 0.5 * randn(ffn, seed=6)) if biased else (torch.zeros(ffn).double(),) * 2
    return moment_of(randn(12, n)), randn(ffn, n, seed=1), biases[0], randn(ffn, n, seed=2), biases[1]


def relu_moment(covariance: Tensor) -> Tensor:
    """E[relu(a) relu(b)] for all pairs of centred Gaussians: the arc-cosine kernel of order 1."""
    size = covariance.diagonal().sqrt()
    angle = (covariance / torch.outer(size, size)).clamp(-1, 1).arccos()
    return torch.outer(size, size) * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)


@pytest.mark.usefixtures("many_samples")
def test_relu_without_a_gate_is_the_arc_cosine_kernel():
    inputs, up, *_ = preactivations()
    found = mlp_moment(inputs, up, None, None, None, relu)
    assert_is_moment(found)
    assert distance(found, relu_moment(up @ inputs @ up.T)) < 0.015


@pytest.mark.usefixtures("many_samples")
def test_a_gate_without_an_activation_is_a_product_of_gaussians():
    inputs, up, up_bias, gate, gate_bias = preactivations()
    both = torch.cat([up, gate]) @ inputs @ torch.cat([up, gate]).T
    up_up, up_gate, gate_gate = both[:7, :7], both[:7, 7:], both[7:, 7:]
    # Isserlis, with means: E[u_i g_i u_j g_j].
    mean = up_gate.diagonal() + up_bias * gate_bias
    expected = (
        torch.outer(mean, mean)
        + up_up * (gate_gate + torch.outer(gate_bias, gate_bias))
        + torch.outer(up_bias, up_bias) * gate_gate
        + up_gate * up_gate.T
        + up_gate * torch.outer(gate_bias, up_bias)
        + (up_gate * torch.outer(gate_bias, up_bias)).T
    )
    found = mlp_moment(inputs, up, up_bias, gate, gate_bias, lambda x: x)
    assert distance(found, expected) < 0.03


def gated_entry(covariance: Tensor, mean: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """E[φ(g) u φ(g') u'] for Gaussian (g, g', u, u'): quadrature over (g, g'), given which u and u' are Gaussian."""
    nodes = torch.linspace(-8, 8, 200, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2)
    weights = weights / weights.sum()
    z = torch.cartesian_prod(nodes, nodes)
    root = torch.linalg.cholesky(covariance[:2, :2])
    centred = z @ root.T
    slope = torch.linalg.solve(covariance[:2, :2], covariance[:2, 2:])
    given = centred @ slope + mean[2:]
    rest = (covariance[2:, 2:] - covariance[2:, :2] @ slope)[0, 1]
    g = activation(centred + mean[:2])
    return (torch.outer(weights, weights).flatten() * g.prod(1) * (given.prod(1) + rest)).sum()


@pytest.mark.usefixtures("many_samples")
@pytest.mark.parametrize("biased", [False, True])
def test_a_gated_unit_is_what_quadrature_gives(biased: bool):
    inputs, up, up_bias, gate, gate_bias = preactivations(biased=biased)
    expected = torch.empty(7, 7, dtype=torch.float64)
    for i in range(7):
        for j in range(7):
            rows = torch.stack([gate[i], gate[j], up[i], up[j]])
            mean = torch.stack([gate_bias[i], gate_bias[j], up_bias[i], up_bias[j]])
            covariance = rows @ inputs @ rows.T
            covariance[:2, :2] += 1e-9 * torch.eye(2)  # for i = j
            expected[i, j] = gated_entry(covariance, mean, silu)
    found = mlp_moment(inputs, up, up_bias if biased else None, gate, gate_bias if biased else None, silu)
    assert_is_moment(found)
    assert distance(found, expected) < 0.03


def test_samples_are_enough_for_what_units_have_in_common():
    inputs, up, *_ = preactivations()
    expected = relu_moment(up @ inputs @ up.T)
    assert distance(mlp_moment(inputs, up, None, None, None, relu), expected) < 0.08
    assert distance(mlp_moment(inputs.float(), up.bfloat16(), None, None, None, relu), expected.float()) < 0.08


@pytest.mark.usefixtures("many_samples")
def test_singular_inputs_are_followed():
    up, direction = randn(6, 4), randn(4, seed=1)
    inputs = torch.outer(direction, direction)
    assert distance(mlp_moment(inputs, up, None, None, None, relu), relu_moment(up @ inputs @ up.T)) < 0.02
    bias = randn(6, seed=2)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    constant = mlp_moment(nothing, up, bias, None, None, relu)
    torch.testing.assert_close(constant, torch.outer(relu(bias), relu(bias)))
    assert (mlp_moment(nothing, up, None, up, None, silu) == 0).all()


def test_samples_are_the_same_each_time_and_nobody_elses():
    inputs, up, up_bias, gate, gate_bias = preactivations()
    state = torch.get_rng_state()
    first, again = (mlp_moment(inputs, up, up_bias, gate, gate_bias, silu) for _ in range(2))
    other = mlp_moment(inputs, up, up_bias, gate, gate_bias, silu, seed=1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert distance(other, first) < 0.3
    assert torch.equal(torch.get_rng_state(), state)
