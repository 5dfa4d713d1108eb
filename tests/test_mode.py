"""Evaluation mode: what it does to a model's products on CPUs that are slow in half precision."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, EXPERT_FAMILIES, Family, for_each, windows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimfit import precision
from trimfit.mode import forward_mode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm", "convolution")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Products(TorchDispatchMode):
    """The dtypes of all products of matrices that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot_product" in name:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def in_hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes the CPU one that has instructions for half precision, or one that does not."""
    return lambda has: monkeypatch.setattr(precision, "in_hardware", lambda dtype: has)


@HALVES
@for_each(ALL_FAMILIES | EXPERT_FAMILIES)
def test_slow_cpus_compute_no_product_in_half_precision(
    family: Family, dtype: torch.dtype, in_hardware: Callable[[bool], None]
) -> None:
    model, tokens = family.build().to(dtype), windows(4)
    exact = model.float()(input_ids=tokens).logits
    model = model.to(dtype)
    in_hardware(False)
    with torch.no_grad(), forward_mode(model), Products() as products:
        logits = model(input_ids=tokens, use_cache=False).logits
    assert products.dtypes == {torch.float32}
    assert logits.dtype == dtype
    half = model(input_ids=tokens).logits
    assert error(logits, exact) < 1.2 * error(half, exact)


@HALVES
def test_other_cpus_compute_as_they_did(dtype: torch.dtype, in_hardware: Callable[[bool], None]) -> None:
    model, tokens = ALL_FAMILIES["llama"].build().to(dtype), windows(4)
    in_hardware(True)
    with torch.no_grad(), forward_mode(model), Products() as products:
        logits = model(input_ids=tokens).logits
    assert dtype in products.dtypes
    assert torch.equal(logits, model(input_ids=tokens).logits)


def test_a_layer_with_few_rows_is_not_copied(in_hardware: Callable[[bool], None]) -> None:
    """A copy of its weights would take longer than the product: text is written token by token."""
    layer = nn.Linear(64, 64).bfloat16()
    in_hardware(False)
    for rows, computed in ((4, torch.bfloat16), (64, torch.float32)):
        with torch.no_grad(), forward_mode(layer), Products() as products:
            layer(torch.randn(rows, 64).bfloat16())
        assert products.dtypes == {computed}


def test_products_of_unlike_matrices_are_still_refused(in_hardware: Callable[[bool], None]) -> None:
    a, b = torch.randn(40, 40), torch.randn(40, 40).bfloat16()
    in_hardware(False)
    with forward_mode(nn.Linear(1, 1)), pytest.raises(RuntimeError, match="dtype"):
        a @ b


def error(logits: Tensor, exact: Tensor) -> float:
    """Of the median token: where two experts are level, rounding decides which of them a token gets."""
    return (logits.double() - exact.double()).square().mean(dim=-1).sqrt().median().item()
