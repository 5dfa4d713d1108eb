"""Where a run takes place: versions, and the memory that it took."""

import importlib.metadata
import platform
import sys

import torch


def versions(*more: str) -> dict[str, str]:
    """Versions of everything that can change a result, and of `more` packages."""
    names = ("trimfit", "torch", "transformers", "safetensors", "numpy", *more)
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def peak_memory(device: torch.device) -> int:
    """Bytes: the CUDA allocator's peak on a GPU, the process's largest resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
