"""The bytes of tensors, and what is told by them."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype on any device, in the order of its items; not a copy where there are such."""
    items = tensor.detach().cpu().contiguous()
    # Not `view(-1)`, which leaves a tensor of one item any stride it came with.
    return items.as_strided((items.numel(),), (1,)).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of its shape, dtype and bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The `fingerprint` of a model whose state dict, sorted by name, are these tensors; they may come one by one."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
