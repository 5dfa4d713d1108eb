"""What several rooms need. Being here also puts `families` on the path."""

import pytest
from families import make_word_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that fits the models of `families`."""
    return make_word_tokenizer()
