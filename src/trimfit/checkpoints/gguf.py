"""Quantized weights in one GGUF file, which llama.cpp and what is built on it run, and transformers loads."""

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimfit.checkpoints.gguf_tokenizer import splits_alike, tokenizer_metadata
from trimfit.checkpoints.packed import plain_tensors
from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Quantized

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

log = logging.getLogger(__name__)

_BLOCK = 32  # weights that share a scale in the file
_BITS = {4: "Q4_0", 8: "Q8_0"}
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# By the model's type: as which architecture it is written.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What those architectures are, and a file cannot say otherwise.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grids: Mapping[str, Grid]) -> None:
    """Raises `InputError` for what a GGUF file cannot hold exactly, before there is anything to write.

    **Arguments**

    - `model`: tells type, names, shapes and dtypes; llama, mistral, qwen2 or qwen3, without scaled or local attention.
    - `tokenizer`: BPE, as `tokenizer_metadata` takes it.
    - `grids`: the grid of each quantized layer by its name in the model, fitted to its width: 4 or 8 bits, symmetric,
      in groups of a multiple of 32.
    """
    _, metadata = _plan(model, tokenizer, grids)
    if not splits_alike(metadata, _architecture(model)):
        log.warning(
            "transformers does not split text as this tokenizer does when it reads a GGUF file of a %s model; "
            "llama.cpp does. For transformers, keep the tokenizer's own files beside it",
            model.config.model_type,
        )


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grids: Mapping[str, Grid],
    layers: Iterable[tuple[str, Quantized]],
    path: Path,
) -> None:
    """Writes the whole model with its tokenizer to `path`, a new file.

    **Arguments**

    - `model`, `tokenizer`, `grids`: as for `check_gguf`. The header tells all types and sizes, so they come first.
    - `layers`: each layer of `grids` once, with its name. They are written as they come, and one that comes before
      its turn, the model's own order, waits in memory.

    Quantized weights are held as scale · (code − middle), multiplied in float32: of scales in 16 bits, `dequantize()`
    is that, rounded. All others are held in the dtype they have, vectors in float32.

    Raises `InputError` as `check_gguf` does and for scales that float16 cannot hold exactly, `ValueError` for layers
    that are not those of `grids`.
    """
    names, metadata = _plan(model, tokenizer, grids)
    from gguf import GGUFWriter

    tensors = plain_tensors(model, ())
    layer_of = {name: name.removesuffix(".weight") for name in tensors}
    with closing(GGUFWriter(path, _architecture(model))) as writer:
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            shape, kind = _stored(tensor, grids.get(layer_of[name]))
            writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), math.prod(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        quantized = _in_turn(layers, [layer for layer in layer_of.values() if layer in grids])
        for name, tensor in tensors.items():
            layer, order = layer_of[name], _row_order(model, name, len(tensor))
            if layer in grids:
                written = _blocks(layer, next(quantized), grids[layer], tensor.shape, order)
            else:
                written = _plain(tensor, order)
            writer.write_tensor_data(written.numpy())
        next(quantized, None)  # to its end, where it looks for layers too many


def _plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grids: Mapping[str, Grid]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The names of all tensors in the file, and its metadata. `InputError` as `check_gguf` says."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError('writing a GGUF file needs another package: pip install "trimfit[gguf]"')
    _check_config(model)
    _check_layers(model, grids)
    return _names(model), _metadata(model, tokenizer, grids)


def _architecture(model: PreTrainedModel) -> str:
    return _ARCHITECTURES[model.config.model_type]


def _check_config(model: PreTrainedModel) -> None:
    config = model.config
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise InputError(f"a {kind} model cannot be written as GGUF, only {', '.join(_ARCHITECTURES)}")
    for key, value in _FIXED.items():
        if getattr(config, key, value) != value:
            raise InputError(f"a GGUF file cannot say that {key} of a {kind} model is {getattr(config, key)}")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"the model scales its positions ({rope}), which would be lost in a GGUF file")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise InputError(f"the model attends to {window} tokens only, which a GGUF file of a {kind} model cannot say")
    implied = {"qwen2": config.hidden_size // config.num_attention_heads, "qwen3": 128}  # transformers reads none
    if _head_dim(model) != implied.get(kind, _head_dim(model)):
        raise InputError(
            f"the heads of the model have {_head_dim(model)} dimensions, but transformers would read {implied[kind]} "
            f"from a GGUF file of a {kind} model"
        )


def _check_layers(model: PreTrainedModel, grids: Mapping[str, Grid]) -> None:
    if not grids:
        raise InputError("no layer is quantized, so there is nothing to write as GGUF; save the model as it is")
    tensors = plain_tensors(model, ())
    narrow: list[str] = []
    for name, grid in grids.items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.dim() != 2:
            raise InputError(f"{name} is no layer of the model with weights of its own, so it cannot be quantized")
        if grid.bits not in _BITS or not grid.symmetric:
            kind = "symmetric" if grid.symmetric else "asymmetric"
            raise InputError(
                f"a GGUF file holds symmetric grids of 4 or 8 bits, but that of {name} is {kind} with {grid.bits}"
            )
        width = weight.shape[1]
        if width % _BLOCK:
            narrow.append(f"{name} with {width}")
        elif (grid.group_size or width) % _BLOCK:
            raise InputError(
                f"groups of {grid.group_size} weights in {name} are no multiple of {_BLOCK}, the block of a GGUF file"
            )
    if narrow:
        others = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        raise InputError(
            f"a GGUF file holds blocks of {_BLOCK} weights, which do not divide the inputs of {narrow[0]}{others}; "
            "leave such layers as they are with --ignore"
        )


def _names(model: PreTrainedModel) -> dict[str, str]:
    """The name in the file of each tensor that is stored, in the model's order. `InputError` if one has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == _architecture(model))
    known = get_tensor_name_map(arch, model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for name, tensor in plain_tensors(model, ()).items():
        found = known.get_name(name, (".weight", ".bias"))
        if found is None or tensor.dtype not in _PLAIN:
            raise InputError(f"{name} of {tensor.dtype} has no place in a GGUF file of a {model.config.model_type}")
        names[name] = found
    return names


def _metadata(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """All keys and values of the file but its architecture."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config, arch = model.config, _architecture(model)
    [(bits, _)] = Counter(grid.bits for grid in grids.values()).most_common(1)
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "vocab_size": rows,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(model),
        "attention.value_length": _head_dim(model),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": _head_dim(model),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    source = Path(config.name_or_path or "").name or type(model).__name__
    return {
        "general.type": "model",
        "general.name": f"{source}, quantized by trimfit",  # never just "mistral", which transformers takes for a type
        "general.file_type": int(LlamaFileType[f"MOSTLY_{_BITS[bits]}"]),
        "general.quantization_version": GGML_QUANT_VERSION,
        **{f"{arch}.{key}": value for key, value in numbers.items()},
        **tokenizer_metadata(tokenizer, rows),
    }


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add(writer: "GGUFWriter", key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _stored(tensor: Tensor, grid: Grid | None) -> tuple[tuple[int, ...], "GGMLQuantizationType"]:
    """The shape in bytes and the type in which a tensor is written, quantized on a grid or as it is."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    vector = "F32" if tensor.dim() == 1 else _PLAIN[tensor.dtype]  # llama.cpp adds and multiplies by float32 only
    kind = GGMLQuantizationType[vector if grid is None else _BITS[grid.bits]]
    return quant_shape_to_byte_shape(tensor.shape, kind), kind


def _in_turn(layers: Iterable[tuple[str, Quantized]], names: Iterable[str]) -> Iterator[Quantized]:
    """The layers in the order of `names`."""
    arriving, early = iter(layers), dict[str, Quantized]()
    for name in names:
        while name not in early:
            arrived = next(arriving, None)
            if arrived is None:
                raise ValueError(f"{name} has a grid but did not come")
            early[arrived[0]] = arrived[1]
        yield early.pop(name)
    early.update(arriving)
    if early:
        raise ValueError(f"{next(iter(early))} came but has no grid, or came twice")


def _row_order(model: PreTrainedModel, name: str, rows: int) -> Tensor | None:
    """Which row of a tensor goes where; None for as they are.

    A head turns its dimensions in pairs by the position. transformers pairs those half a head apart, llama.cpp, in its
    llama architecture, neighbours: the two halves of each head of q and k are interleaved.
    """
    if _architecture(model) != "llama" or (".q_proj." not in name and ".k_proj." not in name):
        return None
    return torch.arange(rows).view(-1, 2, _head_dim(model) // 2).swapaxes(1, 2).flatten()


def _plain(tensor: Tensor, order: Tensor | None) -> Tensor:
    """The bytes of a tensor that is not quantized, (…, bytes of a row) uint8."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dim() == 1 else tensor
    return (tensor if order is None else tensor[order]).contiguous().view(torch.uint8)


def _blocks(name: str, quantized: Quantized, grid: Grid, shape: torch.Size, order: Tensor | None) -> Tensor:
    """The bytes of a quantized layer, (out, bytes of a row) uint8: blocks of a float16 scale and 32 codes.

    Of 4 bits, a byte holds the codes j and j + 16 of a block, the first in its lower half; of 8 bits, it holds
    code − 128 as int8.
    """
    if quantized.grid != grid or quantized.codes.shape != shape:
        raise ValueError(f"{name} came as {tuple(quantized.codes.shape)} on {quantized.grid}, not {shape} on {grid}")
    if (quantized.zero_point != grid.middle).any():
        raise InputError(f"the grid of {name} is symmetric, but not all of its zero points are {grid.middle}")
    codes, scale = quantized.codes.cpu(), quantized.scale.cpu()
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        raise InputError(
            f"the scales of {name} are not exact in float16, in which a GGUF file holds them; place levels in float16"
        )
    if order is not None:
        codes, half = codes[order], half[order]
    half = half.repeat_interleave(shape[1] // _BLOCK // half.shape[1], 1)
    if grid.bits == 4:
        lower, upper = codes.unflatten(1, (-1, 2, _BLOCK // 2)).unbind(2)
        content = lower | upper << 4
    else:
        content = codes.unflatten(1, (-1, _BLOCK)) ^ 128  # as a signed number, 128 less
    return torch.cat([half[..., None].view(torch.uint8), content], -1).flatten(1)
