"""Cuts documents or token streams in windows of equal length, and checks that they fit a model."""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from trimfit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# The usual name first; Transformers maps most families to it, configurations that came with their own code vary.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_USUAL_LENGTH = 2048
_TEXT_CONFIG_NAMES = ("text_config", "language_config", "llm_config")


class AddedTokens(NamedTuple):
    """Ids that a tokenizer puts before and after the tokens of a text."""

    before: list[int]
    after: list[int]

    @property
    def bos(self) -> int | None:
        """The id a text begins with, or None when the tokenizer puts nothing before it."""
        return self.before[0] if self.before else None


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> AddedTokens:
    """What the tokenizer adds to a text, found by giving it one: attributes such as `bos_token` do not tell."""
    full, text = _encode(tokenizer, ["a"], special=True)[0], _encode(tokenizer, ["a"], special=False)[0]
    for start in reversed(range(len(full) - len(text) + 1)):
        if full[start : start + len(text)] == text:
            return AddedTokens(full[:start], full[start + len(text) :])
    raise InputError("the tokenizer gives a text other tokens when it adds special ones, so windows cannot be built")


def encode_documents(tokenizer: "PreTrainedTokenizerBase", documents: list[str]) -> list[list[int]]:
    """The token ids of each document, with the special tokens that the tokenizer adds; nothing is truncated.

    Documents that have no tokens of their own are left out.
    """
    if not documents:
        return []
    added = added_tokens(tokenizer)
    encoded = _encode(tokenizer, documents, special=False)
    return [[*added.before, *ids, *added.after] for ids in encoded if ids]


def sample_windows(
    documents: Sequence[Sequence[int]], *, samples: int, length: int, seed: int, bos: int | None
) -> Tensor:
    """Calibration windows that do not overlap, drawn without replacement: int64 (samples, length).

    The documents are joined, each beginning with `bos`, and cut one after the other; what is left at the end and is
    shorter than a window is dropped. Fewer windows than `samples` are returned, with a warning, when there are no more.

    **Arguments**

    - `documents`: token ids of each document, as `encode_documents` gives them.
    - `samples`, `length`: number of windows, and tokens in each.
    - `seed`: the same seed draws the same windows, in the same order.
    - `bos`: the id every window begins with, `added_tokens(tokenizer).bos`; None when the model uses none. Where a
      window begins inside a document the id is added to it, so such a window has `length - 1` tokens of text.

    Raises `InputError` when there are fewer tokens than one window needs, or a number is out of range.
    """
    _check_request(samples, length)
    if bos is not None:
        documents = [ids if ids and ids[0] == bos else [bos, *ids] for ids in documents]
    stream = torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int64)
    return _draw(_cut(stream, length, bos), samples, length, seed, tokens=len(stream))


def windows_from_ids(ids: Tensor, *, samples: int, length: int, seed: int) -> Tensor:
    """Calibration windows from token ids made elsewhere: int64 (samples, length), drawn without replacement.

    **Arguments**

    - `ids`: integers; (tokens,) is a stream, cut in windows that do not overlap; (windows, n) are windows, used as they
      are, only the first `length` tokens of each when n is larger. No BOS is added.
    - `samples`, `length`, `seed`: as for `sample_windows`.

    Raises `InputError` for windows narrower than `length`, a stream shorter than one window, other shapes or dtypes.
    """
    _check_request(samples, length)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, but they are {ids.dtype}")
    ids = ids.to(torch.int64)
    if ids.dim() == 1:
        return _draw(_cut(ids, length, None), samples, length, seed, tokens=len(ids))
    if ids.dim() != 2:
        raise InputError(f"token ids must be (tokens,) or (windows, length), but their shape is {tuple(ids.shape)}")
    if ids.shape[1] < length:
        raise InputError(f"the windows given have {ids.shape[1]} tokens, fewer than {length}; ask for shorter windows")
    return _draw(ids[:, :length], samples, length, seed, tokens=ids.numel())


