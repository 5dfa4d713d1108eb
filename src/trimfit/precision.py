"""How exactly a GPU multiplies float32 matrices."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


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
