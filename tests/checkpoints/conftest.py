"""Tiny checkpoints on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from families import ALL_FAMILIES
from transformers import PreTrainedTokenizerFast

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> Write:
    """Writes a model of a family with its tokenizer, in one file or in shards."""

    def make(name: str = "llama", shard_bytes: int = 10**9, **options: object) -> Path:
        directory = tmp_path / "models" / name
        model = ALL_FAMILIES[name].build(**options)
        model.save_pretrained(directory, max_shard_size=shard_bytes)
        word_tokenizer.save_pretrained(directory)
        return directory

    return make
