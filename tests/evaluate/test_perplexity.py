import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from trimfit.errors import InputError, RunError
from trimfit.evaluate import Score, perplexity, score_text
from trimfit.mode import forward_mode

Kind = Callable[[str], Any]
DOCUMENTS = ["the cat sat on the mat", "", "über 日本 🙂 die Straße" * 5, "x"]


def losses(model: Any, window: list[int]) -> list[float]:
    """By the definition: -log softmax in float64, one window, one token at a time; none for the first token."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([window])).logits[0].double()
    return [-torch.log_softmax(logits[i], dim=0)[window[i + 1]].item() for i in range(len(window) - 1)]


def ragged(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(300, (length,), generator=generator) for length in lengths]


def expected_perplexity(model: Any, windows: list[Tensor]) -> float:
    terms = [loss for window in windows for loss in losses(model, window.tolist())]
    return math.exp(sum(terms) / len(terms))


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_equal_windows(model: Any, batch_tokens: int) -> None:
    windows = ragged(12, 12, 12, 12, 12)
    found = perplexity(model, torch.stack(windows), batch_tokens=batch_tokens)
    assert found == pytest.approx(expected_perplexity(model, windows), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_ragged_windows_as_without_padding(model: Any, batch_tokens: int) -> None:
    windows = ragged(3, 17, 1, 2, 9, 17, 30)
    found = perplexity(model, windows, batch_tokens=batch_tokens)
    assert found == pytest.approx(expected_perplexity(model, windows), rel=1e-5)
    assert found == pytest.approx(perplexity(model, windows[::-1], batch_tokens=batch_tokens), rel=1e-6)


def test_integers_of_any_width(model: Any) -> None:
    tokens = torch.stack(ragged(8, 8))
    assert perplexity(model, tokens.int()) == perplexity(model, tokens)


def test_another_family_and_dtype() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    other = GPT2LMHeadModel(config)
    windows = ragged(5, 11, 32)
    assert perplexity(other, windows) == pytest.approx(expected_perplexity(other, windows), rel=1e-5)
    half = other.to(torch.bfloat16)
    found = perplexity(half, windows, batch_tokens=1)
    with forward_mode(half):  # the same products
        expected = expected_perplexity(half, windows)
    assert found == pytest.approx(expected, rel=1e-5), "the loss is not in bfloat16"


def test_logits_are_turned_to_float32_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = ragged(20, 7)
    whole = perplexity(model, windows)
    monkeypatch.setattr(sys.modules["trimfit.evaluate.perplexity"], "_UPCAST_ENTRIES", 900)
    assert perplexity(model, windows) == pytest.approx(whole, rel=1e-6)


def test_batches_are_bounded(model: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    perplexity(model, ragged(3, 17, 1, 2, 9, 17, 30), batch_tokens=34)
    assert shapes == [(1, 30), (2, 17), (3, 9)]
    assert all(rows == 1 or rows * length <= 34 for rows, length in shapes)


def test_modes_are_restored(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []
    model.model.norm.register_forward_hook(
        lambda module, args, output: seen.extend([module.training, torch.is_inference_mode_enabled()])
    )
    perplexity(model, ragged(5))
    assert seen == [False, True]
    assert [module.training for module in model.modules()] == before
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError):
        perplexity(model, ragged(5))
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (torch.tensor([[1, 300]]), "token id 300 .* vocabulary of 300.* tokenizer does not fit"),
        (torch.tensor([[1, -100]]), "negative token id"),
        (torch.ones(3, 1, dtype=torch.int64), "no token to predict"),
        (torch.ones(0, 8, dtype=torch.int64), "no token to predict"),
        ([], "no token to predict"),
        (torch.ones(9, dtype=torch.int64), r"shape is \(9,\); cut a stream"),
        ([torch.ones(2, 3, dtype=torch.int64)], r"one has \(2, 3\)"),
        (torch.ones(2, 3), "must be integers, but they are torch.float32"),
        (torch.ones(1, 65, dtype=torch.int64), "65 tokens, but the model's context is 64"),
    ],
)
def test_tokens_that_cannot_be_scored(model: Any, tokens: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        perplexity(model, tokens)


def test_batch_tokens_must_be_positive(model: Any) -> None:
    with pytest.raises(InputError, match="batch_tokens is 0"):
        perplexity(model, ragged(5), batch_tokens=0)


class Fixed(nn.Module):
    """A model that gives the logits of a table, whatever came before."""

    config = None

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        assert not use_cache
        return CausalLMOutput(logits=self.table(input_ids))


def test_uniform_model_and_certain_model() -> None:
    uniform: Any = Fixed(torch.zeros(8, 8))
    assert perplexity(uniform, torch.tensor([[1, 2, 3]])) == pytest.approx(8)
    wrong: Any = Fixed(torch.eye(8) * 5000)
    assert perplexity(wrong, torch.tensor([[1, 2, 3]])) == math.inf


def test_nan_names_window_and_token() -> None:
    table = torch.zeros(8, 8)
    table[5] = float("nan")
    broken: Any = Fixed(table)
    with pytest.raises(RunError, match=r"the model gives NaN on token 3 of window 1: .* float32"):
        perplexity(broken, [torch.tensor([1, 2, 3, 4, 1]), torch.tensor([1, 2, 5, 4])])


def test_models_without_logits() -> None:
    class Headless(Fixed):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return BaseModelOutput(last_hidden_state=self.table(input_ids))

    headless: Any = Headless(torch.zeros(8, 8))
    with pytest.raises(InputError, match="Headless gives no logits; load the model with AutoModelForCausalLM"):
        perplexity(headless, torch.tensor([[1, 2]]))


def straightforward(model: Any, tokenizer: Any, documents: list[str], length: int) -> tuple[float, int]:
    """Total nats and tokens with one [BOS] before each window of `length - 1` tokens."""
    total, count = 0.0, 0
    for text in documents:
        ids = tokenizer(text).input_ids[1:]
        for start in range(0, len(ids), length - 1):
            terms = losses(model, [tokenizer.bos_token_id, *ids[start : start + length - 1]])
            total, count = total + sum(terms), count + len(terms)
    return total, count


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_score_with_bos(model: Any, kind: str, length: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)("<s> $A")
    score = score_text(model, tokenizer, DOCUMENTS, length=length)
    total, count = straightforward(model, tokenizer, DOCUMENTS, length)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert (score.tokens, score.bytes, score.window, score.documents) == (count, size, length, 3)
    assert count == sum(len(tokenizer(text).input_ids) - 1 for text in DOCUMENTS)
    assert score.nats == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_every_token_is_predicted_once_whatever_the_window(model: Any, byte_level: Kind) -> None:
    tokenizer = byte_level("<s> $A")
    counts = {(s.tokens, s.bytes) for s in (score_text(model, tokenizer, DOCUMENTS, length=n) for n in (2, 3, 5, 40))}
    assert len(counts) == 1


def test_score_without_bos(model: Any, byte_level: Kind) -> None:
    tokenizer = byte_level("$A")
    score = score_text(model, tokenizer, DOCUMENTS, length=7)
    total, count, size = 0.0, 0, 0
    for text in DOCUMENTS:
        ids = tokenizer(text).input_ids
        for start in range(0, len(ids), 7):
            window = ids[start : start + 7]
            terms = losses(model, window)
            total, count = total + sum(terms), count + len(terms)
            size += sum(len(piece) for piece in tokenizer.convert_ids_to_tokens(window[1:]))
    assert (score.tokens, score.bytes, score.documents) == (count, size, 2)
    assert score.nats == pytest.approx(total / count, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_added_tokens_are_context_only(model: Any, byte_level: Kind) -> None:
    plain, more = byte_level("<s> $A"), byte_level("<s> <s> $A </s>")
    score = score_text(model, more, DOCUMENTS, length=8)
    reference = score_text(model, plain, DOCUMENTS, length=8)
    assert (score.tokens, score.bytes) == (reference.tokens, reference.bytes)
    ids = more("the", add_special_tokens=False).input_ids
    one = score_text(model, more, ["the"], length=8)
    terms = losses(model, [1, 1, *ids])[1:]
    assert one.tokens == len(ids) and one.nats == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_limited_to_the_first_windows(model: Any, byte_level: Kind) -> None:
    tokenizer = byte_level("<s> $A")
    text = DOCUMENTS[2]
    ids = tokenizer(text).input_ids[1:]
    score = score_text(model, tokenizer, [text, "never seen"], length=6, limit_windows=3)
    pieces = tokenizer.convert_ids_to_tokens(ids[:15])
    assert (score.tokens, score.bytes, score.documents) == (15, sum(len(piece) for piece in pieces), 1)
    whole = score_text(model, tokenizer, [text], length=6, limit_windows=10**6)
    assert whole == score_text(model, tokenizer, [text], length=6)


def test_tokenizers_in_python(model: Any, slow_tokenizer: Any) -> None:
    score = score_text(model, slow_tokenizer, ["the cat", "日本"], length=64)
    assert (score.tokens, score.documents) == (3 + 2, 2)
    assert 7 < score.bytes < 13


def test_batches_do_not_change_the_score(model: Any, byte_level: Kind) -> None:
    tokenizer = byte_level("<s> $A")
    one, many = (score_text(model, tokenizer, DOCUMENTS, length=9, batch_tokens=n) for n in (1, 8192))
    assert one.nats == pytest.approx(many.nats, rel=1e-6) and one.bytes == many.bytes


@pytest.mark.parametrize(
    ("template", "options", "part"),
    [
        ("<s> $A", {"length": 1}, "more than 1 tokens to predict one, but 1"),
        ("$A", {"length": 1}, "more than 1 tokens"),
        ("<s> <s> $A", {"length": 2}, "more than 2 tokens"),
        ("<s> $A", {"length": 8, "limit_windows": 0}, "at least 1 window"),
        ("<s> $A", {"length": 65}, "65 tokens, but the model's context is 64"),
    ],
)
def test_options_out_of_range(model: Any, byte_level: Kind, template: str, options: dict[str, int], part: str) -> None:
    with pytest.raises(InputError, match=part):
        score_text(model, byte_level(template), ["the cat " * 40], **options)


def test_nothing_to_predict(model: Any, byte_level: Kind) -> None:
    for template, documents in (("<s> $A", []), ("<s> $A", [""]), ("$A", ["x"])):
        with pytest.raises(InputError, match="no token to predict"):
            score_text(model, byte_level(template), documents, length=8)


def test_a_tokenizer_of_another_model(byte_level: Kind) -> None:
    small: Any = Fixed(torch.zeros(8, 8))
    with pytest.raises(InputError, match="tokenizer does not fit the model"):
        score_text(small, byte_level("<s> $A"), ["the cat"], length=8)


def test_a_score_is_frozen() -> None:
    score: Any = Score(1.0, math.e, 1.0, 1, 1, 8, 1)
    with pytest.raises(AttributeError):
        score.nats = 2.0
