"""What a GGUF file says of a tokenizer: its tokens, how it splits text, what it puts around it."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trimfit.errors import InputError

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

Steps = list[dict[str, Any]]  # of a normalizer or a pre-tokenizer, as tokenizer.json writes them


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = _BYTES | {"use_regex": True}  # split as GPT-2 does
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How byte-level tokenizers split text, under the names by which llama.cpp knows it; it refuses all other names.
# Of the pre-tokenizer's steps, and whether words that are tokens are taken whole, whatever the merges.
_SPLITTERS: dict[str, tuple[Steps, bool]] = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([_DIGITS, _WORDS], False),
    "llama-bpe": ([_LLAMA_3, _BYTES], True),
    "smaug-bpe": ([_LLAMA_3, _BYTES], False),
    "qwen2": ([_QWEN_2, _BYTES], False),
}

# How SentencePiece treats spaces, and whether it puts one in front of a text.
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
_SENTENCE_PIECE: list[tuple[Steps, Steps, bool]] = [
    ([{"type": "Prepend", "prepend": "▁"}, _SPACES], [], True),
    ([_SPACES], [], False),
    ([], [_METASPACE | {"prepend_scheme": "always"}], True),
    ([], [_METASPACE | {"prepend_scheme": "first"}], True),
    ([], [_METASPACE | {"prepend_scheme": "never"}], False),
]


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.…` of a GGUF file with their values: str, bool, int ≥ 0, or a list of one type.

    `rows` is how many tokens the model embeds; rows without a token get one that is marked as unused.

    Two kinds of BPE can be held: byte-level, split in one of the ways that llama.cpp knows, and with byte fallback and
    scores, as SentencePiece makes it. Anything else is an `InputError`.

    Where readers differ from the tokenizer: llama.cpp does not apply NFC; transformers adds no BOS, takes the BOS for
    the EOS as well (in the tokenizer, not in the config), splits in its own way (see `splits_alike`) and takes added
    tokens that are not special for plain text; both put a space in front of a text that begins with one already, which
    tokenizers with Metaspace do not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec: dict[str, Any] = json.loads(backend.to_str()) if isinstance(backend, Tokenizer) else {}
    bpe: dict[str, Any] = spec.get("model", {})
    if bpe.get("type") != "BPE":
        kind = bpe.get("type") or type(tokenizer).__name__
        raise InputError(f"the tokenizer is a {kind}, but a GGUF file of these models holds BPE tokenizers only")
    _check_bpe(bpe)
    _check_added(spec["added_tokens"])
    added = {str(token["content"]): bool(token["special"]) for token in spec["added_tokens"]}
    tokens = _tokens(tokenizer, rows)
    values: dict[str, Any] = {"tokens": [token or f"<unused row {i}>" for i, token in enumerate(tokens)]}
    types = [_type(token, added) for token in tokens]
    if bpe["byte_fallback"]:
        values |= {"model": "llama", "pre": "default", "add_space_prefix": _space_prefix(spec)}
        _mark_bytes(tokens, types)
        if tokenizer.unk_token is not None:
            types[tokens.index(str(tokenizer.unk_token))] = _UNKNOWN
        values["scores"] = _scores(tokens, types, bpe["merges"])
    else:
        values |= {"model": "gpt2", "pre": _splitter(spec)}
    values["token_type"] = types
    values["merges"] = [" ".join(pair) for pair in bpe["merges"]]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (values | _special(tokenizer)).items()}
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def splits_alike(metadata: Mapping[str, Any], architecture: str) -> bool:
    """Whether transformers, which goes by the architecture, splits text as llama.cpp, which goes by `ggml.pre`."""
    known = "gpt-2" if architecture == "llama" else "qwen2"
    if metadata["tokenizer.ggml.model"] == "llama":
        return architecture == "llama"
    return metadata["tokenizer.ggml.pre"] == known


def _check_bpe(bpe: Mapping[str, Any]) -> None:
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe[option]:
            raise InputError(f"the tokenizer has {option} {bpe[option]!r}, which a GGUF file cannot hold")
    if not bpe["merges"]:
        raise InputError("the tokenizer has no merges, which a GGUF file must have")
    if any(" " in part for pair in bpe["merges"] for part in pair):
        raise InputError("the tokenizer merges tokens that contain spaces, which a GGUF file cannot hold")


def _check_added(added: Sequence[Mapping[str, Any]]) -> None:
    for token in added:
        for option in ("lstrip", "rstrip", "single_word"):
            if token[option]:
                raise InputError(
                    f"the token {token['content']!r} of the tokenizer has {option}, which a GGUF file cannot hold"
                )


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str | None]:
    """The token of each row of the embedding; None for a row that has none."""
    tokens: list[str | None] = [None] * rows
    for token, i in tokenizer.get_vocab().items():
        if i >= rows:
            raise InputError(f"the token {token!r} has the id {i} but the model embeds only {rows} tokens")
        tokens[i] = token
    return tokens


def _type(token: str | None, added: Mapping[str, bool]) -> int:
    if token is None:
        return _UNUSED
    if token in added:
        return _CONTROL if added[token] else _USER_DEFINED
    return _NORMAL


def _mark_bytes(tokens: Sequence[str | None], types: list[int]) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    for token in (f"<0x{byte:02X}>" for byte in range(256)):
        if token not in ids:
            raise InputError(f"the tokenizer falls back on bytes but has no token {token}, which a GGUF file must have")
        types[ids[token]] = _BYTE


def _steps(part: Mapping[str, Any] | None, key: str) -> Steps:
    """The steps of a normalizer or a pre-tokenizer, without what has no influence on the tokens."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [{name: value for name, value in part.items() if name != "trim_offsets"}]


