"""How fast this device is, measured in a second or two."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from trimfit.precision import half_products, tensor_float32

_LONG_ENOUGH = 0.3  # seconds of one measurement
_FILE_BYTES = 2**26
_SIZE = {"cpu": 512}  # of square matrices: what takes milliseconds finds a moment without other jobs
_SIZE_ELSEWHERE = 8192
_COPIED = {"cpu": 2**24}  # numbers
_COPIED_ELSEWHERE = 2**28
_CALLS = 512


class Throughput(BaseModel):
    """Rates of a device.

    - `model`, `float32`, `float64`: flops per second of a large matrix product, in the dtype of the model's weights and
      in those of Gram matrices and certificates; never in TF32.
    - `memory`: bytes per second, read and written, of a copy. `calls`: operations per second on tensors so small that
      only starting them takes time. `disk`: bytes per second of a file that is read and
      hashed, as checkpoints are; a file that was just written, so it may come from the system's cache.
    """

    model_config = ConfigDict(frozen=True)

    model: float
    float32: float
    float64: float
    memory: float
    calls: float
    disk: float


def measure_throughput(device: torch.device, dtype: torch.dtype, folder: Path | None = None) -> Throughput:
    """Rates of `device` for a model of `dtype`, and of the disk of `folder`, by default that of temporary files."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    with half_products(device), tensor_float32(device, allowed=False):  # as forward passes are run
        rates = {kind: gemm_rate(device, kind) for kind in {dtype, torch.float32, wide}}
    return Throughput(
        model=rates[dtype],
        float32=rates[torch.float32],
        float64=rates[wide],
        memory=memory_rate(device),
        calls=_call_rate(device),
        disk=_disk_rate(folder),
    )


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of a product of two large square matrices."""
    size = _SIZE.get(device.type, _SIZE_ELSEWHERE)
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, a), device)


def memory_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    a = torch.zeros(_COPIED.get(device.type, _COPIED_ELSEWHERE), device=device)
    out = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(lambda: out.copy_(a), device)


def _call_rate(device: torch.device) -> float:
    """Operations per second that only have to be started, on rows of a matrix."""
    a = torch.zeros(_CALLS, 32, device=device)

    def call() -> None:
        for row in a:
            row.add_(1.0)

    return _CALLS / _seconds(call, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: the quickest of several, since other jobs only ever make it slower."""
    best, end = float("inf"), time.perf_counter() + _LONG_ENOUGH
    work()  # warm-up
    while True:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _disk_rate(folder: Path | None) -> float:
    import hashlib

    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(2**20) * (_FILE_BYTES // 2**20))
        file.seek(0)
        start = time.perf_counter()
        hashlib.file_digest(file, "sha256")
        return _FILE_BYTES / (time.perf_counter() - start)
