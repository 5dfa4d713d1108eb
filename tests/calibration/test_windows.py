import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, LlavaConfig, MambaConfig

from trimfit.calibration import (
    added_tokens,
    check_ids,
    context_length,
    encode_documents,
    sample_windows,
    split_held_out,
    window_length,
    windows_from_ids,
)
from trimfit.errors import InputError

TEXTS = ["the cat sat", "", "über die Straße, 日本 " * 9]


@pytest.mark.parametrize(
    ("template", "before", "after"), [("<s> $A", 1, 0), ("$A", 0, 0), ("$A </s>", 0, 1), ("<s> <s> $A </s>", 2, 1)]
)
def test_documents_are_encoded_as_the_tokenizer_does(
    make_tokenizer: Callable[..., Any], template: str, before: int, after: int
) -> None:
    tokenizer = make_tokenizer(template)
    added = added_tokens(tokenizer)
    assert (len(added.before), len(added.after)) == (before, after)
    assert added.bos == (tokenizer.bos_token_id if before else None)
    expected = [tokenizer(text).input_ids for text in TEXTS if text]
    assert encode_documents(tokenizer, TEXTS) == expected
    assert len(expected[1]) > tokenizer.model_max_length, "the test is to show that nothing is cut"


def test_long_documents_make_no_noise(make_tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        encode_documents(tokenizer, TEXTS)
        assert not caplog.records
        tokenizer(TEXTS)
        assert "longer than" in caplog.text, "the tokenizer no longer warns: this test shows nothing"
    finally:
        root.removeHandler(caplog.handler)


def test_no_documents(make_tokenizer: Callable[..., Any]) -> None:
    assert encode_documents(make_tokenizer(), []) == []
    assert encode_documents(make_tokenizer(), [""]) == []


BOS = 0
documents_of_unique_ids = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(sizes=documents_of_unique_ids, length=st.integers(2, 7), seed=st.integers(0, 99), samples=st.integers(1, 9))
@pytest.mark.parametrize("bos", [BOS, None])
def test_windows_are_disjoint_and_repeatable(
    bos: int | None, sizes: list[int], length: int, seed: int, samples: int
) -> None:
    ids = iter(range(1, 1000))
    documents = [([] if bos is None else [bos]) + [next(ids) for _ in range(size)] for size in sizes]
    stream = [token for document in documents for token in document]
    if len(stream) + (bos is not None) < length + 1:
        return
    try:
        windows = sample_windows(documents, samples=samples, length=length, seed=seed, bos=bos)
    except InputError:
        assert len(stream) < length
        return
    assert windows.dtype == torch.int64 and windows.shape[1] == length and 1 <= len(windows) <= samples
    text = [token for token in windows.flatten().tolist() if token != BOS]
    assert len(set(text)) == len(text), "a token is in two windows"
    for window in windows.tolist():
        inside = [token for token in window if token != BOS]
        assert inside == list(range(inside[0], inside[0] + len(inside))), "a window is not a piece of the stream"
        assert bos is None or (window[0] == bos and window[1:2] != [bos])
    again = sample_windows(documents, samples=samples, length=length, seed=seed, bos=bos)
    assert torch.equal(windows, again)
    everything = sample_windows(documents, samples=1000, length=length, seed=seed, bos=bos)
    assert torch.equal(everything[:samples], windows), "fewer windows are the first of more"


def test_all_the_text_is_in_some_window() -> None:
    windows = sample_windows([[0, 1, 2, 3, 4], [0, 5], [0, 6, 7, 8]], samples=9, length=3, seed=0, bos=0)
    assert sorted(windows.tolist()) == [[0, 1, 2], [0, 3, 4], [0, 5, 0], [0, 6, 7]]
    bare = sample_windows([[1, 2, 3, 4], [5]], samples=9, length=2, seed=0, bos=None)
    assert sorted(bare.tolist()) == [[1, 2], [3, 4]]


def test_documents_without_bos_get_one() -> None:
    windows = sample_windows([[1, 2], [3]], samples=9, length=5, seed=0, bos=0)
    assert windows.tolist() == [[0, 1, 2, 0, 3]]


def test_seeds_differ() -> None:
    ids = torch.arange(400)
    first, second = (windows_from_ids(ids, samples=20, length=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_fewer_windows_than_asked_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    windows = sample_windows([list(range(1, 9))], samples=100, length=4, seed=0, bos=None)
    assert len(windows) == 2
    assert "100 calibration windows" in caplog.text and "gives 2" in caplog.text


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=r"has 6 tokens, but one window needs 64; give more text or .* shorter"):
        sample_windows([[0, 1], [1, 2, 3]], samples=1, length=64, seed=0, bos=0)
    with pytest.raises(InputError, match="has 3 tokens, but one window needs 4"):
        windows_from_ids(torch.arange(3), samples=1, length=4, seed=0)
    with pytest.raises(InputError, match="has 0 tokens"):
        sample_windows([], samples=1, length=4, seed=0, bos=None)


@pytest.mark.parametrize(("samples", "length", "part"), [(0, 4, "at least 1 window"), (1, 1, "at least 2 tokens")])
def test_numbers_out_of_range(samples: int, length: int, part: str) -> None:
    with pytest.raises(InputError, match=part):
        sample_windows([[1, 2, 3, 4]], samples=samples, length=length, seed=0, bos=None)
    with pytest.raises(InputError, match=part):
        windows_from_ids(torch.arange(9), samples=samples, length=length, seed=0)


def test_windows_given_are_used_as_they_are() -> None:
    ids = torch.arange(12, dtype=torch.int32).view(3, 4)
    windows = windows_from_ids(ids, samples=3, length=4, seed=0)
    assert windows.dtype == torch.int64 and sorted(windows.tolist()) == ids.tolist()
    cut = windows_from_ids(ids, samples=2, length=3, seed=0)
    assert cut.tolist() == windows[:2, :3].tolist()


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), "have 4 tokens, fewer than 5"),
        (torch.zeros(9), "must be integers, but they are torch.float32"),
        (torch.zeros(9, dtype=torch.bool), "must be integers"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"shape is \(1, 2, 3\)"),
    ],
)
def test_ids_that_cannot_be_windows(ids: torch.Tensor, part: str) -> None:
    with pytest.raises(InputError, match=part):
        windows_from_ids(ids, samples=1, length=5, seed=0)


