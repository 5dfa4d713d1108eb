"""Where hidden states wait between two blocks: on a device, and in files when they are too many."""

import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trimfit.errors import RunError


class Kept(Protocol):
    """Hidden states that were put away."""

    def get(self) -> Tensor:
        """The same, on any device."""
        ...


class StateStore:
    """Keeps hidden states.

    - `device`: where they wait; where they were made, if None.
    - `limit`: bytes, all together; those above it go to files, which are mapped into memory while they are used.
    - `folder`: for these files, there already. They are removed when nothing refers to their states any more.
    """

    def __init__(self, device: torch.device | None = None, limit: int | None = None, folder: Path | None = None):
        self._device, self._limit, self._folder = device, limit, folder
        self._bytes = 0

    def keep(self, states: Tensor) -> Kept:
        """Puts hidden states of any shape and dtype away."""
        here = states.device if self._device is None else self._device
        pinned = states.device.type == "cuda" and here.type == "cpu"
        size = pinned_bytes(states.nbytes) if pinned else states.nbytes
        if self._limit is not None and self._bytes + size > self._limit:
            return _InFile(states, self._folder)
        return _InMemory(self, _pinned(states) if pinned else states.to(here), size)

    def count(self, change: int) -> None:
        """Notes bytes that are now held, or not any more."""
        self._bytes += change


def pinned_bytes(size: int) -> int:
    """What so many bytes take in pinned memory, of which PyTorch gives out powers of two."""
    return 1 << max(0, size - 1).bit_length()


def _pinned(states: Tensor) -> Tensor:
    """In memory of the host to and from which a GPU copies several times as fast.

    The host does not wait for the copy: the GPU makes it before it reads it again, which nobody else does.
    """
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)


class _InMemory:
    def __init__(self, store: StateStore, states: Tensor, size: int):
        self._store, self._states, self._size = store, states, size
        store.count(size)

    def get(self) -> Tensor:
        return self._states

    def __del__(self) -> None:
        self._store.count(-self._size)


class _InFile:
    def __init__(self, states: Tensor, folder: Path | None):
        self._shape, self._dtype, self._bytes = states.shape, states.dtype, states.nbytes
        self._path: str | None = None
        data = states.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            descriptor, self._path = tempfile.mkstemp(prefix="states-", dir=folder)
            with open(descriptor, "wb") as file:
                file.write(data.data)
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise RunError(
                f"hidden states cannot be written to {where} ({error.strerror}); free space there"
            ) from error

    def get(self) -> Tensor:
        assert self._path is not None
        mapped = torch.from_file(self._path, shared=False, size=self._bytes, dtype=torch.uint8)
        return mapped.view(self._dtype).view(self._shape)

    def __del__(self) -> None:
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)
