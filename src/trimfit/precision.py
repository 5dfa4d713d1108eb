"""In which arithmetic a device multiplies matrices."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_HALVES = (torch.bfloat16, torch.float16)
_PRODUCTS = {
    *(functional.linear, functional.conv1d, functional.scaled_dot_product_attention),
    *(torch.einsum, torch.mv, torch.mm, torch.bmm, torch.matmul, torch.addmm, torch.baddbmm),
    *(Tensor.mv, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.addmm, Tensor.baddbmm),
    *(Tensor.__matmul__, Tensor.__rmatmul__),
    getattr(torch, "_grouped_mm", None),  # what torch.nn.functional.grouped_mm calls
}
_FEW = 32  # rows of a linear layer's input: the layer is then quicker than a copy of its weights


@contextmanager
def tensor_float32(device: torch.device, *, allowed: bool) -> Generator[None]:
    """Whether CUDA rounds the factors of float32 products to TF32, while the context lasts, whatever the user has set.

    TF32 has 10 bits of mantissa, and tensor cores multiply it several times as fast as float32; sums stay float32.
    Products of bfloat16 and float16 numbers are exact in it. It changes nothing on other devices.
    """
    if device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if allowed else "ieee")
    if not hasattr(products, name):  # torch before 2.9
        name, value = "allow_tf32", allowed
    before = getattr(products, name)
    setattr(products, name, value)
    try:
        yield
    finally:
        setattr(products, name, before)


class Factor:
    """A matrix B (n, n) that many matrices are multiplied with: float32 ones, on CUDA, by tensor cores.

    There float32 factors are the sums of two numbers of 11 bits and the rest. Three products in TF32, the one of the
    small parts being left out, are together as exact as 21 bits, and quicker than one in float32. With `rounded` it is
    one product, of 11 bits.
    """

    def __init__(self, matrix: Tensor, *, rounded: bool = False):
        self._device = matrix.device
        self._parts = split(matrix) if by_tensor_cores(matrix) and not rounded else (matrix,)

    @property
    def products(self) -> int:
        """How many there are of parts for one of whole factors."""
        return 2 * len(self._parts) - 1

    def product(self, a: Tensor) -> Tensor:
        """A·B, of A (m, n)."""
        (left, right), *more = self._terms(a)
        with tensor_float32(self._device, allowed=True):
            return _add(left @ right, more)

    def add_product(self, base: Tensor, a: Tensor) -> Tensor:
        """Base (m, n) and A·B, of A (m, n)."""
        first, *more = self._terms(a)
        with tensor_float32(self._device, allowed=True):
            return _add(torch.addmm(base, *first), more)

    def _terms(self, a: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is multiplied and summed, the least first."""
        if len(self._parts) == 1:
            return [(a, self._parts[0])]
        (large, small), (first, rest) = split(a), self._parts
        return [(small, first), (large, rest), (large, first)]


def _add(total: Tensor, terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    for left, right in terms:
        total.addmm_(left, right)
    return total


def by_tensor_cores(matrix: Tensor) -> bool:
    """Whether its products can be in TF32."""
    return matrix.device.type == "cuda" and matrix.dtype == torch.float32


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix as the sum of what TF32 holds of it, the mantissa being cut off after 10 bits, and the rest."""
    large = (matrix.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return large, matrix - large


def half_products(device: torch.device) -> AbstractContextManager[object]:
    """Products of bfloat16 or float16 matrices in float32, rounded once, while the context lasts, on slow CPUs.

    CPUs without instructions for these dtypes take up to a hundred times as long in them. Those that have them sum in
    float32, so the products here are as exact as there. It changes nothing on other CPUs and devices.
    """
    slow = {dtype for dtype in _HALVES if device.type == "cpu" and not in_hardware(dtype)}
    return _InFloat32(slow) if slow else nullcontext()


@cache
def in_hardware(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for the dtype, and torch uses them."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported: Any = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return supported._is_mkldnn_bf16_supported()
    return supported._is_mkldnn_fp16_supported()


class _InFloat32(TorchFunctionMode):
    def __init__(self, slow: set[torch.dtype]):
        super().__init__()
        self._slow = slow

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or (dtype := self._slow_dtype([*args, *kwargs.values()])) is None:
            return func(*args, **kwargs)
        if func is functional.linear and args[0].shape[:-1].numel() < _FEW:
            return func(*args, **kwargs)

        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.dtype == dtype else x

        return func(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()}).to(dtype)

    def _slow_dtype(self, arguments: list[Any]) -> torch.dtype | None:
        """That of all matrices; None when it is quick, or when they differ, which is the operation's to refuse."""
        dtypes = {x.dtype for x in arguments if isinstance(x, Tensor) and x.is_floating_point()}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= self._slow else None
