"""What cannot be used is refused, with a sentence that says what and why; what can be mended is, and logged."""

import importlib
import logging

import pytest
import torch
from refit_reference import Reference, make_layer

from trimfit import FactoredGram, InputError, Status, refit

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_not_finite(value: float, dtype: torch.dtype):
    gram, weight, mask = make_layer(3, 6)
    for name, what in (("gram", "Gram matrix"), ("weight", "weight"), ("target", "target")):
        tensors = {"gram": gram, "weight": weight, "target": weight @ gram}
        tensors[name] = tensors[name].to(dtype).clone()
        tensors[name][2, 2] = value
        with pytest.raises(InputError, match=f"the {what} has NaN or infinite entries"):
            refit(tensors["gram"], tensors["weight"], mask, target=tensors["target"])


def test_not_finite_counts_where_it_is_pruned_too():
    gram, weight, mask = make_layer(3, 6)
    weight[0, 0], mask[0, 0] = NAN, False
    with pytest.raises(InputError, match="the weight has NaN"):
        refit(gram, weight, mask)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (0, 0), (1, 6, 6)])
def test_gram_matrices_of_a_wrong_shape(shape: tuple[int, ...]):
    with pytest.raises(InputError, match=r"must be square \(inputs, inputs\), but its shape is \("):
        FactoredGram(torch.zeros(shape))


def test_gram_matrices_of_a_wrong_kind():
    gram, _, _ = make_layer(1, 6)
    with pytest.raises(InputError, match=r"floating dtype, but it has torch.int64"):
        FactoredGram(torch.eye(3, dtype=torch.int64))
    negative = gram.clone()
    negative[1, 1] = -1
    with pytest.raises(InputError, match="negative diagonal entry"):
        FactoredGram(negative)
    half_dead = gram.clone()
    half_dead[2, 2] = 0
    with pytest.raises(InputError, match="a zero on its diagonal but not in its whole row"):
        FactoredGram(half_dead)
    crooked = gram.clone()
    crooked[0, 1] += gram.max() / 10
    with pytest.raises(InputError, match="not symmetric"):
        FactoredGram(crooked)
    with pytest.raises(InputError, match=r"\(3 inputs\) cannot be factorised even with damping .*not positive"):
        FactoredGram(torch.ones(3, 3) * 5 - 4 * torch.eye(3))


@pytest.mark.parametrize("damping", [-0.1, NAN, INF])
def test_damping_that_is_none(damping: float):
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match="damping must be a number that is not negative, but it is"):
        refit(gram, weight, mask, damping=damping)


def test_damping_with_a_factored_matrix():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match="damping belongs to the FactoredGram"):
        refit(FactoredGram(gram), weight, mask, damping=0.0)


@pytest.mark.parametrize("shape", [(6,), (3, 5), (0, 6), (1, 3, 6)])
def test_weights_of_a_wrong_shape(shape: tuple[int, ...]):
    gram, _, mask = make_layer(3, 6)
    with pytest.raises(
        InputError, match=r"weight must have shape \(rows, 6\) to fit the Gram matrix, but its shape is"
    ):
        refit(gram, torch.zeros(shape), mask)


def test_masks_and_targets_that_do_not_fit():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match=r"boolean of shape \(3, 6\) \(True = kept\), but it is torch.float64"):
        refit(gram, weight, mask.double())
    with pytest.raises(InputError, match=r"but it is torch.bool of shape \(6, 3\)"):
        refit(gram, weight, mask.T)
    with pytest.raises(InputError, match=r"target must have shape \(3, 6\), but its shape is \(6, 6\)"):
        refit(gram, weight, mask, target=gram)


def test_weights_and_targets_of_a_wrong_kind():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match=r"the weight must have a floating dtype, but it has torch.int64"):
        refit(gram, weight.long(), mask)
    with pytest.raises(InputError, match=r"the target must have a floating dtype, but it has torch.bool"):
        refit(gram, weight, mask, target=mask)


def test_tensors_on_different_devices():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match="one device, but they are: Gram matrix on cpu, weight on cpu, mask on meta"):
        refit(gram, weight, mask.to("meta"))
    with pytest.raises(InputError, match="target on meta"):
        refit(gram, weight, mask, target=weight.to("meta"))


def test_products_that_overflow():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match="so large that their products with the Gram matrix overflow"):
        refit(gram * 1e200, weight * 1e200, mask)


# Damping


def test_damping_is_raised_and_logged(caplog: pytest.LogCaptureFixture):
    _, weight, mask = make_layer(3, 6)
    gram = torch.ones(6, 6, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        solution = refit(gram, weight, mask)
    assert solution.damping == 1e-8
    assert "Gram matrix of 6 inputs cannot be factorised at damping 0; raised to 1e-08" in caplog.text
    reference = Reference(gram, weight, mask, damping=1e-8)
    assert solution.status is Status.OPTIMAL
    assert (reference.gap(solution.weight) <= 1e-4 * reference.gain).all()


def test_a_factor_that_was_luck_is_not_trusted(caplog: pytest.LogCaptureFixture):
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-15]], dtype=torch.float64)
    factored = FactoredGram(gram)
    assert factored.damping == 0  # it could be factorised
    assert factored.slack > 0.5
    with caplog.at_level(logging.WARNING):
        assert factored.certifiable.damping == 1e-8
    assert "is singular to working precision at damping 0; raised to 1e-08" in caplog.text
    assert factored.certifiable is factored.certifiable


def test_no_word_about_a_good_matrix(caplog: pytest.LogCaptureFixture):
    gram, weight, mask = make_layer(3, 6)
    with caplog.at_level(logging.DEBUG):
        assert refit(gram, weight, mask, damping=0.01).damping == 0.01
    assert not caplog.records


def test_what_a_factored_matrix_knows():
    gram, weight, _ = make_layer(3, 6)
    gram[2] = 0
    gram[:, 2] = 0
    factored = FactoredGram(gram.float(), 0.1)
    assert factored.size == 6
    assert factored.dead.tolist() == [False, False, True, False, False, False]
    assert factored.damping_weight == pytest.approx(0.1 * gram.diagonal().mean().item(), rel=1e-6)
    assert factored.scale[2] == 1
    torch.testing.assert_close(factored.matrix.diagonal(), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(factored.cholesky @ factored.cholesky.T, factored.matrix)
    torch.testing.assert_close(factored.inverse @ factored.matrix, torch.eye(6, dtype=torch.float64))
    assert factored.inverse_norm >= 1 / torch.linalg.eigvalsh(factored.matrix)[0]
    assert factored.energy(weight).item() == pytest.approx(((weight @ gram) * weight).sum().item(), rel=1e-6)
    assert factored.certifiable is factored


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch):
    """Such a device keeps the matrix in float32; the refit goes on in float64."""
    gram, weight, mask = make_layer(3, 6)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("trimfit.refit.gram"), "widest", lambda device: torch.float32)
        single = FactoredGram(gram, 0.01)
    assert single.matrix.dtype == torch.float32
    assert single.certifiable.matrix.dtype == torch.float64
    solution = refit(single, weight.float(), mask)
    assert solution.status is Status.OPTIMAL
    assert solution.certificate.gap.dtype == torch.float64
