"""How many bytes of a text each of its tokens stands for."""

import re
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[int]]:
    """Token ids of `text` without added special tokens, and the number of its UTF-8 bytes each one stands for.

    The counts add up to the bytes of the text, if it has tokens. White space that a tokenizer drops counts for the next
    token. A character split among tokens is divided by the bytes in each. With a tokenizer written in Python, which
    keeps no offsets, the bytes are spread evenly: then only the sum is exact.
    """
    fast = bool(tokenizer.is_fast)
    encoding: Any = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids: list[int] = encoding["input_ids"]
    if not fast:
        return ids, _spread(len(text.encode()), len(ids))
    return ids, _bytes_of_spans(tokenizer, text, ids, encoding["offset_mapping"])


def _spread(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _bytes_of_spans(
    tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int], spans: list[tuple[int, int]]
) -> list[int]:
    bytes_before = [0, *accumulate(len(character.encode()) for character in text)]
    counts = [0] * len(ids)
    reached = 0
    for start, stop in _groups(spans):
        end = len(text) if stop == len(ids) else max(reached, *(span[1] for span in spans[start:stop]))
        size = bytes_before[end] - bytes_before[reached]
        counts[start:stop] = [size] if stop - start == 1 else _divide(size, _own_bytes(tokenizer, ids[start:stop]))
        reached = end
    return counts


def _groups(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of consecutive tokens that share characters: offsets count whole characters, tokens may split them."""
    starts: list[int] = []
    reached = 0
    for i, (start, end) in enumerate(spans):
        if i == 0 or start >= reached:
            starts.append(i)
        reached = max(reached, end)
    return list(pairwise([*starts, len(spans)]))


def _divide(size: int, own: list[int]) -> list[int]:
    """`size` bytes to the tokens of a group: to each its own, from the last; the first may hold an added space."""
    counts = [0] * len(own)
    for i in reversed(range(1, len(own))):
        counts[i] = min(own[i], size)
        size -= counts[i]
    counts[0] = size
    return counts


def _own_bytes(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    backend: Any = tokenizer
    decoder: Any = backend.backend_tokenizer.decoder
    pieces: list[str] = backend.convert_ids_to_tokens(ids)
    if decoder is not None and b'"ByteLevel"' in decoder.__getstate__():
        return [len(piece) for piece in pieces]  # there each character of a piece stands for one byte
    return [1 if _FALLBACK_BYTE.fullmatch(piece) else len(piece.replace("▁", " ").encode()) for piece in pieces]
