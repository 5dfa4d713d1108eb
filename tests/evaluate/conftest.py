"""Tiny tokenizers of the three kinds and a tiny model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat", "über die Straße ging 日本 日本", "one two three four five six"] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
Kind = Callable[[str], PreTrainedTokenizerFast]


def _wrap(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    special = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, template)


def _byte_fallback(template: str) -> PreTrainedTokenizerFast:
    """As Llama 2: a space is "▁", one is put before the text, unknown characters fall back to bytes."""
    letters = sorted({character for text in CORPUS[:1] for character in text if character != " "} | {"▁", "ü"})
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "he", "▁the", "at"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(backend, template)


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer written in Python, without offsets: a token is two bytes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return 300

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(300)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [str(sum(text.encode()[i : i + 2]) % 300) for i in range(0, len(text.encode()), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return str(index)


@pytest.fixture(scope="session")
def byte_level() -> Kind:
    return _byte_level


@pytest.fixture(scope="session")
def byte_fallback() -> Kind:
    return _byte_fallback


@pytest.fixture(scope="session")
def slow_tokenizer() -> PreTrainedTokenizer:
    return CharacterTokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,  # so that likelihoods differ clearly between tokens and contexts
    )
    return LlamaForCausalLM(config)