def check_ids(windows: Tensor, vocabulary_size: int) -> None:
    """Raises `InputError` when an id in `windows` (any shape, integers) is not in 0 … vocabulary_size - 1."""
    if windows.numel() == 0:
        return
    smallest, largest = int(windows.min()), int(windows.max())
    if smallest < 0:
        raise InputError(f"there is a negative token id ({smallest}); remove padding and label masks from the tokens")
    if largest >= vocabulary_size:
        raise InputError(
            f"token id {largest} is outside the model's vocabulary of {vocabulary_size}: the tokenizer does not "
            "fit the model; use the tokenizer that belongs to it"
        )


def context_length(config: "PreTrainedConfig") -> int | None:
    """The most tokens the model was built for, from its configuration or that of its text part; None when unstated."""
    for part in (config, *(getattr(config, name, None) for name in _TEXT_CONFIG_NAMES)):
        for name in _CONTEXT_NAMES:
            value = cast("Any", getattr(part, name, None))
            if isinstance(value, int) and value > 0:
                return value
    return None


def window_length(requested: int | None, config: "PreTrainedConfig") -> int:
    """`requested` tokens, or the model's context if that is shorter, which is logged.

    None asks for the context, but not for more than 2048 tokens. Raises `InputError` for fewer than two.
    """
    longest = context_length(config)
    if requested is None:
        return min(longest or _USUAL_LENGTH, _USUAL_LENGTH)
    _check_length(requested)
    if longest is None or requested <= longest:
        return requested
    log.warning("windows of %d tokens were asked for, but the model's context is %d: using that", requested, longest)
    return longest


def split_held_out(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Windows to fit on, and the last of them, round(share·N), to check on: views of `windows` (N, length).

    With a positive share and two windows or more each part has at least one; a single window is never held out.
    Raises `InputError` unless 0 ≤ share < 1.
    """
    if not 0 <= share < 1:
        raise InputError(f"the held-out share must be at least 0 and less than 1, but it is {share}")
    fit = len(windows) - held_out_count(len(windows), share)
    return windows[:fit], windows[fit:]


def held_out_count(count: int, share: float) -> int:
    """How many of `count` windows `split_held_out` keeps aside."""
    return min(max(round(share * count), 1), count - 1) if share > 0 and count > 1 else 0


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool) -> list[list[int]]:
    # verbose=False: no warning that a document is longer than the model's context, since windows are cut from it.
    encoding: Any = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoding["input_ids"]


def _check_length(length: int) -> None:
    if length < 2:
        raise InputError(f"a window must have at least 2 tokens, but {length} was asked for")


def _check_request(samples: int, length: int) -> None:
    if samples < 1:
        raise InputError(f"at least 1 window is needed, but {samples} were asked for")
    _check_length(length)


def _cut(stream: Tensor, length: int, bos: int | None) -> Tensor:
    """All windows of the stream in order, (windows, length); each begins with `bos` unless that is None."""
    if bos is None:
        count = len(stream) // length
        return stream[: count * length].view(count, length)
    first = torch.tensor([bos])
    windows: list[Tensor] = []
    position = 0
    while position < len(stream):
        begins = stream[position] == bos
        end = position + length - (0 if begins else 1)
        if end > len(stream):
            break
        text = stream[position:end]
        windows.append(text if begins else torch.cat((first, text)))
        position = end
    return torch.stack(windows) if windows else stream.new_empty(0, length)


def _draw(windows: Tensor, samples: int, length: int, seed: int, tokens: int) -> Tensor:
    if len(windows) == 0:
        raise InputError(
            f"the calibration text has {tokens} tokens, but one window needs {length}; "
            "give more text or ask for shorter windows"
        )
    if len(windows) < samples:
        log.warning("%d calibration windows were asked for, but the text gives %d: using all", samples, len(windows))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]
