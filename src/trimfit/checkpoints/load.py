"""Loads a Hugging Face causal LM with its tokenizer, and says clearly why something cannot be loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimfit.checkpoints.online import attach_transforms, build_model, is_online, read_online
from trimfit.checkpoints.packed import ONLINE
from trimfit.checkpoints.shards import shard_files
from trimfit.checkpoints.tensor_bytes import fingerprint_of
from trimfit.errors import InputError, first_line

log = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER = ("tokenizer*", "vocab*", "*.model")


@dataclass(frozen=True)
class Checkpoint:
    """A model as loaded: `source` is the directory or hub name it came from."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_checkpoint(source: str, device: torch.device | None = None, *, quantized: bool = False) -> Checkpoint:
    """The model in the dtype of its checkpoint, on `device` (CPU by default), and its tokenizer.

    `source` is a directory or a hub name. On the meta device no weight is read, and buffers are without values too.
    `quantized` also takes what `trimfit quantize` writes, packed or with online transformations. Raises `InputError`
    for anything else that is not a whole, unquantized, decoder-only language model with a tokenizer that fits.
    """
    source, config = _open(source, quantized=quantized)
    tokenizer = load_tokenizer(source)
    device = device or torch.device("cpu")
    model: Any = _load_model(source, config, outline=device.type == "meta")
    model = model.to(device)
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.vocab_size > rows:  # tokens added beyond it may be without a row, as Gemma 3's image token is
        raise InputError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens but the model embeds only {rows}: "
            "it belongs to another model"
        )
    return Checkpoint(source, model, tokenizer)


def load(directory: str | Path, *, merged: bool = False) -> PreTrainedModel:
    """Loads any model that trimfit writes: dense, packed, or with online transformations. Public as `trimfit.load`.

    **Arguments**

    - `directory`: of the model. A hub name will do for all but online transformations.
    - `merged`: multiplies online transformations into the weights, W = (W T) T⁻¹. That is an ordinary dense model, the
      one that `trimfit.quantize` leaves in memory; it can be saved, compiled and trained.

    **Returns** the model in the dtype of its checkpoint, on the CPU, in evaluation mode. Dense and packed ones are as
    plain transformers loads them. With online transformations weights are ordinary ones W T in the model's dtype, and
    T⁻¹ is applied to the inputs in the same dtype; such a model cannot be saved, and is no source for `prune` and
    `quantize`. Raises `InputError` for a model that is incomplete, damaged, no decoder-only language model, or
    quantized by something else.
    """
    source, config = _open(str(directory), quantized=True)
    return _load_model(source, config, merged=merged)


def read_config(source: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config of a checkpoint and the dtype of its weights, from their headers; no weight is read.

    Weights that are not there have the dtype that the config tells. `source` and errors are those of `load_checkpoint`.
    """
    directory = Path(source).expanduser()
    source, config = _open(source, quantized=False, whole=bool(shard_files(directory)))
    dtype = _stored_dtype(source)
    if isinstance(dtype, str):
        told = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
        dtype = told if isinstance(told, torch.dtype) else torch.float32
    return config, dtype


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; `source` and errors are those of `load_checkpoint`."""
    directory = Path(source).expanduser()
    if directory.is_dir() and not any(file for pattern in _TOKENIZER for file in directory.glob(pattern)):
        raise InputError(f"{directory} has no tokenizer (tokenizer.json): the download is incomplete, fetch it again")
    try:
        return AutoTokenizer.from_pretrained(directory if directory.is_dir() else source)
    except Exception as error:  # as above
        raise InputError(f"the tokenizer of {source} cannot be loaded: {first_line(error)}") from error


def resolve_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:1", "mps"; raises `InputError` for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise InputError(f"the device {name!r} is not available here; use --device auto or cpu") from None
    return device


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names, shapes and bytes of all weights."""
    return fingerprint_of(sorted(model.state_dict().items()))


def _open(source: str, *, quantized: bool, whole: bool = True) -> tuple[str, PreTrainedConfig]:
    """The source as transformers takes it, with its config, when all that is there without loading is in order.

    `whole`: its weights must be there.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        source = str(directory)
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json, so it is not a Hugging Face model directory")
    elif directory.exists():
        raise InputError(f"{source} is a file; give the model's directory")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"there is no model directory {source}")
    config = _load_config(source)
    _check_architecture(source, config)
    _check_quantization(source, config, accepted=quantized)
    if directory.is_dir() and whole:
        _check_files(directory, ONLINE if is_online(config) else "model")
    return source, config