def _splitter(spec: Mapping[str, Any]) -> str:
    """The name of the way in which a byte-level tokenizer splits text."""
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    whole = bool(spec["model"]["ignore_merges"])
    name = next((name for name, known in _SPLITTERS.items() if known == (steps, whole)), None)
    normalizer = _steps(spec["normalizer"], "normalizers")
    if name is None or normalizer not in ([], *([[{"type": "NFC"}]] if name == "qwen2" else [])):
        raise InputError(
            "the tokenizer splits text in a way that has no name in a GGUF file; "
            f"known are those of {', '.join(_SPLITTERS)} and SentencePiece"
        )
    return name


def _space_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer in SentencePiece's style puts a space in front of a text."""
    normalizer, splitter = _steps(spec["normalizer"], "normalizers"), _steps(spec["pre_tokenizer"], "pretokenizers")
    if not spec["model"]["ignore_merges"]:
        for known_normalizer, known_splitter, prefix in _SENTENCE_PIECE:
            if (normalizer, splitter) == (known_normalizer, known_splitter):
                return prefix
    raise InputError("the tokenizer falls back on bytes but treats spaces in another way than SentencePiece does")


def _scores(tokens: Sequence[str | None], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """The score of each token: the earlier it is merged, the higher.

    llama.cpp knows no merges: of all neighbours that together are a token, it joins those with the highest score. That
    gives the same tokens only if all merges into a token follow one another, and no way to split a token is left out.
    """
    order: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    last = None
    for left, right in merges:
        pairs.add((left, right))
        if left + right != last and left + right in order:
            raise InputError(f"the merges into {left + right!r} are apart, so a GGUF file cannot score the tokenizer")
        last = left + right
        order.setdefault(last, len(order))
    normal = {token for token, kind in zip(tokens, types, strict=True) if token is not None and kind == _NORMAL}
    for token in normal:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in normal and right in normal and (left, right) not in pairs:
                raise InputError(
                    f"the tokenizer does not merge {left!r} and {right!r} into {token!r}, as SentencePiece would, "
                    "so a GGUF file cannot score it"
                )
    return [-float(order.get(token or "", len(order))) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids of special tokens, and which of them begin and end a text."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token, and readers of a GGUF file would take another one for it")
    # Without a BOS readers take some other token for it, or fail: then, as GPT-2 has it, the end is also the beginning.
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    special: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": eos}
    for key, value in (("unknown", tokenizer.unk_token_id), ("padding", tokenizer.pad_token_id)):
        if value is not None:
            special[f"{key}_token_id"] = value
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for begins, ends in product((False, True), repeat=2):
        if full == [bos] * begins + plain + [eos] * ends:
            return special | {"add_bos_token": begins, "add_eos_token": ends}
    raise InputError("the tokenizer puts other tokens than BOS and EOS around a text, which a GGUF file cannot hold")
