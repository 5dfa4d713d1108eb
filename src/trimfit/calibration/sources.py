"""Reads what a user names as text or as token ids: a file, or a dataset on the Hugging Face hub."""

import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimfit.errors import InputError, first_line

log = logging.getLogger(__name__)

DOCUMENT_END = "<|endoftext|>"
HUB_ROWS = 10_000  # calibration needs far fewer; the usual sets (C4) are too large to be read whole

_JSON_LINES = {".jsonl", ".json-lines", ".jsonlines"}
_ID_NAMES = ("input_ids", "tokens")
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[\w.-]+))?")
_FILE_SUFFIX = re.compile(r"\.(?!v\d)[A-Za-z][\w-]*$")  # "org/data.v2" and "data-1.1" are names of datasets
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_documents(source: str, *, field: str = "text", split: str = "train", limit: int = HUB_ROWS) -> list[str]:
    """The documents of a text file, a JSON-lines file or a dataset on the hub, without blank ones.

    **Arguments**

    - `source`: what the user gave. A file ending in .jsonl, .jsonlines or .json-lines has one JSON object a line. Any
      other file is UTF-8 text (a byte order mark is dropped): a line that is exactly `<|endoftext|>` ends a document,
      and without such lines the file is one document. What is not a file and looks like "name", "org/name" or
      "org/name:config" is loaded with the `datasets` package, where each row is a document.
    - `field`: where the text is in a JSON object or a dataset's row.
    - `split`: the dataset's split; files have none.
    - `limit`: the most rows read from a dataset; files are read whole.

    Raises `InputError` when there is no such file, it is a directory, is not text, or holds nothing but white space;
    when a JSON line is malformed or lacks the field; when the dataset cannot be loaded.
    """
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        data = _read_bytes(path)
        documents = _json_documents(path, data, field) if _is_json_lines(path) else _text_documents(_decode(path, data))
    elif hub := _hub_name(source):
        documents = _hub_documents(hub["name"], hub["config"], field, split, limit)
    else:
        raise InputError(f"no such file: {_shortened(source)}; give a UTF-8 text file, a .jsonl file or a hub dataset")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{source} has only blank documents; give a text with words in it")
    return documents


def read_token_ids(path: str | Path) -> Tensor:
    """Token ids from a .npy or .safetensors file: int64, (tokens,) for a stream or (windows, length) for windows.

    A .safetensors file holds them under "input_ids" or "tokens", or as its only tensor, or as its only integer tensor.

    Raises `InputError` when the file is missing, of another kind, damaged or empty, when it is unclear which tensor is
    meant, and when the values are not integers, are negative, or have another number of dimensions.
    """
    path = Path(os.path.expanduser(path))
    readers: dict[str, Callable[[Path], NDArray[Any]]] = {".npy": _load_npy, ".safetensors": _load_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"token ids are read from .npy or .safetensors files, but {path} is neither")
    if not os.path.exists(path):
        raise InputError(f"no such file: {path}")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give the .npy or .safetensors file with the token ids")
    ids = reader(path)
    _check_ids_array(path, ids)
    return torch.as_tensor(ids.astype(np.int64))


def is_on_hub(source: str) -> bool:
    """Whether `read_documents` would look for the source on the hub: it is no file, and does not look like one."""
    return not os.path.exists(os.path.expanduser(source)) and _hub_name(source) is not None


def _hub_name(source: str) -> re.Match[str] | None:
    return None if _looks_like_path(source) else _HUB_NAME.fullmatch(source)


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in _JSON_LINES


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or _FILE_SUFFIX.search(source) is not None


def _shortened(source: str, most: int = 120) -> str:
    return source if len(source) <= most else f"{source[:most]}…"


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give one text file or one .jsonl file in it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise InputError(f"{path} is empty; give a file with text")
    return data