def _check_files(directory: Path, stem: str) -> None:
    shards = shard_files(directory, stem)
    if not shards and (stem == ONLINE or not any(directory.glob("*.bin"))):
        raise InputError(
            f"{directory} has no weights ({stem}.safetensors or {stem}.safetensors.index.json): "
            "the download is incomplete, fetch it again"
        )
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{directory} lacks the shard {shard.name}: the download is incomplete, fetch it again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard} is truncated or damaged ({error}): download it again") from None


def _load_config(source: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # every way a config can be wrong, or the hub out of reach
        where = "" if Path(source).is_dir() else "there is no such directory, and as a model of the hub "
        raise InputError(f"{where}the config of {source} cannot be read: {first_line(error)}") from error


def _check_architecture(source: str, config: PreTrainedConfig) -> None:
    architectures = config.architectures or []
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or (architectures and not remote and not causal.intersection(architectures)):
        what = architectures[0] if architectures else config.model_type
        raise InputError(f"{source} is a {what}, not a decoder-only language model (AutoModelForCausalLM)")


def _check_quantization(source: str, config: PreTrainedConfig, *, accepted: bool) -> None:
    quantization: Any = getattr(config, "quantization_config", None)
    if not quantization:
        return
    if not accepted:
        raise InputError(f"{source} is quantized already; start from the full-precision model")
    method = quantization.get("quant_method")
    if method not in (ONLINE, "compressed-tensors"):
        raise InputError(f"{source} is quantized by {method}; trimfit reads what it writes itself, and the full model")
    if method == ONLINE and not Path(source).is_dir():
        raise InputError(f"{source} has online transformations, which are read from a directory only: download it")


def _stored_dtype(source: str) -> torch.dtype | str:
    """The dtype of the weights in a directory, which its config may not tell; "auto" where that cannot be seen.

    Raises `InputError` for weights that are integers, which transformers would take for the weights themselves.
    """
    dtypes: set[torch.dtype] = set()
    for shard in shard_files(Path(source)) if Path(source).is_dir() else []:
        with safe_open(shard, framework="pt") as file:
            stored = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        for name, kind in stored.items():
            if name.endswith(".weight") and kind[0] in "IU":
                raise InputError(
                    f"{name} of {source} is stored as {kind} and not in floating point: the model is quantized by "
                    "something unknown or damaged; start from the full-precision model"
                )
        dtypes |= {_DTYPES[kind] for kind in stored.values() if kind in _DTYPES}
    if len(dtypes) > 1:
        log.warning("%s mixes weights of %s; all are treated as what its config says", source, sorted(map(str, dtypes)))
    return dtypes.pop() if len(dtypes) == 1 else "auto"


def _load_model(
    source: str, config: PreTrainedConfig, *, merged: bool = False, outline: bool = False
) -> PreTrainedModel:
    """`merged`: see `load`; `outline`: on the meta device."""
    online = None
    try:
        if is_online(config):
            online = read_online(Path(source), config, merged=merged)
            model, info = build_model(Path(source), config, online.weights)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=_stored_dtype(source),
                device_map={"": "meta"} if outline else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            model, info = loaded
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that this model cannot be used
        if "conversion of the weights" in str(error):  # its own words end with "look at the above report"
            raise InputError(
                f"the weights of {source} do not fit together, as when one of several experts is missing: the download "
                "is incomplete or config.json belongs to another model"
            ) from error
        raise InputError(f"the model {source} cannot be loaded: {first_line(error)}") from error
    if info["mismatched_keys"]:
        name = sorted(info["mismatched_keys"])[0][0]
        raise InputError(f"weights of {source} have other shapes than config.json says, {name} first")
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the checkpoint {source} lacks {len(missing)} weights, {missing[0]} first: the download is incomplete "
            "or config.json belongs to another model"
        )
    unused = sorted(info["unexpected_keys"])
    if unused:
        log.warning("%d weights of %s are unknown to the model and left out, %s first", len(unused), source, unused[0])
    _check_packed(source, model)
    if online is not None and online.inverses:
        attach_transforms(model, online.inverses, config.quantization_config)
    return model.eval()


def _check_packed(source: str, model: PreTrainedModel) -> None:
    """What transformers does not: that packed weights have the shapes that config.json says."""
    for name, module in model.named_modules():
        shape = getattr(module, "weight_shape", None)
        if isinstance(shape, Tensor) and shape.tolist() != [module.out_features, module.in_features]:
            raise InputError(f"weights of {source} have other shapes than config.json says, {name}.weight first")
