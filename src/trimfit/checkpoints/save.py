"""Writes a compressed model as a plain Hugging Face checkpoint, and proves that it loads."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from trimfit.checkpoints.atomic import SIDECAR
from trimfit.checkpoints.load import Checkpoint
from trimfit.checkpoints.shards import merge, shard_map, source_directory
from trimfit.errors import RunError


def save_checkpoint(
    checkpoint: Checkpoint, directory: Path, sidecar: Mapping[str, Any], *, sparsity: Mapping[str, float]
) -> None:
    """Config, weights, tokenizer, generation config and `trimfit.json`.

    **Arguments**

    - `directory`: empty; that of an `atomic_directory`, so that it is all or nothing.
    - `sidecar`: what `trimfit.json` shall hold.
    - `sparsity`: for each pruned weight, by its layer's name and ".weight", the share of zeros that it must have at
      least.

    The weights keep the dtype and the sharding they came with. In the end the checkpoint is loaded with plain
    transformers, compared bit for bit and its zeros counted. Raises `RunError` when something is not as it
    should be or the disk is full.
    """
    check_space(directory.parent, sum(tensor.nbytes for tensor in checkpoint.model.parameters()))
    _save_model(checkpoint, directory)
    checkpoint.tokenizer.save_pretrained(directory)
    write_sidecar(directory, sidecar)
    _verify(checkpoint, directory, sparsity)


def write_sidecar(directory: Path, sidecar: Mapping[str, Any]) -> None:
    """Writes `trimfit.json`."""
    text = json.dumps(sidecar, indent=1, allow_nan=False) + "\n"
    (directory / SIDECAR).write_text(text, encoding="utf-8")


def _save_model(checkpoint: Checkpoint, directory: Path) -> None:
    """As transformers does, but split as the source and with its generation config.

    Left to itself, transformers orders the weights by name, whatever the order of the source, and refuses to save
    many a generation config that it loads.
    """
    model = checkpoint.model
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    source = source_directory(checkpoint.source)
    shards = shard_map(source) if source else {}
    try:
        if shards:
            parts = directory / "parts"
            model.save_pretrained(parts, max_shard_size=1)  # byte: a file for each weight
            merge(parts, directory, shards)
        else:
            model.save_pretrained(directory)
    finally:
        model.generation_config = generation
    if model.can_generate():
        generation.to_json_file(directory / GENERATION_CONFIG_NAME)


def check_space(parent: Path, needed: int) -> None:
    """Raises `RunError` when the disk of a directory has fewer free bytes than a model needs."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"the disk of {parent} has {free / 2**20:.0f} MiB free but the model needs {needed / 2**20:.0f} MiB; "
            "free space there or choose another output"
        )


def check_zeros(name: str, weight: Tensor, share: float) -> None:
    """Raises `RunError` for a pruned weight, of this name, with a smaller share of zeros."""
    zeros = int((weight == 0).sum())
    if zeros < round(share * weight.numel()):
        raise RunError(f"{name} has {zeros} zeros of {weight.numel()} instead of {share:.2%}; nothing was kept")


def _verify(checkpoint: Checkpoint, directory: Path, sparsity: Mapping[str, float]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()
    for name, expected in checkpoint.model.state_dict().items():
        if name not in loaded or not torch.equal(loaded[name], expected.cpu()):
            raise RunError(f"{name} is not the same after saving and loading; nothing was kept, please report this")
    for name, share in sparsity.items():
        check_zeros(name, layer_weight(loaded, name), share)


def layer_weight(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The weight of a layer in a state dict, by the layer's name and ".weight"; of an expert its slice of a tensor."""
    if name in state:
        return state[name]
    holder, expert, parameter = name.removesuffix(".weight").rsplit(".", 2)
    return state[f"{holder}.{parameter}"][int(expert)]
