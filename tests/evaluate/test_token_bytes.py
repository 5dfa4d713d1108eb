from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from trimfit.evaluate.token_bytes import token_bytes

Kind = Callable[[str], Any]
texts = st.text(st.sampled_from("theca  \nüß日本語🙂e\u0301"), max_size=30)


@pytest.fixture(scope="module")
def level(byte_level: Kind) -> Any:
    return byte_level("<s> $A")


@pytest.fixture(scope="module")
def fallback(byte_fallback: Kind) -> Any:
    return byte_fallback("<s> $A")


@settings(max_examples=60)
@given(text=texts)
def test_each_token_of_a_byte_level_tokenizer(level: Any, text: str) -> None:
    ids, sizes = token_bytes(level, text)
    assert [level.bos_token_id, *ids] == level(text).input_ids
    assert sizes == [len(piece) for piece in level.convert_ids_to_tokens(ids)]
    assert sum(sizes) == len(text.encode())


@settings(max_examples=60)
@given(text=texts)
def test_each_token_with_byte_fallback(fallback: Any, text: str) -> None:
    ids, sizes = token_bytes(fallback, text)
    pieces = fallback.convert_ids_to_tokens(ids)
    expected = [1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode()) for piece in pieces]
    if expected:
        expected[0] -= 1  # the space that is put before the text is not in it
    assert sizes == expected
    assert sum(sizes) == len(text.encode())


def test_tokens_do_split_characters_here(level: Any, fallback: Any) -> None:
    assert 1 in token_bytes(level, "語🙂")[1] and token_bytes(fallback, "語")[1] == [0, 1, 1, 1]


def test_special_tokens_in_the_text_are_text(level: Any) -> None:
    ids, sizes = token_bytes(level, "the</s>cat")
    assert level.eos_token_id in ids and sizes[ids.index(level.eos_token_id)] == 4 and sum(sizes) == 10


def test_dropped_white_space_counts_for_the_next_token(byte_level: Kind) -> None:
    tokenizer = byte_level("$A")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    ids, sizes = token_bytes(tokenizer, "  the cat \n")
    assert ids == token_bytes(tokenizer, "the cat")[0]
    assert sum(sizes) == 11 and sizes[0] >= 3


def test_tokenizers_in_python_spread_the_bytes(slow_tokenizer: Any) -> None:
    ids, sizes = token_bytes(slow_tokenizer, "日本 abcd")
    assert len(ids) == 6 and sum(sizes) == 11 and max(sizes) - min(sizes) <= 1
    assert token_bytes(slow_tokenizer, "") == ([], [])
