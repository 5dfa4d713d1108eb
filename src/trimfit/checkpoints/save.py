"""Writes a compressed model as a plain Hugging Face checkpoint, and proves that it loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from trimfit.checkpoints.atomic import atomic_directory
from trimfit.checkpoints.load import Checkpoint, shard_files
from trimfit.errors import RunError

SIDECAR = "trimfit.json"
_UNSPLIT = 10**15


def save_checkpoint(
    checkpoint: Checkpoint, out: Path, sidecar: Mapping[str, Any], *, sparsity: Mapping[str, float], overwrite: bool
) -> None:
    """Config, weights, tokenizer, generation config and `trimfit.json` in `out`, all or nothing.

    **Arguments**

    - `sidecar`: what `trimfit.json` shall hold.
    - `sparsity`: for each pruned weight, by its name in the state dict, the share of zeros that it must have at least.

    The weights keep the dtype and the sharding they came with. Before `out` appears, the checkpoint is loaded with
    plain transformers, compared bit for bit and its zeros counted. Raises `RunError` when something is not as it
    should be or the disk is full.
    """
    with atomic_directory(out, overwrite) as beside:
        _check_space(checkpoint, beside)
        checkpoint.model.save_pretrained(beside, max_shard_size=_shard_size(checkpoint.source))
        checkpoint.tokenizer.save_pretrained(beside)
        (beside / SIDECAR).write_text(json.dumps(sidecar, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _verify(checkpoint, beside, sparsity)


def _shard_size(source: str) -> int:
    """Largest shard of the source, which splits the same tensors at the same places."""
    shards = shard_files(Path(source)) if Path(source).is_dir() else []
    if len(shards) <= 1:
        return _UNSPLIT
    return max(_tensor_bytes(shard) for shard in shards)


def _tensor_bytes(shard: Path) -> int:
    with safe_open(shard, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def _check_space(checkpoint: Checkpoint, directory: Path) -> None:
    needed = sum(tensor.nbytes for tensor in checkpoint.model.parameters())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"the disk of {directory.parent} has {free / 2**20:.0f} MiB free but the model needs "
            f"{needed / 2**20:.0f} MiB; free space there or choose another output"
        )


def _verify(checkpoint: Checkpoint, directory: Path, sparsity: Mapping[str, float]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
    for name, expected in checkpoint.model.state_dict().items():
        if name not in loaded or not torch.equal(loaded[name], expected.cpu()):
            raise RunError(f"{name} is not the same after saving and loading; nothing was kept, please report this")
    for name, share in sparsity.items():
        tensor = loaded[name]
        zeros = int((tensor == 0).sum())
        if zeros < round(share * tensor.numel()):
            raise RunError(f"{name} has {zeros} zeros of {tensor.numel()} instead of {share:.2%}; nothing was kept")
