"""Tensors that are needed next, read while a device works on others."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ahead:
    """Reads tensors in the background into memory from which a GPU copies them by itself, in the order asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "trimfit-ahead")
        self._coming: dict[str, Future[Tensor]] = {}

    def begin(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """What was begun before and not taken is forgotten."""
        self.forget()
        self._coming = {name: self._thread.submit(_in_memory, name, read) for name in names}

    def forget(self) -> None:
        """Nothing more is read but the tensor that is being read."""
        for unused in self._coming.values():
            unused.cancel()
        self._coming = {}

    def take(self, name: str) -> Tensor | None:
        """As soon as it is read, or None if it was not begun. Raises what reading it raised."""
        coming = self._coming.pop(name, None)
        return None if coming is None else coming.result()


def _in_memory(name: str, read: Callable[[str], Tensor]) -> Tensor:
    tensor = read(name)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available()).copy_(tensor)
