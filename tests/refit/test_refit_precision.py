"""Products on a GPU may be TF32 where the certificate does not suffer; here the CPU rounds as a GPU would."""

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from refit_reference import Reference, make_layer
from torch import Tensor

from trimfit import ConjugateGradients, FactoredGram, Status, refit
from trimfit.calibration import MomentSum
from trimfit.precision import Factor, split, tensor_float32
from trimfit.refit.together import refit_together

CUDA = torch.device("cuda")
CG = ConjugateGradients()


def precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(params=["tf32", "ieee"])
def users(request: pytest.FixtureRequest) -> Generator[str]:
    """What the user has set."""
    before = precision()
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def test_it_is_as_asked_and_then_as_the_user_had_it(users: str) -> None:
    for allowed in (True, False):
        with tensor_float32(CUDA, allowed=allowed):
            assert precision() == ("tf32" if allowed else "ieee")
            with tensor_float32(CUDA, allowed=not allowed):
                assert precision() == ("ieee" if allowed else "tf32")
            assert precision() == ("tf32" if allowed else "ieee")
        assert precision() == users
        with pytest.raises(KeyboardInterrupt), tensor_float32(CUDA, allowed=allowed):
            raise KeyboardInterrupt
        assert precision() == users
        with tensor_float32(torch.device("cpu"), allowed=allowed):
            assert precision() == users


def to_tf32(tensor: Tensor) -> Tensor:
    """To 10 bits of mantissa, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was allowed; where it is, products of float32 are rounded as in TF32."""
    seen: list[bool] = []
    plain: Any = torch.Tensor.__matmul__
    plain_add: Any = torch.Tensor.addmm_

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return plain(to_tf32(a), to_tf32(b)) if a.dtype == torch.float32 else plain(a, b)

    def rounded_add(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return plain_add(total, to_tf32(a), to_tf32(b)) if a.dtype == torch.float32 else plain_add(total, a, b)

    @contextmanager
    def as_on_a_gpu(device: torch.device, *, allowed: bool) -> Generator[None]:
        seen.append(allowed)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", rounded if allowed else plain)
            patch.setattr(torch.Tensor, "addmm_", rounded_add if allowed else plain_add)
            yield

    for module in ("trimfit.precision", "trimfit.refit.together", "trimfit.calibration.gram"):
        monkeypatch.setattr(importlib.import_module(module), "tensor_float32", as_on_a_gpu)
    for module in ("trimfit.precision", "trimfit.calibration.gram"):
        monkeypatch.setattr(f"{module}.by_tensor_cores", lambda matrix: matrix.dtype == torch.float32)
    return seen


@pytest.mark.parametrize("preconditioner", ["diagonal", "masked_inverse"])
@pytest.mark.parametrize("decay", [1.0, 4.0])
def test_a_refit_is_optimal_in_spite_of_it(rounding: list[bool], decay: float, preconditioner: Any) -> None:
    gram, weight, mask = make_layer(16, 48, decay=decay)
    solution = refit(gram, weight, mask, solver=ConjugateGradients(preconditioner, 1e-6))
    assert rounding and all(rounding)
    assert solution.status is Status.OPTIMAL
    reference = Reference(gram, weight, mask)
    assert (reference.gap(solution.weight) <= solution.certificate.gap).all()
    assert (reference.gap(solution.weight) <= 1e-6 * reference.gain).all()


@pytest.mark.parametrize("together", [False, True])
def test_a_badly_conditioned_matrix_takes_no_more_steps(request: pytest.FixtureRequest, together: bool) -> None:
    """Its products are three of parts; of rounded factors they would take several times the steps."""
    gram, weight, mask = make_layer(16, 48, decay=4.0)
    assert FactoredGram(gram).inverse_norm > 2e3

    def steps() -> int:
        metric = torch.eye(4).repeat(4, 1, 1)
        solution = refit_together(gram, weight, mask, metric) if together else refit(gram, weight, mask, solver=CG)
        assert solution.status is Status.OPTIMAL
        return solution.steps

    plain = steps()
    request.getfixturevalue("rounding")
    assert steps() <= plain + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_do_not_change_by_it(rounding: list[bool], dtype: torch.dtype) -> None:
    inputs, dense = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = MomentSum(12, drift=True)
    moments.add(inputs, inputs, dense)
    assert rounding == [dtype != torch.float32]
    found = moments.value(torch.device("cpu"))
    assert found.drift is not None and found.drift.inputs is not None
    drift = (inputs.float() - dense.float()).double()
    for value, left in ((found.gram, inputs.double()), (found.drift.inputs, drift)):
        torch.testing.assert_close(value.double(), left.T @ inputs.double() / 40, rtol=1e-6, atol=1e-6)


def test_three_products_of_parts_are_nearly_as_exact_as_float32() -> None:
    """Of parts that TF32 holds: the first exactly, the second rounded."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64)
    (a1, a2), (b1, b2) = split(a), split(b)
    assert all(torch.equal(to_tf32(large), large) for large in (a1, b1))
    assert torch.equal(a1 + a2, a) and torch.equal(b1 + b2, b)
    size = a.double().abs() @ b.double().abs()
    exact = a.double() @ b.double()
    in_parts = a1 @ b1 + (a1 @ to_tf32(b2) + to_tf32(a2) @ b1)
    once = to_tf32(a) @ to_tf32(b)
    assert ((in_parts.double() - exact).abs() / size).max() < 2**-20
    assert ((once.double() - exact).abs() / size).max() > 2**-14


def test_a_factor_multiplies_and_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for x, y, z in ((base, a, b), (base.double(), a.double(), b.double())):
        torch.testing.assert_close(Factor(z).add_product(x, y), x + y @ z)
        torch.testing.assert_close(Factor(z).product(y), y @ z)
    monkeypatch.setattr("trimfit.precision.by_tensor_cores", lambda matrix: True)
    for rounded in (False, True):
        factor = Factor(b, rounded=rounded)
        torch.testing.assert_close(factor.add_product(base, a), base + a @ b)
        torch.testing.assert_close(factor.product(a), a @ b)
