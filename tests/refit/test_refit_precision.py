"""Products on a GPU may be TF32 where the certificate does not suffer; here the CPU rounds as a GPU would."""

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from refit_reference import Reference, make_layer
from torch import Tensor

from trimfit import ConjugateGradients, Status, refit
from trimfit.calibration import MomentSum
from trimfit.precision import Factor, split, tensor_float32

CUDA = torch.device("cuda")


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

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return plain(to_tf32(a), to_tf32(b)) if a.dtype == torch.float32 else plain(a, b)

    @contextmanager
    def as_on_a_gpu(device: torch.device, *, allowed: bool) -> Generator[None]:
        seen.append(allowed)
        with monkeypatch.context() as patch:
            if allowed:
                patch.setattr(torch.Tensor, "__matmul__", rounded)
            yield

    for module in ("trimfit.refit.conjugate_gradients", "trimfit.calibration.gram"):
        monkeypatch.setattr(importlib.import_module(module), "tensor_float32", as_on_a_gpu)
    return seen


@pytest.mark.parametrize("preconditioner", ["diagonal", "masked_inverse"])
def test_a_refit_is_optimal_in_spite_of_it(rounding: list[bool], preconditioner: Any) -> None:
    gram, weight, mask = make_layer(16, 48, decay=1.0)
    solution = refit(gram, weight, mask, solver=ConjugateGradients(preconditioner, 1e-6))
    assert rounding and all(rounding)
    assert solution.status is Status.OPTIMAL
    reference = Reference(gram, weight, mask)
    assert (reference.gap(solution.weight) <= solution.certificate.gap).all()
    assert (reference.gap(solution.weight) <= 1e-6 * reference.gain).all()


def test_it_is_not_used_for_a_badly_conditioned_matrix(rounding: list[bool]) -> None:
    gram, weight, mask = make_layer(16, 48, decay=4.0)
    assert refit(gram, weight, mask, solver=ConjugateGradients()).status is Status.OPTIMAL
    assert rounding and not any(rounding)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_moments_do_not_change_by_it(rounding: list[bool], dtype: torch.dtype, allowed: bool) -> None:
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = MomentSum(12)
    moments.add(inputs)
    assert rounding == [allowed]
    exact = inputs.double().T @ inputs.double() / 40
    torch.testing.assert_close(moments.value(torch.device("cpu")).gram.double(), exact, rtol=1e-6, atol=1e-7)


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
    factor = Factor(b)
    monkeypatch.setattr(factor, "_parts", split(b))  # as on a GPU
    torch.testing.assert_close(factor.add_product(base, a), base + a @ b)
