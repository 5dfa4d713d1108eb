"""Tiny tokenizers, trained here."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat and the dog sat on the log", "über die Straße", "one two three four five six"] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
Factory = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> Factory:
    """A byte-level BPE of 300 tokens that puts the tokens named in `template` around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)

    def make(template: str = "<s> $A", context: int = 16) -> PreTrainedTokenizerFast:
        copy = Tokenizer.from_str(backend.to_str())
        special = [(token, copy.token_to_id(token)) for token in SPECIAL]
        copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        # The names are set whatever the template: a BOS that exists is not a BOS that is used.
        return PreTrainedTokenizerFast(
            tokenizer_object=copy, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=context
        )

    return make