def test_check_ids() -> None:
    check_ids(torch.tensor([[0, 9]]), 10)
    check_ids(torch.empty(0, 4, dtype=torch.int64), 10)
    with pytest.raises(InputError, match=r"token id 10 .* vocabulary of 10.* tokenizer does not fit the model"):
        check_ids(torch.tensor([[0, 10]]), 10)
    with pytest.raises(InputError, match=r"negative token id \(-1\)"):
        check_ids(torch.tensor([[0, -1]]), 10)


def test_context_length_of_configurations() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=55)) == 55
    assert context_length(LlavaConfig(text_config=LlamaConfig(max_position_embeddings=33))) == 33
    assert context_length(MambaConfig()) is None
    foreign: Any = SimpleNamespace(max_position_embeddings=None, seq_length=44)
    assert context_length(foreign) == 44


def test_window_length_is_capped_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(max_position_embeddings=128)
    assert window_length(100, config) == 100 and window_length(128, config) == 128
    assert window_length(9999, MambaConfig()) == 9999
    assert not caplog.records
    assert window_length(2048, config) == 128
    assert "2048" in caplog.text and "128" in caplog.text
    with pytest.raises(InputError, match="at least 2 tokens, but 1"):
        window_length(1, config)


@given(count=st.integers(0, 50), share=st.floats(0, 1, exclude_max=True))
def test_held_out_windows_are_the_last(count: int, share: float) -> None:
    windows = torch.arange(2 * count).view(count, 2)
    fit, held_out = split_held_out(windows, share)
    assert torch.equal(torch.cat((fit, held_out)), windows)
    assert len(fit) >= 1 or count == 0
    if share == 0 or count < 2:
        assert len(held_out) == 0
    else:
        assert len(held_out) == min(max(round(share * count), 1), count - 1)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_held_out_share_out_of_range(share: float) -> None:
    with pytest.raises(InputError, match="held-out share"):
        split_held_out(torch.zeros(4, 2), share)