def _decode(path: Path, data: bytes) -> str:
    """The text of `data`, which must be UTF-8 without NUL bytes and not all white space."""
    advice = "give UTF-8 text or a .jsonl file"
    if data.startswith(_UTF16_MARKS):
        raise InputError(f"{path} is UTF-16, not UTF-8 (byte order mark at byte 0); convert it to UTF-8 first")
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(f"{path} is not text: it has a NUL byte at byte {nul}; {advice}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is not valid ({error.reason}); {advice}"
        ) from error
    if not text.strip():
        raise InputError(f"{path} has only white space; give a file with text")
    return text


def _text_documents(text: str) -> list[str]:
    # Not splitlines(): it also splits at form feeds and other characters that belong to the text.
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.removesuffix("\r") == DOCUMENT_END:
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines) for lines in documents]


def _json_documents(path: Path, data: bytes, field: str) -> Iterator[str]:
    for number, line in enumerate(_decode(path, data).split("\n"), start=1):
        if line.strip():
            yield _json_text(f"{path}, line {number}", line, field)


def _json_text(where: str, line: str, field: str) -> str:
    try:
        entry: object = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
        raise InputError(message) from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: not a JSON object; each line must be one, with the text in {field!r}")
    return _field_text(where, cast("dict[str, object]", entry), field)


def _field_text(where: str, entry: dict[str, object], field: str) -> str:
    if field not in entry:
        raise InputError(f"{where}: no field {field!r} among {sorted(entry)}; name the field that holds the text")
    text = entry[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} holds {type(text).__name__}, not text; name the field that does")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair; no tokenizer takes it
        raise InputError(
            f"{where}: character {error.start} of field {field!r} is a lone surrogate; repair it"
        ) from error
    return text


def _hub_documents(name: str, config: str | None, field: str, split: str, limit: int) -> Iterator[str]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"{name} is not a file, and loading it as a dataset from the hub needs a package that is missing: "
            'pip install "trimfit[datasets]"'
        ) from error
    try:
        stream: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        rows: list[dict[str, object]] = list(islice(stream, limit))
    except Exception as error:  # the package lets through exceptions of every library beneath it
        label = f"{name}:{config}" if config else name
        raise InputError(f"the dataset {label} (split {split!r}) cannot be loaded: {first_line(error)}") from error
    if len(rows) == limit:
        log.info("only the first %d rows of %s are read", limit, name)
    for number, row in enumerate(rows):
        yield _field_text(f"dataset {name}, row {number}", row, field)


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:  # not np.load: that also opens archives, as mappings
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy file: {first_line(error)}") from error


def _load_safetensors(path: Path) -> NDArray[Any]:
    try:
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            names: list[str] = list(file.keys())
            integer = [name for name in names if file.get_slice(name).get_dtype()[0] in "IU"]
            return file.get_tensor(_ids_name(path, names, integer))
    except (OSError, SafetensorError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a .safetensors file: {first_line(error)}") from error


def _ids_name(path: Path, names: list[str], integer: list[str]) -> str:
    for candidates in ([name for name in _ID_NAMES if name in names][:1], names, integer):
        if len(candidates) == 1:
            return candidates[0]
    raise InputError(
        f"{path} must have one integer tensor, or one named 'input_ids' or 'tokens', but it has {sorted(names)}"
    )


def _check_ids_array(path: Path, ids: NDArray[Any]) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{path} holds {ids.dtype} values; token ids must be integers")
    if ids.ndim not in (1, 2):
        raise InputError(f"{path} has shape {ids.shape}; give a stream (tokens,) or windows (windows, length)")
    if ids.size == 0:
        raise InputError(f"{path} has shape {ids.shape}, so it holds no token ids; give a file that does")
    if ids.min() < 0:
        raise InputError(f"{path} has a negative id ({ids.min()}); remove padding and label masks from the token ids")
    if ids.max() > np.iinfo(np.int64).max:
        raise InputError(
            f"{path} has an id that does not fit 64-bit integers ({ids.max()}); it does not hold token ids"
        )
