"""Gives memory that was freed back to the system."""

import ctypes
import sys
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Where glibc allocates; elsewhere it does nothing.

    glibc keeps tensors of up to 32 MiB that were freed, in pieces between what still lives: a process through which
    one block after the other goes would otherwise grow with their number (docs/benchmarks.md).
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # musl has none
